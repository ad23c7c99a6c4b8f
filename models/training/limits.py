"""What the settings of a family's fit may be: refused before anything is read, with the setting's name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from typing import Any

# What a Semantic ID can say: a letter for each level, two bytes for each code.
LEVELS = 25
CODEWORDS = 65_536

# Numbers of a layer or a latent: beyond that no memory holds the matrix between two of them.
WIDTH = 65_536

# The least that a setting may be, whatever has it; 0 where nothing is said.
_LEAST = {
    "batch_rows": 1,
    "batch_users": 1,
    "heads": 1,
    "max_length": 1,
    "neighbours": 1,
    "passes": 1,
    "pool_rows": 2,
    "query_rows": 1,
    "rows_per_child": 1,
    "starts": 1,
    "width": 1,
    "window": 1,
}

# The most, where there is one.
_MOST = {"latent": WIDTH, "local": 1, "memory": 1, "restart": 1}

# torch takes no other seeds on all devices.
_SEEDS = range(-(2**63), 2**63)


def check_settings(fit: object) -> None:
    """Refuse settings under which nothing can be fitted.

    What depends on the embeddings is checked where they are known: `check_width`, too few rows.

    Args:
        fit: A family's hyper-parameters, or those of collaborative embeddings.

    Raises:
        ValueError: There is no level, a level has no codeword, there are more than a Semantic ID can say, or a number
            is out of its range.
    """
    sizes: tuple[int, ...] = getattr(fit, "codebook_sizes", (1,))
    if not sizes or not all(type(size) is int and size >= 1 for size in sizes):
        raise ValueError(f"codebook_sizes are {_brief(sizes)}: at least one level is needed, and one codeword for each")
    if len(sizes) > LEVELS or max(sizes) > CODEWORDS:
        raise ValueError(
            f"codebook_sizes are {_brief(sizes)}: a Semantic ID has at most {LEVELS} levels of at most {CODEWORDS:,} "
            "codewords"
        )
    for name, value in _settings(fit):
        if isinstance(value, tuple) and not all(type(one) is int and 1 <= one <= WIDTH for one in value):
            raise ValueError(f"{name} is {_brief(value)}; expected whole numbers from 1 to {WIDTH:,}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            _check_number(name, value)


def check_width(family: str, fit: object, width: int) -> None:
    """Refuse what cannot be fitted to embeddings of a width, before they are read.

    Args:
        family: A key of `models.tokenizer.FAMILIES`.
        fit: Its hyper-parameters.
        width: D.

    Raises:
        ValueError: The latent is wider than what it is projected from, hidden layers are too narrow, or parts of the
            latent cannot be had; or opq has no faiss.
    """
    levels = len(getattr(fit, "codebook_sizes", ()))
    latent = getattr(fit, "latent", 0) or width
    hidden: tuple[int, ...] = getattr(fit, "hidden", ())
    if getattr(fit, "start", "projection") == "projection" and latent > width:
        raise ValueError(f"latent is {latent}: a projection of {width} numbers cannot have {latent}")
    if getattr(fit, "start", "random") != "random" and hidden and min(hidden) < 2 * latent:
        raise ValueError(
            f"hidden is {hidden}: widths of at least {2 * latent}, twice the latent's, are needed to start from a "
            "linear map; --set 'start=\"random\"' takes any"
        )
    if family in ("pq", "opq") and latent < levels:
        raise ValueError(f"{family}: the latent's width, {latent}, is below the number of levels, {levels}")
    if family == "opq" and latent % levels:
        raise ValueError(f"opq: the latent's width, {latent}, has to be a multiple of the number of levels, {levels}")
    if family == "opq" and find_spec("faiss") is None:
        raise ValueError("opq is trained with faiss: pip install 'semid[train]'")


def _brief(numbers: tuple[Any, ...]) -> str:
    """A tuple, only the first of many."""
    return str(numbers) if len(numbers) <= LEVELS else f"({', '.join(map(str, numbers[:3]))}, ... {len(numbers):,})"


def _settings(config: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its name, nested ones by dots."""
    for field in fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _settings(value, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}", value


def _check_number(name: str, value: float) -> None:
    last = name.rpartition(".")[2]
    if last == "seed":
        if value not in _SEEDS:
            raise ValueError(f"{name} is {value}; expected 64 bits")
        return
    if last in ("held_out", "dropout"):
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; it is a share: at least 0 and below 1")
        return
    if last == "learning_rate" and not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it is above 0")
    least, most = _LEAST.get(last, 0), _MOST.get(last, math.inf)
    if not least <= value <= most or value == math.inf:
        raise ValueError(
            f"{name} is {value}; it is at least {least}" + (f" and at most {most}" if last in _MOST else "")
        )
