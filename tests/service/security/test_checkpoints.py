"""A checkpoint that is pickled, or not what was frozen, is refused: at start, and while the service runs."""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fastapi.testclient import TestClient

from models import CheckpointError
from models.checkpoint import WEIGHTS
from service.app import create_app
from service.settings import Settings
from tests.service.admin.calls import load, loaded
from tests.service.security.bad_checkpoints import ELSEWHERE, NOT_WHAT_WAS_FROZEN, mark_of, pickled_by_torch


class Loading(NamedTuple):
    """A running service, a checkpoint beside its own, and the directory that it may load from."""

    service: Any
    good: Path
    root: Path


@pytest.fixture(scope="module")
def loading(
    start_service: Callable[..., Any], make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Loading]:
    first = make_checkpoint("first", 16, 16, takes_text=False)
    second = make_checkpoint("second", 8, 8, 8, seed=7, takes_text=False)
    root = tmp_path_factory.mktemp("root")
    directory = Path(tempfile.mkdtemp(prefix="semid-"))
    service = start_service(checkpoint=first, checkpoint_dirs=(root,), data_dir=directory)
    yield Loading(service, second, root)
    service.stop()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.parametrize("fault", [*NOT_WHAT_WAS_FROZEN, *ELSEWHERE])
def test_a_bad_checkpoint_is_refused_in_words_by_a_running_service_and_changes_nothing(
    loading: Loading, fault: str
) -> None:
    service, before = loading.service, loaded(loading.service)
    plan = service.state.swap._plans.look()
    make, words = {**NOT_WHAT_WAS_FROZEN, **ELSEWHERE}[fault]
    place = loading.root / fault.replace(" ", "-")

    response = load(service, make(loading.good, place))

    assert response.status_code == 422, response.text
    assert response.json()["type"] == "urn:semid:problem:checkpoint_refused"
    assert words in response.json()["detail"]
    assert ("pickled is never loaded" in response.json()["detail"]) == (fault == "a pickle beside")
    assert loaded(service) == before
    assert service.state.swap._plans.look() == plan
    assert not mark_of(place).exists()


@pytest.mark.parametrize("fault", NOT_WHAT_WAS_FROZEN)
def test_a_bad_checkpoint_of_the_settings_keeps_a_service_from_starting(
    loading: Loading, data_dir: Path, tmp_path: Path, fault: str
) -> None:
    make, words = NOT_WHAT_WAS_FROZEN[fault]
    settings = Settings(
        checkpoint=make(loading.good, tmp_path / "bad"),
        data_dir=data_dir,
        redis_url=loading.service.redis_url,
        device="cpu",
    )

    with pytest.raises(CheckpointError, match=words), TestClient(create_app(settings)):
        pytest.fail("it serves")

    assert not mark_of(tmp_path / "bad").exists()


def test_the_bomb_goes_off_where_it_is_unpickled(tmp_path: Path, loading: Loading) -> None:
    weights = pickled_by_torch(loading.good, tmp_path / "bad") / WEIGHTS

    torch.load(io.BytesIO(weights.read_bytes()), weights_only=False)

    assert mark_of(tmp_path / "bad").exists()  # so that its absence above means something
