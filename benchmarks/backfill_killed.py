"""A catalogue of embeddings by semid backfill, killed twice on its way and not: the tables are compared row by row.

    python -P benchmarks/backfill_killed.py [--items 1000000] [--base embeddings.npy ...] [--engine local]

Items are made of pairs of real embeddings (`Recombined`), written to Parquet, and backfilled into empty registries by
two workers: once in peace, and once killed (SIGKILL) in the middle of the codes and in the middle of the
claims, and gone on with.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.backfill_command import Command, base_of, parser_of_catalogue, write_catalogue
from benchmarks.harness import Check, Result, keep


def third_of_codes(blocks: int) -> Callable[[Path], bool]:
    """Whether a third of the blocks has its codes."""
    return lambda journal: len(list(journal.glob("codes/*/0*.arrow"))) * 3 >= blocks


def amid_claims(journal: Path) -> bool:
    """Whether half of the runs is claimed, or the next one is being claimed."""
    if not (journal / "cuts.npy").exists():
        return False
    runs = len(np.load(journal / "cuts.npy", allow_pickle=False)) - 1
    return (journal / "claims" / f"{runs // 2:06}.known").exists()


def run(arguments: Namespace) -> Result:
    """Compare."""
    differ = 0
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory(prefix="semid-") as scratch:
            items = write_catalogue(Path(scratch) / "items", base_of(arguments.base), arguments.items)
            peace, killed = (
                Command(items, Path(scratch) / place, arguments.engine, arguments.workers, arguments.items)
                for place in ("peace", "killed")
            )
            peace.run()
            blocks = len(list(peace.table()))
            killed.run_until(third_of_codes(blocks))
            killed.run_until(amid_claims)
            killed.run()
            for one, other in zip(peace.table(), killed.table(), strict=True):
                differ += sum(a != b for a, b in zip(one.to_pylist(), other.to_pylist(), strict=True))
            rows = sum(map(len, peace.table()))
            if rows != arguments.items:
                raise RuntimeError(f"{rows} items of {arguments.items} have their IDs")
    title = f"Rows of a table by --engine {arguments.engine} that was killed twice, beside one in peace"
    return Result("backfill_killed", [], [Check(title, arguments.rounds * arguments.items, differ)])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser_of_catalogue(__doc__, items=100_000, workers=2, engine="ray").parse_args(argv)
    keep(run(arguments), arguments)


if __name__ == "__main__":
    main()
