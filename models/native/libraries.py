"""Where the compiled libraries lie."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


def opened(name: str, open_library: Callable[[Path], ctypes.CDLL]) -> ctypes.CDLL | None:
    """The library that the installation compiled; None where it had no compiler, or another machine's lies here."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(name + suffix)
        if path.is_file():
            try:
                return open_library(path)
            except OSError:
                return None
    return None
