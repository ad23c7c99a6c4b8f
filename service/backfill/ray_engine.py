"""Blocks mapped by Ray Data: over the machines of a cluster, or processes of this one.

What goes to an actor is the number of a block, and what comes back says that it is done: files are read, and codes
written, where the model is. So all machines have to reach the same files, and the same journal.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from service.backfill.encoding import BlockEncoder, EncodingTask
from service.backfill.plan import Block
from service.errors import SemidError, WorkerFailed


class BlockActor:
    """A model of its own, on a GPU or a group of cores."""

    def __init__(self, task: EncodingTask, blocks: Sequence[Block]) -> None:
        self._encoder = BlockEncoder(task)
        self._blocks = blocks

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encodes one block; what goes wrong is said in words, of which Ray would make a stack of its own."""
        try:
            self._encoder.encode(self._blocks[row["block"]])
        except (SemidError, ValueError, OSError) as error:
            return {**row, "failure": str(error) or repr(error)}
        return {**row, "failure": ""}


class Node(NamedTuple):
    """A machine of a cluster, by what Ray may give out of it."""

    cpus: int
    gpus: int


class Actors(NamedTuple):
    """What is asked of a cluster.

    Attributes:
        size: How many actors.
        cpus: Cores of each, which are its threads unless the settings say.
        gpus: GPUs of each, 1 or 0.
    """

    size: int
    cpus: int
    gpus: int


def actors_on(nodes: Sequence[Node], device: str, workers: int | None, blocks: int) -> Actors:
    """The actors for so many blocks, with the most cores with which all find their place.

    Args:
        nodes: Of the cluster.
        device: The setting.
        workers: How many; where None one for each GPU, else for every two cores.
        blocks: More actors than these would have nothing to do.

    Raises:
        WorkerFailed: A GPU is asked for, and there is none.
    """
    there = sum(node.gpus for node in nodes)
    if device.startswith("cuda") and not there:
        raise WorkerFailed("SID_DEVICE asks for a GPU, and Ray's cluster has none.")
    gpus = 1 if there and device != "cpu" else 0
    cores = sum(node.cpus for node in nodes)
    most = there if gpus else max(1, cores)
    size = min(workers or (there if gpus else max(1, cores // 2)), most, blocks)

    def places(cpus: int) -> int:
        return sum(min(node.cpus // cpus, node.gpus if gpus else node.cpus) for node in nodes)

    fitting = [cpus for cpus in range(1, cores // size + 1) if places(cpus) >= size]
    return Actors(size, max(fitting, default=1), gpus)


def encode_by_ray(task: EncodingTask, blocks: Sequence[Block], workers: int | None) -> Iterator[Block]:
    """Encodes blocks by actors of Ray Data; see `Engine.map_blocks`.

    The cluster is that of RAY_ADDRESS; where none is named, one on this machine, which ends with this process.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise WorkerFailed(f"Ray cannot be imported ({error}): install semid[bulk], or use --engine local") from error
    with _cluster():
        each = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        nodes = [Node(int(resources.get("CPU", 0)), int(resources.get("GPU", 0))) for resources in each]
        device = task.settings["device"]
        actors = actors_on(nodes, device, workers, len(blocks))
        task = task.told(
            device="cuda" if actors.gpus and device.startswith("cuda") else device,  # the one that the actor sees
            threads=task.settings["threads"] or actors.cpus,
        )
        numbers = ray.data.from_items(
            [{"block": number} for number in range(len(blocks))], override_num_blocks=len(blocks)
        )
        done = numbers.map(
            BlockActor,
            fn_constructor_args=(task, list(blocks)),
            compute=ray.data.ActorPoolStrategy(size=actors.size, max_tasks_in_flight_per_actor=2),
            num_cpus=actors.cpus,
            num_gpus=actors.gpus,
        )
        try:
            for row in done.iter_rows():
                if row["failure"]:
                    raise WorkerFailed(row["failure"])
                yield blocks[row["block"]]
        except (ray.exceptions.RayError, SystemError) as error:
            raise WorkerFailed(str(error).strip().rpartition("\n")[2]) from error


@contextmanager
def _cluster() -> Iterator[None]:
    """A connection to the cluster; one that is there already stays."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
