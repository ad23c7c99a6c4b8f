"""Commands that measure tokenizers by what they are for: `semid recommend`."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.frame import Force, failure, refuse_taken

if TYPE_CHECKING:
    import torch

    from models.recommendation.task import Identified, RecommendConfig
    from service.cli.sources import CatalogueFile


def recommend(
    catalogue: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="The items, as in semid tokenize.")],
    interactions: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="Parquet: user_id, item_ids (oldest first).")
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Directory of the report and the generators.")],
    checkpoints: Annotated[list[Path] | None, typer.Argument(exists=True, help="Tokenizers to compare.")] = None,
    setting: Annotated[str, typer.Option(help="small: minutes on a CPU; paper: TIGER's own, for a GPU.")] = "small",
    steps: Annotated[int | None, typer.Option(min=1, help="Of each generator's training.")] = None,
    users: Annotated[int, typer.Option(min=0, help="Test on a sample of so many; 0: on all.")] = 0,
    cold: Annotated[float, typer.Option(min=0, max=0.5, help="Share of items kept out of the training.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's own choice.")] = 0,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other setting, such as training.learning_rate=0.001."),
    ] = None,
    embedding_cache: Annotated[Path | None, typer.Option(help="Directory; keeps embeddings between runs.")] = None,
    url: Annotated[str | None, typer.Option(help="A running service: its IDs, over its live trie.")] = None,
    namespace: Annotated[str, typer.Option(help="The catalogue's namespace there.")] = "default",
    tokenizer: Annotated[
        str | None, typer.Option(help="One that is loaded there; the default one if not given.")
    ] = None,
    record: Annotated[
        list[Path] | None, typer.Option(exists=True, dir_okay=False, help="A table of semid export; may be repeated.")
    ] = None,
    force: Force = False,
) -> None:
    """Train TIGER on each tokenizer's IDs and measure how well it recommends each user's last item."""
    import torch

    from models import CheckpointError
    from models.interactions import in_rows, read_interactions
    from models.recommendation.recommend import recommend as run
    from models.recommendation.report import table, write
    from models.recommendation.task import Task
    from models.training.run import device_of
    from service.cli.sources import CatalogueFile, named_apart
    from service.client import TokenizerError
    from service.errors import SemidError
    from service.follower import FollowerError

    refuse_taken(out, force=force)
    if threads:
        torch.set_num_threads(threads)
    try:
        where = device_of(device)
        config = _config(setting, steps, users, cold, seed, options)
        items = CatalogueFile(catalogue, embedding_cache)
        sequences = list(read_interactions(interactions))
        known, unknown = in_rows(iter(sequences), items.rows)
        if unknown:
            typer.echo(f"{unknown} interactions with items that are not in {catalogue.name} are left out")
        task = Task([sequence.user_id for sequence in sequences], known, len(items.item_ids), config)
        baselines = task.baselines()
        measured = []
        settings = {"command": shlex.join(["semid", *sys.argv[1:]]), "setting": setting, **asdict(config)}
        with ExitStack() as stack:
            sources = _sources(checkpoints or [], record or [], (url, namespace, tokenizer), items, where, stack)
            # All of them before the first training: what is wrong with the last one is not said hours later.
            tokenizers = named_apart([identify() for identify in sources])
            out.mkdir(parents=True, exist_ok=True)
            for identified in tokenizers:
                model, result = run(identified, task, config, where)
                measured.append(result)
                model.save(out / re.sub(r"[^\w.@-]+", "-", identified.name), settings)
                write(out, settings, baselines, measured)
    except (CheckpointError, SemidError, TokenizerError, FollowerError, ValueError, OSError) as error:
        raise failure(str(error)) from error
    typer.echo(table(baselines, measured))
    typer.echo(
        f"{measured[0].test.users} test users; Recall@10 is known to {measured[0].test.error:.4f} (one standard error)"
    )


def _config(
    setting: str, steps: int | None, users: int, cold: float, seed: int, options: list[str] | None
) -> RecommendConfig:
    """The setting with what was asked for otherwise.

    Raises:
        ValueError: There is no such setting.
    """
    from models.configuration import configured
    from models.recommendation.task import SETTINGS

    if setting not in SETTINGS:
        raise ValueError(f"there is no setting {setting!r}; known are {', '.join(SETTINGS)}")
    config = replace(SETTINGS[setting], test_users=users, cold=cold, seed=seed)
    if steps is not None:
        config = replace(config, training=replace(config.training, steps=steps))
    return configured(config, options or [])


def _sources(
    checkpoints: list[Path],
    records: list[Path],
    service: tuple[str | None, str, str | None],
    items: CatalogueFile,
    device: torch.device,
    stack: ExitStack,
) -> Iterator[Callable[[], Identified]]:
    """One for each tokenizer that is compared.

    Raises:
        ValueError: There is none.
    """
    from functools import partial

    from service.cli.sources import of_checkpoint, of_record, of_service
    from service.follower import Follower

    url, namespace, tokenizer = service
    if not checkpoints and not records and url is None:
        raise ValueError("name a checkpoint, a service (--url) or an exported record (--record)")
    yield from (partial(of_checkpoint, directory, device, items) for directory in checkpoints)
    yield from (partial(of_record, path, items) for path in records)
    if url is not None:
        follower = Follower(url, namespace=namespace, tokenizer=tokenizer)
        stack.callback(follower.stop)
        yield partial(of_service, url, namespace, tokenizer, items, follower)
