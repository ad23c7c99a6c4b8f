"""SASRec learns from sequences, the same every time, and ranks what comes next."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from models.interactions import leave_one_out
from models.training.sasrec import SASRec, SASRecConfig, evaluate_ranking, evaluate_split, fit_sasrec

SMALL = SASRecConfig(
    width=8, max_length=8, dropout=0.2, negatives=0, batch_users=64, epochs=12, learning_rate=1e-2, patience=12
)


def communities(users=300, groups=4, size=8, length=7, seed=0):
    """Users who choose from one group of items each; item i belongs to group i % groups."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(size, (users, length), generator=generator)
    return [tuple((row * groups + user % groups).tolist()) for user, row in enumerate(chosen)]


def circles(users=200, items=10):
    """After item i comes item i + 1, in sequences of 4 to 9."""
    return [tuple((user + step) % items for step in range(4 + user % 6)) for user in range(users)]


@pytest.fixture(scope="module")
def trained():
    return fit_sasrec(communities(), 32, SMALL)


def test_items_of_a_community_come_to_lie_together(trained):
    directions = functional.normalize(trained.model.items.weight.detach(), dim=1)
    nearest = (directions @ directions.T).fill_diagonal_(-2).topk(5, dim=1).indices
    same = (nearest % 4 == torch.arange(32)[:, None] % 4).float().mean()
    assert same > 0.9  # by chance 7 of 31


@pytest.mark.parametrize("negatives", [0, 6])
def test_what_always_comes_next_is_ranked_first(negatives):
    # given
    split = leave_one_out(circles())
    # when
    fitted = fit_sasrec(split.training, 10, replace(SMALL, negatives=negatives, epochs=25, patience=25, dropout=0.1))
    ranking = evaluate_split(fitted.model, split)
    # then
    assert ranking.users == 200
    assert ranking.recall[5] == 1.0
    assert ranking.ndcg[5] > 0.9
    assert fitted.losses[-1] < fitted.losses[0]


def test_the_same_seed_gives_the_same_embeddings_and_leaves_the_state_of_others_alone(trained):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    again = fit_sasrec(communities(), 32, SMALL)

    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(again.model.items.weight, trained.model.items.weight)
    other = fit_sasrec(communities(), 32, replace(SMALL, seed=1, epochs=1))
    assert not torch.equal(other.model.items.weight, trained.model.items.weight)


def test_the_epoch_that_is_kept_is_the_best_on_what_is_held_out():
    # given: nothing to be learnt, so that the measure soon ends to rise
    generator = torch.Generator().manual_seed(0)
    noise = [tuple(row) for row in torch.randint(50, (120, 5), generator=generator).tolist()]
    # when
    fitted = fit_sasrec(noise, 50, replace(SMALL, epochs=40, patience=3, held_out=0.5))
    # then
    assert fitted.epoch == len(fitted.losses) - 3
    assert fitted.held_out.users == 60


def test_a_step_sees_none_after_it():
    model = SASRec(20, SMALL).eval()
    one, other = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 9, 9]])
    torch.testing.assert_close(model(one)[:, :2], model(other)[:, :2])
    assert not torch.allclose(model(one)[:, 2:], model(other)[:, 2:])


def test_a_history_is_read_from_its_latest_steps_whatever_its_neighbours_are():
    model = SASRec(20, SMALL).eval()
    long = tuple(range(20))
    both = model.last_states([long, (3,)])
    torch.testing.assert_close(both[0], model.last_states([long[-8:]])[0])
    torch.testing.assert_close(both[1], model.last_states([(3,)])[0])


def test_a_loss_that_is_no_number_stops_the_training_with_the_reason():
    with pytest.raises(
        ValueError, match=r"SASRec stopped in epoch \d+: the loss is (nan|inf); lower the learning rate"
    ):
        fit_sasrec(communities(), 32, replace(SMALL, learning_rate=1e30))


def test_sequences_without_a_next_item_are_refused():
    with pytest.raises(ValueError, match="no user has two interactions"):
        fit_sasrec([(1,), (), (2,)], 3, SMALL)


def test_a_single_short_sequence_is_trained_on_although_it_is_held_out():
    assert fit_sasrec([(0, 1)], 2, SMALL).held_out.users == 1


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="3 heads do not divide a width of 8"):
        SASRec(4, replace(SMALL, heads=3))


def test_all_items_are_ranked_but_those_of_the_history_if_wished():
    # given: a model whose answer is its last item's own embedding, so that the history ranks first
    model = SASRec(30, replace(SMALL, blocks=0))
    with torch.no_grad():
        model.positions.weight.zero_()
        model.items.weight.copy_(functional.normalize(model.items.weight - model.items.weight.mean(1, True), dim=1))
    nearest = int((model.items.weight[3] @ model.items.weight.T).topk(2).indices[1])
    # then
    assert evaluate_ranking(model, [(3,)], [nearest], repeats=True).ndcg[5] == pytest.approx(0.63093, abs=1e-4)
    assert evaluate_ranking(model, [(3,)], [nearest], repeats=False).ndcg[5] == 1.0
    assert evaluate_ranking(model, [(3,)], [3], repeats=False).ndcg[5] == 1.0  # a target is ranked whatever it is


def test_items_that_the_model_does_not_have_are_never_found():
    model = SASRec(5, SMALL)
    ranking = evaluate_ranking(model, [(1, 2), (9,), (1, 9)], [9, 1, 2])
    assert ranking.users == 3
    assert ranking.recall[10] == pytest.approx(1 / 3)  # the third, of whose history one item is known
