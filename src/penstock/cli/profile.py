"""Which installation a command talks to, and with which key.

`E2B_API_URL`, `E2B_SANDBOX_URL` and `E2B_API_KEY` win, as for the SDKs; else the data folder (`--data`,
`PENSTOCK_DATA`, or the default) tells where its daemon listens and what its first key is.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.core.errors import Kind, PenstockError

DATA_DEFAULT = "/var/lib/penstock"


class NoInstallation(PenstockError):
    """Nothing to talk to. The message says where it was looked for."""

    kind = Kind.UNAVAILABLE
    code = "no_installation"


@dataclass(frozen=True)
class Profile:
    api_url: str
    sandbox_url: str
    api_key: str
    admin_token: str | None = None


def data_of(given: str | None) -> Path:
    return Path(given or os.environ.get("PENSTOCK_DATA") or DATA_DEFAULT).absolute()


def _lives(announced: dict[str, Any]) -> bool:
    """Whether the process that announced itself still is the one of that pid. Read here: `run` takes long to import."""
    try:
        fields = Path(f"/proc/{announced['pid']}/stat").read_text().rpartition(")")[2].split()
    except (OSError, KeyError):
        return False
    return fields[0] not in ("Z", "X") and int(fields[19]) == announced.get("start_ticks")


def _admin_token(folder: Path, api_url: str) -> str | None:
    """That of the data folder, if its daemon is the one that the environment names and we may read it."""
    try:
        if json.loads((folder / "run" / "daemon.json").read_text())["api_url"] != api_url:
            return None
        return (folder / "admin-token").read_text().strip()
    except (OSError, ValueError, KeyError):
        return None


def load(data: str | None) -> Profile:
    """Raises NoInstallation when neither the environment nor the data folder names a running daemon.

    What a dead one left behind names addresses that are anybody's by now.
    """
    environ = os.environ
    if data is None and all(environ.get(name) for name in ("E2B_API_URL", "E2B_SANDBOX_URL", "E2B_API_KEY")):
        url = environ["E2B_API_URL"]
        return Profile(url, environ["E2B_SANDBOX_URL"], environ["E2B_API_KEY"], _admin_token(data_of(None), url))
    folder = data_of(data)
    start_one = f"start one with: penstock up --data {folder}"
    try:
        addresses = json.loads((folder / "run" / "daemon.json").read_text())
        api_key = (folder / "api-key").read_text().strip()
        admin_token = (folder / "admin-token").read_text().strip()
    except (FileNotFoundError, PermissionError, ValueError) as error:
        raise NoInstallation(
            "no running installation found",
            which=str(folder),
            why=str(error),
            now=start_one,
        ) from error
    if not _lives(addresses):
        why = f"the daemon, pid {addresses.get('pid')}, has ended without a word"
        raise NoInstallation("no running installation found", which=str(folder), why=why, now=start_one)
    return Profile(addresses["api_url"], addresses["ingress_url"], api_key, admin_token)
