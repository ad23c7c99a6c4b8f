"""Arithmetic as it says: what an import, a switch or a caller's autocast may have lowered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from models.errors import CheckpointError


def require_full_precision() -> None:
    """Raise CheckpointError where an import has lowered the precision of arithmetic for the whole process."""
    matmul = torch.backends.cuda.matmul
    products = {matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision}  # type: ignore[attr-defined]
    # The older switches raise where the newer ones have been turned, so they are asked last.
    if (
        not products <= {"none", "ieee"}
        or torch.get_float32_matmul_precision() != "highest"
        or matmul.allow_tf32
        or matmul.allow_fp16_accumulation
    ):
        raise CheckpointError(
            "arithmetic is lowered (float32 as TF32 or bfloat16, or sums in float16); codes would not be exact"
        )


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute as it says, whatever the caller is in: an autocast of his does not reach here.

    Raises:
        CheckpointError: Float32 arithmetic is lowered for the whole process.
    """
    require_full_precision()
    if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled(device.type)):
        yield
        return
    with torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False):
        yield
