"""From one tokenizer of a running service to the next: `semid migrate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.frame import failure
from service.cli.tokenize import INTERRUPTED, REJECTED, Waits, keep_answers

if TYPE_CHECKING:
    from service.cli.tokenize_journal import Journal
    from service.client import TokenizerClient
    from service.migration.move import Move, NotSwitched


def migrate(
    old: Annotated[str, typer.Argument(help="The tokenizer to leave: name@fingerprint, or a name only one has.")],
    new: Annotated[str, typer.Argument(help="The tokenizer to go to, loaded beside it.")],
    items: Annotated[
        list[Path],
        typer.Option(exists=True, dir_okay=False, help="The catalogue: Parquet, JSONL or CSV; may be repeated."),
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Directory of the report and the new IDs.")] = Path(
        "migration"
    ),
    url: Annotated[str, typer.Option(help="The service.")] = "http://127.0.0.1:8000",
    namespace: Annotated[str, typer.Option(help="The catalogue's namespace.")] = "default",
    switch: Annotated[bool, typer.Option("--switch", help="Make NEW the default then, of all namespaces.")] = False,
    missing_at_most: Annotated[
        int, typer.Option(min=0, help="--switch: so many items of OLD may have no ID under NEW yet.")
    ] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="--switch: even where NEW takes other content than OLD.")
    ] = False,
    batch_items: Annotated[int, typer.Option(min=1, help="Items of one request.")] = 256,
    in_flight: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 4,
    patience: Annotated[float, typer.Option(min=0, help="Seconds to wait for a service that is away.")] = 120.0,
    api_key: Annotated[
        str | None, typer.Option(envvar="SEMID_API_KEY", show_envvar=True, help="Where the service asks for one.")
    ] = None,
) -> None:
    """Give every item its Semantic ID under NEW, through a running service, and say how these differ from OLD's.

    The contents come from the catalogue's files: the registry keeps none. What OLD holds and no file has is listed.
    After a kill or a failure the same command goes on where it stopped; done again, it fills what has come since.

    Roll back by `semid migrate NEW OLD ... --switch`, or at once by `semid tokenizers default OLD`. The exit status is
    3 where items were rejected or are missing.
    """
    from service.cli.tokenize_journal import Journal
    from service.cli.tokenize_source import Several, source_of
    from service.client import TokenizerClient, TokenizerError
    from service.migration.move import Move
    from service.migration.report import in_words
    from service.migration.sides import Clients

    read = [(path, path.stat()) for path in items]
    identity = {
        "files": [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in read],
        "record": [url, namespace, old, new],
    }
    waits = Waits(url, patience)
    connect = partial(TokenizerClient, url, namespace=namespace, patience_s=patience, api_key=api_key)
    connect = partial(connect, batch_items=batch_items, in_flight=in_flight, on_wait=waits.hear)
    try:
        out.mkdir(parents=True, exist_ok=True)
        source = Several([source_of(path) for path in items])
        with Journal(out / "ids.parquet", identity) as journal:
            names = _names_in_full(journal, old, new, connect)
            with connect(tokenizer=names[0]) as of_old, connect(tokenizer=names[1]) as of_new:
                answers = source.answers(of_new, journal.rows, assign=True, on_change="keep")
                keep_answers(answers, journal, waits, names[1], source.rows)
                move = Move(Clients(of_old, of_new, names), journal.batches)
                move.compare()
                try:
                    refusal = _refusal(move, missing_at_most, force=force) if switch else None
                finally:
                    move.write(out)
                    typer.echo(in_words(move.report), nl=False)
            counts = journal.finish(out / "ids.rejected.jsonl")
    except KeyboardInterrupt:
        typer.echo("semid: interrupted; the same command goes on from here", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except (TokenizerError, ValueError, OSError) as error:
        raise failure(str(error)) from error
    if refusal is not None:
        raise failure(str(refusal))
    if counts.rejected or move.missing:
        raise typer.Exit(REJECTED)


def _names_in_full(journal: Journal, old: str, new: str, connect: Callable[..., TokenizerClient]) -> tuple[str, str]:
    """The tokenizers of the whole run, when it is gone on with too; both are loaded.

    Raises:
        ValueError: They are one, or one is not loaded.
        TokenizerError: The client's.
    """
    with connect() as client:
        loaded = client.tokenizers()
    there = [str(manifest["tokenizer"]) for manifest in loaded.manifests]
    noted = journal.notes.get("tokenizers")
    first, second = names = noted or [loaded.named(name) for name in (old, new)]
    if unknown := [name for name in names if name not in there]:
        raise ValueError(_unknown(unknown[0], there))
    if first == second:
        raise ValueError(f"{first} is where to come from and where to go")
    if noted is None:
        journal.note(tokenizers=names)
    return str(first), str(second)


def _unknown(name: str, loaded: Sequence[str]) -> str:
    """Why a name means no tokenizer, in words."""
    meant = [full for full in loaded if full.rpartition("@")[0] == name]
    if meant:
        return f"several loaded tokenizers have the name {name}: say {' or '.join(meant)}"
    return f"{name} is not loaded; loaded are {', '.join(loaded)}. `semid tokenizers load` loads another one"


def _refusal(move: Move, missing_at_most: int, *, force: bool) -> NotSwitched | None:
    """Makes the new tokenizer the default, or says why not.

    Raises:
        SwitchUnfinished, TokenizerError: See `Move.switch`.
    """
    from service.migration.move import NotSwitched

    try:
        move.switch(missing_at_most, force=force)
    except NotSwitched as refusal:
        return refusal
    return None
