"""Training, from catalogue files to a frozen checkpoint: read, embed, fit, evaluate, calibrate, freeze."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from models.checkpoint import Manifest, check_name, freeze, save
from models.chunks import count_distinct
from models.evaluation.measures import Report, evaluate
from models.exactness import SAMPLE_TEXTS, calibrate
from models.template import TextTemplate
from models.text_encoder import TextEncoder
from models.tokenizer import FAMILIES, TokenizerParts
from models.training.card import BELOW_FLOAT64, model_card
from models.training.cluster import FITTERS, ClusterConfig, fit_clusters
from models.training.code_digest import code_digest
from models.training.collaborative import Aligned, align, check_collaborative, needs_item_ids
from models.training.data import (
    Reading,
    TrainingData,
    check_sources,
    read_training_data,
    text_encoder_of,
    width_of,
)
from models.training.fit import fit
from models.training.fit_config import FitConfig
from models.training.history import HISTORY, TrainingHistory
from models.training.limits import check_settings, check_width
from models.training.progress import Progress
from models.training.resume import KEEP_EVERY_S, StateDirectory
from models.training.run import Run, bf16_of, device_of
from models.training.rvq import RVQConfig
from models.training.watch import Fit
from models.whole_files import remove_abandoned

CALIBRATION_ROWS = 20_000

Pages: TypeAlias = Callable[[TrainingHistory, str], Mapping[str, str]]

# Notes of collaborative embeddings that say where they are from; the others measure them.
_ORIGINS = ("method", "config", "interactions", "file")


@dataclass(frozen=True)
class TrainConfig:
    """What `train_checkpoint` does beside the fit.

    Attributes:
        name: The tokenizer's name.
        family: A key of `models.tokenizer.FAMILIES`.
        fit: Hyper-parameters: a `FitConfig` for `rqvae`, an `RVQConfig` for `r-vq`, a `ClusterConfig` for the others.
        template: Fields -> text.
        balance_by: A column of the catalogue; rows are drawn so that a value with n rows counts n^balance. A file
            without the column counts as one value. None: all rows alike.
        balance: 1 leaves big sources their weight, 0 makes all sources equal.
        max_suffix: The generator's suffix vocabulary, None without bound.
        data_terms: A sentence on the data and its terms, for the model card.
        left_out: Share of all contents that is left out by their digest (see `models.left_out`), so that tokenizers can
            be compared on what none of them saw.
    """

    name: str = "tokenizer"
    family: str = "rqvae"
    fit: FitConfig | RVQConfig | ClusterConfig = field(default_factory=FitConfig)
    template: TextTemplate = field(default_factory=TextTemplate)
    balance_by: str | None = None
    balance: float = 0.5
    max_suffix: int | None = None
    data_terms: str = ""
    left_out: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no family can be fitted with, and a name that nothing can be frozen under."""
        check_name(self.name)
        check_settings(self.fit)
        if not isinstance(self.fit, ClusterConfig):
            (self.fit.training(1) if isinstance(self.fit, RVQConfig) else self.fit).check()


