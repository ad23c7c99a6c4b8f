"""A whole catalogue of texts by semid backfill, beside SentenceTransformer's pool and a plain loop over POST /tokenize.

    python -P benchmarks/backfill_texts.py [--catalogue items.parquet] [--texts 1024]

Every path begins with nothing running and loads its models: `semid backfill` by two workers, SentenceTransformer's own
`start_multi_process_pool` and `encode` with as many processes, each on its share of the cores, and a loop that sends
requests of 256 texts to a service, one after the other. The pool gives embeddings alone. The second table leaves out
the start and the first few texts, and of a backfill the claims and the table behind the codes.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.backfill_command import Times, backfilled, compared, looped
from benchmarks.bodies import as_texts, json_bodies
from benchmarks.contents import Texts
from benchmarks.harness import Result, keep, parser_of
from benchmarks.text_peers import MODEL

BATCH = 256
FEW = 64

OURS, POOL, LOOP = "semid backfill", "SentenceTransformer, pool of processes", "plain loop over POST /tokenize"


def write_texts(directory: Path, texts: Sequence[str]) -> Path:
    """A catalogue of these in a new directory."""
    directory.mkdir()
    pq.write_table(pa.Table.from_pylist(as_texts("item", texts)), directory / "items.parquet")
    return directory


def pooled(few: Sequence[str], texts: Sequence[str], workers: int) -> Times:
    """Times of SentenceTransformer, whose processes share the cores as the workers of a backfill do."""
    from sentence_transformers import SentenceTransformer  # seconds, and part of the start

    started = time.perf_counter()
    model = SentenceTransformer(MODEL, device="cpu")
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    pool = model.start_multi_process_pool(["cpu"] * workers)
    try:
        model.encode(list(few), pool=pool, chunk_size=len(few) // workers)
        start_s = time.perf_counter() - started
        model.encode(list(texts), pool=pool)
        return Times(len(few), start_s, len(texts), time.perf_counter() - started - start_s)
    finally:
        model.stop_multi_process_pool(pool)
        os.environ.pop("OMP_NUM_THREADS")
        os.environ.update({} if before is None else {"OMP_NUM_THREADS": before})


def run(arguments: Namespace) -> Result:
    """Measure."""
    source = Texts(arguments.catalogue)
    few, texts = source.take(FEW), source.take(arguments.texts)
    with tempfile.TemporaryDirectory(prefix="semid-") as scratch:
        items = write_texts(Path(scratch) / "items", texts)
        (first,), bodies = json_bodies(as_texts("few", few), FEW), json_bodies(as_texts("item", texts), BATCH)
        paths = {
            OURS: partial(backfilled, items, "local", arguments.workers, len(texts), codes_alone=True),
            POOL: partial(pooled, few, texts, arguments.workers),
            LOOP: partial(looped, first, bodies, FEW, len(texts)),
        }
        return Result("backfill_texts", compared("A catalogue of texts", paths, {POOL, LOOP}, POOL, arguments.rounds))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = parser_of(__doc__, rounds=2)
    parser.add_argument("--catalogue", type=Path, help="texts of this catalogue, made-up ones where absent")
    parser.add_argument("--texts", type=int, default=1024, help="of the catalogue (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="(default %(default)s)")
    arguments = parser.parse_args(argv)
    keep(run(arguments), arguments)


if __name__ == "__main__":
    main()
