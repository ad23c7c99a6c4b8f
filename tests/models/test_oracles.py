"""Codes of every family against independent implementations that are given the same codebooks.

The codebooks are those of checkpoints trained and frozen as users' are. A peer computes in float32; where it takes
another codeword than the tokenizer, the first such codeword must be as near as the tokenizer's own up to what float32
can round off, level by level: anything else is another algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import faiss
import nanopq
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.cluster import KMeans
from torch import Tensor, nn
from vector_quantize_pytorch import ResidualVQ

from models import load, read_manifest
from models.checkpoint import DEFAULT_CHECKPOINT, load_parts
from models.product import ProductQuantizer
from models.quantizer import Quantizer
from models.residual import ResidualQuantizer
from models.tokenizer import FAMILIES
from models.tree import TreeQuantizer
from tests.families import rows_of_families


class Frozen(NamedTuple):
    """What a peer is given of a checkpoint, and what to make codes of.

    Attributes:
        quantizer: In float64.
        centre: (D,) float32, of the encoder network.
        weight: (d, D) float32, where the encoder network is one linear map without bias; else None.
        embeddings: (B, D) float32.
        latents: (B, d) float32, rounded from the canonical ones.
    """

    quantizer: Quantizer
    centre: Tensor
    weight: Tensor | None
    embeddings: Tensor
    latents: Tensor


class Answer(NamedTuple):
    """What a peer says.

    Attributes:
        codes: (B, L) int64.
        quantized: (B, d) float, what its codes stand for, among the latents; None where it does not say.
    """

    codes: Tensor
    quantized: Tensor | None = None


Oracle = Callable[[Frozen], Answer]


# The peers


def faiss_residual(frozen: Frozen) -> Answer:
    """faiss' additive quantizer by residuals, greedy."""
    sizes = frozen.quantizer.codebook_sizes
    oracle = faiss.ResidualQuantizer(frozen.latents.shape[1], len(sizes), sizes[0].bit_length() - 1)
    oracle.max_beam_size = 1
    oracle.train_type = faiss.ResidualQuantizer.Skip_codebook_tables
    books = torch.cat(list(frozen.quantizer.codebooks)).detach().float()
    faiss.copy_array_to_vector(books.numpy().ravel(), oracle.codebooks)
    oracle.is_trained = True
    return _unpacked(oracle, frozen)


def residual_vq(frozen: Frozen) -> Answer:
    """The residual quantizer of vector-quantize-pytorch, at inference."""
    sizes = frozen.quantizer.codebook_sizes
    options = {"kmeans_init": False, "rotation_trick": False}
    oracle = ResidualVQ(
        dim=frozen.latents.shape[1], num_quantizers=len(sizes), codebook_size=sizes[0], **options
    ).eval()
    for layer, codebook in zip(oracle.layers, frozen.quantizer.codebooks, strict=True):
        layer._codebook.embed.copy_(codebook.detach()[None])
    with torch.no_grad():
        quantized, codes, _ = oracle(frozen.latents)
    return Answer(codes, quantized)


def faiss_product(frozen: Frozen) -> Answer:
    """faiss' product quantizer."""
    return _unpacked(_faiss_product(frozen.quantizer), frozen)


def faiss_rotated(frozen: Frozen) -> Answer:
    """faiss' OPQ: its rotation of the centred embeddings, then its product quantizer."""
    width = frozen.latents.shape[1]
    rotation = faiss.OPQMatrix(frozen.centre.shape[0], len(frozen.quantizer.codebook_sizes), width)
    faiss.copy_array_to_vector(frozen.weight.numpy().ravel(), rotation.A)
    rotation.is_trained = True
    rotated = torch.from_numpy(rotation.apply((frozen.embeddings - frozen.centre).numpy()))
    return _unpacked(_faiss_product(frozen.quantizer), frozen._replace(latents=rotated))


def nanopq_product(frozen: Frozen) -> Answer:
    """nanopq's product quantizer."""
    oracle = _nanopq_product(frozen.quantizer)
    codes = oracle.encode(frozen.latents.numpy())
    return Answer(torch.from_numpy(codes).long(), torch.from_numpy(oracle.decode(codes)))


def nanopq_rotated(frozen: Frozen) -> Answer:
    """nanopq's OPQ: its rotation of the centred embeddings, then its product quantizer."""
    oracle = nanopq.OPQ(M=len(frozen.quantizer.codebook_sizes), Ks=frozen.quantizer.codebook_sizes[0], verbose=False)
    oracle.pq = _nanopq_product(frozen.quantizer)
    oracle.R = frozen.weight.T.numpy()
    codes = oracle.encode((frozen.embeddings - frozen.centre).numpy())
    return Answer(torch.from_numpy(codes).long())


