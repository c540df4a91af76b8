"""Every module that could be simulated is: some function of it runs in a few seeded worlds.

What cannot run there is in `simulated.toml`, with the reason. Modules of types and constants have nothing to run.
"""

from __future__ import annotations

import ast
import fnmatch
import json
import subprocess
import sys
from functools import cache

import pytest

from .source import PACKAGE, ROOT, Module, modules, report, toml

# Everything is imported before anybody looks, so that class bodies and decorators do not count as having run.
PLAY = """
import json, sys
from penstock.sim import traffic, world

seen = set()

def look(frame, event, argument):
    if event == "call":
        seen.add(frame.f_code)

sys.setprofile(look)
for seed in range(12):
    traffic.run(seed)
for seed in range(6):
    world.run(seed)
sys.setprofile(None)
ran = {}
for code in seen:
    ran.setdefault(code.co_filename, []).append(code.co_qualname)
imported = [module.__file__ for module in list(sys.modules.values()) if getattr(module, "__file__", None)]
print(json.dumps({"ran": ran, "imported": imported}))
"""

pytestmark = pytest.mark.timeout(120)


@cache
def played() -> tuple[dict[str, list[str]], set[str]]:
    """(functions that ran, by file; files that were imported), in a process of its own."""
    done = subprocess.run([sys.executable, "-c", PLAY], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    return found["ran"], set(found["imported"])


def is_played(module: Module) -> bool:
    return str(module.path) in played()[0] or not has_code(module)


def has_code(module: Module) -> bool:
    """Whether anything in it could run after its import. A signature in a protocol, with a docstring or `...`, not."""
    return any(
        isinstance(node, ast.Lambda)
        or (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not all(map(is_idle, node.body)))
        for node in ast.walk(module.tree)
    )


def is_idle(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def entries() -> list[dict[str, str]]:
    found: list[dict[str, str]] = toml("simulated.toml")["exempt"]
    return found


def matches(entry: dict[str, str], module: Module) -> bool:
    return fnmatch.fnmatch(module.name, entry["file"])


def test_every_module_runs_in_simulation() -> None:
    report(
        (
            f"{module.at(1)}: no function of it ran in any world"
            for module in modules()
            if module.path.name != "__init__.py"
            and not any(matches(entry, module) for entry in entries())
            and not is_played(module)
        ),
        "Play it in sim/traffic.py or sim/world.py. If only a real kernel can, say why in tests/shape/simulated.toml.",
    )


def test_no_exemption_is_without_need() -> None:
    report(
        (
            f"tests/shape/simulated.toml: {entry['file']}: everything it names is played, or it names nothing"
            for entry in entries()
            if not any(matches(entry, module) and not is_played(module) for module in modules())
        ),
        "Remove the entry: the list is short so that it is read.",
    )


def test_every_exemption_has_a_reason() -> None:
    report(
        (f"tests/shape/simulated.toml: {entry['file']}" for entry in entries() if len(entry.get("reason", "")) < 15),
        "Say why no simulated world can run this.",
    )


def test_importing_is_not_running() -> None:
    """What the first test would miss if class bodies counted."""
    ran, imported = played()
    dial = str(PACKAGE / "ingress" / "dial.py")
    assert dial in imported and dial not in ran
