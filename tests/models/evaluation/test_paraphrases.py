"""Paraphrases change the text and nothing else of an item."""

from __future__ import annotations

import pytest
import torch

from models.catalogue import CatalogueItem
from models.evaluation.paraphrases import PARAPHRASES, kept, paraphrase
from models.template import TextTemplate

TEMPLATE = TextTemplate()
ITEM = CatalogueItem(
    "a1",
    {"title": "Shampoo with oil, 8 oz (pack of 2)", "brand": "Moroccan Sun", "categories": "Beauty > Hair-Care"},
)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("upper case", "SHAMPOO WITH OIL, 8 OZ (PACK OF 2). MOROCCAN SUN. BEAUTY > HAIR-CARE"),
        ("punctuation", "Shampoo with oil 8 oz pack of 2 - Moroccan Sun - Beauty / Hair Care"),
        ("field order", "Beauty > Hair-Care. Moroccan Sun. Shampoo with oil, 8 oz (pack of 2)"),
        ("brand dropped", "Shampoo with oil, 8 oz (pack of 2). Beauty > Hair-Care"),
        (
            "boilerplate",
            f"{ITEM.content(TEMPLATE)}. Free shipping on all orders. 100% satisfaction guaranteed.",
        ),
        ("synonyms", "Shampoo including oil, 8 ounce (set of 2). Moroccan Sun. Beauty > Hair-Care"),
    ],
)
def test_each_kind_changes_what_it_says(kind, text):
    assert paraphrase(kind, ITEM, TEMPLATE) == text


def test_a_typo_swaps_two_neighbouring_letters_of_a_long_word_and_its_first_letter_stays():
    before, after = ITEM.content(TEMPLATE), paraphrase("typo", ITEM, TEMPLATE)
    (first, second) = (place for place, (x, y) in enumerate(zip(before, after, strict=True)) if x != y)
    assert second == first + 1
    assert (after[first], after[second]) == (before[second], before[first])
    assert "Shampoo".find(before[first]) > 0


def test_a_typo_is_the_seeds():
    texts = {paraphrase("typo", ITEM, TEMPLATE, seed) for seed in range(12)}
    assert len(texts) > 1
    assert paraphrase("typo", ITEM, TEMPLATE, 3) == paraphrase("typo", ITEM, TEMPLATE, 3)


@pytest.mark.parametrize("kind", PARAPHRASES)
def test_a_ready_text_is_paraphrased_too_and_never_emptied(kind):
    assert paraphrase(kind, CatalogueItem("t", text="mini"), TEMPLATE)
    assert paraphrase(kind, CatalogueItem("b", {"brand": "Sun"}), TEMPLATE)


def test_codes_are_kept_as_far_as_none_before_them_changed():
    # given codes that change nowhere, at the second level, and at the first though the second is the same again
    before = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    after = torch.tensor([[1, 2, 3], [1, 9, 3], [7, 2, 3]])
    # when, then
    found = kept(before, after)
    assert found.items == 3
    assert found.by_depth == pytest.approx((2 / 3, 1 / 3, 1 / 3))
