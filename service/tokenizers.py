"""The tokenizers that are loaded side by side, and which of them a request names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models import Manifest
from service.batching.batcher import Batcher
from service.content import ItemReader
from service.errors import AmbiguousTokenizer, TokenizerLoadedTwice, UnknownTokenizer
from service.explaining.explainer import Explainer
from service.stats.drift import ErrorWindow


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer at work.

    Attributes:
        manifest: What it says of itself.
        reader: What content it takes.
        batcher: Its model's thread.
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

    A request asks once and keeps what it was given to its end, so the set can be replaced between any two requests.

    Attributes:
        current: The set that new requests are given.
    """

    def __init__(self, current: TokenizerSet) -> None:
        self.current = current

    def named(self, name: str | None) -> LoadedTokenizer:
        """See `TokenizerSet.named`."""
        return self.current.named(name)


def require_distinct(manifests: Sequence[Manifest]) -> None:
    """Raise TokenizerLoadedTwice where two have one fingerprint, whatever their names: their record is one."""
    names: dict[str, str] = {}
    for manifest in manifests:
        if manifest.fingerprint in names:
            first = names[manifest.fingerprint]
            raise TokenizerLoadedTwice(f"{first} and {manifest.full_name} have one fingerprint: name one of them")
        names[manifest.fingerprint] = manifest.full_name
