"""The client for asynchronous programs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, TypeVar

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
from service.client.batches import as_table, batches_of_any, slices_of_any
from service.client.calls import Calls, OnChange
from service.client.connection import Connection, Options, Verify
from service.client.errors import TokenizerError
from service.client.exchange import Exchange
from service.client.explanation import Explanation
from service.client.formats import Item
from service.client.patience import Waiting
from service.client.portion import Format, Portion

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")

CHANGES_PER_PAGE = 10_000
LONGEST_WAIT_S = 20.0


class ClientOptions(TypedDict, total=False):
    """What a client may be told beside the service's address; what each is, `AsyncTokenizerClient` says."""

    namespace: str
    tokenizer: str | None
    api_key: str | None
    headers: Mapping[str, str] | None
    verify: Verify
    batch_items: int
    batch_rows: int
    in_flight: int
    patience_s: float
    timeout_s: float
    on_wait: Callable[[Waiting], None] | None


class AsyncTokenizerClient:
    """Talks to one service about one record, with several requests in flight.

        async with AsyncTokenizerClient("http://127.0.0.1:8000") as client:
            async for answer in client.tokenize(items):
                ...

    Every call may be sent again, as all are idempotent but those that load and unload tokenizers, which are sent once:
    a connection that fails, an answer that is cut off, 408, 429, 502, 503 and 504 are tried again after longer and
    longer pauses, and no sooner than `Retry-After` says.

    Args:
        url: The service's base, such as `http://127.0.0.1:8000`.
        namespace: The catalogue's namespace.
        tokenizer: `name` or `name@fingerprint`; the service's default one where None.
        api_key: Sent as `Authorization: Bearer ...`.
        headers: Further headers of every request.
        verify: For TLS: True trusts the authorities that are usual; the path of a file trusts those in it; an
            `ssl.SSLContext` may have a certificate of the client's own; False trusts any server.
        batch_items: Items, Semantic IDs or prefixes of one request; fewer where the service takes fewer.
        batch_rows: Rows of one request of record batches.
        in_flight: Requests of one call that are under way at once.
        patience_s: For how long a request that gets nowhere is tried again before the call fails; 0: it is sent once.
        timeout_s: For how long one attempt may get no answer.
        on_wait: Called before each pause, from the client's own event loop; must not block. Without it the log has a
            line of each call that has to wait for longer.

    Raises:
        ValueError: An argument makes no sense.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "default",
        tokenizer: str | None = None,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        verify: Verify = True,
        batch_items: int = 256,
        batch_rows: int = 4096,
        in_flight: int = 4,
        patience_s: float = 120.0,
        timeout_s: float = 120.0,
        on_wait: Callable[[Waiting], None] | None = None,
    ) -> None:
        key = {} if api_key is None else {"authorization": f"Bearer {_checked(api_key)}"}
        self.options = Options(batch_items, batch_rows, in_flight, patience_s, timeout_s, on_wait)
        self.calls = Calls(namespace, tokenizer)
        self._connection = Connection(url, self.options, {**(headers or {}), **key}, verify=verify)

    async def tokenize(
        self, items: Iterable[Item] | AsyncIterable[Item], *, assign: bool = True, on_change: OnChange = "keep"
    ) -> AsyncGenerator[TokenizedItem | FailedItem]:
        """Tokenize items of any number, in bounded memory.

        Args:
            items: Each with `item_id`, and `text`, `fields` or `embedding` (a list, an array (D,), base64 of float32).
                Each item id at most once: of two contents it is not said which comes first.
            assign: False is the dry run.
            on_change: What becomes of a known item with other codes: `keep`, or `reassign`.

        Yields:
            An entry per item, in order; a faulty one is a `FailedItem`.

        Raises:
            TokenizerError: A whole request was refused, or the service stayed away for `patience_s`.
        """
        lines = self.calls.lines(assign=assign, on_change=on_change)
        batches = batches_of_any(items, self.options.batch_items)
        async for answers in self._portions(lines, batches):
            for answer in answers:
                yield answer

    async def tokenize_batches(
        self,
        batches: Iterable[pa.RecordBatch] | AsyncIterable[pa.RecordBatch],
        *,
        assign: bool = True,
        on_change: OnChange = "keep",
    ) -> AsyncGenerator[pa.RecordBatch]:
        """Tokenize record batches of any number, in bounded memory.

        Args:
            batches: With the columns `item_id`, and `text` (strings) or `embedding` (fixed-size lists of float32).
            assign: False is the dry run.
            on_change: As in `tokenize`.

        Yields:
            Record batches of answers, a row an item, in order; docs/bulk.md has the columns.

        Raises:
            TokenizerError: As in `tokenize`.
        """
        record_batches = self.calls.record_batches(assign=assign, on_change=on_change)
        slices = slices_of_any(batches, self.options.batch_rows)
        async for answers in self._portions(record_batches, slices):
            for answer in answers:
                yield answer

    async def tokenize_table(self, table: pa.Table, *, assign: bool = True, on_change: OnChange = "keep") -> pa.Table:
        """Tokenize a table, as `tokenize_batches` does; the answers (N rows) as one table.

        Raises:
            ValueError: The table has no rows.
            TokenizerError: As in `tokenize`.
        """
        answers = self.tokenize_batches(table.to_batches(), assign=assign, on_change=on_change)
        return as_table([batch async for batch in answers])

    async def lookup(
        self, semantic_ids: Iterable[str], *, counterparts: bool = True
    ) -> list[Assignment | UnknownSemanticId]:
        """The holders of Semantic IDs, an entry each, in order.

        Args:
            semantic_ids: In either form.
            counterparts: Where several tokenizers are loaded, say what each item holds under the other ones.

        Raises:
            TokenizerError: As in `tokenize`.
        """
        return await self._all(self.calls.lookups(counterparts=counterparts), semantic_ids)

    async def assignments(self, item_ids: Iterable[str], *, counterparts: bool = True) -> list[Assignment | FailedItem]:
        """What many items hold, an entry each, in order; `FailedItem` where nothing, or where it was retired.

        Args:
            item_ids: The catalogue's own keys.
            counterparts: As in `lookup`.

        Raises:
            TokenizerError: As in `tokenize`.
        """
        return await self._all(self.calls.assignments(counterparts=counterparts), item_ids)

    async def retire_all(self, item_ids: Iterable[str]) -> list[Assignment | FailedItem]:
        """Take many items out of every listing; of each, in order, as `retire` does, or `FailedItem` where it has none.

        Raises:
            TokenizerError: As in `tokenize`; some may be retired.
        """
        return await self._all(self.calls.retirements(), item_ids)

    async def next(self, prefixes: Iterable[str]) -> list[NextCodes | UnknownPrefix]:
        """For each prefix, in order, the codes that lead on to a live item.

        Raises:
            TokenizerError: As in `tokenize`.
        """
        return await self._all(self.calls.next_codes(), prefixes)

    async def item(self, semantic_id: str) -> Assignment:
        """The item of a Semantic ID: the one that holds it, or held it before it was replaced.

        Raises:
            NotAssigned: No item does.
            Retired: It was retired.
            TokenizerError: As in `tokenize`.
        """
        return await self.answer(self.calls.item(semantic_id))

    async def assignment(self, item_id: str) -> Assignment:
        """The Semantic ID that an item holds.

        Raises:
            NotAssigned: It has none.
            Retired: It was retired.
            TokenizerError: As in `tokenize`.
        """
        return await self.answer(self.calls.assignment(item_id))

    async def retire(self, item_id: str) -> Assignment:
        """Take an item out of every listing; what it held, and since when it is retired.

        Raises:
            NotAssigned: It has no Semantic ID.
            TokenizerError: As in `tokenize`.
        """
        return await self.answer(self.calls.retire(item_id))

    async def prefix(self, prefix: str = "", *, limit: int = 100, cursor: str | None = None) -> PrefixListing:
        """The codes that follow a prefix, with live counts, and a page of the live items under it.

        Raises:
            TokenizerError: As in `tokenize`.
        """
        return await self.answer(self.calls.prefix(prefix, limit, cursor))

    async def items_under(self, prefix: str = "", *, page_items: int = 1000) -> AsyncGenerator[Assignment]:
        """All live items under a prefix, in the order of their Semantic IDs, page by page.

        Raises:
            TokenizerError: As in `tokenize`.
        """
        async for page in self.prefix_pages(prefix, page_items=page_items):
            for item in page.items:
                yield item

    async def prefix_pages(self, prefix: str = "", *, page_items: int = 1000) -> AsyncGenerator[PrefixListing]:
        """The pages of `items_under`."""
        cursor = None
        while True:
            page = await self.prefix(prefix, limit=page_items, cursor=cursor)
            yield page
            cursor = page.next_cursor
            if cursor is None:
                return

    async def changes(
        self, after: int = 0, *, epoch: str | None = None, follow: bool = True, wait_s: float = LONGEST_WAIT_S
    ) -> AsyncGenerator[Change]:
        """What came and went since a revision, in order; then, for ever, what comes and goes.

        Args:
            after: The revision up to which all is known.
            epoch: Of that revision, as an earlier `Change` or a `TrieSnapshot` said it.
            follow: False ends at the record's present revision.
            wait_s: How long one request waits for something new.

        Raises:
            ChangesGone: They are no longer kept: take a new `trie`.
            TokenizerError: As in `tokenize`.
        """
        async for page in self.changes_pages(after, epoch=epoch, follow=follow, wait_s=wait_s):
            for change in page.changes:
                yield change

    async def changes_pages(
        self, after: int = 0, *, epoch: str | None = None, follow: bool = True, wait_s: float = LONGEST_WAIT_S
    ) -> AsyncGenerator[ChangesPage]:
        """The pages of `changes`, the empty ones too."""
        while True:
            page = await self.changes_page(after, epoch=epoch, wait_s=wait_s if follow else 0.0)
            yield page
            after, epoch = page.next_after, page.epoch or epoch
            if not follow and after >= page.revision:
                return

    async def changes_page(
        self, after: int, *, epoch: str | None = None, limit: int = CHANGES_PER_PAGE, wait_s: float = 0.0
    ) -> ChangesPage:
        """The changes after a revision, at most `limit`; where there are none, after waiting for some.

        Raises:
            ChangesGone: As in `changes`.
            TokenizerError: As in `tokenize`.
        """
        return await self.answer(self.calls.changes(after, epoch, limit, wait_s))

    async def trie(self) -> TrieSnapshot:
        """The whole live trie.

        Raises:
            TokenizerError: As in `tokenize`.
        """
        found = await self.answer(self.calls.trie(None))
        assert found is not None
        return found

    async def trie_unless(self, known: TrieSnapshot) -> TrieSnapshot | None:
        """The whole live trie; None while it is still the known one.

        Raises:
            TokenizerError: As in `tokenize`.
        """
        return await self.answer(self.calls.trie(known.etag))

    async def tokenizers(self) -> LoadedTokenizers:
        """What is loaded.

        Raises:
            TokenizerError: As in `tokenize`.
        """
        return await self.answer(self.calls.tokenizers())

    async def load_tokenizer(self, checkpoint: str, *, default: bool = False, force: bool = False) -> Swapped:
        """Load a checkpoint beside what is loaded; sent once, returns when every worker has it, verified and warm.

        Args:
            checkpoint: Its directory, on the service's machine.
            default: Make it the default then.
            force: Even where some callers' requests would be refused from then on.

        Raises:
            TokenizerError: As in `tokenize`.
        """
        return await self.answer(self.calls.load_tokenizer(checkpoint, default=default, force=force), patience_s=0)

    async def make_default(self, tokenizer: str, *, force: bool = False) -> Swapped:
        """Let a tokenizer, named in full, answer requests that name none; `force`: though it takes other content.

        Raises:
            TokenizerError: As in `tokenize`.
        """
        return await self.answer(self.calls.make_default(tokenizer, force=force))

    async def unload_tokenizer(self, tokenizer: str) -> Swapped:
        """Let a tokenizer, named in full, go; sent once.

        Raises:
            TokenizerError: As in `tokenize`.
        """
        return await self.answer(self.calls.unload_tokenizer(tokenizer), patience_s=0)

    async def stats(self, *, codewords: bool = False) -> dict[str, Any]:
        """Figures of the record, as `GET /stats` has them; of each codeword too, where asked.

        Raises:
            TokenizerError: As in `tokenize`.
        """
        return await self.answer(self.calls.stats(codewords=codewords))

    async def explain(self, item: Item, *, neighbours: int = 10) -> Explanation:
        """How one content comes to its codes, the ID it would get, and the live items nearest to it; a dry run.

        Args:
            item: As of `tokenize`; its `item_id` may be left out.
            neighbours: How many nearest items, at most 100.

        Raises:
            Refused: The content is at fault.
            TokenizerError: As in `tokenize`.
        """
        return await self.answer(self.calls.explain(item, neighbours))

    async def ready(self) -> bool:
        """Whether the service can be reached and is ready; asked once."""
        try:
            return await self.answer(self.calls.ready(), patience_s=0)
        except TokenizerError:
            return False

    async def wait_until_ready(self) -> None:
        """Return once the service is ready.

        Raises:
            Unavailable: It is not, after `patience_s`; with what it says instead.
        """
        await self.answer(self.calls.ready())

    async def answer(self, exchange: Exchange[T], patience_s: float | None = None) -> T:
        """Send a request until it is answered.

        Raises:
            TokenizerError: As in `tokenize`.
        """
        return await self._connection.answer(exchange, patience_s)

    async def aclose(self) -> None:
        """End what is under way, and close the connections."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _portions(self, format_: Format[Any, T], batches: AsyncIterator[Any]) -> AsyncGenerator[list[T]]:
        answers = self._connection.answers(Portion(format_, batch) async for batch in batches)
        try:
            async for each in answers:
                yield each
        finally:
            await answers.aclose()

    async def _all(self, format_: Format[str, T], questions: Iterable[str]) -> list[T]:
        batches = batches_of_any(questions, self.options.batch_items)
        return [answer async for answers in self._portions(format_, batches) for answer in answers]


def _checked(api_key: str) -> str:
    """A key as a header takes it, without the line end of the file it was read from.

    Raises:
        ValueError: No key is like that. What it is like is not said: it may be one in part.
    """
    key = api_key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError("api_key is no key: it is empty, or has characters that no key has")
    return key
