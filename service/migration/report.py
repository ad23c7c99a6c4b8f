"""How far a migration has come, and how the new Semantic IDs differ from the old ones: as JSON, and to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from models.agreement import LevelAgreement, agreement
from models.evaluation.measures import collisions
from service.migration.holdings import Holdings
from service.migration.sides import Sides

NOT_IN_THE_FILES = "not in the files"
REJECTED = "rejected"
CAME_BACK = "came back or arrived meanwhile"


class Missing(NamedTuple):
    """An item that is live under the old tokenizer, and not under the new one.

    Attributes:
        item_id: The item's.
        semantic_id: What it holds under the old one.
        reason: `NOT_IN_THE_FILES`, `REJECTED` or `CAME_BACK`.
    """

    item_id: str
    semantic_id: str
    reason: str


def drift(
    sides: Sides, names: tuple[str, str], missing: Sequence[Missing], *, retired: int, live_again: Sequence[str]
) -> dict[str, Any]:
    """The report.

    Args:
        sides: Both records.
        names: The full names of the old tokenizer and the new one.
        missing: The items that the new one lacks.
        retired: How many items were retired under the new one, as they are under the old one.
        live_again: Items that are live under the new one, and retired under the old one, which no longer decides.

    Returns:
        JSON types only; docs/migration.md has the members.
    """
    old, new = sides.pairs()
    levels = agreement(torch.from_numpy(old), torch.from_numpy(new)) if len(old) else ()
    return {
        "old": _record(names[0], sides.old),
        "new": _record(names[1], sides.new),
        "items": {
            "both": len(old),
            "missing": len(missing),
            "missing_by_reason": dict(sorted(Counter(each.reason for each in missing).items())),
            "only_new": len(sides.new) - len(old),
            "retired": retired,
            "live_again": sorted(live_again),
        },
        "levels": [asdict(level) for level in levels],
    }


def _record(name: str, holdings: Holdings) -> dict[str, Any]:
    """A record's part: its items, and how many of them share all their codes."""
    described: dict[str, Any] = {"tokenizer": name, "revision": holdings.revision, "items": len(holdings)}
    if len(holdings):
        found = collisions(torch.from_numpy(holdings.semantic_ids[:, :-1]))
        described["collisions"] = {"rate": found.rate, "largest_group": found.largest_group}
    return described


def in_words(report: Mapping[str, Any]) -> str:
    """The same, to read."""
    items = report["items"]
    lines = [_record_in_words(side, report[side]) for side in ("old", "new")]
    lines += [f"items under both     {items['both']:,}", f"missing under new    {items['missing']:,}{_reasons(items)}"]
    lines += [f"only under new       {items['only_new']:,}", f"retired, as in old   {items['retired']:,}"]
    if items["live_again"]:
        lines += [f"retired under old    {len(items['live_again']):,} of those only under new, see report.json"]
    lines += [f"default now          {report['default'] or 'not known'}"]
    if switch := report.get("switch"):
        if switch["pending_workers"]:
            lines += [f"not followed yet     {switch['pending_workers']} workers"]
        if switch["note"]:
            lines += [switch["note"]]
    if report["levels"]:
        lines += ["", *table([LevelAgreement(**level) for level in report["levels"]])]
    return "\n".join(lines) + "\n"


def _record_in_words(side: str, record: Mapping[str, Any]) -> str:
    words = f"{side}  {record['tokenizer']}: {record['items']:,} items at revision {record['revision']}"
    if "collisions" in record:
        found = record["collisions"]
        words += f", raw collisions {found['rate']:.2%}, largest group {found['largest_group']}"
    return words


def _reasons(items: Mapping[str, Any]) -> str:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in items["missing_by_reason"].items())
    return f" ({reasons})" if reasons else ""


def table(levels: Sequence[LevelAgreement]) -> list[str]:
    """The figures, a line a level below their heads."""
    rows = [("level", "equal codes", "equal prefixes", "groups old", "new", "together", "pairs kept", "by chance")]
    rows += [
        (
            str(level.level),
            f"{level.equal_codes:.1%}",
            f"{level.equal_prefixes:.1%}",
            f"{level.old_groups:,}",
            f"{level.new_groups:,}",
            f"{level.together:.1%}",
            _share(level.pairs_kept),
            _share(level.pairs_by_chance),
        )
        for level in levels
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"
