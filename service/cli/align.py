"""Codewords numbered like another tokenizer's: `semid align`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.cli.frame import failure, failures


def align(
    new: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="The checkpoint to number anew.")],
    to: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="The checkpoint whose numbers to come near to.")
    ],
    items: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, help="A catalogue, or an array of embeddings, to compare codes on."),
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="The new checkpoint's directory.")],
    name: Annotated[str | None, typer.Option(help="The tokenizer's name; OUT's last part if not given.")] = None,
    embedding_cache: Annotated[Path | None, typer.Option(help="Directory; keeps embeddings between runs.")] = None,
    device: Annotated[str, typer.Option(help="Where the tokenizers run: auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Write a checkpoint once more, its codewords numbered so that most items keep the codes of another one.

    No codeword moves: the codes are the same ones under other numbers. It is another tokenizer, with a fingerprint of
    its own. Do it before the first ID is assigned.
    """
    from models.training.realign import realign
    from models.training.run import device_of
    from service.migration.report import table

    if any(out.iterdir()) if out.is_dir() else out.exists():
        raise failure(f"{out} is there already, and a checkpoint is not written over: choose another --out")
    with failures():
        found = realign(
            new, to, items, out, name=name or out.resolve().name, cache=embedding_cache, device=device_of(device)
        )
    typer.echo(f"{out}: {found.manifest.full_name}, numbered like {found.manifest.training['aligned']['to']}")
    half = "on half of them, under the numbers that the other half alone would give"
    on_all = f"on {found.items:,} items"
    measured = ((f"as it was, {on_all}", found.before), (f"aligned, {on_all}", found.after), (half, found.unseen))
    for words, levels in measured:
        if levels:
            typer.echo(f"\n{words}")
            typer.echo("\n".join(table(levels)))
