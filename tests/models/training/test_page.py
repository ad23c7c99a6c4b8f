"""The page of a training, from its history."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from models.evaluation import plots
from models.training.cluster import ClusterConfig
from models.training.fit import FitConfig
from models.training.history import read_history
from models.training.page import training_page, training_pages
from models.training.train import TrainConfig, train_checkpoint


def _pages(history, name):
    return training_pages(history, f"shoes<b>{name}</b>")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint by epochs and one by k-means alone."""
    directory = tmp_path_factory.mktemp("pages")
    np.save(directory / "e.npy", np.random.default_rng(0).standard_normal((200, 10)).astype(np.float32))
    fits = {
        "rqvae": FitConfig(codebook_sizes=(8, 300), latent=4, epochs=2, warm_up_epochs=1, batch_rows=64),
        "rq-kmeans": ClusterConfig(codebook_sizes=(8, 8)),
    }
    for family, fit in fits.items():
        config = TrainConfig(name=family, family=family, fit=fit)
        train_checkpoint([directory / "e.npy"], directory / family, config, pages=_pages, say=lambda _: None)
    return directory


def test_the_page_of_epochs_draws_losses_measures_and_use_and_fetches_nothing(trained):
    text = (trained / "rqvae" / "training.html").read_text(encoding="utf-8")
    assert "Training of shoes&lt;b&gt;rqvae@" in text
    assert len(re.findall(r'<svg[^>]*role="img"', text)) >= 5
    assert not re.findall(r'(?:src|href)="(?!#|data:)', text)
    for words in ("warm-up 1", "epoch 2", "reconstruction", "commitment", "level 2"):
        assert words in text
    assert len(text) < 300_000


def test_the_drawing_beside_it_stands_alone(trained):
    drawing = (trained / "rqvae" / "training.svg").read_text(encoding="utf-8")
    assert drawing.startswith("<?xml")
    assert "var(" not in drawing
    assert "#0001" not in drawing


def test_a_family_without_epochs_has_the_use_of_its_codewords_and_its_levels(trained):
    text = training_page(read_history(trained / "rq-kmeans"), "plain")
    assert len(re.findall(r'<svg[^>]*role="img"', text)) == 1
    assert "of k-means" in text
    assert "Perplexity" in text
    assert "there are no epochs and nothing was chosen" in text
    for words in ("minimised", "epoch 0", "loss"):
        assert words not in text


def test_the_page_tells_items_trained_on_from_those_held_out(trained):
    for family in ("rqvae", "rq-kmeans"):
        text = (trained / family / "training.html").read_text(encoding="utf-8")
        assert "200 items: 190 trained on, 10 held out." in text
        assert "over the 190 items that were trained on; the model card counts held-out ones in" in text
        assert "How often all 200 items, held-out ones counted in, choose each codeword" in text


def test_the_page_of_an_older_history_says_no_numbers_of_items(trained):
    history = replace(read_history(trained / "rqvae"), items=None, held_out_items=None)
    text = training_page(history, "older")
    assert "200 items" not in text
    assert "over the items that were trained on" in text


def test_a_level_used_whole_and_unevenly_has_a_hint_that_says_what_that_means(trained):
    # given a level whose every codeword is chosen, most of them hardly ever
    history = read_history(trained / "rq-kmeans")
    assert "Used counts a codeword" not in training_page(history, "even")
    record = history.records[0]
    levels = (record.levels[0], replace(record.levels[1], used=1.0, perplexity=3.0))
    text = training_page(replace(history, records=(replace(record, levels=levels),)), "uneven")
    # then
    assert "Used counts a codeword" in text
    assert "level 2 uses 100% of its 8 codewords" in text


def test_without_matplotlib_the_page_has_tables(trained, monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "available", lambda: False)
    text = training_page(read_history(trained / "rqvae"), "plain")
    assert "<svg" not in text
    assert "pip install" in text
    assert "epoch 2" in text


def test_a_page_that_cannot_be_drawn_leaves_no_half_checkpoint(trained):
    # given
    def out_of_memory(history, name):
        raise MemoryError(name)

    config = TrainConfig(name="no-page", family="rq-kmeans", fit=ClusterConfig(codebook_sizes=(8, 8)))
    # when
    with pytest.raises(MemoryError, match="no-page@"):
        train_checkpoint([trained / "e.npy"], trained / "no-page", config, pages=out_of_memory, say=lambda _: None)
    # then
    assert not [path for path in trained.iterdir() if "no-page" in path.name]


def test_the_history_keeps_the_use_of_the_codewords_in_little_room(trained):
    first, second = read_history(trained / "rqvae").codeword_use
    assert (len(first), len(second)) == (8, 256)
    assert list(first) == sorted(first, reverse=True)
    assert sum(first) == pytest.approx(8, abs=0.01)
