from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from service.errors import RegistryOlder, RegistryRefused, RegistryUnavailable
from service.registry import Assignment, Claim, Record, Registry, primary
from service.semantic_id import SemanticId

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.valkey import Valkey

    Connect = Callable[..., Awaitable[Registry]]

FINGERPRINT = "0123456789abcdef"
SIZES = (256, 256, 256)
CODES = (1, 2, 3)
OTHER_CODES = (1, 2, 4)


def digest(content: object) -> bytes:
    return f"{content!s:>8}".encode()[:8]


def claim(item_id: str, codes: tuple[int, ...] = CODES, content: object = "content") -> Claim:
    return Claim(item_id, codes, digest(content))


async def claim_one(record: Record, *args: object) -> Assignment:
    return (await record.claim([claim(*args)]))[0].assignment  # type: ignore[arg-type]


async def suffixes_of(record: Record, item_ids: list[str]) -> list[int]:
    return [found.semantic_id.suffix for found in await record.by_item_ids(item_ids) if found is not None]


@pytest.fixture
async def record(shared_valkey: Valkey, connect: Connect, namespace: str) -> Record:
    registry = await connect(shared_valkey.url)
    return await registry.record(namespace, FINGERPRINT, SIZES)


# Suffixes


async def test_equal_codes_receive_increasing_suffixes_and_the_first_keeps_0(record: Record) -> None:
    first = await claim_one(record, "first")
    assert first.semantic_id == SemanticId(CODES, 0)

    results = await record.claim([claim(name) for name in ("second", "third", "first")])

    assert [result.assignment.semantic_id.suffix for result in results] == [1, 2, 0]
    assert [result.created for result in results] == [True, True, False]
    assert await record.group_sizes([CODES, OTHER_CODES]) == [3, 0]
    assert await record.count() == 3


async def test_a_claim_again_gets_the_same_id_and_creates_nothing(record: Record) -> None:
    claims = [claim(f"item {number}", (number % 3, 0, 0)) for number in range(50)]
    first = await record.claim(claims)

    again = await record.claim(claims)

    assert [result.assignment for result in again] == [result.assignment for result in first]
    assert all(result.created for result in first)
    assert not any(result.created for result in again)
    assert await record.count() == 50


async def test_an_item_twice_in_one_batch_is_assigned_once(record: Record) -> None:
    results = await record.claim([claim("twin"), claim("twin"), claim("other")])

    assert [(result.assignment.semantic_id.suffix, result.created) for result in results] == [
        (0, True),
        (0, False),
        (1, True),
    ]


async def test_no_claims_are_no_answers(record: Record) -> None:
    assert await record.claim([]) == []
    assert await record.by_item_ids([]) == []
    assert await record.by_semantic_ids([]) == []
    assert await record.group_sizes([]) == []


async def test_more_claims_than_one_call_holds_are_answered_in_order(record: Record) -> None:
    claims = [claim(f"item {number}", (number % 7, 0, number % 256)) for number in range(2500)]

    results = await record.claim(claims)

    assert [result.assignment.item_id for result in results] == [wanted.item_id for wanted in claims]
    assert [result.assignment.semantic_id.codes for result in results] == [wanted.codes for wanted in claims]
    assert len({result.assignment.semantic_id for result in results}) == 2500


async def test_concurrent_colliding_claims_leave_no_hole_and_no_double(
    shared_valkey: Valkey, connect: Connect, namespace: str
) -> None:
    records = [await (await connect(shared_valkey.url)).record(namespace, FINGERPRINT, SIZES) for _ in range(4)]

    async def client(number: int) -> list[Assignment]:
        mine = [f"item {item}" for item in range(number * 10, number * 10 + 40)]  # overlaps its neighbours' items
        answers = []
        for start in range(0, 40, 5):
            results = await records[number % 4].claim([claim(item_id) for item_id in mine[start : start + 5]])
            answers += [result.assignment for result in results]
        return answers

    answers = [answer for answers in await asyncio.gather(*map(client, range(16))) for answer in answers]

    held = {answer.item_id: answer.semantic_id for answer in answers}
    assert all(held[answer.item_id] == answer.semantic_id for answer in answers)
    assert sorted(semantic_id.suffix for semantic_id in held.values()) == list(range(190))
    assert await records[0].group_sizes([CODES]) == [190]


