"""What an RQ-VAE may be trained for beside reconstruction: contrasts within a batch.

With s(a, b) the cosine of two vectors, t a temperature, and j over i itself and all rows of the batch whose b differs
from b_i (InfoNCE: van den Oord et al., 2018):

    contrast(a, b) = - mean_i log( exp(s(a_i, b_i) / t) / sum_j exp(s(a_i, b_j) / t) )

`contrastive` is CoST's term (Zhu et al., RecSys 2024): contrast(x^, x), the reconstruction against the embeddings. Both
are centred first, so that what all items have in common tells nothing.

`collaborative` is LETTER's (Wang et al., CIKM 2024, L_CF): contrast(z^, h), the quantized latent against item
embeddings from sequences, centred. LETTER takes inner products at temperature 1; cosines make the term independent of
the units of z and h. A linear map brings z^ to the width of h where they differ; it is trained along and not frozen.
"""

from __future__ import annotations

import torch
from torch import Tensor


def contrast(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """InfoNCE in nats, () float: each query against its own key and the batch's others.

    A key equal to the row's own is no negative: one item drawn twice, or two with the same content.

    Args:
        queries: (B, d) float.
        keys: (B, d) float, without gradient.
        temperature: t, above 0.
    """
    if not len(queries):
        return queries.sum()
    logits = _unit(queries) @ _unit(keys).T / temperature
    group = keys.unique(dim=0, return_inverse=True)[1]
    equal = group[:, None] == group
    equal.fill_diagonal_(fill_value=False)
    logits = logits.float().masked_fill(equal, -torch.inf)
    return (logits.logsumexp(dim=1) - logits.diagonal()).mean()


def collaborative_contrast(latents: Tensor, collaborative: Tensor, temperature: float) -> Tensor:
    """`contrast` of latents (B, c) with collaborative embeddings (B, c), without the rows of which those are NaN."""
    known = collaborative.isfinite().all(dim=1)
    return contrast(latents[known], collaborative[known], temperature)


def centred(collaborative: Tensor | None, items: int) -> Tensor:
    """Collaborative embeddings (N, c) of so many items, less their mean; rows of NaN have none.

    Raises:
        ValueError: They are missing, or not of so many items, or all but one are NaN.
    """
    if collaborative is None:
        raise ValueError("loss.collaborative is above 0, but there are no collaborative embeddings")
    if collaborative.ndim != 2 or len(collaborative) != items:
        raise ValueError(f"collaborative embeddings of {items:,} items expected, got {tuple(collaborative.shape)}")
    known = collaborative.isfinite().all(dim=1)
    if int(known.sum()) < 2:
        raise ValueError("fewer than 2 items have a collaborative embedding; there is nothing to contrast")
    return collaborative.float() - collaborative[known].float().mean(dim=0)


def _unit(vectors: Tensor) -> Tensor:
    """Vectors (B, d) of length 1; the small number keeps the gradient of a zero finite."""
    return vectors * (vectors.square().sum(dim=1, keepdim=True) + 1e-12).rsqrt()
