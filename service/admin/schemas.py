"""What the operator asks and is answered."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class LoadRequest(BaseModel):
    """A checkpoint to be loaded."""

    model_config = ConfigDict(extra="forbid", strict=True)

    checkpoint: str = Field(
        min_length=1,
        max_length=4096,
        description="Its directory on the service's machine: absolute, or below a directory of `SID_CHECKPOINT_DIRS`.",
        examples=["broad-6x256"],
    )
    default: bool = Field(default=False, description="Make it the default once every worker has loaded it.")
    force: bool = Field(
        default=False,
        description="Even where requests that are answered now would be refused from then on: another loaded tokenizer "
        "has its name, or it is made the default and takes other content than the default one.",
    )


class DefaultRequest(BaseModel):
    """How a tokenizer is made the default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    force: bool = Field(default=False, description="Even where it takes other content than the default one.")


class SwapAnswer(BaseModel):
    """What is loaded from now on."""

    tokenizer: str = Field(description="The one that the call was about.")
    default: str = Field(description="The tokenizer that answers where none is named.")
    loaded: list[str] = Field(description="All of them, the default first.")
    workers: int = Field(description="Processes that serve: on this data directory, with these settings.")
    pending: int = Field(description="How many of them have not followed yet; 0 in a 200.")
    manifest: dict[str, Any]
    note: str | None = Field(
        description="Whom the call does not reach, where the registry is an outside one (`SID_REDIS_URL`); else null."
    )
