"""How far a record has come, and whether the registry is still as far."""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.errors import RegistryOlder

if TYPE_CHECKING:
    from redis.exceptions import ResponseError


def older(error: ResponseError, record: str, revision: int) -> RegistryOlder | None:
    """What a script's refusal says, where it refused a record that is older than `revision`; else None."""
    if not str(error).startswith("OLDER"):
        return None
    epoch, found = str(error).split(" ")[1:]
    has = f"revision {found} of epoch {epoch}" if epoch else "nothing"
    return RegistryOlder(f"The record {record} was at revision {revision}; the registry has {has}.")
