"""Views, over a store in the same process and over one behind a socket."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from penstock.core.clock import SystemClock
from penstock.core.crew import Crew
from penstock.core.deadlines import DeadlinePassed
from penstock.feed import frames
from penstock.feed.local import LocalReports, LocalSource
from penstock.feed.remote import RemoteSource
from penstock.feed.server import FeedServer
from penstock.feed.source import Source
from penstock.feed.view import View
from penstock.model.errors import Forbidden, Unavailable
from penstock.model.records import Compacted
from penstock.store import watches
from penstock.store.errors import StoreFull
from penstock.store.memory import MemoryLog
from penstock.store.store import Delete, Put, Store

RNG = random.Random(1)
ANYTHING = {"": frozenset({"t"})}


class Served:
    """A store on a medium, and a feed server in front of it that can go away and come back."""

    def __init__(self, folder: Path) -> None:
        self.log = MemoryLog()
        self.path = folder / "feed.sock"
        self.crew: Crew | None = None
        self.server: FeedServer | None = None

    async def open(self) -> None:
        self.store = Store(self.log, SystemClock(), writers=ANYTHING)
        await self.store.open()

    async def serve(self, **options: float) -> None:
        self.crew = await Crew("feed").__aenter__()
        self.server = FeedServer(LocalSource(self.store), self.path, prefixes=["a/", "b/"], **options)
        await self.server.serve(self.crew)

    async def stop(self) -> None:
        if self.crew is not None:
            await self.crew.__aexit__(None, None, None)
            self.crew = None

    async def put(self, key: str, value: str, **labels: str) -> int:
        return await self.store.commit([Put(key, value.encode(), labels=labels or None)], by="t")

    def remote(self) -> RemoteSource:
        return RemoteSource(self.path, rng=RNG)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    served = Served(tmp_path)
    await served.open()
    await served.serve()
    yield served
    await served.stop()
    await served.store.close()


@pytest.fixture(params=["local", "remote"])
def source(request: pytest.FixtureRequest, served: Served) -> Source:
    return LocalSource(served.store) if request.param == "local" else served.remote()


@pytest.fixture
async def crew() -> AsyncIterator[Crew]:
    async with Crew("readers") as crew:
        yield crew


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not happened():  # noqa: ASYNC110 (the world is looked at, not told)
            await asyncio.sleep(0.002)


async def view_of(source: Source, crew: Crew, prefix: str = "a/") -> View[str]:
    view = View(source, prefix, bytes.decode)
    await view.start(crew)
    return view


# --- a view, whatever its source --------------------------------------------------------------------------------------


async def test_a_view_shows_what_was_there_and_what_comes(served: Served, source: Source, crew: Crew) -> None:
    await served.put("a/1", "one", team="x")
    await served.put("b/1", "not mine")
    view = await view_of(source, crew)
    assert (view.items(), view.revision) == ([("1", "one")], 2)
    revision = await served.put("a/2", "", team="x")
    await view.wait_revision(revision, within_s=5)
    assert view.get("2") == ""
    assert view.by("team", "x") == ["one", ""]
    assert (view.revision_of("2"), view.revision_of("3")) == (3, 0)
    await served.store.delete("a/1", by="t")
    assert await view.wait_for("1", lambda value: value is None, within_s=5) is None
    assert (view.ids(), view.by("team", "x"), view.by("team", "y"), len(view)) == (["2"], [""], [], 1)
    assert view.connected


async def test_waiting_for_a_revision_that_changed_nothing_here(served: Served, source: Source, crew: Crew) -> None:
    view = await view_of(source, crew)
    await served.put("a/1", "one")
    revision = await served.put("b/1", "x")
    await view.wait_revision(revision, within_s=5)
    early, late = [asyncio.ensure_future(view.wait_revision(revision + n, within_s=5)) for n in (1, 3)]
    await asyncio.sleep(0.02)
    await served.put("b/2", "x")
    await early
    assert not late.done()
    await served.put("b/3", "x")
    await served.put("b/4", "x")
    await late


async def test_a_wait_is_bounded_and_named(source: Source, crew: Crew) -> None:
    view = await view_of(source, crew)
    with pytest.raises(DeadlinePassed, match="revision 99 of a/"):
        await view.wait_revision(99, within_s=0.02)
    with pytest.raises(DeadlinePassed, match="a change of a/1"):
        await view.wait_for("1", lambda value: value is not None, within_s=0.02)


async def test_a_whole_revision_is_visible_when_the_first_callback_runs(
    served: Served, source: Source, crew: Crew
) -> None:
    view = View(source, "a/", bytes.decode)
    seen: list[tuple[str, str | None, list[str]]] = []
    stop = view.subscribe(lambda id_, value: seen.append((id_, value, view.ids())))
    await served.put("a/0", "before")
    await view.start(crew)
    revision = await served.store.commit([Put("a/1", b"x"), Delete("a/0"), Put("a/2", b"y")], by="t")
    await view.wait_revision(revision, within_s=5)
    after = ["1", "2"]
    assert seen == [("0", "before", ["0"]), ("1", "x", after), ("0", None, after), ("2", "y", after)]
    stop()
    await view.wait_revision(await served.put("a/3", "z"), within_s=5)
    assert len(seen) == 4


async def test_a_short_lived_value_is_not_missed_by_who_waits_for_it(
    served: Served, source: Source, crew: Crew
) -> None:
    view = await view_of(source, crew)
    waiting = asyncio.ensure_future(view.wait_for("1", lambda value: value == "brief", within_s=5))
    wrong = asyncio.ensure_future(view.wait_for("1", lambda value: len(value) > 9, within_s=5))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    await asyncio.gather(served.put("a/1", "brief"), served.put("a/1", "lasting"))
    assert await waiting == "brief"
    with pytest.raises(TypeError):
        await wrong
    assert view.connected


async def test_a_view_that_is_cut_resumes(
    served: Served, source: Source, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watches, "QUEUE_MAX", 4)
    view = await view_of(source, crew)
    seen: list[str | None] = []
    view.subscribe(lambda _, value: seen.append(value))
    results = await asyncio.gather(*[served.put(f"a/{n % 3}", f"{n}") for n in range(100)])
    await view.wait_revision(results[-1], within_s=5)
    assert seen == [f"{n}" for n in range(100)]


async def test_who_waits_is_told_when_the_view_ends(source: Source) -> None:
    async with Crew("readers") as crew:
        view = await view_of(source, crew)
        waits = [
            asyncio.ensure_future(view.wait_revision(9, within_s=5)),
            asyncio.ensure_future(view.wait_for("1", bool, within_s=5)),
        ]
        await asyncio.sleep(0)
    for wait in waits:
        with pytest.raises(Unavailable, match="view has ended"):
            await wait


async def test_an_undecodable_record_ends_the_view_and_is_named(served: Served, source: Source) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        async with Crew("readers") as crew:
            await view_of(source, crew)
            await served.store.commit([Put("a/1", b"\xff")], by="t")
            await asyncio.sleep(5)
    (error,) = caught.value.exceptions
    assert isinstance(error, UnicodeDecodeError)
    assert "while decoding a/1 at revision 1" in error.__notes__


# --- over a socket ----------------------------------------------------------------------------------------------------


async def test_a_restarted_server_is_found_again_and_nothing_is_missed(served: Served, crew: Crew) -> None:
    await served.put("a/1", "one")
    view = await view_of(served.remote(), crew)
    seen: list[tuple[str, str | None]] = []
    view.subscribe(lambda id_, value: seen.append((id_, value)))
    await until(lambda: view.connected)
    await served.stop()
    await until(lambda: not view.connected)
    assert view.items() == [("1", "one")], "the last state is kept while the other side is away"
    await served.put("a/2", "two")
    waiting = asyncio.ensure_future(view.wait_revision(await served.put("b/1", "x"), within_s=5))
    await served.store.close()
    await served.open()
    await served.serve()
    await waiting
    assert seen == [("2", "two")], "resumed, not listed again"
    assert view.connected


async def test_after_a_compaction_it_lists_again_and_tells_the_difference(served: Served, crew: Crew) -> None:
    for id_ in ("same", "changed", "gone"):
        await served.put(f"a/{id_}", id_, team="x")
    view = await view_of(served.remote(), crew)
    seen: list[tuple[str, str | None]] = []
    view.subscribe(lambda id_, value: seen.append((id_, value)))
    await served.stop()
    await served.store.delete("a/gone", by="t")
    await served.store.delete("a/changed", by="t")
    await served.put("a/changed", "anew", team="y")
    await served.put("a/new", "new")
    await served.store.compact(served.store.revision)
    await served.serve()
    await view.wait_revision(served.store.revision, within_s=5)
    assert sorted(seen, key=str) == [("changed", "anew"), ("gone", None), ("new", "new")]
    assert (view.by("team", "x"), view.by("team", "y")) == (["same"], ["anew"])


async def test_a_store_that_was_replaced_is_listed_again(served: Served, crew: Crew) -> None:
    for n in range(5):
        await served.put(f"a/{n}", "old")
    view = await view_of(served.remote(), crew)
    await served.stop()
    await served.store.close()
    served.log = MemoryLog()
    await served.open()
    await served.put("a/new", "new")
    await served.serve()
    await view.wait_for("new", bool, within_s=5)
    assert (view.items(), view.revision) == ([("new", "new")], 1)


async def test_a_reader_that_takes_nothing_is_cut_and_the_others_go_on(served: Served, crew: Crew) -> None:
    await served.stop()
    await served.serve(send_s=0.2)
    view = await view_of(served.remote(), crew)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.connect(str(served.path))
        deaf.sendall(frames.frame(frames.Watch("a/", 0)))
        for n in range(60):
            await served.put("a/1", f"{n}" * 50_000)
        await view.wait_revision(served.store.revision, within_s=5)
        assert served.server is not None
        server = served.server
        await until(lambda: server.cut == 1)
    await until(lambda: served.store.statistics().watches == 1)


async def test_a_large_listing_comes_in_pages(served: Served, crew: Crew) -> None:
    for n in range(40):
        await served.put(f"a/{n:02}", f"{n % 10}" * 100_000)
    view = await view_of(served.remote(), crew)
    assert view.ids() == [f"{n:02}" for n in range(40)]
    assert view.get("39") == "9" * 100_000


async def test_only_the_given_prefixes_are_served(served: Served) -> None:
    await served.put("secret/1", "x")
    with pytest.raises(Forbidden):
        await served.remote().list("secret/")
    for prefix in ("", "a", "secret/"):
        with pytest.raises(Forbidden):
            await anext(served.remote().watch(prefix, 0))


async def test_nonsense_ends_its_own_connection_only(served: Served, crew: Crew) -> None:
    view = await view_of(served.remote(), crew)
    huge, empty = b"\xff\xff\xff\xff", b"\0\0\0\0"
    wrong = frames.frame(frames.List("a/"))[:-1] + b"\xc1"
    for sent in (huge, empty, wrong, b"GET / HTTP/1.1\r\n\r\n", frames.frame(frames.Want(1))):
        reader, writer = await asyncio.open_unix_connection(served.path)
        writer.write(sent)
        async with asyncio.timeout(5):
            await reader.read()
        writer.close()
    await view.wait_revision(await served.put("a/1", "one"), within_s=5)


async def test_connections_are_bounded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.feed.server.READERS_MAX", 2)
    watching = [served.remote().watch("a/", 0) for _ in range(3)]
    await served.put("a/1", "x")
    assert [(await anext(watch)).revision for watch in watching[:2]] == [1, 1]
    third = asyncio.ensure_future(anext(watching[2]))
    await asyncio.sleep(0.1)
    assert not third.done()
    await watching[0].aclose()
    async with asyncio.timeout(5):
        assert (await third).revision == 1
    for watch in watching:
        await watch.aclose()


async def test_a_long_path_is_no_obstacle(served: Served, crew: Crew, tmp_path: Path) -> None:
    await served.stop()
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    served.path = folder / "feed.sock"
    await served.serve()
    await served.put("a/1", "one")
    assert (await view_of(served.remote(), crew)).items() == [("1", "one")]


async def test_a_view_whose_source_never_answers_says_what_it_waited_for(tmp_path: Path, crew: Crew) -> None:
    view = View(RemoteSource(tmp_path / "none.sock", rng=RNG), "a/", bytes.decode)
    with pytest.raises(DeadlinePassed, match="first listing of a/"):
        await view.start(crew, within_s=0.1)


async def test_a_remote_watch_says_compacted(served: Served) -> None:
    await served.put("a/1", "x")
    await served.put("a/2", "x")
    await served.store.compact(1)
    with pytest.raises(Compacted) as caught:
        await anext(served.remote().watch("a/", 0))
    assert (caught.value.asked, caught.value.compacted, caught.value.revision) == (0, 1, 2)


# --- facts upward -----------------------------------------------------------------------------------------------------


async def test_facts_arrive_in_order_and_wait_for_room(served: Served) -> None:
    reports = LocalReports(served.store, by="t", rng=RNG)
    served.log.fail_next = StoreFull("no room")
    await reports.put("a/1", b"one", {"team": "x"})
    record = served.store.get("a/1")
    assert record is not None
    assert (record.value, record.labels) == (b"one", {"team": "x"})
    await asyncio.gather(*[reports.put("a/1", b"%d" % n) for n in range(9)])
    assert served.store.get("a/1").value == b"8"  # type: ignore[union-attr]
    await reports.remove("a/1")
    await reports.remove("a/1")
    assert served.store.get("a/1") is None


async def test_a_fact_that_was_overtaken_is_never_written(served: Served) -> None:
    reports = LocalReports(served.store, by="t", rng=RNG)
    watch = served.store.watch("a/", 0)
    served.log.fail_next = StoreFull("no room")
    old = asyncio.ensure_future(reports.put("a/1", b"old"))
    await asyncio.sleep(0.01)
    await reports.put("a/1", b"new")
    await old
    assert served.store.get("a/1").value == b"new"  # type: ignore[union-attr]
    assert served.store.revision == 1
    await watch.aclose()


async def test_a_closed_store_is_not_waited_for(served: Served) -> None:
    reports = LocalReports(served.store, by="t", rng=RNG)
    await served.store.close()
    with pytest.raises(Unavailable):
        await reports.put("a/1", b"x")


async def test_records_that_nothing_overtakes_are_one_revision_wait_for_room_and_may_be_added_twice(
    served: Served,
) -> None:
    reports = LocalReports(served.store, by="t", rng=RNG)
    records = [(f"a/{n}", b"%d" % n, {"team": f"t{n}"}) for n in range(3)]
    served.log.fail_next = StoreFull("no room")
    await reports.add(records)
    assert served.store.revision == 1
    await reports.add(records)
    found = served.store.list("a/").records
    assert [(record.key, record.value, record.labels) for record in found] == records
    await served.store.close()
    with pytest.raises(Unavailable):
        await reports.add(records)
