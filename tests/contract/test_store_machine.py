"""Any sequence of writes, crashes, reopenings and compactions: the store agrees with a model of twenty lines."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from penstock.core.clock import SystemClock
from penstock.model.records import Compacted, Record
from penstock.store.errors import RevisionConflict
from penstock.store.log import Log
from penstock.store.memory import MemoryLog
from penstock.store.sqlite import SqliteLog
from penstock.store.store import Delete, Put, Store

T = TypeVar("T")
KEYS = st.sampled_from(["a/1", "a/2", "a/3", "b/1", "b/2/x"])
VALUES = st.binary(max_size=3)
LABELS = st.dictionaries(st.sampled_from(["team", "node"]), st.sampled_from(["x", "y"]), max_size=2)
EXPECTED = st.sampled_from(["any", "absent", "current", "stale"])
OPS = st.lists(
    st.tuples(KEYS, st.one_of(st.none(), VALUES), LABELS, EXPECTED), min_size=1, max_size=3, unique_by=lambda op: op[0]
)
State = dict[str, Record]


class StoreAgreesWithItsModel(RuleBasedStateMachine):
    """`states[r]` is the whole content at revision r."""

    @initialize()
    def begin(self) -> None:
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp())
        self.medium = self.make_medium()
        self.states: list[State] = [{}]
        self.compacted = 0
        self.run(self.open())

    def make_medium(self) -> Log:
        raise NotImplementedError

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    async def open(self) -> None:
        self.store = Store(self.medium, SystemClock(), writers={"": frozenset({"t"})})
        await self.store.open()

    def plan(
        self, state: State, asked: list[tuple[str, bytes | None, dict[str, str], str]]
    ) -> tuple[list[Any], State | None]:
        """The operations to send, and the state they must lead to; None when they must be refused."""
        revision, after, ops, fine = len(self.states), dict(state), [], True
        for key, value, labels, expected in asked:
            before = state.get(key)
            found = before.mod_revision if before else 0
            expect = {"any": None, "absent": 0, "current": found, "stale": found + 1}[expected]
            if value is None:
                expect = expect or None
                ops.append(Delete(key, expect))
                after.pop(key, None)
            else:
                ops.append(Put(key, value, labels=None if before else labels, expect=expect))
                after[key] = Record(
                    key,
                    value,
                    before.labels if before else labels,
                    before.create_revision if before else revision,
                    revision,
                    before.version + 1 if before else 1,
                )
            fine = fine and expect in (None, found)
        return ops, after if fine else None

    @rule(asked=OPS, durable=st.booleans())
    def commit(self, asked: list[Any], durable: bool) -> None:
        ops, after = self.plan(self.states[-1], asked)

        async def attempt() -> None:
            try:
                revision = await self.store.commit(ops, by="t", durable=durable)
            except RevisionConflict:
                assert after is None
                return
            assert after is not None
            if after != self.states[-1]:
                self.states.append(after)
            assert revision == len(self.states) - 1

        self.run(attempt())

    @rule(all_asked=st.lists(OPS, min_size=2, max_size=6))
    def commit_many_at_once(self, all_asked: list[list[Any]]) -> None:
        """Pipelined: each is decided on what the ones before it will have done."""

        async def attempt() -> None:
            attempts, expected = [], []
            for asked in all_asked:
                ops, after = self.plan(self.states[-1], asked)
                attempts.append(asyncio.ensure_future(self.store.commit(ops, by="t")))
                await asyncio.sleep(0)
                if after is not None and after != self.states[-1]:
                    self.states.append(after)
                expected.append(None if after is None else len(self.states) - 1)
            for result, wanted in zip(await asyncio.gather(*attempts, return_exceptions=True), expected, strict=True):
                if wanted is None:
                    assert isinstance(result, RevisionConflict)
                else:
                    assert result == wanted

        self.run(attempt())

    @rule(fraction=st.floats(0, 1))
    def compact(self, fraction: float) -> None:
        self.compacted += int((self.store.revision - self.compacted) * fraction)
        self.run(self.store.compact(self.compacted))

    @rule()
    def reopen(self) -> None:
        async def again() -> None:
            await self.store.close()
            await self.open()

        self.run(again())

    @rule(data=st.data())
    def look_back(self, data: st.DataObject) -> None:
        revision = data.draw(st.integers(0, len(self.states) - 1))

        async def look() -> None:
            try:
                listing = await self.store.at(revision)
            except Compacted:
                assert revision < self.compacted
                return
            assert revision >= self.compacted
            assert {record.key: record for record in listing.records} == self.states[revision]

        self.run(look())

    @rule(data=st.data(), prefix=st.sampled_from(["", "a/", "b/", "b/2/", "a/1"]))
    def watch_from(self, data: st.DataObject, prefix: str) -> None:
        """A reader that listed at some revision and applies what follows arrives at the present."""
        after = data.draw(st.integers(self.compacted, len(self.states) - 1))

        async def follow() -> None:
            seen = {key: record for key, record in self.states[after].items() if key.startswith(prefix)}
            watch = self.store.watch(prefix, after)
            watch.want(self.store.revision)
            last = after
            async with asyncio.timeout(5):
                while last < self.store.revision:
                    batch = await anext(watch)
                    assert batch.revision > last or not batch.changes
                    last = batch.revision
                    for change in batch.changes:
                        seen[change.record.key] = change.record
                        if change.kind == "delete":
                            del seen[change.record.key]
                    assert seen == {k: r for k, r in self.states[last].items() if k.startswith(prefix)}
            await watch.aclose()

        self.run(follow())

    @invariant()
    def shows_the_present(self) -> None:
        if not hasattr(self, "states"):
            return
        now = self.states[-1]
        assert self.store.revision == len(self.states) - 1
        assert list(self.store.list("").records) == [now[key] for key in sorted(now)]
        for prefix in ("a/", "b/", "b/2/", "a/1"):
            for labels in ({}, {"team": "x"}, {"team": "x", "node": "y"}):
                expected = [
                    now[key]
                    for key in sorted(now)
                    if key.startswith(prefix) and labels.items() <= now[key].labels.items()
                ]
                assert list(self.store.list(prefix, labels).records) == expected

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.run(self.store.close())
            self.runner.close()
            shutil.rmtree(self.folder)


class OverMemory(StoreAgreesWithItsModel):
    def make_medium(self) -> Log:
        return MemoryLog()

    @rule()
    def crash(self) -> None:
        """The store is abandoned, not closed."""
        self.run(self.open())


class OverSqlite(StoreAgreesWithItsModel):
    def make_medium(self) -> Log:
        return SqliteLog(self.folder / "store.db")


_settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
OverMemory.TestCase.settings = _settings
OverSqlite.TestCase.settings = _settings
TestOverMemory = OverMemory.TestCase
TestOverSqlite = OverSqlite.TestCase
