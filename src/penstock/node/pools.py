"""The two pools of a node, over its ports."""

from __future__ import annotations

import random

from penstock.core.crew import Crew
from penstock.node.create import pooled_limits
from penstock.node.means import NodeSettings
from penstock.node.ports import Disk, Ports, Slot
from penstock.node.reap import DISK_RECORD, SLOT_RECORD
from penstock.node.slots import Pool


def make_pools(settings: NodeSettings, ports: Ports, crew: Crew, rng: random.Random) -> tuple[Pool[Slot], Pool[Disk]]:
    """Closed; the node tells them what an earlier daemon left, and opens them."""
    numbers = range(settings.slot_first, settings.slot_first + settings.slot_count)
    within_s = settings.step_within_s
    slots: Pool[Slot] = Pool(
        kind=SLOT_RECORD,
        numbers=numbers,
        make=ports.network.create_slot,
        destroy=lambda number: ports.network.destroy_slot(number, within_s=within_s),
        files=ports.files,
        crew=crew,
        rng=rng,
        ready_target=settings.slots_ready,
    )
    disks: Pool[Disk] = Pool(
        kind=DISK_RECORD,
        numbers=numbers,
        make=lambda number: ports.disks.create(f"{DISK_RECORD}{number}", pooled_limits()),
        destroy=lambda number: ports.disks.remove(f"{DISK_RECORD}{number}", within_s=within_s),
        files=ports.files,
        crew=crew,
        rng=rng,
        ready_target=settings.disks_ready,
    )
    return slots, disks
