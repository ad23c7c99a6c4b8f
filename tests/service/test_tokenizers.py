"""Several tokenizers side by side: each its own codes, its own record, its own name."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import redis

from models import Trie, read_manifest
from service.app import compose
from service.errors import TokenizerLoadedTwice
from service.metrics import Metrics
from service.registry.keys import meta_key
from service.settings import Settings

MakeEmbedding = Callable[[int], list[float]]
Start = Callable[..., Any]
TYPE = "urn:semid:problem:"


@pytest.fixture(scope="module")
def wide(make_checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint of other levels and sizes."""
    return make_checkpoint("wide", 300, 8, seed=2)


@pytest.fixture(scope="module")
def namesake(make_checkpoint: Callable[..., Path]) -> Path:
    """Another checkpoint with the name of the small one, of embeddings only."""
    return make_checkpoint("small", 4, 4, 4, seed=3, takes_text=False)


@pytest.fixture(scope="module")
def pair(start_service: Start, wide: Path, namesake: Path) -> Iterator[Any]:
    """A service on the small checkpoint with two beside it."""
    directory = Path(tempfile.mkdtemp(prefix="semid-"))
    running = start_service(data_dir=directory, further_checkpoints=(wide, namesake))
    yield running
    running.stop()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def names(checkpoint: Path, wide: Path, namesake: Path) -> dict[str, str]:
    return {
        "small": read_manifest(checkpoint).full_name,
        "wide": read_manifest(wide).full_name,
        "namesake": read_manifest(namesake).full_name,
    }


def is_empty(directory: Path) -> bool:
    return not list(directory.iterdir())


