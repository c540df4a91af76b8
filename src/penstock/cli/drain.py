"""A drain in front of a person: the plan before it, its progress, its receipt."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from threading import Event
from typing import Any, Final

from penstock.cli.show import note, table
from penstock.core.clock import SystemClock
from penstock.core.errors import Kind
from penstock.model.units import show_seconds

QUIET_S: Final = 45.0  # the server says that it lives three times as often
RESTART_S: Final = 60.0  # a daemon may be away for this long: the drain goes on with the next one
AGAIN_S: Final = 0.5
ROWS_MAX: Final = 20  # of those who are left, on a terminal
FAILED: Final = 1  # exit code of a drain that ended with something in quarantine, or was undone


def show_plan(plan: dict[str, Any]) -> None:
    """The fates on stdout, what blocks and the digest on stderr."""
    rows = [
        [one["sandboxID"], one["fate"], when(one["by"]), one["loses"] or "-", one["because"]]
        for one in plan["foreseen"]
    ]
    table(["SANDBOX", "FATE", "AT THE LATEST", "LOSES", "BECAUSE"], rows, empty="no sandboxes: it ends at once")
    counts = Counter(one["fate"] for one in plan["foreseen"])
    for line in plan["blocks"]:
        note(f"note: {line}")
    note(f"plan {plan['digest']}: {tally(counts)}")


def show_receipt(receipt: dict[str, Any]) -> None:
    rows = [[one["sandboxID"], one["fate"], when(one["at"]), said(one)] for one in receipt["outcomes"]]
    table(["SANDBOX", "FATE", "AT", "BECAUSE"], rows, empty="no sandbox was here")
    note(verdict(receipt))


def verdict(receipt: dict[str, Any]) -> str:
    """How it ended, in one line."""
    head = f"drain {receipt['epoch']} of {receipt['node']}"
    fates = tally(receipt["fates"])
    if receipt["stage"] == "undone":
        return f"{head} was undone: {fates}"
    if receipt["succeeded"]:
        return f"{head} succeeded: {fates}"
    left = f"{receipt['quarantined']} in quarantine"
    return f"{head} ended, but not as a success: {fates}; {left}; look: penstock leaks"


def exit_code(receipt: dict[str, Any]) -> int:
    return 0 if receipt["succeeded"] and receipt["stage"] == "ended" else FAILED


def watch(client: Any, node: str, epoch: int) -> dict[str, Any]:
    """Show the drain until it has ended; returns its receipt. Ctrl-C leaves it going and says what one may do."""
    progress = Live() if sys.stderr.isatty() else Lines()
    try:
        with progress.shown():
            for event in follow(client, node, epoch):
                if event["event"] == "end":
                    return event
                progress.take(event)
    except KeyboardInterrupt:
        note(
            f"\nthe drain of {node} goes on. watch: penstock node drain {node}; "
            f"end it now: penstock node drain {node} --force; take it back: penstock node undrain {node}"
        )
        raise
    raise AssertionError("a stream that is followed ends with its receipt")


def follow(client: Any, node: str, epoch: int) -> Iterator[dict[str, Any]]:
    """The events of the drain, the last one `end`; goes on where it was when the daemon is restarted.

    Raises CallFailed when nobody has answered for RESTART_S.
    """
    from penstock.cli.client import CallFailed

    last, away_s = "", 0.0
    while True:
        try:
            path, params = f"/nodes/{node}/drain/events", {"epoch": str(epoch)}
            for id, event in client.tail(path, params=params, last_id=last, quiet_s=QUIET_S):
                last, away_s = id or last, 0.0
                if event is not None:
                    yield event
                    if event["event"] == "end":
                        return
        except CallFailed as error:
            if not last or error.kind is not Kind.UNAVAILABLE or away_s >= RESTART_S:
                raise
        away_s += AGAIN_S
        Event().wait(AGAIN_S)


class Lines:
    """Progress where nobody looks at it live: a line per stage and per fate."""

    def __init__(self) -> None:
        self._head = ""

    def shown(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def take(self, event: dict[str, Any]) -> None:
        if event["event"] == "outcome":
            note(f"{event['sandboxID']}: {event['fate']}: {said(event)}")
        elif event["event"] == "report" and (head := headline(event)) != self._head:
            self._head = head
            note(head)


class Live:
    """Progress on a terminal: who is left, what comes next for each and in how long, redrawn each second."""

    def __init__(self) -> None:
        self._report: dict[str, Any] | None = None

    def shown(self) -> AbstractContextManager[Any]:
        from rich.console import Console
        from rich.live import Live as Redrawn

        console = Console(stderr=True)
        return Redrawn(get_renderable=self._draw, console=console, refresh_per_second=2, transient=True)

    def take(self, event: dict[str, Any]) -> None:
        if event["event"] == "report":
            self._report = event

    def _draw(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        report = self._report
        if report is None:
            return Text("waiting for the node")
        rows = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("SANDBOX", "NEXT", "IN", "NOW"):
            rows.add_column(column, no_wrap=column != "NOW")
        for one in report["waiting"][:ROWS_MAX]:
            rows.add_row(one["sandboxID"], one["next"] or "its own end", left(one["at"]), one["because"])
        more = len(report["waiting"]) - ROWS_MAX
        return Group(Text(headline(report)), rows, Text(f"and {more} more" if more > 0 else ""))


def headline(report: dict[str, Any]) -> str:
    """Stage and counts in one line."""
    names = {"starts": "starts", "builds": "builds", "live": "sandboxes", "quarantined": "in quarantine"}
    counts = [f"{report[field]} {name}" for field, name in names.items() if report[field]]
    text = f"{report['node']} drains, stage {report['stage']}"
    text += f"; left: {', '.join(counts)}" if counts else ""
    text += f"; so far {tally(report['fates'])}" if report["fates"] else ""
    return text + "".join(f"\n  force: {error}" for error in report["forceErrors"])


def tally(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {fate}" for fate, count in sorted(counts.items())) or "no sandboxes"


def said(outcome: dict[str, Any]) -> str:
    because, error = outcome["because"], outcome["error"]
    return f"{because} ({error})" if error and error != because else because or "-"


def when(moment: str | None) -> str:
    return "open" if moment is None else moment[:19].replace("T", " ")


def left(moment: str | None) -> str:
    if moment is None:
        return "-"
    seconds = datetime.fromisoformat(moment).timestamp() - SystemClock().wall()
    return "now" if seconds <= 0 else show_seconds(seconds)
