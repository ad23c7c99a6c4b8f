"""Which items a tokenizer never saw: known for certain, or said not to be known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models import read_manifest
from models.evaluation.material import read_catalogue
from models.evaluation.unseen import unseen_items
from models.left_out import content_digest, embedding_digests, is_left_out, text_digest
from models.training.cluster import ClusterConfig, fit_clusters
from models.training.data import Reading, read_training_data
from models.training.fit import fit
from models.training.fit_config import FitConfig
from models.training.train import TrainConfig, train_checkpoint

CONFIG = ClusterConfig(codebook_sizes=(8, 8), held_out=0.2, seed=5)


@pytest.fixture(scope="module")
def embeddings():
    return np.random.default_rng(1).standard_normal((100, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def trained(embeddings, tmp_path_factory):
    """A file and the manifest of a tokenizer trained on it, behind another file."""
    directory = tmp_path_factory.mktemp("unseen")
    np.save(directory / "first.npy", np.random.default_rng(2).standard_normal((40, 6)).astype(np.float32))
    np.save(directory / "second.npy", embeddings)
    sources = [directory / "first.npy", directory / "second.npy"]
    train_checkpoint(
        sources, directory / "out", TrainConfig(name="t", family="rq-kmeans", fit=CONFIG), say=lambda _: None
    )
    return directory / "second.npy", read_manifest(directory / "out")


def digests(embeddings):
    return [content_digest(row.tobytes()) for row in embeddings]


def test_the_items_held_out_of_the_training_are_those_that_the_fit_held_out(trained, embeddings):
    path, manifest = trained
    both = np.concatenate([np.load(path.parent / "first.npy"), embeddings])
    held_out = fit_clusters("rq-kmeans", torch.from_numpy(both), CONFIG).held_out
    found = unseen_items(manifest, read_catalogue(path).sha256, digests(embeddings))
    assert found.rows.nonzero().flatten().tolist() == sorted(row - 40 for row in held_out.tolist() if row >= 40)
    assert "held out" in found.how


def test_a_training_by_epochs_holds_out_the_same_items_as_one_by_k_means(embeddings):
    rows = torch.from_numpy(embeddings)
    by_epochs = fit(rows, FitConfig(codebook_sizes=(8, 8), latent=2, epochs=0, held_out=0.2, seed=5))
    assert torch.equal(by_epochs.held_out, fit_clusters("rq-kmeans", rows, CONFIG).held_out)


def test_an_item_whose_equal_was_trained_on_was_seen(trained, embeddings):
    path, manifest = trained
    contents = digests(embeddings)
    before = unseen_items(manifest, read_catalogue(path).sha256, contents)
    held_out, seen = int(before.rows.nonzero()[0]), int((~before.rows).nonzero()[0])
    contents[held_out] = contents[seen]
    after = unseen_items(manifest, read_catalogue(path).sha256, contents)
    assert not after.rows[held_out]
    assert after.items == before.items - 1


def test_of_a_catalogue_that_the_manifest_does_not_name_nothing_is_known(trained, embeddings):
    _, manifest = trained
    found = unseen_items(manifest, "0" * 64, digests(embeddings))
    assert found.rows is None
    assert found.items is None
    assert "not known" in found.how


def test_of_a_training_that_held_items_out_otherwise_nothing_is_known(trained, embeddings):
    path, manifest = trained
    other = replace(manifest, training={**manifest.training, "held_out_items": 3})
    found = unseen_items(other, read_catalogue(path).sha256, digests(embeddings))
    assert found.rows is None
    assert "not known" in found.how


def test_what_is_left_out_by_its_digest_is_unseen_in_any_file(trained, embeddings):
    _, manifest = trained
    contents = digests(embeddings)
    leaving = replace(manifest, training={**manifest.training, "left_out": 0.3})
    found = unseen_items(leaving, "0" * 64, contents)
    assert found.rows.tolist() == [is_left_out(content, 0.3) for content in contents]
    assert "30%" in found.how


def test_a_share_of_contents_is_left_out_and_a_smaller_share_lies_within_a_larger():
    contents = [content_digest(str(number).encode()) for number in range(2000)]
    tenth = {content for content in contents if is_left_out(content, 0.1)}
    third = {content for content in contents if is_left_out(content, 0.3)}
    assert tenth < third
    assert 140 < len(tenth) < 260
    assert not any(is_left_out(content, 0.0) for content in contents)
    assert all(is_left_out(content, 1.0) for content in contents)


def test_a_training_that_leaves_contents_out_never_reads_them_and_says_so(embeddings, tmp_path):
    np.save(tmp_path / "e.npy", embeddings)
    config = TrainConfig(name="t", family="rq-kmeans", fit=CONFIG, left_out=0.4)
    train_checkpoint([tmp_path / "e.npy"], tmp_path / "out", config, say=lambda _: None)
    manifest = read_manifest(tmp_path / "out")
    contents = embedding_digests(torch.from_numpy(embeddings))
    left_out = [is_left_out(content, 0.4) for content in contents]
    # then in this very file the held-out ones are known besides, and in any other those that were left out
    here = unseen_items(manifest, read_catalogue(tmp_path / "e.npy").sha256, contents)
    elsewhere = unseen_items(manifest, "0" * 64, contents)
    assert manifest.training["files"][0]["items"] == 100 - sum(left_out)
    assert elsewhere.rows.tolist() == left_out
    assert here.items == sum(left_out) + manifest.training["held_out_items"]
    assert "40% of all contents were left out" in (tmp_path / "out" / "README.md").read_text()


def test_of_texts_and_of_arrays_the_item_ids_stay_beside_their_rows(embeddings, tmp_path, text_encoder):
    texts = [f"kettle {number}" for number in range(30)]
    ids = [f"k{number}" for number in range(30)]
    pq.write_table(pa.table({"item_id": ids, "text": texts}), tmp_path / "texts.parquet")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings[:30].ravel()), 6)
    pq.write_table(pa.table({"item_id": ids, "embedding": vectors}), tmp_path / "array.parquet")
    reading = Reading(keep_ids=True, left_out=0.5, spool=tmp_path)

    of_texts = read_training_data([tmp_path / "texts.parquet"], reading, text_encoder, lambda _: None)
    of_array = read_training_data([tmp_path / "array.parquet"], reading, None, lambda _: None)

    kept = [number for number in range(30) if not is_left_out(text_digest(texts[number]), 0.5)]
    assert of_texts.item_ids.to_pylist() == [ids[number] for number in kept]
    assert list(of_texts.texts) == [texts[number] for number in kept]
    rows = [int(name[1:]) for name in of_array.item_ids.to_pylist()]
    assert 0 < len(rows) < 30
    assert torch.equal(of_array.embeddings, torch.from_numpy(embeddings[rows]))
