"""The plan for large catalogues rests on a simulation: it has the record's own keys, and its page its own figures."""

from __future__ import annotations

import json
from collections import Counter
from zlib import crc32

import numpy as np
import pytest

from benchmarks import scale
from benchmarks.harness import RESULTS, ROOT, markdown
from benchmarks.occupancy import NODE_IDS, Reverse, binomial_beyond, forward_counts
from benchmarks.populations import Pairs, pack, unpack
from models import DEFAULT_CHECKPOINT, load
from service.registry.keys import RecordKeys
from service.semantic_id import CodeLayout

LEVELS = 4


@pytest.fixture(scope="module")
def codes() -> np.ndarray:
    """Of 3,000 items, many of them alike."""
    return np.random.default_rng(0).geometric(0.3, size=(3000, LEVELS)).clip(max=256).astype(np.int64) - 1


@pytest.mark.parametrize("buckets", [1, 300, 5000])
def test_entries_fall_into_the_buckets_where_the_record_keeps_them(codes: np.ndarray, buckets: int) -> None:
    # given
    keys = RecordKeys("default:0", CodeLayout((256,) * LEVELS), buckets)
    fields: set[tuple[bytes, bytes]] = set()
    placed: Counter[bytes] = Counter()
    issued: Counter[bytes] = Counter()
    for row in codes.tolist():
        packed = keys.layout.pack(row)
        for depth in keys.node_depths:
            node = packed[:depth]
            fields |= {
                (keys.under(node), keys.field(depth, node)),
                (keys.under(node[:-1]), keys.field(depth - 1, node)),
            }
            if placed[node] < NODE_IDS or depth == LEVELS - 1:
                break
        placed[node] += 1
        fields.add((keys.under(node), keys.field(depth, packed + b"%d" % issued[packed])))
        if issued[packed]:
            fields.add((keys.under(node), keys.field(depth, packed)))
        issued[packed] += 1
    assert NODE_IDS in placed.values(), "no node is full"
    there = Counter(key for key, _ in fields)
    # when
    entries, _ = Reverse(pack(codes), LEVELS).counts(buckets)
    # then
    assert {
        keys.reverse_bucket(keys.layout.pack_prefix([code]), number): int(count)
        for code, row in enumerate(entries)
        for number, count in enumerate(row)
        if count
    } == there


def test_distinct_prefixes_and_groups_are_those_of_a_set(codes: np.ndarray) -> None:
    reverse = Reverse(pack(codes), LEVELS)
    assert np.array_equal(unpack(pack(codes), LEVELS), codes)
    for length in range(1, LEVELS + 1):
        assert len(reverse.distinct(length)) == len({tuple(row[:length]) for row in codes.tolist()})
    assert sorted(reverse.groups) == sorted(Counter(map(tuple, codes.tolist())).values())


def test_the_crc_of_an_id_follows_from_those_of_its_parts() -> None:
    heads, tails = [b"B%03d" % n for n in range(40)], [b"%04d" % n for n in range(900)]
    real = Counter(crc32(head + tail) % 70 for head in heads for tail in tails)
    assert forward_counts(heads, tails, 70, 50).tolist() == [real[bucket] for bucket in range(50)]


def test_the_share_of_items_in_full_forward_buckets_is_that_of_drawn_ones() -> None:
    drawn = np.random.default_rng(0).binomial(50_000, 1 / 500, size=20_000)
    counted = drawn[drawn > 110].sum() / drawn.sum()
    assert binomial_beyond(50_000, 500, 110) == pytest.approx(counted, abs=0.01)


def test_a_first_code_made_alone_is_like_that_of_the_whole() -> None:
    draw = np.random.default_rng(0)
    base = draw.normal(size=(40, 384)).astype(np.float32)
    pairs = Pairs(base / np.linalg.norm(base, axis=1, keepdims=True), load(DEFAULT_CHECKPOINT).for_embeddings())
    whole = pairs.whole(6000)
    firsts = pairs.first_codes(whole)
    code = int(np.bincount(firsts.astype(np.int64)).argmax())
    # when
    alone, missing = pairs.of_first_code(code, int((firsts == code).sum()))
    # then
    assert set(pairs.first_codes(alone)) == {code}
    assert missing < 0.05
    those = [set(Reverse(keys, pairs.levels).distinct(2)) for keys in (whole[firsts == code], alone)]
    assert len(those[0] & those[1]) > 0.8 * len(those[0] | those[1])


def test_a_real_server_has_every_bucket_that_was_predicted(tmp_path) -> None:
    options = "--items 1000 6000 --beyond 20000 --ids 10000 --real 6000"
    scale.main([*options.split(), "--results", str(tmp_path)])
    kept = json.loads((tmp_path / "scale.json").read_text())
    (check,) = kept["checks"]
    assert check["differ"] == 0
    assert check["items"] > 50
    for row in kept["tables"]["A real server"].values():
        assert row["bytes an item, predicted"] == pytest.approx(row["bytes an item"], rel=0.5)
        assert row["append-only bytes an item"] > row["rewritten bytes an item"] > 0
    assert list(kept["tables"]["Prefixes"]) == ["1,000", "6,000", "20,000"]


@pytest.mark.parametrize("name", ["scale", "scale-narrow"])
def test_the_tables_of_the_page_are_those_that_were_kept(name: str) -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    kept = json.loads((RESULTS / f"{name}.json").read_text())["tables"]
    shown = [table for table in kept.values() if markdown(table) in page]
    assert len(shown) >= (len(kept) if name == "scale" else 2)