@pytest.mark.parametrize("item_id", ["a b", "nul\0nul", "\"'\\", "línea\n", "\U0001f9f4 香", "-1", "1e3", "x" * 256])
async def test_item_ids_are_opaque(record: Record, item_id: str) -> None:
    assignment = await claim_one(record, item_id)

    assert await record.by_item_ids([item_id]) == [assignment]
    assert await record.by_semantic_ids([assignment.semantic_id]) == [assignment]


async def test_wide_codebooks_and_single_levels_work_too(
    shared_valkey: Valkey, connect: Connect, namespace: str
) -> None:
    registry = await connect(shared_valkey.url)
    for sizes, codes in [((65_536,), (65_535,)), ((1,), (0,)), ((2,) * 25, (1,) * 25), ((256, 1024), (255, 1023))]:
        record = await registry.record(namespace, f"{FINGERPRINT}{len(sizes)}{sizes[0]}", sizes)

        results = await record.claim([claim("one", codes), claim("two", codes), claim("three", codes)])

        assert [result.assignment.semantic_id for result in results] == [SemanticId(codes, n) for n in range(3)]
        assert await record.by_semantic_ids([SemanticId(codes, 2)]) == [results[2].assignment]


# Content


async def test_changed_content_keeps_the_id_and_is_recognised_by_its_digest(record: Record) -> None:
    original = await claim_one(record, "item", CODES, "old")

    changed = await claim_one(record, "item", OTHER_CODES, "new")
    again = await claim_one(record, "item", OTHER_CODES, "new")

    assert changed.semantic_id == original.semantic_id
    assert (changed.digest, changed.content_changed) == (digest("new"), True)
    assert again == changed == (await record.by_item_ids(["item"]))[0]
    assert changed.assigned_at == original.assigned_at
    assert await record.group_sizes([OTHER_CODES]) == [0]


async def test_other_content_with_the_same_codes_has_not_changed(record: Record) -> None:
    await claim_one(record, "item", CODES, "old")

    reworded = await claim_one(record, "item", CODES, "reworded")

    assert (reworded.digest, reworded.content_changed) == (digest("reworded"), False)


async def test_content_that_returns_to_the_assigned_codes_is_no_longer_changed(record: Record) -> None:
    await claim_one(record, "item", CODES, "old")
    await claim_one(record, "item", OTHER_CODES, "new")

    returned = await claim_one(record, "item", CODES, "old")

    assert not returned.content_changed
    assert not (await record.by_semantic_ids([returned.semantic_id]))[0].content_changed  # type: ignore[union-attr]


# Look-ups


async def test_reverse_and_forward_lookups_agree(record: Record) -> None:
    claims = [claim(f"item {number}", (number % 5, number % 3, 0)) for number in range(300)]
    assigned = [result.assignment for result in await record.claim(claims)]

    assert await record.by_item_ids([a.item_id for a in assigned]) == assigned
    assert await record.by_semantic_ids([a.semantic_id for a in assigned]) == assigned


async def test_what_is_not_assigned_is_none_in_its_place(record: Record) -> None:
    assignment = await claim_one(record, "item")

    assert await record.by_item_ids(["no", "item", "no"]) == [None, assignment, None]
    assert await record.by_semantic_ids([SemanticId(CODES, 1), SemanticId(CODES, 0)]) == [None, assignment]


async def test_the_time_of_assignment_is_the_servers(record: Record) -> None:
    assignment = await claim_one(record, "item")

    assert abs(datetime.now(UTC) - assignment.assigned_at) < timedelta(seconds=10)


@pytest.mark.parametrize(
    "wrong", [Claim("i", (1, 2), b"8" * 8), Claim("i", (1, 2, 256), b"8" * 8), Claim("i", CODES, b"")]
)
async def test_a_claim_that_cannot_be_is_refused_before_anything_is_sent(record: Record, wrong: Claim) -> None:
    with pytest.raises(ValueError, match=r"codes|digest"):
        await record.claim([claim("neighbour"), wrong])

    assert await record.count() == 0


