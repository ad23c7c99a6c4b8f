"""What a client is answered, typed. Members that a newer service adds are left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from models import Trie

T = TypeVar("T")
F = TypeVar("F")

Entry = Mapping[str, Any]
"""An object of a JSON answer."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong: with one item, Semantic ID or prefix in its place, or with a whole request.

    Attributes:
        type: Stable, such as `urn:semid:problem:invalid_text`.
        title: The same for every occurrence.
        detail: What is particular to this one.
        members: Whatever else is said.
    """

    type: str
    title: str
    detail: str
    members: Mapping[str, Any] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """The end of the type: `invalid_text`."""
        return self.type.rpartition(":")[2]

    @classmethod
    def of(cls, entry: Entry) -> Fault:
        """From an entry's `error`, or a problem."""
        own = {"type", "title", "detail", "status"}
        members = {name: value for name, value in entry.items() if name not in own}
        return cls(str(entry["type"]), str(entry["title"]), str(entry.get("detail") or ""), members)


@dataclass(frozen=True, slots=True)
class TokenizedItem:
    """An item and its Semantic ID.

    Attributes:
        semantic_id: None in a dry run of an item without one; so are `suffix` and `tokens`.
        created: Whether the request that was answered assigned it: not an earlier one whose answer was lost.
        content_changed: Whether its latest content has other codes than its Semantic ID.
        quantization_error: Squared norm of the last residual; None if not computed.
        margin: Latent distance to the nearest other codes; None if not computed.
        group_size: Of a dry run alone: suffixes issued to these codes so far.
        overflow: Whether it got a next-nearest codeword, the nearest having no suffix left.
    """

    item_id: str
    semantic_id: str | None
    codes: tuple[int, ...]
    suffix: int | None
    tokens: tuple[str, ...] | None
    created: bool
    content_changed: bool
    quantization_error: float | None = None
    margin: float | None = None
    group_size: int | None = None
    overflow: bool = False


@dataclass(frozen=True, slots=True)
class FailedItem:
    """An item that got no answer but this: its neighbours did. The item id is None where it was none."""

    item_id: str | None
    error: Fault


@dataclass(frozen=True, slots=True)
class Assignment:
    """A Semantic ID and the item that holds it, or held it until it was retired or replaced.

    Attributes:
        counterparts: Of look-ups, and where several tokenizers are loaded: what the item holds under each other one,
            by its full name; None where nothing.
        display: The item's title, where the service keeps one.
    """

    item_id: str
    semantic_id: str
    codes: tuple[int, ...]
    suffix: int
    tokens: tuple[str, ...]
    assigned_at: datetime
    content_changed: bool
    replaced_by: str | None = None
    retired_at: datetime | None = None
    counterparts: Mapping[str, str | None] = field(default_factory=dict, hash=False)
    display: str | None = None


@dataclass(frozen=True, slots=True)
class UnknownSemanticId:
    """A Semantic ID that nothing holds, that was retired, or that is none."""

    semantic_id: str | None
    error: Fault


@dataclass(frozen=True, slots=True)
class NextCodes:
    """The codes of the next level, or the suffixes, that lead from a prefix to a live item; none: a dead prefix."""

    prefix: str
    allowed: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class UnknownPrefix:
    """What is no prefix of this tokenizer."""

    prefix: str | None
    error: Fault


@dataclass(frozen=True, slots=True)
class Child:
    """A code that follows a prefix, the prefix with it, and how many live items are under that."""

    code: int
    prefix: str
    count: int


