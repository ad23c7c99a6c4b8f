"""Rows go up in parts, one ahead of the work on them, and what was found comes back as it was."""

from __future__ import annotations

import logging

import pytest
import torch

from models import DEFAULT_CHECKPOINT, load
from models.device.transfer import arrives, one_ahead, overlaps, packed, together, unpacked, uploaded

CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.parametrize(("rows", "sizes"), [(0, [0]), (1, [1]), (4, [4]), (5, [4, 1]), (12, [4, 4, 4])])
def test_rows_come_in_order_in_parts_of_so_many_at_most(rows, sizes):
    embeddings = torch.randn(rows, 3)
    parts = list(uploaded(embeddings, CPU, 4))
    assert [len(part) for part in parts] == sizes
    assert torch.equal(torch.cat(parts), embeddings)


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_each_is_handed_out_once_the_next_one_has_been_begun(number):
    begun = []
    ahead = one_ahead(begun.append(one) or one for one in range(number))
    for one in range(number):
        assert next(ahead) == one
        assert begun == list(range(min(one + 2, number)))
    assert list(ahead) == []


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("alternatives", [0, 3])
def test_what_was_packed_is_unpacked_bit_by_bit(rows, alternatives):
    # given
    source = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2**62), 2**62, (rows, 4 + alternatives), generator=source)
    margin = torch.randn(rows, generator=source, dtype=torch.float64)
    margin[:1], error = torch.nan, torch.tensor([torch.inf, -0.0, 5e-324]).double().repeat(3)[:rows]
    tensors = [codes[:, alternatives:], margin, error, codes[:, :alternatives]]
    # when
    back = unpacked(packed(tensors), tensors)
    # then
    for one, other in zip(back, tensors, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert one.is_contiguous()
        assert torch.equal(one.view(torch.int64), other.view(torch.int64))


def test_parts_are_joined_as_they_would_be_after_a_copy():
    parts = [[torch.randint(9, (rows, 2)), torch.randn(rows).double()] for rows in (3, 1, 0)]
    copied = unpacked(torch.cat([packed(part) for part in parts]), parts[0])
    for one, other in zip(together(parts), copied, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("alternatives", [0, 3])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu, id="gpu")])
def test_embeddings_have_the_same_codes_in_parts_of_any_size(device, alternatives, monkeypatch):
    # given
    embeddings = torch.nn.functional.normalize(torch.randn(300, 384, generator=torch.Generator().manual_seed(0)))
    whole = load(DEFAULT_CHECKPOINT).encode(embeddings, alternatives=alternatives)
    tokenizer = load(DEFAULT_CHECKPOINT, device)
    for at_once in (7, 64, 299):
        monkeypatch.setattr(tokenizer, "_at_once", at_once)
        # when
        encoding = tokenizer.encode(embeddings, alternatives=alternatives)
        # then
        assert torch.equal(encoding.codes, whole.codes)
        assert torch.equal(encoding.alternatives, whole.alternatives)
        assert torch.allclose(encoding.margin, whole.margin, atol=1e-6)


def test_a_number_that_is_not_finite_is_found_in_any_part(monkeypatch):
    tokenizer = load(DEFAULT_CHECKPOINT)
    monkeypatch.setattr(tokenizer, "_at_once", 4)
    for row in (0, 5, 9):
        embeddings = torch.randn(10, 384)
        embeddings[row, 3] = torch.inf
        with pytest.raises(ValueError, match="not finite"):
            tokenizer.encode(embeddings)


def test_a_way_up_is_taken_where_all_numbers_arrive_and_the_log_says_why_not(caplog):
    def raises(parts, device):
        raise RuntimeError("no such stream")

    ways = {
        "other than they were sent": lambda parts, _: (part.roll(1) for part in parts),
        "other than they": lambda parts, _: parts[:-1],
        "no such stream": raises,
    }
    assert arrives(lambda parts, _: iter(parts), CPU)
    assert not caplog.records
    for why, way in ways.items():
        with caplog.at_level(logging.WARNING):
            assert not arrives(way, CPU)
        assert f"cpu one part after the other: {why}" in caplog.text.replace("numbers arrive ", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_where_there_is_no_second_stream_parts_go_up_one_after_the_other(caplog):
    with caplog.at_level(logging.WARNING):
        assert not overlaps(torch.device("cuda", 0))
    assert "embeddings go up to cuda:0 one part after the other" in caplog.text


@gpu
def test_on_a_gpu_uploads_pass_their_trial():
    assert overlaps(torch.device("cuda"))


@gpu
def test_on_a_gpu_every_part_arrives_before_it_is_worked_on_and_stays_until_then():
    # given work that takes longer than a copy, on more parts than are held at a time
    device = torch.device("cuda")
    rows = torch.randn(64, 512, 256)
    weight = torch.eye(256, device=device)
    found = []
    # when
    for part in uploaded(rows.flatten(0, 1), device, 512):
        for _ in range(50):
            part = part @ weight  # noqa: PLW2901 - the same numbers, later
        found.append(part)
    # then
    assert torch.equal(torch.stack(found).cpu(), rows)
