"""Codes that change with what a content is computed beside: any other than none is a fault.

    python -P benchmarks/flips.py [--texts 256] [--embeddings 20000] [--catalogue items.parquet]

Every content is computed alone in float64, then by the fast path in batches of several sizes, in another order, beside
much longer texts that pad the batch, and with other numbers of threads; the codes have to be equal.
"""

from __future__ import annotations

import random
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.contents import Texts
from benchmarks.embeddings import made_up
from benchmarks.harness import Check, Result, keep, limit_threads, parser_of
from benchmarks.reference import canonical_codes, canonical_codes_of_embeddings, tokenizer

TEXT_BATCHES = (1, 2, 3, 7, 32, 256)
EMBEDDING_BATCHES = (1, 3, 7, 64, 1024, 16_384)
LONG = "a much longer text that fills the rest of this batch with padding " * 40

Encode = Callable[[Sequence[Any]], Tensor]


def conditions(encode: Encode, batches: Sequence[int], neighbour: Any) -> dict[str, Encode]:
    """Ways to compute the same contents: title -> contents to codes (B, L)."""
    ways = {f"batches of {size:,}": partial(in_batches, encode, size) for size in batches}
    ways["another order, batches of 32"] = partial(shuffled, encode)
    ways["beside a long or strange neighbour"] = partial(beside, encode, neighbour)
    for threads in sorted({1, 2, 4} - {torch.get_num_threads()}):
        ways[f"{threads} threads, batches of 32"] = partial(with_threads, encode, threads)
    return ways


def in_batches(encode: Encode, size: int, contents: Sequence[Any]) -> Tensor:
    """In batches of a size, in order."""
    return torch.cat([encode(contents[start : start + size]) for start in range(0, len(contents), size)])


def shuffled(encode: Encode, contents: Sequence[Any]) -> Tensor:
    """In another order, and back."""
    order = random.Random(0).sample(range(len(contents)), len(contents))
    codes = in_batches(encode, 32, [contents[place] for place in order])
    return codes[torch.tensor(order).argsort()]


def beside(encode: Encode, neighbour: Any, contents: Sequence[Any]) -> Tensor:
    """Each batch with a neighbour of another kind at its end."""
    parts = [contents[start : start + 31] for start in range(0, len(contents), 31)]
    return torch.cat([encode([*part, neighbour])[:-1] for part in parts])


def with_threads(encode: Encode, threads: int, contents: Sequence[Any]) -> Tensor:
    """On other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return in_batches(encode, 32, contents)
    finally:
        torch.set_num_threads(before)


def count(kind: str, contents: Sequence[Any], reference: Tensor, ways: dict[str, Encode]) -> list[Check]:
    """Flips under each condition."""
    checks = []
    for title, codes_of in ways.items():
        differ = int((codes_of(contents) != reference).any(dim=1).sum())
        checks.append(Check(f"{kind}, {title}", len(contents), differ))
        print(f"{checks[-1].title}: {differ:,} of {len(contents):,} differ", flush=True)
    return checks


def run(arguments: Namespace) -> Result:
    """Texts, then embeddings."""
    model, result = tokenizer(), Result("flips")
    if arguments.texts:
        texts = Texts(arguments.catalogue).take(arguments.texts)
        reference = torch.tensor(list(canonical_codes(texts)))
        pieces, (long,) = model.split(texts), model.split([LONG])
        ways = conditions(lambda some: model.encode_texts(some).codes, TEXT_BATCHES, long)
        result.checks += count("Texts", pieces, reference, ways)
    if arguments.embeddings:
        embeddings = torch.from_numpy(made_up().take(arguments.embeddings))
        reference = canonical_codes_of_embeddings(embeddings)
        rows = list(embeddings)
        ways = conditions(lambda some: model.encode(torch.stack(list(some))).codes, EMBEDDING_BATCHES, 1000 * rows[0])
        result.checks += count("Embeddings", rows, reference, ways)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Run the count; exit status 1 where any code changed."""
    parser = parser_of(__doc__, rounds=1)
    parser.add_argument("--catalogue", type=Path, help="texts of this catalogue, made-up ones where absent")
    parser.add_argument("--texts", type=int, default=256, help="texts (default %(default)s)")
    parser.add_argument("--embeddings", type=int, default=20_000, help="embeddings (default %(default)s)")
    arguments = parser.parse_args(argv)
    limit_threads(arguments.threads)
    result = run(arguments)
    keep(result, arguments)
    if any(check.differ for check in result.checks):
        sys.exit(1)


if __name__ == "__main__":
    main()
