from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.crew import Crew
from penstock.core.deadlines import DeadlinePassed
from penstock.core.ledger import Entry, Ledger, LedgerClosed, NoUndo, State, UnwindFailed
from penstock.sim.loop import run

from .virtual import virtual


class World:
    """Objects that exist, the book on "disk", and faults. Making and removing takes a second each."""

    def __init__(self) -> None:
        self.exists: set[str] = set()
        self.book: list[Entry] = []
        self.undone: list[str] = []
        self.fail_make: dict[str, Exception] = {}
        self.fail_undo: dict[str, Exception] = {}
        self.book_full_for: set[tuple[str, State]] = set()

    def append(self, entry: Entry) -> None:
        if (entry.label, entry.state) in self.book_full_for:
            raise OSError(28, "No space left on device")
        if entry.state is State.RELEASED:
            assert entry.label not in self.exists, "released in the book before it was gone"
        self.book.append(entry)

    def make(self, label: str) -> Callable[[], Awaitable[str]]:
        async def acquire() -> str:
            assert self.states(label)[-1:] == ["intent"], "made before its intent was written"
            await asyncio.sleep(0.5)
            self.exists.add(label)
            await asyncio.sleep(0.5)
            if label in self.fail_make:
                raise self.fail_make[label]
            return f"the {label}"

        return acquire

    def remove(self, label: str) -> Callable[[], Awaitable[None]]:
        async def undo() -> None:
            await asyncio.sleep(1)
            if label in self.fail_undo:
                raise self.fail_undo[label]
            self.exists.discard(label)  # absent is success
            self.undone.append(label)

        return undo

    async def take(self, ledger: Ledger, label: str) -> str:
        return await ledger.take(label, self.make(label), self.remove(label))

    def states(self, label: str) -> list[str]:
        return [entry.state.value for entry in self.book if entry.label == label]


LABELS = ("slot 14", "cgroup sb-1", "mount sb-1")


async def taken(world: World, *, undo_s: float = 10) -> Ledger:
    ledger = Ledger("sb-1", world, undo_s=undo_s)
    for label in LABELS:
        assert await world.take(ledger, label) == f"the {label}"
    return ledger


@virtual
async def test_everything_taken_is_undone_in_reverse_and_written_as_released() -> None:
    world = World()
    ledger = await taken(world)
    assert world.exists == set(LABELS)
    await ledger.unwind(60)
    assert world.exists == set()
    assert world.undone == list(reversed(LABELS))
    for label in LABELS:
        assert world.states(label) == ["intent", "held", "released"]
    await ledger.unwind(60)  # again is fine
    with pytest.raises(LedgerClosed):
        await world.take(ledger, "late one")


@virtual
async def test_a_failed_acquire_is_undone_at_once_for_it_may_have_made_half_of_it() -> None:
    world = World()
    world.fail_make["mount sb-1"] = OSError(22, "Invalid argument")
    ledger = Ledger("sb-1", world)
    await world.take(ledger, "slot 14")
    with pytest.raises(OSError, match="Invalid argument"):
        await world.take(ledger, "mount sb-1")
    assert world.exists == {"slot 14"}
    assert world.states("mount sb-1") == ["intent", "released"]
    assert ledger.labels() == ("slot 14",)


@virtual
async def test_a_failed_acquire_whose_undo_fails_too_stays_and_loses_neither_error() -> None:
    world = World()
    world.fail_make["cgroup sb-1"] = OSError("acquire")
    world.fail_undo["cgroup sb-1"] = OSError("undo")
    ledger = Ledger("sb-1", world)
    await world.take(ledger, "slot 14")
    with pytest.raises(OSError, match="acquire") as caught:
        await world.take(ledger, "cgroup sb-1")
    assert "undoing cgroup sb-1 failed too: OSError('undo')" in caught.value.__notes__
    with pytest.raises(UnwindFailed) as failed:
        await ledger.unwind(60)
    assert failed.value.pinned == ("cgroup sb-1", "slot 14")
    world.fail_undo.clear()
    await ledger.unwind(60)
    assert world.exists == set()


@virtual
async def test_what_is_taken_now_is_in_the_book_before_it_exists_and_undone_like_the_rest() -> None:
    world = World()
    ledger = await taken(world)

    def make_now() -> str:
        assert world.states("folder") == ["intent"], "made before its intent was written"
        world.exists.add("folder")
        return "the folder"

    assert await ledger.take_now("folder", make_now, world.remove("folder")) == "the folder"
    assert ledger.labels() == (*LABELS, "folder")
    await ledger.unwind(60)
    assert world.undone == ["folder", *reversed(LABELS)]
    assert world.states("folder") == ["intent", "held", "released"]


@virtual
async def test_what_fails_now_is_undone_at_once() -> None:
    world = World()
    ledger = await taken(world)

    def make_half() -> str:
        world.exists.add("folder")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        await ledger.take_now("folder", make_half, world.remove("folder"))
    assert world.exists == set(LABELS)
    assert ledger.labels() == LABELS
    world.book_full_for.add(("folder", State.HELD))
    with pytest.raises(OSError, match="No space"):
        await ledger.take_now("folder", lambda: world.exists.add("folder"), world.remove("folder"))
    assert world.exists == set(LABELS)


