"""What a sandbox owns, on disk before it exists: the crash net under the ledger.

One file per sandbox (and per pooled slot or disk), JSON lines, append-only, never rewritten. A line says what is about
to be taken, what is held, what was verified gone, and which process is pid 1; `adopt` reads nothing else. The file is
unlinked last of all, so an object without a record and a record without an object are both findings, never normal.

Refused designs: one file rewritten with rename (two fsync-less renames per step cost more than six appends, and a
reader of a half-written daemon sees no order); the store (it is group-committed behind a thread, and a sandbox must
not wait for another room's disk).
"""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec

from penstock.core.errors import Kind, PenstockError
from penstock.core.ledger import Entry, State
from penstock.model.drain import Disposition
from penstock.model.ids import BuildId, SandboxId, SnapshotId, TeamId
from penstock.model.sandbox import KillReason, OnTimeout, Phase, SandboxSpec
from penstock.node.ports import Files

FORMAT: Final = 1  # of a line; a reader refuses higher ones
LINES_MAX: Final = 4_096  # per record; a sandbox writes about twenty


class RecordUnreadable(PenstockError):
    """A record cannot be understood, so nothing it may name can be touched.

    Raised by `read_sandbox` and `read_pooled`. The catcher pins the owner (UNKNOWN) and leaves the file alone.
    """

    kind = Kind.INTERNAL
    code = "record_unreadable"


class Line(msgspec.Struct, frozen=True, kw_only=True, tag_field="k", omit_defaults=False):
    v: int = FORMAT


class Born(Line, tag="born", frozen=True, kw_only=True):
    """First line of a sandbox: enough to expire it, to kill it and to report it while the API is away."""

    id: SandboxId
    team: TeamId
    template: str
    build: BuildId
    at: float  # wall seconds
    end_at: float  # wall seconds
    boot_id: str
    # A restarted daemon acts on ends and drains before it has seen a spec: it must not end what is to be paused.
    on_timeout: OnTimeout = OnTimeout.KILL
    on_drain: Disposition | None = None


class Owned(Line, tag="owned", frozen=True, kw_only=True):
    """A ledger entry. Labels are the kinds of `evict.LABELS`; what more an undo needs, the pools' own records say."""

    label: str
    state: str  # a ledger.State's value

    @property
    def entry(self) -> Entry:
        return Entry(self.label, State(self.state), kind=self.label)


class Pid(Line, tag="pid", frozen=True, kw_only=True):
    """Pid 1 of a sandbox that is ready: with the boot id of `Born`, these two name one process for ever."""

    pid: int
    start_ticks: int
    slot: int
    address: str
    run_dir: str
    started_at: float
    steps_ms: dict[str, float] = {}


class Moved(Line, tag="moved", frozen=True, kw_only=True):
    """A phase that a restarted daemon must know of, written before it is acted on."""

    phase: Phase
    because: str = ""
    kill_reason: KillReason | None = None
    forced: bool = False  # by a drain or a stop, rather than ended when asked to


class Due(Line, tag="due", frozen=True, kw_only=True):
    end_at: float  # wall seconds; the last one counts


class Parking(Line, tag="parking", frozen=True, kw_only=True):
    """From here on its disk is kept as this snapshot, whatever ends it. Written before anything is ended."""

    snapshot: SnapshotId
    because: str = ""


class Pooled(Line, tag="pooled", frozen=True, kw_only=True):
    """First line of a pooled slot or disk."""

    kind: str
    number: int


class Lent(Line, tag="lent", frozen=True, kw_only=True):
    """Who has it. Empty: nobody, it lies ready."""

    owner: str


class Remembered(msgspec.Struct, frozen=True, kw_only=True):
    """A sandbox's record, read back."""

    born: Born
    owned: tuple[Owned, ...]
    pid: Pid | None
    phase: Phase
    because: str
    kill_reason: KillReason | None
    end_at: float
    parking: SnapshotId | None = None
    was_asked: bool = False  # to end, by a drain
    forced: bool = False

    @property
    def held(self) -> tuple[str, ...]:
        """Labels begun and not released, in the order of taking."""
        held: dict[str, None] = {}
        for entry in self.owned:
            if entry.state == "released":
                held.pop(entry.label, None)
            else:
                held.setdefault(entry.label)
        return tuple(held)


