"""The command's way, end to end: files in, a frozen checkpoint out."""

from __future__ import annotations

import copy
import csv
import json
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models import load, read_manifest
from models.checkpoint import load_parts
from models.embedding_cache import EmbeddingCache, embed_texts, length_sorted_batches
from models.evaluation.measures import evaluate
from models.exactness import SAFETY_FACTOR, calibrate
from models.tokenizer import FAMILIES, ErrorBounds
from models.training.data import balanced_weights
from models.training.fit_config import FitConfig
from models.training.train import TrainConfig, config_of, fit_family, train_checkpoint

SMALL = TrainConfig(name="small", fit=FitConfig(codebook_sizes=(8, 8), latent=4, epochs=2, batch_rows=32, seed=3))
COLOURS = ["red", "blue", "green", "black", "white", "pink", "golden"]
GOODS = ["lipstick", "hex bolt", "running shoes", "board game", "frying pan", "novel", "charger", "shampoo"]
ROWS = [
    {"item_id": str(number), "title": f"{colour} {good}", "brand": "", "category": good, "source": str(number % 3)}
    for number, (colour, good) in enumerate((colour, good) for colour in COLOURS for good in GOODS)
]


def write(path, rows=ROWS):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Shared, so that the texts are embedded once."""
    return tmp_path_factory.mktemp("embeddings")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_small_catalogue_becomes_a_checkpoint_that_loads_and_encodes(suffix, tmp_path, cache):
    # given
    path = write(tmp_path / f"items.{suffix}")
    lines = []
    # when
    manifest = train_checkpoint(
        [path], tmp_path / "out", SMALL, embedding_cache=cache, command="semid train items", say=lines.append
    )
    # then
    tokenizer = load(tmp_path / "out")
    assert tokenizer.full_name == manifest.full_name
    assert tokenizer.encode_texts(tokenizer.split(["red lipstick"])).codes.shape == (1, 2)
    assert manifest.report["items"] == 56
    assert "raw collisions" in "\n".join(lines)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "semid train items" in card
    assert manifest.full_name in card
    assert str(tmp_path) not in card + (tmp_path / "out" / "manifest.json").read_text()


def test_a_name_that_nothing_can_be_frozen_under_is_refused_at_once():
    with pytest.raises(ValueError, match=r"a tokenizer's name has letters, .* got 'two words'"):
        TrainConfig(name="two words")


@pytest.mark.parametrize(
    ("suffix", "changed", "given", "words"),
    [
        ("csv", {"balance_by": "sauce"}, {}, "no file has a column 'sauce' to balance by"),
        ("parquet", {"balance_by": "sauce"}, {}, "no file has a column 'sauce' to balance by"),
        ("csv", {}, {"interactions": "items.parquet"}, "needs the columns user_id and item_ids"),
        ("csv", {}, {"collaborative": "items.parquet"}, "no column 'embedding'"),
    ],
)
def test_what_the_files_heads_tell_is_said_before_texts_are_embedded(
    suffix, changed, given, words, tmp_path, monkeypatch
):
    # given
    write(tmp_path / "items.parquet")
    path = write(tmp_path / f"items.{suffix}")
    monkeypatch.setattr("models.training.train.text_encoder_of", lambda *_: pytest.fail("a text encoder was loaded"))
    fit = replace(SMALL.fit, loss=replace(SMALL.fit.loss, collaborative=0.1 if given else 0.0))
    config = replace(SMALL, fit=fit, **changed)
    given = {name: tmp_path / file for name, file in given.items()}
    # then
    with pytest.raises(ValueError, match=words):
        train_checkpoint([path], tmp_path / "out", config, **given, say=lambda _: None)
    assert not (tmp_path / "out").exists()


def test_a_file_without_any_item_is_no_part_of_the_report(tmp_path, cache):
    full = write(tmp_path / "items.csv")
    empty = write(tmp_path / "empty.csv", [{"item_id": "1", "title": ""}])
    manifest = train_checkpoint([full, empty], tmp_path / "out", SMALL, embedding_cache=cache, say=lambda _: None)
    assert [note["items"] for note in manifest.training["files"]] == [len(ROWS), 0]
    assert [name.rpartition("/")[2] for name in manifest.report["files"]] == ["items.csv"]


def test_the_same_seed_gives_the_same_fingerprint_and_another_seed_another(tmp_path):
    path = tmp_path / "e.npy"
    np.save(path, np.random.default_rng(0).standard_normal((300, 10)).astype(np.float32))
    names = [
        train_checkpoint([path], tmp_path / out, config, say=lambda _: None).fingerprint
        for out, config in (
            ("a", SMALL),
            ("b", SMALL),
            ("c", replace(SMALL, fit=replace(SMALL.fit, seed=4))),
        )
    ]
    assert names[0] == names[1]
    assert names[0] != names[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_same_weights_for_the_same_seed_and_others_for_another(family, clustered):
    # given
    fitting = replace(config_of(family), codebook_sizes=(8, 8, 8), latent=6, seed=1)
    config = TrainConfig(family=family, fit=replace(fitting, epochs=2) if hasattr(fitting, "epochs") else fitting)
    # when
    first = fit_family(clustered, config).model
    torch.rand(3)
    second = fit_family(clustered, config).model
    other = fit_family(clustered, replace(config, fit=replace(config.fit, seed=2))).model
    # then
    for part in ("network", "quantizer", "decoder"):
        states = [getattr(model, part).state_dict() for model in (first, second)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    codes = [model.quantizer.quantize(model.network(clustered)).codes for model in (first, other)]
    assert not torch.equal(*codes)


def test_the_report_is_that_of_the_frozen_parts(tmp_path):
    # given
    embeddings = np.random.default_rng(0).standard_normal((300, 10)).astype(np.float32)
    np.save(tmp_path / "e.npy", embeddings)
    # when
    manifest = train_checkpoint([tmp_path / "e.npy"], tmp_path / "out", SMALL, say=lambda _: None)
    # then
    parts = load_parts(tmp_path / "out", read_manifest(tmp_path / "out"))
    report = evaluate(torch.from_numpy(embeddings), parts.network, parts.quantizer, parts.decoder)
    assert {name: manifest.report[name] for name in report.as_dict()} == report.as_dict()


def test_an_array_of_embeddings_makes_a_tokenizer_of_embeddings(tmp_path):
    np.save(tmp_path / "e.npy", np.random.default_rng(0).standard_normal((300, 10)).astype(np.float32))
    manifest = train_checkpoint([tmp_path / "e.npy"], tmp_path / "out", SMALL, say=lambda _: None)
    assert manifest.text_encoder is None
    assert not load(tmp_path / "out").takes_text


def test_several_files_are_reported_one_by_one_and_balanced_by_a_column(tmp_path, cache):
    # given
    first, second = write(tmp_path / "a.parquet"), write(tmp_path / "b.jsonl", ROWS[:20])
    config = replace(SMALL, balance_by="source")
    # when
    manifest = train_checkpoint([first, second], tmp_path / "out", config, embedding_cache=cache, say=lambda _: None)
    # then
    assert [file["items"] for file in manifest.training["files"]] == [56, 20]
    assert [part["items"] for part in manifest.report["files"].values()] == [56, 20]


def test_balance_lets_a_source_of_n_rows_count_n_to_the_power():
    groups = ["big"] * 100 + ["small"] * 4
    for balance, ratio in ((1.0, 25.0), (0.5, 5.0), (0.0, 1.0)):
        weights = balanced_weights(groups, balance)
        assert weights[:100].sum() / weights[100:].sum() == pytest.approx(ratio, rel=1e-4)
        assert weights.mean() == pytest.approx(1, rel=1e-4)


def test_items_without_text_are_left_out_and_counted(tmp_path, cache):
    path = write(tmp_path / "items.jsonl", [*ROWS, {"item_id": "e", "title": "", "category": ""}])
    lines = []
    manifest = train_checkpoint([path], tmp_path / "out", SMALL, embedding_cache=cache, say=lines.append)
    assert manifest.report["items"] == 56
    assert any("1 of 57 items have no text" in line for line in lines)


def test_a_full_directory_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(FileExistsError, match="never overwritten"):
        train_checkpoint([tmp_path / "absent.csv"], tmp_path / "out", SMALL)


def test_what_cannot_be_trained_on_is_refused(tmp_path, cache):
    np.save(tmp_path / "e.npy", np.ones((30, 10), np.float32))
    np.save(tmp_path / "f.npy", np.ones((30, 11), np.float32))
    texts, empty = write(tmp_path / "items.csv"), write(tmp_path / "empty.jsonl", [{"item_id": "1", "title": ""}])
    cases = {
        "cannot be mixed": [texts, tmp_path / "e.npy"],
        "different widths": [tmp_path / "e.npy", tmp_path / "f.npy"],
        "no item with a text": [empty],
        "at least one catalogue": [],
    }
    for message, sources in cases.items():
        with pytest.raises(ValueError, match=message):
            train_checkpoint(sources, tmp_path / "out", SMALL, say=lambda _: None)


def test_the_cache_answers_without_the_model_and_only_for_its_own_encoder(tmp_path, text_encoder, texts, monkeypatch):
    # given
    first = embed_texts(text_encoder, texts, tmp_path)
    # when the model is gone
    monkeypatch.setattr(text_encoder, "embed", None)
    again = embed_texts(text_encoder, texts[::-1], tmp_path)
    # then
    assert torch.equal(again, first.flip(0))
    monkeypatch.setitem(text_encoder.__dict__, "components", {"weights": "others"})
    assert EmbeddingCache(tmp_path, text_encoder).get(texts[0]) is None


def test_only_what_is_missing_is_embedded(tmp_path, text_encoder, texts, monkeypatch):
    embed_texts(text_encoder, texts[:8], tmp_path)
    seen = []
    embed = text_encoder.embed
    monkeypatch.setattr(text_encoder, "embed", lambda pieces: seen.extend(pieces) or embed(pieces))
    embed_texts(text_encoder, texts, tmp_path)
    assert len(seen) == len(texts) - 8


def test_batches_hold_texts_of_similar_length_within_a_budget():
    pieces = [[0] * length for length in (50, 3, 90, 4, 300, 60, 3)]
    batches = list(length_sorted_batches(pieces, budget=120))
    assert sorted(row for batch in batches for row in batch) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * max(len(pieces[row]) for row in batch) <= 120 for batch in batches)
    assert [len(pieces[row]) for batch in batches for row in batch] == [3, 3, 4, 50, 60, 90, 300]


def test_the_bound_is_a_multiple_of_the_largest_error_seen(make_parts, text_encoder, texts):
    # given
    parts = make_parts((384, 8), text_encoder)
    embeddings = text_encoder.embed(text_encoder.split(texts))
    # when
    calibration = calibrate(parts, embeddings, texts)
    # then
    largest = calibration.notes["largest_error"]
    assert SAFETY_FACTOR >= 16
    assert largest["text"] > 0
    assert calibration.bounds.text >= SAFETY_FACTOR * largest["text"]
    assert calibration.bounds.embedding >= SAFETY_FACTOR * largest["embedding"]
    assert calibration.bounds.text < 1e-3
    taken = {path for path, bound in asdict(calibration.bounds).items() if bound is not None}
    assert set(calibration.notes["recomputed_share"]) == taken
    assert taken.isdisjoint({"text_float16", "text_float64"})  # a device's paths are measured on the device, at start


def test_a_tokenizer_of_embeddings_is_calibrated_without_texts(make_parts):
    calibration = calibrate(make_parts(), torch.randn(64, 12), [])
    assert calibration.notes["texts"] == 0
    assert ErrorBounds().embedding > calibration.bounds.embedding > 0


def test_a_text_encoder_that_computes_parts_in_float32_is_told_of(make_parts, text_encoder, tmp_path, monkeypatch):
    # given a norm as T5 has it, which leaves float64
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    assert not calibrate(make_parts((384, 8), text_encoder), torch.randn(64, 384), ["x"]).notes[
        "canonical_below_float64"
    ]
    exact = copy.deepcopy(text_encoder._exact_model)
    exact.append(_Normed(T5LayerNorm(384).double()))
    monkeypatch.setitem(text_encoder.__dict__, "_exact_model", exact)
    monkeypatch.setattr("models.training.data.TextEncoder", lambda *_: text_encoder)
    # when
    lines = []
    manifest = train_checkpoint([write(tmp_path / "items.csv")], tmp_path / "out", SMALL, say=lines.append)
    # then
    assert manifest.calibration["canonical_below_float64"]
    assert any("computes parts in float32" in line for line in lines)
    assert "computes parts in float32" in (tmp_path / "out" / "README.md").read_text()


class _Normed(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, features):
        embedding = features["sentence_embedding"]
        return {**features, "sentence_embedding": embedding + 0 * self.norm(embedding)}


def test_fewer_different_items_than_codewords_are_told_of(tmp_path):
    np.save(tmp_path / "e.npy", np.repeat(np.random.default_rng(0).standard_normal((5, 10)).astype(np.float32), 9, 0))
    lines = []
    train_checkpoint([tmp_path / "e.npy"], tmp_path / "out", SMALL, say=lines.append)
    assert any("5 different embeddings for codebooks of up to 8" in line for line in lines)


def test_a_column_to_balance_by_that_no_file_has_is_refused(tmp_path, cache):
    config = replace(SMALL, balance_by="sorce")
    with pytest.raises(ValueError, match="no file has a column 'sorce' to balance by"):
        train_checkpoint(
            [write(tmp_path / "items.csv")], tmp_path / "out", config, embedding_cache=cache, say=lambda _: None
        )
    np.save(tmp_path / "e.npy", np.eye(8, dtype=np.float32))
    with pytest.raises(ValueError, match="arrays of embeddings have no column 'sorce'"):
        train_checkpoint([tmp_path / "e.npy"], tmp_path / "out", config, say=lambda _: None)