def sklearn_walk(frozen: Frozen) -> Answer:
    """A walk from the root to a leaf by scikit-learn's `KMeans.predict` at every node."""
    tree = frozen.quantizer
    points = frozen.latents.numpy()
    codes = np.zeros((len(points), len(tree.codebook_sizes)), dtype=np.int64)
    node = np.zeros(len(points), dtype=np.int64)
    for level in range(len(tree.codebook_sizes)):
        offsets = tree.offsets(level).numpy()
        for place in np.unique(node):
            inside = node == place
            children = tree.centres(level)[offsets[place] : offsets[place + 1]].float().numpy()
            # Fitted to the children, each a cluster of its own, the centres are theirs up to rounding; then exactly.
            peer = KMeans(len(children), init=children, n_init=1).fit(children)
            assert np.allclose(peer.cluster_centers_, children, atol=1e-5)
            peer.cluster_centers_ = children
            codes[inside, level] = peer.predict(points[inside])
        node = offsets[node] + codes[:, level]
    return Answer(torch.from_numpy(codes), tree.centres(level)[torch.from_numpy(node)])


# Every family of `models.tokenizer.FAMILIES`, and who else knows its algorithm.
ORACLES: Mapping[str, tuple[Oracle, ...]] = {
    "rqvae": (faiss_residual, residual_vq),
    "rq-kmeans": (faiss_residual, residual_vq),
    "rk-means": (faiss_residual, residual_vq),
    "r-vq": (faiss_residual, residual_vq),
    "hierarchical": (sklearn_walk,),
    "pq": (faiss_product, nanopq_product),
    "opq": (faiss_rotated, nanopq_rotated),
}
CASES = [(family, oracle) for family in FAMILIES for oracle in ORACLES.get(family, ())]


# The measure


def squared_distances(quantizer: Quantizer, latents: Tensor, codes: Tensor) -> Tensor:
    """Of what each level received under these codes to the codeword that it took, (B, L) float64, by differences."""
    if isinstance(quantizer, ResidualQuantizer):
        left = latents[:, None] - quantizer.codewords(codes).cumsum(dim=1)
        return left.square().sum(dim=2)
    if isinstance(quantizer, ProductQuantizer):
        parts = (latents - quantizer.decode(codes)).split(quantizer.widths, dim=1)
        return torch.stack([part.square().sum(dim=1) for part in parts], dim=1)
    assert isinstance(quantizer, TreeQuantizer)
    node, distances = torch.zeros(len(codes), dtype=torch.int64), []
    for level in range(codes.shape[1]):
        node = quantizer.offsets(level)[node] + codes[:, level]
        distances.append((latents - quantizer.centres(level)[node]).square().sum(dim=1))
    return torch.stack(distances, dim=1)


def float32_error(frozen: Frozen) -> Tensor:
    """What float32 may round off a difference of two squared distances, (B,) float64, at any level.

    Of n numbers and vectors no longer than r, a square expanded is off by at most (n + 2) eps r^2; the numbers come
    from a centring, a rotation and L subtractions, each off by less. Twice, for the two distances.
    """
    quantizer = frozen.quantizer
    lengths = [tensor.norm(dim=1).max() for tensor in quantizer.state_dict().values() if tensor.ndim == 2]
    reach = frozen.latents.double().norm(dim=1) + torch.stack(lengths).sum()
    return 4 * (frozen.embeddings.shape[1] + 8) * torch.finfo(torch.float32).eps * reach.square()


def excess(frozen: Frozen, ours: Tensor, theirs: Tensor) -> Tensor:
    """By how much (n,) the peer's first other codeword is farther than ours, squared, less what float32 rounds off."""
    rows = (ours != theirs).any(dim=1).nonzero().flatten()
    level = (ours != theirs)[rows].int().argmax(dim=1, keepdim=True)
    latents = frozen.latents[rows].double()
    # What follows the first other one is of another path; the first codes, which are always there, stand in for it.
    upto = torch.where(torch.arange(ours.shape[1]) <= level, theirs[rows], 0)
    near, far = (
        squared_distances(frozen.quantizer, latents, codes).gather(1, level)[:, 0] for codes in (ours[rows], upto)
    )
    return far - near - float32_error(frozen)[rows]


# The tests


@pytest.fixture(scope="module")
def frozen_families(families: dict[str, Path]) -> dict[str, Frozen]:
    """What the peers are given, of each family."""
    return {family: frozen_of(directory, rows_of_families()) for family, directory in families.items()}


