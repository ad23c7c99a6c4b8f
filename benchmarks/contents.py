"""What is tokenized: made-up products, or those of a catalogue."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models import TextTemplate
from models.catalogue import read_items

DIMENSION = 384
WORDS = {
    "maker": "Norwick Alderon Tessaly Brightmoor Kestral Oakhaven Vantor Lumisol Graymark Pellston".split(),
    "trait": "stainless cordless organic foldable waterproof ergonomic compact heavy-duty adjustable scented".split(),
    "thing": "kettle backpack shampoo wrench headphones bookshelf lantern trousers coffee keyboard drill novel".split(),
    "for": "travel kitchen office camping children professionals sensitive skin beginners winter gaming".split(),
    "spec": "1.7 l|500 ml|18 V|42 cm|pack of 6|size XL|USB-C|2200 W|100% cotton|256 GB".split("|"),
    "path": "Home > Kitchen|Beauty > Hair Care|Tools > Power Tools|Sports > Outdoor|Electronics > Audio".split("|"),
}


class Texts:
    """Texts of products, about 40 word pieces each, all different.

    Args:
        catalogue: A file that `semid tokenize` reads; made-up products where None.
        seed: Of what is made up.
    """

    def __init__(self, catalogue: Path | None = None, seed: int = 0) -> None:
        self._draw = random.Random(seed)
        self._catalogue = None if catalogue is None else _texts_of(catalogue)

    def take(self, count: int) -> list[str]:
        """So many that were not taken before.

        Raises:
            ValueError: The catalogue has no more.
        """
        if self._catalogue is None:
            return [self._made_up() for _ in range(count)]
        taken = list(islice(self._catalogue, count))
        if len(taken) < count:
            raise ValueError("the catalogue has too few different texts for these rounds")
        return taken

    def _made_up(self) -> str:
        def some(kind: str) -> str:
            return self._draw.choice(WORDS[kind])

        return (
            f"{some('maker')} {some('trait')} {some('trait')} {some('thing')} for {some('for')}, {some('spec')}, "
            f"{some('spec')}, model {some('maker')[:3].upper()}-{self._draw.randrange(10**6)}. {some('maker')}. "
            f"{some('path')}. A {some('trait')} {some('thing')} made for {some('for')} and {some('for')}, "
            f"with {some('spec')}."
        )


def _texts_of(catalogue: Path) -> Any:
    """The different texts of a catalogue, shuffled."""
    template = TextTemplate()
    texts = list(dict.fromkeys(item.content(template) for batch in read_items(catalogue) for item in batch))
    random.Random(0).shuffle(texts)
    return iter(texts)


class Embeddings:
    """Embeddings without end: those of some made-up texts, each time moved a little and brought back to length 1.

    Args:
        base: (N, D) float32 embeddings of products; None draws directions evenly, which costs no text encoder.
        seed: Of the moves.
    """

    def __init__(self, base: NDArray[np.float32] | None = None, seed: int = 0) -> None:
        self._draw = np.random.default_rng(seed)
        self._base = self._unit(self._draw.normal(size=(512, DIMENSION))) if base is None else base

    def take(self, count: int) -> NDArray[np.float32]:
        """So many new ones, (count, D) float32."""
        rows = self._base[self._draw.integers(len(self._base), size=count)]
        return self._unit(rows + self._draw.normal(scale=0.02, size=rows.shape))

    @staticmethod
    def _unit(rows: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        return np.float32(rows / np.linalg.norm(rows, axis=1, keepdims=True))


class Recombined:
    """Embeddings made of pairs of others.

    Args:
        base: (N, D) float32.
        seed: Of the pairs.
    """

    def __init__(self, base: NDArray[np.float32], seed: int = 0) -> None:
        self._base = base
        self._draw = np.random.default_rng(seed)

    def take(self, count: int) -> NDArray[np.float32]:
        """So many, (count, D) float32 of length 1."""
        one, other = self._draw.integers(len(self._base), size=(2, count))
        rows = self._base[one] + np.float32(0.5) * self._base[other]
        return np.float32(rows / np.linalg.norm(rows, axis=1, keepdims=True))
