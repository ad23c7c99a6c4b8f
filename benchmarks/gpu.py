"""Texts and embeddings on a GPU, beside SentenceTransformer.encode in float16 on it and beside its own bounds.

    python -P benchmarks/gpu.py [--catalogue items.parquet] [--texts 4096] [--embeddings 262144] [--checked 256]

In one process, without HTTP and registry. Without a CUDA device it says so and keeps nothing; `--device cpu` tries it
out. The bound of embeddings is the slower of two things that cannot be left out, each measured alone: the copy of the
rows to the device, and the products of network and search in float32. That of the search, of latents on the device, is
its products in float64. Beside each is what it would be otherwise: without graphs, one part after the other, by torch.
"""

from __future__ import annotations

import copy
import random
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.contents import Texts
from benchmarks.harness import Check, Comparison, Result, keep, limit_threads, median_ms, parser_of, rate, rounds_of
from benchmarks.reference import canonical_codes, parts, residual_quantizer
from benchmarks.text_peers import MODEL
from models import DEFAULT_CHECKPOINT, Tokenizer, load
from models.text_encoder import TextEncoder
from models.tokenizer import EMBEDDINGS_AT_ONCE_ON_DEVICE

OURS, PEER, BOUND = "semid, texts to codes", "SentenceTransformer float16", "copy or products, the slower"
NO_GRAPHS = "semid, without graphs"
EMBEDDINGS, IN_TURN = "semid, embeddings to codes", "semid, one part after the other"
SEARCH, BY_TORCH, PRODUCTS = "semid, search", "semid, search by torch", "its products in float64"


def sentence_transformer(device: str) -> Callable[[Sequence[str], int], Any]:
    """Its `encode` in float16 on the device, given texts and a batch size; done when it returns."""
    from sentence_transformers import SentenceTransformer  # seconds, so not at import

    model = SentenceTransformer(MODEL, device=device, model_kwargs={"dtype": torch.float16})
    return lambda texts, batch: model.encode(list(texts), batch_size=batch, show_progress_bar=False)


def encode(tokenizer: Tokenizer, texts: Sequence[str], batch: int) -> Tensor:
    """Codes (N, L) of texts, in batches of similar length as the service forms them."""
    pieces = tokenizer.split(texts)
    order = sorted(range(len(pieces)), key=lambda row: len(pieces[row]))
    codes = torch.empty(len(pieces), len(tokenizer.codebook_sizes), dtype=torch.int64)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        codes[rows] = tokenizer.encode_texts([pieces[row] for row in rows]).codes
    return codes


def bound(rows: Tensor, device: torch.device) -> float:
    """Rows a second that the copy alone, or the products alone, would let through."""
    network, codebooks = parts().network, [*parts().quantizer.parameters()]
    weights = [layer.weight for layer in network.layers if hasattr(layer, "weight")]
    weights = [weight.detach().to(device, torch.float32).T for weight in weights]
    codewords = [codebook.detach().to(device, torch.float32).T for codebook in codebooks]
    source = rows.pin_memory() if device.type == "cuda" else rows
    here = source.to(device)

    def copy() -> None:
        source.to(device, copy=True)
        wait(device)

    def products() -> None:
        latents = here
        for weight in weights:
            latents = latents @ weight
        for codebook in codewords:
            latents @ codebook
        wait(device)

    for work in (copy, products):
        work()
    return min(rate(len(rows), copy), rate(len(rows), products))


@contextmanager
def without_graphs(text_encoder: TextEncoder) -> Iterator[None]:
    """Every forward pass as it is within."""
    passes = text_encoder._unpadded_passes  # noqa: SLF001
    before = dict(passes)
    passes.update({dtype: getattr(forward, "forward", forward) for dtype, forward in before.items()})
    try:
        yield
    finally:
        passes.update(before)