def frozen_of(directory: Path, embeddings: Tensor) -> Frozen:
    parts = load_parts(directory, read_manifest(directory))
    linears = [layer for layer in parts.network.layers if isinstance(layer, nn.Linear)]
    weight = linears[0].weight.detach().clone() if len(linears) == 1 and not linears[0].bias.any() else None
    with torch.no_grad():
        latents = parts.network.double()(embeddings.double()).float()
    return Frozen(parts.quantizer.double(), parts.network.centre.float(), weight, embeddings, latents)


def test_every_family_has_an_oracle() -> None:
    missing = set(FAMILIES) - {family for family, _ in CASES}
    assert not missing, f"families whose codes nothing independent confirms: {sorted(missing)}"


@pytest.mark.parametrize(("family", "oracle"), CASES)
def test_codes_are_those_of_an_independent_implementation_with_the_same_parameters(
    family: str, oracle: Oracle, families: dict[str, Path], frozen_families: dict[str, Frozen]
) -> None:
    # given
    frozen = frozen_families[family]
    ours = load(families[family]).encode(frozen.embeddings)
    # when
    theirs = oracle(frozen)
    # then they differ where float32 cannot tell, and hardly anywhere
    assert theirs.codes.shape == ours.codes.shape
    assert (ours.codes == theirs.codes).all(dim=1).float().mean() > 0.99
    assert (excess(frozen, ours.codes, theirs.codes) <= 0).all()
    if theirs.quantized is not None:
        quantized = frozen.quantizer.decode(theirs.codes).detach()
        assert torch.allclose(quantized, theirs.quantized.double(), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_peer_that_took_the_second_nearest_codeword_would_be_told_from_rounding(
    family: str, frozen_families: dict[str, Frozen]
) -> None:
    # given each row's second-nearest codeword of the last level; an only child has none
    frozen = frozen_families[family]
    quantization = frozen.quantizer.quantize(frozen.latents.double())
    second = frozen.quantizer.rank(quantization, 2).codes[:, 1:]
    # when
    found = excess(frozen, quantization.codes, torch.cat([quantization.codes[:, :-1], second], dim=1))
    # then
    assert len(found) > 2_000
    assert (found > 0).float().mean() > 0.99


def test_the_default_checkpoint_s_codes_are_those_of_faiss_and_of_vector_quantize_pytorch() -> None:
    # given the codebooks that ship, and latents as long as the codewords of the first level
    state = load_file(DEFAULT_CHECKPOINT / "model.safetensors")
    manifest = read_manifest(DEFAULT_CHECKPOINT)
    quantizer = ResidualQuantizer(manifest.codebook_sizes, manifest.widths[-1])
    quantizer.load_state_dict({k.removeprefix("quantizer."): v for k, v in state.items() if k.startswith("quantizer.")})
    quantizer.double()
    latents = torch.randn(5_000, quantizer.dimension, generator=torch.Generator().manual_seed(7))
    latents *= quantizer.scale / quantizer.dimension**0.5
    frozen = Frozen(quantizer, torch.zeros(manifest.widths[0]), None, latents, latents)
    # when
    ours = quantizer.quantize(latents.double()).codes
    # then
    for oracle in (faiss_residual, residual_vq):
        theirs = oracle(frozen).codes
        assert (ours == theirs).all(dim=1).float().mean() > 0.99
        assert (excess(frozen, ours, theirs) <= 0).all()


def _faiss_product(quantizer: Quantizer) -> faiss.ProductQuantizer:
    sizes = quantizer.codebook_sizes
    oracle = faiss.ProductQuantizer(quantizer.dimension, len(sizes), sizes[0].bit_length() - 1)
    books = torch.cat([codebook.detach().float().ravel() for codebook in quantizer.codebooks])
    faiss.copy_array_to_vector(books.numpy(), oracle.centroids)
    return oracle


def _nanopq_product(quantizer: Quantizer) -> nanopq.PQ:
    sizes = quantizer.codebook_sizes
    oracle = nanopq.PQ(M=len(sizes), Ks=sizes[0], verbose=False)
    oracle.codewords = torch.stack(list(quantizer.codebooks)).detach().float().numpy()
    oracle.Ds = oracle.codewords.shape[2]
    return oracle


def _unpacked(oracle: faiss.ResidualQuantizer | faiss.ProductQuantizer, frozen: Frozen) -> Answer:
    """The codes that faiss packs into bytes, and what it decodes them to."""
    packed = oracle.compute_codes(np.ascontiguousarray(frozen.latents.numpy()))
    sizes = frozen.quantizer.codebook_sizes
    codes = faiss.unpack_bitstrings(packed, len(sizes), sizes[0].bit_length() - 1)
    return Answer(torch.from_numpy(codes.astype(np.int64)), torch.from_numpy(oracle.decode(packed)))
