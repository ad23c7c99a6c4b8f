"""Whether everything that tells of a record tells the same."""

from __future__ import annotations

from collections import Counter

from service.decoding.snapshot import take
from service.registry import Record
from service.registry.assignment import Assignment
from service.semantic_id import SemanticId


async def agreed(record: Record, *, whole_log: bool = True) -> dict[str, SemanticId]:
    """The live assignments, after comparing forward, reverse, tree, count, trie and changes with each other."""
    found = await forward(record)
    live = {item_id: one.semantic_id for item_id, one in found.items() if one.live}
    ids = sorted(live.values())
    assert len(set(ids)) == len(ids), "an ID is held twice"
    reverse = await record.by_semantic_ids(ids)
    assert {one and one.semantic_id: one and one.item_id for one in reverse} == {
        id_: item for item, id_ in live.items()
    }
    assert (await record.tree.page((), len(ids) + 1)).semantic_ids == ids
    await _the_tree_counts(record, ids)
    assert await record.count() == len(ids)
    trie = await take(record)
    assert [tuple(row) for row in trie.semantic_ids().tolist()] == [(*one.codes, one.suffix) for one in ids]
    if whole_log:
        await _the_changes_lead_to(record, ids)
    return live


async def _the_changes_lead_to(record: Record, ids: list[SemanticId]) -> None:
    followed: set[SemanticId] = set()
    changes = (await record.changes.after(0, 1_000_000)).changes
    for change in changes:
        (followed.add if change.live else followed.discard)(change.semantic_id)
    assert sorted(followed) == ids
    assert [change.revision for change in changes] == list(range(1, len(changes) + 1))


async def forward(record: Record) -> dict[str, Assignment]:
    """Every assignment, by its item, as the item's own bucket has it."""
    item_ids = [held.item_id.decode() async for part in record.contents.scan() for held in part.items]
    found = await record.by_item_ids(item_ids)
    return {one.item_id: one for one in found if one is not None}


async def _the_tree_counts(record: Record, ids: list[SemanticId]) -> None:
    rows = [(*one.codes, one.suffix) for one in ids]
    prefixes = {row[:depth] for row in rows for depth in range(len(record.layout.codebook_sizes) + 1)} | {()}
    children = await record.tree.children(list(prefixes))
    for prefix, counts in zip(prefixes, children, strict=True):
        assert counts == Counter(row[len(prefix)] for row in rows if row[: len(prefix)] == prefix)
