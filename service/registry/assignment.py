"""An assignment, the claim for one, and the bytes that the record keeps of them (see `lib.lua`)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from service.errors import SuffixExhausted
from service.semantic_id import CodeLayout, SemanticId

if TYPE_CHECKING:
    from service.registry.request_queue import Reply

DIGEST_BYTES = 8
DEAD = b"\xff"  # before an item id: no UTF-8 begins with it
CONTROL = b"\xfe"  # the same
VERSION_BYTES = 4
CONTENT_CHANGED = 0b01
RETIRED = 0b10
UNCHANGED = 0b100  # in a reply alone


class Claim(NamedTuple):
    """An item that wants its Semantic ID.

    Attributes:
        item_id: The item's own opaque key.
        codes: The codes of its content, one a level.
        digest: 8 bytes of its content's digest.
        reassign: Whether an ID with other codes is replaced, unless it was given to just this content; else it stands.
        alternatives: Codes of the last level, best first, one of which the item gets where its own codes have no
            suffix left.
    """

    item_id: str
    codes: tuple[int, ...]
    digest: bytes
    reassign: bool = False
    alternatives: tuple[int, ...] = ()

    def request(self, layout: CodeLayout) -> bytes:
        """What the script is asked.

        Raises:
            ValueError: Codes that the tokenizer does not have, or a digest that has not 8 bytes.
        """
        if len(self.digest) != DIGEST_BYTES:
            raise ValueError(f"a digest has {DIGEST_BYTES} bytes, not {len(self.digest)}")
        places = (layout.pack((*self.codes[:-1], code)) for code in self.alternatives)
        alternatives = b"".join(place[-layout.bytes_per_code :] for place in places)
        return (b"R" if self.reassign else b"K") + self.digest + layout.pack(self.codes) + alternatives


@dataclass(frozen=True, slots=True)
class Assignment:
    """The durable record item id <-> Semantic ID.

    Attributes:
        item_id: The item's own opaque key.
        semantic_id: The ID it was given, for good.
        assigned_at: When it was assigned, by the server's clock, in whole seconds, UTC.
        digest: 8 bytes of the digest of the item's latest content.
        content_changed: Whether the item's latest content has other codes than the ID it holds.
        retired_at: When the item was retired; None while it is live.
        replaced_by: The ID that the item was given instead of this one; None where this is the one it holds.
    """

    item_id: str
    semantic_id: SemanticId
    assigned_at: datetime
    digest: bytes
    content_changed: bool
    retired_at: datetime | None = None
    replaced_by: SemanticId | None = None

    @property
    def live(self) -> bool:
        """Whether the item holds this ID now."""
        return self.retired_at is None and self.replaced_by is None


class ClaimResult(NamedTuple):
    """The answer to a claim.

    Attributes:
        assignment: What the item holds.
        created: Whether it holds it only since now.
        unchanged: Whether it was known with just this content. Not told on a cluster: False.
    """

    assignment: Assignment
    created: bool
    unchanged: bool = False


def claimed(claim: Claim, reply: Reply, layout: CodeLayout) -> ClaimResult | SuffixExhausted:
    """What the script's reply to a claim says."""
    if reply.value is None:
        codes = "-".join(map(str, claim.codes))
        return SuffixExhausted(f"the codes {codes} have no suffix left; the tokenizer's manifest sets the highest")
    if isinstance(reply.value, bytes):
        assignment = read_assignment(claim.item_id, reply.value, layout)
        return ClaimResult(assignment, created=False, unchanged=bool(reply.value[0] & UNCHANGED))
    semantic_id = _issued(claim, reply.value)
    return ClaimResult(Assignment(claim.item_id, semantic_id, reply.at, claim.digest, False), created=True)


def _issued(claim: Claim, suffix: int | list[Any]) -> SemanticId:
    """The ID with this suffix; under another last code where the script names one."""
    if isinstance(suffix, int):
        return SemanticId(tuple(claim.codes), suffix)
    number, last = suffix
    return SemanticId((*claim.codes[:-1], int.from_bytes(last)), number)


def read_assignment(item_id: str, value: bytes, layout: CodeLayout) -> Assignment:
    """What the script wrote: state 1 | [retired_at 4] | assigned_at 4 | digest 8 | codes | suffix in decimal."""
    retired_at = _time(value[1:5]) if value[0] & RETIRED else None
    if retired_at is not None:
        value = value[:1] + value[5:]
    return Assignment(
        item_id,
        read_semantic_id(value[13:], layout),
        _time(value[1:5]),
        value[5:13],
        bool(value[0] & CONTENT_CHANGED),
        retired_at,
    )


def held_id(value: bytes) -> bytes:
    """The packed ID of an assignment's bytes."""
    return value[17:] if value[0] & RETIRED else value[13:]


def read_holder(holder: bytes) -> tuple[bytes, bool]:
    """Whose a Semantic ID is, and whether it is live, from what stands for it in the record."""
    if holder.startswith(DEAD):
        return holder[1:], False
    if holder.startswith(CONTROL):
        return holder[6:], holder[1:2] == b"1"
    return holder, True


def write_assignment(assignment: Assignment, layout: CodeLayout) -> bytes:
    """What `read_assignment` reads.

    Raises:
        ValueError: Codes that the tokenizer does not have, or a digest that has not 8 bytes.
    """
    if len(assignment.digest) != DIGEST_BYTES:
        raise ValueError(f"a digest has {DIGEST_BYTES} bytes, not {len(assignment.digest)}")
    state, retired_at = CONTENT_CHANGED * assignment.content_changed, b""
    if assignment.retired_at is not None:
        state, retired_at = state | RETIRED, write_time(assignment.retired_at)
    times = retired_at + write_time(assignment.assigned_at)
    return b"%c" % state + times + assignment.digest + write_semantic_id(assignment.semantic_id, layout)


def read_former(value: bytes, layout: CodeLayout) -> dict[SemanticId, datetime]:
    """The IDs that an item held before, and when each was assigned: assigned_at 4 | codes | suffix | comma, ..."""
    return {read_semantic_id(packed, layout): _time(at) for packed, at in split_former(value, layout.width)}


def split_former(value: bytes, width: int) -> list[tuple[bytes, bytes]]:
    """The same, as packed IDs and times."""
    former = []
    start = 0
    while start < len(value):
        end = value.index(b",", start + 4 + width)
        former.append((value[start + 4 : end], value[start : start + 4]))
        start = end + 1
    return former


def read_semantic_id(value: bytes, layout: CodeLayout) -> SemanticId:
    """Of packed codes and a decimal suffix."""
    return SemanticId(layout.unpack(value[: layout.width]), int(value[layout.width :]))


def write_semantic_id(semantic_id: SemanticId, layout: CodeLayout) -> bytes:
    """As packed codes and a decimal suffix."""
    return layout.pack(semantic_id.codes) + b"%d" % semantic_id.suffix


def latest_time(value: bytes) -> int:
    """The last second of which an assignment's bytes tell: of its assignment, or of its retirement."""
    return int.from_bytes(value[1:5])


def write_time(time: datetime) -> bytes:
    """Whole seconds in 4 bytes.

    Raises:
        ValueError: It is before 1970 or after 2106.
    """
    try:
        return int(time.timestamp()).to_bytes(4)
    except OverflowError as error:
        raise ValueError(f"no time from 1970 to 2106: {time}") from error


def _time(value: bytes) -> datetime:
    return datetime.fromtimestamp(int.from_bytes(value), UTC)
