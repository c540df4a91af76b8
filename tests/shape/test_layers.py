"""Who may import whom: the arrow on the map in ARCHITECTURE.md, section 3."""

from __future__ import annotations

import sys
from pathlib import PurePosixPath

import pytest

from .source import PACKAGE, Module, modules, modules_of_tests, report, room_of

LOWER = {"model", "core"}
MIDDLE = {"store", "feed", "blobs", "wire"}

# Rooms each room may import, besides itself.
MAY_IMPORT: dict[str, set[str]] = {
    "": set(),  # penstock/__init__.py
    "core": set(),
    "model": {"core"},  # core.errors alone; see below
    "store": LOWER,
    "feed": LOWER,
    "blobs": LOWER,
    "wire": LOWER,
    "control": LOWER | {"store", "feed"},
    "ingress": LOWER | {"feed", "wire"},
    "node": LOWER | {"feed", "blobs", "wire"},
    "guest": {"core", "wire"},
    "worker": LOWER | {"feed", "wire"},
    "api": LOWER | MIDDLE,
    "cli": LOWER | MIDDLE | {"run"},  # `penstock up` is a verb of the CLI, and run's
    "run": LOWER | MIDDLE | {"control", "ingress", "node", "guest", "worker", "api"},
    "sim": LOWER | MIDDLE | {"control", "ingress", "node", "guest", "worker", "api"},
}

# Single imports against the map, each with its reason.
EXCEPTIONS = {}

# What a room may import from outside, where that is a promise; None: anything pinned.
MAY_IMPORT_OUTSIDE: dict[str, set[str]] = {
    "core": set(),
    "model": {"msgspec"},
    "wire": {"h11"},
    "guest": {"h11"},
    "control": {"msgspec"},
}

# Adapters: modules that only those who choose adapters may import, and the tests that are about them.
ADAPTERS = ("penstock.node.linux", "penstock.store.sqlite")
CHOOSERS = {"run", "sim"}
ADAPTER_TESTS = {
    "penstock.node.linux": ("tests/linux/", "tests/contract/", "tests/spec/", "tests/unit/node/"),
    "penstock.store.sqlite": ("tests/linux/", "tests/contract/", "tests/unit/store/", "tests/unit/run/"),
}

# `control` decides; it must be impossible for it to act on anything but the store.
NOT_IN_CONTROL = {"socket", "ssl", "subprocess", "select", "selectors", "http", "urllib", "os", "shutil", "pathlib"}


def test_every_room_is_on_the_map() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    report(
        (f"src/penstock/{room}/ is not on the map" for room in sorted(rooms - set(MAY_IMPORT))),
        "Put the file into a room that exists, or add the room to ARCHITECTURE.md and to MAY_IMPORT.",
    )


@pytest.mark.parametrize("room", list(MAY_IMPORT))
def test_a_room_imports_only_what_the_map_allows(room: str) -> None:
    allowed = MAY_IMPORT[room] | {room, ""}
    report(
        (
            f"{module.at(found.line)}: {room} imports {found.target}"
            for module in modules()
            if module.room == room
            for found in module.imports
            if (target := room_of(found.target)) is not None and target not in allowed
            if (module.name, found.target) not in EXCEPTIONS
        ),
        f"{room or 'the package'} may import {', '.join(sorted(allowed - {''})) or 'nothing of ours'}. "
        "Rooms meet in the store: move the noun to model, or declare a Protocol here and let run pass the object.",
    )


@pytest.mark.parametrize("room", list(MAY_IMPORT_OUTSIDE))
def test_a_lean_room_stays_lean(room: str) -> None:
    allowed = MAY_IMPORT_OUTSIDE[room] | sys.stdlib_module_names | {"penstock"}
    report(
        (
            f"{module.at(found.line)}: {room} imports {found.target}"
            for module in modules()
            if module.room == room
            for found in module.imports
            if found.target.split(".")[0] not in allowed
        ),
        f"{room} has the standard library and {', '.join(sorted(MAY_IMPORT_OUTSIDE[room])) or 'nothing else'}.",
    )


def test_model_knows_of_core_only_its_errors() -> None:
    report(
        (
            f"{module.at(found.line)}: model imports {found.target}"
            for module in modules()
            if module.room == "model"
            for found in module.imports
            if room_of(found.target) == "core" and found.target != "penstock.core.errors"
        ),
        "Nouns have no time and no life: what needs those belongs to another room.",
    )


def test_control_touches_nothing_but_the_store() -> None:
    report(
        (
            f"{module.at(found.line)}: control imports {found.target}"
            for module in modules()
            if module.room == "control"
            for found in module.imports
            if found.target.split(".")[0] in NOT_IN_CONTROL
        ),
        "control decides, others act: write an intent to the store and let the room that owns the edge carry it out.",
    )


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_only_run_and_sim_choose_adapters(adapter: str) -> None:
    home = PurePosixPath(*adapter.split(".")[1:])
    report(
        (
            f"{module.at(found.line)}: imports {found.target}"
            for module in modules()
            if module.room not in CHOOSERS and not PurePosixPath(module.name).with_suffix("").is_relative_to(home)
            for found in module.imports
            if is_or_is_under(found.target, adapter)
        ),
        f"Only {' and '.join(sorted(CHOOSERS))} choose {adapter}; take the port as a constructor argument.",
    )


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_s_tests_are_where_they_belong(adapter: str) -> None:
    allowed = ADAPTER_TESTS[adapter]
    report(
        (
            f"{module.at(found.line)}: imports {found.target}"
            for module in modules_of_tests()
            if not module.at(0).startswith(allowed)
            for found in module.imports
            if is_or_is_under(found.target, adapter)
        ),
        f"Tests that need {adapter} live in {', '.join(allowed)}; others use the simulated adapter.",
    )


def test_the_thin_edge_knows_the_node_only_by_its_ports() -> None:
    """node/linux executes; the thinking beside it is pure and needs no kernel."""
    allowed = ("penstock.node.ports", "penstock.node.linux")
    report(
        (
            f"{module.at(found.line)}: node/linux imports {found.target}"
            for module in modules()
            if module.name.startswith("node/linux/")
            for found in module.imports
            if room_of(found.target) == "node"
            and not any(is_or_is_under(found.target, name) for name in allowed)
            and not is_pure(found.target)
        ),
        "node/linux may import node.ports, and modules of node that import no asyncio and do no I/O.",
    )


def is_pure(dotted: str) -> bool:
    """A module that renders text or data: nothing of ours with life in it, no asyncio, no os."""
    module: Module | None = next((m for m in modules() if m.name == "/".join(dotted.split(".")[1:]) + ".py"), None)
    if module is None:
        return False
    return not any(
        found.target.split(".")[0] in {"asyncio", "os", "socket", "subprocess"}
        or (room_of(found.target) == "core" and found.target != "penstock.core.errors")
        for found in module.imports
    )


def is_or_is_under(dotted: str, parent: str) -> bool:
    return dotted == parent or dotted.startswith(parent + ".")
