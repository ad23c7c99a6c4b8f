"""A registry that came back older, as callers, orchestrators and operators meet it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from service.cli import app
from tests.valkey import Valkey

MakeEmbedding = Callable[[int], list[float]]
StartService = Callable[..., Any]
OLDER = "urn:semid:problem:registry_older"


def semid(data_dir: Path, url: str | None, *words: str, answer: str = "") -> Result:
    environment = {"SID_DATA_DIR": str(data_dir), **({"SID_REDIS_URL": url} if url else {})}
    return CliRunner().invoke(app, ["registry", *words], input=answer, env=environment)


def restore(server: Valkey, backup: Path) -> None:
    files = server.socket.parent / "appendonlydir"
    server.kill()
    shutil.rmtree(files)
    shutil.copytree(backup, files)
    server.restart()


def assert_refused(service: Any, semantic_id: str, item: dict[str, Any]) -> None:
    look = service.http.get
    answers = [
        service.post(item),
        service.post(item, assign=False),
        look(f"/item/{semantic_id}"),
        look("/assignment/kept"),
        service.http.delete("/assignment/kept"),
        service.http.post("/lookup", json={"semantic_ids": [semantic_id]}),
        service.http.post("/next", json={"prefixes": [""]}),
        look("/prefix/"),
        look("/trie"),
        look("/changes", params={"after": 0}),
        look("/readyz"),
    ]
    assert {(answer.status_code, answer.json()["type"]) for answer in answers} == {(503, OLDER)}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
    assert "revision 3" in answers[-1].json()["detail"]
    assert look("/healthz").status_code == 200


def test_a_service_is_not_ready_before_anybody_asks_for_the_namespace_that_is_older(
    start_service: StartService, valkey_process: Valkey, data_dir: Path, make_embedding: MakeEmbedding
) -> None:
    settings = {"redis_url": valkey_process.url, "data_dir": data_dir}
    service = start_service(**settings)
    backup = data_dir / "backup"
    shutil.copytree(valkey_process.socket.parent / "appendonlydir", backup)
    service.tokenize({"item_id": "lost", "embedding": make_embedding(1)}, namespace="shop")
    service.stop()
    restore(valkey_process, backup)

    service = start_service(**settings)

    answer = service.http.get("/readyz")
    assert (answer.status_code, answer.json()["type"]) == (503, OLDER)
    assert "shop:" in answer.json()["detail"]
    service.stop()


def test_a_restored_registry_is_refused_until_an_operator_accepts_it(
    start_service: StartService, valkey_process: Valkey, data_dir: Path, make_embedding: MakeEmbedding
) -> None:
    settings = {"redis_url": valkey_process.url, "data_dir": data_dir}
    items = [{"item_id": name, "embedding": make_embedding(1)} for name in ("kept", "lost", "lost too", "new")]
    service = start_service(**settings)
    other = start_service(**settings | {"data_dir": data_dir / "other"})
    (kept,) = service.tokenize(items[0])
    backup = data_dir / "backup"
    shutil.copytree(valkey_process.socket.parent / "appendonlydir", backup)
    (lost, _) = service.tokenize(items[1], items[2])
    other.tokenize(items[1])
    etag = service.http.get("/trie").headers["etag"]
    epoch = service.http.get("/changes", params={"after": 3}).json()["epoch"]
    assert semid(data_dir, valkey_process.url, "status").exit_code == 0

    restore(valkey_process, backup)
    assert_refused(service, lost["semantic_id"], items[3])
    service.stop()
    service = start_service(**settings)  # it starts, and explains itself
    assert service.http.get("/readyz").json()["type"] == OLDER
    assert_refused(service, lost["semantic_id"], items[3])

    status = semid(data_dir, valkey_process.url, "status")
    assert status.exit_code == 1
    assert "OLDER" in status.output
    assert "lost: up to 2 changes" in status.output
    refused = semid(data_dir, valkey_process.url, "accept", answer="n\n")
    assert refused.exit_code == 1
    assert "may be issued again" in refused.output
    elsewhere = semid(data_dir, valkey_process.url, "accept", "--namespace", "none")
    assert elsewhere.exit_code == 1
    assert "no record is of the namespace none; there are default" in elsewhere.output
    blind = semid(data_dir / "elsewhere", valkey_process.url, "status")
    assert blind.exit_code == 1
    assert "?      default:" in blind.output
    assert "set SID_DATA_DIR to the data directory of a service" in blind.output
    assert_refused(service, lost["semantic_id"], items[3])

    accepted = semid(data_dir, valkey_process.url, "accept", "--namespace", "default", answer="y\n")

    assert accepted.exit_code == 0, accepted.output
    assert "Accepted: 1." in accepted.output
    for running in (service, other):
        running.until(lambda running=running: running.http.get("/readyz").status_code == 200, "it does not go on")
    (again,) = other.tokenize(items[0])
    assert (again["semantic_id"], again["created"]) == (kept["semantic_id"], False)
    first, second = service.tokenize(items[3], items[2])
    assert (first["suffix"], second["suffix"]) == (1, 2)  # issued again, as the operator was told
    assert service.http.get("/trie", headers={"if-none-match": etag}).status_code == 200  # the revision is the same
    assert service.http.get("/changes", params={"after": 3}).status_code == 200
    gone = service.http.get("/changes", params={"after": 3, "epoch": epoch})
    assert (gone.status_code, gone.json()["type"]) == (410, "urn:semid:problem:changes_gone")
    assert semid(data_dir, valkey_process.url, "status").exit_code == 0
    service.stop()
    other.stop()


def test_a_restored_embedded_registry_is_refused_and_accepted(
    start_service: StartService, data_dir: Path, make_embedding: MakeEmbedding
) -> None:
    items = [{"item_id": name, "embedding": make_embedding(1)} for name in ("kept", "lost")]
    service = start_service(data_dir=data_dir)
    service.tokenize(items[0])
    service.stop()
    backup = data_dir / "backup"
    shutil.copytree(data_dir / "registry" / "appendonlydir", backup)
    service = start_service(data_dir=data_dir)
    service.tokenize(items[1])
    service.stop()
    shutil.rmtree(data_dir / "registry" / "appendonlydir")
    shutil.copytree(backup, data_dir / "registry" / "appendonlydir")

    service = start_service(data_dir=data_dir)

    assert service.post(items[1]).json()["type"] == OLDER
    assert semid(data_dir, None, "accept", "--yes").exit_code == 0
    service.until(lambda: service.http.get("/readyz").status_code == 200, "it does not go on")
    assert service.tokenize(items[1])[0]["created"]
    service.stop()


@pytest.mark.parametrize("command", ["status", "accept"])
def test_a_data_directory_without_a_registry_is_said_so(data_dir: Path, command: str) -> None:
    result = semid(data_dir, None, command)

    assert result.exit_code == 1
    assert "SID_DATA_DIR" in result.output
    assert list(data_dir.iterdir()) == []
