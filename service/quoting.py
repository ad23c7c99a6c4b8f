"""What a caller wrote, as it is said back: printable, and short whatever it was.

`ascii` escapes lone surrogates and control characters.
"""

from __future__ import annotations

from collections.abc import Sequence

QUOTED_CHARACTERS = 60
LISTED_WORDS = 10


def quoted(text: str) -> str:
    """The beginning of it, in quotes."""
    return ascii(text if len(text) <= QUOTED_CHARACTERS else text[:QUOTED_CHARACTERS] + "...")


def bare(text: str) -> str:
    """The same without quotes, of what is not a word of its own: a path, a type, a message."""
    return quoted(text)[1:-1]


def listed(words: Sequence[str]) -> str:
    """The first of them, and how many there are beside."""
    rest = f" and {len(words) - LISTED_WORDS} more" if len(words) > LISTED_WORDS else ""
    return ", ".join(map(quoted, words[:LISTED_WORDS])) + rest
