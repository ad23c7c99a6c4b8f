"""The commands for a registry that came back older: settings -> registry, beside the marks of the data directory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack

from service.errors import RegistryRefused
from service.opening import open_registry
from service.registry.history import Comparison
from service.registry.marks import Marks
from service.settings import Settings

AT_STAKE = (
    "Suffixes that were issued after the cut may be issued again, to other items: whoever keeps Semantic IDs from that "
    "time (a model's training data, logs, a decoder's trie) may find another item under them. Restore the newer "
    "registry instead where there is one."
)


async def compared(settings: Settings) -> list[Comparison]:
    """All records of the registry and all that have a mark in the data directory, by name.

    Raises:
        SemidError: The registry cannot be reached, or refuses.
    """
    if settings.redis_url is None and not (settings.data_dir / "registry").is_dir():
        raise RegistryRefused(
            f"There is no registry in {settings.data_dir}: set SID_DATA_DIR to the service's data directory, and "
            "SID_REDIS_URL to its registry where it has one of its own."
        )
    async with AsyncExitStack() as stack:
        registry = await open_registry(settings, stack, Marks(settings.data_dir / "history"))
        return await registry.compare()


async def accept(settings: Settings, comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Begins a new epoch of each of these records.

    Returns:
        Those that were changed by others since they were compared, and were left alone.

    Raises:
        SemidError: The registry cannot be reached, or refuses.
    """
    async with AsyncExitStack() as stack:
        registry = await open_registry(settings, stack)
        return [comparison for comparison in comparisons if not await registry.accept(comparison)]


def described(comparison: Comparison) -> str:
    """A line on a record."""
    found, marks = comparison.found, sorted(comparison.marks, key=lambda mark: mark.revision)
    known = ", ".join(f"revision {mark.revision} of epoch {mark.epoch.decode()}" for mark in marks) or "no mark"
    words = "OLDER" if comparison.older else "ok" if marks else "?"
    line = f"{words:5}  {comparison.name}  registry: {found}, {comparison.live} live items; acknowledged: {known}"
    if comparison.parts:
        line += f"; servers have lost IDs under {comparison.parts} first codes"
    return f"{line}; lost: up to {comparison.lost} changes" if comparison.lost else line
