"""The batched beam search against `generate` of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from models import DeadPrefix, Trie
from models.constraint import LiveSemanticIds
from models.recommendation.beams import search
from models.tiger import Tiger, TigerConfig

SIZES = (8, 8)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module")
def model() -> Tiger:
    torch.manual_seed(0)
    config = TigerConfig(
        SIZES, 4, users=5, width=16, encoder_layers=2, decoder_layers=2, heads=2, head_width=8, hidden=32
    )
    return Tiger(config).eval()


def some_ids(number: int, roots: int = 8) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(number)
    sizes = (roots, 8, 4)
    return torch.stack([torch.randint(size, (number,), generator=drawn) for size in sizes], dim=1)


def asked(model: Tiger, users: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = model.vocabulary.write(some_ids(users * 3)).unflatten(0, (users, 3))
    return torch.arange(users, device=model.device) % 5, tokens.to(model.device)


def generated(model: Tiger, users, items, beams: int, trie: Trie | None):
    """What `generate` finds: (B, beams, L + 1) and the sums of its scores."""
    size = len(SIZES) + 1
    only = [LiveSemanticIds(trie, model.vocabulary, begins_at=1, num_beams=beams)] if trie else []
    with torch.inference_mode():
        said = model.t5.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=model.encode(users, items)),
            logits_processor=only, num_beams=beams, num_return_sequences=beams, max_new_tokens=size,
            length_penalty=0.0, return_dict_in_generate=True, output_scores=True, early_stopping=True,
        )  # fmt: skip
    ids = model.vocabulary.to(users.device).read(said.sequences[:, 1:])[:, 0]
    return ids.unflatten(0, (len(users), beams)), said.sequences_scores.unflatten(0, (len(users), beams))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("beams", [4, 20])
@pytest.mark.parametrize("constrained", [True, False], ids=["constrained", "free"])
def test_the_search_finds_what_generate_finds_with_the_same_scores(model, beams, constrained, device) -> None:
    model = model.to(device)
    users, items = asked(model)
    trie = Trie.of(some_ids(150), SIZES).to(device) if constrained else None

    found = search(model, users, items, beams, trie)

    ids, scores = generated(model, users, items, beams, trie)
    torch.testing.assert_close(found.scores, scores)
    assert torch.equal(found.semantic_ids, ids) or not constrained
    if not constrained:  # what is no whole ID has its own numbers here, and none there
        whole = (found.semantic_ids >= 0).all(dim=2)
        assert torch.equal(found.semantic_ids[whole], ids[whole])
        assert (ids[~whole] == -1).all()


def test_as_many_beams_as_ids_find_them_all_in_the_order_of_their_likelihood(model: Tiger) -> None:
    model = model.to("cpu")
    users, items = asked(model, 2)
    trie = Trie.of(some_ids(40), SIZES)
    ids = trie.semantic_ids()

    found = search(model, users, items, len(ids) + 5, trie)

    assert (found.semantic_ids[:, len(ids) :] == -1).all()
    assert found.scores[:, len(ids) :].isneginf().all()
    tokens = model.vocabulary.write(ids)
    for user in range(2):
        before = items[user].expand(len(ids), -1, -1)
        with torch.inference_mode():
            logits = model(users[user].expand(len(ids)), torch.cat([before, tokens[:, None]], dim=1))[:, 0]
        likelihood = logits.log_softmax(dim=2).gather(2, tokens[:, :, None]).sum(dim=(1, 2))
        best = likelihood.argsort(descending=True)
        assert torch.equal(found.semantic_ids[user, : len(ids)], ids[best])
        torch.testing.assert_close(found.scores[user, : len(ids)], likelihood[best])


def test_what_the_generator_cannot_say_is_refused(model: Tiger) -> None:
    users, items = asked(model.to("cpu"))
    with pytest.raises(ValueError, match="suffix 4 is live"):
        search(model, users, items, 4, Trie.of(torch.tensor([[1, 2, 4]]), SIZES))
    with pytest.raises(ValueError, match="codebook sizes"):
        search(model, users, items, 4, Trie.of(torch.tensor([[1, 2, 3]]), (8, 9)))
    with pytest.raises(DeadPrefix, match="empty"):
        search(model, users, items, 4, Trie.of(torch.empty(0, 3, dtype=torch.int64), SIZES))
