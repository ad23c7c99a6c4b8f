"""The forward pass without padding is sentence-transformers' own, by every way of attention, in every precision."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models import DEFAULT_CHECKPOINT, Precision, Tokenizer, load
from models.device.attention import WAYS, ways
from models.device.unpadded_bert import UnpaddedBert
from models.exactness import self_test
from models.text_encoder import TextEncoder, TextEncoderConfig

CPU = torch.device("cpu")
TEXTS = ["kettle", "a kettle", "one kettle", "Größe 500x 無線 (pack of 6)", "x", "refill " * 30]


@pytest.fixture(scope="module")
def pieces(text_encoder) -> list[list[int]]:
    return text_encoder.split(TEXTS)


@pytest.fixture(scope="module")
def padded(text_encoder, pieces) -> torch.Tensor:
    return text_encoder._padded(pieces)


# Nested tensors have no kernel of their own on a CPU: the form they fall back to calls itself a prototype.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("attention", ["by runs", "jagged"])
def test_it_is_the_padded_pass_by_either_attention(attention, text_encoder, pieces, padded):
    forward = UnpaddedBert(text_encoder._model, CPU, torch.float32, attention)
    with torch.inference_mode():  # as a tokenizer calls it
        embeddings = forward(pieces)
        alone = forward(pieces[:1])
    assert embeddings.dtype == torch.float32
    assert torch.allclose(embeddings, padded, rtol=0, atol=2e-6)
    assert torch.allclose(alone, padded[:1], rtol=0, atol=2e-6)


def test_in_float64_it_is_the_canonical_embedding(text_encoder, pieces):
    exact = torch.cat([text_encoder.embed_exactly(row) for row in pieces])
    embeddings = text_encoder.embed(pieces, torch.float64)
    assert text_encoder.has_float64
    assert embeddings.dtype == torch.float64
    assert torch.allclose(embeddings, exact, rtol=0, atol=1e-13)


def test_in_float16_it_errs_less_than_in_bfloat16(text_encoder, pieces, padded):
    errors = [(text_encoder.embed(pieces, dtype) - padded).norm(dim=1) for dtype in (torch.float16, torch.bfloat16)]
    assert 1e-5 < float(errors[0].max()) < float(errors[1].max()) / 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_on_a_gpu_all_its_tensors_are_on_the_gpu(dtype, text_encoder, pieces, monkeypatch):
    # given a device without numbers: shapes, precisions and devices alone are worked out, kernels are not run
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    device = torch.device("cuda", 0)
    attention, *_ = ways(device, dtype)
    if attention == "jagged":
        pytest.skip("nested tensors do not run without numbers; test_on_a_gpu_the_codes_are_the_canonical_ones does")
    with FakeTensorMode(allow_non_fake_inputs=True):
        # when
        embeddings = UnpaddedBert(text_encoder._model, device, dtype, attention)(pieces)
    # then
    assert embeddings.device == device
    assert embeddings.shape == (len(TEXTS), 384)
    assert embeddings.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_an_attention_that_fails_here_is_left_for_the_next_one_and_the_log_says_so(monkeypatch, caplog):
    # given a device whose flash kernel is missing, as it is here
    monkeypatch.setattr("models.text_encoder.ways", lambda *_: ["varlen", "by runs"])
    text_encoder = TextEncoder(TextEncoderConfig())
    # when
    with caplog.at_level(logging.WARNING):
        forward = text_encoder._unpadded(torch.float16)
    # then
    assert forward.attention == "by runs"
    assert "varlen" in caplog.text
    # and where none is left, or one computes something else, texts are padded
    for found in (OSError("no such kernel"), torch.ones(2, 384)):
        monkeypatch.setattr(UnpaddedBert, "__call__", lambda *_, found=found: give(found))
        assert text_encoder._unpadded_pass(torch.float32) is None


def test_texts_of_one_length_are_tried_too(text_encoder, monkeypatch, caplog):
    # given a way of theirs that computes something else
    forward = UnpaddedBert.__call__

    def wrong_alone(self, pieces):
        return forward(self, pieces).roll(int(len(pieces) == 1), 1)

    monkeypatch.setattr(UnpaddedBert, "__call__", wrong_alone)
    with caplog.at_level(logging.WARNING):
        assert text_encoder._unpadded_pass(torch.float32) is None
    assert "by runs attention in torch.float32 on cpu errs by" in caplog.text


def test_where_float16_overflows_texts_do_not_take_it(monkeypatch):
    # given
    tokenizer = load(DEFAULT_CHECKPOINT)
    text_latents = tokenizer.text_latents

    def overflowing(pieces, dtype=torch.float32):
        return text_latents(pieces[:1]).expand(len(pieces), -1) * (torch.inf if dtype == torch.float16 else 1)

    monkeypatch.setattr(tokenizer, "text_latents", overflowing)
    # then, not even where it is asked for
    assert self_test(tokenizer, float16_share=1.0).text_float16 is None


def give(found):
    if isinstance(found, Exception):
        raise found
    return found


def test_texts_climb_from_float16_through_float32_and_float64_to_canonical_codes(monkeypatch):
    # given bounds so wide that some rows are in doubt on every path but the last
    monkeypatch.setattr(TextEncoder, "has_float64", True)  # as on a device, where nothing may be compiled
    tokenizer = load(DEFAULT_CHECKPOINT)
    bounds = self_test(tokenizer, float16_share=1.0)
    assert bounds.text_float64 < bounds.text < bounds.text_float16
    texts = tokenizer.split([f"{text}, {number} pieces" for text in TEXTS[:3] for number in range(4)])
    expected = canonical(tokenizer, texts)
    margins = tokenizer.encode_texts(texts).margin.sort().values
    tokenizer.bounds = replace(bounds, text=float(margins[3]), text_float16=float(margins[7]))
    # when
    encoding = tokenizer.encode_texts(texts)
    # then
    assert {*encoding.precision.tolist()} == {Precision.FLOAT16, Precision.FLOAT32, Precision.FLOAT64}
    assert torch.equal(encoding.codes, expected)


def canonical(tokenizer: Tokenizer, pieces: list[list[int]]) -> torch.Tensor:
    latents = tokenizer.canonical_latents(pieces)
    return torch.cat([tokenizer._exact_quantizer.quantize(row[None], exact=True).codes for row in latents])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_the_codes_are_the_canonical_ones():
    tokenizer = load(DEFAULT_CHECKPOINT, "cuda", text_precision="float16", tests_itself=True)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    texts = tokenizer.split(TEXTS)
    assert torch.equal(tokenizer.encode_texts(texts).codes, canonical(tokenizer, texts))
    embeddings = tokenizer.embed(texts)
    assert torch.equal(tokenizer.encode(embeddings).codes, load(DEFAULT_CHECKPOINT).encode(embeddings).codes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_bounds_are_measured_whether_asked_for_or_not():
    assert load(DEFAULT_CHECKPOINT, "cuda").bounds.text_float64 is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("attention", WAYS)
def test_on_a_gpu_every_attention_gives_the_padded_embeddings(attention, text_encoder, pieces, padded):
    dtype = torch.float16 if attention == "varlen" else torch.float32
    embeddings = UnpaddedBert(text_encoder._model, torch.device("cuda"), dtype, attention)(pieces)
    assert torch.allclose(embeddings.cpu(), padded, rtol=0, atol=1e-2 if attention == "varlen" else 1e-5)
