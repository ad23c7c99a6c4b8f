"""A migration that is ended, or whose service goes away, at any of its calls: the same command finishes it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import redis

from service.client import TokenizerClient
from tests.ports import free_port
from tests.service.migration.two import Two, catalogue, report_in

ROWS = 12
RETIRED = 3

Disturb = Callable[[], None]


def at_call(patch: pytest.MonkeyPatch, call: str, disturb: Disturb, *, answered: bool = False) -> None:
    """Disturbs the first such call of a client: before it is sent, or when it is answered."""
    real, due = getattr(TokenizerClient, call), [disturb]

    def disturbed(client: TokenizerClient, *args: Any, **options: Any) -> Any:
        if due and not answered:
            due.pop()()
        answer = real(client, *args, **options)
        if due and answered:
            due.pop()()
        return answer

    patch.setattr(TokenizerClient, call, disturbed)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.fixture
def begun(two: Two, namespace: str, tmp_path: Path) -> Callable[..., Any]:
    """Items under the old tokenizer, one of them retired; the command that makes the new one the default."""
    return prepared(two, namespace, tmp_path)


def prepared(two: Two, namespace: str, directory: Path) -> Callable[..., Any]:
    two.tokenize(range(ROWS), two.old, namespace)
    two.service.http.delete(f"/assignment/i{RETIRED}", params={"namespace": namespace, "tokenizer": two.old})
    files = [catalogue(directory / "a.parquet", range(ROWS))]
    return lambda *more: two.migrate(directory, files, namespace, "--switch", *more)


def assert_done(two: Two, namespace: str, directory: Path) -> None:
    """Everybody is there under the new tokenizer, which is the default, and the report says so."""
    assert two.default == two.new
    held = [two.assignment(row, two.new, namespace) for row in range(ROWS)]
    assert [answer.status_code for answer in held] == [410 if row == RETIRED else 200 for row in range(ROWS)]
    report = report_in(directory)
    assert (report["default"], report["items"]["both"], report["items"]["missing"]) == (two.new, ROWS - 1, 0)
    assert report["items"]["live_again"] == []
    ids = dict(zip(*pq.read_table(directory / "out" / "ids.parquet", columns=["item_id", "semantic_id"]), strict=True))
    assert len(ids) == ROWS
    assert not (directory / "out" / ".ids.parquet.run").exists()


@pytest.mark.parametrize(
    ("call", "when"),
    [("retire_all", "answered"), ("make_default", "unsent"), ("make_default", "answered")],
)
def test_a_migration_that_is_ended_as_it_changes_something_is_finished_by_the_same_command(
    two: Two, namespace: str, tmp_path: Path, begun: Callable[..., Any], call: str, when: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, call, interrupt, answered=when == "answered")
        ended = begun()

    assert ended.exit_code == 130, ended.output
    if call == "make_default":
        assert report_in(tmp_path)["default"] is None
    again = begun()
    assert again.exit_code == 0, again.output
    assert_done(two, namespace, tmp_path)


def test_more_changes_than_are_kept_as_the_default_changes_are_read_anew(
    two: Two, namespace: str, tmp_path: Path, begun: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {"namespace": namespace, "tokenizer": two.old}

    def late() -> None:
        revision = two.service.http.get("/changes", params={**where, "after": 0}).json()["revision"]
        two.tokenize(range(ROWS, ROWS + 1), two.old, namespace)
        two.service.http.delete("/assignment/i0", params=where)
        with redis.Redis.from_url(two.service.redis_url) as client:  # as hundreds of changes would
            client.xtrim(f"sid:{{{namespace}:{two.old.rpartition('@')[2]}}}:c", 1, approximate=False)
        assert two.service.http.get("/changes", params={**where, "after": revision}).status_code == 410

    at_call(monkeypatch, "make_default", late, answered=True)
    done = begun()

    assert done.exit_code == 3, done.output
    report = report_in(tmp_path)
    assert (report["default"], report["items"]["missing"], report["items"]["live_again"]) == (two.new, 1, ["i0"])
    assert "not in the files" in (tmp_path / "out" / "missing.jsonl").read_text()


@pytest.fixture
def own(start_two: Callable[..., Two], data_dir: Path) -> Iterator[Two]:
    """A service of the test's own, on a port of its own."""
    two = start_two(data_dir=data_dir, port=free_port())
    yield two
    two.service.stop()


def restart(two: Two, start_two: Callable[..., Two]) -> None:
    two.service.stop()
    two.service = start_two(data_dir=two.service.settings.data_dir, port=two.service.settings.port).service


def end_registry(two: Two) -> None:
    """Kills the embedded Valkey; the service starts it again."""
    with redis.Redis.from_url(two.service.redis_url) as client:
        os.kill(client.info("server")["process_id"], signal.SIGKILL)


@pytest.mark.parametrize("gone", ["service", "registry"])
def test_a_migration_goes_on_after_a_service_or_a_registry_that_went_away_at_each_call(
    own: Two,
    start_two: Callable[..., Two],
    namespace: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gone: str,
) -> None:
    command = prepared(own, namespace, tmp_path)
    times = []

    def disturb() -> None:
        times.append(1)
        restart(own, start_two) if gone == "service" else end_registry(own)

    calls = ("tokenizers", "trie", "lookup", "assignments", "retire_all", "make_default")
    for call in calls:
        at_call(monkeypatch, call, disturb)
    done = command()

    assert done.exit_code == 0, done.output
    assert len(times) == len(calls)
    monkeypatch.undo()
    assert_done(own, namespace, tmp_path)


def test_what_became_of_the_default_is_said_whatever_the_service_does_as_it_changes(
    own: Two,
    start_two: Callable[..., Two],
    checkpoints: tuple[Path, Path],
    namespace: str,
    tmp_path: Path,
) -> None:
    command = prepared(own, namespace, tmp_path)

    def loaded(method: str, path: str, **body: Any) -> None:
        assert own.service.http.request(method, f"/admin/tokenizers{path}", **body).is_success

    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, "make_default", lambda: loaded("DELETE", f"/{own.new}"))
        refused = command()
    loaded("POST", "", json={"checkpoint": str(checkpoints[1])})
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, "make_default", own.service.stop)
        away = command("--patience", "0.3")
    unknown = report_in(tmp_path)["default"]
    own.service = start_two(data_dir=own.service.settings.data_dir, port=own.service.settings.port).service
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, "make_default", lambda: loaded("DELETE", f"/{own.old}"), answered=True)
        unread = command()
    known = report_in(tmp_path)["default"]
    unloaded = command()
    loaded("POST", "", json={"checkpoint": str(checkpoints[0])})
    done = command()

    assert [run.exit_code for run in (refused, away, unread, unloaded, done)] == [1, 1, 1, 1, 0]
    assert "nothing was switched: 422 That tokenizer is not loaded" in refused.stderr
    assert f"whether {own.new} is the default now is not known" in away.stderr
    assert unknown is None
    assert f"{own.new} is the default now; what changed under {own.old} meanwhile could not be read" in unread.stderr
    assert known == own.new
    assert f"{own.old} is not loaded; loaded are {own.new}." in unloaded.stderr
    assert "semid tokenizers load" in unloaded.stderr
    assert_done(own, namespace, tmp_path)
