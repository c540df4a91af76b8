"""What all supervisors of one node share. Made once by `Node.open`; nobody replaces a field afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

import msgspec

from penstock.core.breaker import Breaker
from penstock.core.clock import Clock
from penstock.core.crew import Crew
from penstock.core.deadlines import Pulse
from penstock.core.gate import Gate
from penstock.model.ids import BuildId, NodeId
from penstock.model.template import Build
from penstock.node.chronicle import Chronicle
from penstock.node.expiry import Expiry
from penstock.node.ports import Disk, Ports, Slot
from penstock.node.report import Reporter
from penstock.node.slots import Pool
from penstock.node.tally import Tally

STEP_WITHIN_S: Final = 2.0


class NodeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one node. Every default is a promise of `SPEC.md` or a measurement."""

    id: NodeId
    installation: str
    slot_first: int = 0  # the block of slot numbers this installation claimed on the host
    slot_count: int = 1024  # also the most sandboxes at once
    slots_ready: int = 8
    disks_ready: int = 8
    starts_running_max: int = 8
    starts_waiting_max: int = 1_000  # beyond it a start is refused
    start_queue_s: float = 120.0  # the longest wait for a turn to start
    start_within_s: float = 20.0  # launch to guest hello
    step_within_s: float = STEP_WITHIN_S  # each step of a release
    unwind_within_s: float = 15.0  # a whole release, before it goes to quarantine
    sweep_every_s: float = 30.0
    build_grace_s: float = 15.0  # after the last build of a drain, for those who poll its status
    build_stop_s: float = 15.0  # what a keeping stop waits for builds, before it forces them
    close_within_s: float = 10.0  # what a keeping stop waits for starts and kills in progress


class Means(msgspec.Struct, frozen=True, kw_only=True):
    settings: NodeSettings
    ports: Ports
    clock: Clock
    rng: random.Random
    boot_id: str
    token_seed: bytes  # guests' access tokens derive from it; never logged, never stored elsewhere
    crew: Crew
    gate: Gate
    starts: Breaker
    slots: Pool[Slot]
    disks: Pool[Disk]
    expiry: Expiry
    reporter: Reporter
    chronicle: Chronicle
    tally: Tally
    changed: Pulse  # fired at each change of any sandbox's phase
    build: Callable[[BuildId], Build | None]