class SandboxRecord:
    """The record of one sandbox, for writing. Appends are synchronous: tens of microseconds, page cache only."""

    def __init__(self, files: Files, sandbox: str) -> None:
        self._files, self.sandbox = files, sandbox

    def begin(self, spec: SandboxSpec, *, boot_id: str, now: float) -> None:
        """Write the first line. Raises OSError when the disk is full: nothing was taken yet."""
        self.write(
            Born(
                id=spec.id,
                team=spec.team,
                template=spec.template,
                build=spec.build,
                at=now,
                end_at=spec.end_at,
                boot_id=boot_id,
                on_timeout=spec.on_timeout,
                on_drain=spec.on_drain,
            )
        )

    def write(self, line: Line) -> None:
        self._files.append_record(self.sandbox, encode(line))

    def note(self, line: Line) -> None:
        """Write a line whose loss costs nothing but repeated work.

        Safe to drop on a full disk: without `held` or `released` a restart undoes the entry again (absent is success),
        without `moved` it finds the phase from the kernel. The space comes back when the record is unlinked.
        """
        try:
            self.write(line)
        except OSError:
            return

    def remove(self) -> None:
        """Unlink it: everything it named was verified gone."""
        self._files.remove_record(self.sandbox)


class LedgerBook:
    """The ledger's book is the sandbox's record. Only an intent must be on disk: see `SandboxRecord.note`."""

    def __init__(self, record: SandboxRecord) -> None:
        self._record = record

    def append(self, entry: Entry) -> None:
        line = Owned(label=entry.label, state=entry.state.value)
        if entry.state is State.INTENT:
            self._record.write(line)
        else:
            self._record.note(line)


class _Version(msgspec.Struct):
    v: int


_AnyLine = Born | Owned | Pid | Moved | Due | Parking | Pooled | Lent
_STATES: Final = frozenset(state.value for state in State)
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(_AnyLine)
_version = msgspec.json.Decoder(_Version)
_T = TypeVar("_T", bound=Line)


def encode(line: Line) -> bytes:
    return _encoder.encode(line)


def read_sandbox(files: Files, sandbox: str) -> Remembered | None:
    """The record of `sandbox`; None when it names nothing (empty: the crash came before its first line).

    Raises RecordUnreadable, leaving the file as it is.
    """
    lines = _decode(files.read_record(sandbox), sandbox)
    if not lines:
        return None
    born = _first(lines, Born, sandbox)
    pid: Pid | None = None
    moved = Moved(phase=Phase.CREATING)
    end_at = born.end_at
    parking: SnapshotId | None = None
    was_asked = False
    owned: list[Owned] = []
    for line in lines[1:]:
        match line:
            case Owned():
                if line.state not in _STATES:
                    raise _unreadable(sandbox, f"{line.state!r} is no state of a ledger entry")
                owned.append(line)
            case Pid():
                pid = line
                moved = Moved(phase=Phase.READY)
            case Moved():
                moved = line
                was_asked = was_asked or line.phase is Phase.DRAINING
            case Due():
                end_at = line.end_at
            case Parking():
                parking = line.snapshot
            case _:
                raise _unreadable(sandbox, f"a line of kind {type(line).__name__.lower()} does not belong here")
    return Remembered(
        born=born,
        owned=tuple(owned),
        pid=pid,
        phase=moved.phase,
        because=moved.because,
        kill_reason=moved.kill_reason,
        end_at=end_at,
        parking=parking,
        was_asked=was_asked,
        forced=moved.forced,
    )


def read_pooled(files: Files, name: str) -> tuple[Pooled, str] | None:
    """The pooled object's first line and its present owner (empty: nobody). None for an empty record."""
    lines = _decode(files.read_record(name), name)
    if not lines:
        return None
    owner = ""
    for line in lines[1:]:
        if not isinstance(line, Lent):
            raise _unreadable(name, f"a line of kind {type(line).__name__.lower()} does not belong here")
        owner = line.owner
    return _first(lines, Pooled, name), owner


def _first(lines: list[_AnyLine], kind: type[_T], which: str) -> _T:
    first = lines[0]
    if not isinstance(first, kind):
        raise _unreadable(which, f"it begins with {type(first).__name__.lower()}, not {kind.__name__.lower()}")
    return first


def _decode(lines: list[bytes], which: str) -> list[_AnyLine]:
    if len(lines) > LINES_MAX:
        raise _unreadable(which, f"{len(lines)} lines, of at most {LINES_MAX}")
    found: list[_AnyLine] = []
    for number, line in enumerate(lines, start=1):
        try:
            version = _version.decode(line).v
            if version > FORMAT:
                raise _unreadable(which, f"line {number} has format {version}; this Penstock reads up to {FORMAT}")
            found.append(_decoder.decode(line))
        except msgspec.MsgspecError as error:
            if number == len(lines):
                # Safe: a torn last line was never acknowledged (ENOSPC or the daemon's death inside the write), and
                # whatever it announces is taken only after the append returned.
                break
            raise _unreadable(which, f"line {number}: {error}") from error
    return found


def _unreadable(which: str, why: str) -> RecordUnreadable:
    return RecordUnreadable(
        "record cannot be read", which=which, why=why, now="its objects stay as they are until an operator decides"
    )
