"""Each call of the API: what it asks, and how its answer is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from urllib.parse import quote

import orjson

from service.client import answers
from service.client.answers import (
    Assignment,
    ChangesPage,
    FailedItem,
    LoadedTokenizers,
    PrefixListing,
    Swapped,
    TrieSnapshot,
    read,
)
from service.client.exchange import JSON, Call, Reply, Request
from service.client.explanation import Explanation, explained
from service.client.formats import Item, Lines, Questions, RecordBatches, item_json

OnChange = Literal["keep", "reassign"]

NOT_MODIFIED = 304
LONGEST_SWAP_S = 600.0  # to load a checkpoint in every worker


@dataclass(frozen=True)
class Calls:
    """The calls on one record.

    Attributes:
        namespace: The catalogue's namespace.
        tokenizer: `name` or `name@fingerprint`; None: the service's default one.
    """

    namespace: str = "default"
    tokenizer: str | None = None

    @property
    def origin(self) -> dict[str, str]:
        """The members of a request that name the record."""
        named = {} if self.tokenizer is None else {"tokenizer": self.tokenizer}
        return {"namespace": self.namespace, **named}

    def lines(self, *, assign: bool, on_change: OnChange) -> Lines:
        """`POST /tokenize`, item by item."""
        return Lines(self._options(assign=assign, on_change=on_change))

    def record_batches(self, *, assign: bool, on_change: OnChange) -> RecordBatches:
        """`POST /tokenize`, by record batches."""
        return RecordBatches(self._options(assign=assign, on_change=on_change))

    def lookups(self, *, counterparts: bool) -> Questions[Assignment | answers.UnknownSemanticId]:
        """`POST /lookup`."""
        return Questions("/lookup", "semantic_ids", "items", self._looking(counterparts), answers.looked_up)

    def assignments(self, *, counterparts: bool) -> Questions[Assignment | FailedItem]:
        """`POST /assignments`."""
        return Questions("/assignments", "item_ids", "items", self._looking(counterparts), answers.assigned)

    def retirements(self) -> Questions[Assignment | FailedItem]:
        """`POST /retire`."""
        return Questions("/retire", "item_ids", "items", self.origin, answers.assigned)

    def next_codes(self) -> Questions[answers.NextCodes | answers.UnknownPrefix]:
        """`POST /next`."""
        return Questions("/next", "prefixes", "next", self.origin, answers.following)

    def item(self, semantic_id: str) -> Call[Assignment]:
        """`GET /item/{semantic_id}`."""
        return Call(self._get(f"/item/{_quoted(semantic_id)}"), _read_assignment)

    def assignment(self, item_id: str) -> Call[Assignment]:
        """`GET /assignment/{item_id}`."""
        return Call(self._get(f"/assignment/{_quoted(item_id)}"), _read_assignment)

    def retire(self, item_id: str) -> Call[Assignment]:
        """`DELETE /assignment/{item_id}`."""
        return Call(Request("DELETE", f"/assignment/{_quoted(item_id)}", self.origin), _read_assignment)

    def prefix(self, prefix: str, limit: int, cursor: str | None) -> Call[PrefixListing]:
        """`GET /prefix/{prefix}`."""
        page = {"limit": limit} if cursor is None else {"limit": limit, "cursor": cursor}
        return Call(self._get(f"/prefix/{_quoted(prefix)}", **page), lambda reply: answers.listing(reply.json()))

    def changes(self, after: int, epoch: str | None, limit: int, wait_s: float) -> Call[ChangesPage]:
        """`GET /changes`."""
        history = {"epoch": epoch} if epoch else {}  # none before the record's first item
        request = self._get("/changes", longer_s=wait_s, after=after, limit=limit, wait_s=wait_s, **history)
        return Call(request, lambda reply: answers.changes_page(reply.json()))

    def trie(self, known: str | None) -> Call[TrieSnapshot | None]:
        """`GET /trie`; None where it is still the one of that ETag."""
        headers = {} if known is None else {"if-none-match": known}
        return Call(Request("GET", "/trie", self.origin, headers=headers), _read_trie)

    def tokenizers(self) -> Call[LoadedTokenizers]:
        """`GET /tokenizers`."""
        return Call(Request("GET", "/tokenizers"), _read_tokenizers)

    def stats(self, *, codewords: bool) -> Call[dict[str, Any]]:
        """`GET /stats`."""
        return Call(self._get("/stats", codewords="true" if codewords else "false"), lambda reply: dict(reply.json()))

    def explain(self, item: Item, neighbours: int) -> Call[Explanation]:
        """`POST /explain`."""
        content = b'{"item":%s,%s' % (item_json(item), orjson.dumps({**self.origin, "neighbours": neighbours})[1:])
        request = Request("POST", "/explain", content=content, headers={"content-type": JSON})
        return Call(request, lambda reply: explained(reply.json()))

    def ready(self) -> Call[bool]:
        """`GET /readyz`."""
        named = {} if self.tokenizer is None else {"tokenizer": self.tokenizer}
        return Call(Request("GET", "/readyz", named), lambda reply: bool(reply.json()["ready"]))

    def load_tokenizer(self, checkpoint: str, *, default: bool, force: bool) -> Call[Swapped]:
        """`POST /admin/tokenizers`."""
        return _swap("POST", "", {"checkpoint": checkpoint, "default": default, "force": force})

    def make_default(self, tokenizer: str, *, force: bool) -> Call[Swapped]:
        """`POST /admin/tokenizers/{tokenizer}/default`."""
        return _swap("POST", f"/{_quoted(tokenizer)}/default", {"force": force})

    def unload_tokenizer(self, tokenizer: str) -> Call[Swapped]:
        """`DELETE /admin/tokenizers/{tokenizer}`."""
        return _swap("DELETE", f"/{_quoted(tokenizer)}")

    def _get(self, path: str, longer_s: float = 0.0, **params: str | float) -> Request:
        return Request("GET", path, {**self.origin, **params}, longer_s=longer_s)

    def _looking(self, counterparts: bool) -> dict[str, str | bool]:  # noqa: FBT001 - handed on
        return {**self.origin, **({} if counterparts else {"counterparts": False})}

    def _options(self, *, assign: bool, on_change: OnChange) -> Mapping[str, str]:
        return {**self.origin, "assign": "true" if assign else "false", "on_change": on_change}


def _swap(method: str, path: str, body: Mapping[str, str | bool] | None = None) -> Call[Swapped]:
    content = None if body is None else orjson.dumps(body)
    headers = {} if body is None else {"content-type": JSON}
    request = Request(method, f"/admin/tokenizers{path}", content=content, headers=headers, longer_s=LONGEST_SWAP_S)
    return Call(request, lambda reply: read(Swapped, reply.json()))


def _quoted(text: str) -> str:
    """A part of a path; what has half a surrogate pair is quoted too and refused by the service."""
    quoted = quote(text, safe="", errors="surrogatepass")
    return quoted.replace(".", "%2E") if not quoted.strip(".") else quoted  # else taken for steps of the path


def _read_assignment(reply: Reply) -> Assignment:
    return read(Assignment, reply.json())


def _read_trie(reply: Reply) -> TrieSnapshot | None:
    reply.require_whole()
    if reply.status == NOT_MODIFIED:
        return None
    reply.require_success()
    return TrieSnapshot(reply.headers["etag"], reply.content)


def _read_tokenizers(reply: Reply) -> LoadedTokenizers:
    entry = reply.json()
    since = entry.get("default_since")
    return LoadedTokenizers(
        entry["default"], tuple(entry["tokenizers"]), None if since is None else datetime.fromisoformat(since)
    )
