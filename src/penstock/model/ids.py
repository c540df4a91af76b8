"""Typed ids. An id is minted once, by the room that creates the object, and never used again."""

from __future__ import annotations

import random
import re
import string
from typing import Final, NewType

SandboxId = NewType("SandboxId", str)
NodeId = NewType("NodeId", str)
TeamId = NewType("TeamId", str)
KeyId = NewType("KeyId", str)
TemplateId = NewType("TemplateId", str)
BuildId = NewType("BuildId", str)
SnapshotId = NewType("SnapshotId", str)

_ALPHABET: Final = string.ascii_lowercase + string.digits
# Sandbox ids travel in host names between dashes, hence lower-case alphanumerics only (spec: e2b 1.3).
SANDBOX_ID_PATTERN: Final = re.compile(r"[a-z0-9]{1,63}")
INSTALLATION_ID_LENGTH: Final = 6  # part of every kernel name; device names hold 15 bytes in all


def mint(rng: random.Random, length: int) -> str:
    """`length` random characters of [a-z0-9]; about 5.17 bits each."""
    return "".join(rng.choice(_ALPHABET) for _ in range(length))


def mint_sandbox_id(rng: random.Random) -> SandboxId:
    """`i` and 20 characters, as the E2B SDKs expect."""
    return SandboxId("i" + mint(rng, 20))


def mint_snapshot_id(rng: random.Random) -> SnapshotId:
    """`s` and 20 characters."""
    return SnapshotId("s" + mint(rng, 20))


def mint_installation_id(rng: random.Random) -> str:
    """Names every kernel object of one data folder, so that two installations never touch each other."""
    return mint(rng, INSTALLATION_ID_LENGTH)
