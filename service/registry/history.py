"""How far a record has come, and whether the registry is still as far."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from service.errors import RegistryOlder

if TYPE_CHECKING:
    from redis.exceptions import ResponseError


class RecordFacts(NamedTuple):
    """What is known of a record.

    Attributes:
        max_suffix: The highest suffix that it may issue.
        changes_kept: How many of its changes are kept, at least.
        epoch: Which history of it is known; empty where there is none yet.
    """

    max_suffix: int
    changes_kept: int
    epoch: bytes


def older(error: ResponseError, record: str, revision: int) -> RegistryOlder | None:
    """What a script's refusal says, where it refused a record that is older than `revision`; else None."""
    if not str(error).startswith("OLDER"):
        return None
    epoch, found = str(error).split(" ")[1:3]
    has = f"revision {found} of epoch {epoch}" if epoch else "nothing"
    if epoch == "-":
        has = "lost a part of it"
    return RegistryOlder(f"The record {record} was at revision {revision}; the registry has {has}.")
