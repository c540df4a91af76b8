"""What a sandbox owns, on disk: read back as written, and never guessed."""

from __future__ import annotations

import random

import pytest

from penstock.core.ledger import Entry, State
from penstock.model.ids import BuildId, SandboxId, TeamId
from penstock.model.sandbox import KillReason, Limits, Phase, SandboxSpec
from penstock.node.record import (
    Due,
    LedgerBook,
    Lent,
    Moved,
    Pid,
    Pooled,
    RecordUnreadable,
    SandboxRecord,
    encode,
    read_pooled,
    read_sandbox,
)
from penstock.sim.faults import Faults, Rates
from penstock.sim.guests import Nursery
from penstock.sim.kernel import Kernel, Life, SimFiles
from penstock.sim.trace import Trace

SPEC = SandboxSpec(
    id=SandboxId("ia"),
    team=TeamId("t"),
    template="base",
    build=BuildId("b"),
    limits=Limits(),
    created_at=1.0,
    end_at=60.0,
    env={"SECRET": "do not write me"},
)
PID = Pid(pid=7, start_ticks=9, slot=3, address="100.64.0.3", run_dir="/run/ia", started_at=2.0)


@pytest.fixture
def files() -> SimFiles:
    rng = random.Random(1)
    kernel = Kernel(faults=Faults(rng, Rates()), nursery=Nursery(rng, odd=0), trace=Trace(lambda: 0.0))
    return SimFiles(kernel, Life(1))


@pytest.fixture
def record(files: SimFiles) -> SandboxRecord:
    record = SandboxRecord(files, "ia")
    record.begin(SPEC, boot_id="boot", now=1.5)
    return record


def test_a_new_record_says_creating(files: SimFiles, record: SandboxRecord) -> None:
    found = read_sandbox(files, "ia")
    assert found is not None
    assert (found.phase, found.born.id, found.end_at, found.held) == (Phase.CREATING, "ia", 60.0, ())
    assert b"do not write me" not in b"".join(files.read_record("ia"))


def test_what_is_begun_or_held_is_owned_in_order_until_released(files: SimFiles, record: SandboxRecord) -> None:
    book = LedgerBook(record)
    for label, state in (
        ("run_dir", State.INTENT),
        ("run_dir", State.HELD),
        ("slot", State.INTENT),
        ("slot", State.HELD),
        ("cgroup", State.INTENT),
        ("slot", State.RELEASED),
    ):
        book.append(Entry(label, state))
    found = read_sandbox(files, "ia")
    assert found is not None
    assert found.held == ("run_dir", "cgroup")


def test_the_line_of_the_first_process_says_ready(files: SimFiles, record: SandboxRecord) -> None:
    record.write(PID)
    record.write(Due(end_at=99.0))
    found = read_sandbox(files, "ia")
    assert found is not None
    assert (found.phase, found.pid, found.end_at) == (Phase.READY, PID, 99.0)
    record.write(Moved(phase=Phase.STOPPING, because="its time was over", kill_reason=KillReason.TIMEOUT))
    found = read_sandbox(files, "ia")
    assert found is not None
    assert (found.phase, found.kill_reason) == (Phase.STOPPING, KillReason.TIMEOUT)


def test_an_empty_record_names_nothing(files: SimFiles) -> None:
    files.append_record("ia", b"")
    assert read_sandbox(files, "ia") is None


def test_a_torn_last_line_was_never_written(files: SimFiles, record: SandboxRecord) -> None:
    files.append_record("ia", encode(PID)[:20])
    found = read_sandbox(files, "ia")
    assert found is not None
    assert found.pid is None


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([b"{garbage", encode(Due(end_at=1.0))], "line 2"),
        ([b'{"k":"due","v":2,"end_at":1.0}'], "format 2"),
        ([b'{"k":"invented","v":1}', encode(Due(end_at=1.0))], "line 2"),
        ([encode(Pooled(kind="slot", number=1))], "does not belong"),
        ([b'{"k":"owned","v":1,"label":"slot","state":"borrowed"}'], "borrowed"),
        ([encode(Due(end_at=1.0))] * 5000, "5001 lines"),
    ],
)
def test_what_cannot_be_understood_is_refused_and_kept(
    files: SimFiles, record: SandboxRecord, lines: list[bytes], why: str
) -> None:
    for line in lines:
        files.append_record("ia", line)
    before = files.read_record("ia")
    with pytest.raises(RecordUnreadable, match=why):
        read_sandbox(files, "ia")
    assert files.read_record("ia") == before


def test_a_record_that_begins_with_something_else_is_refused(files: SimFiles) -> None:
    files.append_record("ia", encode(Due(end_at=1.0)))
    with pytest.raises(RecordUnreadable, match="begins with due"):
        read_sandbox(files, "ia")


def test_a_pooled_object_has_the_last_owner(files: SimFiles) -> None:
    files.append_record("slot3", encode(Pooled(kind="slot", number=3)))
    assert read_pooled(files, "slot3") == (Pooled(kind="slot", number=3), "")
    files.append_record("slot3", encode(Lent(owner="ia")))
    assert read_pooled(files, "slot3") == (Pooled(kind="slot", number=3), "ia")
    files.append_record("slot3", encode(Lent(owner="")))
    assert read_pooled(files, "slot3") == (Pooled(kind="slot", number=3), "")


def test_on_a_full_disk_an_intent_fails_and_the_rest_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    faults = Faults(rng, Rates(disk_full=1.0))
    kernel = Kernel(faults=faults, nursery=Nursery(rng, odd=0), trace=Trace(lambda: 0.0))
    book = LedgerBook(SandboxRecord(SimFiles(kernel, Life(1)), "ia"))
    with pytest.raises(OSError, match="No space left"):
        book.append(Entry("slot", State.INTENT))
    book.append(Entry("slot", State.HELD))
    book.append(Entry("slot", State.RELEASED))
