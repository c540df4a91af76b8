"""Small by default: a module is read in one sitting, a function on one screen.

Exceptions are in `sizes.toml`, each with the size it may have and the reason; an exception may shrink, never grow
unnoticed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from .source import Module, modules, report, toml

MODULE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70
WAY_OUT = "Split it along its nouns, or state the reason in tests/shape/sizes.toml."


def functions(module: Module) -> Iterator[tuple[str, int, int]]:
    """(qualified name, first line, number of lines) of every function, docstring included, decorators not."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, int, int]]:
        for child in ast.iter_child_nodes(node):
            inner = prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = f"{prefix}{child.name}."
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                assert child.end_lineno is not None
                yield f"{prefix}{child.name}", child.lineno, child.end_lineno - child.lineno + 1
            yield from walk(child, inner)

    return walk(module.tree, "")


def test_modules_are_read_in_one_sitting() -> None:
    larger = {str(entry["file"]): int(entry["lines"]) for entry in toml("sizes.toml").get("module", [])}
    report(
        (
            f"{module.at(1)}: {lines} lines, of at most {larger.get(module.name, MODULE_LINES_MAX)}"
            for module in modules()
            if (lines := module.text.count("\n")) > larger.get(module.name, MODULE_LINES_MAX)
        ),
        WAY_OUT,
    )


def test_functions_fit_on_a_screen() -> None:
    larger = {
        (str(entry["file"]), str(entry["function"])): int(entry["lines"])
        for entry in toml("sizes.toml").get("function", [])
    }
    report(
        (
            f"{module.at(line)}: {name} has {lines} lines"
            for module in modules()
            for name, line, lines in functions(module)
            if lines > larger.get((module.name, name), FUNCTION_LINES_MAX)
        ),
        WAY_OUT,
    )


def test_no_exception_outlives_its_need() -> None:
    sizes = {module.name: module.text.count("\n") for module in modules()}
    lengths = {(module.name, name): lines for module in modules() for name, _, lines in functions(module)}
    entries = toml("sizes.toml")
    stale = [
        f"tests/shape/sizes.toml: {entry['file']}"
        for entry in entries.get("module", [])
        if sizes.get(str(entry["file"]), 0) <= MODULE_LINES_MAX
    ]
    stale += [
        f"tests/shape/sizes.toml: {entry['function']} of {entry['file']}"
        for entry in entries.get("function", [])
        if lengths.get((str(entry["file"]), str(entry["function"])), 0) <= FUNCTION_LINES_MAX
    ]
    report(stale, "It is small enough by now: remove the line.")


def test_every_exception_has_a_reason() -> None:
    entries = toml("sizes.toml")
    report(
        (
            f"tests/shape/sizes.toml: {entry['file']}"
            for entry in (*entries.get("module", []), *entries.get("function", []))
            if len(str(entry.get("reason", ""))) < 15
        ),
        "Say why it is better in one piece.",
    )
