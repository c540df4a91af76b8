"""What must hold in every world: small watchers of the kernel and of the store, each guarding one invariant.

They see every change of the kernel at the moment it happens and every revision at the moment it is kept. A violation
is remembered and raised by the world at its next breath, not inside production code that might handle it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from penstock.model import keys
from penstock.model.records import Batch
from penstock.model.sandbox import TERMINAL, KillReason, OnTimeout, Phase, SandboxSpec, SandboxStatus
from penstock.model.snapshot import Snapshot
from penstock.sim.kernel import Kernel
from penstock.sim.trace import Trace

EXPIRY_S: Final = 1.0  # the promise
ANSWERS: Final = frozenset({Phase.READY, *TERMINAL})

_spec: Final = msgspec.json.Decoder(SandboxSpec).decode
_snapshot: Final = msgspec.json.Decoder(Snapshot).decode
_status: Final = msgspec.json.Decoder(SandboxStatus).decode


class Violation(AssertionError):
    """An invariant does not hold. The text names it, the sandbox and what was seen."""


class Facts:
    """The store's records as last kept, decoded: what a client of the platform can know."""

    def __init__(self) -> None:
        self.revision = 0
        self.specs: dict[str, SandboxSpec] = {}
        self.statuses: dict[str, SandboxStatus] = {}
        self.snapshots: dict[str, Snapshot] = {}
        self.spec_revisions: dict[str, int] = {}
        self.end_known_at: dict[str, float] = {}  # loop seconds: when the present `end_at` was written

    def apply(self, batch: Batch, now: float) -> None:
        self.revision = batch.revision
        for change in batch.changes:
            key, gone = change.record.key, change.kind == "delete"
            if key.startswith(keys.SANDBOX_SPEC):
                self._spec(key.removeprefix(keys.SANDBOX_SPEC), None if gone else _spec(change.record.value), now)
                self.spec_revisions[key.removeprefix(keys.SANDBOX_SPEC)] = batch.revision
            elif key.startswith(keys.SANDBOX_STATUS):
                sandbox = key.removeprefix(keys.SANDBOX_STATUS)
                if gone:
                    self.statuses.pop(sandbox, None)
                else:
                    self.statuses[sandbox] = _status(change.record.value)
            elif key.startswith(keys.SNAPSHOT):
                snapshot = key.removeprefix(keys.SNAPSHOT)
                if gone:
                    self.snapshots.pop(snapshot, None)
                else:
                    self.snapshots[snapshot] = _snapshot(change.record.value)

    def _spec(self, sandbox: str, spec: SandboxSpec | None, now: float) -> None:
        if spec is None:
            self.specs.pop(sandbox, None)
            return
        before = self.specs.get(sandbox)
        if before is None or before.end_at != spec.end_at:
            self.end_known_at[sandbox] = now
        self.specs[sandbox] = spec


