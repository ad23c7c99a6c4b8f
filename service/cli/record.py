"""Commands on the durable record: `semid export`, `semid import`, `semid registry`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.backup.formats import Format
from service.cli.frame import Bar, Force, failure, failures, read_settings, refuse_taken

if TYPE_CHECKING:
    from service.registry.history import Comparison

Checkpoint = Annotated[Path | None, typer.Option(help="Its tokenizer's checkpoint; SID_CHECKPOINT if not given.")]
TokenizerName = Annotated[
    str | None, typer.Option(help="Its tokenizer, where the service has several: name, or name@fingerprint.")
]

registry = typer.Typer(help="Whether the registry is older than what was acknowledged.", no_args_is_help=True)


def export(
    file: Annotated[Path, typer.Argument(dir_okay=False, help="The new file; it appears when it is whole.")],
    format_: Annotated[
        Format, typer.Option("--format", help="The whole table, or what a generator reads of the live items.")
    ] = Format.PARQUET,
    namespace: Annotated[str, typer.Option(help="The catalogue's namespace.")] = "default",
    checkpoint: Checkpoint = None,
    tokenizer: TokenizerName = None,
    token_base: Annotated[int, typer.Option(min=0, help="jsonl: the number of the token <a_0>.")] = 0,
    force: Force = False,
) -> None:
    """Copy the record of a namespace to a file, at one revision, while the service goes on.

    Reads the registry of the SID_* settings.

    The table has every Semantic ID ever assigned: a backup for semid import, and what a generator is trained on.
    """
    from service.backup.commands import export as run

    if token_base and format_ is not Format.JSONL:
        raise typer.BadParameter(f"{format_.value} has no token ids", param_hint="--token-base")
    refuse_taken(file, force=force)
    settings = read_settings(checkpoint)
    with failures(), Bar(file.name, " items") as bar:
        description, suffixes = asyncio.run(
            run(
                settings,
                file,
                format_,
                tokenizer=tokenizer,
                namespace=namespace,
                token_base=token_base,
                progress=bar.show,
            )
        )
    typer.echo(f"{file}: namespace {namespace} under {description.origin.tokenizer} at revision {description.revision}")
    if suffixes is not None:
        sizes = ", ".join(map(str, (*description.origin.codebook_sizes, suffixes)))
        typer.echo(f"tokens by level, the suffixes last: {sizes}")


def import_(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A table that semid export wrote.")],
    namespace: Annotated[str | None, typer.Option(help="The catalogue's namespace; the table's if not given.")] = None,
    checkpoint: Checkpoint = None,
    tokenizer: TokenizerName = None,
) -> None:
    """Put the Semantic IDs of a table back into the registry of the SID_* settings, with their times.

    What the record holds stands, so doing it again changes nothing.

    Rows that would break a promise are refused: a file beside FILE has them with the reason, and the exit status is 1.
    """
    from service.backup.commands import restore as run

    settings = read_settings(checkpoint)
    with failures(), Bar(file.name, " IDs") as bar:
        description, outcome, refused = asyncio.run(
            run(settings, file, tokenizer=tokenizer, namespace=namespace, progress=bar.show)
        )
    namespace = description.origin.namespace if namespace is None else namespace
    where = f"namespace {namespace} under {description.origin.tokenizer}"
    typer.echo(f"{where}: {outcome.restored} IDs restored, {outcome.known} were there already")
    if outcome.refused:
        raise failure(f"{outcome.refused} rows were refused; the reasons are in {refused}")


@registry.command()
def status() -> None:
    """List the records of the registry beside how far they had come, as this data directory (SID_DATA_DIR) knows it.

    The exit status is 1 where one is older.
    """
    from service.acceptance import compared, described

    with failures():
        comparisons = asyncio.run(compared(read_settings()))
    for comparison in comparisons:
        typer.echo(described(comparison))
    _require_marks(comparisons)
    if older := [comparison.name for comparison in comparisons if comparison.older]:
        raise failure(f"older than what was acknowledged, and refused: {', '.join(older)}; see semid registry accept")


@registry.command()
def accept(
    namespace: Annotated[
        list[str] | None, typer.Option(help="Only records of this namespace; may be repeated.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Go on from a registry that is older than what was acknowledged, and give up what it lost.

    Run it with the settings of a service that refuses (SID_DATA_DIR, SID_REDIS_URL); all services go on by themselves.
    """
    from service.acceptance import AT_STAKE, compared, described
    from service.acceptance import accept as run

    with failures():
        comparisons = asyncio.run(compared(read_settings()))
    _require_marks(comparisons)
    named = {comparison.name.rpartition(":")[0] for comparison in comparisons}
    if unknown := set(namespace or ()) - named:
        raise failure(
            f"no record is of the namespace {', '.join(sorted(unknown))}; there are {', '.join(sorted(named))}"
        )
    chosen = [
        comparison
        for comparison in comparisons
        if comparison.older and (not namespace or comparison.name.rpartition(":")[0] in namespace)
    ]
    if not chosen:
        typer.echo("No record is older than what was acknowledged: nothing to accept.")
        return
    for comparison in chosen:
        typer.echo(described(comparison))
    typer.echo(AT_STAKE)
    if not yes:
        typer.confirm(f"Give up what these {len(chosen)} records lost?", abort=True)
    with failures():
        left = asyncio.run(run(read_settings(), chosen))
    typer.echo(f"Accepted: {len(chosen) - len(left)}. Services that run go on by themselves.")
    if left:
        names = ", ".join(comparison.name for comparison in left)
        raise failure(f"not accepted, as others have changed it meanwhile: {names}; look again")


def _require_marks(comparisons: Sequence[Comparison]) -> None:
    """Nothing can be said of records where nobody has written down how far they had come."""
    if not any(comparison.marks or comparison.older for comparison in comparisons):
        where = read_settings().data_dir / "history"
        raise failure(
            f"there are no marks in {where}, so nothing tells whether these records are older: set SID_DATA_DIR to the "
            "data directory of a service"
        )
