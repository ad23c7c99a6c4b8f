"""What follows the fill: the records compared, and the default switched.

filled --> compare: retired as in the old one, what is missing, drift --> switch: once more, then the default, then late
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from service.client import ChangesGone
from service.migration.report import CAME_BACK, NOT_IN_THE_FILES, REJECTED, Missing, drift, in_words
from service.migration.sides import Clients, Sides
from service.table import replaced


class NotSwitched(ValueError):
    """Too many items would have no Semantic ID under the new default."""


class Move:
    """From one tokenizer to another, after the fill.

    Args:
        clients: Of both records.
        names: The full names of the old tokenizer and the new one.
        answered: What the fill was answered, batch by batch: columns `item_id` and `error`.

    Attributes:
        missing: The items that are live under the old tokenizer, and not under the new one.
        report: As of the last step; see `service.migration.report.drift`.
    """

    def __init__(
        self, clients: Clients, names: tuple[str, str], answered: Callable[[], Iterable[pa.RecordBatch]]
    ) -> None:
        self.missing: list[Missing] = []
        self.report: dict[str, Any] = {}
        self._clients = clients
        self._names = names
        self._answered = answered

    def compare(self) -> None:
        """Retire what the old record has retired, and compare both.

        Raises:
            TokenizerError: The client's.
        """
        self._look(self._clients.sides())

    def switch(self, missing_at_most: int, *, force: bool) -> None:
        """Compare once more, make the new tokenizer the default, and list what the old one was given meanwhile.

        Args:
            missing_at_most: So many items of the old tokenizer may have no ID under the new one yet.
            force: Though the new one takes other content.

        Raises:
            NotSwitched: More are missing.
            TokenizerError: The client's.
        """
        try:
            sides = self._clients.followed(self._sides)
        except ChangesGone:
            sides = self._clients.sides()
        self._look(sides)
        if len(self.missing) > missing_at_most:
            raise NotSwitched(
                f"nothing was switched: {len(self.missing)} items would have no Semantic ID under {self._names[1]}. "
                f"Give their contents by --items, or say --missing-at-most {len(self.missing)}"
            )
        swapped = self._clients.new.make_default(self._names[1], force=force)
        since = sides.old.followed(self._clients.old)
        after = Sides(since.holdings, sides.new.followed(self._clients.new).holdings)
        lacking = {item_id for item_id, _ in after.missing()}
        extra = set(after.only_new())
        self.report["switch"] = {
            "default": swapped.default,
            "pending_workers": swapped.pending,
            "late": sorted(lacking.intersection(since.came)),
            "late_retired": sorted(extra.intersection(since.went)),
        }

    def write(self, directory: Path) -> None:
        """Write `report.json`, `report.txt` and `missing.jsonl`, each whole or as it was."""
        rows = [json.dumps(each._asdict(), ensure_ascii=False) + "\n" for each in self.missing]
        texts = {
            "report.json": json.dumps(self.report, indent=2, ensure_ascii=False) + "\n",
            "report.txt": in_words(self.report),
            "missing.jsonl": "".join(rows),
        }
        for name, text in texts.items():
            with replaced(directory / name) as draft:
                draft.write_text(text, encoding="utf-8")

    def _look(self, sides: Sides) -> None:
        self._sides = sides
        self.missing = _reasoned(sides.missing(), self._answered())
        self.report = drift(sides, self._names, self.missing, retired=self._clients.retired)


def _reasoned(missing: Sequence[tuple[str, str]], answered: Iterable[pa.RecordBatch]) -> list[Missing]:
    """Why items are missing, by what the fill was answered of each."""
    wanted = pa.array([item_id for item_id, _ in missing], pa.string())
    reasons: dict[str, str] = {}
    for batch in answered if missing else ():
        found = batch.filter(pc.is_in(batch["item_id"], value_set=wanted))
        for item_id, error in zip(found["item_id"].to_pylist(), found["error"].is_valid().to_pylist(), strict=True):
            reasons[item_id] = REJECTED if error else CAME_BACK
    return [Missing(*pair, reasons.get(pair[0], NOT_IN_THE_FILES)) for pair in missing]
