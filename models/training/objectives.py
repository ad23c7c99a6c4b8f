"""What an RQ-VAE may be trained for beside reconstruction: contrasts within a batch.

With s(a, b) the cosine of two vectors, t a temperature, and j over i itself and all rows of the batch whose b differs
from b_i (InfoNCE: van den Oord et al., 2018):

    contrast(a, b) = - mean_i log( exp(s(a_i, b_i) / t) / sum_j exp(s(a_i, b_j) / t) )

`contrastive` is CoST's term (Zhu et al., RecSys 2024): contrast(x^, x), the reconstruction against the embeddings. Both
are centred first, so that what all items have in common tells nothing.

`collaborative` is LETTER's (Wang et al., CIKM 2024, L_CF): contrast(z^, h), the quantized latent against item
embeddings from sequences, centred. LETTER takes inner products at temperature 1; cosines make the term independent of
the units of z and h. A linear map brings z^ to the width of h where they differ; it is trained along and not frozen.

`diversity` is LETTER's too (L_Div). A level's codewords are put into clusters of about equal size, anew each epoch.
With e_i the codeword that row i chose, e_+ another of its cluster, and j over all codewords but e_i:

    diversity = - mean_i log( exp(<e_i, e_+>) / sum_j exp(<e_i, e_j>) )

LETTER draws one e_+ for each row; here it is the mean over all, what those draws are on average. Inner products are in
units of the codebook's mean squared norm, which LETTER's are not: deeper levels are as far apart as the first then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.training.kmeans import KMeansConfig, assign_balanced, kmeans
from models.training.watch import Trained

CHUNK_ROWS = 1024

BALANCED = KMeansConfig(balanced=True)


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


@torch.no_grad()
def mean_contrast(latents: Tensor, collaborative: Tensor, temperature: float) -> float:
    """`collaborative_contrast` of rows (n, c), in batches, in nats: how well those fit that were not trained on."""
    batches = zip(latents.split(CHUNK_ROWS), collaborative.to(latents.device).split(CHUNK_ROWS), strict=True)
    losses = [collaborative_contrast(*batch, temperature) * len(batch[0]) for batch in batches]
    return float(torch.stack(losses).sum()) / len(latents)


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


@torch.no_grad()
def missed_reconstructions(model: Trained, embeddings: Tensor, codes: Tensor) -> float:
    """Share of rows to whose reconstruction another one's embedding is nearer in direction than their own.

    What `contrastive` is trained for, as a figure that no temperature changes. Equal embeddings are one.

    Args:
        model: What decodes.
        embeddings: (n, D) float.
        codes: (n, L) int64, theirs.
    """
    centre = model.decoder.centre
    targets, own = (embeddings - centre).unique(dim=0, return_inverse=True)
    directions = _unit(targets)
    missed = 0
    for rows in torch.arange(len(codes)).split(CHUNK_ROWS):
        rebuilt = model.decoder(model.quantizer.decode(codes[rows].to(centre.device))) - centre
        missed += int(((rebuilt @ directions.T).argmax(dim=1) != own[rows]).sum())
    return missed / max(1, len(codes))


def cluster_codewords(codebook: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """The cluster (K,) int64 of each codeword, by balanced k-means; K / 2 clusters at most, so that there are pairs.

    Args:
        codebook: (K, d) float.
        clusters: How many are wanted.
        generator: Of the random start.
    """
    codewords = codebook.detach().cpu()
    centres = kmeans(codewords, max(1, min(clusters, len(codewords) // 2)), generator, config=BALANCED).codebook
    return assign_balanced(codewords, centres)[0].to(codebook.device)


def diversity(codebook: Tensor, codes: Tensor, clusters: Tensor) -> Tensor:
    """LETTER's diversity term of one level in nats, () float, with gradient to the codebook.

    Args:
        codebook: (K, d) float.
        codes: (B,) int64, the rows' choices.
        clusters: (K,) int64, of each codeword; one alone in its cluster has no e_+ and counts 0.
    """
    chosen, counts = codes.unique(return_counts=True)
    scale = codebook.detach().square().sum(dim=1).mean().clamp_min(1e-12)
    logits = (codebook[chosen] @ codebook.T / scale).float()
    itself = chosen[:, None] == torch.arange(len(codebook), device=codebook.device)
    # Not infinite: a codebook of one codeword has no other, and NaN is no gradient.
    others = logits.masked_fill(itself, torch.finfo(logits.dtype).min)
    together = (clusters[chosen, None] == clusters) & ~itself
    positives = together.sum(dim=1)
    attraction = torch.where(together, logits, 0.0).sum(dim=1) / positives.clamp_min(1)
    losses = torch.where(positives > 0, others.logsumexp(dim=1) - attraction, 0.0)
    mean: Tensor = (losses * counts).sum() / len(codes)
    return mean


def _unit(vectors: Tensor) -> Tensor:
    """Vectors (B, d) of length 1; the small number keeps the gradient of a zero finite."""
    return vectors * (vectors.square().sum(dim=1, keepdim=True) + 1e-12).rsqrt()
