"""How blocks are mapped: over processes of this machine. Ray does the same over several, see `ray_engine`."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import StrEnum
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from service.backfill.encoding import BlockEncoder, EncodingTask
from service.backfill.plan import Block
from service.errors import SemidError, WorkerFailed


class Engine(StrEnum):
    """Who maps."""

    LOCAL = "local"
    RAY = "ray"

    def map_blocks(self, task: EncodingTask, blocks: Sequence[Block], workers: int | None) -> Iterator[Block]:
        """Each block, as it is done, in any order.

        Args:
            task: What every worker is told.
            blocks: What is mapped.
            workers: How many; where None one for each GPU, else for every two cores, of which a model makes the most.

        Raises:
            WorkerFailed: A worker could not go on.
        """
        if self is Engine.LOCAL:
            return encode_locally(task, blocks, workers)
        from service.backfill.ray_engine import encode_by_ray

        return encode_by_ray(task, blocks, workers)


def encode_locally(task: EncodingTask, blocks: Sequence[Block], workers: int | None) -> Iterator[Block]:
    """Encodes blocks by processes of this machine; see `Engine.map_blocks`.

    Each gets its next block when it is done with one. They end when this process does, however it does. A single one
    is this process itself.
    """
    gpus = torch.cuda.device_count() if task.settings["device"] in {"auto", "cuda"} else 0
    workers = min(workers or gpus or max(1, len(os.sched_getaffinity(0)) // 2), len(blocks))
    task = task.told(workers=workers)
    if workers == 1:
        with BlockEncoder(task) as encoder:
            for block in blocks:
                encoder.encode(block)
                yield block
        return
    waiting = iter(blocks)
    # Not forked: torch's threads would be lost in a copy.
    context = multiprocessing.get_context("spawn")
    at_work: dict[Connection, BaseProcess] = {}
    try:
        for number in range(workers):
            ours, theirs = context.Pipe()
            told = task.told(device=f"cuda:{number % gpus}") if gpus else task
            process: BaseProcess = context.Process(target=_work, args=(told, theirs), name=f"blocks-{number}")
            process.start()
            theirs.close()
            at_work[ours] = process
        while at_work:
            for connection in wait(list(at_work)):
                assert isinstance(connection, Connection)
                done = _received(connection, at_work[connection])
                coming = next(waiting, None)
                connection.send(coming)
                if coming is None:
                    at_work.pop(connection).join()
                    connection.close()
                if done is not None:
                    yield done
    finally:
        for connection, process in at_work.items():
            process.terminate()
            process.join()
            connection.close()


def _received(connection: Connection, process: BaseProcess) -> Block | None:
    """What a worker says: that it is ready, or done with a block."""
    try:
        said = connection.recv()
    except EOFError:
        process.join()
        raise WorkerFailed(f"A worker ended with code {process.exitcode}.") from None
    if isinstance(said, str):
        raise WorkerFailed(said)
    assert said is None or isinstance(said, Block)
    return said


def _work(task: EncodingTask, connection: Connection) -> None:
    """A worker's life, which is over at once when that of the process that started it is."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        try:
            with BlockEncoder(task) as encoder:
                connection.send(None)
                while (block := connection.recv()) is not None:
                    encoder.encode(block)
                    connection.send(block)
        except (SemidError, ValueError, OSError) as error:
            connection.send(str(error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