def train_checkpoint(
    sources: Sequence[Path],
    out: Path,
    config: TrainConfig,
    *,
    text_encoder: str | None = None,
    embedding_cache: Path | None = None,
    collaborative: Path | None = None,
    interactions: Path | None = None,
    spool: Path | None = None,
    device: str = "cpu",
    precision: str = "auto",
    keep_every_s: float = KEEP_EVERY_S,
    fresh: bool = False,
    command: str = "",
    pages: Pages | None = None,
    say: Callable[[str], None] = print,
) -> Manifest:
    """Train a tokenizer on catalogues and write it as a frozen checkpoint with a report and a model card.

    A fit in epochs keeps its state in `state_directory(out)` until the checkpoint is written. Where it was killed, the
    same call goes on from there and ends with the same fingerprint. A fit by k-means alone begins anew; it takes the
    directory's lock all the same.

    Args:
        sources: Catalogue files (see `models.catalogue.read_items`), or arrays of embeddings of one width; not both.
        out: The checkpoint's directory; must not exist, or be empty.
        config: Hyper-parameters.
        text_encoder: A Hugging Face id or a local path. None: all-MiniLM-L6-v2 for catalogues; for arrays none, and
            the tokenizer then takes embeddings only.
        embedding_cache: A directory that keeps embeddings of texts between runs.
        collaborative: Collaborative embeddings (see `models.training.collaborative.align`), for `loss.collaborative`.
        interactions: Or users' sequences, from which SASRec learns them.
        spool: A directory for rows while they are trained on; beside `out` where None.
        device: Where texts are embedded and the model is fitted: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: See `models.training.run.bf16_of`.
        keep_every_s: How often the state of the fit is kept, at most; after an epoch.
        fresh: Forget the state of an unfinished training.
        command: The command line, for the model card.
        pages: Further texts to write into the checkpoint, by file name, of the history and the tokenizer's full name;
            see `models.training.page`.
        say: Takes lines for the user.

    Returns:
        The manifest as written.

    Raises:
        ValueError: A source cannot be read, is empty, training diverged, or there is the state of another training.
        FileExistsError: `out` is not empty.
        OSError: The state cannot be kept, or another training of this checkpoint is at work.
        CheckpointError: The text encoder cannot be loaded.
    """
    out = out.resolve()  # "." has no name of its own, and no directory takes the place of a link to one
    _refuse_full_directory(out)
    config_of(config.family)
    _refuse_idle_collaboration(config, given=collaborative is not None or interactions is not None)
    where = device_of(device)
    bf16 = bf16_of(precision, where)
    with ExitStack() as stack:
        state = stack.enter_context(StateDirectory(state_directory(out), keep_every_s))
        _refuse_full_directory(out)  # another training may have written it before it gave the lock back
        if remove_abandoned(out):
            say(f"removed what a training killed while it wrote {out} had left beside it")
        if fresh:
            state.clear()
        run = Run(where, bf16, None if isinstance(config.fit, ClusterConfig) else state, Progress(say))
        by_id = needs_item_ids(collaborative, interactions)
        where_rows_lie = spool or out.parent
        reading = Reading(
            config.template,
            config.balance_by,
            config.balance,
            embedding_cache,
            keep_ids=by_id,
            spool=where_rows_lie,
            left_out=config.left_out,
        )
        check_sources(sources, reading)
        check_collaborative(collaborative, interactions)
        encoder = text_encoder_of(sources, text_encoder, str(where))
        _check_width(config, width_of(sources, encoder))
        data = read_training_data(sources, reading, encoder, say)
        files = "one file" if len(sources) == 1 else f"{len(sources)} files"
        say(f"training on {len(data.embeddings):,} items of {files}, {data.embeddings.shape[1]} dimensions")
        together = align(
            data, file=collaborative, interactions=interactions, seed=config.fit.seed, device=str(where), say=say
        )
        manifest = _train(
            out, config, encoder, data, together, spool=where_rows_lie, run=run, command=command, pages=pages, say=say
        )
        state.clear()
    say(f"wrote {manifest.full_name} to {out}")
    return manifest


def state_directory(out: Path) -> Path:
    """Where the training of a checkpoint keeps its state."""
    return out.parent / f".{out.name}-training"


def _train(
    out: Path,
    config: TrainConfig,
    encoder: TextEncoder | None,
    data: TrainingData,
    together: Aligned | None,
    *,
    spool: Path,
    run: Run,
    command: str,
    pages: Pages | None,
    say: Callable[[str], None],
) -> Manifest:
    """Fit, evaluate, calibrate, freeze, save."""
    largest = max(config.fit.codebook_sizes)
    if (distinct := count_distinct(data.embeddings, enough=largest)) < largest:
        say(f"warning: {distinct:,} different embeddings for codebooks of up to {largest}: some codewords stay unused")
    if run.state:
        run.state.identity = _identity(config, data, encoder, together, run)
    collaborative = together.embeddings if together else None
    fitted = fit_family(data.embeddings, config, data.weights, collaborative, spool, run=run)
    parts = TokenizerParts(
        config.family, config.template, encoder, fitted.model.network, fitted.model.quantizer, fitted.model.decoder
    )
    report = evaluate(data.embeddings, parts.network, parts.quantizer, parts.decoder, data.weights)
    say(str(report))
    sample = _sample(len(data.embeddings), config.fit.seed)
    texts = [data.texts[row] for row in sample[:SAMPLE_TEXTS]] if data.texts else []
    if texts:
        say(f"calibrating on {len(texts)} texts, alone and in batches, in float32 and in float64: up to some minutes")
    calibration = calibrate(parts, data.embeddings[sample], texts)
    if below := calibration.notes["canonical_below_float64"]:
        say(f"warning: {BELOW_FLOAT64} ({', '.join(below)}); another processor may place an item near a tie elsewhere")
    notes = _training_notes(config, data, fitted, command, run)
    if together:
        notes["collaborative"] = dict(together.notes)
    manifest = freeze(
        config.name,
        parts,
        calibration.bounds,
        calibration=calibration.notes,
        max_suffix=config.max_suffix,
        training=notes,
        report=_report_notes(report, data, parts, fitted),
    )
    history = TrainingHistory(
        family=config.family,
        codebook_sizes=manifest.codebook_sizes,
        stopped_on=notes.get("stopped_on", "held-out reconstruction error"),
        kept=fitted.kept,
        records=fitted.records,
        codeword_use=report.codeword_use,
        items=len(data.embeddings),
        held_out_items=len(fitted.held_out),
    )
    # All of it before anything is there: a checkpoint without its page would be a half one that nothing makes whole.
    beside = {HISTORY: history.as_json(), "README.md": model_card(manifest)}
    save(out, parts, manifest, beside={**beside, **(pages(history, manifest.full_name) if pages else {})})
    return manifest


