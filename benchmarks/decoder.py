"""What a decoder pays: changes to a large trie, beside a sort of everything; and one step of a constrained search.

python benchmarks/decoder.py [--ids 1000000] [--changes 1000] [--device cpu]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from models import Trie
from models.constraint import LiveSemanticIds
from models.vocabulary import Vocabulary

SIZES = (256, 256, 256, 256)
BEAMS = 10
FIRST_TOKEN = 32_000
REPEATS = 7


def fastest_ms(work: Callable[[], object]) -> float:
    """The time of a call when the machine is least busy with other things."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - began))
    return min(times)


def random_ids(number: int, device: str) -> torch.Tensor:
    """IDs without suffixes but 0, (N, 5) int64."""
    codes = torch.randint(0, 256, (number, len(SIZES)), device=device)
    return torch.cat([codes, torch.zeros_like(codes[:, :1])], dim=1)


def main() -> None:
    """Print both figures, each beside its peer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ids", type=int, default=1_000_000)
    parser.add_argument("--changes", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    ids = random_ids(chosen.ids, chosen.device)
    trie = Trie.of(ids, SIZES)
    half = chosen.changes // 2
    changes = torch.cat([ids[:half], random_ids(chosen.changes - half, chosen.device)])
    live = torch.arange(len(changes), device=chosen.device) >= half
    after = torch.cat([ids[half:], changes[half:]])
    print(f"{chosen.ids:,} IDs on {chosen.device}, {torch.get_num_threads()} threads")
    if torch.equal(trie.updated(changes, live, 1).semantic_ids(), Trie.of(after, SIZES, 1).semantic_ids()):
        print("the updated trie is that of a fresh sort")
    spliced, sorted_anew = (
        fastest_ms(lambda: trie.updated(changes, live, 1)),
        fastest_ms(lambda: Trie.of(after, SIZES, 1)),
    )
    print(f"{chosen.changes:,} changes: {spliced:.1f} ms spliced, {sorted_anew:.1f} ms by a sort of all IDs")

    for rows in (BEAMS, 64 * BEAMS):
        print_steps(ids, rows)


def print_steps(ids: torch.Tensor, rows: int) -> None:
    """What each step of a search costs, the end being the last; beside it, a mere copy of the scores."""
    vocabulary = Vocabulary.contiguous(SIZES, 16, first=FIRST_TOKEN, end=2).to(ids.device)
    said = ids[torch.randint(0, len(ids), (rows,), device=ids.device)]
    input_ids = torch.cat([torch.zeros_like(said[:, :1]), vocabulary.write(said)], dim=1)
    scores = torch.randn(rows, FIRST_TOKEN + sum(SIZES) + 16, device=ids.device)
    for name, number in (("all", len(ids)), ("a hundredth", len(ids) // 100)):
        trie = Trie.of(torch.cat([ids[:number], said]), SIZES)
        only_live = LiveSemanticIds(trie, vocabulary, begins_at=1, num_beams=BEAMS)
        steps = [fastest_ms(partial(only_live, input_ids[:, :end], scores)) for end in range(1, len(SIZES) + 3)]
        print(f"{rows} beams, {name} of the IDs: {', '.join(f'{step:.1f}' for step in steps)} ms a step")
    print(f"{rows} beams: {fastest_ms(partial(torch.full_like, scores, 0.0)):.1f} ms to write as many scores")


if __name__ == "__main__":
    main()
