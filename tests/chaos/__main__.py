"""The command line: `python -m tests.chaos`."""

from __future__ import annotations

import secrets
import shutil
import signal
import tempfile
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tests.chaos.run import TOPOLOGIES, Config, Outcome, Run
from tests.chaos.schedule import KINDS, schedule

TopologyName = StrEnum("TopologyName", [*TOPOLOGIES])
SINGLE = TopologyName("single")
SHOWN_OF_A_KIND = 3


def chaos(
    seconds: Annotated[float, typer.Option(min=5, help="How long faults come; checking takes a little longer.")] = 300,
    seed: Annotated[int | None, typer.Option(help="Of faults and requests; drawn and printed if not given.")] = None,
    topology: Annotated[TopologyName, typer.Option(help="The registry that is made to suffer.")] = SINGLE,
    clients: Annotated[int, typer.Option(min=1, help="Client processes.")] = 4,
    directory: Annotated[Path | None, typer.Option(help="New; for histories and logs, kept whatever happens.")] = None,
    fault: Annotated[
        list[str] | None, typer.Option(help=f"Only this kind, again for more: {', '.join(KINDS)}.")
    ] = None,
    durability: Annotated[str, typer.Option(help="SID_DURABILITY of the services.")] = "fsync",
    server_option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Of the registry's servers, such as appendonly=no.")
    ] = None,
    accept: Annotated[  # noqa: FBT002 - a command's options are its parameters
        bool, typer.Option("--accept", help="At the end, accept a registry older than what was acknowledged.")
    ] = False,
    show_schedule: Annotated[  # noqa: FBT002 - a command's options are its parameters
        bool, typer.Option("--show-schedule", help="Print the faults of this seed, and end.")
    ] = False,
) -> None:
    """Break everything for a while, then check that no promise was broken.

    Two services on a real Valkey primary with a replica, several client processes that write down every request and
    every answer, TCP proxies between all of them, and a follower that keeps a trie by the changes. Processes are killed
    and started again, connections delayed, stalled, cut and half-closed, callers leave in the middle of a request.

    At the end the histories are checked against the registry: nothing acknowledged lost, no ID for two items, none
    renamed, no suffix issued twice, every answer explained by the requests before it, and all ways to list the live IDs
    agree. Exit status 1, the violations and the directory of the histories where that is not so.

    The same seed gives the same faults and requests; how they interleave is the machine's.
    """
    seed = secrets.randbits(32) if seed is None else seed
    typer.echo(f"seed {seed}: python -m tests.chaos --seconds {seconds:g} --seed {seed} --topology {topology}")
    kinds = _known_kinds(fault or KINDS)
    if show_schedule:
        for one in schedule(seed, seconds, kinds):
            typer.echo(f"{one.at_s:8.3f} s  {one.kind}{f', for {one.duration_s:.1f} s' if one.duration_s else ''}")
        return
    signal.signal(signal.SIGTERM, _end)  # so that a run that is told to end stops its processes
    place = directory or Path(tempfile.mkdtemp(prefix="semid-chaos-"))
    options = dict(option.split("=", 1) for option in server_option or ())
    config = Config(place, seconds, seed, topology.value, clients, kinds, accept, durability, options)
    outcome = Run(config).perform()
    _report(outcome, place)
    if outcome.violations:
        raise typer.Exit(1)
    if directory is None:
        shutil.rmtree(place)


def _known_kinds(names: list[str] | tuple[str, ...]) -> list[str]:
    if unknown := [name for name in names if name not in KINDS]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(KINDS)}", param_hint="--fault")
    return [*names]


def _end(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _report(outcome: Outcome, directory: Path) -> None:
    typer.echo(outcome)
    if not outcome.violations:
        typer.echo("every promise was kept")
        return
    listed = directory / "violations.txt"
    listed.write_text("".join(f"{violation}\n" for violation in outcome.violations), encoding="utf-8")
    for promise, count in Counter(violation.promise for violation in outcome.violations).items():
        for violation in [one for one in outcome.violations if one.promise == promise][:SHOWN_OF_A_KIND]:
            typer.echo(f"VIOLATION {violation}")
        if count > SHOWN_OF_A_KIND:
            typer.echo(f"          ... {count} of this kind")
    typer.echo(f"{len(outcome.violations)} violations, listed in {listed}; histories and logs are in {directory}")


if __name__ == "__main__":
    typer.run(chaos)
