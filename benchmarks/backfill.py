"""A whole catalogue by semid backfill, killed twice on its way and not, beside a plain loop over POST /tokenize.

    python -P benchmarks/backfill.py [--items 1000000] [--base embeddings.npy ...] [--engine local]

Items are made of pairs of real embeddings: the one and half of the other, brought back to length 1. They are written
to Parquet, and backfilled into empty registries by two workers: once in peace, and once killed (SIGKILL) in the middle
of the codes and in the middle of the claims, and gone on with. The tables are compared row by row. The loop sends
requests of 512 items, one after the other, to a service with a registry of its own.

What is timed is the command from its start to its end, with the loading of its models.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.bodies import as_base64, json_bodies
from benchmarks.contents import DIMENSION, Embeddings
from benchmarks.harness import ROOT, Check, Comparison, Result, keep, parser_of, seconds
from benchmarks.serving import Sender, service
from models.catalogue import read_embeddings

ROWS_PER_FILE = 100_000
BATCH = 512
PAUSE_S = 0.01

LOOP = "plain loop over POST /tokenize, 512 items each"


class Recombined:
    """Embeddings made of pairs of others.

    Args:
        base: (N, D) float32.
        seed: Of the pairs.
    """

    def __init__(self, base: NDArray[np.float32], seed: int = 0) -> None:
        self._base = base
        self._draw = np.random.default_rng(seed)

    def take(self, count: int) -> NDArray[np.float32]:
        """So many, (count, D) float32 of length 1."""
        one, other = self._draw.integers(len(self._base), size=(2, count))
        rows = self._base[one] + np.float32(0.5) * self._base[other]
        return np.float32(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def base_of(paths: Sequence[Path]) -> NDArray[np.float32]:
    """The embeddings of these files, or made-up ones."""
    if not paths:
        return Embeddings().take(10_000)
    return np.concatenate([read_embeddings(path).numpy() for path in paths])


def write_catalogue(directory: Path, base: NDArray[np.float32], items: int) -> None:
    """Files of so many items."""
    directory.mkdir()
    made = Recombined(base)
    for first in range(0, items, ROWS_PER_FILE):
        matrix = made.take(min(ROWS_PER_FILE, items - first))
        column = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), DIMENSION)
        table = pa.table({"item_id": [f"item-{first + row}" for row in range(len(matrix))], "embedding": column})
        pq.write_table(table, directory / f"{first:09}.parquet", compression="none", row_group_size=16_384)


class Command:
    """`semid backfill` of one catalogue into one registry.

    Args:
        directory: Of everything.
        name: Of this registry and its table.
        arguments: The benchmark's.
    """

    def __init__(self, directory: Path, name: str, arguments: Namespace) -> None:
        self.out = directory / f"{name}-ids"
        rows = max(512, min(65_536, arguments.items // 32))
        engine, workers = arguments.engine, str(arguments.workers)
        options = ["--engine", engine, "--workers", workers, "--block-rows", str(rows)]
        program = [sys.executable, "-c", "from service.cli import app; app()", "backfill"]
        self._words = [*program, str(directory / "items"), "--out", str(self.out), *options]
        self._environment = {**os.environ, "SID_DATA_DIR": str(directory / name), "PYTHONPATH": str(ROOT)}

    def run(self) -> None:
        """To its end; raises RuntimeError where it fails."""
        ended = self.started()
        said = ended.communicate()[1].decode(errors="replace")
        if ended.returncode:
            raise RuntimeError(said[-2000:])

    def run_until(self, reached: Callable[[Path], bool]) -> None:
        """Until the journal is so far; then it is killed."""
        running = self.started()
        while not reached(self.out / ".backfill"):
            if running.poll() is not None:
                raise RuntimeError(f"it ended before: {running.communicate()[1].decode(errors='replace')[-2000:]}")
            time.sleep(PAUSE_S)
        running.send_signal(signal.SIGKILL)
        running.communicate()

    def started(self) -> subprocess.Popen[bytes]:
        """As a process."""
        return subprocess.Popen(
            self._words, env=self._environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def table(self) -> Iterator[pa.Table]:
        """Part by part."""
        return map(pq.read_table, sorted(self.out.glob("part-*.parquet")))


def third_of_codes(blocks: int) -> Callable[[Path], bool]:
    """Whether a third of the blocks has its codes."""
    return lambda journal: len(list(journal.glob("codes/*/0*.arrow"))) * 3 >= blocks


def amid_claims(journal: Path) -> bool:
    """Whether half of the runs is claimed, or the next one is being claimed."""
    if not (journal / "cuts.npy").exists():
        return False
    runs = len(np.load(journal / "cuts.npy", allow_pickle=False)) - 1
    return (journal / "claims" / f"{runs // 2:06}.known").exists()


def loop(base: NDArray[np.float32], items: int) -> float:
    """Items a second of the plain loop."""
    bodies = json_bodies(as_base64("loop", Recombined(base, seed=1).take(items)), BATCH)
    with service() as url, Sender(url, clients=1) as sender:
        sender.send(json_bodies(as_base64("warm", Recombined(base, seed=2).take(BATCH)), BATCH))
        return sender.checked_rate(items, bodies)


def run(arguments: Namespace) -> Result:
    """Measure."""
    base = base_of(arguments.base)
    name = f"semid backfill --engine {arguments.engine}, {arguments.workers} workers"
    figures: dict[str, list[float]] = {name: [], f"{name}, killed twice": [], LOOP: []}
    differ = 0
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory(prefix="semid-") as scratch:
            directory = Path(scratch)
            write_catalogue(directory / "items", base, arguments.items)
            peace, killed = Command(directory, "peace", arguments), Command(directory, "killed", arguments)
            figures[name].append(arguments.items / seconds(peace.run))
            print(f"{name}: {figures[name][-1]:,.0f} items/s")
            blocks = len(list(peace.table()))
            started = time.perf_counter()
            killed.run_until(third_of_codes(blocks))
            killed.run_until(amid_claims)
            killed.run()
            figures[f"{name}, killed twice"].append(arguments.items / (time.perf_counter() - started))
            for one, other in zip(peace.table(), killed.table(), strict=True):
                differ += sum(a != b for a, b in zip(one.to_pylist(), other.to_pylist(), strict=True))
            rows = sum(map(len, peace.table()))
            if rows != arguments.items:
                raise RuntimeError(f"{rows} items of {arguments.items} have their IDs")
            print(f"killed twice: {figures[f'{name}, killed twice'][-1]:,.0f} items/s, {differ} rows differ")
        figures[LOOP].append(loop(base, max(BATCH, min(arguments.items, arguments.looped) // BATCH * BATCH)))
        print(f"{LOOP}: {figures[LOOP][-1]:,.0f} items/s")
    check = Check("Rows of a table whose backfill was killed twice, beside one in peace", arguments.items, differ)
    ours = [path for path in figures if path != LOOP]
    return Result("backfill", [Comparison("A catalogue of embeddings", "items/s", ours, LOOP, figures)], [check])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = parser_of(__doc__, rounds=1)
    parser.add_argument("--items", type=int, default=100_000, help="of the catalogue (default %(default)s)")
    parser.add_argument("--looped", type=int, default=20_480, help="of the loop, at most (default %(default)s)")
    parser.add_argument("--base", type=Path, nargs="*", default=[], help="arrays of embeddings; made up if not given")
    parser.add_argument("--engine", choices=["local", "ray"], default="ray", help="(default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="(default %(default)s)")
    arguments = parser.parse_args(argv)
    keep(run(arguments), arguments)


if __name__ == "__main__":
    main()
