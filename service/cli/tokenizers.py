"""Commands that make and compare tokenizers: `semid train`, `semid evaluate`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from service.cli.frame import Force, failure, refuse_taken


def train(
    items: Annotated[list[Path], typer.Argument(exists=True, help="Catalogues, or arrays of embeddings.")],
    out: Annotated[Path, typer.Option(help="The new checkpoint's directory.")],
    name: Annotated[str | None, typer.Option(help="The tokenizer's name; OUT's last part if not given.")] = None,
    family: Annotated[str, typer.Option(help="rqvae, rq-kmeans, rk-means, r-vq, hierarchical, pq or opq.")] = "rqvae",
    levels: Annotated[int, typer.Option(min=1, max=25, help="L, the number of codes.")] = 4,
    codebook_size: Annotated[int, typer.Option(min=1, max=65536, help="K, codewords of each level.")] = 256,
    latent: Annotated[int | None, typer.Option(min=1, help="d, the latent's width.")] = None,
    hidden: Annotated[
        str | None, typer.Option(help="rqvae: widths between D and d, such as 512,256,128; '': linear.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=0, help="rqvae, r-vq: at most.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other hyper-parameter, such as loss.commitment=0.25."),
    ] = None,
    text_encoder: Annotated[str | None, typer.Option(help="A Hugging Face id or a path.")] = None,
    embedding_cache: Annotated[Path | None, typer.Option(help="Directory; keeps embeddings between runs.")] = None,
    interactions: Annotated[
        Path | None, typer.Option(exists=True, help="rqvae: users' sequences; what they choose together lies together.")
    ] = None,
    collaborative: Annotated[
        Path | None, typer.Option(exists=True, help="rqvae: the same from item embeddings that are there already.")
    ] = None,
    spool: Annotated[
        Path | None, typer.Option(help="Directory for rows while they are trained on; beside OUT if not given.")
    ] = None,
    balance_by: Annotated[str | None, typer.Option(help="Column; big sources then do not drown small ones.")] = None,
    balance: Annotated[float, typer.Option(min=0, max=1, help="1: rows count alike; 0: sources do.")] = 0.5,
    leave_out: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the items to leave out, the same for all tokenizers.")
    ] = 0.0,
    max_suffix: Annotated[int | None, typer.Option(min=0, help="The generator's suffix vocabulary.")] = None,
    data_terms: Annotated[str, typer.Option(help="A sentence on the data and its terms, for the model card.")] = "",
    device: Annotated[
        str, typer.Option(help="Where texts are embedded and the model is fitted: auto, cpu, cuda or cuda:N.")
    ] = "auto",
    precision: Annotated[
        str,
        typer.Option(help="Of the networks while they are trained: fp32, bf16, or auto: bf16 on a GPU that has it."),
    ] = "auto",
    keep_every_s: Annotated[
        float, typer.Option(min=0, help="Seconds after which the state is kept again, at an epoch's end.")
    ] = 30.0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over, whatever state there is.")] = False,
) -> None:
    """Train a tokenizer on catalogues and freeze it: weights, manifest, report, model card.

    After a kill the same command goes on where its state was kept, beside OUT.
    """
    from models import CheckpointError
    from models.configuration import configured
    from models.training.collaborative import WEIGHT
    from models.training.page import training_pages
    from models.training.train import TrainConfig, config_of, state_directory, train_checkpoint

    for option, given, families in (("--epochs", epochs, ("rqvae", "r-vq")), ("--hidden", hidden, ("rqvae",))):
        if given is not None and family not in families:
            raise failure(f"{option} is for {' and '.join(families)}; {family} has none")
    settings = [f"codebook_sizes={[codebook_size] * levels}", f"seed={seed}"]
    settings += [f"hidden=[{hidden}]"] if hidden is not None else []
    settings += [f"latent={latent}"] if latent is not None else []
    settings += [f"epochs={epochs}"] if epochs is not None else []
    # Whoever gives them wants them to count; --set comes after, and so may say otherwise.
    settings += [f"loss.collaborative={WEIGHT}"] if family == "rqvae" and (interactions or collaborative) else []
    try:
        config = TrainConfig(
            name=name or out.resolve().name,
            family=family,
            fit=configured(config_of(family), [*settings, *(options or [])]),
            balance_by=balance_by,
            balance=balance,
            max_suffix=max_suffix,
            data_terms=data_terms,
            left_out=leave_out,
        )
        train_checkpoint(
            items,
            out,
            config,
            text_encoder=text_encoder,
            embedding_cache=embedding_cache,
            collaborative=collaborative,
            interactions=interactions,
            spool=spool,
            device=device,
            precision=precision,
            keep_every_s=keep_every_s,
            fresh=fresh,
            command=shlex.join(["semid", *sys.argv[1:]]),
            pages=training_pages,
            say=typer.echo,
        )
    except (CheckpointError, ValueError, OSError) as error:
        raise failure(str(error)) from error
    except KeyboardInterrupt:
        state = state_directory(out.resolve())
        kept = f"the same command goes on from {state}" if state.exists() else "the same command begins anew"
        typer.echo(f"\nsemid: interrupted; {kept}", err=True)
        raise typer.Exit(130) from None


def evaluate(
    tokenizers: Annotated[
        list[Path], typer.Argument(exists=True, help="Checkpoints' directories, and published index files (.json).")
    ],
    catalogue: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Items, or an array of embeddings.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="Directory of report.html and report.json.")],
    interactions: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Parquet: user_id, item_ids oldest first.")
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Of the catalogue's rows, for tokenizers that take no text."),
    ] = None,
    unseen: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Item ids, one a line, that no tokenizer was trained on."),
    ] = None,
    all_unseen: Annotated[bool, typer.Option("--all-unseen", help="None was trained on any of these items.")] = False,
    index_column: Annotated[
        str | None, typer.Option(help="Column by which index files name items; item_id if not given.")
    ] = None,
    queries: Annotated[int, typer.Option(min=1, help="Items whose neighbours are searched.")] = 1000,
    paraphrased: Annotated[int, typer.Option(min=0, help="Items whose text is paraphrased; 0: none.")] = 300,
    seed: Annotated[int, typer.Option(help="Of every sample.")] = 0,
    embedding_cache: Annotated[Path | None, typer.Option(help="Directory; keeps embeddings between runs.")] = None,
    device: Annotated[str, typer.Option(help="Where the tokenizers run: auto, cpu, cuda or cuda:N.")] = "auto",
    force: Force = False,
) -> None:
    """Compare tokenizers on a catalogue: one report, as a page and as JSON."""
    from models import CheckpointError
    from models.evaluation.compare import CompareConfig, compare
    from models.evaluation.report import HTML, write_report
    from models.evaluation.subjects import Inputs
    from models.training.run import device_of

    refuse_taken(out, force=force)
    try:
        ids = frozenset(unseen.read_text(encoding="utf-8").split("\n")) - {""} if unseen else None
        inputs = Inputs(
            catalogue,
            interactions=interactions,
            embeddings=embeddings,
            unseen=ids,
            all_unseen=all_unseen,
            key_column=index_column,
            embedding_cache=embedding_cache,
            device=str(device_of(device)),
        )
        config = CompareConfig(seed=seed, queries=queries, paraphrased=paraphrased)
        made = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        try:
            comparison = compare(tokenizers, inputs, config, typer.echo)
        except BaseException:
            if made:
                out.rmdir()
            raise
        write_report(comparison, out)
    except (CheckpointError, ValueError, OSError) as error:
        raise failure(str(error)) from error
    typer.echo(f"wrote {out / HTML}")
