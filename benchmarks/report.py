"""The page of all benchmarks: docs/benchmarks.md and its plot, written from the results that are kept.

python -P benchmarks/report.py [--results DIRECTORY] [--docs DIRECTORY]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.harness import RESULTS, ROOT, ratios
from benchmarks.plot import Bar, plot

# In the page's order: benchmark -> its heading.
HEADINGS = {
    "texts": "New texts",
    "known": "Known items",
    "embeddings": "Embeddings",
    "one_embedding": "One embedding a request",
    "backfill_texts": "A whole catalogue of texts",
    "backfill": "A whole catalogue of embeddings",
    "backfill_killed": "A whole catalogue, killed twice",
    "fairness": "Single listings beside bulk, and at random times",
    "overload": "Memory under overload",
    "argmin": "Residual quantization alone",
    "registry": "The registry",
    "flips": "Codes that change",
}

INTRODUCTION = """# Benchmarks

Every figure stands beside its peers, measured in the same run, round by round in turn; a ratio is formed within its
round, and then the median is taken over the rounds. A machine that others use too slows every path, if not quite
alike: trust the ratios more than the rates, and none further than its spread (smallest to largest). `make bench`
installs the peers into an environment of their own, runs everything and writes this page from the results in
`benchmarks/results`; each benchmark has a command of its own, `make bench-texts` and so on, whose options `ARGS`
takes (`make bench-texts ARGS=--help`). What each measures, and what the peers leave out that the service does, stands
at the head of its module in `benchmarks/`.

![Our figures over those of each peer](benchmarks.svg)
"""


def read(directory: Path) -> list[dict[str, Any]]:
    """The results kept in a directory, in the page's order."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in directory.glob("*.json")}
    return [found[name] for name in HEADINGS if name in found]


def number(value: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """The median, with the smallest and the largest."""
    return f"{number(statistics.median(values))} ({number(min(values))} to {number(max(values))})"


def table(comparison: Mapping[str, Any]) -> str:
    """A comparison as a table, ours in bold."""
    lines = [f"| {comparison['title']} | {comparison['unit']} | x {comparison['against']} |", "| --- | ---: | ---: |"]
    for path, figures in comparison["figures"].items():
        name = f"**{path}**" if path in comparison["ours"] else path
        ratio = "1" if path == comparison["against"] else spread(ratios(comparison, path))
        lines.append(f"| {name} | {spread(figures)} | {ratio} |")
    return "\n".join(lines)


def checks(found: Sequence[Mapping[str, Any]]) -> str:
    """What was counted, as a table."""
    lines = [f"| {check['title']} | {check['items']:,} | {check['differ']:,} |" for check in found]
    return "\n".join(["| Checked | items | differ |", "| --- | ---: | ---: |", *lines])


def section(result: Mapping[str, Any]) -> str:
    """All of one benchmark."""
    machine, arguments = result["machine"], result["arguments"]
    told = ", ".join(f"{name} {value}" for name, value in arguments.items() if value is not None)
    measured = (
        f"`python -P benchmarks/{result['benchmark']}.py`, {result['date'][:10]}, commit {result['commit']}; {told}. "
        f"Load of the machine at the end: {machine['load_1_5_15_min'][0]} on {machine['cores']} cores "
        f"({machine['processor']}){shared(machine)}."
    )
    parts = [
        f"## {HEADINGS[result['benchmark']]}",
        measured,
        *map(table, result["comparisons"]),
    ]
    if result["checks"]:
        parts.append(checks(result["checks"]))
    parts += [f"Not measured: {peer} ({why})." for peer, why in result["skipped"].items()]
    return "\n\n".join(parts)


def shared(machine: Mapping[str, Any]) -> str:
    """What a load beyond anything the benchmarks make says."""
    others = machine["load_1_5_15_min"][0] > 2 * machine["cores"] + 2
    return ", most of it other work: absolute figures are far below what the machine does alone" if others else ""


def setting(results: Sequence[Mapping[str, Any]]) -> str:
    """The machines and the releases."""
    machines = dict.fromkeys(
        f"{one['machine']['cores']} cores ({one['machine']['processor']}), {one['machine']['memory_gib']} GiB, "
        f"{one['machine']['system']}"
        for one in results
    )
    releases = dict.fromkeys(f"{name} {release}" for one in results for name, release in one["versions"].items())
    return f"## Measured on\n\n{'; '.join(machines)}.\n\n{', '.join(releases)}."


def bars(results: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """Each of our paths over each peer; of times and bytes the inverse, so that more is always better."""
    found = []
    for result in results:
        for comparison in result["comparisons"]:
            for path in comparison["ours"]:
                for peer in [name for name in comparison["figures"] if name not in comparison["ours"]]:
                    shares = ratios({**comparison, "against": peer}, path)
                    if not comparison["unit"].endswith("/s"):
                        shares = [1 / share for share in shares]
                    found.append(
                        Bar(comparison["title"], path, peer, statistics.median(shares), min(shares), max(shares))
                    )
    return found


def write(results: Path, docs: Path) -> None:
    """Write the page and its plot."""
    kept = read(results)
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "benchmarks.svg").write_text(plot(bars(kept)), encoding="utf-8")
    page = "\n\n".join([INTRODUCTION.rstrip(), *map(section, kept), setting(kept)])
    (docs / "benchmarks.md").write_text(page + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args(argv)
    write(arguments.results, arguments.docs)


if __name__ == "__main__":
    main()
