"""Two checkpoints, and services that may load the second beside the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def first(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("first", 16, 16, takes_text=False)


@pytest.fixture(scope="module")
def second(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("second", 8, 8, 8, seed=7, takes_text=False)


@pytest.fixture
def start(start_service: Callable[..., Any], data_dir: Path, first: Path, second: Path) -> Iterator[Callable[..., Any]]:
    """Starts a service on the first checkpoint, which may load the second."""
    started: list[Any] = []

    def begin(**settings: Any) -> Any:
        chosen = {"checkpoint": first, "checkpoint_dirs": (second.parent,), "data_dir": data_dir, **settings}
        started.append(start_service(**chosen))
        return started[-1]

    yield begin
    for service in started:
        if not service.http.is_closed:
            service.stop()
