"""Streams of a GPU that one part of this package has alone.

Torch has 32 streams for each device and hands them out in turn: the 33rd is the first again. What is copied in a stream
that another thread records would become part of the recording. And the memory that cuBLAS works in belongs to a stream:
torch drops it with the first graph that was recorded there, whichever others still write to it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

# That torch has for each device.
STREAMS = 32

_taken: set[Any] = set()
_taking = threading.Lock()


def own_stream(device: torch.device, handed_out: Callable[[torch.device], Any] = torch.cuda.Stream) -> Any:
    """A stream of a device, taken until it is given back.

    Args:
        device: A GPU.
        handed_out: One stream after the other, as torch hands them out.

    Raises:
        RuntimeError: All are taken.
    """
    with _taking:
        for _ in range(STREAMS):
            stream = handed_out(device)
            if stream not in _taken:
                _taken.add(stream)
                return stream
    msg = f"all streams of {device} are taken"
    raise RuntimeError(msg)


def give_back(stream: Any) -> None:
    """Somebody else may have it from here on."""
    with _taking:
        _taken.discard(stream)
