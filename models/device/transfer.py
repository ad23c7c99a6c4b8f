"""Rows go up to a device while those before them are worked on, and what was found comes back in one copy.

On a processor both are what they are without a device: rows in parts, and parts joined.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from models.device.streams import own_stream

log = logging.getLogger(__name__)

T = TypeVar("T")

# Of the trial of uploads: parts, numbers of each (4 MiB of them), and steps of the work on each, which together take
# longer than the copy of the next one.
PARTS, NUMBERS, STEPS = 8, 2**20, 64


def uploaded(rows: Tensor, device: torch.device, at_once: int) -> Iterable[Tensor]:
    """Rows (B, D) on a device, in parts of so many at most, in order; an empty part where there are none.

    From a processor to a GPU each part goes by pinned memory and a stream of its own, while the one before it is worked
    on in the current stream; where that fails, one part after the other.
    """
    if len(rows) <= at_once:
        return [rows if rows.device == device else rows.to(device)]
    parts = rows.split(at_once)
    if rows.device.type != "cpu" or device.type != "cuda" or not overlaps(device):
        return (part.to(device) for part in parts)
    return _overlapped(parts, device)


def one_ahead(begun: Iterable[T]) -> Iterator[T]:
    """The same, each handed out once the next one has been begun."""
    waiting: deque[T] = deque()
    for one in begun:
        waiting.append(one)
        if len(waiting) == 2:
            yield waiting.popleft()
    yield from waiting


def together(parts: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    """Each part's tensors below those of the part before it, on the processor; from a device in one copy.

    Args:
        parts: Of each as many tensors, (B,) or (B, n), int64 or float64; one part at least.
    """
    if parts[0][0].is_cpu:
        return parts[0] if len(parts) == 1 else [torch.cat(column) for column in zip(*parts, strict=True)]
    return unpacked(torch.cat([packed(part) for part in parts]).cpu(), parts[0])


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors (B,) or (B, n) of int64 or float64 side by side: one (B, m) int64 with the bits of all."""
    return torch.cat([(tensor if tensor.ndim == 2 else tensor[:, None]).view(torch.int64) for tensor in tensors], dim=1)


def unpacked(whole: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors that were `packed`, which were like these but for their rows."""
    columns = whole.split([tensor.shape[1] if tensor.ndim == 2 else 1 for tensor in like], dim=1)
    return [
        column.contiguous().view(tensor.dtype).reshape(len(whole), *tensor.shape[1:])
        for column, tensor in zip(columns, like, strict=True)
    ]


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether rows go up to a GPU while others are worked on; tried once, and the log says why they do not."""
    return arrives(_overlapped, device)


def arrives(way: Callable[[Iterable[Tensor], torch.device], Iterable[Tensor]], device: torch.device) -> bool:
    """Whether parts that go up to a device in some way are there, and stay, while they are worked on."""
    sent = torch.arange(PARTS * NUMBERS, dtype=torch.float32)
    try:
        found = torch.cat([_worked_on(part) for part in way(sent.split(NUMBERS), device)]).cpu()
        fault = None if torch.equal(found, sent + STEPS) else "numbers arrive other than they were sent"
    except Exception as error:  # noqa: BLE001 - whatever a device lacks here, there is the plain copy
        fault = str(error)
    if fault is not None:
        log.warning("embeddings go up to %s one part after the other: %s", device, fault)
    return fault is None


def _worked_on(part: Tensor) -> Tensor:
    for _ in range(STEPS):
        part = part + 1
    return part


def _overlapped(parts: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Parts on a GPU; few at a time, however slow the work on them is."""
    worked: deque[torch.cuda.Event] = deque()
    for there, arrival in one_ahead(_sent(part, device) for part in parts):
        working = torch.cuda.current_stream(device)
        working.wait_event(arrival)
        # It was allocated in the other stream, which would reuse its memory as soon as it is dropped.
        there.record_stream(working)
        yield there
        worked.append(working.record_event())
        if len(worked) == 2:
            worked.popleft().synchronize()


def _sent(part: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event]:
    """A part on its way to a GPU, and the event of its arrival."""
    copying = _copying(device)
    with torch.cuda.stream(copying):
        # Torch gives the pinned memory to nobody else before the copy out of it is done.
        there = part.pin_memory().to(device, non_blocking=True)
    return there, copying.record_event()


@functools.cache
def _copying(device: torch.device) -> Any:
    """The stream of a device's copies: one, as torch keeps memory by the stream that it was allocated in."""
    return own_stream(device)
