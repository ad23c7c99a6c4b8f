"""Blocks mapped by Ray Data: over the machines of a cluster, or processes of this one.

What goes to an actor is the number of a block, and what comes back says that it is done: files are read, and codes
written, where the model is. So all machines have to reach the same files, and the same output's directory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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


def encode_by_ray(task: EncodingTask, blocks: Sequence[Block], workers: int) -> Iterator[Block]:
    """Encodes blocks by actors of Ray Data; see `Engine.map_blocks`.

    The cluster is that of RAY_ADDRESS; where none is named, one on this machine, which ends with this process.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise WorkerFailed(f"Ray cannot be imported ({error}): install semid[bulk], or use --engine local") from error
    workers = min(workers, len(blocks))
    with _cluster():
        there = ray.cluster_resources()
        cores = int(task.settings["threads"] or max(1, there.get("CPU", 1) // workers))
        gpus = 1 if there.get("GPU") and task.settings["device"] != "cpu" else 0
        task = task._replace(settings={**task.settings, "threads": cores})
        numbers = ray.data.from_items(
            [{"block": number} for number in range(len(blocks))], override_num_blocks=len(blocks)
        )
        done = numbers.map(
            BlockActor,
            fn_constructor_args=(task, list(blocks)),
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
            num_cpus=min(cores, int(there.get("CPU", 1)) // workers or 1),
            num_gpus=gpus,
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
