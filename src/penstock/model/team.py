"""Teams and their keys."""

from __future__ import annotations

from typing import Final

import msgspec

from penstock.model.ids import KeyId, TeamId

TEAM_DEFAULT: Final = TeamId("default")
SANDBOXES_MAX_DEFAULT: Final = 2_000  # live at once per team; above it 429
TIMEOUT_S_MAX_DEFAULT: Final = 24 * 3600.0


class TeamLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on what one team may hold. Beyond them the API answers 429 (counts) or 400 (a single request)."""

    sandboxes_max: int = SANDBOXES_MAX_DEFAULT
    timeout_s_max: float = TIMEOUT_S_MAX_DEFAULT
    cpu_milli_max: int = 8_000
    memory_bytes_max: int = 8 * 1024**3
    disk_bytes_max: int = 50 * 1024**3


class Team(msgspec.Struct, frozen=True, kw_only=True):
    id: TeamId
    limits: TeamLimits = TeamLimits()
    created_at: float = 0.0


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key is 20 random bytes shown once as `e2b_` + 40 hex; only its hash is kept."""

    id: KeyId
    team: TeamId
    name: str
    hash: str  # "$sha256$" + unpadded base64 of sha256 over the 20 raw bytes
    prefix: str  # first visible characters, for lists
    suffix: str
    created_at: float
    last_used_at: float = 0.0
    revoked_at: float = 0.0
