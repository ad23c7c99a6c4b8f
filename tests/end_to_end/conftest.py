"""The service as a process of its own, as its users run it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.settings import Settings

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 180.0  # importing torch alone takes long where the machine is busy
SEMID = [sys.executable, "-c", "from service.cli import app; app()"]


class ServiceProcess:
    """`semid serve` in a process of its own, on a free port."""

    def __init__(self, directory: Path, **settings: object) -> None:
        self.data_dir = directory
        self._log = directory / f"service-{time.monotonic_ns()}.log"
        chosen = {"port": 0, "data_dir": directory / "data", "device": "cpu", **settings}
        environment = {**os.environ, **{f"SID_{name.upper()}": str(value) for name, value in chosen.items()}}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen([*SEMID, "serve"], cwd=ROOT, env=environment, stdout=log, stderr=log)
        self.http = httpx.Client(timeout=120)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has printed."""
        return self._log.read_text(errors="replace")

    def wait_until_ready(self) -> ServiceProcess:
        """Return once it has said where it is; fail with its log where it does not."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (address := re.search(r'(?:page\s+|"address":")(http://[\d.]+:\d+)', self.log)):
            assert self._process.poll() is None, f"the service ended with {self._process.returncode}:\n{self.log}"
            assert time.monotonic() < deadline, f"the service is not ready:\n{self.log}"
            time.sleep(0.05)
        self.http.base_url = address[1]
        assert self.http.get("/readyz").status_code == 200
        return self

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        found = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        return sum(map(float, found))

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def wait(self, timeout_s: float = 60.0) -> int:
        """Its exit code, once it has ended."""
        return self._process.wait(timeout_s)

    def stop(self) -> None:
        """End it, whatever its state."""
        self.http.close()
        if self._process.poll() is None:
            self.terminate()
            try:
                self.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()


@pytest.fixture(scope="session")
def service_process() -> type[ServiceProcess]:
    """Starts a service; whoever starts it stops it."""
    return ServiceProcess


@pytest.fixture(scope="session")
def shipped() -> Path:
    """The checkpoint that ships as the default."""
    directory = Settings().checkpoint
    assert (directory / "manifest.json").is_file(), f"the default checkpoint is missing: {directory}"
    return directory


@pytest.fixture(scope="session")
def running(shipped: Path) -> Iterator[ServiceProcess]:
    """The service as a newcomer gets it: shipped checkpoint, embedded registry."""
    directory = Path(tempfile.mkdtemp(prefix="semid-"))
    process = ServiceProcess(directory, checkpoint=shipped, max_wait_s=0.1)
    yield process.wait_until_ready()
    process.stop()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def start_process(data_dir: Path, checkpoint: Path) -> Iterator[Callable[..., ServiceProcess]]:
    """Starts services on the small checkpoint and the test's data directory; they are stopped with the test."""
    started: list[ServiceProcess] = []

    def start(**settings: Any) -> ServiceProcess:
        started.append(ServiceProcess(data_dir, **{"checkpoint": checkpoint, **settings}))
        return started[-1]

    yield start
    for process in started:
        process.stop()
