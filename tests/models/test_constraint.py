"""Generators of transformers, with random weights, that can say live IDs alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from models import DeadPrefix, Trie
from models.constraint import LiveSemanticIds
from models.vocabulary import Vocabulary

SIZES = (16, 16, 16)
END = 1
VOCABULARY = Vocabulary.contiguous(SIZES, 4, first=5, end=END)
TOKENS = 5 + sum(SIZES) + 4 + 7  # some of no level at the end
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SEARCHES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "top-p": {"do_sample": True, "top_p": 0.5, "top_k": 3, "temperature": 3.0},
    "beams": {"num_beams": 10, "num_return_sequences": 10},
    "beams, renormalised": {"num_beams": 10, "num_return_sequences": 10, "renormalize_logits": True},
    "beams, invalid values removed": {"num_beams": 10, "num_return_sequences": 10, "remove_invalid_values": True},
    "beams, to the end": {
        "num_beams": 10,
        "num_return_sequences": 10,
        "early_stopping": "never",
        "length_penalty": 2.0,
    },
    "beam sampling": {"num_beams": 10, "num_return_sequences": 10, "do_sample": True},
    "beam sampling, renormalised": {"num_beams": 10, "do_sample": True, "renormalize_logits": True},
}


def encoder_decoder():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=TOKENS, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=END, initializer_factor=20.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def decoder():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=TOKENS, n_positions=64, n_embd=32, n_layer=1, n_head=4, initializer_range=0.5,
        bos_token_id=0, pad_token_id=0, eos_token_id=END,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


MODELS = {"encoder-decoder": encoder_decoder(), "decoder": decoder()}


def some_ids(number, seed=0, roots=16):
    torch.manual_seed(seed)
    return torch.cat(
        [torch.randint(0, roots, (number, 1)), torch.randint(0, 16, (number, 2)), torch.randint(0, 4, (number, 1))], 1
    )


def prompts(number):
    return torch.randint(5, TOKENS, (number, 7), generator=torch.Generator().manual_seed(number))


def generated(kind, trie, input_ids, ids=1, vocabulary=VOCABULARY, max_new_tokens=None, **search):
    """What a model says after the prompts, (B * returned, n, 4), -1 where there is no ID; and the tokens."""
    begins_at = 1 if kind == "encoder-decoder" else input_ids.shape[1]
    only = LiveSemanticIds(trie, vocabulary, begins_at=begins_at, num_beams=search.get("num_beams", 1), ids=ids)
    length = max_new_tokens or ids * 4 + 1
    model = MODELS[kind].to(input_ids.device)
    said = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), logits_processor=[only], max_new_tokens=length, **search
    )
    return vocabulary.read(said[:, begins_at:]), said[:, begins_at:]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("kind", MODELS)
def test_a_generator_says_live_ids_alone(kind, search, device):
    torch.manual_seed(1)
    trie = Trie.of(some_ids(300), SIZES).to(device)
    said = []

    for _ in range(3):
        ids, tokens = generated(kind, trie, prompts(4).to(device), **SEARCHES[search])

        live = trie.holds(ids[:, 0])
        blank = (ids[:, 0] == -1).all(dim=1)
        assert live.all() or ("beam sampling" in search and live[:: len(live) // 4].all() and (live | blank).all())
        assert (tokens[live, 4] == END).all()
        said.append(ids[live, 0])
    assert len(torch.cat(said).unique(dim=0)) > 1


@pytest.mark.parametrize("kind", MODELS)
def test_beams_find_the_best_of_all_live_ids(kind):
    trie = Trie.of(some_ids(300, roots=2), SIZES)
    ids = trie.semantic_ids()
    prompt = prompts(1)
    tokens = torch.cat([VOCABULARY.write(ids), torch.full((len(ids), 1), END)], dim=1)
    with torch.no_grad():
        if kind == "decoder":
            logits = MODELS[kind](torch.cat([prompt.expand(len(ids), -1), tokens], dim=1)).logits[
                :, prompt.shape[1] - 1 : -1
            ]
        else:
            start = torch.zeros(len(ids), 1, dtype=torch.int64)
            said = torch.cat([start, tokens], dim=1)[:, :-1]
            logits = MODELS[kind](prompt.expand(len(ids), -1), decoder_input_ids=said).logits
    scores = logits.log_softmax(dim=2).gather(2, tokens[:, :, None]).sum(dim=(1, 2))

    found, _ = generated(kind, trie, prompt, num_beams=len(ids), num_return_sequences=10)

    assert torch.equal(found[:, 0], ids[scores.argsort(descending=True)[:10]])


@pytest.mark.parametrize("search", [name for name in SEARCHES if "beam" in name])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("number", [1, 3, 12])
def test_fewer_live_ids_than_beams_make_no_dead_ones(kind, search, number):
    trie = Trie.of(some_ids(number, roots=2), SIZES)

    for seed in range(3):
        torch.manual_seed(seed)
        ids, _ = generated(kind, trie, prompts(3), **SEARCHES[search])

        live = trie.holds(ids[:, 0])
        assert (live | (ids[:, 0] == -1).all(dim=1)).all()
        assert live.reshape(3, -1).any(dim=1).all()


@pytest.mark.parametrize("kind", MODELS)
def test_what_died_is_no_longer_said_and_what_came_is(kind):
    trie = Trie.of(some_ids(200), SIZES, 1)
    before, _ = generated(kind, trie, prompts(2), num_beams=10, num_return_sequences=10)
    died = before[:, 0].unique(dim=0)

    without = trie.updated(died, torch.zeros(len(died), dtype=torch.bool), 2)
    after, _ = generated(kind, without, prompts(2), num_beams=10, num_return_sequences=10)
    again, _ = generated(
        kind, without.updated(died, torch.ones(len(died), dtype=torch.bool), 3), prompts(2), num_beams=10,
        num_return_sequences=10,
    )  # fmt: skip

    assert without.holds(after[:, 0]).all()
    assert not without.holds(died).any()
    assert torch.equal(again, before)


@pytest.mark.parametrize("search", ["greedy", "sampling", "beams"])
@pytest.mark.parametrize("kind", MODELS)
def test_several_ids_in_a_row_are_all_live(kind, search):
    torch.manual_seed(2)
    trie = Trie.of(some_ids(300), SIZES)

    ids, tokens = generated(kind, trie, prompts(4), ids=3, min_new_tokens=6, **SEARCHES[search])

    whole = (ids >= 0).all(dim=2)
    assert ids.shape[1] == 3
    assert torch.equal(trie.holds(ids.reshape(-1, 4)).reshape(-1, 3), whole)
    assert whole[:, :2].all()  # the second had begun when the end was allowed again
    for row, said in zip(tokens.tolist(), whole.sum(dim=1).tolist(), strict=True):
        assert set(row[said * 4 :]) <= {0, END}


@pytest.mark.parametrize("search", ["greedy", "beams"])
@pytest.mark.parametrize("kind", MODELS)
def test_an_id_may_end_by_its_length_alone(kind, search):
    endless = Vocabulary(VOCABULARY.tokens, end=None)
    trie = Trie.of(some_ids(300), SIZES)

    ids, _ = generated(kind, trie, prompts(2), vocabulary=endless, max_new_tokens=4, **SEARCHES[search])

    assert trie.holds(ids[:, 0]).all()
    with pytest.raises(ValueError, match="1 IDs are whole and the vocabulary has no end"):
        generated(kind, trie, prompts(2), vocabulary=endless, max_new_tokens=5, **SEARCHES[search])


IDS = st.tuples(*(st.integers(0, 2) for _ in range(3)))
NEAR = st.integers(0, 12)
SMALL = Vocabulary.contiguous((3, 3), 3, first=2, end=1)


def oracle(live, said, ids):
    """The tokens that may follow these, or None where nothing may: number by number, ID by ID."""
    allowed = None
    for length in range(len(said) + 1):
        past, (whole, depth) = said[:length], divmod(length, 3)
        read = tuple(token - 2 - 3 * (i % 3) for i, token in enumerate(past))
        prefix = read[whole * 3 :]
        allowed = (
            {row[depth] + 2 + 3 * depth for row in live if row[:depth] == prefix} if depth or whole < ids else set()
        )
        if whole and not depth:
            allowed.add(1)
        if length == len(said) or said[length] == 1:
            break
        if said[length] not in allowed:
            return None
    if length < len(said):
        return {1} if whole and not depth else None
    return allowed or None


@given(
    live=st.sets(IDS, min_size=1, max_size=8),
    drawn=st.data(),
    ids=st.integers(1, 2),
    length=st.integers(0, 8),
)
@settings(deadline=None, max_examples=150)
def test_what_may_follow_is_what_a_plain_walk_through_the_ids_says(live, drawn, ids, length):
    said = drawn.draw(st.lists(walks(live, ids, length), min_size=1, max_size=5))
    wanted = [oracle(live, row, ids) for row in said]
    trie = Trie.of(torch.tensor(sorted(live)), (3, 3))
    input_ids = torch.tensor([[9, 9, *row] for row in said])
    scores = torch.randn(len(said), 14)

    only = LiveSemanticIds(trie, SMALL, begins_at=2, ids=ids)
    group = LiveSemanticIds(trie, SMALL, begins_at=2, ids=ids, num_beams=len(said))

    if None in wanted:
        with pytest.raises(DeadPrefix, match=f"row {wanted.index(None)} of the batch"):
            only(input_ids, scores)
    else:
        masked = only(input_ids, scores)
        assert [set((row > -torch.inf).nonzero().flatten().tolist()) for row in masked] == wanted
        running = torch.tensor([1 not in row for row in said])
        assert torch.equal(masked[running].where(masked[running] > -torch.inf, scores[running]), scores[running])
    if all(row is None for row in wanted):
        with pytest.raises(DeadPrefix, match="row 0 of the batch"):
            group(input_ids, scores)
    else:
        for masked, row in zip(group(input_ids, scores), wanted, strict=True):
            usable = set((masked > torch.finfo(torch.float32).min).nonzero().flatten().tolist())
            assert usable == (row or set())
            assert masked.amax() > -torch.inf


def walks(live, ids, length):
    """Rows of tokens, most of which a constrained generator could have said."""

    @st.composite
    def walk(draw):
        row = []
        for _ in range(length):
            allowed = sorted(oracle(live, row, ids) or set())
            wild = draw(st.integers(0, 9)) == 0
            row.append(draw(NEAR) if wild or not allowed else draw(st.sampled_from(allowed)))
        return row

    return walk()


def test_an_empty_trie_raises_at_the_first_step():
    empty = Trie.of(torch.empty(0, 4, dtype=torch.int64), SIZES)

    for search in ("greedy", "beams"):
        with pytest.raises(DeadPrefix, match="row 0 of the batch"):
            generated("decoder", empty, prompts(2), **SEARCHES[search])


def test_an_id_that_begins_elsewhere_raises_and_is_not_taken_for_ended():
    trie = Trie.of(some_ids(300), SIZES)
    padded = torch.full((2, 7), END)

    for begins_at in (0, 2, 6):
        with pytest.raises(DeadPrefix):
            LiveSemanticIds(trie, VOCABULARY, begins_at=begins_at)(padded, torch.zeros(2, TOKENS))
    with pytest.raises(ValueError, match="IDs begin at 8"):
        LiveSemanticIds(trie, VOCABULARY, begins_at=8)(padded, torch.zeros(2, TOKENS))
    with pytest.raises(ValueError, match="beams are 10"):
        LiveSemanticIds(trie, VOCABULARY, begins_at=7, num_beams=10)(padded, torch.zeros(2, TOKENS))


@pytest.mark.parametrize("search", ["greedy", "sampling", "beams"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_processor_that_forbids_all_live_ids_raises(kind, search):
    trie = Trie.of(some_ids(300), SIZES)

    with pytest.raises(ValueError, match="another processor forbids"):
        generated(kind, trie, prompts(2), suppress_tokens=VOCABULARY.tokens[2].tolist(), **SEARCHES[search])


@pytest.mark.parametrize("wild", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_raise_as_their_sums_would_undo_the_constraint(wild):
    trie = Trie.of(some_ids(300), SIZES)
    scores = torch.zeros(20, TOKENS)
    scores[7, VOCABULARY.tokens[0][int(trie.numbers[0][0])]] = wild

    with pytest.raises(ValueError, match="row 7 of the batch: the scores"):
        LiveSemanticIds(trie, VOCABULARY, begins_at=0, num_beams=10)(torch.empty(20, 0, dtype=torch.int64), scores)


def test_a_live_suffix_beyond_the_vocabulary_is_refused_or_left_out():
    ids = torch.cat([some_ids(100), torch.tensor([[1, 2, 3, 4], [1, 2, 3, 0]])])
    trie = Trie.of(ids, SIZES)

    with pytest.raises(ValueError, match=r"suffix 4 is live and the vocabulary ends with 3.*max_suffix"):
        LiveSemanticIds(trie, VOCABULARY, begins_at=1)
    said, _ = generated("decoder", trie.with_suffixes_below(4), prompts(1), num_beams=200, num_return_sequences=150)

    assert {tuple(row) for row in said[:, 0].tolist()} == {tuple(row) for row in ids.tolist() if row[3] < 4}


def test_a_trie_of_other_codebooks_is_refused():
    for sizes in ((16, 16), (16, 16, 15)):
        with pytest.raises(ValueError, match="codebook sizes"):
            LiveSemanticIds(Trie.of(torch.zeros(1, len(sizes) + 1).long(), sizes), VOCABULARY, begins_at=1)


# The vocabulary ------------------------------------------------------------------------------------------------------


def test_tokens_of_a_tokenizer_are_found_by_their_form():
    words = [
        "<pad>",
        "</s>",
        *(f"<{'abcd'[level]}_{n}>" for n in range(16) for level in range(4) if n < 5 or level < 3),
    ]
    words.insert(9, "between")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "<pad>")), eos_token="</s>"
    )

    vocabulary = Vocabulary.of_tokens(tokenizer.get_vocab(), SIZES, end=tokenizer.eos_token_id)

    assert vocabulary.suffixes == 5
    assert vocabulary.end == END
    ids = some_ids(50)
    for row, tokens in zip(ids.tolist(), vocabulary.write(ids).tolist(), strict=True):
        written = [f"<{'abcd'[level]}_{number}>" for level, number in enumerate(row)]
        assert tokenizer.convert_ids_to_tokens(tokens) == written
    assert torch.equal(vocabulary.read(vocabulary.write(ids))[:, 0], ids)
    with pytest.raises(ValueError, match="no token <c_16>"):
        Vocabulary.of_tokens(tokenizer.get_vocab(), (16, 16, 17), end=1)
    with pytest.raises(ValueError, match=r"no token <\|e0\|>"):
        Vocabulary.of_tokens(
            {f"<|{x}{n}|>": n for x in "abcd" for n in range(9)}, (9,) * 4, end=1, form="<|{letter}{number}|>"
        )


def test_what_is_no_whole_id_reads_as_none():
    said = torch.tensor(
        [[5, 21, 37, 53, 1, 0, 0, 0], [5, 21, 37, 1, 5, 21, 37, 53], [-1, 5, 70, 2**40, 20, 36, 52, 56]]
    )

    assert VOCABULARY.read(said).tolist() == [
        [[0, 0, 0, 0], [-1] * 4],
        [[-1] * 4, [0, 0, 0, 0]],
        [[-1] * 4, [15, 15, 15, 3]],
    ]
    assert VOCABULARY.read(said[:, :3]).shape == (3, 0, 4)


def test_levels_may_share_tokens():
    digits = Vocabulary([torch.arange(16)] * 4, end=16)

    assert digits.read(torch.tensor([[3, 3, 0, 15, 16]]))[0, 0].tolist() == [3, 3, 0, 15]


@pytest.mark.parametrize(
    ("tokens", "end"),
    [([[1, 1], [2]], None), ([[1, 3], [2]], 2), ([[1], []], None), ([[-1], [2]], None), ([[[1]], [2]], 7)],
)
def test_a_vocabulary_that_is_not_one_to_one_is_refused(tokens, end):
    with pytest.raises(ValueError, match=r"all different|ends an ID"):
        Vocabulary([torch.tensor(level, dtype=torch.int64) for level in tokens], end)
