"""Sizes and quantities: bytes, milli-CPU, seconds. Parsed at the door, plain integers and floats inside."""

from __future__ import annotations

import re
from typing import Final

from penstock.model.errors import Invalid

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)", re.IGNORECASE)
_FACTORS: Final = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": 1024 * GIB}
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)", re.IGNORECASE)
_SECONDS: Final = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_bytes(text: str, *, field: str) -> int:
    """`"512M"`, `"2 GiB"`, `"1000"` → bytes (binary multiples). Raises Invalid naming `field`."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise Invalid(field, f"{text!r} is not a size", now="write it as 512M, 2G or a number of bytes")
    return int(float(found[1]) * _FACTORS[found[2].lower()])


def parse_seconds(text: str, *, field: str) -> float:
    """`"90"`, `"1.5s"`, `"10m"`, `"2h"` → seconds. Raises Invalid naming `field`."""
    found = _SPAN.fullmatch(text.strip())
    if found is None:
        raise Invalid(field, f"{text!r} is not a duration", now="write it as 30s, 10m, 2h or a number of seconds")
    return float(found[1]) * _SECONDS[found[2].lower()]


def show_bytes(count: int) -> str:
    """1610612736 → `"1.5 GiB"`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if size == int(size) else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def show_seconds(seconds: float) -> str:
    """0.0042 → `"4.2 ms"`, 95 → `"1m35s"`."""
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m"
