"""What `penstock doctor` does: the probes, and a whole installation for the length of one sandbox."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from penstock.core.deadlines import within
from penstock.model.units import MIB
from penstock.node.linux.probes import Finding, run_all
from penstock.run.daemon import Daemon
from penstock.run.datafolder import DataFolder
from penstock.run.floor import DiskFloor
from penstock.run.settings import OnStop, load

SANDBOX_WITHIN_S: Final = 120.0

Use = Callable[[str, str, str], str]


def findings(data: Path) -> list[Finding]:
    """Every probe of this machine. Blocks for about a second; leaves nothing behind."""
    return [*run_all(data), _disk_room(data)]


def _disk_room(data: Path) -> Finding:
    """By the settings of `data`; a folder that is not there yet will lie on the disk of the nearest that is."""
    there = next(folder for folder in (data, *data.parents) if folder.is_dir())
    floor = DiskFloor(there, load({"data": str(data)}).disk_free_min)
    free = floor.free_bytes()
    return Finding(
        probe="disk room",
        ok=free >= floor.free_min,
        found=f"{free // MIB} MiB free for {there}; creates are refused below {floor.free_min // MIB} MiB",
        fix="make room, or set a smaller disk_free_min",
    )


def a_sandbox(use: Use) -> Finding:
    """An installation in a throwaway folder. `use(api_url, sandbox_url, api_key)` drives it and says how it went."""
    with tempfile.TemporaryDirectory(prefix="penstock-doctor-") as folder:
        try:
            said = asyncio.run(_live_once(Path(folder) / "data", use))
        except Exception as error:
            fix = "the step named is what this machine refuses"
            return Finding(probe="a sandbox", ok=False, found=f"{type(error).__name__}: {error}", fix=fix)
    return Finding(probe="a sandbox", ok=True, found=f"created, used and verified gone; isolation: namespace; {said}")


async def _live_once(data: Path, use: Use) -> str:
    given = {"data": str(data), "api": "127.0.0.1:0", "ingress": "127.0.0.1:0", "tls": "127.0.0.1:0", "slots_ready": 1}
    folder = DataFolder(str(data)).open()
    daemon = Daemon(load(given, environ={}), folder, lambda _: None)
    async with within(SANDBOX_WITHIN_S, "a sandbox from its creation to its end"):
        await daemon.start()
        try:
            return await asyncio.to_thread(use, daemon.api_url, daemon.ingress_url, folder.api_key)
        finally:
            await daemon.stop(OnStop.FORCE)
