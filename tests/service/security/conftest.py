"""Services with something to protect."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.access.keys import KeyFile, Scope
from tests.conftest import ServiceThread
from tests.service.security.guarded import PAGE, Guarded


@pytest.fixture(scope="session")
def guarded(start_service: Callable[..., ServiceThread]) -> Iterator[Guarded]:
    """One that asks for keys."""
    directory = Path(tempfile.mkdtemp(prefix="semid-"))
    file, secrets = KeyFile(), {}
    for scope in Scope:
        file, secrets[scope] = file.with_new(f"of-{scope}", scope)
    file.write(directory / "keys.json")
    running = start_service(data_dir=directory, keys_file=directory / "keys.json", cors_origins=PAGE)
    yield Guarded(running, directory / "keys.json", secrets)
    running.stop()
    shutil.rmtree(directory, ignore_errors=True)
