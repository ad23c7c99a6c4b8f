"""A service with two tokenizers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from models import read_manifest
from tests.service.migration.two import Two


@pytest.fixture(scope="session")
def checkpoints(make_checkpoint: Callable[..., Path]) -> tuple[Path, Path]:
    """Of the old tokenizer, and of the new one."""
    winter = make_checkpoint("winter", 4, 4, 4, takes_text=False)
    return winter, make_checkpoint("spring", 6, 6, seed=7, takes_text=False)


@pytest.fixture(scope="session")
def start_two(start_service: Callable[..., Any], checkpoints: tuple[Path, Path]) -> Callable[..., Two]:
    """Starts a service with both."""
    old, new = checkpoints

    def start(**settings: Any) -> Two:
        service = start_service(checkpoint=old, further_checkpoints=(new,), max_items=128, **settings)
        return Two(service, read_manifest(old).full_name, read_manifest(new).full_name)

    return start


@pytest.fixture(scope="session")
def running(start_two: Callable[..., Two]) -> Iterator[Two]:
    directory = Path(tempfile.mkdtemp(prefix="semid-"))
    two = start_two(data_dir=directory)
    yield two
    two.service.stop()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def two(running: Two) -> Iterator[Two]:
    """A service for all tests that leave both tokenizers loaded; the old one is the default again after each."""
    yield running
    if running.default != running.old:
        assert running.make_default(running.old).exit_code == 0
