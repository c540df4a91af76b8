"""What a bench says: figures with their targets, and how they are printed."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One measured number. `at_most` or `at_least` is what SPEC.md promises; neither: for information."""

    what: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    @property
    def ok(self) -> bool | None:
        """None when nothing is promised."""
        if self.at_most is not None:
            return self.value <= self.at_most
        if self.at_least is not None:
            return self.value >= self.at_least
        return None


def quantile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that `share` of them do not exceed; NaN without samples."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def spread(
    what: str,
    samples_ms: Sequence[float],
    *,
    p50_at_most: float | None = None,
    p99_at_most: float | None = None,
) -> list[Figure]:
    """p50, p99 and the least of `samples_ms`. A p99 of fewer than a hundred samples is their greatest."""
    note = f"n={len(samples_ms)}, min {min(samples_ms, default=math.nan):.1f}"
    return [
        Figure(f"{what}, p50", quantile(samples_ms, 0.50), "ms", p50_at_most, note=note),
        Figure(f"{what}, p99", quantile(samples_ms, 0.99), "ms", p99_at_most, note=note),
    ]


def table(figures: Sequence[Figure]) -> str:
    wide = max((len(figure.what) for figure in figures), default=0)
    lines = [f"{'what':{wide}}  {'value':>12}        {'target':>12}  ok"]
    for each in figures:
        target = (
            "" if each.ok is None else f"<= {each.at_most:g}" if each.at_most is not None else f">= {each.at_least:g}"
        )
        verdict = {True: "yes", False: "NO", None: ""}[each.ok]
        lines.append(f"{each.what:{wide}}  {each.value:12.2f} {each.unit:6} {target:>12}  {verdict:3}  {each.note}")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ":?")
    return {
        "cpus": os.cpu_count(),
        "cpu": model.partition(":")[2].strip(),
        "kernel": os.uname().release,
        "load_1m": round(os.getloadavg()[0], 2),
    }


def options(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples: to see that it works, not to quote")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    return parser


def publish(figures: Sequence[Figure], json_file: str | None) -> None:
    print(table(figures), flush=True)
    if json_file:
        found = {"machine": machine(), "figures": [{**asdict(each), "ok": each.ok} for each in figures]}
        Path(json_file).write_text(json.dumps(found, indent=1))
