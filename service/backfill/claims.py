r"""Runs of sorted items -> what each holds in the record: its ID, claimed now or before.

    run --recall--> which had an ID before: on disk --new ones in bulk--> suffixes
                                                    \-> all others: what they hold, or a claim by itself

Titles go before the claims and behind them, as `service.registry.displays` has it.

Which items had an ID before is on disk before the first claim of a run, so a run that is claimed again after a kill
still tells the new from the known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from models.whole_files import write_whole
from service.backfill.code_files import ERROR, packed_column, unpacked, write_arrow
from service.backfill.journal import Journal
from service.backfill.sorting import Run
from service.errors import SuffixExhausted
from service.opening import Patience
from service.registry import Claim, Record
from service.registry.assignment_columns import pack

CLAIMS_TOGETHER = 4096

Places = NDArray[np.int64]


class RunItems(NamedTuple):
    """The items of a run, in order.

    Attributes:
        item_ids: UTF-8.
        digests: (n,) uint64.
        codes: (n, L) int32.
        titles: Those to keep.
    """

    item_ids: Sequence[bytes]
    digests: NDArray[np.uint64]
    codes: NDArray[np.int32]
    titles: Sequence[str | None]

    def ids(self, places: Places) -> list[bytes]:
        """Those at these places."""
        return [self.item_ids[place] for place in places.tolist()]

    def shown(self, places: Iterable[int]) -> dict[bytes, str]:
        """The titles of those at these places that have one."""
        return {self.item_ids[place]: title for place in places if (title := self.titles[place]) is not None}


class Holdings(NamedTuple):
    """What the items of a run hold, in order; where one failed, its other columns say nothing.

    Attributes:
        codes: (n, L) int32.
        suffixes: (n,) int64.
        content_changed: (n,) bool.
        failures: The errors of items that got nothing.
    """

    codes: NDArray[np.int32]
    suffixes: NDArray[np.int64]
    content_changed: NDArray[np.bool_]
    failures: dict[int, SuffixExhausted]


async def claim_run(record: Record, journal: Journal, number: int, run: Run, patience_s: float) -> None:
    """Claims a run; what its items hold is on disk when this returns.

    Raises:
        RegistryUnavailable: The registry was away for longer than the patience; what was claimed stands.
    """
    layout = record.layout
    items = RunItems(
        run.rows["item_id"].cast(pa.binary()).to_pylist(),
        run.rows["digest"].to_numpy(),
        unpacked(run.rows["codes"], layout),
        run.rows["display"].to_pylist(),
    )
    path = journal.known_file(number)
    if not path.exists():
        held = await Patience(patience_s).answer(partial(record.held, items.item_ids))
        write_whole(path, held.known.tobytes())
    known = np.frombuffer(path.read_bytes(), np.bool_)
    holdings = await Patience(patience_s).answer(partial(_claim, record, items, known))
    created = ~known & _first(items.item_ids)
    back = np.argsort(run.places)  # to the order of the slices
    table = pa.table(
        {
            "codes": packed_column(pack(holdings.codes[back], layout)),
            "suffix": pa.array(holdings.suffixes[back]),
            "created": pa.array(created[back]),
            "content_changed": pa.array(holdings.content_changed[back]),
            "error": _errors(holdings.failures, back),
        }
    )
    write_arrow(journal.claim_file(number), table)


async def _claim(record: Record, items: RunItems, known: NDArray[np.bool_]) -> Holdings:
    """Claims what was not known, in order, and finds out what the others hold; may be done again."""
    codes, suffixes = items.codes.copy(), np.full(len(known), -1)
    changed = np.zeros(len(known), np.bool_)
    new = np.flatnonzero(~known)
    await record.displays.announce(items.shown(new.tolist()))
    if len(new):
        suffixes[new] = await record.claim_columns(items.ids(new), items.digests[new], items.codes[new])
    others = np.flatnonzero(suffixes < 0)
    failures: dict[int, SuffixExhausted] = {}
    if len(others):
        held = await record.held(items.ids(others))
        stands = held.live & (held.digests == items.digests[others])
        places = others[stands]
        codes[places], suffixes[places] = held.codes[stands], held.suffixes[stands]
        changed[places] = held.content_changed[stands]
        rest = others[~stands].tolist()
        for start in range(0, len(rest), CLAIMS_TOGETHER):
            some = rest[start : start + CLAIMS_TOGETHER]
            claims = [
                Claim(items.item_ids[i].decode(), tuple(items.codes[i].tolist()), items.digests[i].tobytes())
                for i in some
            ]
            for place, result in zip(some, await record.claim(claims), strict=True):
                if isinstance(result, SuffixExhausted):
                    failures[place] = result
                    continue
                semantic_id = result.assignment.semantic_id
                codes[place], suffixes[place] = semantic_id.codes, semantic_id.suffix
                changed[place] = result.assignment.content_changed
    await record.displays.put(items.shown(place for place in range(len(known)) if place not in failures))
    await record.displays.retire(list(items.shown(failures)))
    return Holdings(codes, suffixes, changed, failures)


def _first(item_ids: Sequence[bytes]) -> NDArray[np.bool_]:
    """Which stand at the first place of their id."""
    first = np.ones(len(item_ids), np.bool_)
    if len(set(item_ids)) < len(item_ids):
        seen: set[bytes] = set()
        for place, item_id in enumerate(item_ids):
            first[place] = item_id not in seen
            seen.add(item_id)
    return first


def _errors(failures: dict[int, SuffixExhausted], back: Places) -> pa.Array:
    if not failures:
        return pa.nulls(len(back), ERROR)
    return pa.array([failures[i].as_error() if i in failures else None for i in back.tolist()], ERROR)
