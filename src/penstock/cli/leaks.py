"""`penstock leaks`: prints a zero or the culprits. Exit code 0: nothing leaked, 1: something did."""

from __future__ import annotations

from pathlib import Path

from penstock.cli.show import as_json, table
from penstock.run.leaks import look


def main(data: Path, *, json: bool) -> int:
    found = look(data)
    if json:
        as_json([{"kind": leak.kind, "name": leak.name, "why": leak.why} for leak in found])
    elif found:
        table(["KIND", "NAME", "WHY"], [[leak.kind, leak.name, leak.why] for leak in found], empty="")
    else:
        print("no leaks")
    return 1 if found else 0