# Records


async def test_namespaces_and_tokenizers_are_independent(
    shared_valkey: Valkey, connect: Connect, namespace: str
) -> None:
    registry = await connect(shared_valkey.url)
    for name, fingerprint in [
        (namespace, "aa"),
        (namespace, "bb"),
        (namespace + ":x", "aa"),
        (namespace + "%d%s", "aa"),
    ]:
        record = await registry.record(name, fingerprint, SIZES)

        assert (await claim_one(record, "item")).semantic_id.suffix == 0
        assert await record.count() == 1


async def test_the_number_of_buckets_is_a_fact_of_the_record(
    shared_valkey: Valkey, connect: Connect, namespace: str
) -> None:
    first = await (await connect(shared_valkey.url, buckets=7)).record(namespace, FINGERPRINT, SIZES)
    assignment = await claim_one(first, "item")

    second = await (await connect(shared_valkey.url, buckets=1000)).record(namespace, FINGERPRINT, SIZES)

    assert second.buckets == 7
    assert await second.by_item_ids(["item"]) == [assignment]


async def test_a_record_of_other_codebooks_is_refused(shared_valkey: Valkey, connect: Connect, namespace: str) -> None:
    registry = await connect(shared_valkey.url)
    await registry.record(namespace, FINGERPRINT, SIZES)

    with pytest.raises(RegistryRefused, match="codebooks 256,256,256"):
        await registry.record(namespace, FINGERPRINT, (256, 256))


async def test_looking_at_a_record_that_is_not_there_leaves_nothing_behind(
    shared_valkey: Valkey, connect: Connect, namespace: str
) -> None:
    registry = await connect(shared_valkey.url)
    absent = await registry.record(namespace, FINGERPRINT, SIZES, create=False)

    assert await absent.by_item_ids(["item"]) == [None]
    assert shared_valkey.client().keys(f"sid:*{namespace}:*") == []

    present = await registry.record(namespace, FINGERPRINT, SIZES)
    assert (await claim_one(present, "item")).semantic_id.suffix == 0
    assert await registry.record(namespace, FINGERPRINT, SIZES, create=False) is present


@pytest.mark.parametrize("name", [("", "f"), ("n", ""), ("{n}", "f"), ("n", "a:b")])
async def test_a_name_that_would_confuse_keys_is_refused(
    shared_valkey: Valkey, connect: Connect, name: tuple[str, str]
) -> None:
    registry = await connect(shared_valkey.url)

    with pytest.raises(ValueError, match="cannot name a record"):
        await registry.record(*name, SIZES)


