"""What the record holds once all is quiet, asked over HTTP in every way there is.

Forward and reverse look-ups go into a history of their own, as the last requests of the run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from models import Trie
from tests.chaos.client import Caller, Unanswered, ask
from tests.chaos.history import History

PAGE = 1000
LOOKUPS = 1000
ATTEMPTS = 3
SUFFIXES_BEYOND = 3
"""How many suffixes beyond the highest known one are looked up."""


@dataclass
class Final:
    """What was found.

    Attributes:
        feed: `GET /changes` from the first revision on.
        views: For each way to list the live IDs, what it lists, in order.
        counts: Prefixes whose count in `GET /prefix` is not that of the items under it: (prefix, count, items).
        revision: Of the record.
    """

    feed: list[dict[str, Any]] = field(default_factory=list)
    views: dict[str, list[str]] = field(default_factory=dict)
    counts: list[tuple[str, int, int]] = field(default_factory=list)
    revision: int = 0

    def save(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Final:
        """What was saved."""
        return cls(**json.loads(path.read_text()))


class Observer:
    """Asks one service.

    Args:
        port: Where it listens.
        name: Of the service, for its views.
        tokenizer: Whose record is observed; the default one's if None.
    """

    def __init__(self, port: int, name: str, tokenizer: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._named = {"tokenizer": tokenizer} if tokenizer else {}
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        self._caller = Caller(port, timeout_s=30)
        self._name = name

    def feed(self) -> list[dict[str, Any]]:
        """All changes."""
        changes: list[dict[str, Any]] = []
        while True:
            after = changes[-1]["revision"] if changes else 0
            found = self._get("/changes", after=after, limit=10_000)
            changes += found["changes"]
            if found["next_after"] >= found["revision"]:
                return changes

    def settled_revision(self, quiet_s: float) -> int:
        """The record's revision, once it has not moved for so long."""
        revision, since = self._revision(), time.monotonic()
        while time.monotonic() < since + quiet_s:
            time.sleep(0.2)
            found = self._revision()
            if found != revision:
                revision, since = found, time.monotonic()
        return revision

    def _revision(self) -> int:
        return int(self._get("/changes", after=0, limit=1)["revision"])

    def views(self, final: Final) -> None:
        """Lists what is live, by each route that can."""
        final.views[f"/prefix of {self._name}"] = self._listed()
        final.views[f"/next of {self._name}"] = self._by_next()
        trie = Trie.from_bytes(self._http.get("/trie", params=self._named).raise_for_status().content)
        final.views[f"/trie of {self._name}"] = texts(trie)
        final.counts += self._wrong_counts(final.views[f"/prefix of {self._name}"])

    def _listed(self) -> list[str]:
        found: list[str] = []
        cursor: dict[str, str] = {}
        while True:
            page = self._get("/prefix/", limit=PAGE, **cursor)
            found += [entry["semantic_id"] for entry in page["items"]]
            if page["next_cursor"] is None:
                return found
            cursor = {"cursor": page["next_cursor"]}

    def _by_next(self) -> list[str]:
        """Goes down from the root, by all that is allowed."""
        front = [""]
        depth = 0
        while front:
            grown: list[str] = []
            for start in range(0, len(front), LOOKUPS):
                asked = front[start : start + LOOKUPS]
                answer = self._http.post("/next", json={"prefixes": asked, **self._named}).raise_for_status().json()
                for prefix, entry in zip(asked, answer["next"], strict=True):
                    grown += [f"{prefix}-{number}".lstrip("-") for number in entry["allowed"]]
            front, depth = grown, depth + 1
            if depth == self._levels() + 1:
                break
        return front

    def _levels(self) -> int:
        loaded = self._http.get("/tokenizers").raise_for_status().json()
        wanted = self._tokenizer or loaded["default"]
        (sizes,) = [each["codebook_sizes"] for each in loaded["tokenizers"] if each["tokenizer"] == wanted]
        return len(sizes)

    def _wrong_counts(self, listed: Iterable[str]) -> list[tuple[str, int, int]]:
        under: dict[str, int] = {}
        for semantic_id in listed:
            numbers = semantic_id.split("-")[:-1]
            for depth in range(len(numbers) + 1):
                prefix = "-".join(numbers[:depth])
                under[prefix] = under.get(prefix, 0) + 1
        found = {prefix: self._get(f"/prefix/{prefix}", limit=1)["count"] for prefix in under}
        return [(prefix, count, under[prefix]) for prefix, count in found.items() if count != under[prefix]]

    def look_up_items(self, history: History, items: Iterable[str]) -> None:
        """Every item forward, into the history."""
        for item in items:
            self._asked(history, "forward", {"item": item})

    def look_up_ids(self, history: History, semantic_ids: Sequence[str]) -> None:
        """Every ID reverse, into the history."""
        for start in range(0, len(semantic_ids), LOOKUPS):
            self._asked(history, "lookup", {"semantic_ids": semantic_ids[start : start + LOOKUPS]})

    def ask_again(self, history: History, known: Iterable[tuple[str, int]], embeddings: list[list[float]]) -> None:
        """Tokenizes known items once more, into the history."""
        pairs = [[item, content] for item, content in known]
        for start in range(0, len(pairs), 500):
            arguments = {"items": pairs[start : start + 500], "on_change": "keep"}
            self._asked(history, "tokenize", arguments, embeddings)

    def _asked(
        self, history: History, call: str, arguments: dict[str, Any], embeddings: list[list[float]] | None = None
    ) -> None:
        for _ in range(ATTEMPTS):
            number = history.request(call, arguments)
            try:
                answer = ask(self._caller, call, arguments, embeddings or [], tokenizer=self._tokenizer)
                history.answer(number, *answer)
            except Unanswered as error:  # a connection that lay idle was closed
                history.unknown(number, str(error))
            else:
                return
        raise AssertionError(f"no answer to {call}, though all is up")

    def _get(self, path: str, **parameters: Any) -> Any:
        return self._http.get(path, params=parameters | self._named).raise_for_status().json()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()
        self._caller.close()


def ids_to_look_up(feed: Iterable[dict[str, Any]], told: Iterable[str]) -> list[str]:
    """Every suffix of all codes that anything was assigned under, from 0 to beyond the highest known one."""
    highest: dict[str, int] = {}
    for semantic_id in [*told, *(change["semantic_id"] for change in feed)]:
        codes, _, suffix = semantic_id.rpartition("-")
        highest[codes] = max(highest.get(codes, 0), int(suffix))
    return [f"{codes}-{suffix}" for codes, last in highest.items() for suffix in range(last + SUFFIXES_BEYOND + 1)]


def texts(trie: Trie) -> list[str]:
    """The IDs of a trie, in order."""
    return ["-".join(map(str, numbers)) for numbers in trie.semantic_ids().tolist()]
