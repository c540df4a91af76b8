"""The source tree as data: every module with its room, its syntax tree and what it imports."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PACKAGE = ROOT / "src" / "penstock"


@dataclass(frozen=True)
class Import:
    target: str  # dotted, absolute; for `from a import b` both `a` and, if it is a module, `a.b`
    line: int


@dataclass(eq=False)
class Module:
    path: Path  # absolute
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """`node/linux/base.py`"""
        return self.path.relative_to(PACKAGE).as_posix()

    @property
    def room(self) -> str:
        parts = self.path.relative_to(PACKAGE).parts
        return parts[0] if len(parts) > 1 else ""

    def at(self, line: int) -> str:
        """`src/penstock/node/create.py:17`: what an editor can open."""
        return f"{self.path.relative_to(ROOT).as_posix()}:{line}"

    @cached_property
    def imports(self) -> list[Import]:
        return list(_imports(self.path, self.tree))


def _imports(path: Path, tree: ast.Module) -> Iterator[Import]:
    """Late imports and those under TYPE_CHECKING count too: knowing a type is knowing its room."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                top = PACKAGE.parent if path.is_relative_to(PACKAGE) else ROOT
                package = path.relative_to(top).parent.parts
                base = ".".join((*package[: len(package) - node.level + 1], *filter(None, (base,))))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(inner if is_module(inner) else base, node.lineno)


@cache
def is_module(dotted: str) -> bool:
    path = PACKAGE.parent.joinpath(*dotted.split("."))
    return dotted.startswith("penstock.") and (path.with_suffix(".py").exists() or path.is_dir())


@cache
def modules() -> tuple[Module, ...]:
    return tuple(read(path) for path in sorted(PACKAGE.rglob("*.py")))


@cache
def modules_of_tests() -> tuple[Module, ...]:
    tests = HERE.parent
    return tuple(read(path) for path in sorted(tests.rglob("*.py")) if "node_modules" not in path.parts)


def read(path: Path) -> Module:
    text = path.read_text()
    return Module(path, text, ast.parse(text, filename=str(path)))


def room_of(dotted: str) -> str | None:
    """The room a dotted import leads to, or None when it leaves the package."""
    parts = dotted.split(".")
    if parts[0] != "penstock":
        return None
    return parts[1] if len(parts) > 1 else ""


@cache
def toml(name: str) -> dict[str, Any]:
    with (HERE / name).open("rb") as file:
        return tomllib.load(file)


def report(findings: Iterable[str], way_out: str) -> None:
    """Fail with every finding, one a line, and what to do about them."""
    found = list(findings)
    assert not found, "\n".join(("", *found, way_out))
