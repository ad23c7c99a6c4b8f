"""Commands about users' sequences: `semid item-embeddings`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from service.cli.frame import failure


def item_embeddings(
    interactions: Annotated[Path, typer.Argument(exists=True, help="Parquet with user_id and item_ids, oldest first.")],
    out: Annotated[Path, typer.Option(help="The new Parquet file: item_id and embedding.")],
    catalogue: Annotated[
        list[Path] | None, typer.Option(exists=True, help="Leaves out what is not in it, before the split.")
    ] = None,
    method: Annotated[str, typer.Option(help="sasrec, or ppmi: seconds instead of minutes.")] = "sasrec",
    width: Annotated[int, typer.Option(min=1, help="c, numbers of an embedding.")] = 32,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other hyper-parameter, such as dropout=0.5."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where SASRec is trained: auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Train collaborative item embeddings for `semid train --collaborative`, from all but each user's last two."""
    from models.catalogue import read_item_ids, read_items
    from models.configuration import configured
    from models.training.collaborative import METHODS, train_item_embeddings, write_item_embeddings
    from models.training.run import device_of

    try:
        if method not in METHODS:
            raise failure(f"there is no method {method!r}; known are {', '.join(METHODS)}")
        config = configured(METHODS[method], [f"width={width}", f"seed={seed}", *(options or [])])
        if out.is_dir() or not os.access(out.absolute().parent, os.W_OK):
            raise failure(f"{out} cannot be written")  # before minutes of work, not after
        items: list[str] = []
        for path in catalogue or []:
            items += (
                read_item_ids(path).to_pylist()
                if path.suffix == ".parquet"
                else [item.item_id for batch in read_items(path) for item in batch]
            )
        if catalogue and not items:
            raise failure(f"there is no item in {', '.join(map(str, catalogue))}")
        found = train_item_embeddings(interactions, config, items or None, str(device_of(device)), typer.echo)
        write_item_embeddings(out, found)
        typer.echo(f"wrote embeddings of {len(found.item_ids):,} items to {out}")
    except (ValueError, OSError) as error:
        raise failure(str(error)) from error
