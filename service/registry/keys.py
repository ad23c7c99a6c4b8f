"""Where a record keeps what; the schema is the head of `record.lua`."""

from __future__ import annotations

from zlib import crc32

from service.semantic_id import CodeLayout, hash_prefix


class RecordKeys:
    """The keys of one record."""

    def __init__(self, prefix: bytes, layout: CodeLayout, buckets: int) -> None:
        """Of the record whose keys begin with `prefix`."""
        self.layout = layout
        self.buckets = buckets
        self.meta = prefix + b"meta"
        self.changes = prefix + b"c"
        self._forward = prefix + b"f:"
        self._reverse = prefix + b"r:"

    def forward(self, item_id: bytes) -> bytes:
        """The bucket of an item."""
        return self._forward + b"%d" % (crc32(item_id) % self.buckets)

    def reverse_bucket(self, number: int) -> bytes:
        """One of the buckets in which something stands under a prefix, by its number from 0."""
        return self._reverse + b"%d" % number

    def under(self, prefix: bytes) -> bytes:
        """The bucket of what stands under a packed prefix."""
        return self.reverse_bucket(hash_prefix(prefix) % self.buckets)

    def reverse(self, codes: bytes) -> bytes:
        """The bucket of packed codes, and of the Semantic IDs, which begin with them."""
        return self.under(self.layout.inner_prefix(codes))
