"""Codes are the canonical ones on whichever path they were final."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

from models import CheckpointError, Precision, Tokenizer, load
from models.checkpoint import DEFAULT_CHECKPOINT, MANIFEST, freeze, save
from models.exactness import BFLOAT16_TEST_TEXTS, _moved_margins, _strange_texts, _test_texts, self_test
from models.ladder import Encoding, ErrorBounds, Rung, climb
from models.precision import require_full_precision
from models.text_encoder import TextEncoder

INFINITE = float("inf")


@pytest.fixture(scope="module")
def shipped() -> Tokenizer:
    return load(DEFAULT_CHECKPOINT)


@pytest.fixture(scope="module")
def pieces(shipped) -> list[list[int]]:
    """Two hundred made-up texts of one to twenty words."""
    draw = random.Random(5)
    return shipped.split(_test_texts([draw.randint(1, 20) for _ in range(200)]))


@pytest.fixture(scope="module")
def embeddings(shipped, pieces) -> torch.Tensor:
    """Near enough to each other for ties: (200, D) float32."""
    return shipped.embed(pieces)


@pytest.fixture(scope="module")
def in_float32(shipped, pieces) -> torch.Tensor:
    return shipped.encode_texts(pieces).codes


@pytest.fixture(scope="module")
def canonical(shipped, pieces) -> torch.Tensor:
    """Codes (100, L) of half of them, each alone in float64."""
    latents = shipped.canonical_latents(pieces[:100])
    return torch.cat([shipped._exact_quantizer.quantize(row[None], exact=True).codes for row in latents])


def rows_of(*codes: int, margin: float) -> Encoding:
    column = torch.tensor(codes)
    distances = torch.full((len(codes),), margin, dtype=torch.float64)
    return Encoding(column[:, None], distances, distances.clone(), column.clone(), column[:, None])


def test_rows_go_on_together_and_each_is_final_on_the_first_path_without_doubt():
    # given six rows, whose margins on the two fast paths differ
    seen: list[list[int]] = []
    margins = {
        Precision.BFLOAT16: [9.0, 1.0, 1.0, 9.0, 1.0, torch.nan],
        Precision.FLOAT32: [0.0, 9.0, 0.5, 0.0, 9.0, 0.5],
    }

    def rung(precision: Precision, bound: float) -> Rung:
        def encode(rows: torch.Tensor) -> tuple[Encoding, torch.Tensor]:
            seen.append(rows.tolist())
            certain = torch.tensor(margins[precision], dtype=torch.float64)[rows]
            return rows_of(*(10 * precision + rows).tolist(), margin=float(precision)), certain

        return Rung(precision, encode, bound)

    # when
    alone: list[int] = []
    encoding = climb(
        [rung(Precision.BFLOAT16, 5.0), rung(Precision.FLOAT32, 0.5)],
        6,
        lambda row: alone.append(row) or rows_of(100 + row, margin=5.0),
        lambda row: "equal" if row in {2, 5} else row,
    )
    # then
    assert seen == [[0, 1, 2, 3, 4, 5], [1, 2, 4, 5]]
    assert alone == [2]
    assert encoding.codes.flatten().tolist() == [0, 31, 102, 3, 34, 102]
    final = [Precision.BFLOAT16, Precision.FLOAT32, Precision.CANONICAL]
    assert encoding.precision.tolist() == final * 2
    assert encoding.recomputed.tolist() == [False, False, True, False, False, True]
    assert encoding.margin.tolist() == [0, 3, 5, 0, 3, 5]


@pytest.mark.parametrize("precision", [Precision.BFLOAT16, Precision.INT16])
def test_texts_tried_in_less_than_float32_have_its_codes(precision, shipped, pieces, in_float32, monkeypatch):
    # given the bound of this machine, or one of half of it, which is still beyond what flips
    name = precision.name.lower()
    if precision == Precision.INT16 and not shipped.text_encoder.has_int16:
        pytest.skip("the forward pass has no products of int16 here")
    bound = getattr(self_test(shipped, bfloat16=True, int16_share=1.0), f"text_{name}")
    wrong = shipped.quantize(shipped.text_latents(pieces, getattr(torch, name))).codes
    monkeypatch.setattr(shipped, "bounds", replace(shipped.bounds, **{f"text_{name}": bound / 2}))
    # when
    encoding = shipped.encode_texts(pieces)
    # then alone it would have changed codes, and it was final on some rows
    assert (wrong != in_float32).any()
    assert torch.equal(encoding.codes, in_float32)
    assert {precision, Precision.FLOAT32} <= set(encoding.precision.tolist())


@pytest.mark.parametrize(
    ("size", "threads", "precision"),
    [(1, 1, "float32"), (7, 1, "float32"), (100, 2, "float32"), (32, 1, "bfloat16"), (1, 2, "int16")],
)
def test_a_hundred_texts_have_their_canonical_codes_in_any_batch(
    size, threads, precision, shipped, pieces, canonical, monkeypatch
):
    # given an order, and on every batch's end a text that is much longer
    rows = random.Random(size).sample(range(100), 100)
    (long,) = shipped.split(["padding " * 60])
    share = 1.0 if precision == "int16" else None
    bounds = self_test(shipped, bfloat16=precision == "bfloat16", int16_share=share)
    monkeypatch.setattr(shipped, "bounds", bounds)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    # when, then
    try:
        for start in range(0, 100, size):
            batch = rows[start : start + size]
            neighbours = [long] if size > 1 else []
            codes = shipped.encode_texts([*[pieces[row] for row in batch], *neighbours]).codes
            assert torch.equal(codes[: len(batch)], canonical[batch])
    finally:
        torch.set_num_threads(before)


def test_rows_that_are_left_undecided_are_decided_alone_as_they_would_have_been_together(
    shipped, pieces, in_float32, monkeypatch
):
    monkeypatch.setattr(shipped, "bounds", ErrorBounds(INFINITE, INFINITE, INFINITE, INFINITE))

    left = shipped.encode_texts(pieces[:5], leave_undecided=True)
    alone = [shipped.encode_text_alone(row) for row in pieces[:5]]

    assert left.undecided.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(torch.cat([row.codes for row in alone]), in_float32[:5])
    assert {int(row.precision) for row in alone} == {Precision.CANONICAL}
    assert len(shipped.encode_texts(pieces[:5]).undecided) == 0


def test_where_every_row_is_in_doubt_all_climb_to_the_canonical_path(shipped, pieces, in_float32, monkeypatch):
    monkeypatch.setattr(shipped, "bounds", ErrorBounds(INFINITE, INFINITE, INFINITE, INFINITE))
    encoding = shipped.encode_texts(pieces[:5])
    assert encoding.precision.tolist() == [Precision.CANONICAL] * 5
    assert torch.equal(encoding.codes, in_float32[:5])


def test_embeddings_are_final_in_float32_where_that_leaves_no_doubt(shipped, embeddings, monkeypatch):
    # given
    before = shipped.encode(embeddings)
    bounds = self_test(shipped)
    monkeypatch.setattr(shipped, "bounds", replace(bounds, embedding_float32=100 * bounds.embedding_float32))
    # when
    encoding = shipped.encode(embeddings)
    # then
    assert {Precision.FLOAT32, Precision.FLOAT64} == set(encoding.precision.tolist())
    assert torch.equal(encoding.codes, before.codes)
    assert torch.allclose(encoding.margin, before.margin, rtol=0, atol=1e-5)
    # and numbers of more digits than float32 has do not go through it
    assert (shipped.encode(embeddings.double()).precision != Precision.FLOAT32).all()


def test_the_self_test_takes_no_bound_below_the_frozen_one(shipped, monkeypatch):
    high = ErrorBounds(text=0.5, embedding=0.25, embedding_float32=0.125, text_bfloat16=0.75)
    monkeypatch.setattr(shipped, "bounds", high)
    assert replace(self_test(shipped, bfloat16=True), text_float64=None) == high
    assert self_test(shipped).text_bfloat16 is None


def test_the_self_test_raises_the_bounds_of_a_machine_that_errs_more(shipped, monkeypatch):
    # given float32 that is a thousand times off
    before = self_test(shipped)
    embed = TextEncoder.embed
    monkeypatch.setattr(TextEncoder, "embed", lambda self, *rest: embed(self, *rest) * (1 + 1e-4))
    network = shipped._fast_network
    monkeypatch.setattr(shipped, "_fast_network", lambda rows: network(rows) * (1 + 1e-4))
    # when
    raised = self_test(shipped)
    # then
    assert raised.text > 10 * before.text
    assert raised.embedding_float32 > 10 * before.embedding_float32


@pytest.mark.parametrize("where", ["near", "far", "sevens", "hundreds"])
def test_the_self_test_finds_what_errs_at_some_distances_or_batch_sizes_alone(where, shipped, monkeypatch):
    # given
    tokenizer = shipped.for_embeddings()
    before, network, centre = self_test(tokenizer), tokenizer._fast_network, tokenizer.centre.float()

    def erring(rows):
        distances = (rows - centre).norm(dim=1)
        wrong = {"near": distances < 0.5, "far": distances > 20}.get(where, torch.ones(len(rows), dtype=torch.bool))
        if where in ("sevens", "hundreds") and not (len(rows) == 7 if where == "sevens" else len(rows) > 100):
            wrong[:] = False
        return network(rows) * (1 + 1e-3 * wrong[:, None])

    monkeypatch.setattr(tokenizer, "_fast_network", erring)
    # when
    raised = self_test(tokenizer)
    # then
    assert raised.embedding_float32 > 10 * before.embedding_float32


@pytest.mark.parametrize("lowered", ["medium", "high"])
def test_the_self_test_refuses_lowered_arithmetic(lowered, shipped):
    torch.set_float32_matmul_precision(lowered)
    try:
        with pytest.raises(CheckpointError, match="lowered"):
            self_test(shipped)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("switch", "lowered"), [("fp32_precision", "tf32"), ("allow_tf32", True), ("allow_fp16_accumulation", True)]
)
def test_every_switch_that_lowers_a_gpus_products_is_refused(switch, lowered):
    before = getattr(torch.backends.cuda.matmul, switch)
    setattr(torch.backends.cuda.matmul, switch, lowered)
    try:
        with pytest.raises(CheckpointError, match="lowered"):
            require_full_precision()
    finally:
        setattr(torch.backends.cuda.matmul, switch, before)
    require_full_precision()


def test_the_self_test_leaves_the_number_of_threads(shipped):
    before = torch.get_num_threads()
    self_test(shipped)
    assert torch.get_num_threads() == before


def test_the_bound_of_bfloat16_covers_what_it_does_to_other_texts(shipped, pieces):
    # given what was seen of made-up texts
    seen = _moved_margins(shipped, shipped.split(_test_texts([8] * BFLOAT16_TEST_TEXTS)))
    # when
    others = _moved_margins(shipped, pieces)
    # then
    assert 0 < seen.root_mean_square < seen.largest < seen.bound
    assert others.largest < 0.8 * seen.bound


def test_the_bound_of_bfloat16_covers_what_it_does_to_scripts_that_the_encoder_hardly_knows(shipped):
    # given bounds that were measured of those as well, in other texts
    bound = self_test(shipped, bfloat16=True).text_bfloat16
    strange = _strange_texts([2, 5, 9, 33])
    assert not any(text.isascii() for text in strange[12:])
    # when
    moved = _moved_margins(shipped, shipped.split(strange))
    # then
    assert 0 < moved.largest < 0.8 * bound


def test_texts_are_tried_in_int16_where_few_of_them_go_on(shipped):
    # given
    none, all_of_them = (self_test(shipped, int16_share=share).text_int16 for share in (0.0, 1.0))
    # then
    assert none is None
    assert (all_of_them is not None) is shipped.text_encoder.has_int16
    assert all_of_them is None or shipped.bounds.text < all_of_them < 2e-3


def test_texts_in_doubt_are_final_in_float64_where_the_forward_pass_has_it(shipped, pieces, monkeypatch):
    # given bounds by which float32 decides nothing
    bounds = self_test(shipped)
    assert (bounds.text_float64 is not None) is shipped.text_encoder.has_float64
    if bounds.text_float64 is None:
        pytest.skip("no compiled forward pass here")
    assert bounds.text_float64 < 1e-3 * bounds.text
    expected = [shipped.encode_text_alone(row) for row in pieces[:20]]
    monkeypatch.setattr(shipped, "bounds", replace(bounds, text=INFINITE))
    # when
    encoding = shipped.encode_texts(pieces[:20])
    # then
    assert torch.equal(encoding.codes, torch.cat([row.codes for row in expected]))
    assert encoding.precision.tolist() == [Precision.FLOAT64] * 20
    assert torch.allclose(encoding.margin, torch.cat([row.margin for row in expected]), rtol=0, atol=1e-12)


def test_where_there_is_nothing_to_choose_bfloat16_moves_no_margin(make_parts, text_encoder):
    tokenizer = Tokenizer("t", make_parts((384, 8), text_encoder, sizes=(1,)), ErrorBounds())
    assert self_test(tokenizer, bfloat16=True).text_bfloat16 == 0


def test_no_texts_have_no_codes(shipped):
    encoding = shipped.encode_texts([], alternatives=2)
    assert encoding.codes.shape == (0, len(shipped.codebook_sizes))
    assert encoding.alternatives.shape == (0, 2)


def by_torch(tokenizer, pieces) -> torch.Tensor:
    """Embeddings by sentence-transformers itself, which does what its caller's autocast says."""
    encoder = tokenizer.text_encoder
    return encoder._forward(encoder._model, pieces, encoder.device)


