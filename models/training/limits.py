"""What the settings of any family's fit may be: refused before anything is read, with the setting's name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

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
    "width": 1,
    "window": 1,
}

# The most, where there is one.
_MOST = {"local": 1, "memory": 1, "restart": 1}

# torch takes no other seeds on all devices.
_SEEDS = range(-(2**63), 2**63)


def check_settings(fit: object) -> None:
    """Refuse settings under which nothing can be fitted.

    What depends on the data is checked where the data is: a latent wider than the embeddings, too few rows.

    Args:
        fit: A family's hyper-parameters, or those of collaborative embeddings.

    Raises:
        ValueError: There is no level, a level has no codeword, or a number is out of its range.
    """
    sizes: tuple[int, ...] = getattr(fit, "codebook_sizes", (1,))
    if not sizes or not all(type(size) is int and size >= 1 for size in sizes):
        raise ValueError(f"codebook_sizes are {sizes}: at least one level is needed, and one codeword for each")
    for name, value in _settings(fit):
        if isinstance(value, tuple) and not all(type(one) is int and one >= 1 for one in value):
            raise ValueError(f"{name} is {value}; expected whole numbers from 1")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            _check_number(name, value)


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
