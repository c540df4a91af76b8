"""What a stopping daemon says while it waits for sandboxes: how many are left, who, and why."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from penstock.core.clock import Clock
from penstock.model.drain import DrainReport, DrainStage, Waiting

FIRST_S: Final = 1.0
CAP_S: Final = 60.0
SHOWN_MAX: Final = 5  # sandboxes named in a line


async def tell(report: Callable[[], DrainReport | None], say: Callable[[str], None], clock: Clock) -> None:
    """Until cancelled: a line after 1, 2, 4, … seconds, at last one a minute, as long as somebody is left."""
    pause_s = FIRST_S
    while True:
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, CAP_S)
        now = report()
        if now is not None and now.stage is not DrainStage.ENDED:
            say(line(now, clock.wall()))


def line(report: DrainReport, now: float) -> str:
    """`draining for 4 s: 2 sandboxes left; iabc draining: asked to end, kill in 26 s; …`; `now` in wall seconds."""
    counts = [
        f"{count} {name}{'s' if count != 1 else ''}"
        for count, name in ((report.starts, "start"), (report.builds, "build"), (report.live, "sandbox"))
        if count
    ]
    left = ", ".join(counts).replace("sandboxs", "sandboxes") or "nobody"
    doing = "forcing" if report.stage is DrainStage.FORCING else "draining"
    parts = [f"{doing} for {max(0.0, now - report.began_at):.0f} s: {left} left"]
    parts += [_who(each, now) for each in report.waiting[:SHOWN_MAX]]
    if len(report.waiting) > SHOWN_MAX:
        parts.append(f"and {len(report.waiting) - SHOWN_MAX} more")
    if report.quarantined:
        parts.append(f"{report.quarantined} in quarantine, not waited for")
    return "; ".join(parts)


def _who(waiting: Waiting, now: float) -> str:
    because = waiting.because.rstrip(": ")
    due = "nothing is due" if waiting.next is None else waiting.next.value
    if waiting.next is not None and waiting.at is not None:
        due += f" in {max(0.0, waiting.at - now):.0f} s"
    return f"{waiting.sandbox} {because}, {due}"
