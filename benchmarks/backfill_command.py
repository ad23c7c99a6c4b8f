"""`semid backfill` as a process, and catalogues of embeddings for it."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.contents import DIMENSION, Embeddings, Recombined
from benchmarks.harness import ROOT, Comparison, parser_of
from benchmarks.serving import Sender, service
from models.embedding_files import read_embeddings

ROWS_PER_FILE = 100_000
BLOCKS = 8  # of a catalogue, so that two workers have equal shares
PAUSE_S = 0.01


def parser_of_catalogue(
    description: str | None, *, items: int, workers: int, engine: str | None = None, rounds: int = 1
) -> argparse.ArgumentParser:
    """The options of a benchmark on a catalogue of embeddings.

    Args:
        description: Of the benchmark.
        items: Of the catalogue, if not told otherwise.
        workers: Of the backfill, if not told otherwise.
        engine: Its engine, if not told otherwise; None where the benchmark has both.
        rounds: How many, if not told otherwise.
    """
    parser = parser_of(description, rounds=rounds)
    parser.add_argument("--items", type=int, default=items, help="of the catalogue (default %(default)s)")
    parser.add_argument("--base", type=Path, nargs="*", default=[], help="arrays of embeddings; made up if not given")
    parser.add_argument("--workers", type=int, default=workers, help="(default %(default)s)")
    if engine is not None:
        parser.add_argument("--engine", choices=["local", "ray"], default=engine, help="(default %(default)s)")
    return parser


def base_of(paths: Sequence[Path]) -> NDArray[np.float32]:
    """The embeddings of these files, or made-up ones."""
    if not paths:
        return Embeddings().take(10_000)
    return np.concatenate([read_embeddings(path).numpy() for path in paths])


def write_catalogue(directory: Path, base: NDArray[np.float32], items: int) -> Path:
    """Files of so many items in a new directory."""
    directory.mkdir()
    made = Recombined(base)
    for first in range(0, items, ROWS_PER_FILE):
        matrix = made.take(min(ROWS_PER_FILE, items - first))
        column = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), DIMENSION)
        table = pa.table({"item_id": [f"item-{first + row}" for row in range(len(matrix))], "embedding": column})
        pq.write_table(table, directory / f"{first:09}.parquet", compression="none", row_group_size=16_384)
    return directory


class Command:
    """`semid backfill` of one catalogue into a registry of its own.

    Args:
        items: The directory of the catalogue.
        place: Of the registry and of the table; neither is there yet.
        engine: Who maps.
        workers: Over how many.
        rows: Of the catalogue.
    """

    def __init__(self, items: Path, place: Path, engine: str, workers: int, rows: int) -> None:
        self.out = place.with_name(f"{place.name}-ids")
        self.block_rows = max(32, min(65_536, rows // BLOCKS))
        options = ["--engine", engine, "--workers", str(workers), "--block-rows", str(self.block_rows)]
        program = [sys.executable, "-c", "from service.cli import app; app()", "backfill"]
        self._words = [*program, str(items), "--out", str(self.out), *options]
        self._environment = {**os.environ, "SID_DATA_DIR": str(place), "PYTHONPATH": str(ROOT)}

    def run(self) -> None:
        """To its end."""
        self.wait(self.started())

    def run_until(self, reached: Callable[[Path], bool]) -> None:
        """Until the journal is so far; then it is killed."""
        running = self.started()
        self.wait_until(running, reached)
        running.send_signal(signal.SIGKILL)
        running.communicate()

    def wait(self, running: subprocess.Popen[bytes]) -> None:
        """For its end; raises RuntimeError where it failed."""
        said = running.communicate()[1].decode(errors="replace")
        if running.returncode:
            raise RuntimeError(said[-2000:])

    def wait_until(self, running: subprocess.Popen[bytes], reached: Callable[[Path], bool]) -> None:
        """Until the journal is so far."""
        while not reached(self.out / ".backfill"):
            if running.poll() is not None:
                raise RuntimeError(f"it ended before: {running.communicate()[1].decode(errors='replace')[-2000:]}")
            time.sleep(PAUSE_S)

    def started(self) -> subprocess.Popen[bytes]:
        """As a process."""
        return subprocess.Popen(
            self._words, env=self._environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def table(self) -> Iterator[pa.Table]:
        """Part by part."""
        return map(pq.read_table, sorted(self.out.glob("part-*.parquet")))


class Times(NamedTuple):
    """How long a path took.

    Attributes:
        first: Items at its start.
        start_s: From nothing to their end.
        rest: The other items.
        rest_s: From there to where all have what is compared once models are loaded.
        end_s: From there to the end.
    """

    first: int
    start_s: float
    rest: int
    rest_s: float
    end_s: float = 0.0


def compared(
    title: str, paths: Mapping[str, Callable[[], Times]], peers: Collection[str], against: str, rounds: int
) -> list[Comparison]:
    """The rates of paths to the same work, side by side: from nothing, and once their models are loaded.

    Args:
        title: What is done.
        paths: Name -> what does all of it.
        peers: Those that are not ours.
        against: The path that ratios are formed to.
        rounds: How often.
    """
    found: dict[str, list[Times]] = {name: [] for name in paths}
    for number in range(rounds):
        for name in list(paths) if number % 2 == 0 else reversed(paths):
            found[name].append(paths[name]())
            print(name, found[name][-1])
    ours = [name for name in paths if name not in peers]
    whole = {
        name: [(one.first + one.rest) / (one.start_s + one.rest_s + one.end_s) for one in times]
        for name, times in found.items()
    }
    loaded = {name: [one.rest / one.rest_s for one in times] for name, times in found.items()}
    return [
        Comparison(f"{title}, from nothing", "items/s", ours, against, whole),
        Comparison(f"{title}, once models are loaded", "items/s", ours, against, loaded),
    ]


def backfilled(items: Path, engine: str, workers: int, rows: int, *, codes_alone: bool = False) -> Times:
    """Times of `semid backfill` of a catalogue; its start ends when a block has its codes, each worker being at one.

    Args:
        items: The catalogue's directory.
        engine: Who maps.
        workers: Over how many.
        rows: Of the catalogue.
        codes_alone: Whether the pace of the rest is that of their codes, without claims and table.
    """
    with tempfile.TemporaryDirectory(prefix="semid-") as place:
        command = Command(items, Path(place) / "data", engine, workers, rows)
        started = time.perf_counter()
        running = command.started()
        command.wait_until(running, lambda journal: any(journal.glob("codes/*/*.arrow")))
        first_s = time.perf_counter() - started
        if codes_alone:
            command.wait_until(running, lambda journal: (journal / "cuts.npy").exists())
        codes_s = time.perf_counter() - started
        command.wait(running)
        whole_s = time.perf_counter() - started
        found = sum(map(len, command.table()))
    if found != rows:
        raise RuntimeError(f"{found} items of {rows} have their IDs")
    first = min(rows - 1, workers * command.block_rows)
    rest_s = (codes_s if codes_alone else whole_s) - first_s
    return Times(first, first_s, rows - first, rest_s, whole_s - first_s - rest_s)


def looped(first: bytes, bodies: Sequence[bytes], few: int, rows: int) -> Times:
    """Times of a plain loop over `POST /tokenize` of a service that is started for it."""
    started = time.perf_counter()
    with service() as url, Sender(url, clients=1) as sender:
        sender.send([first])
        start_s = time.perf_counter() - started
        return Times(few, start_s, rows, rows / sender.checked_rate(rows, bodies))
