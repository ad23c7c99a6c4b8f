"""The use case: a content -> its path down the levels, the ID it would get, and the live items nearest to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.answers import Answer, holder
from service.content import Item
from service.displays import show
from service.explaining.explainer import Path
from service.explaining.schemas import ExplainRequest
from service.records import Records
from service.registry.assignment import Assignment
from service.registry.record import Record
from service.semantic_id import MAX_SUFFIX, SemanticId, write_prefix
from service.tokenizers import LoadedTokenizer, Tokenizers

Codes = tuple[int, ...]


class Explaining:
    """Answers those who ask how a content comes to its codes; writes nothing."""

    def __init__(self, tokenizers: Tokenizers, records: Records) -> None:
        self._tokenizers = tokenizers
        self._records = records

    async def explain(self, request: ExplainRequest) -> Answer:
        """Answer `POST /explain`.

        Raises:
            ItemError: What is wrong with the content.
            ServiceError: A fault of the whole request.
        """
        tokenizer = self._tokenizers.named(request.tokenizer)
        item_id, item = _read(request.item, tokenizer)
        path = await tokenizer.explainer.explain(item.content)
        record = await self._records.of(request.namespace, tokenizer.manifest)
        counts = await _live_under(record, path.codes)
        return {
            **tokenizer.origin(request.namespace),
            **await _place(record, item_id, item, path, tokenizer),
            "codes": list(path.codes),
            "levels": [_level(path, level, counts[level + 1]) for level in range(len(path.codes))],
            "latent_norm": path.residual_norms[0],
            "margin": min(path.margins),
            "quantization_error": path.quantization_error,
            "training": _training(tokenizer, path),
            "prefix_is_coarse_to_fine": tokenizer.manifest.prefix_is_coarse_to_fine,
            "nearest": await _nearest(record, path.codes, counts, request.neighbours, item_id),
        }


def _read(entry: Mapping[str, Any], tokenizer: LoadedTokenizer) -> tuple[str | None, Item]:
    """The id of the item that the content is named for, if it is for one; and the content."""
    item = tokenizer.reader.read({"item_id": "nameless", **entry})
    return (item.item_id if "item_id" in entry else None), item


async def _live_under(record: Record, codes: Codes) -> list[int]:
    """How many live items stand under each prefix of the codes, from the root on: L + 1 counts."""
    children = await record.tree.children([codes[:level] for level in range(len(codes) + 1)])
    return [sum(following.values()) for following in children]


async def _place(record: Record, item_id: str | None, item: Item, path: Path, tokenizer: LoadedTokenizer) -> Answer:
    """The Semantic ID that the item holds, or that the next new item of these codes would get."""
    held = None
    if item_id is not None:
        (held,) = await record.by_item_ids([item_id])
    (issued,) = await record.group_sizes([path.codes])
    highest = tokenizer.manifest.max_suffix
    free = issued <= (MAX_SUFFIX if highest is None else highest)
    semantic_id = held.semantic_id if held else SemanticId(path.codes, issued) if free else None
    return {
        "item_id": item_id,
        "semantic_id": str(semantic_id) if semantic_id else None,
        "tokens": list(semantic_id.tokens) if semantic_id else None,
        "held": held is not None,
        "retired": held is not None and held.retired_at is not None,
        "content_changed": held is not None and _changed(held, item, path),
        "group_size": issued,
    }


def _changed(held: Assignment, item: Item, path: Path) -> bool:
    """Whether an ID is of other codes; of content that is known, and may lie beside its full codes, the record says."""
    return held.content_changed if held.digest == item.digest else held.semantic_id.codes != path.codes


def _level(path: Path, level: int, live: int) -> Answer:
    return {
        "level": level + 1,
        "code": path.codes[level],
        "prefix": write_prefix(path.codes[: level + 1]),
        "margin": path.margins[level],
        "residual_norm": path.residual_norms[level + 1],
        "count": live,
    }


def _training(tokenizer: LoadedTokenizer, path: Path) -> Answer | None:
    """Where the quantization error lies among those of the training items."""
    training = tokenizer.errors.training
    if training is None:
        return None
    return {"quantization_error": training.as_dict(), "share_below": training.share_below(path.quantization_error)}


async def _nearest(record: Record, codes: Codes, counts: list[int], limit: int, item_id: str | None) -> list[Answer]:
    """Live items that share the longest prefixes with the codes, the longest first; each shares one code at least."""
    found: dict[SemanticId, int] = {}
    for shared in range(len(codes), 0, -1):
        if counts[shared] > len(found):
            # What shares more codes was found before: so many more have to be listed to find as many others.
            page = await record.tree.page(codes[:shared], limit + 1 + len(found))
            found |= {semantic_id: shared for semantic_id in page.semantic_ids if semantic_id not in found}
        if len(found) > limit:  # one more than asked for, as the item itself may be among them
            break
    holders = await record.by_semantic_ids(list(found))
    nearest = [
        {"shared_levels": shared, **holder(assignment)}
        for shared, assignment in zip(found.values(), holders, strict=True)
        if assignment and assignment.live and assignment.item_id != item_id
    ]
    await show(record, nearest[:limit])
    return nearest[:limit]
