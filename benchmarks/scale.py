"""How the keys of a record lie at a million to a billion items, and whether a real server has them so.

    python -P benchmarks/scale.py [--embeddings embeddings.npy] [--items 1000000 10000000]

No service. Items are pairs of embeddings, made up or given, with the codes of the default checkpoint. Up to the largest
of --items all are made. Of more, first codes are made whole, each as many times larger as the catalogue is: what is
distinct in all is taken to grow as in the one in the middle. The buckets of more are those of the largest of --items,
in as many times fewer. Forward buckets are drawn from the binomial law, and counted by the CRCs of a billion ids. At
--real items the keys, entries and memory of a server stand beside those predicted.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from binascii import crc_hqx
from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.contents import Embeddings
from benchmarks.harness import Result, Table, keep, limit_threads, parser_of
from benchmarks.occupancy import FIRST_CODES, Reverse, beyond_share, binomial_beyond, forward_counts, memory_bytes
from benchmarks.populations import Pairs
from benchmarks.real_record import beside
from models import DEFAULT_CHECKPOINT, load, read_manifest
from models.embedding_files import read_embeddings

BASE_ROWS = 100_000  # embeddings at most: ten billion pairs
RANKS = (0, 127, 127)  # from the fullest, of the first codes that are made of each of --beyond; the last for the others
ITEMS_PER_BUCKET = (100, 50, 25)
DEFAULT_BUCKETS = 16_384
PRIMARIES = (8, 16, 32, 64)
SLOTS = 16_384
BUCKETS_PER_SAMPLED = 100
TAILS = 1_000_000


def prefixes(populations: Mapping[int, Reverse], drawn: Mapping[int, Reverse], whole: int) -> tuple[Table, Table]:
    """Distinct prefixes and groups of equal codes by size; and the exponents by which prefixes grow from size to size.

    Args:
        populations: Items -> all of them.
        drawn: Items -> some of a population so large: whole first codes.
        whole: The largest of `populations`.
    """
    counts = {items: _distinct(population) for items, population in populations.items()}
    # The one in the middle grows as the whole does; the fullest, where prefixes are shared by more, less.
    middle = drawn[max(drawn)] if drawn else populations[whole]
    for items, some in drawn.items():
        growth = _distinct(_alike(some, middle)) / _distinct(_alike(populations[whole], middle))
        counts[items] = counts[whole] * growth
    sizes: Table = {}
    for items, found in counts.items():
        groups = (drawn[items] if items in drawn else populations[items]).groups
        sizes[f"{items:,}"] = {
            **{f"prefixes of {length}": float(count) for length, count in enumerate(found[1:], start=2)},
            "edges of the trie": float(found.sum() + items),
            "largest group": float(groups.max()),
            "share of items not alone": float(1 - (groups == 1).sum() / groups.sum()),
        }
    slopes: Table = {}
    for (few, before), (many, after) in pairwise(counts.items()):
        slopes[f"{few:,} to {many:,}"] = _exponents(before, after, many / few)
        if drawn and many <= whole:
            those = [_distinct(_alike(populations[size], middle)) for size in (few, many)]
            slopes[f"{few:,} to {many:,}, of the first code in the middle"] = _exponents(*those, many / few)
    return sizes, slopes


def buckets(populations: Mapping[int, Reverse], drawn: Mapping[int, Reverse], whole: int) -> Table:
    """What buckets hold, by items and `SID_BUCKETS`."""
    table: Table = {}
    draw = np.random.default_rng(0)
    for items in (*populations, *drawn):
        population, fewer = (populations[items], 1) if items in populations else (populations[whole], items // whole)
        numbers = {items // each for each in ITEMS_PER_BUCKET}
        for number in sorted({*numbers, DEFAULT_BUCKETS} if fewer == 1 else numbers):
            entries, size_bytes = population.counts(number // fewer)
            forward = draw.binomial(items, 1 / number, size=number // fewer)
            memory = memory_bytes(entries, size_bytes) + memory_bytes(forward, forward * population.forward_bytes)
            table[f"{items:,} in {number:,}"] = {
                "keys": float(((entries > 0).sum() + (forward > 0).sum()) * fewer),
                "entries of a reverse bucket": float(entries.mean()),
                "at the fullest first code": float(entries.mean(axis=1).max()),
                "largest": float(entries.max()),
                "share beyond 512": beyond_share(entries),
                "of forward entries": binomial_beyond(items, number),
                "bytes an item, predicted": memory / len(population.keys),
            }
    return table


def fewer_beside_all(populations: Mapping[int, Reverse], drawn: Mapping[int, Reverse], whole: int) -> Table:
    """Buckets of the first codes that were made whole, beside those of fewer items in as many times fewer buckets."""
    table: Table = {}
    for items, some in drawn.items():
        number = items // ITEMS_PER_BUCKET[0]
        codes = _codes_of(some)
        found = {"all": some.counts(number), "fewer": populations[whole].counts(number // (items // whole))}
        for code in codes:
            for name, (entries, _) in found.items():
                table[f"{items:,} in {number:,}, first code {code}, {name}"] = {
                    "items": float((some.first_codes == code).sum()),
                    "entries of a bucket": float(entries[code].mean()),
                    "largest": float(entries[code].max()),
                    "share beyond 512": beyond_share(entries[code]),
                }
    return table


def first_codes(populations: Mapping[int, Reverse]) -> Table:
    """How uneven first codes are, by their entries."""
    table: Table = {}
    for items, population in populations.items():
        held = _held(population)
        table[f"{items:,}"] = {
            "fullest over the mean": float(held.max() / held.mean()),
            "tenth fullest": float(np.sort(held)[-10] / held.mean()),
            "without items": float((held == 0).sum()),
        }
    return table


def primaries(population: Reverse, name: str) -> Table:
    """What of the reverse buckets the fullest server of a cluster holds, over the mean."""
    held = _held(population)
    slots = np.array([crc_hqx(f"{name}:r:{code}".encode(), 0) % SLOTS for code in range(FIRST_CODES)])
    table: Table = {}
    for count in PRIMARIES:
        even = np.bincount(slots * count // SLOTS, held, count)
        table[f"{count} primaries"] = {
            "slots evenly": float(even.max() / even.mean()),
            "slots placed by what they hold": float(_placed(held, count).max() / even.mean()),
        }
    return table


def forward(items: int) -> Table:
    """Forward buckets, counted by CRCs of real ids, beside the binomial law."""
    number, tails = max(1, items // ITEMS_PER_BUCKET[0]), min(TAILS, items)
    draw = np.random.default_rng(0)
    codes = ["".join(four).encode() for four in product("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", repeat=4)]
    some = [codes[i] for i in draw.permutation(len(codes))]
    ids = {
        "running numbers": ([b"B%05d" % n for n in range(items // tails)], [b"%06d" % n for n in range(tails)]),
        "letters and digits": ([b"B0" + head for head in some[: items // tails]], some[-tails:]),
    }
    table: Table = {}
    for kind, (heads, ends) in ids.items():
        found = forward_counts(heads, ends, number, max(1, number // BUCKETS_PER_SAMPLED))
        table[f"{items:,} in {number:,}, {kind}"] = {
            "buckets counted": float(len(found)),
            "mean": float(found.mean()),
            "variance": float(found.var()),
            "binomial variance": items / number * (1 - 1 / number),
            "largest": float(found.max()),
        }
    return table


def _held(population: Reverse) -> NDArray[np.int64]:
    """Reverse entries of each first code."""
    held: NDArray[np.int64] = population.counts(FIRST_CODES)[0].sum(axis=1)
    return held


def _distinct(population: Reverse) -> NDArray[np.float64]:
    """Distinct prefixes of 1 to L codes, (L,)."""
    return np.array([len(population.distinct(length)) for length in range(1, population.levels + 1)], np.float64)


def _exponents(before: NDArray[np.float64], after: NDArray[np.float64], times: float) -> dict[str, float]:
    """The log-log slopes of distinct prefixes of 2 codes and more, (L,) both, as the items grow so many times."""
    found = np.log(after / before) / np.log(times)
    return {f"exponent of {length}": float(slope) for length, slope in enumerate(found[1:], start=2)}


def _codes_of(population: Reverse) -> NDArray[np.int64]:
    """Its first codes, ascending."""
    return population.distinct(1).astype(np.int64)


def _alike(population: Reverse, some: Reverse) -> Reverse:
    """The items of a population that have the first codes of some other."""
    there = np.isin(population.first_codes, some.distinct(1))
    return Reverse(population.keys[there], population.levels)


def _placed(held: NDArray[np.int64], primaries: int) -> NDArray[np.int64]:
    """What primaries hold where each first code goes, the fullest first, to the one that holds least."""
    load = np.zeros(primaries, np.int64)
    for entries in np.sort(held)[::-1]:
        load[load.argmin()] += entries
    return load


def draw_beyond(pairs: Pairs, most: Reverse, sizes: Sequence[int]) -> tuple[dict[int, Reverse], list[float]]:
    """Whole first codes of each size, and what share of their items cannot be drawn at most."""
    ranked = np.argsort(-np.bincount(most.first_codes.astype(np.int64), minlength=FIRST_CODES), kind="stable")
    ranked = ranked[np.isin(ranked, _codes_of(most))]
    drawn, missing = {}, []
    for place, items in enumerate(sizes):
        chosen = RANKS[:-1] if place == 0 else RANKS[-1:]
        keys = []
        for rank in chosen:
            code = int(ranked[min(rank, len(ranked) // 2) if rank else 0])
            count = round(int((most.first_codes == code).sum()) * items / len(most.keys))
            found, share = pairs.of_first_code(code, count)
            keys.append(found)
            missing.append(share)
            print(f"first code {code} of {items:,}: {count:,} items, {share:.1%} not drawable")
        drawn[items] = Reverse(np.random.default_rng(0).permutation(np.concatenate(keys)), most.levels)
    return drawn, missing


def run(arguments: Namespace) -> Result:
    """Simulate, and measure a server."""
    if arguments.embeddings is None:
        base = Embeddings().take(BASE_ROWS)
    else:
        base = read_embeddings(arguments.embeddings).numpy()
        base = base[np.random.default_rng(0).permutation(len(base))[:BASE_ROWS]]
    pairs = Pairs(base, load(DEFAULT_CHECKPOINT).for_embeddings())
    result = Result(arguments.name)
    keys = pairs.whole(max(arguments.items))  # smaller ones are the first of them
    print(f"{len(keys):,} items made")
    if arguments.real:
        result.tables["A real server"], check = beside(keys[: arguments.real], pairs.levels)
        result.checks.append(check)
    populations = {items: Reverse(keys[:items], pairs.levels) for items in sorted(arguments.items)}
    whole = max(arguments.items)
    drawn, missing = draw_beyond(pairs, populations[whole], sorted(arguments.beyond))
    if missing:
        result.skipped["items that the first codes beyond cannot have"] = f"{max(missing):.2%} of them at most"
    sizes, slopes = prefixes(populations, drawn, whole)
    result.tables |= {
        "Prefixes": sizes,
        "Growth": slopes,
        "Buckets": buckets(populations, drawn, whole),
        "First codes made whole": fewer_beside_all(populations, drawn, whole),
        "First codes": first_codes(populations),
        "Primaries": primaries(populations[whole], f"default:{read_manifest(DEFAULT_CHECKPOINT).fingerprint}"),
        "Forward buckets": forward(arguments.ids),
    }
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Run it."""
    parser = parser_of(__doc__, rounds=1)
    parser.add_argument("--embeddings", "--catalogue", type=Path, help="an array of embeddings; made up if not given")
    parser.add_argument("--name", default="scale", help="under which the result is kept (default %(default)s)")
    parser.add_argument("--items", type=int, nargs="+", default=[10**6, 10**7], help="sizes (default %(default)s)")
    parser.add_argument("--beyond", type=int, nargs="*", default=[10**8, 10**9], help="more (default %(default)s)")
    parser.add_argument("--ids", type=int, default=10**9, help="ids in forward buckets (default %(default)s)")
    parser.add_argument("--real", type=int, default=200_000, help="on a server; 0: none (default %(default)s)")
    arguments = parser.parse_args(argv)
    limit_threads(arguments.threads)
    result = run(arguments)
    keep(result, arguments)


if __name__ == "__main__":
    main()
