"""Which items a tokenizer never saw: known for certain, or said not to be known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from models import read_manifest
from models.evaluation.material import read_catalogue
from models.evaluation.unseen import unseen_items
from models.left_out import content_digest, is_left_out
from models.training.cluster import ClusterConfig, fit_clusters
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
    import torch

    held_out = fit_clusters("rq-kmeans", torch.from_numpy(both), CONFIG).held_out
    found = unseen_items(manifest, read_catalogue(path).sha256, digests(embeddings))
    assert found.rows.nonzero().flatten().tolist() == sorted(row - 40 for row in held_out.tolist() if row >= 40)
    assert "held out" in found.how


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
