"""One worker beside several: known items, embeddings, texts, small requests, and the memory of all processes.

    python -P benchmarks/workers.py [--workers 2] [--items 4096]

Each service has its own registry, and all run at once; while one is measured the others have nothing to do. The client
is on the same machine and takes its share of the cores.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.bodies import as_base64, as_texts, json_bodies, new_prefix
from benchmarks.contents import Embeddings, Texts
from benchmarks.harness import Comparison, Result, keep, limit_threads, parser_of, rate, rounds_of
from benchmarks.one_embedding import send_all
from benchmarks.serving import Sender, service

CONNECTIONS = 32


class Service:
    """A service that runs.

    Args:
        url: Where it tokenizes.
        pid: Its process.
        clients: Requests of many items in flight.
    """

    def __init__(self, url: str, pid: int, clients: int) -> None:
        self.url = url
        self._pid = pid
        self.sender = Sender(url, clients=clients)
        self.known: list[bytes] = []

    def memory_mib(self) -> float:
        """Of its processes but the registry, what several of them share counted once (PSS)."""
        return sum(pss_mib(pid) for pid in (self._pid, *descendants(self._pid)))


def run(arguments: Namespace) -> Result:
    """Start all, then measure each kind of work on all of them in turn."""
    texts, embeddings = Texts(arguments.catalogue), Embeddings()
    with ExitStack() as stack:
        services: dict[str, Service] = {}
        for workers in (1, arguments.workers):
            before = children(os.getpid())
            url = stack.enter_context(service(workers=workers))
            (pid,) = children(os.getpid()) - before
            services[named(workers)] = Service(url, pid, arguments.clients)
        items = as_texts(new_prefix(), texts.take(arguments.items))
        for one in services.values():
            one.known = json_bodies(items, arguments.batch)
            one.sender.send(one.known)

        def known(one: Service) -> float:
            return one.sender.rate(len(items), one.known)

        def embedded(one: Service) -> float:
            new = as_base64(new_prefix(), embeddings.take(arguments.items))
            return one.sender.rate(len(new), json_bodies(new, arguments.batch))

        def small(one: Service) -> float:
            bodies = json_bodies(as_base64(new_prefix(), embeddings.take(arguments.requests)), 1)
            return rate(len(bodies), lambda: asyncio.run(send_all(one.url, bodies, CONNECTIONS)))

        def texted(one: Service) -> float:
            new = as_texts(new_prefix(), texts.take(arguments.texts))
            return one.sender.rate(len(new), json_bodies(new, 16))

        kinds: tuple[tuple[str, str, Callable[[Service], float]], ...] = (
            ("Known items", "items/s", known),
            ("New embeddings in bodies of many", "items/s", embedded),
            (f"One new embedding a request, {CONNECTIONS} connections", "requests/s", small),
            ("New texts", "items/s", texted),
            ("Memory", "MiB", Service.memory_mib),
        )
        result = Result("workers")
        for title, unit, work in kinds:
            measured = {name: lambda _, one=one, work=work: work(one) for name, one in services.items()}
            figures = rounds_of(measured, arguments.rounds, unit)  # type: ignore[arg-type]
            result.comparisons.append(Comparison(title, unit, list(services), named(1), figures))
    return result


def named(workers: int) -> str:
    """A path's name."""
    return f"{workers} worker{'s' if workers > 1 else ''}"


def children(pid: int) -> set[int]:
    """The processes that a process has started and that run."""
    found = (path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return {int(child) for line in found for child in line.split()}


def descendants(pid: int) -> set[int]:
    """Those, those that they have started, and so on; no registry server."""
    found = {child for child in children(pid) if "valkey" not in Path(f"/proc/{child}/comm").read_text()}
    return found.union(*map(descendants, found))


def pss_mib(pid: int) -> float:
    """A process's memory; of pages that it shares its part."""
    told = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return int(told[1]) / 1024 if told else 0.0


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = parser_of(__doc__)
    parser.add_argument("--catalogue", type=Path, help="texts of this catalogue, made-up ones where absent")
    parser.add_argument("--workers", type=int, default=2, help="of the second service (default %(default)s)")
    parser.add_argument("--items", type=int, default=4096, help="known items, new embeddings (default %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="items of one request of many (default %(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="requests of many in flight (default %(default)s)")
    parser.add_argument("--requests", type=int, default=2000, help="requests of one item (default %(default)s)")
    parser.add_argument("--texts", type=int, default=256, help="new texts a round (default %(default)s)")
    arguments = parser.parse_args(argv)
    limit_threads(arguments.threads)
    keep(run(arguments), arguments)


if __name__ == "__main__":
    main()
