"""Claims on a record for the tests of the registry: one item, the codes of its content, and that content's digest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.registry import Assignment, Claim

if TYPE_CHECKING:
    from service.registry import Record

FINGERPRINT = "0123456789abcdef"
SIZES = (256, 256, 256)
CODES = (1, 2, 3)
OTHER_CODES = (1, 2, 4)


def digest(content: object) -> bytes:
    return f"{content!s:>8}".encode()[:8]


def claim(item_id: str, codes: tuple[int, ...] = CODES, content: object = "content") -> Claim:
    return Claim(item_id, codes, digest(content))


async def claim_one(record: Record, *args: object) -> Assignment:
    return (await record.claim([claim(*args)]))[0].assignment  # type: ignore[arg-type]


async def suffixes_of(record: Record, item_ids: list[str]) -> list[int]:
    return [found.semantic_id.suffix for found in await record.by_item_ids(item_ids) if found is not None]