async def test_small_buckets_stay_in_listpack_encoding(start_valkey: Callable[..., Valkey], connect: Connect) -> None:
    server = start_valkey(hash_max_listpack_entries="512", hash_max_listpack_value="320")
    record = await (await connect(server.url, buckets=8)).record("default", FINGERPRINT, SIZES)

    await record.claim([claim(f"{number:0256d}", (number % 256, number // 256, 0)) for number in range(800)])

    client = server.client()
    kinds = {client.object("encoding", key) for key in client.scan_iter("sid:*default:*:[fr]:*")}
    assert kinds == {b"listpack"}


# Cancellation


async def test_a_cancelled_caller_does_not_disturb_the_others(record: Record) -> None:
    async def ask(number: int) -> tuple[str, list[Assignment | None]]:
        await claim_one(record, f"item {number}", (number % 256, 0, 0))
        return f"item {number}", await record.by_item_ids([f"item {number}"])

    tasks = [asyncio.create_task(ask(number)) for number in range(400)]
    for turn, task in enumerate(tasks[::2]):
        await asyncio.sleep(0.0005 if turn % 10 == 0 else 0)
        task.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)

    for answer in answers[1::2]:
        assert isinstance(answer, tuple)
        item_id, found = answer
        assert found[0] is not None
        assert found[0].item_id == item_id


async def test_a_caller_cancelled_before_sending_has_claimed_nothing(record: Record) -> None:
    task = asyncio.create_task(record.claim([claim("left")]))
    await asyncio.sleep(0)  # its claims wait now
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task

    stayed = await claim_one(record, "stayed")

    assert stayed.semantic_id.suffix == 0
    assert await record.by_item_ids(["left"]) == [None]


# Failures


async def test_the_script_is_loaded_again_after_a_flush(record: Record, shared_valkey: Valkey) -> None:
    await claim_one(record, "before")

    shared_valkey.client().script_flush()

    assert (await claim_one(record, "after")).semantic_id.suffix == 1


async def test_everything_acknowledged_survives_a_kill_of_the_server(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey()
    record = await (await connect(server.url)).record("default", FINGERPRINT, SIZES)
    acknowledged: dict[str, SemanticId] = {}

    async def client(number: int) -> None:
        for turn in range(60):
            names = [f"{number}-{turn}-{item}" for item in range(4)]
            with contextlib.suppress(RegistryUnavailable):
                for result in await record.claim([claim(name) for name in names]):
                    acknowledged[result.assignment.item_id] = result.assignment.semantic_id

    clients = asyncio.gather(*map(client, range(8)))
    for _ in range(2):
        await asyncio.sleep(0.1)
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.restart)
    await clients

    found = await record.by_item_ids(list(acknowledged))
    assert len(acknowledged) > 100
    assert [assignment and assignment.semantic_id for assignment in found] == list(acknowledged.values())
    size = (await record.group_sizes([CODES]))[0]
    everyone = await record.by_semantic_ids([SemanticId(CODES, suffix) for suffix in range(size)])
    assert None not in everyone
    assert len({holder.item_id for holder in everyone if holder}) == size == await record.count()


async def test_a_short_restart_is_bridged_by_retrying(start_valkey: Callable[..., Valkey], connect: Connect) -> None:
    server = start_valkey()
    record = await (await connect(server.url, retry_ms=5000)).record("default", FINGERPRINT, SIZES)
    before = await claim_one(record, "item")
    server.kill()

    waiting = asyncio.create_task(claim_one(record, "item"))
    await asyncio.sleep(0.05)
    await asyncio.to_thread(server.restart)

    assert await waiting == before


@pytest.mark.parametrize("url", ["unix:///nonexistent/socket", "redis://127.0.0.1:1/0", "redis://192.0.2.1:6379/0"])
async def test_an_unreachable_server_is_said_so_soon(connect: Connect, url: str) -> None:
    started = time.monotonic()

    with pytest.raises(RegistryUnavailable, match="The registry at"):
        await connect(url, timeout_ms=500, retry_ms=300)

    assert time.monotonic() - started < 3


async def test_a_server_that_went_away_is_unavailable_and_found_again(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey()
    registry = await connect(server.url, retry_ms=100)
    record = await registry.record("default", FINGERPRINT, SIZES)
    assignment = await claim_one(record, "item")
    server.kill()

    for call in (registry.ping, lambda: claim_one(record, "x"), lambda: record.by_item_ids(["item"]), record.count):
        with pytest.raises(RegistryUnavailable, match="cannot be reached"):
            await call()

    server.restart()
    await registry.ping()
    assert await record.by_item_ids(["item"]) == [assignment]


async def test_a_server_that_hangs_is_given_up_in_time(start_valkey: Callable[..., Valkey], connect: Connect) -> None:
    server = start_valkey()
    record = await (await connect(server.url, timeout_ms=400)).record("default", FINGERPRINT, SIZES)
    server.client().client_pause(1500, all=True)

    with pytest.raises(RegistryUnavailable, match="did not answer within 400 ms"):
        await claim_one(record, "item")

    await asyncio.sleep(1.5)
    assert (await claim_one(record, "item")).semantic_id.suffix == 0


async def test_a_full_server_acknowledges_nothing_and_keeps_what_it_has(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey()
    record = await (await connect(server.url)).record("default", FINGERPRINT, SIZES)
    known = await claim_one(record, "known")
    server.client().config_set("maxmemory", "1")

    with pytest.raises(RegistryUnavailable, match="no memory left"):
        await record.claim([claim("known"), claim("new")])

    server.client().config_set("maxmemory", "0")
    assert await record.by_item_ids(["known", "new"]) == [known, None]
    assert await record.group_sizes([CODES]) == [1]


async def test_a_read_only_replica_is_unavailable(start_valkey: Callable[..., Valkey], connect: Connect) -> None:
    server = start_valkey()
    record = await (await connect(server.url)).record("default", FINGERPRINT, SIZES)
    server.client().replicaof("127.0.0.1", 1)

    with pytest.raises(RegistryUnavailable, match="read-only replica"):
        await claim_one(record, "item")


# Durability


async def test_a_server_without_append_only_file_is_refused_unless_memory_is_enough(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey(appendonly="no")

    with pytest.raises(RegistryRefused, match="SID_DURABILITY=memory"):
        await connect(server.url)

    record = await (await connect(server.url, durability="memory")).record("default", FINGERPRINT, SIZES)
    assert (await claim_one(record, "item")).semantic_id.suffix == 0


async def test_a_server_that_never_syncs_is_refused(start_valkey: Callable[..., Valkey], connect: Connect) -> None:
    with pytest.raises(RegistryRefused, match="appendfsync no"):
        await connect(start_valkey(appendfsync="no").url)


async def test_a_server_that_evicts_is_refused(start_valkey: Callable[..., Valkey], connect: Connect) -> None:
    server = start_valkey(maxmemory="100mb", maxmemory_policy="allkeys-lru")

    for durability in ("fsync", "memory"):
        with pytest.raises(RegistryRefused, match="noeviction"):
            await connect(server.url, durability=durability)


async def test_wrong_credentials_and_wrong_urls_are_refused_without_telling_the_password(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey()
    server.client().config_set("requirepass", "right")

    with pytest.raises(RegistryRefused, match="credentials") as refusal:
        await connect(f"unix://:wr0ng@{server.socket}")
    with pytest.raises(RegistryRefused, match="SID_REDIS_URL"):
        await connect("http://127.0.0.1")

    assert "wr0ng" not in str(refusal.value)
    await connect(f"unix://:right@{server.socket}")


@pytest.mark.usefixtures("believed")
async def test_a_weaker_sync_policy_is_waited_for(start_valkey: Callable[..., Valkey], connect: Connect) -> None:
    server = start_valkey(appendfsync="everysec")
    record = await (await connect(server.url)).record("default", FINGERPRINT, SIZES)

    results = await record.claim([claim(f"item {number}") for number in range(20)])
    known = await claim_one(record, "item 3")

    waits = server.client().info("commandstats").get("cmdstat_waitaof", {})
    assert waits["calls"] >= 3  # one at the start, one for each call
    assert known == results[3].assignment
    server.restart()
    assert len(await suffixes_of(record, [f"item {number}" for number in range(20)])) == 20


@pytest.mark.usefixtures("believed")
async def test_reading_what_another_has_just_claimed_waits_for_its_sync(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey(appendfsync="everysec")
    writer, reader = [await (await connect(server.url)).record("default", FINGERPRINT, SIZES) for _ in range(2)]
    await claim_one(writer, "item")
    before = server.client().info("commandstats")["cmdstat_waitaof"]["calls"]

    assert await suffixes_of(reader, ["item"]) == [0]
    assert server.client().info("commandstats")["cmdstat_waitaof"]["calls"] == before + 1
    await asyncio.sleep(1)
    await claim_one(reader, "later")  # all before this second is synced now
    before = server.client().info("commandstats")["cmdstat_waitaof"]["calls"]

    assert await suffixes_of(reader, ["item"]) == [0]
    assert server.client().info("commandstats")["cmdstat_waitaof"]["calls"] == before


@pytest.mark.usefixtures("believed")
async def test_an_unconfirmed_sync_is_not_acknowledged(start_valkey: Callable[..., Valkey], connect: Connect) -> None:
    server = start_valkey(appendfsync="everysec")
    record = await (await connect(server.url, timeout_ms=300)).record("default", FINGERPRINT, SIZES)
    server.client().config_set("appendfsync", "no")

    with pytest.raises(RegistryUnavailable, match="did not confirm"):
        await claim_one(record, "item")


async def test_a_server_that_hides_its_settings_is_asked_to_confirm(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey(appendfsync="always")
    server.client().acl_setuser("semid", enabled=True, passwords=["+secret"], commands=["+@all", "-config"], keys=["*"])
    url = f"unix://semid:secret@{server.socket}"

    record = await (await connect(url)).record("default", FINGERPRINT, SIZES)

    assert (await claim_one(record, "item")).semantic_id.suffix == 0
    assert server.client().info("commandstats")["cmdstat_waitaof"]["calls"] >= 2


@pytest.mark.usefixtures("believed")
async def test_a_server_that_came_back_with_a_weaker_policy_is_waited_for(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey()
    record = await (await connect(server.url)).record("default", FINGERPRINT, SIZES)
    server.client().config_set("appendfsync", "everysec")
    server.client().client_kill_filter(_type="normal", skipme=True)

    result = (await record.claim([claim("item")]))[0]

    assert result.created
    assert server.client().info("commandstats")["cmdstat_waitaof"]["calls"] >= 2


async def test_a_server_that_came_back_weaker_is_not_trusted(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey()
    record = await (await connect(server.url)).record("default", FINGERPRINT, SIZES)
    await claim_one(record, "item")

    server.client().config_set("appendonly", "no")
    server.client().client_kill_filter(_type="normal", skipme=True)

    with pytest.raises(RegistryUnavailable, match="append-only file"):
        await claim_one(record, "other")


async def test_claims_under_way_together_all_wait_once_the_server_came_back_weaker(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey()
    registry = await connect(server.url)
    records = [await registry.record(f"space-{number}", FINGERPRINT, SIZES) for number in range(8)]
    for record in records:
        await claim_one(record, "before")
    server.client().config_set("appendonly", "no")
    server.client().client_kill_filter(_type="normal", skipme=True)

    outcomes = await asyncio.gather(*(claim_one(record, "after") for record in records), return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [RegistryUnavailable] * 8


async def test_a_server_that_does_not_sync_during_a_rewrite_is_waited_for(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey(no_appendfsync_on_rewrite="yes")
    record = await (await connect(server.url)).record("default", FINGERPRINT, SIZES)

    await claim_one(record, "item")

    assert server.client().info("commandstats")["cmdstat_waitaof"]["calls"] >= 2


@pytest.fixture
def old_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server before 7.2 knows no WAITAOF; here the command is sent by a name that ours does not know either."""
    command = primary.Primary.command

    async def without_waitaof(self: primary.Primary, *parts: object) -> object:
        return await command(self, *("NOWAITAOF" if part == "WAITAOF" else part for part in parts))

    monkeypatch.setattr(primary.Primary, "command", without_waitaof)


@pytest.mark.usefixtures("old_server")
async def test_a_server_too_old_to_confirm_is_refused(start_valkey: Callable[..., Valkey], connect: Connect) -> None:
    with pytest.raises(RegistryRefused, match=r"7\.2 or later"):
        await connect(start_valkey(appendfsync="everysec").url)


async def test_an_emptied_registry_issues_nothing(start_valkey: Callable[..., Valkey], connect: Connect) -> None:
    server = start_valkey()
    record = await (await connect(server.url)).record("default", FINGERPRINT, SIZES)
    await record.claim([claim("a")])
    server.client().flushall()

    with pytest.raises(RegistryOlder, match=r"was at revision 1 of epoch \w+; the registry has nothing"):
        await record.claim([claim("b")])

    assert server.client().dbsize() == 0


async def test_a_registry_that_lost_its_tail_issues_nothing(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey()
    record = await (await connect(server.url)).record("default", FINGERPRINT, SIZES)
    await record.claim([claim("a"), claim("b")])
    (meta,) = server.client().keys("*meta")
    server.client().hset(meta, "revision", 1)

    with pytest.raises(
        RegistryOlder, match=r"was at revision 2 of epoch \w+; the registry has revision 1 of epoch \w+"
    ):
        await record.claim([claim("c")])

    with pytest.raises(RegistryOlder):
        await record.by_item_ids(["a"])  # what it still has may not be all
    assert server.client().hget(meta, "revision") == b"1"
