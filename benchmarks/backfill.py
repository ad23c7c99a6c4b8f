"""A whole catalogue of embeddings by semid backfill, beside a plain loop over POST /tokenize.

    python -P benchmarks/backfill.py [--items 500000] [--base embeddings.npy ...]

Items are made of pairs of real embeddings (`Recombined`). Every path begins with nothing running, loads its models, and
ends when every item has an ID that is on disk, in an empty registry of its own. The loop sends requests of 512 items,
one after the other. The second table leaves out the start and the first items: of the loop 64, of a backfill a block
for each worker, whose claims and table are in its time all the same.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.backfill_command import (
    Recombined,
    backfilled,
    base_of,
    compared,
    looped,
    parser_of_catalogue,
    write_catalogue,
)
from benchmarks.bodies import as_base64, json_bodies
from benchmarks.harness import Result, keep

BATCH = 512
FEW = 64

LOOP = "plain loop over POST /tokenize"


def run(arguments: Namespace) -> Result:
    """Measure."""
    result = Result("backfill")
    base = base_of(arguments.base)
    bodies = json_bodies(as_base64("loop", Recombined(base, seed=1).take(arguments.items)), BATCH)
    with tempfile.TemporaryDirectory(prefix="semid-") as scratch:
        items = write_catalogue(Path(scratch) / "items", base, arguments.items)
        paths = {}
        for engine in ("local", "ray"):
            name = f"semid backfill --engine {engine}"
            if engine == "ray" and importlib.util.find_spec("ray") is None:
                result.skipped[name] = "Ray is not installed"
                continue
            paths[name] = partial(backfilled, items, engine, arguments.workers, arguments.items)
        first = json_bodies(as_base64("first", Recombined(base, seed=2).take(FEW)), FEW)
        paths[LOOP] = partial(looped, first[0], bodies, FEW, arguments.items)
        result.comparisons += compared("A catalogue of embeddings", paths, {LOOP}, LOOP, arguments.rounds)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser_of_catalogue(__doc__, items=500_000, workers=2, rounds=3).parse_args(argv)
    keep(run(arguments), arguments)


if __name__ == "__main__":
    main()
