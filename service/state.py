"""What a running app holds, and whether it is well."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from service.errors import EncoderStopped

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

    from models import Manifest
    from service.batcher import Batcher
    from service.bodies import BodyGate
    from service.decoding import Decoding
    from service.metrics import Metrics
    from service.registry import Registry
    from service.tokenization import Tokenization

EXPLORER = Path(__file__).parent / "explorer"


@dataclass(frozen=True)
class State:
    """The parts of a running app, composed in `service.app`."""

    tokenization: Tokenization
    decoding: Decoding
    batcher: Batcher
    registry: Registry
    gate: BodyGate
    metrics: Metrics
    manifest: Manifest

    @classmethod
    def of(cls, connection: HTTPConnection) -> State:
        """The state of the app that serves this request."""
        return cast("State", connection.app.state.semid)

    def tokenizers(self) -> dict[str, Any]:
        """The manifests of what is loaded."""
        name = self.manifest.full_name
        return {"default": name, "tokenizers": [{"tokenizer": name, **asdict(self.manifest)}]}

    def check_alive(self) -> None:
        """Raise EncoderStopped when the model's thread has ended."""
        if not self.batcher.alive:
            msg = "the model's thread has ended; the process needs a restart"
            raise EncoderStopped(msg)

    async def check_ready(self) -> None:
        """Raise ServiceError unless the model runs and the registry answers."""
        self.check_alive()
        await self.registry.ping()
