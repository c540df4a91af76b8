"""No ambient world: time, chance, the environment and free tasks come in through a door, or are on the list.

The list is `ambient.toml`: a file, the names it uses, and why it must. A clock read in passing cannot be simulated; a
task created in passing has no owner, no name, and no order when it is cancelled.
"""

from __future__ import annotations

import ast
import fnmatch
import textwrap
from collections.abc import Iterator
from functools import cache

from .source import PACKAGE, Module, modules, report, toml

# What to use instead, by name.
INSTEAD = {
    "time.time": "take a core.clock.Clock and call wall()",
    "time.time_ns": "take a core.clock.Clock and call wall()",
    "time.monotonic": "take a core.clock.Clock, or asyncio.get_running_loop().time()",
    "time.monotonic_ns": "take a core.clock.Clock, or asyncio.get_running_loop().time()",
    "time.perf_counter": "take a core.clock.Clock, or asyncio.get_running_loop().time()",
    "time.perf_counter_ns": "take a core.clock.Clock, or asyncio.get_running_loop().time()",
    "time.sleep": "await asyncio.sleep",
    "datetime.now": "take a core.clock.Clock, and datetime.fromtimestamp(clock.wall(), UTC)",
    "datetime.utcnow": "take a core.clock.Clock, and datetime.fromtimestamp(clock.wall(), UTC)",
    "datetime.today": "take a core.clock.Clock",
    "date.today": "take a core.clock.Clock",
    "uuid.uuid1": "model.ids.mint(rng, …)",
    "uuid.uuid4": "model.ids.mint(rng, …)",
    "os.urandom": "take an rng (random.SystemRandom() is made in run)",
    "os.getrandom": "take an rng",
    "os.environ": "take run.settings.Settings, or the one value",
    "os.environb": "take run.settings.Settings, or the one value",
    "os.getenv": "take run.settings.Settings, or the one value",
    "random.*": "take an rng: random.Random as a type is fine, making one is not",
    "secrets.*": "take an rng (random.SystemRandom() is made in run)",
    "create_task": "core.crew.Crew.spawn: named, owned, cancelled in order",
    "asyncio.ensure_future": "core.crew.Crew.spawn",
    "asyncio.gather": "core.crew.Crew: gather leaves tasks running when one fails",
    "asyncio.wait": "core.deadlines.Pulse: wait returns sets, whose order is that of addresses",
    "asyncio.wait_for": "async with core.deadlines.within(seconds, what)",
    "asyncio.timeout": "async with core.deadlines.within(seconds, what): done wins, and the wait has a name",
    "asyncio.timeout_at": "async with core.deadlines.within(seconds, what)",
    "asyncio.TaskGroup": "core.crew.Crew: TaskGroup cancels in the order of addresses",
    "asyncio.as_completed": "core.crew.Crew",
}
MODULES = {"time", "datetime", "uuid", "os", "random", "secrets", "asyncio"}


@cache
def uses(module: Module) -> tuple[tuple[str, int], ...]:
    return tuple(_uses(module))


def _uses(module: Module) -> Iterator[tuple[str, int]]:
    """Every ambient name the module refers to, with its line. `import x as y` and `from x import y` are followed."""
    aliases: dict[str, str] = {}  # local name -> dotted
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in MODULES:
                    aliases[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES and not node.level:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    annotations = {id(inner) for outer in _annotations(module.tree) for inner in ast.walk(outer)}
    for node in ast.walk(module.tree):
        if id(node) in annotations:
            continue
        if isinstance(node, ast.Attribute) and node.attr == "create_task":
            yield "create_task", node.lineno
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            name = _ambient(_dotted(node, aliases))
            if name is not None:
                yield name, node.lineno


def _annotations(tree: ast.Module) -> Iterator[ast.expr]:
    """Types are not uses: `rng: random.Random`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign | ast.arg) and node.annotation is not None:
            yield node.annotation
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
            yield node.returns


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return aliases.get(node.id)
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value, aliases)
        return None if base is None else f"{base}.{node.attr}"
    return None


def _ambient(dotted: str | None) -> str | None:
    if dotted is None:
        return None
    if dotted.startswith("datetime."):  # the module and its classes: datetime.date.today is date.today
        dotted = dotted.removeprefix("datetime.")
    if dotted in INSTEAD:
        return dotted
    head, _, tail = dotted.partition(".")
    return f"{head}.*" if tail and "." not in tail and f"{head}.*" in INSTEAD else None


def entries() -> list[dict[str, object]]:
    found = toml("ambient.toml")["allow"]
    assert isinstance(found, list)
    return found


def is_allowed(module: Module, name: str) -> bool:
    return any(fnmatch.fnmatch(module.name, str(entry["file"])) and name in entry["names"] for entry in entries())  # type: ignore[operator]


def test_the_ambient_world_is_used_only_where_the_list_says() -> None:
    report(
        (
            f"{module.at(line)}: {name}; instead: {INSTEAD[name]}"
            for module in modules()
            for name, line in uses(module)
            if not is_allowed(module, name)
        ),
        "Where there is really no other way, add the file, the name and the reason to tests/shape/ambient.toml.",
    )


def test_the_list_holds_no_line_that_nobody_needs() -> None:
    used = {(module.name, name) for module in modules() for name, _ in uses(module)}
    report(
        (
            f"tests/shape/ambient.toml: {entry['file']} does not use {name}"
            for entry in entries()
            for name in entry["names"]  # type: ignore[attr-defined]
            if not any(fnmatch.fnmatch(file, str(entry["file"])) and name == other for file, other in used)
        ),
        "Remove the name, or the line: the list is short so that it is read.",
    )


def test_every_line_of_the_list_has_a_reason() -> None:
    report(
        (f"tests/shape/ambient.toml: {entry['file']}" for entry in entries() if len(str(entry.get("reason", ""))) < 15),
        "Say why this file cannot take it as an argument.",
    )


def test_a_use_is_seen_through_every_kind_of_import() -> None:
    text = textwrap.dedent("""
        import asyncio, random, time as t
        from datetime import datetime
        from os import environ
        from random import choice
        def f(rng: random.Random) -> random.Random:
            t.time(); datetime.now(); environ["X"]; choice([1]); asyncio.wait([])
            asyncio.get_running_loop().create_task(f()); random.Random(1); asyncio.sleep(1); rng.random()
            datetime.fromtimestamp(1); asyncio.wait_for
    """)
    module = Module(PACKAGE / "node" / "x.py", text, ast.parse(text))
    assert sorted(name for name, _ in uses(module)) == sorted(
        [
            "time.time",
            "datetime.now",
            "os.environ",
            "random.*",
            "asyncio.wait",
            "create_task",
            "random.*",
            "asyncio.wait_for",
        ]
    )
