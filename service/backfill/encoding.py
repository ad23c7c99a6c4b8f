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
from numpy.typing import NDArray

from models import read_manifest
from service.backfill.blocks import BlockReader, Portion
from service.backfill.code_files import Failure, packed_column, path_of, write_code_file
from service.backfill.known import KnownCodes, known_path
from service.backfill.plan import Block, Columns, Kind
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
        kind: What is tokenized of the files.
        columns: Those that are read.
        directory: Where the files of codes go, and what the record knows of the blocks stands.
    """

    settings: Mapping[str, Any]
    kind: Kind
    columns: Columns
    directory: Path

    def told(self, **settings: Any) -> EncodingTask:
        """The same with some settings others."""
        return self._replace(settings={**self.settings, **settings})


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
        self._reader = BlockReader(self._tokenizer.reader, task.kind, task.columns)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()
        self._runner.run(self._tokenizer.batcher.stop())
        self._runner.close()

    def encode(self, block: Block) -> None:
        """Writes the codes of a block's rows, which are on disk when this returns.

        Raises:
            ValueError: Its file cannot be read.
            ServiceError: The model is lost.
        """
        self._runner.run(self._encode(block))

    async def _encode(self, block: Block) -> None:
        portions = self._reader.portions(block)
        known = KnownCodes(known_path(self._task.directory, block.number), self._layout)
        parts: list[dict[str, pa.Array]] = []
        failures: list[Failure] = []
        coming = asyncio.create_task(asyncio.to_thread(next, portions, None))  # is read while the model is at work
        while (portion := await coming) is not None:
            coming = asyncio.create_task(asyncio.to_thread(next, portions, None))
            told, codes = known.of(portion.first - block.first, portion.columns.digests)
            parts.append(await self._portion(portion, told, codes, failures))
        of = self._task.columns
        columns = {
            name: pa.chunked_array([part[name] for part in parts], kind)
            for name, kind in (
                ("row", pa.int64()),
                ("item_id", pa.string()),
                ("digest", pa.uint64()),
                ("codes", pa.binary(self._layout.width)),
                ("order", of.order_type or pa.null()),
                ("display", pa.null() if of.display is None else pa.string()),
            )
        }
        path = path_of(self._task.directory, block.number)
        await asyncio.to_thread(write_code_file, path, columns, failures, self._layout.width)

    async def _portion(
        self, portion: Portion, known: NDArray[np.bool_], codes: NDArray[np.int32], failures: list[Failure]
    ) -> dict[str, pa.Array]:
        """The columns of those rows that have codes; the others are added to the failures.

        Args:
            portion: The rows.
            known: (n,). Whose codes are known.
            codes: (n, L). Those; the others are put in here.
            failures: Takes what is wrong with the others.
        """
        columns = portion.columns
        failed = dict(columns.failures)
        valid = np.ones(len(columns), np.bool_)
        valid[list(failed)] = False
        if len(new := np.flatnonzero(valid & ~known)):
            encoded = await self._tokenizer.batcher.encode_columns(columns.contents.at(new))
            failed |= {int(new[place]): error for place, error in encoded.failures.items()}
            valid[list(failed)] = False
            could = valid[new]
            if could.any():  # else nobody knows of how many levels the codes would be
                codes[new[could]] = encoded.codes[could]
        for place, error in sorted(failed.items()):
            failures.append((portion.first + place, portion.item_ids[place].as_py(), error.as_error()))
        places = np.flatnonzero(valid)
        taken = pa.array(places)
        return {
            "row": pa.array(places + portion.first),
            "item_id": portion.item_ids.take(taken),
            "digest": pa.array(columns.digests[places]),
            "codes": packed_column(pack(codes[places], self._layout)),
            "order": pa.nulls(len(places)) if portion.order is None else portion.order.take(taken),
            "display": pa.nulls(len(places)) if portion.displays is None else portion.displays.take(taken),
        }
