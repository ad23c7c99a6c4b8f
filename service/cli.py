"""The console script `semid`."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from service.formats import Format

if TYPE_CHECKING:
    from tqdm import tqdm

    from models.catalogue import CatalogueItem
    from service.registry.history import Comparison
    from service.settings import Settings

Checkpoint = Annotated[Path | None, typer.Option(help="Its tokenizer's checkpoint; SID_CHECKPOINT if not given.")]
TokenizerName = Annotated[
    str | None, typer.Option(help="Its tokenizer, where the service has several: name, or name@fingerprint.")
]

app = typer.Typer(
    name="semid",
    help="Semantic IDs for catalogue items: serve a frozen tokenizer, train one, tokenize a catalogue.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

registry = typer.Typer(help="Whether the registry is older than what was acknowledged.", no_args_is_help=True)
app.add_typer(registry, name="registry")


@app.callback()
def main() -> None:
    """Semantic IDs for catalogue items."""


@app.command()
def serve() -> None:
    """Start the service; its settings are SID_* environment variables (see the README's table)."""
    from service.serve import serve as run

    if refusal := run(_settings()):
        raise _failure(f"cannot start: {refusal}")


@app.command()
def train(
    items: Annotated[list[Path], typer.Argument(exists=True, help="Catalogues, or arrays of embeddings.")],
    out: Annotated[Path, typer.Option(help="The new checkpoint's directory.")],
    name: Annotated[str | None, typer.Option(help="The tokenizer's name; OUT's last part if not given.")] = None,
    family: Annotated[str, typer.Option(help="rqvae, rq-kmeans, hierarchical, pq or opq.")] = "rqvae",
    levels: Annotated[int, typer.Option(min=1, max=25, help="L, the number of codes.")] = 4,
    codebook_size: Annotated[int, typer.Option(min=1, max=65536, help="K, codewords of each level.")] = 256,
    latent: Annotated[int | None, typer.Option(min=1, help="d, the latent's width.")] = None,
    hidden: Annotated[
        str | None, typer.Option(help="rqvae: widths between D and d, such as 512,256,128; '': linear.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=0, help="rqvae: of joint training, at most.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other hyper-parameter, such as loss.commitment=0.25."),
    ] = None,
    text_encoder: Annotated[str | None, typer.Option(help="A Hugging Face id or a path.")] = None,
    embedding_cache: Annotated[Path | None, typer.Option(help="Directory; keeps embeddings between runs.")] = None,
    balance_by: Annotated[str | None, typer.Option(help="Column; big sources then do not drown small ones.")] = None,
    balance: Annotated[float, typer.Option(min=0, max=1, help="1: rows count alike; 0: sources do.")] = 0.5,
    max_suffix: Annotated[int | None, typer.Option(min=0, help="The generator's suffix vocabulary.")] = None,
    data_terms: Annotated[str, typer.Option(help="A sentence on the data and its terms, for the model card.")] = "",
    device: Annotated[str, typer.Option(help="Where texts are embedded: cpu or cuda.")] = "cpu",
) -> None:
    """Train a tokenizer on catalogues and freeze it: weights, manifest, report, model card."""
    from models import CheckpointError
    from models.configuration import configured
    from models.train import TrainConfig, config_of, train_checkpoint

    settings = [f"codebook_sizes={[codebook_size] * levels}", f"seed={seed}"]
    settings += [f"hidden=[{hidden}]"] if hidden is not None else []
    settings += [f"latent={latent}"] if latent is not None else []
    settings += [f"epochs={epochs}"] if epochs is not None else []
    try:
        config = TrainConfig(
            name=name or out.name,
            family=family,
            fit=configured(config_of(family), [*settings, *(options or [])]),
            balance_by=balance_by,
            balance=balance,
            max_suffix=max_suffix,
            data_terms=data_terms,
        )
        train_checkpoint(
            items,
            out,
            config,
            text_encoder=text_encoder,
            embedding_cache=embedding_cache,
            device=device,
            command=shlex.join(["semid", *sys.argv[1:]]),
            say=typer.echo,
        )
    except (CheckpointError, ValueError, OSError) as error:
        raise _failure(str(error)) from error


@app.command()
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
    from service.client import TokenizerClient, TokenizerError
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
                if "error" in answer:
                    rejected.append(answer)
                else:
                    table.write(answer)
                    written += 1
    except (TokenizerError, ValueError, OSError) as error:
        raise _failure(str(error)) from error
    typer.echo(f"{written} items with their Semantic IDs in {out}")
    if rejected:
        path = out.with_suffix(".rejected.jsonl")
        path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rejected), encoding="utf-8")
        raise _failure(f"{len(rejected)} items were rejected; the reasons are in {path}")