def searches(tokenizer: Tokenizer, rows: Tensor, device: torch.device, rounds: int) -> Comparison:
    """The search alone, of latents that are on the device, in one batch."""
    quantizer = copy.deepcopy(residual_quantizer()).to(device).requires_grad_(requires_grad=False)
    quantizer.prepare()
    by_torch = copy.deepcopy(quantizer)
    by_torch._search = None  # noqa: SLF001 - as where there is no Triton
    latents = tokenizer.latents(rows).to(device)
    codewords = [codebook.detach().T for codebook in quantizer.codebooks]
    print(f"searches its codebooks by: {quantizer.search}")

    def timed(work: Callable[[], object]) -> Callable[[int], float]:
        def finished() -> None:
            work()
            wait(device)

        finished()
        return lambda _: rate(len(latents), finished)

    paths = {
        SEARCH: timed(lambda: quantizer.encode(latents)),
        BY_TORCH: timed(lambda: by_torch.encode(latents)),
        PRODUCTS: timed(lambda: [latents @ codebook for codebook in codewords]),
    }
    figures = rounds_of(paths, rounds, "rows/s")
    return Comparison("The search of all levels on a GPU", "rows/s", [SEARCH, BY_TORCH], PRODUCTS, figures)


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def run(arguments: Namespace) -> Result:
    """Measure, then compare codes."""
    device, batch = torch.device(arguments.device), arguments.batch
    result, texts = Result("gpu"), Texts(arguments.catalogue)
    tokenizer = load(DEFAULT_CHECKPOINT, device, text_precision=arguments.text_precision, tests_itself=True)
    text_encoder = tokenizer.text_encoder
    assert text_encoder is not None
    print(f"embeds texts by: {text_encoder.forward_pass}; bounds: {tokenizer.bounds}")
    peer = sentence_transformer(arguments.device)
    rounds = [texts.take(arguments.texts) for _ in range(arguments.rounds)]
    alone = texts.take(arguments.rounds * arguments.singles)
    for work in (lambda some: encode(tokenizer, some, batch), lambda some: peer(some, batch)):
        work(rounds[0][: 2 * batch])
        work(alone[:1])
    paths: dict[str, Callable[[int], float]] = {
        OURS: lambda number: rate(len(rounds[number]), lambda: encode(tokenizer, rounds[number], batch)),
        PEER: lambda number: rate(len(rounds[number]), lambda: peer(rounds[number], batch)),
    }
    figures = rounds_of(paths, arguments.rounds, "items/s")
    result.comparisons.append(Comparison("New texts on a GPU", "items/s", [OURS], PEER, figures))

    def singly(work: Callable[[Sequence[str], int], Any]) -> Callable[[int], float]:
        first = arguments.singles
        return lambda number: median_ms(lambda i: work([alone[number * first + i]], 1), arguments.singles)

    def eagerly(some: Sequence[str], size: int) -> Tensor:
        with without_graphs(text_encoder):
            return encode(tokenizer, some, size)

    paths = {
        OURS: singly(lambda some, size: encode(tokenizer, some, size)),
        NO_GRAPHS: singly(eagerly),
        PEER: singly(peer),
    }
    figures = rounds_of(paths, arguments.rounds, "ms")
    result.comparisons.append(
        Comparison("One text alone on a GPU, median time", "ms", [OURS, NO_GRAPHS], PEER, figures)
    )
    few = tokenizer.embed(tokenizer.split(texts.take(64)))
    rows = few[torch.tensor(random.Random(0).choices(range(len(few)), k=arguments.embeddings))]
    rows = rows + 0.01 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    tokenizer.encode(rows)
    parts_in_turn = rows.split(EMBEDDINGS_AT_ONCE_ON_DEVICE)
    paths = {
        EMBEDDINGS: lambda _: rate(len(rows), lambda: tokenizer.encode(rows)),
        IN_TURN: lambda _: rate(len(rows), lambda: [tokenizer.encode(part) for part in parts_in_turn]),
        BOUND: lambda _: bound(rows, device),
    }
    figures = rounds_of(paths, arguments.rounds, "items/s")
    result.comparisons.append(Comparison("Embeddings on a GPU", "items/s", [EMBEDDINGS, IN_TURN], BOUND, figures))
    result.comparisons.append(searches(tokenizer, rows, device, arguments.rounds))
    checked = texts.take(arguments.checked)
    expected = torch.tensor(list(canonical_codes(checked)))
    differ = int((encode(tokenizer, checked, batch) != expected).any(dim=1).sum())
    result.checks.append(Check("Codes, and those of the text alone in float64 on the CPU", len(checked), differ))
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; exit status 1 where any code differs, 0 without a device."""
    parser = parser_of(__doc__)
    parser.add_argument("--catalogue", type=Path, help="texts of this catalogue, made-up ones where absent")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try it out (default %(default)s)")
    parser.add_argument("--text-precision", default="auto", help="as SID_TEXT_PRECISION (default %(default)s)")
    parser.add_argument("--texts", type=int, default=4096, help="texts a round (default %(default)s)")
    parser.add_argument("--singles", type=int, default=50, help="texts alone a round (default %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="texts of one forward pass (default %(default)s)")
    parser.add_argument("--embeddings", type=int, default=262_144, help="embeddings a round (default %(default)s)")
    parser.add_argument("--checked", type=int, default=256, help="texts computed again (default %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.device != "cpu" and not torch.cuda.is_available():
        print("there is no CUDA device here: nothing was measured, and nothing is kept")
        return
    limit_threads(arguments.threads)
    result = run(arguments)
    keep(result, arguments)
    if any(check.differ for check in result.checks):
        sys.exit(1)


if __name__ == "__main__":
    main()
