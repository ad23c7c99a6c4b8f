"""Small batches by replay are the forward pass as it is; here with a stand-in that runs what a graph would replay."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from models import DEFAULT_CHECKPOINT, load
from models.device.graphs import BUCKETS, Bucket, Recorder, ReplayedBert, filled, filling, with_graphs
from models.device.streams import STREAMS
from models.device.unpadded_bert import UnpaddedBert

CPU = torch.device("cpu")
SMALL = [Bucket(1, 8), Bucket(4, 8), Bucket(1, 16)]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def as_a_graph(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Its result is always at the same place in memory, as that of a graph is."""
    place = work()
    return lambda: place.copy_(work())


@pytest.fixture(scope="module")
def forward(text_encoder) -> UnpaddedBert:
    return UnpaddedBert(text_encoder._model, CPU, torch.float32)


@pytest.fixture(scope="module")
def pieces(text_encoder) -> list[list[int]]:
    return text_encoder.split(["kettle", "a steel kettle", "x", "one kettle of 1.7 l", "Größe 500x"])


@pytest.mark.parametrize(
    ("lengths", "bucket"),
    [
        ([1], (1, 8)),
        ([8], (1, 8)),
        ([9], (1, 16)),
        ([3, 8], (4, 8)),
        ([1, 1, 1, 1], (4, 8)),
        ([17], None),
        ([2, 9], None),
        ([1] * 5, None),
    ],
)
def test_a_batch_takes_the_smallest_bucket_that_holds_it(lengths, bucket, forward):
    replayed = ReplayedBert(forward, as_a_graph, SMALL[::-1])
    assert replayed.bucket([[0] * length for length in lengths]) == bucket


def test_a_batch_is_filled_up_with_word_pieces_and_with_texts_of_one():
    assert filled([[5, 6], [7]], Bucket(3, 4)) == [5, 6, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 2, 1, 1]


def test_the_buckets_are_few_and_hold_no_more_word_pieces_than_a_launch_takes_time():
    assert len(set(BUCKETS)) == len(BUCKETS) == 10
    assert max(texts * length for texts, length in BUCKETS) == 512
    assert {texts for texts, _ in BUCKETS} >= {1}


@pytest.mark.parametrize("pools_mean", [True, False])
def test_embeddings_are_those_of_the_forward_pass_in_any_batch_and_one_after_the_other(
    forward, pieces, pools_mean, monkeypatch
):
    # given
    monkeypatch.setattr(forward, "_pools_mean", pools_mean)
    batches = [pieces[:1], pieces[1:5], pieces[:3], pieces[2:3], pieces[::-1][:2]]
    # when
    with torch.inference_mode():  # as a tokenizer calls it
        replayed = ReplayedBert(forward, as_a_graph, [Bucket(1, 16), Bucket(4, 32)])
        assert all(map(replayed.bucket, batches))
        found = [replayed(batch) for batch in batches]
    # then nothing of a batch is left in the next one, and no answer changes behind its caller's back
    for embeddings, batch in zip(found, batches, strict=True):
        assert torch.allclose(embeddings, forward(batch), rtol=0, atol=2e-6)
    replayed.check(pieces, 1e-5)


def test_no_bucket_is_longer_than_a_text_may_be(forward, monkeypatch):
    monkeypatch.setattr(forward, "_positions", forward._positions[:12])
    replayed = ReplayedBert(forward, as_a_graph, SMALL)
    assert replayed.bucket([[0] * 8]) == (1, 8)
    assert replayed.bucket([[0] * 9]) is None


def test_a_batch_that_no_bucket_holds_runs_as_it_is(forward, pieces):
    replayed = ReplayedBert(forward, as_a_graph, SMALL)
    assert replayed.bucket(pieces) is None
    assert torch.equal(replayed(pieces), forward(pieces))


def test_a_replay_that_ignores_its_buffers_is_found(forward, pieces):
    replayed = ReplayedBert(forward, lambda work: work().clone, SMALL)
    with pytest.raises(ValueError, match="a replay of 1 x 8 word pieces errs"):
        replayed.check(pieces, 1e-2)


def test_known_texts_fill_a_bucket_with_texts_of_several_lengths():
    assert filling(Bucket(1, 5), [[1, 2], [3]], 0) == [[1, 2, 1, 2, 1]]
    assert filling(Bucket(4, 8), [[1, 2], [3]], 1) == [[3] * 7, [1, 2, 1, 2, 1], [3] * 3, [1]]
    for bucket in BUCKETS:
        for first in (0, 1):
            batch = filling(bucket, [[1, 2, 3], [4]], first)
            assert (len(batch), max(map(len, batch))) == (bucket.texts, bucket.length - first)
            assert min(map(len, batch)) >= 1


