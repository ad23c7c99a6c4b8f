"""What a training writes down of each of its epochs, and `training.json`, which keeps it beside the manifest.

The file is no part of the fingerprint and nothing reads it to serve; curves and usage are drawn from it. It holds

    {"format": 1, "family": "rqvae", "codebook_sizes": [256, ...], "stopped_on": "held-out ...", "kept": 17,
     "records": [EpochRecord, ...], "codeword_use": [[3.1, ...], ...], "items": 12101, "held_out_items": 605}

in the order in which things happened: `kept` is the place in `records` of the state that was frozen. A family fitted by
k-means alone has one record, whose levels say how well each of them was clustered.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

HISTORY = "training.json"
FORMAT = 1

# Stages of a training, as `EpochRecord.stage` says them.
WARM_UP = "warm-up"
INITIALISED = "initialised"
TRAINING = "training"
REFITTED = "refitted"


class Measure(NamedTuple):
    """A measurement on the held-out rows.

    Attributes:
        epoch: Finished epochs of joint training; 0 is the k-means solution.
        refitted: Whether the codebooks were clustered anew after the training.
        reconstruction: Error as a share of the variance.
        colliding: Share of the held-out items whose codes another item has as well.
        value: What is minimised.
        missed: Share of the held-out items whose reconstruction points nearer to another one's embedding; None where
            nothing was trained for that.
        collaborative: Contrast of their quantized latents with their collaborative embeddings, in nats; None where
            there are none.
    """

    epoch: int
    refitted: bool
    reconstruction: float
    colliding: float
    value: float
    missed: float | None = None
    collaborative: float | None = None


# Before the first measurement.
NOTHING_YET = Measure(0, refitted=False, reconstruction=math.inf, colliding=1.0, value=math.inf)


@dataclass(frozen=True)
class LevelRecord:
    """One level at the end of an epoch, over the training rows as they are weighted.

    Attributes:
        used: Share of the codewords chosen at least once.
        perplexity: exp(entropy) of the choices.
        left_over: The mean squared norm of what this level and those before it leave over, as a share of the latents'
            variance: the inertia of its k-means where a family has one codebook for each level.
        restarted: Dead codewords that were moved to where rows are, in this epoch.
    """

    used: float
    perplexity: float
    left_over: float
    restarted: int = 0


@dataclass(frozen=True)
class EpochRecord:
    """One epoch, or the clustering before or after all epochs.

    Attributes:
        stage: `WARM_UP`: an epoch of the plain autoencoder, without codebooks. `INITIALISED`: the k-means solution,
            with which a family without joint training ends. `TRAINING`: an epoch of joint training. `REFITTED`: the
            codebooks of the best epoch clustered anew.
        epoch: Of its stage, from 1; of `INITIALISED` 0, of `REFITTED` the epoch whose network it has.
        seconds: That it took.
        losses: Means over the epoch's rows by name, before they are weighted; "total" is the weighted sum that was
            minimised. A loss of each level is the sum over levels under its name, and each under "name 1", ... Empty
            where nothing was trained.
        learning_rate: At the epoch's end; None where nothing was trained.
        gradient_norm: Mean over the epoch's steps of the norm of all gradients; None where nothing was trained.
        held_out: The measurement that chooses the epoch; None during the warm-up.
        levels: Each level, coarse to fine; empty during the warm-up.
    """

    stage: str
    epoch: int
    seconds: float
    losses: Mapping[str, float] = field(default_factory=dict)
    learning_rate: float | None = None
    gradient_norm: float | None = None
    held_out: Measure | None = None
    levels: tuple[LevelRecord, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {**asdict(self), "held_out": self.held_out._asdict() if self.held_out else None}


@dataclass(frozen=True)
class TrainingHistory:
    """What `training.json` holds.

    Attributes:
        family: A key of `models.tokenizer.FAMILIES`.
        codebook_sizes: K_l for each level.
        stopped_on: What `Measure.value` is, in words.
        kept: The place in `records` of the state that was frozen.
        records: In the order in which they happened.
        codeword_use: Of the frozen state by all rows, see `models.evaluation.measures.codeword_use`.
        items: That were read, the held-out ones counted in; None where it is not known.
        held_out_items: How many of them were not trained on; None where it is not known.
        format: Of the file.
    """

    family: str
    codebook_sizes: tuple[int, ...]
    stopped_on: str
    kept: int
    records: tuple[EpochRecord, ...]
    codeword_use: tuple[tuple[float, ...], ...] = ()
    items: int | None = None
    held_out_items: int | None = None
    format: int = FORMAT

    def as_json(self) -> str:
        """The file's text."""
        content = {**asdict(self), "records": [record.as_dict() for record in self.records]}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"


def record_of(content: Mapping[str, Any]) -> EpochRecord:
    """The record that `EpochRecord.as_dict` wrote.

    Raises:
        TypeError: It has other fields.
    """
    held_out = content["held_out"]
    levels = tuple(LevelRecord(**level) for level in content["levels"])
    return EpochRecord(**{**content, "held_out": Measure(**held_out) if held_out else None, "levels": levels})


def read_history(checkpoint: Path) -> TrainingHistory | None:
    """What `training.json` of a checkpoint's directory holds, or None where there is no such file.

    Raises:
        ValueError: It is not JSON, or of another format.
    """
    path = checkpoint / HISTORY
    try:
        return _history_of(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _history_of(content: Mapping[str, Any]) -> TrainingHistory:
    if content["format"] != FORMAT:
        raise ValueError(f"it has format {content['format']!r}; this version reads format {FORMAT}")
    records = tuple(record_of(record) for record in content["records"])
    sizes, use = tuple(content["codebook_sizes"]), tuple(tuple(level) for level in content.get("codeword_use", ()))
    return TrainingHistory(**{**content, "codebook_sizes": sizes, "records": records, "codeword_use": use})
