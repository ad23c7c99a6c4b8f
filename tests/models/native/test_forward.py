"""The compiled forward pass beside the ones in torch, which are its oracles; compiled afresh."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models.native.forward import INTERFACE, CompiledBert, compiled_bert
from models.native.libraries import open_library
from models.native.niceness import send_behind
from models.packed_bert import PackedBert
from models.text_encoder import TextEncoder, TextEncoderConfig

SOURCES = Path(__file__).parents[3] / "models" / "native"

if shutil.which("cc") is None:
    pytest.skip("there is no C compiler", allow_module_level=True)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The library, as an installation compiles it."""
    target = tmp_path_factory.mktemp("compiled") / "packed_bert.so"
    options = ["-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-shared", "-fPIC"]
    subprocess.run(["cc", *options, "-o", target, SOURCES / "packed_bert.c", "-lm"], check=True, capture_output=True)
    try:
        opened = open_library(target, INTERFACE)
    except OSError as error:
        pytest.skip(str(error))
    if not opened.packed_bert_can(6, 384, 1536, 12, 512):
        pytest.skip("this processor has no AVX-512")
    return opened


@pytest.fixture(scope="module")
def pieces(text_encoder) -> list[list[int]]:
    """Word pieces of texts of many lengths in no order, of which several shares are made."""
    draw = random.Random(3)
    lengths = [1, 2, 2, 3, 5, 8, 13, 14, 15, 16, 21, 27, 28, 29, 33, 40, 61, 127, 128, 129, 254]
    draw.shuffle(lengths)
    return [[101, *draw.choices(range(1000, 30000), k=length), 102] for length in lengths]


def bert(width: int, heads: int, *, layers: int = 2) -> list[object]:
    """A small BERT of random weights as sentence-transformers holds it, with mean pooling and no normalisation."""
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertConfig, BertModel

    torch.manual_seed(heads)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        initializer_range=0.1,
    )
    network = BertModel(config).eval().requires_grad_(requires_grad=False)
    return [SimpleNamespace(auto_model=network), Pooling(width, "mean")]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalized", [True, False])
def test_compiled_embeddings_are_sentence_transformers_own(library, pooling, normalized, text_encoder, pieces):
    from sentence_transformers.sentence_transformer.modules import Pooling

    # given
    model = deepcopy(text_encoder._model)
    model[1] = Pooling(384, pooling)
    if not normalized:
        del model[2]
    expected = text_encoder._forward(model, pieces, torch.device("cpu"))
    # when
    embeddings = CompiledBert(library, model)(pieces)
    # then
    assert torch.allclose(embeddings, expected, rtol=0, atol=2e-6 * float(expected.norm(dim=1).max()))


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (768, 24)])
def test_other_widths_and_heads_come_to_what_torch_comes_to(library, width, heads, pieces):
    # given texts, one of them as long as there are positions
    model = bert(width, heads)
    texts = [*pieces, random.Random(5).choices(range(30522), k=512)]
    expected = PackedBert(model, torch.float32)(texts)
    # when
    embeddings = CompiledBert(library, model)(texts)
    # then
    assert torch.allclose(embeddings, expected, rtol=0, atol=1e-5 * float(expected.norm(dim=1).max()))


def one_share_of(pieces: list[list[int]]) -> list[int]:
    """The places of texts that are short enough for threads to work on them together."""
    return sorted(sorted(range(len(pieces)), key=lambda place: len(pieces[place]))[:10])


def test_a_text_comes_to_the_same_bits_alone_in_any_batch_and_on_any_threads(library, text_encoder, pieces):
    # given
    forward = CompiledBert(library, text_encoder._model)
    whole = forward(pieces)
    few = one_share_of(pieces)
    before = torch.get_num_threads()
    # when
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            backwards = forward(pieces[::-1])
            alone = torch.cat([forward([row]) for row in pieces])
            together = forward([pieces[place] for place in few])
            # then
            assert torch.equal(backwards.flip(0), whole)
            assert torch.equal(alone, whole)
            assert torch.equal(together, whole[few])
    finally:
        torch.set_num_threads(before)


