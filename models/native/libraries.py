"""The compiled libraries: where they lie, and whether they are what this code calls.

A call through ctypes is checked by nobody: a library that was compiled from other sources (an old build in place, say)
would take one argument for another and spoil the memory. So each says of what interface it is, and one of another
interface, like one that is not there, leaves the work to torch.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger(__name__)


class Interface(NamedTuple):
    """What is called in a library.

    Attributes:
        file: Its name without the suffix.
        prefix: What its functions' names begin with, and that of the constant `PREFIX_version`.
        version: Of this interface; the C source has the same, and both change with any function's arguments or meaning.
        functions: Name -> the type of its result (None for none), and those of its arguments.
    """

    file: str
    prefix: str
    version: int
    functions: Mapping[str, tuple[Any, Sequence[Any]]]


def opened(interface: Interface) -> ctypes.CDLL | None:
    """The library that the installation compiled; None where it had no compiler, or what lies here does not fit.

    The log says why it does not.
    """
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(interface.file + suffix)
        if path.is_file():
            try:
                return open_library(path, interface)
            except OSError as error:
                log.warning("torch does what is compiled in %s, slower: %s", path.name, error)
                return None
    return None


def open_library(path: Path, interface: Interface) -> ctypes.CDLL:
    """A compiled library, its functions declared.

    Raises:
        OSError: It is no library of this machine, or one of another interface.
    """
    library = ctypes.CDLL(str(path))
    constant = f"{interface.prefix}_version"
    try:
        version = ctypes.c_int32.in_dll(library, constant).value
    except ValueError as error:
        msg = f"it has no {constant}, so it was compiled from other sources; compile it again"
        raise OSError(msg) from error
    if version != interface.version:
        msg = f"it is of interface {version}, and {interface.version} is called; compile it again"
        raise OSError(msg)
    for name, (result, arguments) in interface.functions.items():
        try:
            function = library[f"{interface.prefix}_{name}"]
        except AttributeError as error:
            msg = f"it has no {interface.prefix}_{name}: it was compiled for a processor that it has nothing for"
            raise OSError(msg) from error
        function.restype, function.argtypes = result, arguments
        setattr(library, f"{interface.prefix}_{name}", function)
    return library