@dataclass(frozen=True, slots=True)
class PrefixListing:
    """What stands under a prefix.

    Attributes:
        count: Live items under it.
        children: None under the codes of all levels, where only items follow.
        items: A page of the live items, in the order of their Semantic IDs.
        next_cursor: Of the next page; None where this is the last.
    """

    prefix: str
    prefix_is_coarse_to_fine: bool
    count: int
    children: tuple[Child, ...]
    items: tuple[Assignment, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the record.

    Attributes:
        epoch: Which history of the record the revision is of; keep both to go on later.
        change: `assigned` and `returned` bring the Semantic ID, `retired` and `replaced` take it away.
        replaced_by: What came instead; that one has its own change.
    """

    revision: int
    epoch: str
    change: str
    item_id: str
    semantic_id: str
    replaced_by: str | None = None


@dataclass(frozen=True, slots=True)
class ChangesPage:
    """Changes in order, without a hole; there are more while `next_after` is less than the record's `revision`."""

    epoch: str
    revision: int
    next_after: int
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class TrieSnapshot:
    """The live trie at one revision of the record, as safetensors."""

    etag: str
    data: bytes = field(repr=False)

    @property
    def epoch(self) -> str:
        """Which history of the record the revision is of."""
        return self.etag.strip('"').split("-")[-2]

    @property
    def revision(self) -> int:
        """From where to follow the changes."""
        return int(self.etag.strip('"').split("-")[-1])

    def read(self) -> Trie:
        """The trie, on the CPU."""
        from models import Trie

        return Trie.from_bytes(self.data)


@dataclass(frozen=True, slots=True)
class LoadedTokenizers:
    """The tokenizer that answers where none is named, and the manifests of all, the default first.

    Attributes:
        default: Its full name.
        manifests: Of all.
        default_since: When a call made it that; None where it is by the service's settings.
    """

    default: str
    manifests: tuple[Entry, ...]
    default_since: datetime | None = None

    def named(self, name: str | None) -> str:
        """The full name of the tokenizer that a name means; the name itself where the service has to say so."""
        if name is None:
            return self.default
        found = [str(manifest["tokenizer"]) for manifest in self.manifests if manifest["name"] == name]
        return found[0] if len(found) == 1 else name


@dataclass(frozen=True, slots=True)
class Swapped:
    """What is loaded after a call for the operator.

    Attributes:
        tokenizer: The one that the call was about.
        default: The one that answers where none is named.
        loaded: All of them, the default first.
        workers: Processes that serve.
        pending: How many of them have not followed yet.
        manifest: The tokenizer's.
        note: Which other services the call did not reach, where there may be some.
    """

    tokenizer: str
    default: str
    loaded: tuple[str, ...]
    workers: int
    pending: int
    manifest: Entry
    note: str | None = None


_READ: Mapping[str, Callable[[Any], Any]] = {
    "codes": tuple,
    "tokens": tuple,
    "loaded": tuple,
    "allowed": tuple,
    "assigned_at": datetime.fromisoformat,
    "retired_at": datetime.fromisoformat,
}


def read(kind: type[T], entry: Entry) -> T:
    """An entry as one of the classes above.

    Raises:
        TypeError: A member is missing.
    """
    members = {}
    for name in kind.__slots__:  # type: ignore[attr-defined]
        value = entry.get(name)
        if value is not None and name in _READ:
            value = _READ[name](value)
        if value is not None or name in entry:
            members[name] = value
    return kind(**members)


def tokenized(entry: Entry) -> TokenizedItem | FailedItem:
    """An entry of `POST /tokenize`."""
    return _read_or_fault(TokenizedItem, FailedItem, "item_id", entry)


def looked_up(entry: Entry) -> Assignment | UnknownSemanticId:
    """An entry of `POST /lookup`."""
    return _read_or_fault(Assignment, UnknownSemanticId, "semantic_id", entry)


def assigned(entry: Entry) -> Assignment | FailedItem:
    """An entry of `POST /assignments` or `POST /retire`."""
    return _read_or_fault(Assignment, FailedItem, "item_id", entry)


def following(entry: Entry) -> NextCodes | UnknownPrefix:
    """An entry of `POST /next`."""
    return _read_or_fault(NextCodes, UnknownPrefix, "prefix", entry)


def listing(entry: Entry) -> PrefixListing:
    """The answer of `GET /prefix`."""
    return PrefixListing(
        prefix=entry["prefix"],
        prefix_is_coarse_to_fine=entry["prefix_is_coarse_to_fine"],
        count=entry["count"],
        children=tuple(read(Child, child) for child in entry["children"]),
        items=tuple(read(Assignment, item) for item in entry["items"]),
        next_cursor=entry["next_cursor"],
    )


def changes_page(entry: Entry) -> ChangesPage:
    """The answer of `GET /changes`."""
    epoch = entry["epoch"]
    changes = tuple(
        Change(each["revision"], epoch, each["change"], each["item_id"], each["semantic_id"], each["replaced_by"])
        for each in entry["changes"]
    )
    return ChangesPage(epoch, entry["revision"], entry["next_after"], changes)


def _read_or_fault(kind: type[T], faulty: Callable[[Any, Fault], F], asked: str, entry: Entry) -> T | F:
    """One entry of many: what was asked for, or what is wrong with it beside the member that says what was asked."""
    if "error" in entry:
        return faulty(entry[asked], Fault.of(entry["error"]))
    return read(kind, entry)
