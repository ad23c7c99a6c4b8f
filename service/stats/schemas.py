"""The documented shape of the statistics."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, Field

from service.stats.drift import Verdict


class TrainedUse(BaseModel):
    """Use of a level's codewords by the training items, as the manifest tells it."""

    used: float | None = Field(description="Share of the codewords.")
    perplexity: float | None
    entropy: float | None


class UsedLevel(BaseModel):
    """How live items use a level's codewords."""

    level: int = Field(description="From 1.")
    codewords: int = Field(description="K, how many there are.")
    used: int = Field(description="How many of them a live item has.")
    perplexity: float = Field(description="So many codewords, equally used, would have the same entropy.")
    entropy: float = Field(description="In bits; at most log2 K.")
    counts: list[int] | None = Field(description="Live items of each codeword; null unless asked for.")
    training: TrainedUse | None


class TrainedCollisions(BaseModel):
    """Collisions of the training items, as the manifest tells them."""

    rate: float | None
    largest_group: int | None


class LiveCollisions(BaseModel):
    """Live items that share all their codes, before the suffix."""

    rate: float = Field(description="1 - distinct codes / items.")
    groups: int = Field(description="Distinct codes.")
    largest_group: int
    group_sizes: dict[str, int] = Field(description="How many groups have so many live items, by size.")
    training: TrainedCollisions | None


class DriftFigures(BaseModel):
    """Quantization errors of what this service's workers encoded within the window, against the training items'."""

    window_s: int
    rows: int = Field(description="Contents encoded; known ones are answered without, and do not count.")
    mean: float | None
    counts: list[int] | None = Field(
        description="How many lie below the first training quantile, between each two, and beyond the last."
    )
    expected_shares: list[float] | None = Field(description="The same of the training items, as shares.")
    training: dict[str, float] | None = Field(description="Of the training items: mean, and quantiles q01 to q99.")
    tail: str = Field(description="The quantile beyond which the share is told.")
    share_beyond_tail: float | None = Field(description="0.05 is to be expected.")
    population_stability_index: float | None = Field(description="0 where both distributions are one.")
    verdict: Verdict = Field(
        description="`further`: surely beyond twice the expected share; `retrain`: beyond four times; `too_few` to say."
    )
    meaning: str = Field(description="The verdict in words.")


class StatsResponse(BaseModel):
    """How a record's codes are used at one revision, and how far what comes in lies from the training."""

    tokenizer: str
    namespace: str
    revision: int = Field(description="Of the record, up to which all is counted.")
    counted_at: datetime
    items: int = Field(description="Live ones.")
    levels: list[UsedLevel]
    collisions: LiveCollisions
    drift: DriftFigures
