"""All settings, read once from the environment (`SID_` prefix) into one frozen object."""

from __future__ import annotations

import json
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from models import DEFAULT_CHECKPOINT, TextPrecision
from service.overflow import ANY_OTHER, Overflow
from service.registry import Durability
from service.telemetry.logs import LogFormat

PREFIX = "SID_"
MIN_DISPLAY_BYTES = 16
ALIKE = 0.6  # so alike are two names, of difflib's ratio from 0 to 1, that one may be a slip for the other
NamespaceOrAny = Annotated[str, Field(pattern=rf"^(\{ANY_OTHER}|[A-Za-z0-9_.-]{{1,64}})$")]


class Settings(BaseSettings):
    """The service's settings; each field is `SID_<NAME>` in the environment."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True)

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on.")
    data_dir: Path = Field(
        default=Path("data"),
        description="Where the embedded registry keeps its files, and the service how far each record had come.",
    )
    redis_url: str | None = Field(
        default=None,
        repr=False,  # it may hold a password
        description=(
            "URL of a Redis or Valkey (`redis://`, `rediss://`, `unix://`), of its sentinels (`redis+sentinel://`, "
            "`rediss+sentinel://`) or of a cluster (`redis+cluster://`, `rediss+cluster://`); unset: the embedded one."
        ),
    )
    durability: Durability = Field(
        default=Durability.FSYNC,
        description=(
            "What an acknowledgement waits for: `memory`, `fsync` (synced to disk) or `replicated` (received by "
            "replicas too)."
        ),
    )
    replicas: int = Field(
        default=1, ge=1, description="Replicas that have to have received what is acknowledged, under `replicated`."
    )
    registry_timeout_ms: int = Field(default=2000, ge=1, description="After which a registry call fails with 503.")
    registry_wait_s: float = Field(default=30.0, ge=0, description="How long start-up waits for the registry.")
    checkpoint: Path = Field(
        default=DEFAULT_CHECKPOINT, description="Directory of the checkpoint of the default tokenizer."
    )
    further_checkpoints: Annotated[tuple[Path, ...], NoDecode] = Field(
        default=(), description="Directories of further checkpoints, loaded beside it; comma separated."
    )
    checkpoint_dirs: Annotated[tuple[Path, ...], NoDecode] = Field(
        default=(),
        description="Directories below which `POST /admin/tokenizers` may load checkpoints; comma separated. Those "
        "that ship, and those of the settings above, always may be.",
    )
    max_tokenizers: int = Field(
        default=4, ge=1, description="Tokenizers loaded side by side, beyond which `POST /admin/tokenizers` loads none."
    )
    text_encoder: str | None = Field(
        default=None, description="Where the text encoder's files lie, if not where the manifest says."
    )
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="`auto`, `cpu`, `cuda` or `cuda:N`."
    )
    workers: int = Field(
        default=1, ge=1, description="Processes that serve, each with a copy of the model; see docs/operations.md."
    )
    threads: int = Field(
        default=0,
        ge=0,
        description="CPU threads of the model, of each worker; 0: one for each core that the process may use, shared "
        "evenly among the workers.",
    )
    text_precision: TextPrecision = Field(
        default="auto",
        description="The first path of texts: `float32`, `bfloat16`, `float16`, `int16`, or `auto`: the one that is "
        "expected to be faster. Codes are the same.",
    )
    batch_tokens: int = Field(default=4096, ge=1, description="Padded word pieces of one forward pass, at most.")
    batch_ms: float = Field(
        default=12.0,
        gt=0,
        description="Milliseconds of one forward pass, about. Four times that of bulk, where no small request waits.",
    )
    queue_tokens: int = Field(
        default=200_000,
        ge=1,
        description="Word pieces queued for the model, beyond which 429; an eighth of it is small requests' alone.",
    )
    inflight_bytes: int = Field(
        default=256 * 2**20, ge=1, description="Bytes of request bodies and their values held, beyond which 429."
    )
    keys_file: Path | None = Field(
        default=None,
        description="File of the keys that callers need, made by `semid keys add`; unset: everyone who reaches the "
        "port may do everything.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Origins whose pages may call the service from a browser, such as `https://shop.example`; comma "
        "separated. None of them where unset.",
    )
    max_head_bytes: int = Field(
        default=65_536, ge=1024, description="Bytes of one request's target and headers, about; beyond it 431."
    )
    head_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="Seconds in which a request's head has to arrive, on a new connection or a kept one.",
    )
    max_body_bytes: int = Field(default=32 * 2**20, ge=1, description="Bytes of one request body.")
    body_timeout_s: float = Field(default=60.0, gt=0, description="Seconds in which a body has to arrive.")
    stream_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="Seconds in which the next whole line or record batch of a stream has to arrive, or 64 KiB of it, "
        "and an answer has to be taken; what the service itself needs does not count.",
    )
    max_items: int = Field(default=1024, ge=1, description="Items of one `POST /tokenize`.")
    max_lookups: int = Field(
        default=4096,
        ge=1,
        description="Semantic IDs of one `POST /lookup`, item ids of one `POST /assignments` or `/retire`, prefixes "
        "of one `POST /next`.",
    )
    max_text_bytes: int = Field(default=65_536, ge=1, description="UTF-8 bytes of one item's text.")
    display_bytes: int = Field(
        default=0,
        ge=0,
        le=256,
        description="UTF-8 bytes of the title (`display`) that is kept with an item and shown beside its id, 16 to "
        "256: what is longer is cut. 0: none is kept.",
    )
    overflow: Annotated[dict[NamespaceOrAny, Overflow], NoDecode] = Field(
        default={},
        description="What becomes of an item whose codes have no suffix left, by namespace, as JSON such as "
        '`{"shop": "next_nearest", "*": "error"}`; `error` where nothing is said.',
    )
    buckets: int = Field(
        default=16_384,
        ge=1,
        le=2**32,
        description="Buckets of a new record: about a hundredth of the items it will have.",
    )
    changes_kept: int = Field(
        default=100_000, ge=0, description="Changes of a record that `GET /changes` can still tell, at least."
    )
    max_wait_s: float = Field(default=30.0, ge=0, description="Longest wait of one `GET /changes` for something new.")
    drain_s: int = Field(default=30, ge=0, description="How long a shutdown waits for requests under way.")
    log_level: str = Field(default="info", pattern="^(critical|error|warning|info|debug)$", description="Log level.")
    log_format: LogFormat = Field(
        default="text", description="`text`, or `json`: a JSON object a line, with the id of the request it is about."
    )
    access_log: bool = Field(default=False, description="Whether the log has a line for each request.")
    log_item_ids: bool = Field(
        default=False,
        description="Whether these lines, and traces, have the path as well, which may hold an item id.",
    )
    traces: bool | None = Field(
        default=None,
        description="Whether traces are sent, by OpenTelemetry (`semid[otel]`); unset: where "
        "`OTEL_EXPORTER_OTLP_ENDPOINT` is set.",
    )

    @field_validator("further_checkpoints", "checkpoint_dirs", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """The parts of a comma-separated list."""
        if not isinstance(value, str):
            return value
        return tuple(part.strip() for part in value.split(",") if part.strip())

    @field_validator("display_bytes")
    @classmethod
    def _none_or_enough(cls, value: int) -> int:
        """None, or so many that something can be read."""
        if 0 < value < MIN_DISPLAY_BYTES:
            msg = f"it is 0, or at least {MIN_DISPLAY_BYTES}"
            raise ValueError(msg)
        return value

    @field_validator("overflow", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        """An object of JSON text."""
        try:
            return json.loads(value) if isinstance(value, str) else value
        except json.JSONDecodeError as error:
            msg = f"it is not JSON: {error}"
            raise ValueError(msg) from error

    @property
    def checkpoints(self) -> tuple[Path, ...]:
        """All that are loaded, the default's first."""
        return (self.checkpoint, *self.further_checkpoints)


def strangers(environment: Iterable[str]) -> dict[str, str | None]:
    """Variables that begin as settings do and are none, each with the setting that it may be meant as."""
    known = {name.upper() for name in Settings.model_fields}
    given = {name: name.upper().removeprefix(PREFIX) for name in environment if name.upper().startswith(PREFIX)}
    found = {name: get_close_matches(rest, known, 1, ALIKE) for name, rest in given.items() if rest not in known}
    return {name: PREFIX + alike[0] if alike else None for name, alike in found.items()}
