"""What a checkpoint is loaded with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from service.loading import Loader
from service.metrics import Metrics
from service.settings import Settings


@pytest.fixture(autouse=True)
def _threads_stay() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def threads(**settings: int) -> int:
    """How many threads the model of a service with these settings has."""
    Loader(Settings(**settings), Metrics())
    return torch.get_num_threads()


def test_workers_share_the_cores_evenly_and_each_has_one_thread_at_least() -> None:
    cores = threads()

    assert threads(workers=2) == max(1, cores // 2)
    assert threads(workers=1000) == 1


def test_threads_that_are_set_are_those_of_each_worker() -> None:
    assert threads(threads=3) == threads(threads=3, workers=2) == 3
