"""Arrays of embeddings on disk: NumPy, safetensors or Parquet, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.catalogue import open_parquet

# Numbers of one batch of embeddings; blocks of this size are reused well by the allocators.
BATCH_NUMBERS = 2**18


def read_embeddings(path: Path) -> Tensor:
    """An array of embeddings, (N, D) float32, whole; `embedding_batches` has the formats and the errors."""
    return torch.cat(list(embedding_batches(path)))


def embedding_batches(path: Path) -> Iterator[Tensor]:
    """The rows of an array of embeddings, batch by batch in their order, each (n, D) float32 of its own memory.

    Args:
        path: `.npy`; `.safetensors` with one tensor, or one named `embeddings`; `.parquet` with a column `embedding`
            of fixed-size lists. float16, bfloat16, float32 or float64.

    Raises:
        ValueError: The file cannot be read, the shape is not (N, D), there is no row, or a number is not finite.
    """
    readers = {".npy": _numpy_batches, ".safetensors": _safetensors_batches, ".parquet": _parquet_batches}
    reader = readers.get(path.suffix)
    if reader is None:
        msg = f"{path} is no array of embeddings: known are .npy, .safetensors and .parquet"
        raise ValueError(msg)
    row = bad = first_bad = 0
    for batch in reader(path):
        embeddings = batch.to(torch.float32)
        if not bool(embeddings.isfinite().all()):
            wrong = (~embeddings.isfinite().all(dim=1)).nonzero().flatten()
            first_bad = first_bad if bad else row + int(wrong[0])
            bad += len(wrong)
        row += len(embeddings)
        if not bad:
            yield embeddings
    if bad:
        msg = f"{path} has numbers that are not finite in {bad} rows, the first of them row {first_bad}"
        raise ValueError(msg)


def _numpy_batches(path: Path) -> Iterator[Tensor]:
    try:
        # No pickle: an object array would run code. Mapped: the system reads what is looked at.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        msg = f"{path} cannot be read as an array: {error}"
        raise ValueError(msg) from error
    if not isinstance(array, np.ndarray):
        msg = f"{path} cannot be read as an array: it is an archive of them"
        raise ValueError(msg)  # noqa: TRY004 - one kind of error for what a file holds
    if array.dtype.kind != "f":
        msg = f"{path} holds {array.dtype}, expected floats"
        raise ValueError(msg)
    for rows in _batch_slices(path, array.shape, str(array.dtype)):
        yield torch.from_numpy(np.array(array[rows], dtype=np.float32, order="C"))


def _safetensors_batches(path: Path) -> Iterator[Tensor]:
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        msg = f"{path} cannot be read as safetensors: {error}"
        raise ValueError(msg) from error
    with file as tensors:
        names = sorted(tensors.keys())
        name = "embeddings" if "embeddings" in names else next(iter(names), "")
        if not names or (len(names) > 1 and name != "embeddings"):
            msg = f"{path} holds the tensors {names}; expected one, or one named 'embeddings'"
            raise ValueError(msg)
        array = tensors.get_slice(name)
        shape, kind = tuple(array.get_shape()), array.get_dtype()
        for rows in _batch_slices(path, shape, kind if kind.startswith(("F", "BF")) else ""):
            yield array[rows].clone()


def _batch_slices(path: Path, shape: tuple[int, ...], kind: str) -> Iterator[slice]:
    """Slices of rows that fit into a batch, or ValueError where there are none."""
    if len(shape) != 2 or 0 in shape or not kind:
        msg = f"{path} has shape {shape} of {kind or 'no floats'}, expected (N, D) of floats"
        raise ValueError(msg)
    step = max(1, BATCH_NUMBERS // shape[1])
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def _parquet_batches(path: Path) -> Iterator[Tensor]:
    with open_parquet(path) as file:
        if "embedding" not in file.schema_arrow.names:
            msg = f"{path} has no column 'embedding'; its columns are {file.schema_arrow.names}"
            raise ValueError(msg)
        kind = file.schema_arrow.field("embedding").type
        if not pa.types.is_fixed_size_list(kind) or not pa.types.is_floating(kind.value_type):
            msg = f"{path}, embedding: expected fixed-size lists of floats without nulls, got {kind}"
            raise ValueError(msg)
        width = kind.list_size
        rows = file.metadata.num_rows
        for _ in _batch_slices(path, (rows, width), str(kind.value_type)):
            break
        for batch in file.iter_batches(batch_size=max(1, BATCH_NUMBERS // width), columns=["embedding"]):
            column = batch.column("embedding")
            if column.null_count or column.flatten().null_count:
                msg = f"{path}, embedding: expected fixed-size lists of floats without nulls, got nulls"
                raise ValueError(msg)
            values = column.flatten().to_numpy(zero_copy_only=False)
            yield torch.from_numpy(np.array(values.reshape(-1, width), dtype=np.float32))
