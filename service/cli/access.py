"""Commands on the keys that callers need: `semid keys`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.frame import failures

if TYPE_CHECKING:
    from service.access.keys import KeyFile

File = Annotated[
    Path, typer.Option(envvar="SID_KEYS_FILE", dir_okay=False, help="The file of keys that the service reads.")
]
Name = Annotated[str, typer.Argument(help="Whose key it is: letters, digits and . _ @ -")]

keys = typer.Typer(
    help="The keys that callers need; a running service takes changes within a second.", no_args_is_help=True
)


@keys.command()
def add(
    name: Name,
    file: File,
    scope: Annotated[str, typer.Option(help="read; tokenize, which includes it; or admin, which includes both.")],
    days: Annotated[
        float | None, typer.Option(min=0, max=36_500, help="After which it is no longer taken; else never.")
    ] = None,
) -> None:
    """Make a key and show it, this once: only its digest is kept."""
    from service.access.keys import Scope

    if scope not in list(Scope):
        raise typer.BadParameter("one of " + ", ".join(Scope), param_hint="--scope")
    with failures():
        expires_at = None if days is None else datetime.now(UTC) + timedelta(days=days)
        kept, secret = _read(file).with_new(name, Scope(scope), expires_at)
        kept.write(file)
    typer.echo(secret)


@keys.command()
def remove(name: Name, file: File) -> None:
    """Take a key out of force."""
    with failures():
        _read(file).without(name).write(file)
    typer.echo(f"{name} is in force no longer")


@keys.command(name="list")
def list_(file: File) -> None:
    """Show whose keys there are, for what, since and until when."""
    with failures():
        found = _read(file).keys
    for key in found:
        until = "" if key.expires_at is None else f"  until {key.expires_at:%Y-%m-%d %H:%M}"
        typer.echo(f"{key.name:24}  {key.scope:8}  since {key.created_at:%Y-%m-%d %H:%M}{until}")


def _read(file: Path) -> KeyFile:
    from service.access.keys import KeyFile

    return KeyFile.read(file) if file.exists() else KeyFile()
