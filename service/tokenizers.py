"""The tokenizers that are loaded side by side, and which of them a request names."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from models import Manifest
from service.batching.batcher import Batcher
from service.content import ItemReader
from service.errors import AmbiguousTokenizer, TokenizerLoadedTwice, UnknownTokenizer
from service.explaining.explainer import Explainer
from service.memory import give_back
from service.stats.drift import ErrorWindow

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LoadedTokenizer:
    """A tokenizer at work. Whoever has it may use it; see `Tokenizers.replace`.

    Attributes:
        manifest: What it says of itself.
        reader: What content it takes.
        batcher: Its model's threads, and what waits for them.
        explainer: Shows how one content comes to its codes.
        errors: The quantization errors of what its model encoded lately.
    """

    manifest: Manifest
    reader: ItemReader
    batcher: Batcher
    explainer: Explainer
    errors: ErrorWindow

    @property
    def full_name(self) -> str:
        """`name@fingerprint`."""
        return self.manifest.full_name

    def origin(self, namespace: str) -> Mapping[str, str]:
        """What every answer of its record of a namespace begins with."""
        return {"tokenizer": self.full_name, "namespace": namespace}


@dataclass(frozen=True)
class TokenizerSet:
    """The tokenizers that are loaded at one moment; never changed, only replaced by another set.

    Attributes:
        loaded: The default first.

    Raises:
        TokenizerLoadedTwice: Two are the same.
    """

    loaded: tuple[LoadedTokenizer, ...]

    def __post_init__(self) -> None:
        """Refuse a tokenizer beside itself: both would claim in one record."""
        require_distinct([tokenizer.manifest for tokenizer in self.loaded])

    @property
    def default(self) -> LoadedTokenizer:
        """The one that answers where none is named."""
        return self.loaded[0]

    def beside(self, tokenizer: LoadedTokenizer) -> tuple[LoadedTokenizer, ...]:
        """All but this one."""
        return tuple(other for other in self.loaded if other is not tokenizer)

    def named(self, name: str | None) -> LoadedTokenizer:
        """The tokenizer of a `name` or `name@fingerprint`; the default where None.

        Raises:
            UnknownTokenizer: None has that name.
            AmbiguousTokenizer: Several have.
        """
        if name is None:
            return self.default
        found = [tokenizer for tokenizer in self.loaded if name in {tokenizer.full_name, tokenizer.manifest.name}]
        if not found:
            raise UnknownTokenizer(f"loaded: {', '.join(tokenizer.full_name for tokenizer in self.loaded)}")
        if len(found) > 1:
            names = " or ".join(tokenizer.full_name for tokenizer in found)
            raise AmbiguousTokenizer(f"several have the name {name}: say {names}")
        return found[0]


class Tokenizers:
    """Holds the set that is loaded now.

    A request asks once and keeps what it was given to its end, so the set can be replaced between any two requests. A
    tokenizer that is no longer in it works for those that have it: its model stops when the last of them lets it go.

    Attributes:
        current: The set that new requests are given.
    """

    def __init__(self, current: TokenizerSet) -> None:
        self.current = current
        self._leaving: set[Batcher] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._of_the_start = self._batchers()

    def named(self, name: str | None) -> LoadedTokenizer:
        """See `TokenizerSet.named`."""
        return self.current.named(name)

    def replace(self, new: TokenizerSet) -> None:
        """Give new requests another set; called on the event loop."""
        stop = partial(_on_loop, asyncio.get_running_loop(), self._stop)
        for tokenizer in set(self.current.loaded).difference(new.loaded):
            self._leaving.add(tokenizer.batcher)
            weakref.finalize(tokenizer, stop, tokenizer.batcher).atexit = False
        self.current = new

    async def close(self) -> None:
        """Stop all models, when they have done what is queued."""
        batchers = [*self._leaving, *(tokenizer.batcher for tokenizer in self.current.loaded)]
        while self._ending:
            await asyncio.wait(self._ending)
        for batcher in batchers:
            await batcher.stop()

    def _stop(self, batcher: Batcher) -> None:
        """Nobody has this batcher's tokenizer any more."""
        self._leaving.discard(batcher)
        of_the_start = id(batcher) in self._of_the_start
        stopping = asyncio.create_task(batcher.stop())
        self._await(stopping)
        stopping.add_done_callback(lambda _: self._give_back(of_the_start=of_the_start))

    def _give_back(self, *, of_the_start: bool) -> None:
        """A model has stopped, and whoever stopped it is about to let it go."""
        if of_the_start:  # what is there now is left out of later searches as well
            self._of_the_start = self._batchers()
        self._await(asyncio.create_task(give_back(of_the_start=of_the_start)))

    def _await(self, task: asyncio.Task[None]) -> None:
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def _batchers(self) -> frozenset[int]:
        """Whose models are loaded; by number, as nothing here may hold them."""
        return frozenset(id(tokenizer.batcher) for tokenizer in self.current.loaded)


def _on_loop(loop: asyncio.AbstractEventLoop, call: Callable[[T], None], argument: T) -> None:
    """Call it soon on a loop, from whichever thread; not where the loop has ended."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, argument)


def require_distinct(manifests: Sequence[Manifest]) -> None:
    """Raise TokenizerLoadedTwice where two have one fingerprint, whatever their names: their record is one."""
    names: dict[str, str] = {}
    for manifest in manifests:
        if manifest.fingerprint in names:
            first = names[manifest.fingerprint]
            raise TokenizerLoadedTwice(f"{first} and {manifest.full_name} have one fingerprint: name one of them")
        names[manifest.fingerprint] = manifest.full_name
