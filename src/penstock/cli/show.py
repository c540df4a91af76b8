"""What a command prints: tables for people, JSON for programs, errors with cause and way out."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, Final, TypeVar

import typer

from penstock.core.errors import Kind, PenstockError

PLAIN_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}", re.ASCII)

Function = TypeVar("Function", bound=Callable[..., Any])

EXIT_CODES: Final[dict[Kind, int]] = {
    Kind.INVALID: 2,
    Kind.UNAUTHENTICATED: 3,
    Kind.FORBIDDEN: 3,
    Kind.NOT_FOUND: 4,
    Kind.CONFLICT: 5,
    Kind.EXHAUSTED: 6,
    Kind.UNAVAILABLE: 7,
    Kind.DEADLINE: 8,
    Kind.UNSUPPORTED: 9,
    Kind.INTERNAL: 1,
}


def plain_id(value: str) -> str:
    """A parser of arguments: an id goes into a request's path as it is, where `../` would name something else."""
    if PLAIN_ID.fullmatch(value) is None:
        raise typer.BadParameter(f"{value!r} is not an id")
    return value


def as_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str) -> None:
    """A table on a terminal; tab-separated lines when piped, so that cut and awk work."""
    listed = [[str(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        print("\t".join(columns))
        for row in listed:
            print("\t".join(row))
        return
    if not listed:
        print(empty)
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        shown.add_column(column)
    for row in listed:
        shown.add_row(*row)
    Console().print(shown)


def fields(body: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, str]]:
    """An object as rows for a person: what is nested gets a dotted name, what is empty a dash."""
    for key, value in body.items():
        name = f"{within}.{key}" if within else key
        if isinstance(value, Mapping) and value:
            yield from fields(value, name)
        elif isinstance(value, bool):
            yield name, "yes" if value else "no"
        elif isinstance(value, list | tuple):
            yield name, ", ".join(str(item) for item in value) or "-"
        else:
            yield name, str(value) if value or value == 0 else "-"


def note(text: str) -> None:
    """Progress for a person: to stderr, so that stdout stays the result."""
    print(text, file=sys.stderr, flush=True)


def fails_clearly(function: Function) -> Function:
    """Turn an error of ours into one line on stderr and its exit code; Ctrl-C into 130."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except PenstockError as error:
            note(f"penstock: {error}")
            raise SystemExit(EXIT_CODES[error.kind]) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except BrokenPipeError:
            raise SystemExit(141) from None
        except OSError as error:
            if error.filename is None:
                raise  # not about a file that the person named
            note(f"penstock: {error.filename}: {error.strerror}")
            raise SystemExit(EXIT_CODES[Kind.INTERNAL]) from None

    return run  # type: ignore[return-value]


def delete_each(
    client: Any, ids: Sequence[str], path: Callable[[str], str], *, what: str, done: str, json: bool
) -> None:
    """DELETE each, and print which were there. Those that were not are named; then the exit code is 4."""
    from penstock.cli.client import CallFailed

    gone, missing = [], []
    for id in ids:
        try:
            client.call("DELETE", path(id))
            gone.append(id)
        except CallFailed as error:
            if error.kind is not Kind.NOT_FOUND:
                raise
            missing.append(id)
    if json:
        as_json({done: gone, "not_found": missing})
    else:
        for id in gone:
            print(id)
        for id in missing:
            note(f"penstock: no {what} {id}")
    if missing:
        raise SystemExit(EXIT_CODES[Kind.NOT_FOUND])
