"""The generator: what it sees, what it scores, and that it comes back from disk as it was."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from models import CheckpointError
from models.tiger import CONFIG, WEIGHTS, Tiger, TigerConfig, user_tokens

SMALL = TigerConfig(
    (8, 8),
    3,
    users=5,
    width=16,
    encoder_layers=2,
    decoder_layers=2,
    heads=2,
    head_width=8,
    hidden=32,
    looks_ahead=False,
)


def made(config: TigerConfig = SMALL) -> Tiger:
    torch.manual_seed(0)
    return Tiger(config).eval()


def sequences(model: Tiger, users: int = 3, items: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randint(size, (users * items,), generator=drawn) for size in (8, 8, 3)], dim=1)
    return torch.arange(users), model.vocabulary.write(ids).unflatten(0, (users, items))


@torch.inference_mode()
def test_every_item_of_a_sequence_is_scored_as_if_it_were_the_last() -> None:
    model = made()
    users, items = sequences(model)

    together = model(users, items, first=1)

    alone = [model(users, items[:, : last + 1])[:, 0] for last in range(1, 6)]
    torch.testing.assert_close(together, torch.stack(alone, dim=1))


@torch.inference_mode()
def test_a_score_knows_neither_its_own_token_nor_what_comes_after() -> None:
    model = made()
    users, items = sequences(model)
    before = model(users, items, first=1)
    items[:, 3, 1] = 10  # the second token of the fourth item

    after = model(users, items, first=1)

    same = (before == after).all(dim=3).all(dim=0)
    assert same[:2].all()
    assert same[2].tolist() == [True, True, False]
    assert not same[3:].any()


@torch.inference_mode()
def test_an_encoder_that_looks_ahead_lets_an_item_see_those_after_it() -> None:
    for looks_ahead in (True, False):
        model = made(replace(SMALL, looks_ahead=looks_ahead))
        users, items = sequences(model)
        before = model.encode(users, items)
        items[:, -1] = items[:, 0]

        same = bool((model.encode(users, items)[:, :4] == before[:, :4]).all())

        assert same is not looks_ahead


def test_several_targets_are_refused_where_they_would_be_seen() -> None:
    model = made(replace(SMALL, looks_ahead=True))
    with pytest.raises(ValueError, match="items from 1 of 6"):
        model(*sequences(model), first=1)


def test_the_paper_has_about_five_million_parameters_beside_its_tables() -> None:
    model = Tiger(TigerConfig((256, 256, 256), 16))

    tables = model.users.weight.numel() + model.t5.shared.weight.numel()
    assert sum(parameter.numel() for parameter in model.parameters()) - tables == pytest.approx(4.46e6, rel=0.01)


@torch.inference_mode()
def test_a_generator_comes_back_from_disk_as_it_was(tmp_path) -> None:
    model = made()
    model.save(tmp_path, {"seed": 3})

    again = Tiger.load(tmp_path)

    assert again.config == model.config
    assert json.loads((tmp_path / CONFIG).read_text())["notes"] == {"seed": 3}
    torch.testing.assert_close(again(*sequences(model)), model(*sequences(model)), rtol=0, atol=0)


@pytest.mark.parametrize("spoiled", [WEIGHTS, CONFIG])
def test_a_spoiled_generator_is_refused(tmp_path, spoiled: str) -> None:
    made().save(tmp_path, {})
    (tmp_path / spoiled).write_bytes((tmp_path / spoiled).read_bytes()[:-9])

    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Tiger.load(tmp_path)


def test_a_user_has_the_same_token_in_every_run() -> None:
    assert user_tokens(["ann", "bob", "ann"], 2000).tolist() == [837, 1842, 837]
