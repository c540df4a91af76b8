"""The ordered create path: every kernel object through the ledger, every step timed.

run dir → slot → disk → cgroup → rules → launch. Slot and disk come ready-made from their pools, where the background
made them: what is left on the path is one mkdir, one cgroup, one set of rules and the launch itself. So the steps are
taken one after the other; overlapping them would save less than a task switch costs, and cost the order of undo.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from penstock.core.ledger import Ledger
from penstock.model.errors import NotFound
from penstock.model.sandbox import Limits, SandboxSpec
from penstock.model.template import Build
from penstock.node import evict
from penstock.node.means import Means
from penstock.node.ports import Disk, GuestConfig, LaunchOrder, Process
from penstock.node.record import Pid, SandboxRecord
from penstock.node.slots import Pool
from penstock.wire.tokens import access_token

T = TypeVar("T")


class Created(msgspec.Struct, frozen=True, kw_only=True):
    process: Process
    slot: int
    address: str
    run_dir: str
    started_at: float  # wall seconds: the guest first answered
    steps_ms: dict[str, float]


class Steps:
    """How long each step took, in milliseconds, in order."""

    def __init__(self, means: Means) -> None:
        self._clock = means.clock
        self.ms: dict[str, float] = {}

    async def time(self, name: str, doing: Awaitable[T]) -> T:
        begun = self._clock.monotonic()
        try:
            return await doing
        finally:
            self.ms[name] = round((self._clock.monotonic() - begun) * 1000, 3)


async def create(
    spec: SandboxSpec,
    *,
    means: Means,
    ledger: Ledger,
    record: SandboxRecord,
    undo: evict.Undo,
    steps: Steps,
    on_launch: Callable[[], None],
) -> Created:
    """Everything a sandbox needs, up to a guest that answers. `on_launch` is called right before the launch.

    Raises NotFound (build), NoFreeSlot, PoolClosed, LaunchFailed, DeadlinePassed or OSError, leaving what was taken
    in `ledger`: the caller unwinds. If cancelled, the step under way is finished first and stands in the ledger.
    """
    build = means.build(spec.build)
    if build is None:
        raise NotFound("build is not on this node", which=spec.build, now="retry; it may still arrive")
    ports, within_s = means.ports, means.settings.step_within_s

    async def take(label: str, acquire: Callable[[], Awaitable[T]]) -> T:
        return await steps.time(label, ledger.take(label, acquire, lambda: undo.of(label)))

    async def take_now(label: str, acquire: Callable[[], T]) -> T:
        return await steps.time(label, ledger.take_now(label, acquire, lambda: undo.of(label)))

    async def take_pooled(label: str, pool: Pool[T]) -> tuple[int, T]:
        if pool.at_hand:
            return await take_now(label, lambda: pool.take_nowait(spec.id))
        return await take(label, lambda: pool.take(spec.id, within_s=within_s))

    async def take_disk() -> Disk:
        limits = spec.limits
        if spec.snapshot is not None:
            return await take(evict.DISK, lambda: ports.disks.create(spec.id, limits, image=spec.snapshot))
        if (limits.disk_bytes_max, limits.disk_inodes_max) == (_POOLED.disk_bytes_max, _POOLED.disk_inodes_max):
            return (await take_pooled(evict.DISK, means.disks))[1]
        return await take(evict.DISK, lambda: ports.disks.create(spec.id, limits))

    run_dir = await take_now(evict.RUN_DIR, lambda: ports.files.make_run_dir(spec.id))
    number, slot = await take_pooled(evict.SLOT, means.slots)
    disk = await take_disk()
    cgroup = evict.cgroup_name(spec.id)
    await take(evict.CGROUP, lambda: ports.cgroups.create(cgroup, spec.limits))
    await steps.time("rules", ports.network.apply(number, spec.egress))
    order = LaunchOrder(
        sandbox=spec.id,
        cgroup=cgroup,
        layers=tuple(layer.path for layer in build.layers),
        disk=disk,
        slot=slot,
        limits=spec.limits,
        run_dir=run_dir,
        guest=_guest(spec, build, means),
    )

    async def launch() -> Process:
        """The process, and its identity in the record: without that line a restart could not take it up again."""
        process = await ports.launcher.launch(order, within_s=means.settings.start_within_s)
        undo.process = process
        started_at = means.clock.wall()
        record.write(
            Pid(
                pid=process.pid,
                start_ticks=process.start_ticks,
                slot=number,
                address=slot.address,
                run_dir=run_dir,
                started_at=started_at,
                steps_ms=steps.ms,
            )
        )
        return process

    on_launch()
    process = await take(evict.PROCESS, launch)
    steps.ms.update((f"launch.{step}", round(took_ms, 3)) for step, took_ms in process.steps_ms.items())
    return Created(
        process=process,
        slot=number,
        address=slot.address,
        run_dir=run_dir,
        started_at=means.clock.wall(),
        steps_ms=steps.ms,
    )


_POOLED = Limits()


def pooled_limits() -> Limits:
    """The limits of the disks that a pool makes ahead."""
    return _POOLED


def _guest(spec: SandboxSpec, build: Build, means: Means) -> GuestConfig:
    return GuestConfig(
        sandbox_id=spec.id,
        template_id=spec.template,
        access_token=access_token(means.token_seed, spec.id) if spec.secure else None,
        env={**build.env, **spec.env},
        user=build.user,
        workdir=build.workdir,
        hostname=spec.id,
        cpu_count=max(1, spec.limits.cpu_milli // 1000),
        memory_bytes_total=spec.limits.memory_bytes_max,
    )
