"""The decoder's side of the record: what a generator may say next, and how it stays fresh."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Sequence

from models import Manifest
from service.answers import Answer, holder, unprefixed
from service.decoding.schemas import NextRequest
from service.decoding.snapshot import Snapshots
from service.displays import show
from service.errors import MalformedCursor, MalformedSemanticId, TooManyItems
from service.records import Records
from service.registry.assignment import read_semantic_id, write_semantic_id
from service.registry.changes import Change
from service.registry.record import Record
from service.semantic_id import CodeLayout, SemanticId, parse_prefix, write_prefix
from service.tokenizers import Tokenizers

Codes = tuple[int, ...]
MAX_CODES_ANSWERED = 2**21


class Decoding:
    """Answers those who constrain a decoder by the record."""

    def __init__(self, tokenizers: Tokenizers, records: Records, *, max_prefixes: int, max_wait_s: float) -> None:
        self._tokenizers = tokenizers
        self._records = records
        self._max_prefixes = max_prefixes
        self._max_wait_s = max_wait_s
        self._snapshots = Snapshots()

    async def prefix(self, text: str, limit: int, cursor: str | None, namespace: str, name: str | None) -> Answer:
        """Answer `GET /prefix/{prefix}`: the codes that follow it with their live counts, and a page of its items.

        Raises:
            MalformedSemanticId: It is no prefix of this tokenizer.
            MalformedCursor: The cursor is of another listing.
        """
        tokenizer = self._tokenizers.named(name)
        record = await self._records.of(namespace, tokenizer.manifest)
        prefix = _parse(text, record.layout)
        after = None if cursor is None else _read_cursor(cursor, prefix, record.layout)
        (children,) = await record.tree.children([prefix])
        page = await record.tree.page(prefix, limit, after)
        found = await record.by_semantic_ids(page.semantic_ids)
        items = [holder(assignment) for assignment in found if assignment and assignment.live]
        await show(record, items)
        whole = len(prefix) == len(record.layout.codebook_sizes)
        return {
            **tokenizer.origin(namespace),
            "prefix": write_prefix(prefix),
            "prefix_is_coarse_to_fine": tokenizer.manifest.prefix_is_coarse_to_fine,
            "count": sum(children.values()),
            "children": [] if whole else [_child(prefix, code, count) for code, count in children.items()],
            "items": items,
            "next_cursor": _write_cursor(page.semantic_ids[-1], record.layout) if page.more else None,
        }

    async def next(self, request: NextRequest) -> Answer:
        """Answer `POST /next`: for each prefix, in order, the codes that lead to a live item; each fails alone.

        Raises:
            TooManyItems: There are more prefixes than one request may have.
        """
        if len(request.prefixes) > self._max_prefixes:
            msg = f"{len(request.prefixes)} prefixes, at most {self._max_prefixes} are taken in one request"
            raise TooManyItems(msg)
        tokenizer = self._tokenizers.named(request.tokenizer)
        record = await self._records.of(request.namespace, tokenizer.manifest)
        answers: dict[int, Answer] = {}
        parsed: dict[int, Codes] = {}
        for i, text in enumerate(request.prefixes):
            try:
                parsed[i] = _parse(text, record.layout)
            except MalformedSemanticId as error:
                answers[i] = unprefixed(text, error)
        distinct = list(dict.fromkeys(parsed.values()))
        found = dict(zip(distinct, await record.tree.following(distinct), strict=True))
        count = sum(len(found[prefix]) for prefix in parsed.values())
        if count > MAX_CODES_ANSWERED:
            msg = f"{count} codes lead on from these prefixes, at most {MAX_CODES_ANSWERED} are answered at once"
            raise TooManyItems(msg)
        following = {prefix: _following(prefix, codes, record) for prefix, codes in found.items()}
        for i, prefix in parsed.items():
            answers[i] = {"prefix": request.prefixes[i], **following[prefix]}
        entries = [answers[i] for i in range(len(answers))]
        return {
            **tokenizer.origin(request.namespace),
            "prefix_is_coarse_to_fine": tokenizer.manifest.prefix_is_coarse_to_fine,
            "next": entries,
        }

    async def trie(self, known: str | None, namespace: str, name: str | None) -> tuple[str, bytes | None]:
        """Answer `GET /trie`: its ETag, and the live trie unless that ETag is known.

        Args:
            known: An `If-None-Match` header.
            namespace: The catalogue's.
            name: The tokenizer's.
        """
        tokenizer = self._tokenizers.named(name).manifest
        record = await self._records.of(namespace, tokenizer)
        etag = _etag(tokenizer, record, await record.changes.revision())
        if etag in {tag.strip().removeprefix("W/") for tag in (known or "").split(",")}:
            return etag, None
        snapshot = await self._snapshots.of(record)
        return _etag(tokenizer, record, snapshot.revision), snapshot.data

    async def changes(
        self,
        after: int,
        limit: int,
        wait_s: float,
        *,
        namespace: str,
        name: str | None,
        epoch: str | None = None,
        display: bool = False,
    ) -> Answer:
        """Answer `GET /changes`: what came and went after a revision, in order; with the items' titles of now if asked.

        Raises:
            ChangesGone: Those are no longer kept, or the revision is of another epoch.
        """
        tokenizer = self._tokenizers.named(name)
        record = await self._records.of(namespace, tokenizer.manifest)
        wait_s = min(wait_s, self._max_wait_s)
        found = await record.changes.after(after, limit, wait_s, epoch.encode() if epoch else None)
        if found.changes and not record.history.epoch:  # it began while this waited
            record = await self._records.of(namespace, tokenizer.manifest)
        changes = [_change(change) for change in found.changes]
        if display:
            await show(record, [change for change in changes if change["change"] != "retired"])
        return {
            **tokenizer.origin(namespace),
            "epoch": record.history.epoch.decode(),
            "revision": found.revision,
            "next_after": found.changes[-1].revision if found.changes else after,
            "changes": changes,
        }


def _following(prefix: Codes, allowed: list[int], record: Record) -> Answer:
    """The codes that may follow a prefix, and as a mask."""
    return {"allowed": allowed, "mask": _mask(allowed, _width(prefix, allowed, record))}


def _parse(text: object, layout: CodeLayout) -> Codes:
    if not isinstance(text, str):
        raise MalformedSemanticId("a prefix is a string")
    return parse_prefix(text, layout.codebook_sizes)


def _etag(tokenizer: Manifest, record: Record, revision: int) -> str:
    """A revision means something only with what it is of.

    Another tokenizer may become the default; in another epoch the same revision has other changes.
    """
    return f'"{tokenizer.fingerprint}-{record.history.epoch.decode()}-{revision}"'


def _child(prefix: Codes, code: int, count: int) -> Answer:
    return {"code": code, "prefix": write_prefix((*prefix, code)), "count": count}


def _width(prefix: Codes, allowed: Sequence[int], record: Record) -> int:
    """How many numbers there are after the prefix: the codes of a codebook, or the suffixes up to the last live one."""
    sizes = record.layout.codebook_sizes
    return sizes[len(prefix)] if len(prefix) < len(sizes) else max(allowed, default=-1) + 1


def _mask(allowed: Collection[int], width: int) -> str:
    """One bit a number, the lowest bit of the first byte for 0, in base64."""
    bits = bytearray((width + 7) // 8)  # one large integer would be copied for each number
    for number in allowed:
        bits[number >> 3] |= 1 << (number & 7)
    return base64.b64encode(bits).decode()


def _write_cursor(semantic_id: SemanticId, layout: CodeLayout) -> str:
    """The last ID of a page."""
    return base64.urlsafe_b64encode(write_semantic_id(semantic_id, layout)).decode()


def _read_cursor(cursor: str, prefix: Codes, layout: CodeLayout) -> SemanticId:
    """The ID after which the next page begins.

    Raises:
        MalformedCursor: It is none of this prefix.
    """
    try:
        semantic_id = read_semantic_id(base64.b64decode(cursor, altchars=b"-_", validate=True), layout)
    except (binascii.Error, ValueError) as error:
        raise MalformedCursor("take the cursor as it was answered") from error
    if _write_cursor(semantic_id, layout) != cursor or semantic_id.codes[: len(prefix)] != prefix:
        raise MalformedCursor("the cursor is of another listing")
    return semantic_id


def _change(change: Change) -> Answer:
    return {
        "revision": change.revision,
        "change": change.kind,
        "item_id": change.item_id,
        "semantic_id": str(change.semantic_id),
        "replaced_by": str(change.replaced_by) if change.replaced_by else None,
    }
