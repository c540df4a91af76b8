"""An interactive shell: our terminal in raw mode, its bytes to the sandbox's PTY, its size kept equal."""

from __future__ import annotations

import base64
import os
import shutil
import signal
import sys
import termios
import threading
import tty
from typing import Any, Final

from penstock.core.errors import PenstockError

END_OF_INPUT: Final = b"\x04"
_ENV: Final = {"TERM": os.environ.get("TERM", "xterm-256color"), "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}


def interactive(client: Any, box: dict[str, Any], user: str | None) -> int:
    """Run `bash -i -l` until it ends. Returns its exit code; the terminal is restored whatever happens."""
    columns, rows = shutil.get_terminal_size()
    message = {
        "process": {"cmd": "/bin/bash", "args": ["-i", "-l"], "envs": _ENV},
        "pty": {"size": {"cols": columns, "rows": rows}},
    }
    stdin = sys.stdin.fileno()
    saved = termios.tcgetattr(stdin) if os.isatty(stdin) else None
    try:
        if saved is not None:
            tty.setraw(stdin)
        for event in client.start(box, message, user):
            if "start" in event:
                _follow(client, box, event["start"]["pid"], user, stdin)
            elif "data" in event:
                sys.stdout.buffer.write(base64.b64decode(event["data"].get("pty", "")))
                sys.stdout.flush()
            elif "end" in event:
                return exit_code(event["end"])
        return 1
    finally:
        if saved is not None:
            termios.tcsetattr(stdin, termios.TCSADRAIN, saved)
        signal.signal(signal.SIGWINCH, signal.SIG_DFL)


def exit_code(end: dict[str, Any]) -> int:
    """Of a process's end event, as a shell tells it: its own exit code, or 128 and the signal that ended it."""
    if end.get("exited"):
        return int(end.get("exitCode", 0)) & 0xFF
    words = str(end.get("status", "")).removeprefix("signal: ").partition(" (")[0]
    for number in signal.valid_signals():
        if words == str(int(number)) or words == (signal.strsignal(number) or "").lower():
            return 128 + number
    return 128 + signal.SIGKILL


def _follow(client: Any, box: dict[str, Any], pid: int, user: str | None, stdin: int) -> None:
    selector = {"process": {"pid": pid}}

    def resize(*_: object) -> None:
        columns, rows = shutil.get_terminal_size()
        size = {"pty": {"size": {"cols": columns, "rows": rows}}}
        client.unary(box, "process.Process/Update", selector | size, user)

    def pump() -> None:
        chunk = b" "
        while chunk:
            chunk = os.read(stdin, 4096)
            # A terminal has no end of input but this character; without it the shell would wait for ever.
            text = {"input": {"pty": base64.b64encode(chunk or END_OF_INPUT).decode()}}
            try:
                client.unary(box, "process.Process/SendInput", selector | text, user)
            except PenstockError:
                return  # Safe: the shell has ended, and its event says so.

    signal.signal(signal.SIGWINCH, resize)
    threading.Thread(target=pump, daemon=True).start()