def problem(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["type"].removeprefix(TYPE)


def test_an_item_has_an_id_of_its_own_under_each_tokenizer(pair: Any, namespace: str, names: dict[str, str]) -> None:
    items = [{"item_id": f"{i}", "text": f"kettle of {i} l"} for i in range(12)]

    by_default = pair.post(*items, namespace=namespace).json()
    by_wide = pair.post(*items, namespace=namespace, tokenizer="wide").json()
    again = pair.post(*items, namespace=namespace, tokenizer=names["wide"]).json()

    assert by_default["tokenizer"] == names["small"]
    assert by_wide["tokenizer"] == again["tokenizer"] == names["wide"]
    assert [len(entry["codes"]) for entry in by_default["items"]] == [3] * 12
    assert [len(entry["codes"]) for entry in by_wide["items"]] == [2] * 12
    assert all(entry["created"] for answer in (by_default, by_wide) for entry in answer["items"])
    assert not any(entry["created"] for entry in again["items"])
    assert [e["semantic_id"] for e in again["items"]] == [e["semantic_id"] for e in by_wide["items"]]


def test_who_asks_for_an_id_is_told_what_its_item_holds_under_the_other_tokenizers(
    pair: Any, service: Any, namespace: str, names: dict[str, str], make_embedding: MakeEmbedding
) -> None:
    item = {"item_id": "kettle", "embedding": make_embedding(1)}
    (small,) = pair.tokenize(item, namespace=namespace)
    (wide,) = pair.tokenize(item, namespace=namespace, tokenizer="wide")

    def counterparts(semantic_id: str, **params: str) -> Any:
        return pair.http.get(f"/item/{semantic_id}", params={"namespace": namespace, **params}).json()["counterparts"]

    assert counterparts(small["semantic_id"]) == {names["wide"]: wide["semantic_id"], names["namesake"]: None}
    assert counterparts(wide["semantic_id"], tokenizer="wide") == {
        names["small"]: small["semantic_id"],
        names["namesake"]: None,
    }
    pair.http.delete("/assignment/kettle", params={"namespace": namespace, "tokenizer": "wide"})
    assert counterparts(small["semantic_id"]) == {names["wide"]: None, names["namesake"]: None}
    (lamp,) = pair.tokenize({"item_id": "lamp", "embedding": make_embedding(2)}, namespace=namespace)
    (wide,) = pair.tokenize({"item_id": "lamp", "embedding": make_embedding(2)}, namespace=namespace, tokenizer="wide")
    expected = [
        {names["wide"]: wide["semantic_id"], names["namesake"]: None},
        {names["wide"]: None, names["namesake"]: None},
    ]
    forward = pair.http.get("/assignment/lamp", params={"namespace": namespace}).json()
    assert forward["counterparts"] == expected[0]
    for path, asked in (
        ("/lookup", {"semantic_ids": [lamp["semantic_id"], "0-0-0-99", small["semantic_id"]]}),
        ("/assignments", {"item_ids": ["lamp", "never", "kettle"]}),
    ):
        found = pair.http.post(path, json={**asked, "namespace": namespace}).json()["items"]
        assert [entry["counterparts"] for entry in (found[0], found[2])] == expected
        assert "counterparts" not in found[1]
        unasked = pair.http.post(path, json={**asked, "namespace": namespace, "counterparts": False}).json()["items"]
        assert not any("counterparts" in entry for entry in unasked)
    (alone,) = service.tokenize(item, namespace=namespace)
    found = service.http.get(f"/item/{alone['semantic_id']}", params={"namespace": namespace}).json()
    assert "counterparts" not in found  # no other tokenizer is loaded


def test_a_counterpart_that_cannot_be_read_is_left_out_of_the_answer(
    pair: Any, namespace: str, names: dict[str, str], make_embedding: MakeEmbedding
) -> None:
    (small,) = pair.tokenize({"item_id": "kettle", "embedding": make_embedding(1)}, namespace=namespace)
    fingerprint = names["wide"].partition("@")[2]
    with redis.Redis.from_url(pair.redis_url) as client:
        other = {"schema": "0", "codebook_sizes": "9", "buckets": "1", "epoch": "e"}
        client.hset(meta_key(f"{namespace}:{fingerprint}"), mapping=other)

    found = pair.http.get(f"/item/{small['semantic_id']}", params={"namespace": namespace})

    assert (found.status_code, found.json()["counterparts"]) == (200, {names["namesake"]: None})


def test_every_look_up_goes_by_the_tokenizer_it_names(pair: Any, namespace: str, names: dict[str, str]) -> None:
    item = {"item_id": "a", "text": "kettle"}
    where: dict[str, Any] = {"namespace": namespace}
    (default,) = pair.tokenize(item, **where)
    (wide,) = pair.tokenize(item, tokenizer="wide", **where)

    for name, held in ((None, default), ("wide", wide)):
        asked = {**where, **({"tokenizer": name} if name else {})}
        full_name = names[name or "small"]
        found = pair.http.get(f"/item/{held['semantic_id']}", params=asked).json()
        looked_up = pair.http.post("/lookup", json={"semantic_ids": [held["semantic_id"]], **asked}).json()
        forward = pair.http.get("/assignment/a", params=asked).json()
        prefix = pair.http.get(f"/prefix/{held['codes'][0]}", params=asked).json()
        following = pair.http.post("/next", json={"prefixes": [str(held["codes"][0])], **asked}).json()
        changes = pair.http.get("/changes", params={"after": 0, **asked}).json()
        trie = Trie.from_bytes(pair.http.get("/trie", params=asked).content)

        assert (found["item_id"], found["tokenizer"]) == ("a", full_name)
        assert (looked_up["items"][0]["item_id"], looked_up["tokenizer"]) == ("a", full_name)
        assert (forward["semantic_id"], forward["tokenizer"]) == (held["semantic_id"], full_name)
        assert ([e["semantic_id"] for e in prefix["items"]], prefix["tokenizer"]) == ([held["semantic_id"]], full_name)
        assert (following["next"][0]["allowed"], following["tokenizer"]) == ([held["codes"][1]], full_name)
        assert [change["semantic_id"] for change in changes["changes"]] == [held["semantic_id"]]
        assert changes["tokenizer"] == full_name
        assert trie.codebook_sizes == tuple(pair.state.tokenizers.named(name).manifest.codebook_sizes)


def test_two_tries_at_one_revision_are_told_apart(pair: Any, namespace: str) -> None:
    # As a follower must who names no tokenizer, once another one has become the default.
    for name in (None, "wide"):
        pair.tokenize({"item_id": "a", "text": "kettle"}, namespace=namespace, tokenizer=name)
    etag = pair.http.get("/trie", params={"namespace": namespace}).headers["etag"]

    for name, status in ((None, 304), ("wide", 200)):
        asked = {"namespace": namespace, **({"tokenizer": name} if name else {})}
        assert pair.http.get("/trie", params=asked, headers={"if-none-match": etag}).status_code == status


def test_an_id_is_read_by_the_codebooks_of_the_tokenizer_asked_for(pair: Any, namespace: str) -> None:
    where = {"namespace": namespace}

    assert problem(pair.http.get("/item/299-7-0", params=where)) == (422, "malformed_semantic_id")
    assert problem(pair.http.get("/item/299-7-0", params={**where, "tokenizer": "wide"})) == (404, "not_assigned")
    assert problem(pair.http.get("/item/1-2-3-0", params={**where, "tokenizer": "wide"})) == (
        422,
        "malformed_semantic_id",
    )
    assert pair.http.get("/prefix/299", params={**where, "tokenizer": "wide"}).status_code == 200
    assert problem(pair.http.get("/prefix/299", params=where)) == (422, "malformed_semantic_id")


def test_an_item_retired_under_one_tokenizer_lives_on_under_the_other(pair: Any, namespace: str) -> None:
    item = {"item_id": "a", "text": "kettle"}
    where = {"namespace": namespace}
    pair.tokenize(item, **where)
    pair.tokenize(item, tokenizer="wide", **where)

    retired = pair.http.delete("/assignment/a", params={**where, "tokenizer": "wide"})

    assert retired.status_code == 200
    assert problem(pair.http.get("/assignment/a", params={**where, "tokenizer": "wide"})) == (410, "retired")
    assert pair.http.get("/assignment/a", params=where).status_code == 200


def test_a_name_that_two_have_is_refused_and_the_full_names_are_told(
    pair: Any, namespace: str, names: dict[str, str], make_embedding: MakeEmbedding
) -> None:
    item = {"item_id": "a", "embedding": make_embedding(1)}

    ambiguous = pair.post(item, namespace=namespace, tokenizer="small")
    told = [pair.post(item, namespace=namespace, tokenizer=names[which]) for which in ("small", "namesake")]

    assert problem(ambiguous) == (422, "ambiguous_tokenizer")
    assert names["small"] in ambiguous.json()["detail"]
    assert names["namesake"] in ambiguous.json()["detail"]
    assert [answer.json()["tokenizer"] for answer in told] == [names["small"], names["namesake"]]


@pytest.mark.parametrize("name", ["other", "wide@0000000000000000", "", "Wide", "@"])
def test_an_unknown_name_is_refused_on_every_route(pair: Any, names: dict[str, str], name: str) -> None:
    asked = {"tokenizer": name}
    answers = [
        pair.post({"item_id": "a", "text": "kettle"}, tokenizer=name),
        pair.http.post("/lookup", json={"semantic_ids": ["1-2-0"], **asked}),
        pair.http.post("/next", json={"prefixes": [""], **asked}),
        pair.http.delete("/assignment/a", params=asked),
        pair.http.get("/changes", params={"after": 0, **asked}),
        *[
            pair.http.get(path, params=asked)
            for path in ("/item/1-2-0", "/assignment/a", "/prefix/", "/trie", "/healthz", "/readyz")
        ],
    ]

    assert [problem(answer) for answer in answers] == [(422, "unknown_tokenizer")] * 11
    assert all(full_name in answers[0].json()["detail"] for full_name in names.values())


def test_content_is_read_as_the_tokenizer_asked_for_takes_it(pair: Any, namespace: str, names: dict[str, str]) -> None:
    item = {"item_id": "a", "text": "kettle"}

    (refused,) = pair.tokenize(item, namespace=namespace, tokenizer=names["namesake"])

    assert refused["error"]["type"] == TYPE + "invalid_text"
    assert "embeddings only" in refused["error"]["detail"]


def test_what_is_loaded_is_told_with_the_default_first(pair: Any, names: dict[str, str]) -> None:
    answer = pair.http.get("/tokenizers").json()

    assert answer["default"] == names["small"]
    assert [entry["tokenizer"] for entry in answer["tokenizers"]] == [names[w] for w in ("small", "wide", "namesake")]
    assert answer["tokenizers"][1]["codebook_sizes"] == [300, 8]


def test_each_model_is_counted_by_itself(pair: Any, namespace: str, names: dict[str, str]) -> None:
    before = {w: pair.metric("semid_batch_rows_sum", tokenizer=full_name) for w, full_name in names.items()}
    created = pair.metric("semid_items_total", tokenizer=names["wide"], outcome="created")

    pair.tokenize(*[{"item_id": f"{i}", "text": f"{i}"} for i in range(5)], namespace=namespace, tokenizer="wide")

    rows = {w: pair.metric("semid_batch_rows_sum", tokenizer=full_name) - before[w] for w, full_name in names.items()}
    assert rows == {"small": 0, "wide": 5, "namesake": 0}
    assert pair.metric("semid_items_total", tokenizer=names["wide"], outcome="created") == created + 5


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_model_is_told_by_its_name_and_leaves_the_others_at_work(
    start_service: Start, data_dir: Path, namesake: Path, make_embedding: MakeEmbedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start_service(data_dir=data_dir, further_checkpoints=(namesake,))
    full_name = read_manifest(namesake).full_name
    other = running.state.tokenizers.named(full_name).batcher
    item = {"item_id": "a", "embedding": make_embedding(1)}

    def lost(*_: object, **_options: object) -> None:
        raise SystemExit("the model's thread dies")

    monkeypatch.setattr(other._encoder, "encode", lost)
    dying = running.post(item, tokenizer=full_name)
    running.until(lambda: not other.alive, "the thread does not end")

    assert problem(dying) == (503, "encoder_stopped")
    assert full_name in running.http.get("/healthz").json()["detail"]
    assert running.http.get("/readyz").status_code == 503
    default = running.state.tokenizers.current.default.full_name
    for path in ("/healthz", "/readyz"):
        assert running.http.get(path, params={"tokenizer": default}).status_code == 200
        assert running.http.get(path, params={"tokenizer": full_name}).status_code == 503
    assert running.tokenize(item)[0]["created"]
    running.stop()


def test_a_service_restarted_with_one_of_them_still_answers_by_its_record(
    start_service: Start, data_dir: Path, checkpoint: Path, namesake: Path, make_embedding: MakeEmbedding
) -> None:
    item = {"item_id": "a", "embedding": make_embedding(1)}
    full_name = read_manifest(namesake).full_name
    both = start_service(data_dir=data_dir, further_checkpoints=(namesake,))
    (under_first,) = both.tokenize(item)
    (under_second,) = both.tokenize(item, tokenizer=full_name)
    both.stop()

    alone = start_service(data_dir=data_dir, checkpoint=namesake)
    (again,) = alone.tokenize(item, tokenizer="small")
    by_default = alone.http.get("/assignment/a").json()
    gone = alone.post(item, tokenizer=read_manifest(checkpoint).full_name)
    alone.stop()
    swapped = start_service(data_dir=data_dir, checkpoint=namesake, further_checkpoints=(checkpoint,))
    (first_again,) = swapped.tokenize(item, tokenizer=read_manifest(checkpoint).full_name)
    swapped.stop()

    assert (again["semantic_id"], again["created"]) == (under_second["semantic_id"], False)
    assert (by_default["semantic_id"], by_default["tokenizer"]) == (under_second["semantic_id"], full_name)
    assert problem(gone) == (422, "unknown_tokenizer")
    assert (first_again["semantic_id"], first_again["created"]) == (under_first["semantic_id"], False)


@pytest.mark.parametrize("given", ["a copy", "the same directory"])
async def test_the_same_tokenizer_twice_is_refused_at_start(
    data_dir: Path, checkpoint: Path, tmp_path: Path, given: str
) -> None:
    further = shutil.copytree(checkpoint, tmp_path / "copy") if given == "a copy" else checkpoint
    settings = Settings(checkpoint=checkpoint, further_checkpoints=(further,), data_dir=data_dir, device="cpu")

    async with AsyncExitStack() as stack:
        with pytest.raises(TokenizerLoadedTwice, match=f"{read_manifest(checkpoint).full_name} .* one fingerprint"):
            await compose(settings, Metrics(), stack)
    assert is_empty(data_dir), "something was started before the refusal"
