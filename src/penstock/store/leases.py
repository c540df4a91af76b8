"""Leases: a set of records that live only as long as somebody renews.

A lease is itself a record (`lease/<id>`), so it survives a restart; renewals stay in memory, and after a restart every
lease has its whole time again: a lease may end late, never early. The deadline is looked at again when it is due, so a
renewal costs one assignment and no timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from penstock.core.clock import Clock
from penstock.core.deadlines import DeadlineHeap
from penstock.model.errors import Invalid
from penstock.model.records import Change, Record
from penstock.store.errors import LeaseNotFound, StoreBusy
from penstock.store.ops import LEASE_PREFIX

TTL_S_MAX: Final = 366 * 86_400.0
LEASES_MAX: Final = 100_000
LEASE_RECORDS_MAX: Final = 4_096  # they all go in one revision
RETRY_S: Final = 1.0  # when the store could not take the deletion


class _Stored(msgspec.Struct, frozen=True):
    ttl_s: float


class Lease:
    __slots__ = ("expires_at", "id", "keys", "ttl_s")

    def __init__(self, id_: int, ttl_s: float, expires_at: float) -> None:
        self.id, self.ttl_s, self.expires_at = id_, ttl_s, expires_at  # expires_at: the clock's monotonic seconds
        self.keys: dict[str, None] = {}


class Leases:
    """Follows the decided state. `expire(id)` is called, on the loop, when a lease is over; it must not raise."""

    def __init__(self, clock: Clock, expire: Callable[[int], None]) -> None:
        self._clock, self._expire = clock, expire
        self._leases: dict[int, Lease] = {}
        self._heap: DeadlineHeap[int] = DeadlineHeap()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    def __len__(self) -> int:
        return len(self._leases)

    def get(self, lease: int) -> Lease:
        """Raises LeaseNotFound."""
        found = self._leases.get(lease)
        if found is None:
            raise LeaseNotFound("lease not found", which=str(lease), now="grant a new one")
        return found

    def renew(self, lease: int) -> None:
        """Its whole time again from now. Raises LeaseNotFound, also when it is over and only not deleted yet."""
        found, now = self.get(lease), self._clock.monotonic()
        if found.expires_at <= now:
            raise LeaseNotFound("lease has expired", which=str(lease), now="grant a new one")
        found.expires_at = now + found.ttl_s

    def check_grant(self, ttl_s: float) -> bytes:
        """The value to store for a new lease. Raises Invalid, StoreBusy."""
        if not 0 < ttl_s <= TTL_S_MAX:
            raise Invalid("ttl_s", f"{ttl_s} is not within 0 to {TTL_S_MAX:g} seconds")
        if len(self._leases) >= LEASES_MAX:
            raise StoreBusy("too many leases", why=f"{LEASES_MAX} are held", retry_after_s=10)
        return msgspec.json.encode(_Stored(ttl_s))

    def check_attach(self, lease: int, key: str) -> None:
        """Raises LeaseNotFound, Invalid."""
        if len(self.get(lease).keys) >= LEASE_RECORDS_MAX:
            raise Invalid(key, f"lease {lease} carries {LEASE_RECORDS_MAX} records already", now="grant another")

    def follow(self, change: Change, before: Record | None) -> None:
        """A change was decided; `before` is the record it replaced."""
        record = change.record
        if record.key.startswith(LEASE_PREFIX):
            self._follow_lease(change)
        elif before is not None and before.lease != record.lease and before.lease in self._leases:
            self._leases[before.lease].keys.pop(record.key, None)
        if change.kind == "put" and record.lease:
            self._leases[record.lease].keys[record.key] = None

    def reset(self, records: Iterable[Record]) -> None:
        """Begin again from the visible state: at the start, and when decided changes turned out not to be kept."""
        before, self._leases, self._heap = self._leases, {}, DeadlineHeap()
        records = list(records)
        for record in records:
            if record.key.startswith(LEASE_PREFIX):
                self._follow_lease(Change("put", record))
        for id_, lease in self._leases.items():
            if id_ in before:
                lease.expires_at = before[id_].expires_at
                self._push(lease.id, max(lease.expires_at, self._clock.monotonic() + RETRY_S))
        for record in records:
            if record.lease in self._leases:
                self._leases[record.lease].keys[record.key] = None

    def retry(self, lease: int) -> None:
        """Its deletion could not be written: due again in RETRY_S."""
        if lease in self._leases:
            self._push(lease, self._clock.monotonic() + RETRY_S)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _follow_lease(self, change: Change) -> None:
        id_ = int(change.record.key.removeprefix(LEASE_PREFIX))
        if change.kind == "delete":
            self._leases.pop(id_, None)
            self._heap.remove(id_)
            return
        ttl_s = msgspec.json.decode(change.record.value, type=_Stored).ttl_s
        self._leases[id_] = Lease(id_, ttl_s, self._clock.monotonic() + ttl_s)
        self._push(id_, self._leases[id_].expires_at)

    def _push(self, lease: int, at: float) -> None:
        self._heap.push(lease, at)
        self._arm()

    def _arm(self) -> None:
        at = self._heap.next_at()
        if at is None or (self._timer is not None and self._timer_at <= at):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = asyncio.get_running_loop().call_later(max(0.0, at - self._clock.monotonic()), self._due)

    def _due(self) -> None:
        self._timer = None
        now = self._clock.monotonic()
        for id_ in self._heap.pop_due(now):
            lease = self._leases[id_]
            if lease.expires_at > now:  # renewed since it was pushed
                self._heap.push(id_, lease.expires_at)
            else:
                self._expire(id_)
        self._arm()
