"""Every kind of record has its writers, and they are rooms."""

from __future__ import annotations

from itertools import permutations

from penstock.model import keys
from penstock.model.writers import WRITERS

from .source import PACKAGE, report

PREFIXES = {name: value for name, value in vars(keys).items() if name.isupper() and isinstance(value, str)}


def test_every_prefix_has_its_writers() -> None:
    report(
        (
            f"model/keys.py: {name} = {value!r} has no writers"
            for name, value in PREFIXES.items()
            if value not in WRITERS
        ),
        "Say in model/writers.py which rooms may write it.",
    )


def test_every_writer_is_a_room_and_every_entry_a_prefix() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    report(
        [
            f"model/writers.py: {prefix!r} is no prefix of model/keys.py"
            for prefix in set(WRITERS) - set(PREFIXES.values())
        ]
        + [
            f"model/writers.py: {room!r} of {prefix!r} is no room"
            for prefix, who in WRITERS.items()
            for room in who - rooms
        ],
        "Writers are rooms, prefixes are those of model/keys.py.",
    )


def test_no_prefix_hides_another() -> None:
    report(
        (
            f"model/keys.py: {PREFIXES[a]!r} begins with {PREFIXES[b]!r}"
            for a, b in permutations(PREFIXES, 2)
            if PREFIXES[a].startswith(PREFIXES[b])
        ),
        "A list of one kind must not show another.",
    )


def test_who_asked_is_not_who_tells() -> None:
    """Spec is never written by who executes it, status never by who asked for it."""
    for name, prefix in PREFIXES.items():
        if name.endswith("_SPEC"):
            assert "node" not in WRITERS[prefix], f"model/writers.py: node writes {prefix!r}, which it executes"
        if name.endswith("_STATUS"):
            assert "api" not in WRITERS[prefix], f"model/writers.py: api writes {prefix!r}, which it asked for"
