"""Where a record keeps what; the schema is the head of `lib.lua`."""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import crc32

from service.semantic_id import CodeLayout, hash_prefix

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def meta_key(name: str) -> bytes:
    """Where a record with this name keeps its facts."""
    return f"sid:{{{name}}}:meta".encode()


class RecordKeys:
    """The keys of one record."""

    def __init__(self, name: str, layout: CodeLayout, buckets: int) -> None:
        """Of the record with this name, `namespace:fingerprint`.

        Raises:
            ValueError: The name has a brace, which would be a hash tag of its own.
        """
        if set("{}") & set(name):
            raise ValueError(f"a brace in the name of a record: {name!r}")
        self.name = name
        self.layout = layout
        self.buckets = buckets
        self.meta = meta_key(name)
        self.root = f"sid:{{{name}}}:root".encode()
        self.changes = f"sid:{{{name}}}:c".encode()
        self._forward = f"sid:{name}:f:".encode()
        self._reverse = f"sid:{{{name}:r:".encode()
        levels = len(layout.codebook_sizes)
        self.partitions = layout.codebook_sizes[0] if levels > 1 else 1
        self.partition_buckets = -(-buckets // self.partitions)
        self.node_depths = range(min(2, levels - 1), levels)  # how many codes the prefix of a node has
        self.outboxes = f"sid:{{{name}}}:m".encode()

    def first_codes(self) -> Iterator[bytes]:
        """All codes of the first level, packed; of a tokenizer of one level the empty one alone."""
        if len(self.layout.codebook_sizes) == 1:
            return iter([b""])
        return (code.to_bytes(self.layout.bytes_per_code) for code in range(self.partitions))

    def first_code(self, codes: bytes) -> bytes:
        """By which packed codes, or an ID, which begins with them, are kept together."""
        return codes[: self.layout.bytes_per_code] if len(self.layout.codebook_sizes) > 1 else b""

    def outbox(self, first_code: bytes) -> bytes:
        """On a cluster: the changes of the IDs that begin so, on their way into the log."""
        return self._partition(first_code) + b"o"

    def forward(self, item_id: bytes) -> bytes:
        """The bucket of an item."""
        return self.forward_bucket(crc32(item_id) % self.buckets)

    def forwards(self, item_ids: Iterable[bytes]) -> list[bytes]:
        """The bucket of each of many items."""
        prefix, buckets = self._forward, self.buckets
        return [prefix + b"%d" % (crc32(item_id) % buckets) for item_id in item_ids]

    def forward_bucket(self, number: int) -> bytes:
        """One of the buckets in which items stand, by its number from 0."""
        return self._forward + b"%d" % number

    def display(self, item_id: bytes) -> bytes:
        """The bucket of an item's title."""
        return self.display_bucket(crc32(item_id) % self.buckets)

    def display_bucket(self, number: int) -> bytes:
        """One of the buckets in which titles stand, by its number from 0; in the slot of the items' own."""
        return b"sid:{%b}:d" % self.forward_bucket(number)

    def requests(self, requests: Iterable[tuple[bytes, bytes]]) -> bytes:
        """Item ids and what is asked of each, as `atomic.lua` reads them."""
        parts: list[bytes] = []
        for item_id, request in requests:
            bucket = b"%d" % (crc32(item_id) % self.buckets)
            lengths = len(bucket), bucket, len(item_id).to_bytes(2), item_id, len(request).to_bytes(4), request
            parts.append(b"%c%b%b%b%b%b" % lengths)
        return b"".join(parts)

    def new_items(self, item_ids: Iterable[bytes], contents: Iterable[bytes]) -> bytes:
        """Item ids, and of each its digest and packed codes, as `issue.lua` reads them."""
        buckets = self.buckets
        parts: list[bytes] = []
        for item_id, content in zip(item_ids, contents, strict=True):
            bucket = b"%d" % (crc32(item_id) % buckets)
            parts.append(b"%c%b%b%b%b" % (len(bucket), bucket, len(item_id).to_bytes(2), item_id, content))
        return b"".join(parts)

    def reverse_buckets(self) -> Iterator[tuple[bytes, bytes]]:
        """The first code and the key of all buckets in which Semantic IDs stand."""
        for code in self.first_codes():
            for bucket in range(self.partition_buckets):
                yield code, self._partition(code) + b"%d" % bucket

    def under(self, prefix: bytes) -> bytes:
        """The bucket of what stands under a packed prefix."""
        if not prefix and len(self.layout.codebook_sizes) > 1:
            return self.root
        return self.reverse_bucket(self.first_code(prefix), hash_prefix(prefix))

    def reverse_bucket(self, first_code: bytes, number: int) -> bytes:
        """The bucket of what begins with this code, by the number of a prefix, see `hash_prefix`."""
        return self._partition(first_code) + b"%d" % (number % self.partition_buckets)

    def field(self, depth: int, packed: bytes) -> bytes:
        """The field of codes, of an ID, or of a prefix in what stands under a prefix of so many codes."""
        return b"%c%b" % (depth, packed[len(self.first_code(packed)) :])

    def places(self, packed: bytes) -> list[tuple[bytes, bytes]]:
        """Where packed codes, or an ID, may stand: in each node on their path, its bucket and their field there."""
        size = self.layout.bytes_per_code
        return [(self.under(packed[: depth * size]), self.field(depth, packed)) for depth in self.node_depths]

    def path(self, packed: bytes) -> list[bytes]:
        """The buckets of what stands under the prefixes of packed codes, or of an ID, from the first code on."""
        size, levels = self.layout.bytes_per_code, len(self.layout.codebook_sizes)
        return [self.under(packed[: depth * size]) for depth in range(min(1, levels - 1), levels)]

    def _partition(self, first_code: bytes) -> bytes:
        return self._reverse + (b"%d" % int.from_bytes(first_code) if first_code else b"") + b"}:"
