"""The Semantic ID: its two written forms, and its codes as bytes.

A Semantic ID of a tokenizer with L levels always has L + 1 numbers: the codes, then the collision suffix.
"""

from __future__ import annotations

import re
import string
import struct
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from service.errors import MalformedSemanticId
from service.quoting import quoted

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_LEVELS = 25  # one letter a level, and one more for the suffix
MAX_CODEWORDS = 65_536
MAX_SUFFIX = 2**31 - 1

_NUMBER = re.compile(r"0|[1-9][0-9]{0,9}")
_TOKEN = re.compile(r"<([a-z])_([^<>]*)>")
_LETTERS = string.ascii_lowercase  # of the levels, and of the suffix


@dataclass(frozen=True, slots=True, order=True)
class SemanticId:
    """The codes of an item and its collision suffix.

    Attributes:
        codes: One code a level, coarse first.
        suffix: 0 for the first item of these codes, 1 for the second, and so on.
    """

    codes: tuple[int, ...]
    suffix: int

    def __str__(self) -> str:
        """The hyphenated form: `12-200-7-0`."""
        return _hyphenated(len(self.codes)) % (*self.codes, self.suffix)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The generator's vocabulary: `('<a_12>', '<b_200>', '<c_7>', '<d_0>')`."""
        return tuple((_tokens(len(self.codes)) % (*self.codes, self.suffix)).split(" "))

    @classmethod
    def parse(cls, text: str, codebook_sizes: Sequence[int]) -> SemanticId:
        """Reads either form, `12-200-7-0` or `<a_12><b_200><c_7><d_0>`; only the canonical spelling will do.

        Args:
            text: What a caller wrote.
            codebook_sizes: The number of codewords of each of the tokenizer's L levels.

        Raises:
            MalformedSemanticId: The text is not a Semantic ID of such a tokenizer; the message says why.
        """
        parts = _token_parts(text) if text.startswith("<") else text.split("-")
        if len(parts) != len(codebook_sizes) + 1:
            raise MalformedSemanticId(
                f"{quoted(text)} has {len(parts)} parts; a Semantic ID of this tokenizer has "
                f"{len(codebook_sizes) + 1}: {len(codebook_sizes)} codes and the collision suffix."
            )
        numbers = _numbers(parts, codebook_sizes, text)
        if numbers[-1] > MAX_SUFFIX:
            raise MalformedSemanticId(f"{quoted(text)}: the suffix {numbers[-1]} is above {MAX_SUFFIX}.")
        return cls(tuple(numbers[:-1]), numbers[-1])


@cache
def _hyphenated(levels: int) -> str:
    """The pattern of that form: to fill it in takes half the time of joining the numbers."""
    return "-".join(["%d"] * (levels + 1))


@cache
def _tokens(levels: int) -> str:
    """The pattern of the tokens, a space between each two."""
    return " ".join([f"<{letter}_%d>" for letter in _LETTERS[: levels + 1]])


def parse_prefix(text: str, codebook_sizes: Sequence[int]) -> tuple[int, ...]:
    """Reads the codes of the first levels, `12-200` or `<a_12><b_200>`; the empty text is the root.

    Args:
        text: What a caller wrote.
        codebook_sizes: The number of codewords of each of the tokenizer's L levels.

    Raises:
        MalformedSemanticId: The text is not 0 to L codes of such a tokenizer; the message says why.
    """
    if not text:
        return ()
    parts = _token_parts(text) if text.startswith("<") else text.split("-")
    if len(parts) > len(codebook_sizes):
        raise MalformedSemanticId(
            f"{quoted(text)} has {len(parts)} parts; a prefix of this tokenizer has at most "
            f"{len(codebook_sizes)} codes."
        )
    return tuple(_numbers(parts, codebook_sizes, text))


def write_prefix(codes: Sequence[int]) -> str:
    """The hyphenated form of a prefix."""
    return "-".join(map(str, codes))


