"""How a record's entries fall into its buckets: what the head of service/registry/lib.lua says, on arrays.

Reverse buckets follow from the codes in the order of their claims, and are counted, every entry of them. Forward
buckets follow from a CRC of the item ids: as good as drawn evenly, so that a bucket's entries are binomial;
`forward_counts` counts them from real ids.
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
NODE_IDS = 128  # of service/registry/nodes.lua
KEY_BYTES = 46  # about, of a bucket's: "sid:{default:0123456789abcdef:r:123}:12345"

Counts = NDArray[np.int64]


class Entries(NamedTuple):
    """Entries, each under its prefix.

    Attributes:
        prefixes: (E,) packed, of one length.
        size_bytes: (E,) that each takes in a listpack.
    """

    prefixes: Keys
    size_bytes: Counts


class Under(NamedTuple):
    """What stands under the distinct prefixes of one length.

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
        keys: (N,) packed codes, in the order of their claims.
        levels: L, 3 at least.
        item_id_bytes: The length of every item id.
    """

    keys: Keys
    levels: int
    item_id_bytes: int = 12

    def distinct(self, length: int) -> Keys:
        """The distinct prefixes of so many codes, ascending."""
        return np.unique(self.keys >> np.uint64(8 * (self.levels - length)))

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
        return np.unique(self.keys, return_counts=True)[1]

    @cached_property
    def under(self) -> list[Under]:
        """All entries but the root's, by the length of the prefix they stand under, from 1."""
        suffixes = _ranks(self.keys)
        remaining = np.arange(len(self.keys))
        entries: list[list[Entries]] = [[] for _ in range(self.levels)]  # by the length of the prefix, from 0
        for length in range(2, self.levels):
            prefixes = self.keys[remaining] >> np.uint64(8 * (self.levels - length))
            ranks = _ranks(prefixes)
            here = ranks < NODE_IDS if length < self.levels - 1 else np.ones(len(ranks), bool)
            below, live = np.unique(prefixes, return_counts=True)
            full = (live >= NODE_IDS) & (length < self.levels - 1)
            # Of a node: how many live IDs it has; and in the one above, that it has any.
            entries[length].append(Entries(below, 2 + length + _number_bytes(live, full)))
            entries[length - 1].append(Entries(below >> np.uint64(8), np.full(len(below), 2 + length + 2)))
            placed = remaining[here]
            sizes = 4 + self.levels + _digits(suffixes[placed]) + self.item_id_bytes
            entries[length].append(Entries(prefixes[here], sizes))
            # A counter where other than the first of equal codes stand: the highest of these.
            later = placed[suffixes[placed] > 0][::-1]
            codes, last = np.unique(self.keys[later], return_index=True)
            counters = 2 + self.levels + _number_bytes(suffixes[later[last]])
            entries[length].append(Entries(codes >> np.uint64(8 * (self.levels - length)), counters))
            remaining = remaining[~here]
        return [_gathered(some) for some in entries[1:]]

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


def _ranks(keys: Keys) -> Counts:
    """How many equal ones come before each of the numbers (N,)."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(keys) else order
    ranks = np.empty(len(keys), np.int64)
    ranks[order] = np.arange(len(keys)) - np.repeat(starts, np.diff(starts, append=len(keys)))
    return ranks


def _gathered(some: Sequence[Entries]) -> Under:
    """How many there are under each prefix, and their bytes."""
    prefixes = np.concatenate([entries.prefixes for entries in some])
    distinct, places = np.unique(prefixes, return_inverse=True)
    sizes = np.concatenate([entries.size_bytes for entries in some])
    counts = np.bincount(places, minlength=len(distinct))
    return Under(distinct, counts, np.bincount(places, sizes, len(distinct)).astype(np.int64))


def _digits(numbers: Counts) -> Counts:
    """Decimal digits."""
    return 1 + sum(((numbers >= 10**digits).astype(np.int64) for digits in range(1, 10)), np.zeros_like(numbers))


def _number_bytes(numbers: Counts, full: NDArray[np.bool_] | None = None) -> Counts:
    """Bytes of decimal numbers in a listpack, which keeps small ones as integers; a full node's have a sign behind."""
    integers = 2 + (numbers > 127).astype(np.int64) + (numbers > 4095) + (numbers > 32767)
    return integers if full is None else np.where(full, 3 + _digits(numbers), integers)
