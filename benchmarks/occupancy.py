"""How a record's entries fall into its buckets: what the head of service/registry/lib.lua says, on arrays.

Reverse buckets follow from the codes and are counted, every entry of them. Forward buckets follow from a CRC of the
item ids: as good as drawn evenly, so that a bucket's entries are binomial; `forward_counts` counts them from real ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from benchmarks.populations import Keys
from service.semantic_id import HASH_FACTOR, HASH_MODULUS

COMPACT_ENTRIES = 512  # hash-max-listpack-entries
FIRST_CODES = 256
KEY_BYTES = 46  # about, of a bucket's: "sid:{default:0123456789abcdef:r:123}:12345"

Counts = NDArray[np.int64]


class Under(NamedTuple):
    """What stands right under the distinct prefixes of one length.

    Attributes:
        prefixes: (P,) packed, ascending.
        entries: (P,) fields in the bucket of each.
        size_bytes: (P,) that these take in a listpack.
    """

    prefixes: Keys
    entries: Counts
    size_bytes: Counts


@dataclass(frozen=True)
class Reverse:
    """The reverse buckets of items with these codes.

    Attributes:
        keys: (N,) packed codes, ascending.
        levels: L.
        item_id_bytes: The length of every item id.
    """

    keys: Keys
    levels: int
    item_id_bytes: int = 12

    def distinct(self, length: int) -> Keys:
        """The distinct prefixes of so many codes, ascending."""
        return _runs(self.keys >> np.uint64(8 * (self.levels - length)))[0]

    @property
    def first_codes(self) -> Keys:
        """(N,)."""
        return self.keys >> np.uint64(8 * (self.levels - 1))

    @property
    def forward_bytes(self) -> int:
        """What an item takes in a forward bucket's listpack: its id; state, time, digest and ID."""
        return 2 + self.item_id_bytes + 2 + 13 + self.levels + 1

    @cached_property
    def groups(self) -> Counts:
        """How many items have equal codes, a number for each different codes."""
        return _runs(self.keys)[1]

    @cached_property
    def under(self) -> list[Under]:
        """All entries but the root's, by the length of the prefix they stand under, from 1."""
        found = []
        for length in range(1, self.levels - 1):
            # The packed prefix and one code more -> how many live IDs begin with them.
            below, live = _runs(self.keys >> np.uint64(8 * (self.levels - length - 1)))
            found.append(_gathered(below >> np.uint64(8), np.ones_like(live), 2 + length + 1 + _number_bytes(live)))
        codes, items = _runs(self.keys)
        # An ID each, of the codes and a suffix in decimal, and a counter where a second was wanted.
        suffix_digits = sum((np.maximum(items - (10**digits if digits else 0), 0) for digits in range(7)), items * 0)
        counters = (items > 1) * (2 + self.levels + _number_bytes(items - 1))
        size_bytes = items * (4 + self.levels + self.item_id_bytes) + suffix_digits + counters
        found.append(_gathered(codes >> np.uint64(8), items + (items > 1), size_bytes))
        return found

    def counts(self, buckets: int) -> tuple[Counts, Counts]:
        """Entries, and bytes as a listpack, of each reverse bucket: (FIRST_CODES, buckets of each) both.

        Args:
            buckets: Of the record, `SID_BUCKETS`.
        """
        each = -(-buckets // FIRST_CODES)
        entries, size_bytes = np.zeros((2, FIRST_CODES * each))
        for length, under in enumerate(self.under, start=1):
            first = (under.prefixes >> np.uint64(8 * (length - 1))).astype(np.int64)
            places = first * each + hashes(under.prefixes, length) % each
            entries += np.bincount(places, under.entries, len(entries))
            size_bytes += np.bincount(places, under.size_bytes, len(entries))
        shape = FIRST_CODES, each
        return entries.astype(np.int64).reshape(shape), size_bytes.astype(np.int64).reshape(shape)


def hashes(prefixes: Keys, length: int) -> Counts:
    """`hash_prefix` of packed prefixes (P,) of so many codes."""
    number = np.zeros(len(prefixes), np.int64)
    for shift in range(8 * (length - 1), -1, -8):
        number = (number * HASH_FACTOR + (prefixes >> np.uint64(shift) & np.uint64(255)).astype(np.int64) + 1) % (
            HASH_MODULUS
        )
    return number


def beyond_share(entries: Counts, most: int = COMPACT_ENTRIES) -> float:
    """The share of all entries that lie in buckets of more than so many."""
    return float(entries[entries > most].sum() / max(1, entries.sum()))


def binomial_beyond(items: int, buckets: int, most: int = COMPACT_ENTRIES) -> float:
    """The share of items in forward buckets of more than so many, by the binomial law."""
    # The sum of k P(k) beyond `most`, over the mean: a chosen item's neighbours are binomial with one trial less.
    return float(binom.sf(most - 1, items - 1, 1 / buckets))


def forward_counts(heads: Sequence[bytes], tails: Sequence[bytes], buckets: int, sampled: int) -> Counts:
    """Items in each of the first `sampled` forward buckets: the ids are all heads with all tails behind them.

    A CRC is affine over bits, so that of an id follows from those of its parts, and a billion take seconds.

    Args:
        heads: All of one length.
        tails: All of one length.
        buckets: Of the record.
        sampled: How many are counted.
    """
    first = np.array([crc32(head + tails[0]) for head in heads], np.uint32)
    last = np.array([crc32(heads[0] + tail) for tail in tails], np.uint32) ^ first[0]
    found = np.zeros(sampled, np.int64)
    for start in first:
        places = (last ^ start) % np.uint32(buckets)
        found += np.bincount(places[places < sampled], minlength=sampled)
    return found


def memory_bytes(entries: Counts, size_bytes: Counts, key_bytes: int = KEY_BYTES) -> float:
    """What a server takes for these buckets, an estimate: empty ones have no key.

    Args:
        entries: (B,).
        size_bytes: (B,) of their fields in a listpack.
        key_bytes: The length of a key, about.
    """
    there, compact = entries > 0, entries <= COMPACT_ENTRIES
    # A listpack has 7 bytes of its own; a larger bucket a table, whose entries are allocated one by one.
    each = np.where(compact, allocated(size_bytes + 7), entries * (allocated(size_bytes // entries.clip(1) + 6) + 14))
    return float(each[there].sum() + there.sum() * (allocated(np.array(20 + key_bytes)) + 14))


def allocated(sizes: Counts) -> Counts:
    """Bytes that the allocator (jemalloc) gives for these: four sizes for each power of two."""
    spacing = 2 ** np.maximum(np.ceil(np.log2(np.maximum(sizes, 1))).astype(np.int64) - 3, 4)
    return -(-sizes // spacing) * spacing


def _runs(ordered: Keys) -> tuple[Keys, Counts]:
    """The distinct numbers of ascending ones, and how often each is there."""
    if not len(ordered):
        return ordered, np.zeros(0, np.int64)
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    return ordered[starts], np.diff(starts, append=len(ordered))


def _gathered(prefixes: Keys, entries: Counts, size_bytes: Counts) -> Under:
    """Sums of these by prefix, which ascend."""
    distinct, there = _runs(prefixes)
    starts = np.cumsum(there) - there
    return Under(distinct, np.add.reduceat(entries, starts), np.add.reduceat(size_bytes, starts))


def _number_bytes(numbers: Counts) -> Counts:
    """Bytes of decimal numbers in a listpack, which keeps small ones as integers."""
    return 2 + (numbers > 127).astype(np.int64) + (numbers > 4095) + (numbers > 32767)