def test_a_text_comes_to_the_same_bits_while_other_threads_embed_theirs(library, text_encoder, pieces):
    # given
    forward = CompiledBert(library, text_encoder._model)
    expected = forward(pieces)
    wrong = []

    def embed(order, behind):
        send_behind(behind)
        for _ in range(4):
            found = forward([pieces[place] for place in order])
            wrong.extend(
                place for place, row in zip(order, found, strict=True) if not torch.equal(row, expected[place])
            )

    # when
    orders = [list(range(len(pieces))), list(reversed(range(len(pieces)))), [3]]
    threads = [threading.Thread(target=embed, args=(order, behind)) for order in orders for behind in (0, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # then
    assert wrong == []


def test_a_short_text_that_is_sent_behind_is_embedded_whoever_comes_in_time(library, text_encoder, pieces):
    # given
    forward = CompiledBert(library, text_encoder._model)
    expected = forward(pieces[:1])
    different = []

    def embed():
        send_behind(5)
        different.extend(time for time in range(200) if not torch.equal(forward(pieces[:1]), expected))

    # when
    caller = threading.Thread(target=embed)
    caller.start()
    caller.join()
    # then
    assert different == []


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux alone")
@pytest.mark.parametrize("starved", [False, True])
def test_what_is_sent_behind_is_done_by_threads_that_give_way(library, text_encoder, pieces, starved, monkeypatch):
    # given
    forward = CompiledBert(library, text_encoder._model)
    niceness = os.getpriority(os.PRIO_PROCESS, os.getpid())
    own, found, before = [], [], torch.get_num_threads()

    def embed():
        send_behind(5)
        ticks = time.thread_time()
        found.append(forward(pieces * 20))
        own.append((os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), time.thread_time() - ticks))

    def giving_way():
        nicer = (task for task in tasks() if os.getpriority(os.PRIO_PROCESS, task) == niceness_of_crew)
        return [task for task in nicer if os.sched_getscheduler(task) == policy_of_crew]

    # when
    if starved:
        monkeypatch.setattr("models.native.niceness.LAST", 5)
    niceness_of_crew = min(19, niceness + 5) if starved else 19
    policy_of_crew = os.SCHED_OTHER if starved else os.SCHED_IDLE
    torch.set_num_threads(3)
    try:
        caller = threading.Thread(target=embed)
        started = sum(map(processor_s, giving_way()))
        caller.start()
        caller.join()
        expected = forward(pieces * 20)
    finally:
        torch.set_num_threads(before)
    # then
    assert torch.equal(found[0], expected)
    ((niceness_of_caller, seconds_of_caller),) = own
    worked = sum(map(processor_s, giving_way())) - started
    assert niceness_of_caller == niceness
    assert worked > seconds_of_caller


def tasks() -> list[int]:
    """The threads of this process."""
    return [int(task.name) for task in Path("/proc/self/task").iterdir()]


def processor_s(task: int) -> float:
    """Seconds of a processor that a thread has had."""
    return int(Path(f"/proc/self/task/{task}/schedstat").read_text().split()[0]) / 1e9


@pytest.mark.parametrize("width", [384, 768])
def test_products_of_int16_err_little_and_come_to_the_same_bits_in_any_batch(library, width, pieces):
    # given
    forward = CompiledBert(library, bert(width, 12))
    if not forward.has_int16:
        pytest.skip("this processor has no VNNI")
    exact = forward(pieces)
    # when
    whole = forward(pieces, torch.int16)
    # then
    assert 1e-6 < float((whole - exact).norm(dim=1).max() / exact.norm(dim=1).max()) < 1e-3
    before = torch.get_num_threads()
    try:
        few = one_share_of(pieces)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(forward([pieces[place] for place in few], torch.int16), whole[few])
            assert torch.equal(torch.cat([forward([row], torch.int16) for row in pieces]), whole)
            assert torch.equal(forward(pieces[::-1], torch.int16).flip(0), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (384, 12), (768, 24)])