@app.command()
def export(
    file: Annotated[Path, typer.Argument(dir_okay=False, help="The new file; it appears when it is whole.")],
    format_: Annotated[
        Format, typer.Option("--format", help="The whole table, or what a generator reads of the live items.")
    ] = Format.PARQUET,
    namespace: Annotated[str, typer.Option(help="The catalogue's namespace.")] = "default",
    checkpoint: Checkpoint = None,
    tokenizer: TokenizerName = None,
    token_base: Annotated[int, typer.Option(min=0, help="jsonl: the number of the token <a_0>.")] = 0,
) -> None:
    """Copy the record of a namespace to a file, at one revision, while the service goes on.

    Reads the registry of the SID_* settings.

    The table has every Semantic ID ever assigned: a backup for semid import, and what a generator is trained on.
    """
    from service.backup import export as run

    if token_base and format_ is not Format.JSONL:
        raise typer.BadParameter(f"{format_.value} has no token ids", param_hint="--token-base")
    settings = _settings(checkpoint)
    with _failures(), _Bar(file.name, " items") as bar:
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


@app.command(name="import")
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
    from service.backup import restore as run

    settings = _settings(checkpoint)
    with _failures(), _Bar(file.name, " IDs") as bar:
        description, outcome, refused = asyncio.run(
            run(settings, file, tokenizer=tokenizer, namespace=namespace, progress=bar.show)
        )
    namespace = description.origin.namespace if namespace is None else namespace
    where = f"namespace {namespace} under {description.origin.tokenizer}"
    typer.echo(f"{where}: {outcome.restored} IDs restored, {outcome.known} were there already")
    if outcome.refused:
        raise _failure(f"{outcome.refused} rows were refused; the reasons are in {refused}")


@registry.command()
def status() -> None:
    """List the records of the registry beside how far they had come, as this data directory (SID_DATA_DIR) knows it.

    The exit status is 1 where one is older.
    """
    from service.acceptance import compared, described

    with _failures():
        comparisons = asyncio.run(compared(_settings()))
    for comparison in comparisons:
        typer.echo(described(comparison))
    _require_marks(comparisons)
    if older := [comparison.name for comparison in comparisons if comparison.older]:
        raise _failure(f"older than what was acknowledged, and refused: {', '.join(older)}; see semid registry accept")


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

    with _failures():
        comparisons = asyncio.run(compared(_settings()))
    _require_marks(comparisons)
    named = {comparison.name.rpartition(":")[0] for comparison in comparisons}
    if unknown := set(namespace or ()) - named:
        raise _failure(
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
    with _failures():
        left = asyncio.run(run(_settings(), chosen))
    typer.echo(f"Accepted: {len(chosen) - len(left)}. Services that run go on by themselves.")
    if left:
        names = ", ".join(comparison.name for comparison in left)
        raise _failure(f"not accepted, as others have changed it meanwhile: {names}; look again")


def _require_marks(comparisons: Sequence[Comparison]) -> None:
    """Nothing can be said of records where nobody has written down how far they had come."""
    if not any(comparison.marks or comparison.older for comparison in comparisons):
        where = _settings().data_dir / "history"
        raise _failure(
            f"there are no marks in {where}, so nothing tells whether these records are older: set SID_DATA_DIR to the "
            "data directory of a service"
        )


def _settings(checkpoint: Path | None = None) -> Settings:
    """The SID_* settings, with another checkpoint where one is given."""
    from pydantic import ValidationError

    from service.schemas import describe
    from service.settings import Settings

    try:
        settings = Settings()
    except ValidationError as error:
        raise typer.BadParameter(describe(error.errors()).replace("; ", "\n"), param_hint="SID_* settings") from error
    if checkpoint is None:
        return settings
    return settings.model_copy(update={"checkpoint": checkpoint, "further_checkpoints": ()})


@contextmanager
def _failures() -> Iterator[None]:
    """What goes wrong, in words."""
    from models import CheckpointError
    from service.errors import SemidError

    try:
        yield
    except (CheckpointError, SemidError, ValueError, OSError) as error:
        raise _failure(str(error)) from error


class _Bar:
    """A progress bar of something whose number is only estimated; there is none before there is progress."""

    def __init__(self, name: str, unit: str) -> None:
        self._name = name
        self._unit = unit
        self._bar: tqdm | None = None

    def show(self, done: int, total: int) -> None:
        """So many of so many are done."""
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(desc=self._name, unit=self._unit)
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _entry(item: CatalogueItem) -> dict[str, Any]:
    """A catalogue's row as an item of `POST /tokenize`."""
    if item.text is not None:
        return {"item_id": item.item_id, "text": item.text}
    return {"item_id": item.item_id, "fields": dict(item.fields)}


def _failure(words: str) -> typer.Exit:
    typer.echo(f"semid: {words}", err=True)
    return typer.Exit(1)