@pytest.mark.parametrize("wrong", range(4))
def test_a_replay_that_errs_is_found_whatever_its_size(wrong, forward, pieces):
    # given four recordings, of which one has taken a mask or a shape of another
    buckets = [Bucket(1, 8), Bucket(1, 16), Bucket(4, 8), Bucket(16, 16)]
    numbers = iter(range(4))

    def record(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return work if next(numbers) != wrong else lambda: work().flip(1)

    # when, then
    replayed = ReplayedBert(forward, record, buckets)
    with pytest.raises(ValueError, match="a replay of {} x {} word pieces".format(*buckets[wrong])):
        replayed.check(pieces[:2], 1e-2)


def test_where_nothing_can_be_recorded_the_forward_pass_stays_as_it_is_and_the_log_says_so(
    forward, pieces, monkeypatch, caplog
):
    # given a processor, for which there is nothing to record
    assert with_graphs(forward, pieces, 1e-4) is forward
    # and a device that is not there
    if not torch.cuda.is_available():
        monkeypatch.setattr(forward, "device", torch.device("cuda", 0))
        # when
        with caplog.at_level(logging.WARNING):
            assert with_graphs(forward, pieces, 1e-4) is forward
        # then
        assert "no CUDA graphs in torch.float32 on cuda:0" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_on_a_gpu_all_that_is_recorded_is_on_the_gpu(dtype, text_encoder):
    # given a device without numbers
    device = torch.device("cuda", 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        forward = UnpaddedBert(text_encoder._model, device, dtype)
        # when
        found = forward.padded(torch.ones(4 * 17, dtype=torch.int64, device=device), 4, 16)
    # then
    assert found.device == device
    assert found.shape == (4, 384)
    assert found.dtype == torch.float32


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_on_a_gpu_a_replay_has_the_embeddings_of_the_forward_pass(dtype, text_encoder, pieces):
    # given
    forward = UnpaddedBert(text_encoder._model, torch.device("cuda"), dtype)
    replayed = ReplayedBert(forward, Recorder(forward.device))
    batches = [pieces, pieces[:1], pieces[::-1][:3], pieces[1:2], [[101, *[2000] * 100, 102]]]
    # when
    with torch.inference_mode():
        found = [replayed(batch) for batch in batches]
    # then
    for embeddings, batch in zip(found, batches, strict=True):
        assert replayed.bucket(batch) is not None
        assert torch.allclose(embeddings, forward(batch), rtol=0, atol=1e-2 if dtype == torch.float16 else 1e-5)


@gpu
def test_on_a_gpu_texts_alone_have_the_codes_of_the_cpu_and_the_log_names_the_graphs():
    tokenizer = load(DEFAULT_CHECKPOINT, "cuda", text_precision="float16", tests_itself=True)
    assert "CUDA graphs" in tokenizer.text_encoder.forward_pass
    twin = load(DEFAULT_CHECKPOINT)
    for text in ("kettle", "a steel kettle of 1.7 l", "Größe 500x", "refill " * 60):
        assert torch.equal(
            tokenizer.encode_texts(tokenizer.split([text])).codes, twin.encode_texts(twin.split([text])).codes
        )


@gpu
def test_on_a_gpu_what_was_recorded_stays_when_others_are_recorded_and_dropped(text_encoder, pieces):
    # given more recordings than torch has streams
    forward = UnpaddedBert(text_encoder._model, torch.device("cuda"), torch.float16)
    kept = ReplayedBert(forward, Recorder(forward.device))
    expected = kept(pieces[:1])
    # when
    for _ in range(STREAMS):
        assert torch.equal(ReplayedBert(forward, Recorder(forward.device), [Bucket(1, 16)])(pieces[:1]), expected)
    torch.cuda.empty_cache()
    # then
    assert torch.equal(kept(pieces[:1]), expected)


@gpu
def test_on_a_gpu_a_recording_that_fails_leaves_torch_as_it_was():
    # given work that waits for the device, which no recording can
    device = torch.device("cuda")
    number = torch.ones(1, device=device)
    recorder = Recorder(device)
    # when
    with pytest.raises(RuntimeError):
        recorder(lambda: number * number.item())
    # then
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.equal(Recorder(device)(lambda: number + 1)(), number + 1)
