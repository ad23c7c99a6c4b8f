"""Where a record keeps what; the schema is the head of `lib.lua`."""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import crc32

from service.semantic_id import CodeLayout, hash_prefix

if TYPE_CHECKING:
    from collections.abc import Iterator


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
        self.meta = f"sid:{{{name}}}:meta".encode()
        self.root = f"sid:{{{name}}}:root".encode()
        self.changes = f"sid:{{{name}}}:c".encode()
        self._forward = f"sid:{name}:f:".encode()
        self._reverse = f"sid:{{{name}:r:".encode()
        levels = len(layout.codebook_sizes)
        self.partitions = layout.codebook_sizes[0] if levels > 1 else 1
        self.partition_buckets = -(-buckets // self.partitions)

    def forward(self, item_id: bytes) -> bytes:
        """The bucket of an item."""
        return self.forward_bucket(crc32(item_id) % self.buckets)

    def forward_bucket(self, number: int) -> bytes:
        """One of the buckets in which items stand, by its number from 0."""
        return self._forward + b"%d" % number

    def reverse_buckets(self) -> Iterator[bytes]:
        """All buckets in which Semantic IDs stand."""
        for partition in range(self.partitions):
            for bucket in range(self.partition_buckets):
                yield self._reverse_bucket(partition, bucket)

    def under(self, prefix: bytes) -> bytes:
        """The bucket of what stands under a packed prefix."""
        if len(self.layout.codebook_sizes) == 1:
            return self._reverse + b"}:0"
        if not prefix:
            return self.root
        first = int.from_bytes(prefix[: self.layout.bytes_per_code])
        return self._reverse_bucket(first, hash_prefix(prefix) % self.partition_buckets)

    def reverse(self, codes: bytes) -> bytes:
        """The bucket of packed codes, and of the Semantic IDs, which begin with them."""
        return self.under(self.layout.inner_prefix(codes))

    def _reverse_bucket(self, partition: int, bucket: int) -> bytes:
        tag = b"%d" % partition if len(self.layout.codebook_sizes) > 1 else b""
        return self._reverse + tag + b"}:%d" % bucket
