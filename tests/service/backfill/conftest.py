"""A small tokenizer of embeddings, and registries of a test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.service.backfill.catalogues import DIMENSION


@pytest.fixture(scope="session")
def embedding_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """Takes embeddings only, and has so few codes that most items share theirs."""
    return make_checkpoint("few-codes", 6, 5, 4, takes_text=False, dimension=DIMENSION)


@pytest.fixture
def settings(embedding_checkpoint: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the environment: this tokenizer, and an empty registry."""
    monkeypatch.setenv("SID_CHECKPOINT", str(embedding_checkpoint))
    monkeypatch.setenv("SID_DATA_DIR", str(data_dir))
    monkeypatch.setenv("SID_THREADS", "1")
    monkeypatch.setenv("SID_DEVICE", "cpu")
