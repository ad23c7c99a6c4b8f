"""The console script `semid`: every command, and the module that has it."""

from __future__ import annotations

from typing import Annotated

import typer

from service.cli.access import keys
from service.cli.admin import loaded
from service.cli.align import align
from service.cli.backfill import backfill
from service.cli.frame import failure, read_settings
from service.cli.item_embeddings import item_embeddings
from service.cli.migrate import migrate
from service.cli.recommend import recommend
from service.cli.record import export, import_, registry
from service.cli.tokenize import tokenize
from service.cli.tokenizers import evaluate, train

app = typer.Typer(
    name="semid",
    help="Semantic IDs for catalogue items: serve a frozen tokenizer, train one, tokenize a catalogue.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def main() -> None:
    """Semantic IDs for catalogue items."""


@app.command()
def serve(
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes, each with a copy of the model; else SID_WORKERS.")
    ] = None,
) -> None:
    """Start the service; its settings are SID_* environment variables (see the README's table)."""
    from service.serve import serve as run

    settings = read_settings()
    if workers is not None:
        settings = settings.model_copy(update={"workers": workers})
    if refusal := run(settings):
        raise failure(f"cannot start: {refusal}")


app.command()(train)
app.command()(item_embeddings)
app.command()(recommend)
app.command()(evaluate)
app.command()(tokenize)
app.command()(migrate)
app.command()(align)
app.command()(backfill)
app.command()(export)
app.command(name="import")(import_)
app.add_typer(registry, name="registry")
app.add_typer(loaded, name="tokenizers")
app.add_typer(keys, name="keys")