def test_float64_comes_to_what_torch_comes_to_in_it_and_to_the_same_bits_in_any_batch(library, width, heads, pieces):
    # given texts, one of them as long as there are positions
    model = bert(width, heads)
    forward = CompiledBert(library, model)
    texts = [*pieces, random.Random(5).choices(range(30522), k=512)]
    network, pooling = deepcopy(model[0].auto_model).double(), model[1]
    expected = torch.cat([alone_in_torch(network, pooling, row) for row in texts])
    # when
    whole = forward(texts, torch.float64)
    # then
    assert whole.dtype == torch.float64
    assert float((whole - expected).norm(dim=1).max()) < 1e-13 * float(expected.norm(dim=1).max())
    few, before = one_share_of(texts), torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(forward([texts[place] for place in few], torch.float64), whole[few])
            assert torch.equal(torch.cat([forward([row], torch.float64) for row in texts]), whole)
            assert torch.equal(forward(texts[::-1], torch.float64).flip(0), whole)
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def alone_in_torch(network, pooling, row: list[int]) -> torch.Tensor:
    """The embedding (1, D) of one text, in the network's precision."""
    ids = torch.tensor([row])
    tokens = network(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return pooling({"token_embeddings": tokens, "attention_mask": torch.ones_like(ids)})["sentence_embedding"]


def test_normalised_embeddings_in_float64_are_the_canonical_ones(library, text_encoder, pieces):
    embeddings = CompiledBert(library, text_encoder._model)(pieces, torch.float64)
    expected = torch.cat([text_encoder.embed_exactly(row) for row in pieces])
    assert torch.allclose(embeddings, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_a_precision_that_there_is_nothing_for_is_refused(library, text_encoder, dtype):
    with pytest.raises(ValueError, match=f"no compiled forward pass in {dtype}"):
        CompiledBert(library, text_encoder._model)([[101, 102]], dtype)


def test_numbers_that_int16_cannot_stand_for_end_as_no_numbers(library, pieces):
    # given weights that are no numbers, so that the ladder goes on
    model = bert(384, 12)
    model[0].auto_model.embeddings.LayerNorm.weight[5] = torch.nan
    forward = CompiledBert(library, model)
    # then
    assert not forward.has_int16 or forward(pieces, torch.int16).isnan().all()


@pytest.mark.parametrize("wrong", [[], [101, 30522], [-1], [7] * 513])
def test_word_pieces_that_there_is_nothing_for_are_refused(library, text_encoder, wrong):
    forward = CompiledBert(library, text_encoder._model)
    with pytest.raises(IndexError, match="no word pieces, too many, or one that is not in the vocabulary"):
        forward([[101, 102], wrong])


def test_a_shape_that_nothing_is_compiled_for_goes_the_other_way(library, monkeypatch):
    monkeypatch.setattr("models.native.forward.installed_library", lambda: library)
    assert isinstance(compiled_bert(bert(384, 12, layers=1)), CompiledBert)
    assert compiled_bert(bert(384, 8, layers=1)) is None
    assert compiled_bert(bert(128, 4, layers=1)) is None


def test_weights_that_are_not_what_the_configuration_says_are_not_read(library, monkeypatch):
    monkeypatch.setattr("models.native.forward.installed_library", lambda: library)
    for spoil in (
        lambda network: network.encoder.layer.pop(1),
        lambda network: setattr(network.config, "max_position_embeddings", 400),
        lambda network: network.encoder.layer[0].output.dense.double(),
    ):
        model = bert(384, 12)
        spoil(model[0].auto_model)
        assert compiled_bert(model) is None


def test_a_text_encoder_takes_the_compiled_pass_where_it_agrees(library, monkeypatch):
    # given
    monkeypatch.setattr("models.native.forward.installed_library", lambda: library)
    assert TextEncoder(TextEncoderConfig()).forward_pass == "compiled, AVX-512"
    # when it computes something else, or was not compiled
    monkeypatch.setattr(CompiledBert, "__call__", lambda _, pieces: torch.ones(len(pieces), 384))
    disagreeing = TextEncoder(TextEncoderConfig())
    monkeypatch.setattr("models.native.forward.installed_library", lambda: None)
    # then
    assert disagreeing.forward_pass == TextEncoder(TextEncoderConfig()).forward_pass == "torch, packed"
