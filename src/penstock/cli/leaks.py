"""`penstock leaks`: prints a zero or the culprits with their history. Exit code 0: nothing leaked, 1: something did."""

from __future__ import annotations

from pathlib import Path

from penstock.cli.show import as_json, note, table
from penstock.run import leaks


def main(data: Path, *, json: bool, fix: bool = False) -> int:
    found = leaks.fix(data, note) if fix else leaks.look(data)
    if json:
        as_json(
            [
                {"kind": leak.kind, "name": leak.name, "why": leak.why, "history": leaks.history(data, leak)}
                for leak in found
            ]
        )
    elif found:
        table(["KIND", "NAME", "WHY"], [[leak.kind, leak.name, leak.why] for leak in found], empty="")
        for leak in found:
            for line in leaks.history(data, leak):
                print(f"  {leak.name}  {line}")
    else:
        print("no leaks")
    return 1 if found else 0
