"""What a running app holds, and whether it is well."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from service.errors import EncoderStopped

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

    from service.access.keys import Keys
    from service.admin.door import AdminDoor
    from service.admin.hot_swap import HotSwap
    from service.assignments import Assignments
    from service.bodies import BodyGate
    from service.bulk.column_tokenization import ColumnTokenization
    from service.bulk.entries import EntryTokenization
    from service.bulk.row_thread import RowThread
    from service.bulk.terms import StreamTerms
    from service.decoding.queries import Decoding
    from service.explaining.queries import Explaining
    from service.metrics import Metrics
    from service.registry import Registry
    from service.stats.queries import Statistics
    from service.tokenizers import Tokenizers

EXPLORER = Path(__file__).parent / "explorer"


@dataclass(frozen=True)
class State:
    """The parts of a running app, composed in `service.app`."""

    assignments: Assignments
    columns: ColumnTokenization
    entries: EntryTokenization
    row_thread: RowThread
    decoding: Decoding
    explaining: Explaining
    statistics: Statistics
    tokenizers: Tokenizers
    registry: Registry
    gate: BodyGate
    terms: StreamTerms
    metrics: Metrics
    keys: Keys | None
    swap: HotSwap
    admin_door: AdminDoor
    registry_is_shared: bool  # or may be, with services of other data directories

    @classmethod
    def of(cls, connection: HTTPConnection) -> State:
        """The state of the app that serves this request."""
        return cast("State", connection.app.state.semid)

    def manifests(self) -> dict[str, Any]:
        """What is loaded: the default's name, since when it is that, and all manifests, its own first."""
        loaded = self.tokenizers.current
        return {
            "default": loaded.default.full_name,
            "default_since": self.swap.default_since,
            "tokenizers": [{"tokenizer": each.full_name, **asdict(each.manifest)} for each in loaded.loaded],
        }

    def check_alive(self, tokenizer: str | None = None) -> None:
        """Raise EncoderStopped when a model's thread has ended: that of the tokenizer named, or of any.

        Raises:
            UnknownTokenizer: It is not loaded.
        """
        loaded = self.tokenizers.current
        for each in loaded.loaded if tokenizer is None else (loaded.named(tokenizer),):
            if not each.batcher.alive:
                msg = f"the thread of the model of {each.full_name} has ended; the process needs a restart"
                raise EncoderStopped(msg)

    async def check_ready(self, tokenizer: str | None = None) -> None:
        """Raise ServiceError unless the model runs, or all do, and the registry answers."""
        self.check_alive(tokenizer)
        await self.registry.ping()