class CodeLayout:
    """Packs codes into bytes of one fixed width, so that equal prefixes are equal leading bytes.

    One byte a code where every codebook has at most 256 codewords, else two, big-endian.
    """

    def __init__(self, codebook_sizes: Sequence[int]) -> None:
        """Lays out codes for these codebooks.

        Raises:
            ValueError: There are no levels or more than 25, or a codebook is empty or above 65,536 codewords.
        """
        sizes = tuple(int(size) for size in codebook_sizes)
        if not 1 <= len(sizes) <= MAX_LEVELS:
            raise ValueError(f"a tokenizer has 1 to {MAX_LEVELS} levels, not {len(sizes)}")
        if not all(1 <= size <= MAX_CODEWORDS for size in sizes):
            raise ValueError(f"a codebook has 1 to {MAX_CODEWORDS} codewords: {sizes}")
        self.codebook_sizes = sizes
        self.bytes_per_code = 1 if max(sizes) <= 256 else 2
        self.width = len(sizes) * self.bytes_per_code
        kind = "B" if self.bytes_per_code == 1 else "H"
        self._structs = tuple(struct.Struct(f">{levels}{kind}") for levels in range(len(sizes) + 1))

    def pack(self, codes: Sequence[int]) -> bytes:
        """The codes as `width` bytes.

        Raises:
            ValueError: There are not L codes, or one is not a code of its level.
        """
        if len(codes) != len(self.codebook_sizes):
            raise ValueError(f"not codes of codebooks {self.codebook_sizes}: {tuple(codes)}")
        return self.pack_prefix(codes)

    def pack_prefix(self, codes: Sequence[int]) -> bytes:
        """The codes of the first levels, or of all, as bytes.

        Raises:
            ValueError: There are more than L codes, or one is not a code of its level.
        """
        try:
            packed = self._structs[len(codes)].pack(*codes)
        except (struct.error, IndexError) as error:
            raise ValueError(f"not codes of codebooks {self.codebook_sizes}: {tuple(codes)}") from error
        for code, size in zip(codes, self.codebook_sizes, strict=False):
            if code >= size:
                raise ValueError(f"not codes of codebooks {self.codebook_sizes}: {tuple(codes)}")
        return packed

    def unpack(self, packed: bytes) -> tuple[int, ...]:
        """The codes that `pack` made these bytes of.

        Raises:
            ValueError: There are not `width` bytes.
        """
        if len(packed) != self.width:
            raise ValueError(f"packed codes have {self.width} bytes, not {len(packed)}")
        return self._structs[-1].unpack(packed)


HASH_FACTOR, HASH_MODULUS = 48_271, 2**31 - 1


def hash_prefix(packed: bytes) -> int:
    """The number by which the record finds what stands under a prefix; the same as in `lib.lua`."""
    number = 0
    for byte in packed:
        number = (number * HASH_FACTOR + byte + 1) % HASH_MODULUS
    return number


def _token_parts(text: str) -> list[str]:
    """The numbers inside `<a_..><b_..>`, as written."""
    parts: list[str] = []
    position = 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            raise MalformedSemanticId(f"{quoted(text)} is not a sequence of tokens like <a_12><b_200>.")
        if token[1] != _LETTERS[len(parts) : len(parts) + 1]:  # of more there is none
            raise MalformedSemanticId(
                f"{quoted(text)}: token {len(parts) + 1} has the letter {token[1]!r}; "
                "the letters run a, b, c, ... in order."
            )
        parts.append(token[2])
        position = token.end()
    return parts


def _numbers(parts: Sequence[str], codebook_sizes: Sequence[int], text: str) -> list[int]:
    """The numbers of an ID or of a prefix, its codes within their codebooks."""
    numbers = [_number(part, text) for part in parts]
    for level, (code, size) in enumerate(zip(numbers, codebook_sizes, strict=False), start=1):
        if code >= size:
            raise MalformedSemanticId(f"{quoted(text)}: code {code} of level {level} is above {size - 1}.")
    return numbers


def _number(part: str, text: str) -> int:
    if _NUMBER.fullmatch(part) is None:
        raise MalformedSemanticId(
            f"{quoted(text)}: {quoted(part)} is not a number in canonical form "
            "(digits only, no sign, no leading zeros)."
        )
    return int(part)
