"""Titles of items over HTTP: given with an item in every form of a body, told wherever people look."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis
from typer.testing import CliRunner

from service.cli import app
from service.client import Assignment, TokenizerClient
from tests.service.bulk.arrow_calls import EMBEDDING, post, tokenize, written

MakeEmbedding = Callable[[int], list[float]]
NDJSON = {"content-type": "application/x-ndjson"}


def shown(service: Any, namespace: str, *item_ids: str) -> list[str | None]:
    """The title of each item, where `GET /assignment` tells one."""
    asked = [{"item_id": item_id, "namespace": namespace} for item_id in item_ids]
    answers = [service.http.get("/assignment", params=params) for params in asked]
    assert {answer.status_code for answer in answers} == {200}
    return [answer.json().get("display") for answer in answers]


def entry(item_id: str, vector: list[float], form: str, **members: Any) -> dict[str, Any]:
    content = base64.b64encode(np.array(vector, "<f4").tobytes()).decode() if form == "base64" else vector
    return {"item_id": item_id, "embedding": content, **members}


@pytest.mark.parametrize("form", ["one by one", "base64", "numbers", "texts", "lines", "arrow"])
def test_a_title_is_kept_however_its_item_comes(
    titled_service: Any, namespace: str, make_embedding: MakeEmbedding, form: str
) -> None:
    titles = {f"item {i}": f"Title {i}" if i % 3 else None for i in range(20)}
    entries = [
        {"item_id": item_id, "text": f"kettle {i}", "display": title}
        if form in {"texts", "lines"}
        else entry(item_id, make_embedding(i % 5), form, **({} if title is None else {"display": title}))
        for i, (item_id, title) in enumerate(titles.items())
    ]

    if form == "arrow":
        columns = [[one.get(name) for one in entries] for name in ("item_id", "embedding", "display")]
        arrays = [pa.array(columns[0]), pa.array(columns[1], EMBEDDING), pa.array(columns[2], pa.large_string())]
        batch = pa.RecordBatch.from_arrays(arrays, ["item_id", "embedding", "display"])
        answered = tokenize(titled_service, batch, namespace=namespace)
    elif form == "lines":
        body = "\n".join(map(json.dumps, entries))
        lines = titled_service.http.post("/tokenize", content=body, params={"namespace": namespace}, headers=NDJSON)
        answered = [json.loads(line) for line in lines.text.splitlines()]
    elif form == "one by one":
        answered = [titled_service.tokenize(one, namespace=namespace)[0] for one in entries]
    else:
        answered = titled_service.tokenize(*entries, namespace=namespace)

    assert all(one["created"] and "display" not in one for one in answered)
    assert shown(titled_service, namespace, *titles) == list(titles.values())


def test_every_answer_that_people_look_at_has_the_title(
    titled_service: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    vector = make_embedding(3)
    (plain, titled) = titled_service.tokenize(
        {"item_id": "plain", "embedding": vector},
        {"item_id": "titled", "embedding": vector, "display": "Kettle"},
        namespace=namespace,
    )
    http, record = titled_service.http, {"namespace": namespace}
    expected = {"plain": None, "titled": "Kettle"}

    def titles(answers: list[dict[str, Any]]) -> dict[str, str | None]:
        assert all(answer.get("display", "told") for answer in answers)  # there alone where there is one
        return {answer["item_id"]: answer.get("display") for answer in answers}

    ids = [plain["semantic_id"], "9-9-9-9", titled["semantic_id"]]
    found = http.post("/lookup", json={"semantic_ids": ids, **record}).json()["items"]
    assert titles([found[0], found[2]]) == expected
    assert titles([http.get(f"/item/{titled['semantic_id']}", params=record).json()]) == {"titled": "Kettle"}
    assert titles(http.get("/prefix/", params=record).json()["items"]) == expected
    near = http.post("/explain", json={"item": {"embedding": vector, "display": "unused"}, **record}).json()
    assert titles(near["nearest"]) == expected
    asked = {"after": 0, "display": True, **record}
    assert titles(http.get("/changes", params=asked).json()["changes"]) == expected
    assert "display" not in http.get("/changes", params={"after": 0, **record}).text


def test_the_latest_title_stands_and_goes_with_the_item(
    titled_service: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    item = {"item_id": "a", "embedding": make_embedding(1)}

    def after(assign: bool = True, **members: Any) -> str | None:  # noqa: FBT001, FBT002 - as the API has it
        titled_service.tokenize({**item, **members}, namespace=namespace, assign=assign)
        return shown(titled_service, namespace, "a")[0]

    assert after(display="Kettle") == "Kettle"
    assert after() == "Kettle"
    assert after(display="Kettle, steel, cordless, with a lid that opens") == "Kettle, steel, cordless, with a lid t…"
    assert after(display=None, embedding=make_embedding(2)) == "Kettle, steel, cordless, with a lid t…"
    assert after(display="Lamp", embedding=make_embedding(2)) == "Lamp"
    assert after(display="of a dry run", assign=False) == "Lamp"
    assert after(display="") is None
    assert after(display="Lamp") == "Lamp"

    gone = titled_service.http.delete("/assignment/a", params={"namespace": namespace})
    assert "display" not in gone.json()
    assert after() is None


def test_a_title_that_is_no_text_fails_its_item_alone(titled_service: Any, service: Any, namespace: str) -> None:
    for running in (titled_service, service):  # whether titles are kept or not
        wrong, right = running.tokenize(
            {"item_id": "a", "text": "x", "display": 7},
            {"item_id": "b", "text": "y", "display": "Y"},
            namespace=namespace,
        )
        assert wrong["error"]["type"].endswith(":invalid_item")
        assert "display is a string" in wrong["error"]["detail"]
        assert right["created"]

    batch = pa.RecordBatch.from_pydict({"item_id": ["a"], "text": ["x"], "display": [7]})
    refused = post(titled_service, written(batch), namespace=namespace)
    assert (refused.status_code, "display is a column of strings" in refused.text) == (422, True)


def test_where_titles_are_not_kept_they_leave_no_trace(service: Any, namespace: str) -> None:
    service.tokenize(*({"item_id": str(i), "text": "x", "display": "Kettle"} for i in range(20)), namespace=namespace)

    assert shown(service, namespace, "0", "19") == [None, None]
    assert (
        "display" not in service.http.get("/changes", params={"after": 0, "display": True, "namespace": namespace}).text
    )
    with redis.Redis.from_url(service.redis_url) as client:
        assert not list(client.scan_iter(f"sid:{{sid:{namespace}:*"))


@pytest.mark.parametrize("kind", ["texts", "embeddings"])
def test_the_client_and_its_command_send_titles_and_tell_them(
    titled_service: Any, namespace: str, make_embedding: MakeEmbedding, tmp_path: Path, kind: str
) -> None:
    url = str(titled_service.http.base_url)
    table = {"item_id": ["1", "2"], "name": ["Kettle", None]}
    table |= {"title": ["a", "b"]} if kind == "texts" else {"embedding": [make_embedding(1), make_embedding(2)]}
    pq.write_table(pa.table(table), tmp_path / "items.parquet")

    words = ["tokenize", str(tmp_path / "items.parquet"), "--url", url, "--namespace", namespace]
    mistaken = CliRunner().invoke(app, [*words, "--display", "nme"])
    done = CliRunner().invoke(app, [*words, "--display", "name"])

    assert (mistaken.exit_code, "has no column 'nme'" in mistaken.output) == (1, True)
    assert done.exit_code == 0, done.output
    with TokenizerClient(url, namespace=namespace) as client:
        list(client.tokenize([{"item_id": "3", "text": "x", "display": "Lamp"}]))
        found = [client.assignment(item_id) for item_id in "123"]
        looked_up = [one for one in client.lookup([one.semantic_id for one in found]) if isinstance(one, Assignment)]
    assert [one.display for one in found] == ["Kettle", None, "Lamp"]
    assert looked_up == found
