"""The ready objects a service of the guest is built from. Each service module has `register(parts)`."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.clock import Clock
from penstock.guest.access import TokenAccess
from penstock.guest.log import Log
from penstock.guest.rpc import Rpc
from penstock.guest.server import Routes, Spawn
from penstock.guest.settings import Settings
from penstock.guest.users import Users


@dataclass(frozen=True, kw_only=True)
class Parts:
    """`spawn` is the guest's crew: a task that outlives its request belongs there."""

    settings: Settings
    users: Users
    access: TokenAccess
    routes: Routes
    rpc: Rpc
    log: Log
    clock: Clock
    spawn: Spawn
