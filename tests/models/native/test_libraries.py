"""Compiled libraries that are not what is called: they are left alone, and torch does their work."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from models.native import forward, libraries, search
from models.residual import ResidualQuantizer

SOURCES = Path(__file__).parents[3] / "models" / "native"
TYPES = {
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "bool": ctypes.c_bool,
    "void": None,
}
VERSION = search.INTERFACE.version
OF_OTHER_SOURCES = {
    "long residual_search_quantize(void) { return 0; }": "it has no residual_search_version",
    f"const int residual_search_version = {VERSION + 1};": f"it is of interface {VERSION + 1}, and {VERSION} is called",
    f"const int residual_search_version = {VERSION};": "it has no residual_search_kind",
}

needs_a_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Where a search's library is looked for."""
    monkeypatch.setattr(libraries, "__file__", str(tmp_path / "libraries.py"))
    search.installed_library.cache_clear()
    yield tmp_path / f"{search.INTERFACE.file}{EXTENSION_SUFFIXES[0]}"
    search.installed_library.cache_clear()


def _check_torch_searches(caplog, why: str) -> None:
    quantizer = ResidualQuantizer((4, 4), 3).double()
    quantizer.prepare()
    assert quantizer.search == "torch"
    assert quantizer.encode(torch.zeros(2, 3, dtype=torch.float64)).codes.tolist() == [[0, 0]] * 2
    (line,) = caplog.messages
    assert why in line


@needs_a_compiler
@pytest.mark.parametrize("source", OF_OTHER_SOURCES)
def test_a_library_that_was_compiled_from_other_sources_is_left_alone_and_the_log_says_why(source, installed, caplog):
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", installed]
    subprocess.run(command, input=source.encode(), check=True)
    _check_torch_searches(caplog, OF_OTHER_SOURCES[source])


def test_what_is_no_library_is_left_alone(installed, caplog):
    installed.write_bytes(b"of another machine")
    _check_torch_searches(caplog, "torch does what is compiled in _residual_argmin")


@pytest.mark.parametrize(
    ("interface", "source"), [(search.INTERFACE, "residual_argmin.c"), (forward.INTERFACE, "packed_bert.c")]
)
def test_what_is_called_is_what_the_source_declares(interface, source):
    text = (SOURCES / source).read_text()
    assert f"const int32_t {interface.prefix}_version = {interface.version};" in text
    for name, (result, arguments) in interface.functions.items():
        pattern = rf"^([\w ]+?) ?(\*?){interface.prefix}_{name}\(([^)]*)\)\n{{"
        declared = re.search(pattern, text, re.MULTILINE)
        assert declared is not None, name
        returned, pointer, parameters = declared.groups()
        text_result = ctypes.c_char_p if "char" in returned else ctypes.c_void_p
        assert result is (text_result if pointer else TYPES[returned.strip()]), name
        types = [
            ctypes.c_void_p if "*" in parameter else TYPES[parameter.split()[0]] for parameter in parameters.split(",")
        ]
        assert list(arguments) == types, name
