"""The client for programs without an event loop of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

from service.client.answers import (
    Assignment,
    Change,
    ChangesPage,
    FailedItem,
    LoadedTokenizers,
    NextCodes,
    PrefixListing,
    Swapped,
    TokenizedItem,
    TrieSnapshot,
    UnknownPrefix,
    UnknownSemanticId,
)
from service.client.asynchronous import CHANGES_PER_PAGE, LONGEST_WAIT_S, AsyncTokenizerClient, ClientOptions
from service.client.background import Background
from service.client.batches import as_table, batches_of, slices_of
from service.client.calls import OnChange
from service.client.explanation import Explanation
from service.client.formats import Item
from service.client.portion import Format, Portion

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")


class TokenizerClient:
    """`AsyncTokenizerClient` for programs without an event loop: the same arguments, calls, answers and errors.

        with TokenizerClient("http://127.0.0.1:8000") as client:
            for answer in client.tokenize(items):
                ...

    Requests run in one thread of the client's own, from its first call until it is closed. It may be used by many
    threads, not across a fork. Whoever leaves an iterator, or is interrupted, ends the requests under way.

    Args:
        url: The service's base.
        **options: As of `AsyncTokenizerClient`.
    """

    def __init__(self, url: str, **options: Unpack[ClientOptions]) -> None:
        self._client = AsyncTokenizerClient(url, **options)
        self._background = Background()

    def tokenize(
        self, items: Iterable[Item], *, assign: bool = True, on_change: OnChange = "keep"
    ) -> Generator[TokenizedItem | FailedItem]:
        """An entry per item, in order; as `AsyncTokenizerClient.tokenize`."""
        lines = self._client.calls.lines(assign=assign, on_change=on_change)
        batches = batches_of(items, self._client.options.batch_items)
        yield from _each(self._portions(lines, batches))

    def tokenize_batches(
        self, batches: Iterable[pa.RecordBatch], *, assign: bool = True, on_change: OnChange = "keep"
    ) -> Generator[pa.RecordBatch]:
        """Record batches of answers, in order; as `AsyncTokenizerClient.tokenize_batches`."""
        record_batches = self._client.calls.record_batches(assign=assign, on_change=on_change)
        slices = slices_of(batches, self._client.options.batch_rows)
        yield from _each(self._portions(record_batches, slices))

    def tokenize_table(self, table: pa.Table, *, assign: bool = True, on_change: OnChange = "keep") -> pa.Table:
        """The answers to a table's rows (N rows); as `AsyncTokenizerClient.tokenize_table`."""
        return as_table(list(self.tokenize_batches(table.to_batches(), assign=assign, on_change=on_change)))

    def lookup(self, semantic_ids: Iterable[str], *, counterparts: bool = True) -> list[Assignment | UnknownSemanticId]:
        """The holders of Semantic IDs, an entry each, in order; as `AsyncTokenizerClient.lookup`."""
        return self._background.run(self._client.lookup(semantic_ids, counterparts=counterparts))

    def assignments(self, item_ids: Iterable[str], *, counterparts: bool = True) -> list[Assignment | FailedItem]:
        """What many items hold, an entry each, in order; as `AsyncTokenizerClient.assignments`."""
        return self._background.run(self._client.assignments(item_ids, counterparts=counterparts))

    def retire_all(self, item_ids: Iterable[str]) -> list[Assignment | FailedItem]:
        """Take many items out of every listing; as `AsyncTokenizerClient.retire_all`."""
        return self._background.run(self._client.retire_all(item_ids))

    def next(self, prefixes: Iterable[str]) -> list[NextCodes | UnknownPrefix]:
        """For each prefix, in order, the codes that lead on to a live item."""
        return self._background.run(self._client.next(prefixes))

    def item(self, semantic_id: str) -> Assignment:
        """The item of a Semantic ID; as `AsyncTokenizerClient.item`."""
        return self._background.run(self._client.item(semantic_id))

    def assignment(self, item_id: str) -> Assignment:
        """The Semantic ID that an item holds; as `AsyncTokenizerClient.assignment`."""
        return self._background.run(self._client.assignment(item_id))

    def retire(self, item_id: str) -> Assignment:
        """Take an item out of every listing; as `AsyncTokenizerClient.retire`."""
        return self._background.run(self._client.retire(item_id))

    def prefix(self, prefix: str = "", *, limit: int = 100, cursor: str | None = None) -> PrefixListing:
        """The codes that follow a prefix, with live counts, and a page of the live items under it."""
        return self._background.run(self._client.prefix(prefix, limit=limit, cursor=cursor))

    def items_under(self, prefix: str = "", *, page_items: int = 1000) -> Generator[Assignment]:
        """All live items under a prefix, in the order of their Semantic IDs."""
        pages = self._client.prefix_pages(prefix, page_items=page_items)
        yield from _each(page.items for page in self._background.iterate(pages))

    def changes(
        self, after: int = 0, *, epoch: str | None = None, follow: bool = True, wait_s: float = LONGEST_WAIT_S
    ) -> Generator[Change]:
        """What came and went since a revision, and comes and goes; as `AsyncTokenizerClient.changes`."""
        pages = self._client.changes_pages(after, epoch=epoch, follow=follow, wait_s=wait_s)
        yield from _each(page.changes for page in self._background.iterate(pages))

    def changes_page(
        self, after: int, *, epoch: str | None = None, limit: int = CHANGES_PER_PAGE, wait_s: float = 0.0
    ) -> ChangesPage:
        """The changes after a revision, at most `limit`; as `AsyncTokenizerClient.changes_page`."""
        return self._background.run(self._client.changes_page(after, epoch=epoch, limit=limit, wait_s=wait_s))

    def trie(self) -> TrieSnapshot:
        """The whole live trie."""
        return self._background.run(self._client.trie())

    def trie_unless(self, known: TrieSnapshot) -> TrieSnapshot | None:
        """The whole live trie; None while it is still the known one."""
        return self._background.run(self._client.trie_unless(known))

    def tokenizers(self) -> LoadedTokenizers:
        """What is loaded."""
        return self._background.run(self._client.tokenizers())

    def load_tokenizer(self, checkpoint: str, *, default: bool = False, force: bool = False) -> Swapped:
        """Load a checkpoint beside what is loaded; as `AsyncTokenizerClient.load_tokenizer`."""
        return self._background.run(self._client.load_tokenizer(checkpoint, default=default, force=force))

    def make_default(self, tokenizer: str, *, force: bool = False) -> Swapped:
        """Let a tokenizer answer requests that name none; as `AsyncTokenizerClient.make_default`."""
        return self._background.run(self._client.make_default(tokenizer, force=force))

    def unload_tokenizer(self, tokenizer: str) -> Swapped:
        """Let a tokenizer go; as `AsyncTokenizerClient.unload_tokenizer`."""
        return self._background.run(self._client.unload_tokenizer(tokenizer))

    def stats(self, *, codewords: bool = False) -> dict[str, Any]:
        """Figures of the record; as `AsyncTokenizerClient.stats`."""
        return self._background.run(self._client.stats(codewords=codewords))

    def explain(self, item: Item, *, neighbours: int = 10) -> Explanation:
        """How one content comes to its codes; as `AsyncTokenizerClient.explain`."""
        return self._background.run(self._client.explain(item, neighbours=neighbours))

    def ready(self) -> bool:
        """Whether the service can be reached and is ready; asked once."""
        return self._background.run(self._client.ready())

    def wait_until_ready(self) -> None:
        """Return once the service is ready; as `AsyncTokenizerClient.wait_until_ready`."""
        self._background.run(self._client.wait_until_ready())

    def close(self) -> None:
        """End what is under way, and close the connections."""
        self._background.close(self._client.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _portions(self, format_: Format[Any, T], batches: Iterator[Any]) -> Iterator[list[T]]:
        """What batches bring, in their order, a few at a time; the source is read in the caller's thread.

        What is wrong with the source is raised after the answers to what it gave before.
        """
        pending: deque[Future[list[T]]] = deque()
        fault: Exception | None = None
        try:
            while fault is None:
                try:
                    batch = next(batches, None)
                except Exception as error:  # noqa: BLE001 - raised below
                    fault = error
                    break
                if batch is None:
                    break
                pending.append(self._background.start(self._client.answer(Portion(format_, batch))))
                while pending and (len(pending) >= self._client.options.in_flight or pending[0].done()):
                    yield self._background.result(pending.popleft())
            while pending:
                yield self._background.result(pending.popleft())
            if fault is not None:
                raise fault
        finally:
            for future in pending:
                future.cancel()


def _each(parts: Iterable[Iterable[T]]) -> Generator[T]:
    for part in parts:
        yield from part
