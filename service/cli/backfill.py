"""The command on a whole catalogue without a running service: `semid backfill`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.frame import Force, failures, read_settings

REJECTED = 3
INTERRUPTED = 130


def backfill(
    paths: Annotated[
        list[str], typer.Argument(help="Parquet: files, 'patterns*.parquet', directories, or URIs (s3://...).")
    ],
    out: Annotated[str, typer.Option(help="Directory, or URI, of the table: part-000000.parquet, ...")],
    engine: Annotated[
        str, typer.Option(help="local: processes of this machine; ray: Ray Data, of `semid[bulk]`.")
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Models at work at once; one for each GPU, or every two cores, if not given."),
    ] = None,
    namespace: Annotated[str, typer.Option(help="The catalogue's namespace.")] = "default",
    journal: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Directory of what goes on after a kill; OUT if not given and no URI."),
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="The tokenizer's; SID_CHECKPOINT if not given.")] = None,
    content: Annotated[
        str | None,
        typer.Option(help="texts or embeddings: what is tokenized of files that have both; texts if not given."),
    ] = None,
    order_by: Annotated[
        str, typer.Option(help="The column whose values say which of the items of equal codes comes first; or input.")
    ] = "input",
    display: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="The column of the titles to keep with the items.")
    ] = None,
    block_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows encoded together; 65536 embeddings or 8192 texts if not given.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count collisions; no registry is touched.")] = False,
    force: Force = False,
) -> None:
    """Give every item of Parquet files its Semantic ID, in the registry of the SID_* settings.

    A model in each worker encodes; the registry takes the claims sorted by their codes. A service may run meanwhile.

    After a kill or a failure the same command goes on where it stopped. Rejected rows go to rejected.jsonl in OUT, with
    the reason; then the exit status is 3. It is 1 where the command failed.
    """
    from models import read_manifest
    from service.backfill.destination import Destination
    from service.backfill.engines import Engine
    from service.backfill.plan import Kind, make_plan
    from service.backfill.run import Backfill, Request

    for option, value, known in (("--engine", engine, Engine), ("--content", content, Kind)):
        if value is not None and value not in set(known):
            raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}", param_hint=option)
    settings = read_settings(checkpoint)
    try:
        with failures():
            plan = make_plan(
                paths,
                content=None if content is None else Kind(content),
                takes_text=read_manifest(settings.checkpoint).text_encoder is not None,
                order_by=order_by,
                display=display,
                block_rows=block_rows,
                out=out,
            )
            destination = Destination(out)
            state = journal or destination.directory
            if state is None:
                raise ValueError(f"{out} is in an object store: name a directory for the state by --journal")
            request = Request(plan, destination, state, namespace, Engine(engine), workers, force=force)
            work = Backfill(settings, request, _stage)
            if dry_run:
                _tell(work.count_collisions(), out)
                return
            before = work.finished()
            counts = before or work.run()
    except KeyboardInterrupt:
        typer.echo("semid: interrupted; the same command goes on from here", err=True)
        raise typer.Exit(INTERRUPTED) from None
    already = ": that was done before, and nothing was done now" if before else ""
    typer.echo(f"{counts.written} items with their Semantic IDs in {out}, {counts.created} of them new{already}")
    if counts.rejected:
        typer.echo(f"semid: {counts.rejected} rows were rejected; the reasons are in rejected.jsonl in {out}", err=True)
        raise typer.Exit(REJECTED)


@contextmanager
def _stage(name: str, rows: int, done: int) -> Iterator[Callable[[int], object]]:
    """A progress bar with the rate and the time that is left."""
    from tqdm import tqdm

    with tqdm(desc=name, unit=" items", total=rows, initial=done, smoothing=0.05) as bar:
        yield bar.update


def _tell(report: dict[str, Any], out: str) -> None:
    """What a dry run counted."""
    prefixes = ", ".join(map(str, report["distinct_prefixes"]))
    typer.echo(f"{report['items']} items under {report['tokenizer']}; {report['rejected']} rows would be rejected")
    typer.echo(f"distinct prefixes by level: {prefixes}")
    share = report["items_in_collisions"] / max(1, report["items"])
    typer.echo(
        f"{report['items_in_collisions']} items share their codes ({share:.2%}); "
        f"the highest suffix would be {report['highest_suffix']}"
    )
    for group in report["largest_groups"][:3]:
        if group["items"] > 1:
            typer.echo(f"  {'-'.join(map(str, group['codes']))}: {group['items']} items")
    typer.echo(f"all of it in collisions.json in {out}")
