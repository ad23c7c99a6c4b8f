"""What a person watching a training sees: a bar on a terminal, a plain line for each epoch anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tqdm import tqdm

from models.training.history import TRAINING, EpochRecord, Measure

# Terms of the loss in the order in which they are shown; "codebook 1" and its like are in training.json.
_TOTAL = "total"


class Progress:
    """Shows the epochs of a training.

    Args:
        say: Takes lines for the user; one for each epoch where there is no terminal.
        terminal: Whether standard error, where the bar is drawn, is one; None looks.
    """

    def __init__(self, say: Callable[[str], None], *, terminal: bool | None = None) -> None:
        self._say = say
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._bar: tqdm[None] | None = None
        self._stage = ""
        self._epochs = 0

    def begin(self, stage: str, epochs: int, done: int = 0) -> None:
        """A stage of so many epochs begins, or goes on after those done."""
        self.end()
        self._stage, self._epochs = stage, epochs
        if done:
            self._say(f"going on after {stage} epoch {done} of {epochs}")
        if self._terminal and epochs:
            self._bar = tqdm(total=epochs, initial=done, desc=stage, unit="epoch", dynamic_ncols=True)

    def show(self, record: EpochRecord, best: Measure | None = None) -> None:
        """An epoch is over."""
        if self._bar is not None:
            self._bar.set_postfix_str(brief(record, best), refresh=False)
            self._bar.update()
        elif not self._terminal:
            name = "epoch" if self._stage == TRAINING else f"{self._stage} epoch"
            self._say(f"{name} {record.epoch}/{self._epochs}: {figures(record, best)}")

    def end(self) -> None:
        """The stage is over."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def figures(record: EpochRecord, best: Measure | None = None) -> str:
    """What matters of an epoch, on one line; what decides comes first."""
    losses = record.losses
    parts = []
    if record.held_out:
        held_out = record.held_out
        parts.append(f"held out: reconstruction {held_out.reconstruction:.3f}, colliding {held_out.colliding:.2%}")
    if best:
        parts.append(f"best epoch {best.epoch}")
    if record.levels:
        used = [level.used for level in record.levels]
        worst = used.index(min(used))
        parts.append(f"used: level 1 {used[0]:.1%}, worst (level {worst + 1}) {used[worst]:.1%}")
        if restarted := sum(level.restarted for level in record.levels):
            parts.append(f"restarted {restarted}")
    if losses:
        terms = [f"{name} {value:.3f}" for name, value in losses.items() if name != _TOTAL and not name[-1].isdigit()]
        parts.append(f"loss {losses[_TOTAL]:.3f} (unweighted: {', '.join(terms)})")
    return "; ".join(parts)


def brief(record: EpochRecord, best: Measure | None = None) -> str:
    """The same for a bar, which has to stand on the line too."""
    parts = []
    if record.held_out:
        parts.append(f"held out {record.held_out.reconstruction:.3f}, colliding {record.held_out.colliding:.1%}")
    if best:
        parts.append(f"best epoch {best.epoch}")
    if record.levels:
        parts.append(f"used {min(level.used for level in record.levels):.0%}")
    if record.losses:
        parts.append(f"loss {record.losses[_TOTAL]:.3f}")
    return ", ".join(parts)
