"""A client of the service: batches, retries of what is safe to retry, an answer for every item in order.

Tokenizing is idempotent by item id, so a batch whose answer was lost is simply sent again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import orjson

T = TypeVar("T")

RETRIED_STATUSES = frozenset({429, 502, 503, 504})
MAX_PAUSE_S = 30.0


class TokenizerError(Exception):
    """The service refused a request, or could not be reached in time."""


class TokenizerClient:
    """Talks to one service.

    Args:
        url: Its base, such as `http://127.0.0.1:8000`.
        namespace: The catalogue's namespace.
        tokenizer: `name` or `name@fingerprint`; the service's default where None.
        batch_items: Items of one request.
        patience_s: How long one batch is tried again before it fails.
        timeout_s: Of one request.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "default",
        tokenizer: str | None = None,
        batch_items: int = 256,
        patience_s: float = 120.0,
        timeout_s: float = 120.0,
    ) -> None:
        self._http = httpx.Client(base_url=url, timeout=timeout_s)
        self._origin = {"namespace": namespace, "tokenizer": tokenizer}
        self._batch_items = batch_items
        self._patience_s = patience_s

    def tokenize(self, items: Iterable[Mapping[str, Any]], *, assign: bool = True) -> Iterator[dict[str, Any]]:
        """Tokenize items, batch by batch.

        Args:
            items: As in `POST /tokenize`: `item_id`, and `text`, `fields` or `embedding`.
            assign: False is the dry run.

        Yields:
            An entry per item, in order; a faulty one has its own `error`.

        Raises:
            TokenizerError: A whole batch was refused, or the service stayed away for `patience_s`.
        """
        for batch in batched(items, self._batch_items):
            request = {"items": batch, **self._origin, "assign": assign}
            yield from self._post("/tokenize", request)["items"]

    def lookup(self, semantic_ids: Sequence[str]) -> list[dict[str, Any]]:
        """The holders of Semantic IDs, an entry each, in order.

        Raises:
            TokenizerError: As in `tokenize`.
        """
        found: list[dict[str, Any]] = []
        for batch in batched(semantic_ids, self._batch_items):
            found += self._post("/lookup", {"semantic_ids": batch, **self._origin})["items"]
        return found

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _post(self, path: str, request: Mapping[str, Any]) -> Any:
        body = _encoded(request)
        give_up = time.monotonic() + self._patience_s
        pause_s = 0.2
        while True:
            try:
                response = self._http.post(path, content=body, headers={"content-type": "application/json"})
            except httpx.TransportError as error:
                trouble, wanted_s = f"{type(error).__name__}: {error}", 0.0
            else:
                if response.is_success:
                    return orjson.loads(response.content)
                trouble = describe(response)
                if response.status_code not in RETRIED_STATUSES:
                    raise TokenizerError(trouble)
                wanted_s = retry_after_s(response)
            pause_s = min(max(2 * pause_s, wanted_s), MAX_PAUSE_S)
            if time.monotonic() + pause_s > give_up:
                raise TokenizerError(f"gave up on {self._http.base_url}: {trouble}")
            time.sleep(pause_s)


def _encoded(request: Mapping[str, Any]) -> bytes:
    """The request as JSON. What orjson refuses (a lone surrogate) is left to the service: that item fails alone."""
    try:
        return orjson.dumps(request)
    except TypeError:
        return json.dumps(request).encode()


def batched(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of at most `size` values."""
    iterator = iter(values)
    while batch := list(islice(iterator, size)):
        yield batch


def describe(response: httpx.Response) -> str:
    """What a refusal says."""
    try:
        problem = response.json()
        return f"{response.status_code} {problem['title']}: {problem['detail']}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {response.reason_phrase}"


def retry_after_s(response: httpx.Response) -> float:
    """Its `Retry-After` where that is a number; a date is not waited for."""
    try:
        return float(response.headers.get("retry-after") or 0)
    except ValueError:
        return 0.0
