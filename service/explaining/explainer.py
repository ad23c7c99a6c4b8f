"""One content at a time on the canonical path, beside the model's own thread."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from models import Explanation, Tokenizer
from service.batching.jobs import Content
from service.errors import EncodingFailed, Overloaded

WAITING = 8  # people who try texts; whoever has many to encode sends a dry run, which goes by the batch


class Path(NamedTuple):
    """How one content comes to its codes.

    Attributes:
        codes: One a level.
        margins: Of each level, in units of the latent.
        residual_norms: Of what each level receives, and at last of what none took: L + 1 numbers.
    """

    codes: tuple[int, ...]
    margins: tuple[float, ...]
    residual_norms: tuple[float, ...]

    @property
    def quantization_error(self) -> float:
        """Squared norm of what no level took."""
        return self.residual_norms[-1] ** 2


class Explainer:
    """Explains contents for one tokenizer, one at a time: the canonical path is slow, and shares the machine.

    The one under way when its caller leaves still keeps the next waiting; one that waits then is dropped.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """By this tokenizer, whose `explain` any thread may call."""
        self._tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="explain")
        self._waiting = 0

    async def explain(self, content: Content) -> Path:
        """The path of a content.

        Raises:
            Overloaded: Too many wait already.
            EncodingFailed: The model fails on it.
        """
        if self._waiting >= WAITING:
            raise Overloaded(f"{self._waiting} contents wait to be explained already")
        self._waiting += 1
        try:
            return _path(await asyncio.get_running_loop().run_in_executor(self._thread, self._explain, content))
        finally:
            self._waiting -= 1

    def _explain(self, content: Content) -> Explanation:
        try:
            if isinstance(content, str):
                (pieces,) = self._tokenizer.split([content])
                return self._tokenizer.explain(pieces)
            return self._tokenizer.explain(torch.tensor(content))
        except ValueError as error:
            raise EncodingFailed(str(error)) from error


def _path(explanation: Explanation) -> Path:
    codes, margins, norms = (tuple(tensor.tolist()) for tensor in explanation)
    return Path(codes, margins, norms)
