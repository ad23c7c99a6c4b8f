"""Commands on a whole catalogue through a running service: `semid tokenize`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from service.cli.frame import failure

if TYPE_CHECKING:
    import pyarrow as pa

    from service.cli.tokenize_journal import Journal
    from service.client import TokenizerClient, Waiting

REJECTED = 3
INTERRUPTED = 130
NEWS_ATTEMPTS = 3


def tokenize(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Parquet, JSONL or CSV with item_id.")],
    out: Annotated[Path | None, typer.Option(help="Parquet, JSONL or CSV; FILE.ids.parquet if not given.")] = None,
    url: Annotated[str, typer.Option(help="The service.")] = "http://127.0.0.1:8000",
    namespace: Annotated[str, typer.Option(help="The catalogue's namespace.")] = "default",
    tokenizer: Annotated[str | None, typer.Option(help="One that is loaded; the default one if not given.")] = None,
    batch_items: Annotated[int, typer.Option(min=1, help="Items of one request.")] = 256,
    in_flight: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 4,
    patience: Annotated[float, typer.Option(min=0, help="Seconds to wait for a service that is away.")] = 120.0,
    on_change: Annotated[
        Literal["keep", "reassign"], typer.Option(help="What becomes of a known item whose codes differ now.")
    ] = "keep",
    display: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Titles to keep with the items, where the service does.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Codes only; nothing is assigned.")] = False,
    api_key: Annotated[
        str | None, typer.Option(envvar="SEMID_API_KEY", show_envvar=True, help="Where the service asks for one.")
    ] = None,
) -> None:
    """Give every item of a catalogue its Semantic ID, through a running service.

    After a kill or a failure the same command goes on where it stopped. Rejected items go to a file beside OUT, with
    the reason; then the exit status is 3. It is 1 where the command failed.
    """
    from service.cli.tokenize_journal import Journal
    from service.cli.tokenize_source import source_of
    from service.client import TokenizerClient, TokenizerError
    from service.table import require_writable

    out = out or file.with_suffix(".ids.parquet")
    rejected = out.with_suffix(".rejected.jsonl")
    for written in (out, rejected):
        if written.exists() and written.samefile(file):
            raise failure(f"{written} would be written over, which is the catalogue itself: choose another --out")
    read = file.stat()
    identity = {
        "file": [str(file.resolve()), read.st_size, read.st_mtime_ns],
        "record": [url, namespace, tokenizer],
        "options": [dry_run, on_change, *([display] if display else [])],
    }
    waiting = Waits(url, patience)
    connect = partial(TokenizerClient, url, namespace=namespace, patience_s=patience, api_key=api_key)
    connect = partial(connect, batch_items=batch_items, in_flight=in_flight, on_wait=waiting.hear)
    try:
        require_writable(out)
        source = source_of(file, display)
        with Journal(out, identity) as journal:
            with connect(tokenizer=_name_in_full(journal, tokenizer, connect)) as client:
                answers = source.answers(client, journal.rows, assign=not dry_run, on_change=on_change)
                keep_answers(answers, journal, waiting, file.name, source.rows)
            counts = journal.finish(rejected)
    except KeyboardInterrupt:
        typer.echo("semid: interrupted; the same command goes on from here", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except (TokenizerError, ValueError, OSError) as error:
        raise failure(str(error)) from error
    typer.echo(f"{counts.written} items with their {'codes' if dry_run else 'Semantic IDs'} in {out}")
    if counts.rejected:
        typer.echo(f"semid: {counts.rejected} items were rejected; the reasons are in {rejected}", err=True)
        raise typer.Exit(REJECTED)


def _name_in_full(journal: Journal, tokenizer: str | None, connect: Callable[..., TokenizerClient]) -> str:
    """The tokenizer of the whole run: no other takes its place while the run lasts, nor when it is gone on with.

    Raises:
        TokenizerError: The client's.
    """
    if "tokenizer" not in journal.notes:
        with connect() as client:
            journal.note(tokenizer=client.tokenizers().named(tokenizer))
    return str(journal.notes["tokenizer"])


def keep_answers(answers: Iterator[pa.RecordBatch], journal: Journal, waiting: Waits, name: str, rows: int) -> None:
    """Keep the answers as they come, and show how many there are."""
    from tqdm import tqdm

    if journal.rows:
        typer.echo(f"{journal.rows} of {rows} items are done already; going on from there", err=True)
    with tqdm(unit=" items", desc=name, total=rows, initial=journal.rows) as bar:
        for batch in answers:
            journal.append(batch)
            bar.update(len(batch))
            waiting.is_over()


class Waits:
    """Says once that the service is waited for, and again when it was there in between."""

    def __init__(self, url: str, patience_s: float) -> None:
        self._url = url
        self._patience_s = patience_s
        self._said = self._answered = False

    def hear(self, waiting: Waiting) -> None:
        """A request is tried again; one that breaks amid others is no news."""
        from tqdm import tqdm

        if self._said or (self._answered and waiting.attempts < NEWS_ATTEMPTS):
            return
        self._said = True
        away = "has no answer" if waiting.reached else "cannot be reached"
        words = f"semid: {self._url} {away} ({waiting.trouble}); trying again for up to {self._patience_s:g} s"
        tqdm.write(words, file=sys.stderr)

    def is_over(self) -> None:
        """The service answered."""
        self._said, self._answered = False, True