@virtual
async def test_a_full_disk_before_the_intent_takes_nothing() -> None:
    world = World()
    world.book_full_for.add(("slot 14", State.INTENT))
    ledger = Ledger("sb-1", world)
    with pytest.raises(OSError, match="No space"):
        await world.take(ledger, "slot 14")
    assert world.exists == set()
    assert ledger.labels() == ()


@virtual
async def test_a_full_disk_after_the_acquire_gives_it_back() -> None:
    world = World()
    world.book_full_for.add(("slot 14", State.HELD))
    ledger = Ledger("sb-1", world)
    with pytest.raises(OSError, match="No space"):
        await world.take(ledger, "slot 14")
    assert world.exists == set()
    assert world.states("slot 14") == ["intent", "released"]


@virtual
async def test_a_full_disk_at_the_release_pins_nothing_and_is_told() -> None:
    world = World()
    ledger = await taken(world)
    world.book_full_for |= {("mount sb-1", State.RELEASED), ("slot 14", State.RELEASED)}
    with pytest.raises(UnwindFailed) as caught:
        await ledger.unwind(60)
    assert world.exists == set()
    assert caught.value.pinned == ()
    assert [error.__notes__[0] for error in caught.value.exceptions] == [
        "undoing mount sb-1 of sb-1",
        "undoing slot 14 of sb-1",
    ]


@pytest.mark.parametrize("cancel_at", [0.2, 0.5, 0.7, 1.0])
@virtual
async def test_a_take_cancelled_anywhere_is_finished_then_undone(cancel_at: float) -> None:
    world = World()
    ledger = Ledger("sb-1", world)
    async with Crew("c") as crew:
        task = crew.spawn(world.take(ledger, "slot 14"), name="take")
        asyncio.get_running_loop().call_later(cancel_at, task.cancel)
        asyncio.get_running_loop().call_later(cancel_at + 0.9, task.cancel)  # and again, during the undo
        await asyncio.sleep(5)
        assert task.cancelled()
    assert world.exists == set()
    assert world.states("slot 14") == ["intent", "released"]
    assert ledger.labels() == ()


@virtual
async def test_a_second_cancel_during_undo_neither_stops_it_nor_is_lost() -> None:
    world = World()
    ledger = await taken(world)
    async with Crew("c") as crew:
        task = crew.spawn(ledger.unwind(60), name="unwind")
        for _ in range(4):
            await asyncio.sleep(0.4)
            task.cancel()
        await asyncio.sleep(10)
        assert task.cancelled()
    assert world.exists == set()
    assert ledger.labels() == ()


@virtual
async def test_a_failed_undo_pins_everything_beneath_it() -> None:
    world = World()
    ledger = await taken(world)
    world.fail_undo["cgroup sb-1"] = OSError(16, "Device or resource busy")
    with pytest.raises(UnwindFailed) as caught:
        await ledger.unwind(60)
    assert caught.value.pinned == ledger.pinned == ("cgroup sb-1", "slot 14")
    assert world.exists == {"cgroup sb-1", "slot 14"}, "the slot must not be free while its cgroup lives"
    (error,) = caught.value.exceptions
    assert error.__notes__ == ["undoing cgroup sb-1 of sb-1"]
    assert world.states("slot 14") == ["intent", "held"]
    world.fail_undo.clear()
    await ledger.unwind(60)
    assert world.exists == set()
    assert ledger.pinned == ()


@virtual
async def test_two_failing_undos_are_both_told_one_unwind_after_the_other() -> None:
    world = World()
    ledger = await taken(world)
    world.fail_undo = {"mount sb-1": OSError("first"), "slot 14": OSError("second")}
    told: list[str] = []
    for _ in range(3):
        try:
            await ledger.unwind(60)
        except UnwindFailed as group:
            told += [str(error) for error in group.exceptions]
            world.fail_undo.pop(group.pinned[0])
    assert told == ["first", "second"]
    assert world.exists == set()


@virtual
async def test_an_undo_that_hangs_is_bounded_and_pins() -> None:
    world = World()
    ledger = Ledger("sb-1", world, undo_s=5)
    await world.take(ledger, "slot 14")

    async def hang() -> None:
        await asyncio.Event().wait()

    await ledger.take("mount x", world.make("mount x"), hang)
    began = asyncio.get_running_loop().time()
    with pytest.raises(UnwindFailed) as caught:
        await ledger.unwind(60)
    assert asyncio.get_running_loop().time() - began == 5
    assert isinstance(caught.value.exceptions[0], DeadlinePassed)
    assert caught.value.pinned == ("mount x", "slot 14")


