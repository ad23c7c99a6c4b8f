"""A swap that would do harm is refused in words, and changes nothing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import httpx
import pytest

from service.access.keys import KeyFile, Scope
from tests.service.admin.calls import copied, full, load, loaded, make_default, unload


@pytest.fixture(scope="module")
def guarded(
    start_service: Callable[..., Any], first: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Path]]:
    """A service, and the directory that it may load from."""
    root = tmp_path_factory.mktemp("root")
    directory = Path(tempfile.mkdtemp(prefix="semid-"))
    service = start_service(checkpoint=first, checkpoint_dirs=(root,), data_dir=directory, max_tokenizers=2)
    yield service, root
    service.stop()
    shutil.rmtree(directory, ignore_errors=True)


def test_what_does_not_go_with_what_is_loaded_is_refused_unless_somebody_insists(
    guarded: tuple[Any, Path], first: Path, second: Path, make_checkpoint: Callable[..., Path]
) -> None:
    service, root = guarded
    copied(second, root / "second")
    copied(make_checkpoint("first", 8, 8, seed=11, takes_text=False), root / "namesake")

    def refusal(response: httpx.Response) -> str:
        assert response.headers["content-type"] == "application/problem+json"
        return response.json()["type"].rpartition(":")[2]

    assert refusal(load(service, copied(first, root / "twice"))) == "tokenizer_loaded_twice"
    assert refusal(load(service, "namesake")) == "tokenizer_name_taken"
    assert refusal(unload(service, first)) == "tokenizer_is_default"
    assert refusal(unload(service, second)) == "unknown_tokenizer"
    assert load(service, "namesake", force=True).status_code == 200
    assert refusal(load(service, "second")) == "too_many_tokenizers"
    assert refusal(service.http.delete("/admin/tokenizers/first")) == "ambiguous_tokenizer"
    assert unload(service, root / "namesake").status_code == 200


def test_a_default_that_takes_no_texts_is_refused_where_callers_may_send_them(service: Any, second: Path) -> None:
    before = loaded(service)

    refused = load(service, second, default=True)

    assert refused.status_code == 409
    assert refused.json()["type"] == "urn:semid:problem:takes_other_content"
    assert "texts" in refused.json()["detail"]
    assert loaded(service) == before


def test_a_default_of_another_dimension_is_refused_unless_somebody_insists(
    guarded: tuple[Any, Path], first: Path, make_checkpoint: Callable[..., Path]
) -> None:
    service, root = guarded
    narrow = copied(make_checkpoint("narrow", 8, 8, takes_text=False, dimension=32), root / "narrow")

    refused = load(service, narrow, default=True)
    assert "embeddings of 384 numbers" in refused.json()["detail"]
    assert len(loaded(service)) == 1
    assert load(service, narrow).status_code == 200
    assert make_default(service, narrow).json() == refused.json() | {"request_id": ANY}
    assert make_default(service, narrow, force=True).json()["default"] == full(narrow)
    assert make_default(service, first, force=True).json()["default"] == full(first)
    assert unload(service, narrow).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "rebound.example:8000"},
        {"host": "127.0.0.1:8000", "origin": "https://elsewhere.example"},
        {"host": "127.0.0.1:8000", "origin": "null"},
        {"host": "127.0.0.1:8000", "x-forwarded-for": "198.51.100.7"},
    ],
)
def test_without_keys_nobody_may_who_could_be_a_page_or_come_from_elsewhere(
    guarded: tuple[Any, Path], first: Path, headers: dict[str, str]
) -> None:
    response = guarded[0].http.post(f"/admin/tokenizers/{full(first)}/default", headers=headers)

    assert response.status_code == 403
    assert response.json()["type"] == "urn:semid:problem:admin_closed"


def test_beyond_loopback_an_admin_key_is_needed(
    start: Callable[..., Any], first: Path, second: Path, data_dir: Path
) -> None:
    open_to_all = start(host="0.0.0.0")
    file, secrets = KeyFile(), {}
    for scope in Scope:
        file, secrets[scope] = file.with_new(scope, scope)
    file.write(data_dir / "keys.json")
    with_keys = start(host="0.0.0.0", keys_file=data_dir / "keys.json")

    refused = load(open_to_all, second)
    statuses = {}
    for scope, secret in secrets.items():
        with_keys.http.headers["authorization"] = f"Bearer {secret}"
        statuses[scope] = make_default(with_keys, first).status_code

    assert refused.status_code == 403
    assert "SID_KEYS_FILE" in refused.json()["detail"]
    assert statuses == {Scope.READ: 403, Scope.TOKENIZE: 403, Scope.ADMIN: 200}
