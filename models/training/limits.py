"""What the settings of any family's fit may be: refused before anything is read, with the setting's name."""

from __future__ import annotations

import math
from typing import Any

# The least that a setting may be, where a family has it.
_LEAST = {
    "latent": 0,
    "epochs": 0,
    "warm_up_epochs": 0,
    "batch_rows": 1,
    "rows_per_child": 1,
    "collision_price": 0,
}


def check_settings(fit: object) -> None:
    """Refuse settings under which no family can be fitted.

    What depends on the data is checked where the data is: a latent wider than the embeddings, too few rows.

    Args:
        fit: A family's hyper-parameters.

    Raises:
        ValueError: There is no level, a level has no codeword, or a number is out of its range.
    """
    sizes: tuple[int, ...] = getattr(fit, "codebook_sizes", (1,))
    if not sizes or min(sizes) < 1:
        raise ValueError(f"codebook_sizes are {sizes}: at least one level is needed, and one codeword for each")
    for name, least in _LEAST.items():
        value: Any = getattr(fit, name, least)
        if not least <= value < math.inf:
            raise ValueError(f"{name} is {value}; it is at least {least}")
    held_out: float = getattr(fit, "held_out", 0.0)
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is {held_out}; it is a share of the rows: at least 0 and below 1")
    rate: float = getattr(fit, "learning_rate", 1.0)
    if not 0 < rate < math.inf:
        raise ValueError(f"learning_rate is {rate}; it is above 0")
