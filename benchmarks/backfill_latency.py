"""One new item at a time through HTTP, while a backfill encodes and claims in the same registry.

    python -P benchmarks/backfill_latency.py [--items 200000] [--base embeddings.npy ...]

A service with an embedded registry is asked for one new embedding after the other, with a pause between: first alone,
then while `semid backfill` shares its registry. What the backfill is doing is read from its journal. All of it runs on
one machine: beside the codes the model of the backfill takes the cores, beside the claims the registry is shared too.
"""

from __future__ import annotations

import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.backfill_command import Command, base_of, parser_of_catalogue, write_catalogue
from benchmarks.bodies import as_base64, json_bodies, new_prefix
from benchmarks.contents import Recombined
from benchmarks.harness import Comparison, Result, keep, seconds
from benchmarks.serving import Sender, service

PAUSE_S = 0.01
ALONE, CODES, CLAIMS = "alone", "beside the codes of a backfill", "beside the claims of a backfill"


class Caller:
    """Asks for one new item at a time.

    Args:
        sender: To the service.
        items: What is asked for.
    """

    def __init__(self, sender: Sender, items: Recombined) -> None:
        self._sender = sender
        self._items = items
        self.found: dict[str, list[float]] = {ALONE: [], CODES: [], CLAIMS: []}

    def ask(self, beside: str) -> None:
        """Once, and pauses."""
        bodies = json_bodies(as_base64(new_prefix(), self._items.take(1)), 1)
        self.found[beside].append(1000 * seconds(lambda: self._sender.checked_rate(1, bodies)))
        time.sleep(PAUSE_S)


def one_round(arguments: Namespace, caller_items: Recombined) -> dict[str, list[float]]:
    """Milliseconds of each request."""
    with tempfile.TemporaryDirectory(prefix="semid-") as scratch:
        directory = Path(scratch)
        items = write_catalogue(directory / "items", base_of(arguments.base), arguments.items)
        command = Command(items, directory / "beside", arguments.engine, arguments.workers, arguments.items)
        with service(data_dir=directory / "beside") as url, Sender(url, clients=1) as sender:
            caller = Caller(sender, caller_items)
            for _ in range(arguments.requests):
                caller.ask(ALONE)
            running = command.started()
            journal = command.out / ".backfill"
            while running.poll() is None:
                if list(journal.glob("claims/*.known")) and not list(command.out.glob("part-*")):
                    caller.ask(CLAIMS)
                elif list(journal.glob("codes/*/*.arrow")) and not (journal / "cuts.npy").exists():
                    caller.ask(CODES)
                else:
                    time.sleep(PAUSE_S)
            if running.returncode:
                raise RuntimeError(running.communicate()[1].decode(errors="replace")[-2000:])
            running.communicate()
    return caller.found


def run(arguments: Namespace) -> Result:
    """Measure."""
    items = Recombined(base_of(arguments.base), seed=3)
    rounds = [one_round(arguments, items) for _ in range(arguments.rounds)]
    comparisons = []
    for share in (50, 95, 99):
        figures = {path: [float(np.percentile(found[path], share)) for found in rounds] for path in rounds[0]}
        comparisons.append(Comparison(f"One new item, percentile {share}", "ms", [CODES, CLAIMS], ALONE, figures))
    print("requests:", [{path: len(figures) for path, figures in found.items()} for found in rounds])
    return Result("backfill_latency", comparisons)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = parser_of_catalogue(__doc__, items=200_000, workers=1, engine="local")
    parser.add_argument("--requests", type=int, default=200, help="while nothing else is done (default %(default)s)")
    arguments = parser.parse_args(argv)
    keep(run(arguments), arguments)


if __name__ == "__main__":
    main()
