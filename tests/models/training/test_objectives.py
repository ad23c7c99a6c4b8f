"""The objectives beside reconstruction: each moves what it claims to move."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.training.fit import FitConfig, fit
from models.training.objectives import collaborative_contrast, contrast
from models.training.rqvae import LossConfig

SMALL = FitConfig(codebook_sizes=(8, 8, 8), latent=4, hidden=(), epochs=3, batch_rows=128, held_out=0.1)


def test_the_contrast_is_that_of_its_equation(generator):
    # given
    queries, keys = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    # when
    value = contrast(queries, keys, 0.5)
    # then
    logits = torch.nn.functional.cosine_similarity(queries[:, None], keys[None], dim=2) / 0.5
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(6))
    assert float(value) == pytest.approx(float(expected), rel=1e-6)


def test_a_key_that_equals_the_row_s_own_is_no_negative(generator):
    # given a batch in which one item was drawn three times
    queries, keys = torch.randn(2, 6, 5, generator=generator)
    drawn = torch.tensor([0, 1, 2, 3, 4, 5, 2, 2])
    # when
    repeated = contrast(queries[drawn], keys[drawn], 0.5)
    # then its terms are those it has where the others are there once, but for the others' doubled negatives
    logits = torch.nn.functional.cosine_similarity(queries[drawn][:, None], keys[drawn][None], dim=2) / 0.5
    others = (drawn[:, None] != drawn) | torch.eye(8, dtype=torch.bool)
    terms = [
        float(row[mask].logsumexp(0) - row[place]) for place, (row, mask) in enumerate(zip(logits, others, strict=True))
    ]
    assert float(repeated) == pytest.approx(sum(terms) / 8, rel=1e-5)
    assert float(contrast(queries[:1].repeat(4, 1), keys[:1].repeat(4, 1), 0.5)) == pytest.approx(0, abs=1e-6)


def test_items_without_a_collaborative_embedding_are_skipped(generator):
    # given
    latents = torch.randn(6, 5, generator=generator).requires_grad_()
    keys = torch.randn(6, 5, generator=generator)
    holes = keys.clone()
    holes[[1, 4]] = torch.nan
    some = [0, 2, 3, 5]
    # when
    value = collaborative_contrast(latents, holes, 0.2)
    value.backward()
    # then
    assert torch.allclose(value, contrast(latents[some], keys[some], 0.2))
    assert latents.grad.isfinite().all()
    assert not latents.grad[[1, 4]].any()
    nobody = collaborative_contrast(latents, torch.full((6, 5), torch.nan), 0.2)
    nobody.backward()
    assert nobody.item() == 0


@pytest.mark.parametrize("collaborative", [None, torch.zeros(7, 3), torch.full((600, 3), torch.nan)])
def test_a_collaborative_term_without_its_data_is_refused(collaborative, clustered):
    with pytest.raises(ValueError, match="collaborative embedding"):
        fit(clustered, replace(SMALL, loss=LossConfig(collaborative=0.02)), collaborative=collaborative)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (LossConfig(reconstruction=0.0), r"one of loss\.reconstruction"),
        (LossConfig(contrastive_temperature=0.0), r"loss\.contrastive_temperature"),
    ],
)
def test_losses_that_train_nothing_are_refused(loss, message, clustered):
    with pytest.raises(ValueError, match=message):
        fit(clustered, replace(SMALL, loss=loss))


@pytest.mark.parametrize("width", [4, 6])
def test_collaborative_embeddings_of_any_width_can_be_aligned_to(width, clustered, generator):
    collaborative = torch.randn(600, width, generator=generator)
    collaborative[::3] = torch.nan
    fitted = fit(clustered, replace(SMALL, loss=LossConfig(collaborative=0.1)), collaborative=collaborative)
    assert all(tensor.isfinite().all() for tensor in fitted.model.state_dict().values())