def _identity(
    config: TrainConfig, data: TrainingData, encoder: TextEncoder | None, together: Aligned | None, run: Run
) -> dict[str, Any]:
    """What a fit's result is a function of, so that no state is taken for another training's."""
    return {
        "family": config.family,
        "settings": asdict(config.fit),
        "template": asdict(config.template),
        "balance": [config.balance_by, config.balance],
        "left_out": config.left_out,
        "text_encoder": encoder.components if encoder else None,
        # In their order, which is that of the rows: in another one others would be held out.
        "data": {
            f"{number}. {note['file']}": {"items": note["items"], "sha256": note["sha256"]}
            for number, note in enumerate(data.notes, 1)
        },
        "collaborative": {name: note for name, note in together.notes.items() if name in _ORIGINS}
        if together
        else None,
        "device": run.device.type,
        "precision": "bf16" if run.bf16 else "fp32",
        "torch": torch.__version__,
        "training_code": code_digest(),
    }


def config_of(family: str) -> FitConfig | RVQConfig | ClusterConfig:
    """A family's hyper-parameters as they are by default.

    Raises:
        ValueError: There is no such family.
    """
    if family not in FAMILIES:
        msg = f"there is no family {family!r}; known are {', '.join(FAMILIES)}"
        raise ValueError(msg)
    if family == "rqvae":
        return FitConfig()
    return RVQConfig() if family == "r-vq" else ClusterConfig()


def fit_family(
    embeddings: Tensor,
    config: TrainConfig,
    weights: Tensor | None = None,
    collaborative: Tensor | None = None,
    spool: Path | None = None,
    *,
    run: Run | None = None,
) -> Fit:
    """Fit the config's family to embeddings (N, D) float32, rows weighted by (N,); `spool` is where latents may lie.

    Raises:
        ValueError: The hyper-parameters are another family's, collaborative embeddings (N, c) were given to a family
            that has no use for them, or the fit fails.
    """
    if config.family == "rqvae" and isinstance(config.fit, FitConfig):
        return fit(embeddings, config.fit, weights, collaborative, spool, run=run)
    if collaborative is not None:
        raise ValueError(f"the family {config.family!r} is not trained with collaborative embeddings; rqvae is")
    if config.family == "r-vq" and isinstance(config.fit, RVQConfig):
        return fit(embeddings, config.fit.training(embeddings.shape[1]), weights, spool=spool, run=run)
    if config.family in FITTERS and isinstance(config.fit, ClusterConfig):
        return fit_clusters(config.family, embeddings, config.fit, weights, spool)
    msg = f"a {type(config.fit).__name__} does not fit the family {config.family!r}"
    raise ValueError(msg)


def _check_width(config: TrainConfig, width: int) -> None:
    """Refuse what cannot be fitted to embeddings of that width."""
    check_width(config.family, config.fit, width)
    if isinstance(config.fit, FitConfig):
        config.fit.check(width)


def _refuse_full_directory(out: Path) -> None:
    """Before hours of work, not after."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        msg = f"{out} is not empty; a checkpoint is frozen and is never overwritten"
        raise FileExistsError(msg)


def _refuse_idle_collaboration(config: TrainConfig, *, given: bool) -> None:
    """Collaborative embeddings and their weight come together."""
    weight = config.fit.loss.collaborative if isinstance(config.fit, FitConfig) else 0.0
    if given and not weight:
        msg = (
            "collaborative embeddings count for nothing: they are for the family rqvae with loss.collaborative above 0"
        )
        raise ValueError(msg)
    if weight and not given:
        raise ValueError(
            "loss.collaborative is above 0, but there are neither collaborative embeddings nor interactions"
        )


def _sample(rows: int, seed: int) -> list[int]:
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return order[:CALIBRATION_ROWS].tolist()


def _training_notes(config: TrainConfig, data: TrainingData, fitted: Fit, command: str, run: Run) -> dict[str, Any]:
    return {
        "command": command,
        "config": asdict(config),
        "files": list(data.notes),
        "data_terms": config.data_terms,
        **({} if isinstance(config.fit, ClusterConfig) else {"stopped_on": config.fit.stopped_on}),
        "held_out_items": len(fitted.held_out),
        "left_out": config.left_out,
        "epochs_run": max(measure.epoch for measure in fitted.history),
        "device": run.device.type,
        "precision": "bf16" if run.bf16 else "fp32",
        "torch": torch.__version__,
    }


def _report_notes(report: Report, data: TrainingData, parts: TokenizerParts, fitted: Fit) -> dict[str, Any]:
    """The report on all items, the held-out measure, and each file by itself that has any."""
    notes = {**report.as_dict(), "held_out": fitted.best._asdict()}
    if len(data.notes) > 1:
        notes["files"] = {
            name: evaluate(data.embeddings[rows], parts.network, parts.quantizer, parts.decoder).as_dict()
            for name, rows in data.files()
            if rows.start < rows.stop
        }
    return notes
