"""The packed forward pass is sentence-transformers' own, without its padding."""

from __future__ import annotations

import random
from copy import deepcopy

import pytest
import torch

from models.packed_bert import FEWEST_ROWS, PackedBert, _rows_of_a_product, is_packable
from models.text_encoder import TextEncoder, TextEncoderConfig

WORDS = ["kettle", "cordless", "Größe", "stainless", "500x", "無線", "refill", "(pack of 6)", "anti-dandruff", "½ oz."]


@pytest.fixture(scope="module")
def batch() -> list[str]:
    """Texts of many lengths, some of equal ones, in no order; one longer than the text encoder takes."""
    draw = random.Random(3)
    sizes = [1, 2, 2, 3, 5, 8, 8, 8, 13, 21, 40, 300]
    draw.shuffle(sizes)
    return [" ".join(draw.choices(WORDS, k=size)) for size in sizes]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalized", [True, False])
def test_packed_embeddings_are_sentence_transformers_own(pooling, normalized, text_encoder, batch):
    # given
    model = text_encoder._model
    pieces = text_encoder.split(batch)
    expected = text_encoder._forward(variant(text_encoder, pooling, normalized=normalized), pieces, torch.device("cpu"))
    # when
    packed = PackedBert(variant(text_encoder, pooling, normalized=normalized), torch.float32)
    # then
    assert is_packable(model)
    assert torch.allclose(packed(pieces), expected, rtol=0, atol=2e-6 * float(expected.norm(dim=1).max()))


def variant(text_encoder: TextEncoder, pooling: str, *, normalized: bool) -> torch.nn.Sequential:
    from sentence_transformers.sentence_transformer.modules import Pooling

    model = deepcopy(text_encoder._model)
    model[1] = Pooling(384, pooling)
    if not normalized:
        del model[2]
    return model


def test_a_text_has_nearly_the_same_embedding_alone_and_packed_with_others(text_encoder, batch):
    pieces = text_encoder.split(batch)
    whole = text_encoder.embed(pieces)
    alone = torch.cat([text_encoder.embed([row]) for row in pieces])
    assert torch.allclose(whole, alone, rtol=0, atol=2e-6)


def test_products_in_bfloat16_stay_near_and_are_no_float32(text_encoder, batch):
    pieces = text_encoder.split(batch)
    errors = (text_encoder.embed(pieces, torch.bfloat16) - text_encoder.embed(pieces)).norm(dim=1)
    assert 1e-4 < float(errors.min()) <= float(errors.max()) < 2e-2


def test_a_product_has_rows_enough_and_few_numbers_of_them():
    numbers = {_rows_of_a_product(pieces) for pieces in range(1, 4097)}
    assert min(numbers) == FEWEST_ROWS
    assert all(pieces <= _rows_of_a_product(pieces) < pieces + 32 for pieces in range(1, 4097))
    assert len(numbers) < 200


def test_another_architecture_takes_the_padded_way(text_encoder, batch, monkeypatch):
    # given a text encoder that is no BERT
    other = deepcopy(text_encoder._model)
    other[0].auto_model.config.hidden_act = "relu"
    pieces = text_encoder.split(batch)
    expected = text_encoder.embed(pieces)
    # when
    assert not is_packable(other)
    monkeypatch.setattr(text_encoder, "_packed", None)
    # then
    assert text_encoder.forward_pass == "sentence-transformers"
    assert torch.allclose(text_encoder.embed(pieces), expected, rtol=0, atol=2e-6)
    errors = (text_encoder.embed(pieces, torch.bfloat16) - expected).norm(dim=1)
    assert 1e-4 < float(errors.max()) < 2e-2


def test_a_packed_pass_that_disagrees_is_not_taken(monkeypatch):
    # given a forward pass that computes something else
    monkeypatch.setattr("models.text_encoder.compiled_bert", lambda _: None)
    monkeypatch.setattr(PackedBert, "__call__", lambda _, pieces: torch.ones(len(pieces), 384))
    # when
    text_encoder = TextEncoder(TextEncoderConfig())
    # then
    assert text_encoder.forward_pass == "sentence-transformers"
