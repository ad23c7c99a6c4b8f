"""What every test may ask for: a small real tokenizer, a real Valkey, a real server behind a real socket."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import redis
import torch
import uvicorn

from models import Tokenizer, load
from models.checkpoint import freeze, save
from models.network import DecoderNetwork, EncoderNetwork, NetworkConfig
from models.residual import ResidualQuantizer
from models.template import TextTemplate
from models.text_encoder import TextEncoder, TextEncoderConfig
from models.tokenizer import ErrorBounds, TokenizerParts
from service.app import create_app
from service.registry.embedded import EmbeddedValkey
from service.server import protocol_for
from service.settings import Settings
from tests.families import train_families
from tests.valkey import Valkey

DIMENSION = 384
CODEBOOK_SIZES = (16, 16, 16)
START_TIMEOUT_S = 120.0  # the machine may be busy with other things


@pytest.fixture(scope="session", autouse=True)
def _no_settings_from_outside() -> None:
    """The caller's own SID_* settings must not reach a test."""
    for name in [name for name in os.environ if name.startswith("SID_") and name != "SID_FULL"]:
        del os.environ[name]


def build_checkpoint(
    directory: Path,
    name: str = "small",
    codebook_sizes: tuple[int, ...] = CODEBOOK_SIZES,
    *,
    seed: int = 20240229,
    max_suffix: int | None = None,
    takes_text: bool = True,
    dimension: int = DIMENSION,
) -> Path:
    """A frozen checkpoint with the real text encoder and small random codebooks, so that codes collide often."""
    torch.manual_seed(seed)
    config = NetworkConfig((dimension, 16))
    quantizer = ResidualQuantizer(codebook_sizes, 16)
    for level, codebook in enumerate(quantizer.codebooks):
        torch.nn.init.normal_(codebook, std=0.04 / 2**level)
    quantizer.initialised.fill_(True)
    parts = TokenizerParts(
        family="rqvae",
        template=TextTemplate(),
        text_encoder=TextEncoder(TextEncoderConfig()) if takes_text else None,
        network=EncoderNetwork(config),
        quantizer=quantizer,
        decoder=DecoderNetwork(config),
    )
    save(directory, parts, freeze(name, parts, ErrorBounds(), max_suffix=max_suffix))
    return directory


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint."""
    return build_checkpoint(tmp_path_factory.mktemp("checkpoints") / "small")


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes others, see `build_checkpoint`."""

    def make(name: str, *sizes: int, **options: Any) -> Path:
        return build_checkpoint(tmp_path_factory.mktemp("checkpoints") / name, name, sizes, **options)

    return make


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small trained checkpoint of each family, see `tests.families`."""
    return train_families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Tokenizer:
    """The small checkpoint, loaded."""
    return load(checkpoint)


@pytest.fixture(scope="session")
def make_embedding() -> Callable[[int], list[float]]:
    """An embedding (D,) for each seed; equal seeds give equal ones."""

    def make(seed: int) -> list[float]:
        vector = np.random.default_rng(seed).standard_normal(DIMENSION).astype(np.float32)
        return (vector / np.linalg.norm(vector)).tolist()

    return make


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """An empty directory with a path short enough for a unix socket in it."""
    directory = Path(tempfile.mkdtemp(prefix="semid-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def valkey_process() -> Iterator[Valkey]:
    """A Valkey server of the test's own."""
    directory = Path(tempfile.mkdtemp(prefix="valkey-"))
    server = Valkey(directory)
    yield server
    if server.process.poll() is None:
        server.kill()
    shutil.rmtree(directory, ignore_errors=True)


