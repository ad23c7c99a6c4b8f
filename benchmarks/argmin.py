"""Residual quantization alone beside other libraries that are given the same codebooks and the same latents.

    python -P benchmarks/argmin.py [--rows 16384]

Codebooks and latents are those of the default tokenizer, so are the codes; each library's are compared with the codes
of each row alone in float64. Ours also yields each row's margin and quantization error, as the service takes them; by
the margin a row that rounding leaves in doubt is found, which no peer does. Compiled, its codes are those of float64
whether the latents come in float32, as the peers', or in float64, as in the service; torch searches where nothing was
compiled.
"""

from __future__ import annotations

import copy
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.embeddings import made_up
from benchmarks.harness import Check, Comparison, Result, keep, limit_threads, parser_of, rate, rounds_of
from benchmarks.reference import parts, residual_quantizer
from models.residual import ResidualQuantizer

FLOAT32, FLOAT64, TORCH = "semid, float32 latents", "semid, float64 latents", "semid by torch, float64"
FAISS = "faiss, beam 1"

Encode = Callable[[Tensor], Tensor]


def ours(quantizer: ResidualQuantizer, dtype: torch.dtype) -> Encode:
    """Our own, of latents of a precision."""
    prepared = copy.deepcopy(quantizer).to(dtype)
    prepared.prepare()
    print(f"{dtype}: {prepared.search}")
    return lambda latents: prepared.encode(latents.to(dtype)).codes


def ours_by_torch(quantizer: ResidualQuantizer) -> Encode:
    """Our own without the compiled search."""
    prepared = copy.deepcopy(quantizer)
    prepared.prepare()
    prepared._search = None  # noqa: SLF001 - as after an installation without a compiler
    return lambda latents: prepared.encode(latents.double()).codes


def faiss_residual(quantizer: ResidualQuantizer) -> Encode:
    """The additive quantizer of faiss by residuals, greedy (its default beam of 5 finds other codes)."""
    import faiss

    sizes = quantizer.codebook_sizes
    peer = faiss.ResidualQuantizer(quantizer.dimension, len(sizes), sizes[0].bit_length() - 1)
    peer.max_beam_size = 1
    peer.train_type = faiss.ResidualQuantizer.Skip_codebook_tables
    faiss.copy_array_to_vector(np.concatenate(codebooks_of(quantizer)).ravel(), peer.codebooks)
    peer.is_trained = True
    faiss.omp_set_num_threads(torch.get_num_threads())
    bits = sizes[0].bit_length() - 1

    def encode(latents: Tensor) -> Tensor:
        packed = peer.compute_codes(latents.numpy())
        return torch.from_numpy(faiss.unpack_bitstrings(packed, len(sizes), bits).astype(np.int64))

    return encode


def vector_quantize_pytorch(quantizer: ResidualQuantizer) -> Encode:
    """Its ResidualVQ, at inference."""
    from vector_quantize_pytorch import ResidualVQ

    sizes = quantizer.codebook_sizes
    options = {"kmeans_init": False, "rotation_trick": False}
    peer = ResidualVQ(dim=quantizer.dimension, num_quantizers=len(sizes), codebook_size=sizes[0], **options).eval()
    for layer, codebook in zip(peer.layers, codebooks_of(quantizer), strict=True):
        layer._codebook.embed.copy_(torch.from_numpy(codebook)[None])  # noqa: SLF001 - there is no public way in
    return lambda latents: peer(latents)[1]


def semantic_id(quantizer: ResidualQuantizer) -> Encode:
    """Its residual k-means on torch, without the network that its RQ-VAE would add."""
    from semantic_id.algorithms.rq_kmeans_torch import RQKMeansTorch

    settings = {"metric": "l2", "implementation": "kmeans", "max_iter": 1, "tol": 0.0, "random_state": 0}
    peer = RQKMeansTorch(
        len(quantizer.codebook_sizes), list(quantizer.codebook_sizes), **settings, verbose=False, device="cpu"
    )
    peer.codebooks_ = [torch.from_numpy(codebook) for codebook in codebooks_of(quantizer)]
    return lambda latents: torch.from_numpy(peer.encode(latents)).long()


def codebooks_of(quantizer: ResidualQuantizer) -> list[NDArray[np.float32]]:
    """The codebooks (K, d) float32 of each level."""
    return [codebook.detach().float().numpy() for codebook in quantizer.codebooks]


PEERS = {
    FAISS: faiss_residual,
    "vector-quantize-pytorch": vector_quantize_pytorch,
    "semantic-id": semantic_id,
}


@torch.inference_mode()
def run(arguments: Namespace) -> Result:
    """Compare codes, then measure each batch size."""
    result = Result("argmin")
    quantizer = residual_quantizer()
    embeddings = torch.from_numpy(made_up().take(arguments.rows)).double()
    latents = parts().network(embeddings).float()
    paths = {FLOAT32: ours(quantizer, torch.float32), FLOAT64: ours(quantizer, torch.float64)}
    paths[TORCH] = ours_by_torch(quantizer)
    for name, make in PEERS.items():
        try:
            paths[name] = make(quantizer)
        except ImportError as error:
            result.skipped[name] = f"not installed: {error}"
    checked = latents[: arguments.checked]
    reference = torch.cat([quantizer.quantize(row, exact=True).codes for row in checked.double().split(1)])
    for name, encode in paths.items():
        differ = int((encode(checked) != reference).any(dim=1).sum())
        result.checks.append(Check(f"Codes of {name}, and those of each row alone in float64", len(checked), differ))
    for batch in arguments.batches:
        some = latents[: max(batch, min(arguments.rows, 256 * batch))]
        figures = rounds_of(
            {name: lambda _, encode=encode: fastest(encode, some, batch) for name, encode in paths.items()},  # type: ignore[misc]  # noqa: B023
            arguments.rounds,
            "rows/s",
        )
        mine = [FLOAT32, FLOAT64, TORCH]
        against = FAISS if FAISS in paths else FLOAT32
        result.comparisons.append(Comparison(f"Argmin of batches of {batch:,}", "rows/s", mine, against, figures))
    return result


def fastest(encode: Encode, latents: Tensor, batch: int) -> float:
    """Rows a second in batches of a size; the best of three, as others on the machine only ever slow it down."""
    pieces = [piece.contiguous() for piece in latents.split(batch)]
    return max(rate(len(latents), lambda: [encode(piece) for piece in pieces]) for _ in range(3))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=16_384, help="latents, at most (default %(default)s)")
    parser.add_argument("--checked", type=int, default=4096, help="rows whose codes are compared (default %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256, 1024, 16_384], help="batch sizes")
    arguments = parser.parse_args(argv)
    limit_threads(arguments.threads)
    keep(run(arguments), arguments)


if __name__ == "__main__":
    main()