@virtual
async def test_a_hanging_undo_does_not_stretch_the_bound_of_the_whole() -> None:
    world = World()
    ledger = Ledger("sb-1", world, undo_s=30)

    async def hang() -> None:
        await asyncio.Event().wait()

    await ledger.take("mount x", world.make("mount x"), hang)
    began = asyncio.get_running_loop().time()
    with pytest.raises(UnwindFailed):
        await ledger.unwind(2)
    assert asyncio.get_running_loop().time() - began == 2


@virtual
async def test_the_whole_unwinding_is_bounded() -> None:
    world = World()
    ledger = await taken(world)
    began = asyncio.get_running_loop().time()
    with pytest.raises(UnwindFailed) as caught:
        await ledger.unwind(2)
    assert asyncio.get_running_loop().time() - began == 2
    assert caught.value.pinned == ("slot 14",)
    assert "the turn of slot 14" in str(caught.value.exceptions[0])


@virtual
async def test_a_second_unwind_joins_the_first() -> None:
    world = World()
    ledger = await taken(world)
    async with Crew("c") as crew:
        both = [crew.spawn(ledger.unwind(60), name=name) for name in "ab"]
        for task in both:
            await task
    assert world.undone == list(reversed(LABELS))


@virtual
async def test_after_a_crash_the_book_alone_is_enough() -> None:
    world = World()
    ledger = Ledger("sb-1", world)
    removed: list[tuple[str, str]] = []
    await ledger.take("slot 14", world.make("slot 14"), world.remove("slot 14"), args={"number": "14"})
    await world.take(ledger, "cgroup sb-1")
    world.book.append(Entry("mount sb-1", State.INTENT, "mount"))  # then the process was killed: made, or not

    def undo(kind: str) -> Callable[[Mapping[str, str]], Awaitable[None]]:
        async def run(args: Mapping[str, str]) -> None:
            removed.append((kind, str(dict(args))))
            world.exists -= {label for label in world.exists if label.startswith(kind)}

        return run

    again = Ledger("sb-1", world)
    labels = again.adopt(world.book, {kind: undo(kind) for kind in ("slot", "cgroup", "mount")})
    assert labels == ("slot 14", "cgroup sb-1", "mount sb-1")
    assert [state for _, state in again.statistics().entries] == ["held", "held", "intent"]
    await again.unwind(60)
    assert removed == [("mount", "{}"), ("cgroup", "{}"), ("slot", "{'number': '14'}")]
    assert Ledger("sb-1", world).adopt(world.book, {}) == ()


@virtual
async def test_an_adopted_kind_nobody_can_undo_pins_instead_of_being_forgotten() -> None:
    world = World()
    ledger = Ledger("sb-1", world)
    book = [Entry("slot 14", State.HELD, "slot"), Entry("gadget 1", State.HELD, "gadget")]
    ledger.adopt(book, {})
    with pytest.raises(UnwindFailed) as caught:
        await ledger.unwind(60)
    assert isinstance(caught.value.exceptions[0], NoUndo)
    assert caught.value.pinned == ("gadget 1", "slot 14")


def test_the_group_keeps_what_is_pinned_when_it_is_split() -> None:
    group = UnwindFailed("unwinding sb-1", [OSError("a"), ValueError("b")], ("slot 14",))
    match, rest = group.split(OSError)
    assert isinstance(match, UnwindFailed)
    assert isinstance(rest, UnwindFailed)
    assert match.pinned == rest.pinned == ("slot 14",)


@settings(max_examples=200, deadline=None)
@given(
    steps=st.integers(1, 6),
    fail_at=st.none() | st.integers(0, 5),
    stuck=st.sets(st.integers(0, 5), max_size=2),
    cancels=st.lists(st.floats(0, 14), max_size=4),
)
def test_whatever_happens_nothing_exists_without_a_line_in_the_book(
    steps: int, fail_at: int | None, stuck: set[int], cancels: list[float]
) -> None:
    """The sandbox create path in small: take some, maybe fail, maybe be cancelled at any time, unwind, adopt."""
    world = World()
    if fail_at is not None:
        world.fail_make[f"o {fail_at}"] = OSError("make")
    world.fail_undo = {f"o {number}": OSError("busy") for number in stuck}

    async def create(ledger: Ledger) -> None:
        try:
            for number in range(steps):
                await world.take(ledger, f"o {number}")
        finally:
            await ledger.unwind(60)

    async def main() -> None:
        ledger = Ledger("sb-1", world)
        async with Crew("c", on_error=lambda _name, _error: None) as crew:
            task = crew.spawn(create(ledger), name="create")
            for at in cancels:
                asyncio.get_running_loop().call_later(at, task.cancel)
            await crew.join()
        assert world.exists <= set(ledger.labels())
        adopted = Ledger("sb-1", world)
        recorded = adopted.adopt(world.book, {"o": lambda _args: asyncio.sleep(0)})
        assert world.exists <= set(recorded)
        world.fail_undo.clear()
        if ledger.labels():
            await ledger.unwind(60)
        assert world.exists == set()

    run(main(), seed=0)
