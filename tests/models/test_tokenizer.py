"""P4: codes are a function of the content and the tokenizer alone."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from dataclasses import replace

import pytest
import torch

from models import Tokenizer, load
from models.checkpoint import DEFAULT_CHECKPOINT
from models.ladder import Precision
from models.native.niceness import LAST, behind
from models.tokenizer import ErrorBounds


@pytest.fixture(scope="module")
def shipped() -> Tokenizer:
    return load(DEFAULT_CHECKPOINT)


@pytest.fixture(scope="module")
def alone(shipped, texts) -> torch.Tensor:
    """Codes (12, L) of each text in a batch of its own."""
    return torch.cat([shipped.encode_texts(shipped.split([text])).codes for text in texts])


def canonical(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """Codes of a text on the canonical path only."""
    (pieces,) = tokenizer.split([text])
    latent = tokenizer._exact_network(tokenizer._text_encoder.embed_exactly(pieces))
    return tokenizer._exact_quantizer.quantize(latent, exact=True).codes[0]


@pytest.mark.parametrize("size", [2, 3, 5, 7, 12])
@pytest.mark.parametrize("order", ["as given", "reversed", "by length", "rotated"])
def test_a_text_has_the_same_codes_alone_and_in_any_batch(size, order, shipped, texts, alone):
    # given
    rows = {
        "as given": list(range(12)),
        "reversed": list(range(12))[::-1],
        "by length": sorted(range(12), key=lambda row: len(texts[row])),
        "rotated": [*range(5, 12), *range(5)],
    }[order]
    # when
    for start in range(0, 12, size):
        batch = rows[start : start + size]
        codes = shipped.encode_texts(shipped.split([texts[row] for row in batch])).codes
        # then
        assert torch.equal(codes, alone[batch])


def test_padding_beside_a_very_long_text_changes_no_code(shipped, texts, alone):
    long = "padding " * 400
    for row, text in enumerate(texts):
        assert torch.equal(shipped.encode_texts(shipped.split([text, long])).codes[0], alone[row])


def test_the_fast_path_gives_the_canonical_codes(shipped, texts, alone):
    assert torch.equal(alone, torch.stack([canonical(shipped, text) for text in texts]))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_code(threads, shipped, texts, alone):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(shipped.encode_texts(shipped.split(texts)).codes, alone)
    finally:
        torch.set_num_threads(before)


def test_rows_within_the_bound_are_computed_again_on_the_canonical_path(shipped, texts, alone, monkeypatch):
    # given a bound so large that every row is near a tie, and a fast path that has lost its mind
    monkeypatch.setattr(shipped, "bounds", ErrorBounds(text=1e9, embedding=1e9))
    calls = []
    exactly = shipped._text_encoder.embed_exactly
    monkeypatch.setattr(shipped._text_encoder, "embed_exactly", lambda pieces: calls.append(1) or exactly(pieces))
    embed = shipped._text_encoder.embed
    monkeypatch.setattr(shipped._text_encoder, "embed", lambda *rows: embed(*rows).roll(1, dims=1))
    # when
    encoding = shipped.encode_texts(shipped.split(texts))
    # then the codes are the canonical ones
    assert encoding.recomputed.all()
    assert len(calls) == len(texts)
    assert torch.equal(encoding.codes, alone)


def test_rows_beyond_the_bound_are_final(shipped, texts, monkeypatch):
    monkeypatch.setattr(shipped, "bounds", ErrorBounds(text=-1.0, embedding=-1.0))
    assert not shipped.encode_texts(shipped.split(texts)).recomputed.any()


def test_embeddings_have_the_same_codes_alone_and_in_any_batch(shipped):
    # given
    embeddings = torch.nn.functional.normalize(torch.randn(200, 384, generator=torch.Generator().manual_seed(2)))
    whole = shipped.encode(embeddings)
    # when, then
    alone = torch.cat([shipped.encode(row[None]).codes for row in embeddings])
    assert torch.equal(whole.codes, alone)
    for size, offset in itertools.product((3, 16, 77), (0, 1)):
        parts = [shipped.encode(rows).codes for rows in embeddings[offset:].split(size)]
        assert torch.equal(torch.cat(parts), whole.codes[offset:])
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    assert torch.equal(shipped.encode(embeddings[order]).codes, whole.codes[order])


@pytest.mark.parametrize("exponent", [-3, 0, 3, 6, 9, 11, 13, 15])
@pytest.mark.parametrize("widths", [(12, 8), (12, 32, 8)])
def test_embeddings_of_any_size_have_the_same_codes_alone_and_in_any_batch(widths, exponent, make_parts):
    # given directions that stay near many codewords' planes however long they are
    tokenizer = Tokenizer("t", make_parts(widths), ErrorBounds(embedding=1e-10))
    embeddings = 10.0**exponent * torch.randn(400, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    # when
    whole = tokenizer.encode(embeddings)
    # then
    assert torch.equal(whole.codes, torch.cat([tokenizer.encode(row[None]).codes for row in embeddings]))
    latents = tokenizer._exact_network(embeddings)
    exact = torch.cat([tokenizer._exact_quantizer.quantize(latents[row][None], exact=True).codes for row in range(400)])
    if exponent <= 0:
        assert torch.equal(whole.codes, exact)


def canonical_codes(tokenizer, embeddings):
    return torch.cat([tokenizer._canonical(row[None].double()).codes for row in embeddings])


@pytest.mark.parametrize("exponent", [6, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bound_of_embeddings_grows_with_them(dtype, exponent, make_parts):
    # given
    bound = 1e-3
    tokenizer = Tokenizer("t", make_parts(), ErrorBounds(embedding=bound, embedding_float32=bound))
    embeddings = 10.0**exponent * torch.randn(2000, 12, generator=torch.Generator().manual_seed(2), dtype=dtype)
    # when
    encoding = tokenizer.encode(embeddings)
    # then
    sizes, computed_again = tokenizer.sizes(embeddings), encoding.recomputed
    assert torch.equal(encoding.codes, canonical_codes(tokenizer, embeddings))
    assert (encoding.margin > bound * sizes * (1 - 1e-5))[~computed_again].all()
    assert (encoding.margin > 2 * bound)[computed_again].any()


@pytest.mark.parametrize("exponent", [18, 19, 25, 37])
def test_embeddings_that_float32_cannot_square_have_the_codes_of_float64(exponent, make_parts):
    tokenizer = Tokenizer("t", make_parts(), ErrorBounds(embedding=1e-10, embedding_float32=1e-4))
    embeddings = 10.0**exponent * torch.randn(50, 12, generator=torch.Generator().manual_seed(2))
    encoding = tokenizer.encode(embeddings)
    assert torch.equal(encoding.codes, canonical_codes(tokenizer, embeddings))
    assert (encoding.precision != Precision.FLOAT32).all() or exponent < 19


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_is_refused_in_float32_too(number, make_parts):
    tokenizer = Tokenizer("t", make_parts(), ErrorBounds(embedding=1e-10, embedding_float32=1e-4))
    embeddings = torch.randn(50, 12, generator=torch.Generator().manual_seed(2))
    embeddings[7, 3] = number
    with pytest.raises(ValueError, match="not finite"):
        tokenizer.encode(embeddings)


def test_an_embedding_too_large_for_a_latent_is_refused(make_parts):
    tokenizer = Tokenizer("t", make_parts(), ErrorBounds())
    with pytest.raises(ValueError, match="not finite"):
        tokenizer.encode(torch.full((2, 12), 1e200, dtype=torch.float64))


def test_a_margin_that_is_no_number_is_not_final(shipped, texts, alone, monkeypatch):
    # given a fast path that breaks down
    embed = shipped._text_encoder.embed
    monkeypatch.setattr(shipped._text_encoder, "embed", lambda *rows: embed(*rows) * torch.nan)
    # when
    encoding = shipped.encode_texts(shipped.split(texts))
    # then
    assert encoding.recomputed.all()
    assert torch.equal(encoding.codes, alone)


def test_a_canonical_embedding_that_is_not_finite_is_refused(shipped, monkeypatch):
    monkeypatch.setattr(shipped._text_encoder, "embed", lambda pieces, _: torch.full((len(pieces), 384), torch.nan))
    monkeypatch.setattr(shipped._text_encoder, "embed_exactly", lambda _: torch.full((1, 384), torch.nan).double())
    with pytest.raises(ValueError, match="not finite"):
        shipped.encode_texts(shipped.split(["red lipstick"]))


def test_equal_rows_near_a_tie_are_computed_once(shipped, texts, alone, monkeypatch):
    # given that every row is near a tie
    monkeypatch.setattr(shipped, "bounds", ErrorBounds(text=1e9, embedding=1e9))
    calls = []
    canonical = shipped._canonical
    monkeypatch.setattr(shipped, "_canonical", lambda *row: calls.append(1) or canonical(*row))
    # when
    encoding = shipped.encode_texts(shipped.split([texts[0], texts[1]] * 512))
    # then
    assert len(calls) == 2
    assert torch.equal(encoding.codes, alone[[0, 1] * 512])
    assert encoding.recomputed.all()
    # when
    embeddings = torch.randn(2, 384, generator=torch.Generator().manual_seed(2)).repeat(512, 1)
    codes = shipped.encode(embeddings).codes
    # then
    assert len(calls) == 4
    assert torch.equal(codes, codes[:2].repeat(512, 1))


def test_an_embedding_between_codewords_goes_to_the_lowest_index(make_parts):
    # given a symmetric codebook, and an embedding whose latent is the centre of it
    parts = make_parts((3, 3), sizes=(8,))
    parts.network.layers[0].weight.data = torch.eye(3)
    parts.network.layers[0].bias.data.zero_()
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    parts.quantizer.codebooks[0].data = corners[torch.tensor([5, 2, 7, 0, 1, 3, 6, 4])]
    tokenizer = Tokenizer("ties", parts, ErrorBounds())
    # when
    encoding = tokenizer.encode(torch.zeros(3, 3))
    # then
    assert encoding.codes.tolist() == [[0]] * 3
    assert encoding.recomputed.all()
    assert encoding.margin.tolist() == [0, 0, 0]


def test_the_quantization_error_is_the_squared_norm_of_what_no_level_took(make_parts):
    parts = make_parts()
    tokenizer = Tokenizer("t", parts, ErrorBounds())
    embeddings = torch.randn(50, 12, generator=torch.Generator().manual_seed(2))
    encoding = tokenizer.encode(embeddings)
    latents = parts.network(embeddings).detach()
    rest = latents - parts.quantizer.decode(encoding.codes.clone()).detach()
    assert torch.allclose(encoding.quantization_error.float(), rest.square().sum(dim=1), rtol=1e-4)


@pytest.mark.parametrize(
    "embeddings",
    [torch.zeros(12), torch.zeros(2, 11), torch.full((2, 12), torch.nan), torch.full((1, 12), torch.inf)],
)
def test_embeddings_of_a_wrong_shape_or_not_finite_are_refused(embeddings, make_parts):
    with pytest.raises(ValueError, match="embedding"):
        Tokenizer("t", make_parts(), ErrorBounds()).encode(embeddings)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux alone")
@pytest.mark.parametrize("texts_by", ["compiled passes", "torch"])
def test_passes_give_way_and_their_thread_where_they_are_its_own(texts_by, shipped, make_parts):
    # given
    tokenizer = shipped if texts_by == "compiled passes" else Tokenizer("t", make_parts(), ErrorBounds())
    if tokenizer is shipped and not shipped.text_encoder.is_compiled:
        pytest.skip("no compiled pass for this processor")
    found = []

    def thread():
        tokenizer.give_way(5)
        found.append((behind(int), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))

    # when
    asking = threading.Thread(target=thread)
    asking.start()
    asking.join()
    # then
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    assert found == [(LAST, niceness if texts_by == "compiled passes" else min(19, niceness + 5))]
    assert behind(int) == 0


def test_a_tokenizer_of_embeddings_refuses_texts(make_parts):
    tokenizer = Tokenizer("t@f", make_parts(), ErrorBounds())
    assert not tokenizer.takes_text
    with pytest.raises(ValueError, match="t@f has no text encoder"):
        tokenizer.split(["x"])


def test_a_tokenizer_is_frozen_whatever_becomes_of_the_parts(make_parts):
    # given
    parts = make_parts()
    tokenizer = Tokenizer("t", parts, ErrorBounds())
    embeddings = torch.randn(50, 12, generator=torch.Generator().manual_seed(2))
    before = tokenizer.encode(embeddings).codes
    # when
    for parameter in [*parts.network.parameters(), *parts.quantizer.parameters()]:
        parameter.data.add_(1)
    # then
    assert torch.equal(tokenizer.encode(embeddings).codes, before)
    assert not any(p.requires_grad for p in tokenizer._network.parameters())


def test_the_text_encoder_s_embedding_is_sentence_transformers_own(text_encoder, texts):
    # given
    theirs = torch.from_numpy(text_encoder._model.encode(texts, batch_size=4, normalize_embeddings=True))
    # when
    ours = text_encoder.embed(text_encoder.split(texts)).cpu()
    # then
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert text_encoder.dimension == 384


def test_a_text_is_cut_at_the_text_encoder_s_length(text_encoder):
    (pieces,) = text_encoder.split(["word " * 1000])
    assert len(pieces) == text_encoder.max_tokens == 256


def test_space_around_a_text_changes_nothing(text_encoder):
    assert text_encoder.split(["  red lipstick\n"]) == text_encoder.split(["red lipstick"])


def test_the_weights_are_the_official_ones(text_encoder):
    official = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert text_encoder.components["weights"] == {"sha256": official}


def test_a_text_encoder_that_is_nowhere_is_refused(tmp_path, monkeypatch):
    from models import CheckpointError
    from models.text_encoder import TextEncoder, TextEncoderConfig

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="nobody/nothing"):
        TextEncoder(replace(TextEncoderConfig(), source="nobody/nothing"))