def test_codes_do_not_feel_the_callers_autocast(shipped, pieces, embeddings):
    # given what would flip codes if it reached the products
    texts, rows = shipped.encode_texts(pieces[:40]), shipped.encode(embeddings)
    # when
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = by_torch(shipped, pieces[:40])
        encodings = shipped.encode_texts(pieces[:40]), shipped.encode(embeddings)
    # then
    assert (lowered - by_torch(shipped, pieces[:40])).norm(dim=1).max() > 10 * shipped.bounds.text
    for encoding, before in zip(encodings, (texts, rows), strict=True):
        assert torch.equal(encoding.codes, before.codes)
        assert torch.allclose(encoding.margin, before.margin, rtol=0, atol=1e-5)


def test_arithmetic_that_is_lowered_after_the_load_is_refused(shipped, pieces, embeddings):
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(CheckpointError, match="lowered"):
            shipped.encode_texts(pieces[:2])
        with pytest.raises(CheckpointError, match="lowered"):
            shipped.encode(embeddings[:2])
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(shipped.encode(embeddings[:2]).codes, shipped.encode_texts(pieces[:2]).codes)


@pytest.mark.parametrize(
    ("precision", "share", "bound", "taken"),
    [
        ("float32", 0.0, 1e-2, False),
        ("bfloat16", 0.9, 1e-2, True),
        ("bfloat16", 0.9, None, True),
        ("auto", 0.9, 1e-2, False),
        ("auto", None, None, False),
        ("auto", 0.16, 1e-2, False),
        ("auto", 0.1, 1e-2, True),
    ],
)
def test_bfloat16_is_taken_where_it_is_asked_for_or_pays(
    precision, share, bound, taken, make_parts, text_encoder, tmp_path, monkeypatch
):
    # given
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(TextEncoder, "has_int16", False)
    parts = make_parts((384, 8), text_encoder)
    notes = {} if share is None else {"recomputed_share": {"text_bfloat16": share}}
    save(tmp_path / "t", parts, freeze("t", parts, ErrorBounds(text_bfloat16=bound), calibration=notes))
    assert set(json.loads((tmp_path / "t" / MANIFEST).read_text())["bounds"]) >= {"text", "embedding"}
    # when
    tokenizer = load(tmp_path / "t", text_precision=precision)
    # then
    assert (tokenizer.bounds.text_bfloat16 is not None) is taken
    assert tokenizer.bounds.text_bfloat16 is None or tokenizer.bounds.text_bfloat16 >= (bound or 0)
