"""What every command shares: the settings, failures in words, a progress bar."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer

if TYPE_CHECKING:
    from tqdm import tqdm

    from service.settings import Settings


def read_settings(checkpoint: Path | None = None) -> Settings:
    """The SID_* settings, with another checkpoint where one is given.

    A variable that is like a setting and is none is refused: `SID_KEY_FILE` would leave the service open.
    """
    from pydantic import ValidationError

    from service.schemas import describe
    from service.settings import Settings, strangers

    for name, meant in strangers(os.environ).items():
        if meant:
            raise typer.BadParameter(f"{name} is none; is {meant} meant?", param_hint="SID_* settings")
        typer.echo(f"semid: {name} is no setting and is passed over", err=True)
    try:
        settings = Settings()
    except ValidationError as error:
        raise typer.BadParameter(describe(error.errors()).replace("; ", "\n"), param_hint="SID_* settings") from error
    if checkpoint is None:
        return settings
    return settings.model_copy(update={"checkpoint": checkpoint, "further_checkpoints": ()})


Force = Annotated[bool, typer.Option("--force", help="Write over what is there already.")]


@contextmanager
def failures() -> Iterator[None]:
    """What goes wrong, in words."""
    from models import CheckpointError
    from service.errors import SemidError

    try:
        yield
    except (CheckpointError, SemidError, ValueError, OSError) as error:
        raise failure(str(error)) from error


def refuse_taken(out: Path, *, force: bool) -> None:
    """Before hours of work, not after: what is there already is not written over without `--force`.

    Raises:
        Exit: A file, or a directory that is not empty, is there.
    """
    if not force and (any(out.iterdir()) if out.is_dir() else out.exists()):
        raise failure(f"{out} is there already; with --force it is written over")


class Bar:
    """A progress bar of something whose number is only estimated; there is none before there is progress."""

    def __init__(self, name: str, unit: str) -> None:
        self._name = name
        self._unit = unit
        self._bar: tqdm | None = None

    def show(self, done: int, total: int) -> None:
        """So many of so many are done."""
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(desc=self._name, unit=self._unit)
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def failure(words: str) -> typer.Exit:
    """Says what went wrong and makes the exit status 1; to be raised."""
    typer.echo(f"semid: {words}", err=True)
    return typer.Exit(1)
