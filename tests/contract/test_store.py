"""The store's promises, over every log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from pathlib import Path

import pytest

from penstock.core.clock import SystemClock
from penstock.model.errors import Invalid
from penstock.model.records import Batch, Compacted, ReaderCut
from penstock.store import pending, watches
from penstock.store.errors import (
    AlreadyExists,
    LeaseNotFound,
    RevisionConflict,
    StoreBusy,
    StoreClosed,
    StoreFailed,
    StoreFull,
    WrongWriter,
)
from penstock.store.log import Log
from penstock.store.memory import MemoryLog
from penstock.store.sqlite import SqliteLog
from penstock.store.store import Delete, Put, Store

WRITERS = {"a/": frozenset({"t"}), "b/": frozenset({"t", "other"}), "a/deep/": frozenset({"other"})}

Open = Callable[..., Awaitable[Store]]


@pytest.fixture(params=["memory", "sqlite"])
async def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Open]:
    """Opens stores one after another on the same medium, closing the one before."""
    memory = MemoryLog()
    opened: list[Store] = []

    async def open_(**options: object) -> Store:
        for store in opened:
            await store.close()
        log: Log = memory if request.param == "memory" else SqliteLog(tmp_path / "store.db")
        store = Store(log, SystemClock(), writers=WRITERS, **options)  # type: ignore[arg-type]
        await store.open()
        opened.append(store)
        return store

    yield open_
    for store in opened:
        await store.close()


@pytest.fixture
async def store(open_store: Open) -> Store:
    return await open_store()


async def put(store: Store, key: str, value: bytes = b"v", **options: object) -> int:
    return await store.commit([Put(key, value, **options)], by="t")  # type: ignore[arg-type]


async def take(watch: watches.Watch, count: int) -> list[Batch]:
    async with asyncio.timeout(5):
        return [await anext(watch) for _ in range(count)]


# --- writing ----------------------------------------------------------------------------------------------------------


async def test_revisions_count_commits_from_one(store: Store) -> None:
    assert store.revision == 0
    assert [await put(store, f"a/{n}") for n in range(3)] == [1, 2, 3]
    assert store.revision == 3


async def test_a_record_knows_its_creation_its_last_write_and_its_version(store: Store) -> None:
    await put(store, "a/1", b"one", labels={"team": "x"})
    await put(store, "a/2")
    await put(store, "a/1", b"two")
    record = store.get("a/1")
    assert record is not None
    assert (record.create_revision, record.mod_revision, record.version) == (1, 3, 2)
    assert (record.value, record.labels) == (b"two", {"team": "x"})


async def test_an_empty_value_is_a_value(open_store: Open) -> None:
    store = await open_store()
    await put(store, "a/1", b"")
    with pytest.raises(AlreadyExists):
        await store.create("a/1", b"x", by="t")
    store = await open_store()
    record = store.get("a/1")
    assert record is not None
    assert record.value == b""


async def test_deleting_and_creating_again_begins_a_new_record(store: Store) -> None:
    await put(store, "a/1", labels={"team": "x"})
    await put(store, "a/1")
    await store.delete("a/1", by="t")
    assert store.get("a/1") is None
    await store.create("a/1", b"", by="t", labels={"team": "y"})
    record = store.get("a/1")
    assert record is not None
    assert (record.create_revision, record.version, record.labels) == (4, 1, {"team": "y"})
    assert store.list("a/", {"team": "x"}).records == ()


async def test_a_write_with_an_old_revision_is_a_conflict_and_changes_nothing(store: Store) -> None:
    first = await put(store, "a/1", b"1")
    await store.update("a/1", b"2", expect_revision=first, by="t")
    with pytest.raises(RevisionConflict) as caught:
        await store.update("a/1", b"3", expect_revision=first, by="t")
    assert (caught.value.expected, caught.value.found) == (1, 2)
    with pytest.raises(RevisionConflict):
        await store.delete("a/1", expect_revision=first, by="t")
    with pytest.raises(RevisionConflict):
        await store.update("a/none", b"3", expect_revision=first, by="t")
    assert store.revision == 2


async def test_a_commit_is_all_or_nothing(store: Store) -> None:
    await put(store, "a/1")
    with pytest.raises(AlreadyExists):
        await store.commit([Put("a/2", b""), Put("a/1", b"", expect=0)], by="t")
    with pytest.raises(RevisionConflict):
        await store.commit([Put("a/2", b""), Delete("a/1", expect=9)], by="t")
    assert [record.key for record in store.list("").records] == ["a/1"]
    revision = await store.commit([Put("a/2", b""), Delete("a/1"), Put("b/1", b"")], by="t")
    assert [(record.key, record.mod_revision) for record in store.list("").records] == [("a/2", 2), ("b/1", 2)]
    assert revision == 2


async def test_commits_are_decided_against_what_is_still_on_its_way(store: Store) -> None:
    """Sixteen creators of one key at once: exactly one wins, though none of them is on disk when they are decided."""
    results = await asyncio.gather(*[store.create("a/1", b"%d" % n, by="t") for n in range(16)], return_exceptions=True)
    assert results[0] == 1
    assert all(isinstance(result, AlreadyExists) for result in results[1:])
    deleted, created = await asyncio.gather(store.delete("a/1", by="t"), store.create("a/1", b"again", by="t"))
    assert (deleted, created) == (2, 3)


async def test_a_deletion_of_nothing_makes_no_revision_and_waits_for_what_it_saw(store: Store) -> None:
    assert await store.delete("a/1", by="t") == 0
    creation = asyncio.ensure_future(put(store, "a/1"))
    deletion = asyncio.ensure_future(store.delete("a/1", by="t"))
    again = asyncio.ensure_future(store.delete("a/1", by="t"))
    await asyncio.sleep(0)
    deletion.cancel()  # the third's answer does not hang on the second's caller
    assert (await creation, await again) == (1, 2)
    assert store.revision == 2


async def test_nothing_is_visible_before_it_is_logged(store: Store) -> None:
    writing = asyncio.ensure_future(put(store, "a/1"))
    await asyncio.sleep(0)
    assert (store.statistics().in_flight, store.get("a/1"), store.revision) == (1, None, 0)
    await writing
    assert store.get("a/1") is not None


async def test_rooms_write_only_what_is_theirs(store: Store) -> None:
    with pytest.raises(WrongWriter, match="'x' wrote, t may"):
        await store.commit([Put("a/1", b"")], by="x")
    with pytest.raises(WrongWriter):
        await store.commit([Put("b/1", b""), Put("a/1", b"")], by="other")
    with pytest.raises(WrongWriter, match="nobody may"):
        await store.commit([Put("c/1", b"")], by="t")
    with pytest.raises(WrongWriter, match="other may"):
        await store.commit([Put("a/deep/1", b"")], by="t")
    with pytest.raises(WrongWriter):
        await store.commit([Delete("lease/1")], by="store")
    await store.commit([Put("b/1/below", b"")], by="other")
    assert store.revision == 1


@pytest.mark.parametrize(
    "ops",
    [
        [],
        [Put("a/1", b"")] * 2,
        [Put(f"a/{n}", b"") for n in range(129)],
        [Put("", b"")],
        [Put("/a", b"")],
        [Put("a/\0", b"")],
        [Put("a/\ud800", b"")],
        [Put("a/" + "x" * 511, b"")],
        [Put("a/" + "é" * 256, b"")],
        [Put("a" + "/b" * 9, b"")],
        [Put("a/1", b"x" * (1024 * 1024 + 1))],
        [Put(f"a/{n}", b"x" * 1024 * 1024) for n in range(4)],
        [Put("a/1", "text")],  # type: ignore[arg-type]
        [Put("a/1", b"", labels={str(n): "" for n in range(9)})],
        [Put("a/1", b"", labels={"": "x"})],
        [Put("a/1", b"", labels={"x": "y" * 256})],
        [Delete("a/1", expect=0)],
    ],
)
async def test_what_is_out_of_bounds_is_refused(store: Store, ops: list[Put | Delete]) -> None:
    with pytest.raises(Invalid):
        await store.commit(ops, by="t")
    assert store.revision == 0


async def test_labels_do_not_change_in_a_records_life(store: Store) -> None:
    await put(store, "a/1", labels={"team": "x"})
    await put(store, "a/1", labels={"team": "x"})
    with pytest.raises(Invalid, match="cannot change"):
        await put(store, "a/1", labels={"team": "y"})
    given = {"team": "z"}
    await put(store, "a/2", labels=given)
    given["team"] = "other"
    assert [record.key for record in store.list("a/", {"team": "z"}).records] == ["a/2"]


async def test_a_full_house_is_said_to_the_caller(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "IN_FLIGHT_MAX", 4)
    results = await asyncio.gather(*[put(store, f"a/{n}") for n in range(6)], return_exceptions=True)
    assert [type(result) for result in results[4:]] == [StoreBusy, StoreBusy]
    assert results[:4] == [1, 2, 3, 4]
    assert await put(store, "a/9") == 5


async def test_a_cancelled_commit_does_not_disturb_the_others(store: Store) -> None:
    first, second = asyncio.ensure_future(put(store, "a/1")), asyncio.ensure_future(put(store, "a/2"))
    await asyncio.sleep(0)
    first.cancel()
    assert await second == 2
    assert store.get("a/1") is not None


async def test_a_closed_store_refuses(open_store: Open) -> None:
    store = await open_store()
    watch = store.watch("", 0)
    writing = asyncio.ensure_future(put(store, "a/1"))
    await asyncio.sleep(0)
    await store.close()
    await store.close()
    assert await writing == 1
    with pytest.raises(StoreClosed):
        await put(store, "a/2")
    with pytest.raises(StoreClosed):
        store.watch("", 0)
    assert (await take(watch, 1))[0].revision == 1
    with pytest.raises(StoreClosed):
        await take(watch, 1)


# --- reading ----------------------------------------------------------------------------------------------------------


async def test_lists_are_by_prefix_and_label_and_in_order(store: Store) -> None:
    for key, team in (("a/2", "x"), ("a/1", "y"), ("a/10", "x"), ("b/1", "x"), ("b/1/c", "x")):
        await put(store, key, labels={"team": team, "kind": key[0]})

    def keys(prefix: str, **labels: str) -> list[str]:
        return [record.key for record in store.list(prefix, labels).records]

    assert keys("a/") == ["a/1", "a/10", "a/2"]
    assert keys("a/1") == ["a/1", "a/10"]
    assert keys("") == ["a/1", "a/10", "a/2", "b/1", "b/1/c"]
    assert keys("a/", team="x") == ["a/10", "a/2"]
    assert keys("", team="x") == ["a/10", "a/2", "b/1", "b/1/c"]
    assert keys("", team="x", kind="b") == ["b/1", "b/1/c"]
    assert keys("b/1/", team="x") == ["b/1/c"]
    assert keys("b/1", team="y") == keys("zz/") == keys("a/", none="x") == []
    assert store.list("a/").revision == 5


async def test_everything_is_there_after_reopening(open_store: Open) -> None:
    store = await open_store()
    for n in range(50):
        await put(store, f"a/{n % 7}", b"%d" % n, labels={"n": str(n % 7)})
    await store.delete("a/3", by="t")
    before = store.list("")
    store = await open_store()
    assert store.list("") == before
    assert store.list("a/", {"n": "5"}).records[0].version == 7
    assert await put(store, "a/3") == before.revision + 1


async def test_a_state_of_the_past_can_be_asked(open_store: Open) -> None:
    store = await open_store()
    states = {0: store.list("")}
    for n in range(40):
        if n % 5 == 4:
            await store.delete(f"a/{(n - 1) % 6}", by="t")
        else:
            await put(store, f"a/{n % 6}", b"%d" % n)
        states[store.revision] = store.list("")
    await store.compact(20)
    store = await open_store()
    for revision in range(20, store.revision + 1):
        assert await store.at(revision) == states[revision]
    last = states[25].records[-1]
    assert (await store.at(25, last.key)).records == (last,)
    for revision in (-1, 19, store.revision + 1):
        with pytest.raises(Compacted):
            await store.at(revision)
    assert [batch.revision for batch in await store.history("a/1", 20)]
    with pytest.raises(Compacted):
        await store.history("", 19)


# --- watching ---------------------------------------------------------------------------------------------------------


async def test_a_watch_sees_whole_revisions_of_its_prefix_only(store: Store) -> None:
    watch, stem = store.watch("a/", 0), store.watch("a/1", 0)
    await put(store, "b/1")
    await store.commit([Put("a/1", b"x", labels={"team": "x"}), Put("b/2", b""), Put("a/2", b"")], by="t")
    await store.commit([Delete("b/2"), Delete("a/1")], by="t")
    first, second = await take(watch, 2)
    assert (first.revision, [change.record.key for change in first.changes]) == (2, ["a/1", "a/2"])
    (gone,) = second.changes
    assert (gone.kind, gone.record.key, gone.record.mod_revision) == ("delete", "a/1", 3)
    assert (gone.record.value, gone.record.version, gone.record.labels) == (b"", 0, {"team": "x"})
    assert [[change.record.key for change in batch.changes] for batch in await take(stem, 2)] == [["a/1"], ["a/1"]]
    await watch.aclose()
    await stem.aclose()


@pytest.mark.parametrize("tail_max", [1, 5, 8192])
async def test_a_watch_resumes_from_any_kept_revision(
    open_store: Open, monkeypatch: pytest.MonkeyPatch, tail_max: int
) -> None:
    """Whether it finds the rest in memory or in the log, nothing is missed and nothing comes twice."""
    monkeypatch.setattr(watches, "TAIL_MAX", tail_max)
    monkeypatch.setattr(watches, "CATCH_UP_COUNT", 3)
    store = await open_store()
    for n in range(30):
        await put(store, f"{'ab'[n % 2]}/{n}")
    if tail_max == 1:
        store = await open_store()
    for after in range(31):
        watch = store.watch("a/", after)
        expected = [revision for revision in range(after + 1, 31) if revision % 2]
        assert [batch.revision for batch in await take_matching(watch, len(expected))] == expected
        await watch.aclose()


async def take_matching(watch: watches.Watch, count: int) -> list[Batch]:
    found: list[Batch] = []
    async with asyncio.timeout(5):
        while len(found) < count:
            batch = await anext(watch)
            if batch.changes:
                found.append(batch)
    return found


async def test_a_watch_that_catches_up_while_others_write_misses_nothing(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watches, "TAIL_MAX", 4)
    monkeypatch.setattr(watches, "CATCH_UP_COUNT", 2)
    store = await open_store()
    for n in range(40):
        await put(store, f"a/{n}")

    async def write() -> None:
        for n in range(60):
            await put(store, f"a/more{n}")
            await asyncio.sleep(0)

    writing = asyncio.ensure_future(write())
    watch = store.watch("", 0)
    assert [batch.revision for batch in await take(watch, 100)] == list(range(1, 101))
    await writing
    await watch.aclose()


async def test_a_compacted_revision_ends_a_watch(store: Store) -> None:
    for n in range(10):
        await put(store, f"a/{n}")
    await store.compact(5)
    for after in (0, 4, 11):
        watch = store.watch("", after)
        with pytest.raises(Compacted) as caught:
            await take(watch, 1)
        assert (caught.value.compacted, caught.value.revision) == (5, 10)
    assert (await take(store.watch("", 5), 1))[0].revision == 6
    with pytest.raises(Invalid):
        await store.compact(11)


async def test_a_slow_reader_is_cut_after_what_was_queued_and_can_resume(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watches, "QUEUE_MAX", 8)
    slow, quick = store.watch("", 0), store.watch("", 0)
    for n in range(20):
        await put(store, f"a/{n}")
        assert (await take(quick, 1))[0].revision == n + 1
    assert [batch.revision for batch in await take(slow, 8)] == list(range(1, 9))
    with pytest.raises(ReaderCut):
        await take(slow, 1)
    resumed = store.watch("", slow.revision)
    assert [batch.revision for batch in await take(resumed, 12)] == list(range(9, 21))
    for watch in (slow, quick, resumed):
        await watch.aclose()
    assert store.statistics().watches == 0


async def test_a_slow_reader_is_cut_by_bytes_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "QUEUE_BYTES_MAX", 10_000)
    slow = store.watch("", 0)
    for n in range(4):
        await put(store, f"a/{n}", b"x" * 4_000)
    await take(slow, 2)
    with pytest.raises(ReaderCut):
        await take(slow, 1)


async def test_a_watch_can_ask_to_be_told_of_a_revision_that_does_not_concern_it(store: Store) -> None:
    await put(store, "b/1")
    watch = store.watch("a/", 0)
    watch.want(1)
    assert await take(watch, 1) == [Batch(1, ())]
    watch.want(3)
    await put(store, "b/2")
    await put(store, "a/1")
    assert [(batch.revision, len(batch.changes)) for batch in await take(watch, 2)] == [(3, 1), (3, 0)]
    await watch.aclose()


# --- leases -----------------------------------------------------------------------------------------------------------


async def test_an_expired_lease_takes_its_records_with_it_in_one_revision(store: Store) -> None:
    lease = await store.grant(0.05)
    await store.commit([Put("a/1", b"", lease=lease), Put("a/2", b"", lease=lease)], by="t")
    await put(store, "a/2", b"kept under its lease")
    await put(store, "a/1", b"let go", lease=0)
    await put(store, "a/3")
    watch = store.watch("", store.revision)
    (gone,) = await take(watch, 1)
    assert [(change.kind, change.record.key) for change in gone.changes] == [
        ("delete", "a/2"),
        ("delete", f"lease/{lease}"),
    ]
    assert [record.key for record in store.list("").records] == ["a/1", "a/3"]
    for use in (put(store, "a/4", lease=lease), store.renew(lease), store.revoke(lease)):
        with pytest.raises(LeaseNotFound):
            await use
    await watch.aclose()


async def test_a_renewed_lease_lives_on(store: Store) -> None:
    lease = await store.grant(0.2)
    await put(store, "a/1", lease=lease)
    for _ in range(6):
        await asyncio.sleep(0.05)
        await store.renew(lease)
    assert store.get("a/1") is not None
    await store.revoke(lease)
    assert store.get("a/1") is None
    assert store.statistics().leases == 0


async def test_leases_survive_reopening_with_their_whole_time(open_store: Open) -> None:
    store = await open_store()
    lease = await store.grant(0.15)
    await put(store, "a/1", lease=lease)
    await asyncio.sleep(0.1)
    store = await open_store()
    await asyncio.sleep(0.08)
    assert store.get("a/1") is not None, "a lease may end late, never early"
    await take(store.watch("", store.revision), 1)
    assert store.get("a/1") is None


@pytest.mark.parametrize("ttl_s", [0, -1, float("nan"), float("inf"), 1e9])
async def test_absurd_leases_are_refused(store: Store, ttl_s: float) -> None:
    with pytest.raises(Invalid):
        await store.grant(ttl_s)


# --- history in bounds ------------------------------------------------------------------------------------------------


async def test_history_is_compacted_in_the_background(open_store: Open) -> None:
    store = await open_store(keep_revisions=100)
    for n in range(1000):
        await put(store, f"a/{n % 10}", b"%d" % n)
    assert store.statistics().compacted >= 800
    before = store.list("")
    assert (await store.at(950)).revision == 950
    store = await open_store()
    assert store.list("") == before


async def test_a_compaction_in_many_steps_keeps_every_later_state(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.store.sqlite.FOLD_REVISIONS", 3)
    monkeypatch.setattr("penstock.store.sqlite.GROUP_MAX", 2)
    store = await open_store()
    await asyncio.gather(*[put(store, f"a/{n % 5}", b"%d" % n) for n in range(50)])
    states = {revision: await store.at(revision) for revision in (33, 34, 50)}
    compacting = asyncio.ensure_future(store.compact(33))
    await asyncio.gather(*[put(store, f"b/{n}") for n in range(20)])
    await compacting
    store = await open_store()
    for revision, state in states.items():
        assert await store.at(revision) == state
    with pytest.raises(Compacted):
        await store.at(32)
    revisions = [batch.revision for batch in await take(store.watch("", 33), 37)]
    assert all(later == earlier + 1 for earlier, later in pairwise(revisions))


# --- a log that fails -------------------------------------------------------------------------------------------------


async def test_a_full_disk_refuses_what_was_pending_and_the_store_goes_on() -> None:
    log = MemoryLog()
    store = Store(log, SystemClock(), writers=WRITERS)
    await store.open()
    lease = await store.grant(60)
    await put(store, "a/1", b"kept")
    log.fail_next = StoreFull("no room")
    results = await asyncio.gather(
        put(store, "a/1", b"lost"),
        put(store, "a/2", lease=lease),
        store.delete("a/9", by="t"),
        store.revoke(lease),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [StoreFull] * 4
    assert store.get("a/1").value == b"kept"  # type: ignore[union-attr]
    await store.renew(lease)
    assert await put(store, "a/2", lease=lease, expect=0) == 3
    await store.close()


async def test_after_any_other_failure_the_store_only_reads() -> None:
    log = MemoryLog()
    store = Store(log, SystemClock(), writers=WRITERS)
    await store.open()
    await put(store, "a/1")
    log.fail_next = OSError("input/output error")
    with pytest.raises(StoreFailed):
        await put(store, "a/2")
    with pytest.raises(StoreFailed, match="restart"):
        await put(store, "a/3")
    assert [record.key for record in store.list("").records] == ["a/1"]
    await store.close()


async def test_a_lease_whose_end_could_not_be_written_ends_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.store.leases.RETRY_S", 0.05)
    log = MemoryLog()
    store = Store(log, SystemClock(), writers=WRITERS)
    await store.open()
    await put(store, "a/1", lease=await store.grant(0.05))
    log.fail_next = StoreFull("no room")
    await take(store.watch("", store.revision), 1)
    assert store.get("a/1") is None
    await store.close()