class ServiceThread:
    """The app behind a real uvicorn, in a thread of this process; its parts can be reached through `state`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.app = create_app(settings)
        config = uvicorn.Config(
            self.app,
            port=settings.port if "port" in settings.model_fields_set else 0,
            http=protocol_for(settings),
            h11_max_incomplete_event_size=settings.max_head_bytes,
            ws="none",
            log_level="error",
            timeout_graceful_shutdown=5,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="uvicorn", daemon=True)
        self._thread.start()
        _until(lambda: self._server.started or not self._thread.is_alive(), "the service does not start")
        assert self._server.started, "the service ended at start"
        self.address: tuple[str, int] = self._server.servers[0].sockets[0].getsockname()[:2]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.address[1]}", timeout=60)

    @property
    def state(self) -> Any:
        """What the app holds, see `service.state.State`."""
        return self.app.state.semid

    @property
    def batcher(self) -> Any:
        """That of the default tokenizer."""
        return self.state.tokenizers.current.default.batcher

    @property
    def redis_url(self) -> str:
        """Where its registry is."""
        return self.settings.redis_url or EmbeddedValkey(self.settings.data_dir).url

    def post(self, *items: Any, **members: Any) -> httpx.Response:
        """`POST /tokenize` of these items."""
        return self.http.post("/tokenize", json={"items": list(items), **members})

    def tokenize(self, *items: Any, **members: Any) -> list[dict[str, Any]]:
        """The entries of the answer to these items, which must be a 200."""
        response = self.post(*items, **members)
        assert response.status_code == 200, response.text
        entries: list[dict[str, Any]] = response.json()["items"]
        assert len(entries) == len(items)
        return entries

    def raw(self, *chunks: bytes, timeout_s: float = 30.0) -> bytes:
        """What the service answers to these bytes until it closes the connection or falls silent."""
        with socket.create_connection(self.address, timeout=timeout_s) as connection:
            try:
                for chunk in chunks:
                    connection.sendall(chunk)
            except (BrokenPipeError, ConnectionResetError):
                pass  # refused before it was all sent
            answer = b""
            try:
                while part := connection.recv(65536):
                    answer += part
            except (TimeoutError, ConnectionResetError):
                pass
        return answer

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        total = 0.0
        for line in self.http.get("/metrics").text.splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.partition("{")[0] == name and all(f'{key}="{text}"' in sample for key, text in labels.items()):
                total += float(value)
        return total

    def assigned(self, namespace: str = "default") -> dict[str, bytes]:
        """Every assignment of a namespace as it stands in the registry: item id -> record."""
        with redis.Redis.from_url(self.redis_url) as client:
            found: dict[str, bytes] = {}
            for key in client.scan_iter(f"sid:{namespace}:*:f:*", count=1000):
                found |= {item_id.decode(): value for item_id, value in client.hgetall(key).items()}
            return found

    def until(self, condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> None:
        """Wait for a condition."""
        _until(condition, what, timeout_s)

    def stop(self) -> None:
        """Drain and stop."""
        self.http.close()
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive(), "the service does not stop"


@pytest.fixture(scope="session")
def start_service(checkpoint: Path) -> Callable[..., ServiceThread]:
    """Starts a service on the small checkpoint with these settings; whoever starts it stops it."""

    def start(**settings: Any) -> ServiceThread:
        return ServiceThread(Settings(**{"checkpoint": checkpoint, "device": "cpu", **settings}))

    return start


@pytest.fixture(scope="session")
def service(start_service: Callable[..., ServiceThread], checkpoint: Path) -> Iterator[ServiceThread]:
    """A running service with its own embedded registry and small limits, shared by all tests."""
    directory = Path(tempfile.mkdtemp(prefix="semid-"))
    running = start_service(
        data_dir=directory,
        checkpoint_dirs=(checkpoint.parents[1],),  # of all the tests' checkpoints
        max_items=64,
        max_lookups=64,
        max_body_bytes=512 * 1024,
        max_text_bytes=4096,
        registry_timeout_ms=20_000,  # the machine may be busy with other things
    )
    yield running
    running.stop()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> str:
    """A namespace of the test's own."""
    return f"test-{os.getpid()}-{time.monotonic_ns()}"


def _until(condition: Callable[[], Any], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout_s:.0f} s: {what}"
        time.sleep(0.02)
