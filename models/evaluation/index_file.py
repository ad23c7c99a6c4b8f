"""Published index files: codes without a tokenizer, measured as a tokenizer's are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_TOKEN = re.compile(r"<[a-z]_(\d{1,18})>")

# A count of each codeword is held in memory.
HIGHEST = 2**24 - 1


class Index(NamedTuple):
    """The codes of an index file.

    Attributes:
        keys: What the file names its n items by.
        codes: (n, L) int64.
        codebook_sizes: K_l, which the file does not say: the smallest power of two that holds every level's codes.
    """

    keys: tuple[str, ...]
    codes: Tensor
    codebook_sizes: tuple[int, ...]


def read_index(path: Path) -> Index:
    """An index file as LETTER and MiniOneRec publish it: `{"item": ["<a_12>", "<b_200>", ...], ...}`.

    All numbers of an item count as codes: a file whose last token is a collision suffix (`semid export --format
    index-json` writes such) has a level more than its tokenizer.

    Raises:
        ValueError: It cannot be read, or its entries are no tokens or of different length.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is neither a checkpoint's directory nor an index file (JSON)") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an index file: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} is no index file: expected an object of item -> tokens")
    codes = [_numbers(path, item, tokens) for item, tokens in content.items()]
    if len({len(row) for row in codes}) > 1:
        raise ValueError(f"{path} has items of {sorted({len(row) for row in codes})} tokens; expected one number")
    numbers = torch.tensor(codes, dtype=torch.int64)
    if int(numbers.max()) > HIGHEST:
        raise ValueError(f"{path} has the number {int(numbers.max())}; codes end at {HIGHEST}")
    size = 1 << int(numbers.max()).bit_length()
    return Index(tuple(content), numbers, (size,) * numbers.shape[1])


def _numbers(path: Path, item: str, tokens: object) -> list[int]:
    matches = (
        [_TOKEN.fullmatch(token) if isinstance(token, str) else None for token in tokens]
        if isinstance(tokens, list)
        else []
    )
    numbers = [int(match[1]) for match in matches if match]
    if not numbers or len(numbers) < len(matches):
        raise ValueError(f"{path}: item {item!r} has {tokens!r}; expected tokens such as '<a_12>'")
    return numbers
