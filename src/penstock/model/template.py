"""Templates (names) and Builds (their immutable results)."""

from __future__ import annotations

from typing import Final

import msgspec

from penstock.model.ids import BuildId, TemplateId

TEMPLATE_BASE: Final = "base"


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """One read-only directory tree, content-addressed. `path` is where this node keeps it."""

    digest: str  # "sha256:<hex>" over its manifest
    path: str
    bytes: int = 0
    files: int = 0


class Build(msgspec.Struct, frozen=True, kw_only=True):
    """Never changed after it was written: a refresh makes a new one."""

    id: BuildId
    template: TemplateId
    layers: tuple[Layer, ...]  # topmost first, as overlayfs wants them
    created_at: float
    env: dict[str, str] = {}
    user: str = "user"
    workdir: str = "/home/user"


class Template(msgspec.Struct, frozen=True, kw_only=True):
    id: TemplateId
    names: tuple[str, ...]
    build: BuildId  # the one new sandboxes use
    created_at: float
