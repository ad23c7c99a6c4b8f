"""What the sections of a comparison's page share."""

from __future__ import annotations

from collections.abc import Sequence

from models.evaluation import plots
from models.evaluation.figures import Result


def legend(results: Sequence[Result], more: str = "", shown: Sequence[Result] | None = None) -> str:
    """Of all tokenizers, so that each has one colour on the whole page, those that are shown."""
    if not plots.available():
        return ""
    names = {result.name for result in (results if shown is None else shown)}
    return plots.legend([result.name if result.name in names else "" for result in results], more)


def kind(result: Result) -> str:
    """Family and shape."""
    sizes = set(result.codebook_sizes)
    shape = (
        f"{len(result.codebook_sizes)} x {sizes.pop()}"
        if len(sizes) == 1
        else " x ".join(map(str, result.codebook_sizes))
    )
    return f"{result.family or 'index file'}, {shape}"


def measured(result: Result) -> int:
    """The unseen items that figures rest on."""
    return result.on_unseen.items if result.on_unseen else 0


def levels(results: Sequence[Result]) -> int:
    """L of the tokenizer that has the most."""
    return max(len(result.codebook_sizes) for result in results)
