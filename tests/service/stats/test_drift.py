"""The quantization errors of the last hour against those of the training items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import DEFAULT_CHECKPOINT, Encoding, read_manifest
from service.stats.drift import MIN_ROWS, Drift, ErrorWindow, WatchedEncoder
from service.stats.minutes import Fellows
from service.stats.training import QUANTILES, TrainingErrors
from tests.service.letters import LetterEncoder

MANIFEST = read_manifest(DEFAULT_CHECKPOINT)
MINUTE = 60


def training_of(errors: np.ndarray) -> TrainingErrors:
    return TrainingErrors(float(errors.mean()), tuple(np.quantile(errors, list(QUANTILES.values())).tolist()))


def drawn(rows: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return scale * np.random.default_rng(seed).gamma(4.0, 0.04, rows)


def drift_of(errors: np.ndarray, training: TrainingErrors | None = None) -> Drift:
    window = ErrorWindow(training or training_of(drawn(100_000)), clock=lambda: 0.0)
    window.observe(torch.from_numpy(errors))
    return Drift(window.seen(), window.training)


@pytest.mark.parametrize(
    ("scale", "verdict"), [(0.7, "as_trained"), (1.0, "as_trained"), (1.35, "further"), (2.0, "retrain")]
)
def test_larger_errors_are_judged_by_how_many_are_in_the_tail(scale: float, verdict: str) -> None:
    errors = drawn(3000, scale, seed=1)

    drift = drift_of(errors)

    assert drift.verdict == verdict
    assert drift.beyond == pytest.approx(np.mean(errors > drift.training.quantiles[-2]))
    assert drift.seen.mean == pytest.approx(errors.mean())
    assert f"{drift.beyond:.0%}" in drift.meaning


def test_chance_raises_no_alarm() -> None:
    alarms = sum(drift_of(drawn(200, seed=seed)).verdict != "as_trained" for seed in range(300))

    assert alarms == 0


def test_few_contents_say_nothing() -> None:
    assert drift_of(drawn(MIN_ROWS - 1, scale=9)).verdict == "too_few"
    assert drift_of(np.zeros(0)).verdict == "too_few"
    assert drift_of(drawn(MIN_ROWS, scale=9)).verdict == "retrain"


def test_the_stability_index_is_nought_for_the_training_itself() -> None:
    errors = drawn(100_000)

    assert drift_of(errors).stability_index == pytest.approx(0, abs=1e-3)
    assert drift_of(errors * 1.5).stability_index > 0.25


def test_the_window_is_the_last_hour() -> None:
    now = 1e6
    window = ErrorWindow(training_of(drawn(1000)), clock=lambda: now)
    for _ in range(70):
        now += MINUTE
        window.observe(torch.tensor([1.0, 2.0]))
    assert window.seen().rows == 120
    assert window.seen().mean == 1.5

    now += 30 * MINUTE
    assert window.seen().rows == 60

    now += 31 * MINUTE
    assert window.seen() == (0, None, (0,) * 8)


def test_workers_count_together_and_the_next_goes_on_where_one_ended(tmp_path: Path) -> None:
    now = 1e6
    training = training_of(drawn(1000))

    def worker(place: int) -> ErrorWindow:
        window = ErrorWindow(training, clock=lambda: now)
        window.observe(torch.tensor([9.0]))  # what warmed it up
        window.begin("fingerprint", fellows=Fellows(tmp_path, place))
        return window

    first, second = worker(0), worker(1)
    first.observe(torch.tensor([1.0, 2.0]))
    now += 59 * MINUTE
    second.observe(torch.tensor([6.0]))
    assert first.seen() == second.seen() == worker(0).seen()
    assert first.seen()[:2] == (3, 3.0)

    now += MINUTE
    successor = worker(0)
    successor.observe(torch.tensor([4.0]))  # in the slot of the first worker's minute
    assert second.seen()[:2] == (2, 5.0)


def test_without_quantiles_of_the_training_there_is_nothing_to_compare_with() -> None:
    window = ErrorWindow(None)
    window.observe(torch.tensor([1.0, 3.0]))
    drift = Drift(window.seen(), None)

    assert (drift.seen.rows, drift.seen.mean, drift.beyond) == (2, 2.0, None)
    assert drift.verdict == "unknown"


@pytest.mark.parametrize(
    "report",
    [{}, {"quantization_error": None}, {"quantization_error": {"mean": 1.0}}],
)
def test_a_manifest_may_tell_nothing(report: dict[str, Any]) -> None:
    assert TrainingErrors.of(replace(MANIFEST, report=report)) is None


def test_an_error_has_its_place_among_those_of_the_training() -> None:
    training = TrainingErrors.of(MANIFEST)
    assert training is not None

    told = MANIFEST.report["quantization_error"]
    assert training.as_dict() == told
    assert training.share_below(told["q75"]) == pytest.approx(0.75)
    assert 0.5 < training.share_below((told["q50"] + told["q75"]) / 2) < 0.75
    assert (training.share_below(0.0), training.share_below(9.0)) == (0.01, 0.99)


def test_each_content_counts_once_whatever_alternatives_it_needs() -> None:
    window = ErrorWindow(None)
    watched = WatchedEncoder(LetterEncoder(), window)
    encode: Callable[..., Encoding] = watched.encode_texts

    pieces = watched.split(["a", "bc"])
    encoding = encode(pieces)
    encode(pieces, alternatives=3)

    assert window.seen().rows == 2
    assert window.seen().mean == pytest.approx(float(encoding.quantization_error.mean()))