class Checkers:
    """All invariants of one world. `violations` is empty for as long as they hold."""

    def __init__(self, kernel: Kernel, facts: Facts, trace: Trace, wall: Callable[[], float]) -> None:
        self.violations: list[str] = []
        self.quiet_since = 0.0  # loop seconds: the last start of the daemon or step of the clock
        self.slack_s = 0.0  # what slow operations of this world may add to the expiry promise
        self._kernel, self._facts, self._trace, self._wall = kernel, facts, trace, wall
        self._answered: dict[str, Phase] = {}
        self._ended: set[str] = set()
        kernel.told = self.on_kernel

    def blame(self, what: str) -> None:
        self._trace.say("VIOLATION", of=what)
        self.violations.append(what)

    # -- the kernel: no object without a record, no slot with two owners --

    def on_kernel(self, kind: str, name: str, verb: str) -> None:
        records = self._kernel.records
        if verb == "made twice":
            self.blame(f"{kind} {name} made twice")
        if kind == "image":
            self._on_image(name, verb)
        elif verb == "made":
            record = {"slot": f"slot{name}", "cgroup": name.removeprefix("sb-")}.get(kind, name)
            if record not in records:
                self.blame(f"{kind} {name} made without a record")
        if kind == "process" and verb == "made":
            self._sole_owner(name)
        elif kind in ("slot", "disk", "cgroup") and verb == "gone":
            for proc in self._kernel.processes.values():
                used = {
                    "slot": str(proc.order.slot.number),
                    "disk": proc.order.disk.name,
                    "cgroup": proc.cgroup,
                }
                if used[kind] == name:
                    self.blame(f"{kind} {name} removed under living {proc.order.sandbox}")
        elif kind == "record" and verb == "gone":
            for left in self.left_of(name):
                self.blame(f"record of {name} removed while {left} exists")

    def _on_image(self, image: str, verb: str) -> None:
        """An image is announced before it is made, and outlives the record in the store that names it."""
        if verb == "gone":
            if image in self._facts.snapshots:
                self.blame(f"image {image} removed while the store names it")
            return
        quoted = f'"{image}"'.encode()
        announced = any(quoted in line for lines in self._kernel.records.values() for line in lines)
        wished = any(spec.checkpoint is not None and spec.checkpoint.id == image for spec in self._facts.specs.values())
        if not announced and not wished:
            self.blame(f"image {image} made without a record")

    def _sole_owner(self, sandbox: str) -> None:
        orders = [proc.order for proc in self._kernel.processes.values()]
        for what in ("slot", "disk"):
            used = [order.slot.number if what == "slot" else order.disk.name for order in orders]
            if len(used) != len(set(used)):
                self.blame(f"two processes on one {what} when {sandbox} started")

    def left_of(self, sandbox: str) -> list[str]:
        """Kernel objects of one sandbox, whatever a record says. Pooled ones are found by their own record."""
        kernel = self._kernel
        left = [f"process {proc.pid}" for proc in kernel.processes.values() if proc.order.sandbox == sandbox]
        left += [f"cgroup {name}" for name in kernel.cgroups if name == f"sb-{sandbox}"]
        left += [f"disk {sandbox}"] if sandbox in kernel.disks else []
        left += [f"folder {sandbox}"] if sandbox in kernel.run_dirs else []
        lent = f'"owner":"{sandbox}"'.encode()
        left += [name for name, lines in kernel.records.items() if lines and lent in lines[-1] and name != sandbox]
        return left

    # -- the store: answered once, ended means nothing left, expiry --

    def on_revision(self, batch: Batch) -> None:
        for change in batch.changes:
            key = change.record.key
            if key.startswith(keys.SANDBOX_STATUS) and change.kind == "put":
                self._on_status(key.removeprefix(keys.SANDBOX_STATUS), _status(change.record.value))

    def _on_status(self, sandbox: str, status: SandboxStatus) -> None:
        phase = status.phase
        self._trace.say("status", sandbox=sandbox, phase=phase.value, because=status.because.replace(" ", "_"))
        if sandbox in self._ended and phase not in TERMINAL:
            self.blame(f"{sandbox} is {phase.value} after it had ended")
        if phase in ANSWERS:
            first = self._answered.setdefault(sandbox, phase)
            if phase is Phase.FAILED and first is Phase.READY:
                self.blame(f"{sandbox} answered ready, then failed")
            if phase is Phase.READY and first in TERMINAL:
                self.blame(f"{sandbox} answered {first.value}, then ready")
        if phase is Phase.READY:
            self._rules_in_force(sandbox, status)
        if phase is Phase.STOPPED and status.kill_reason is KillReason.PAUSED:
            kept = [each.id for each in self._facts.snapshots.values() if each.sandbox == sandbox]
            if not kept or not set(kept) <= set(self._kernel.images):
                self.blame(f"{sandbox} is called paused, and its images are {kept} of {sorted(self._kernel.images)}")
        if phase in TERMINAL:
            self._ended.add(sandbox)
            for left in self.left_of(sandbox):
                self.blame(f"{sandbox} is {phase.value}, and {left} is left")
            if sandbox in self._kernel.records:
                self.blame(f"{sandbox} is {phase.value}, and its record is left")

    def _rules_in_force(self, sandbox: str, status: SandboxStatus) -> None:
        """A status that claims a spec's revision claims its rules."""
        spec = self._facts.specs.get(sandbox)
        if spec is None or status.spec_revision < self._facts.spec_revisions[sandbox]:
            return
        if not any(proc.order.sandbox == sandbox for proc in self._kernel.processes.values()):
            return  # said, kept late, and over meanwhile: its slot may be somebody else's by now
        if self._kernel.slots.get(status.slot) not in (spec.egress, None):
            self.blame(f"{sandbox} claims revision {status.spec_revision}, and other rules are in force")

    def answer_of(self, sandbox: str) -> Phase | None:
        return self._answered.get(sandbox)

    def check_expiry(self, now: float) -> None:
        """No sandbox serves later than its end and the promise, counted from when the node could know it."""
        for sandbox, status in self._facts.statuses.items():
            spec = self._facts.specs.get(sandbox)
            if status.phase is not Phase.READY or spec is None:
                continue
            if spec.frozen or spec.park is not None or spec.on_timeout is not OnTimeout.KILL:
                continue  # it is to be paused, for which there is no such promise
            known_for_s = now - max(self.quiet_since, self._facts.end_known_at.get(sandbox, 0.0))
            late_s = min(self._wall() - spec.end_at, known_for_s)
            if late_s > EXPIRY_S + self.slack_s:
                self.blame(f"{sandbox} still serves {late_s:.2f} s after its end")
