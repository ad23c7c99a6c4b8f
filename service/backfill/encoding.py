"""What an engine maps over blocks: a block's rows -> their codes, sorted, in a file of its own.

It is what a worker has: a model, on a device or on some cores. What it writes is a function of the block alone (P4), so
it does not matter which worker does which block, nor whether one does it twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import torch

from models import read_manifest
from service.backfill.blocks import BlockReader, Portion
from service.backfill.code_files import packed_column, write_code_file
from service.backfill.plan import Block, Kind
from service.loading import Loader
from service.metrics import Metrics
from service.registry.assignment_columns import pack
from service.semantic_id import CodeLayout
from service.settings import Settings
from service.tokenizers import LoadedTokenizer

MODEL_MS = 1000.0
"""Of one forward pass, about: here no small request waits for its end."""


class EncodingTask(NamedTuple):
    """What every worker is told; it goes to other processes and machines.

    Attributes:
        settings: Those that the model needs.
        kind: What the files hold.
        columns: Those that are read.
        order_by: The column to sort by, and the type its values are sorted as; None where that is the rows.
        directory: Where the files of codes go.
    """

    settings: Mapping[str, Any]
    kind: Kind
    columns: tuple[str, ...]
    order_by: tuple[str, pa.DataType] | None
    directory: str

    def path(self, number: int) -> Path:
        """The file of a block."""
        return Path(self.directory) / f"{number:06}.arrow"

    def on_device(self, worker: int) -> EncodingTask:
        """The same for one worker of several on a machine: each has a GPU of its own where there are any."""
        if self.settings["device"] not in {"auto", "cuda"} or not torch.cuda.is_available():
            return self
        device = f"cuda:{worker % torch.cuda.device_count()}"
        return self._replace(settings={**self.settings, "device": device})


class BlockDone(NamedTuple):
    """A block whose codes are on disk, and how many of its rows were rejected."""

    number: int
    rows: int
    rejected: int


class BlockEncoder:
    """Encodes blocks, one after the other; used as a context, at whose end the model is gone.

    Raises:
        CheckpointError: The checkpoint is not what was frozen.
    """

    def __init__(self, task: EncodingTask) -> None:
        self._task = task
        self._runner = asyncio.Runner()
        settings = Settings.model_validate(dict(task.settings)).model_copy(
            update={"batch_ms": MODEL_MS, "queue_tokens": 2**31}
        )
        manifest = read_manifest(settings.checkpoint)
        self._tokenizer: LoadedTokenizer = self._runner.run(
            Loader(settings, Metrics()).load(settings.checkpoint, manifest)
        )
        self._layout = CodeLayout(manifest.codebook_sizes)
        self._reader = BlockReader(self._tokenizer.reader, task.kind, task.columns, task.order_by)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()
        self._runner.run(self._tokenizer.batcher.stop())
        self._runner.close()

    def encode(self, block: Block) -> BlockDone:
        """The codes of a block's rows, which are on disk when this returns.

        Raises:
            ValueError: Its file cannot be read.
            ServiceError: The model is lost.
        """
        return self._runner.run(self._encode(block))

    async def _encode(self, block: Block) -> BlockDone:
        portions = self._reader.portions(block)
        parts: list[dict[str, pa.Array]] = []
        failures: list[tuple[int, str | None, Mapping[str, str]]] = []
        coming = asyncio.create_task(asyncio.to_thread(next, portions, None))  # is read while the model is at work
        while (portion := await coming) is not None:
            coming = asyncio.create_task(asyncio.to_thread(next, portions, None))
            parts.append(await self._portion(portion, failures))
        order = pa.null() if self._task.order_by is None else self._task.order_by[1]
        columns = {
            name: pa.chunked_array([part[name] for part in parts], kind)
            for name, kind in (
                ("row", pa.int64()),
                ("item_id", pa.string()),
                ("digest", pa.uint64()),
                ("codes", pa.binary(self._layout.width)),
                ("order", order),
            )
        }
        await asyncio.to_thread(write_code_file, self._task.path(block.number), columns, failures, self._layout.width)
        return BlockDone(block.number, block.rows, len(failures))

    async def _portion(
        self, portion: Portion, failures: list[tuple[int, str | None, Mapping[str, str]]]
    ) -> dict[str, pa.Array]:
        """The columns of those rows that have codes; the others are added to the failures."""
        columns = portion.columns
        failed = dict(columns.failures)
        places = np.array([place for place in range(len(columns)) if place not in failed], np.int64)
        codes = np.zeros((0, len(self._layout.codebook_sizes)), np.int64)
        if len(places):
            encoded = await self._tokenizer.batcher.encode_columns(columns.contents.at(places))
            could = np.ones(len(places), np.bool_)
            could[list(encoded.failures)] = False
            failed |= {int(places[place]): error for place, error in encoded.failures.items()}
            places = places[could]
            if len(places):  # else nobody knows of how many levels the codes would be
                codes = encoded.codes[could]
        for place, error in sorted(failed.items()):
            failures.append((portion.first + place, portion.item_ids[place].as_py(), error.as_error()))
        taken = pa.array(places)
        return {
            "row": pa.array(places + portion.first),
            "item_id": portion.item_ids.take(taken),
            "digest": pa.array(columns.digests[places]),
            "codes": packed_column(pack(codes.astype(np.int32), self._layout)),
            "order": pa.nulls(len(places)) if portion.order is None else portion.order.take(taken),
        }
