"""Commands on a whole catalogue through a running service: `semid tokenize`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.frame import failure

if TYPE_CHECKING:
    from models.catalogue import CatalogueItem


def tokenize(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Parquet, JSONL or CSV with item_id.")],
    out: Annotated[Path | None, typer.Option(help="Parquet, JSONL or CSV; FILE.ids.parquet if not given.")] = None,
    url: Annotated[str, typer.Option(help="The service.")] = "http://127.0.0.1:8000",
    namespace: Annotated[str, typer.Option(help="The catalogue's namespace.")] = "default",
    tokenizer: Annotated[str | None, typer.Option(help="One that is loaded; the default one if not given.")] = None,
    batch_items: Annotated[int, typer.Option(min=1, help="Items of one request.")] = 256,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Codes only; nothing is assigned.")] = False,
) -> None:
    """Give every item of a catalogue its Semantic ID, through a running service.

    Rejected items go to a file beside OUT, with the reason; then the exit status is 1.
    """
    from tqdm import tqdm

    from models.catalogue import read_items
    from service.client import FailedItem, TokenizerClient, TokenizerError
    from service.table import write_table

    out = out or file.with_suffix(".ids.parquet")
    rejected: list[dict[str, Any]] = []
    written = 0
    try:
        entries = (_entry(item) for batch in read_items(file, batch_items) for item in batch)
        client = TokenizerClient(url, namespace=namespace, tokenizer=tokenizer, batch_items=batch_items)
        with client, write_table(out) as table, tqdm(unit=" items", desc=file.name) as bar:
            for answer in client.tokenize(entries, assign=not dry_run):
                bar.update()
                if isinstance(answer, FailedItem):
                    rejected.append(asdict(answer))
                else:
                    table.write(asdict(answer))
                    written += 1
    except (TokenizerError, ValueError, OSError) as error:
        raise failure(str(error)) from error
    typer.echo(f"{written} items with their Semantic IDs in {out}")
    if rejected:
        path = out.with_suffix(".rejected.jsonl")
        path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rejected), encoding="utf-8")
        raise failure(f"{len(rejected)} items were rejected; the reasons are in {path}")


def _entry(item: CatalogueItem) -> dict[str, Any]:
    """A catalogue's row as an item of `POST /tokenize`."""
    if item.text is not None:
        return {"item_id": item.item_id, "text": item.text}
    return {"item_id": item.item_id, "fields": dict(item.fields)}
