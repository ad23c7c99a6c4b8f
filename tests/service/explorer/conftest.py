"""One browser for all tests of the page."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.explorer.browser import Browser, find


@pytest.fixture(scope="session")
def tab() -> Iterator[Browser]:
    """A tab of it."""
    executable = find()
    if executable is None:
        assert "CI" not in os.environ, "no Chromium is installed"
        pytest.skip("no Chromium is installed")
    profile = Path(tempfile.mkdtemp(prefix="semid-chromium-"))
    running = Browser(executable, profile)
    yield running
    running.close()
    shutil.rmtree(profile, ignore_errors=True)
