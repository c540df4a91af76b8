"""A port is a Protocol of at most eight methods, beside its consumer: small enough to be simulated faithfully."""

from __future__ import annotations

import ast

from .source import Module, modules, report

METHODS_MAX = 8


def protocols(module: Module) -> dict[ast.ClassDef, list[str]]:
    return {
        node: [child.name for child in node.body if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)]
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef) and any(is_typing_protocol(base) for base in node.bases)
    }


def is_typing_protocol(base: ast.expr) -> bool:
    """`Protocol`, `Protocol[T]`, `typing.Protocol`; not asyncio's."""
    return ast.unparse(base).partition("[")[0] in {"Protocol", "typing.Protocol"}


def test_a_port_has_at_most_eight_methods() -> None:
    report(
        (
            f"{module.at(node.lineno)}: {node.name} has {len(methods)} methods: {', '.join(methods)}"
            for module in modules()
            for node, methods in protocols(module).items()
            if len(methods) > METHODS_MAX
        ),
        "Two ports hide in one: split it by who calls what.",
    )


def test_the_ports_of_the_node_are_found_by_this_test() -> None:
    (ports,) = [module for module in modules() if module.name == "node/ports.py"]
    names = {node.name for node in protocols(ports)}
    assert {"Launcher", "Cgroups", "Network", "Disks", "Files"} <= names
