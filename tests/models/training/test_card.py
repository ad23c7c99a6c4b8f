"""The model card: every family in words, and nothing told that was not measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from models import read_manifest
from models.checkpoint import DEFAULT_CHECKPOINT, Manifest
from models.tokenizer import FAMILIES, PREFIX_IS_NOT_COARSER
from models.training.card import FAMILY_WORDS, family_section, model_card


@pytest.fixture
def of_embeddings(families: dict[str, Path]) -> Manifest:
    """Of a tokenizer that takes embeddings only."""
    return read_manifest(families["rq-kmeans"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_card_of_every_family_says_what_its_prefix_means_and_what_it_is_good_and_bad_at(
    family: str, families: dict[str, Path]
) -> None:
    card = (families[family] / "README.md").read_text(encoding="utf-8")
    assert family_section(family) in card
    assert ("NO coarser description" in card) is (family in PREFIX_IS_NOT_COARSER)
    for part in ("A prefix is", "chosen", "Good at", "Bad"):
        assert part in FAMILY_WORDS[family]


def test_a_family_of_which_nothing_is_written_has_a_card_all_the_same(of_embeddings: Manifest) -> None:
    assert "## Family" not in model_card(replace(of_embeddings, family="new"))


def test_what_was_not_held_out_is_not_measured(of_embeddings: Manifest) -> None:
    reconstruction = of_embeddings.report["held_out"]["reconstruction"]
    none = replace(of_embeddings, training={**of_embeddings.training, "held_out_items": 0})
    assert f"| the same, held out | {reconstruction:.3f} |" in model_card(of_embeddings)
    assert "| the same, held out | not measured |" in model_card(none)


def test_a_tokenizer_of_embeddings_tells_nothing_of_texts(of_embeddings: Manifest) -> None:
    card, of_texts = model_card(of_embeddings), model_card(read_manifest(DEFAULT_CHECKPOINT))
    assert "| embeddings, float32 |" in card
    assert "| texts, float32 |" not in card
    assert "| texts, float32 |" in of_texts
    assert "cuts long texts" not in card
    assert "items with equal ones share all codes" in card
    assert "not measured" not in of_texts
    assert "cuts long texts" in of_texts
