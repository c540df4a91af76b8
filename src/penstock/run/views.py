"""What the API reads: a mirror of each kind of record, kept up to date by the feed."""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.core.crew import Crew
from penstock.feed.source import Source
from penstock.feed.view import View
from penstock.model import keys
from penstock.model.node import NodeStatus
from penstock.model.sandbox import SandboxSpec, SandboxStatus
from penstock.model.snapshot import Snapshot
from penstock.model.team import ApiKey, Team
from penstock.model.template import Build, Template


async def open_views(source: Source, crew: Crew) -> dict[str, View[Any]]:
    """By name, each with what is there already."""
    kinds: dict[str, tuple[str, type[Any]]] = {
        "specs": (keys.SANDBOX_SPEC, SandboxSpec),
        "statuses": (keys.SANDBOX_STATUS, SandboxStatus),
        "templates": (keys.TEMPLATE, Template),
        "builds": (keys.BUILD, Build),
        "keys": (keys.API_KEY, ApiKey),
        "teams": (keys.TEAM, Team),
        "nodes": (keys.NODE_STATUS, NodeStatus),
        "snapshots": (keys.SNAPSHOT, Snapshot),
    }
    views: dict[str, View[Any]] = {}
    for name, (prefix, kind) in kinds.items():
        views[name] = View(source, prefix, msgspec.json.Decoder(kind).decode)
        await views[name].start(crew)
    return views
