"""What follows the fill: the records compared, and the default switched.

filled --> compare: retired as in the old one, what is missing, drift --> switch: once more, the default, once more
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from service.client import TokenizerError, Unavailable
from service.migration.report import CAME_BACK, NOT_IN_THE_FILES, REJECTED, Missing, drift, in_words
from service.migration.sides import Clients, Sides
from service.table import replaced


class NotSwitched(ValueError):
    """The default is what it was: too many items would have no Semantic ID, or the service refused."""


class SwitchUnfinished(ValueError):
    """The new tokenizer is the default, or may be, and what follows is not done: the same command does it."""


class Move:
    """From one tokenizer to another, after the fill.

    Args:
        clients: Of both records.
        answered: What the fill was answered, batch by batch: columns `item_id` and `error`.

    Attributes:
        missing: The items that are live under the old tokenizer, and not under the new one.
        report: As of the last step; see `service.migration.report.drift`.
    """

    def __init__(self, clients: Clients, answered: Callable[[], Iterable[pa.RecordBatch]]) -> None:
        self.missing: list[Missing] = []
        self.report: dict[str, Any] = {}
        self._clients = clients
        self._answered = answered

    def compare(self) -> None:
        """Retire what the old record has retired, and compare both.

        Raises:
            TokenizerError: The client's.
        """
        self._look(self._clients.sides())

    def switch(self, missing_at_most: int, *, force: bool) -> None:
        """Compare once more, make the new tokenizer the default unless it is, and compare what was given meanwhile.

        Args:
            missing_at_most: So many items of the old tokenizer may have no ID under the new one yet.
            force: Though the new one takes other content.

        Raises:
            NotSwitched: More are missing, or the service refused.
            SwitchUnfinished: The service could not be asked all of it; the report says what the default is.
            TokenizerError: The client's, before anything was switched.
        """
        if not self._clients.old_decides:
            return
        self._look(self._clients.later(self._sides))
        old, new = self._clients.names
        if not len(self._sides.old.item_ids):
            raise NotSwitched(f"nothing was switched: no item is live under {old} in this namespace")
        if len(self.missing) > missing_at_most:
            raise NotSwitched(
                f"nothing was switched: {len(self.missing)} items would have no Semantic ID under {new}. "
                f"Give their contents by --items, or say --missing-at-most {len(self.missing)}"
            )
        switch = self._make_default(force=force)
        self.report |= {"default": self._clients.default, "switch": switch}
        try:
            self._look(self._clients.later(self._sides))
        except TokenizerError as error:
            raise SwitchUnfinished(
                f"{new} is the default now; what changed under {old} meanwhile could not be read ({error}). The report "
                "is of the moment before; the same command reads it once more"
            ) from error
        self.report["switch"] = switch

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
        clients = self._clients
        live_again = [] if clients.old_decides else clients.retired_in_old(sides.only_new())
        missing = _reasoned(sides.missing(), self._answered())
        found = drift(sides, clients.names, missing, retired=clients.retired, live_again=live_again)
        self._sides, self.missing, self.report = sides, missing, {"default": clients.default, **found}

    def _make_default(self, *, force: bool) -> dict[str, Any]:
        """Make the new tokenizer the default; what the report says of it.

        Raises:
            NotSwitched: The default is what it was.
            SwitchUnfinished: It is the new one, or may be, though the service did not confirm it.
        """
        new = self._clients.names[1]
        self._clients.default = self.report["default"] = None  # whatever ends this now
        try:
            swapped = self._clients.new.make_default(new, force=force)
        except TokenizerError as error:
            self._clients.default = self.report["default"] = self._asked_default(error)
            if self._clients.default is None:
                raise SwitchUnfinished(
                    f"whether {new} is the default now is not known ({error}). The same command finds out, and goes on"
                ) from error
            if self._clients.old_decides:
                raise NotSwitched(f"nothing was switched: {error}") from error
            raise SwitchUnfinished(
                f"{new} is the default now, though the service did not say so ({error}). The same command goes on"
            ) from error
        self._clients.default = swapped.default
        return {"pending_workers": swapped.pending, "note": swapped.note}

    def _asked_default(self, error: TokenizerError) -> str | None:
        """The default after a call that failed; None where the service is away."""
        if isinstance(error, Unavailable):
            return None
        try:
            return self._clients.new.tokenizers().default
        except TokenizerError:
            return None


def _reasoned(missing: Sequence[tuple[str, str]], answered: Iterable[pa.RecordBatch]) -> list[Missing]:
    """Why items are missing, by what the fill was answered of each."""
    wanted = pa.array([item_id for item_id, _ in missing], pa.string())
    reasons: dict[str, str] = {}
    for batch in answered if missing else ():
        found = batch.filter(pc.is_in(batch["item_id"], value_set=wanted))
        for item_id, error in zip(found["item_id"].to_pylist(), found["error"].is_valid().to_pylist(), strict=True):
            reasons[item_id] = REJECTED if error else CAME_BACK
    return [Missing(*pair, reasons.get(pair[0], NOT_IN_THE_FILES)) for pair in missing]
