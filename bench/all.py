"""Every bench, one after the other, and one table of what is promised and what was measured.

    .venv/bin/python bench/all.py [--quick] [--json FILE] [--only BENCH ...]

Each bench is a process of its own (some pin themselves to a core), bounded in time; Ctrl-C ends the one that runs,
which clears up what it made, and prints what was measured until then. The exit code is 1 when a promise is not kept,
2 when a bench failed.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import figures
from figures import Figure

FOLDER = Path(__file__).resolve().parent
BENCHES = ("sandboxes", "launch", "ingress", "store")
BOUND_S = {"sandboxes": 420.0, "launch": 90.0, "ingress": 90.0, "store": 90.0}  # sandboxes: seven parts of 60 s
BOUND_QUICK_S = {"sandboxes": 180.0, "launch": 45.0, "ingress": 60.0, "store": 45.0}
CLEAR_UP_S = 60.0  # from SIGINT to the end


def main() -> int:
    parser = figures.options(__doc__)
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=BENCHES)
    asked = parser.parse_args()
    found: list[Figure] = []
    failed: list[str] = []
    try:
        for name in asked.only:
            began = time.monotonic()
            print(f"{name} …", file=sys.stderr, flush=True)
            outcome = _one(name, quick=asked.quick)
            found += outcome or []
            failed += [] if outcome else [name]
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        failed.append("interrupted")
    figures.publish(found, asked.json)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        return 2
    return 0 if all(each.ok is not False for each in found) else 1


def _one(name: str, *, quick: bool) -> list[Figure] | None:
    """The figures of one bench; None when it failed."""
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as scratch:
        file = Path(scratch) / "figures.json"
        argv = [sys.executable, str(FOLDER / f"{name}.py")]
        if name in ("sandboxes", "launch"):
            argv += ["--json", str(file), *(["--quick"] if quick else [])]
            _bounded(argv, (BOUND_QUICK_S if quick else BOUND_S)[name], None)
            if not file.exists():
                return None
            rows = json.loads(file.read_text())["figures"]
            return [Figure(**{key: value for key, value in row.items() if key != "ok"}) for row in rows]
        argv += ["--json", "--seconds", "1" if quick else "3"]
        with file.open("wb") as out:
            code = _bounded(argv, (BOUND_QUICK_S if quick else BOUND_S)[name], out)
        return _READ[name](json.loads(file.read_text())) if code == 0 else None


def _bounded(argv: list[str], within_s: float, stdout: Any) -> int:
    """Its exit code. Beyond `within_s`, or when we are interrupted, it gets a SIGINT and the time to clear up."""
    child = subprocess.Popen(argv, stdout=stdout or subprocess.DEVNULL)
    try:
        return child.wait(within_s)
    except subprocess.TimeoutExpired:
        print(f"{argv[1]}: not done within {within_s:.0f} s", file=sys.stderr)
        child.send_signal(signal.SIGINT)
        return child.wait(CLEAR_UP_S) or 1
    except KeyboardInterrupt:
        child.wait(CLEAR_UP_S)  # a Ctrl-C reaches it too
        raise


def _ingress(said: dict[str, Any]) -> list[Figure]:
    small = said["small"]
    rates = [Figure(f"proxy, small replies: {name}", row["requests_per_s"], "req/s") for name, row in small.items()]
    load = f"open loop, {said['open_loop']['rate_per_s']:.0f}/s"
    load += "" if said["load_kept_up"] else "; no result: the load did not keep up"
    return [
        *rates,
        Figure("proxy, small replies: ours / nginx", said["ratio_to_nginx"], "x", at_least=0.5),
        Figure("proxy, distinct heads: ours / nginx", said["ratio_to_nginx_distinct"], "x", at_least=0.5),
        *([_ratio(small, "haproxy")] if "haproxy" in small else []),
        Figure("proxy at half its capacity: added p99", said["added_p99_ms"], "ms", at_most=1.0, note=load),
        *(Figure(f"1 GiB through {name}", row["mb_per_s"], "MB/s") for name, row in said["download"].items()),
    ]


def _ratio(small: dict[str, Any], other: str) -> Figure:
    ratio = small["ours"]["requests_per_s"] / small[other]["requests_per_s"]
    return Figure(f"proxy, small replies: ours / {other}", ratio, "x")


def _store(said: dict[str, Any]) -> list[Figure]:
    lists = said["list_us"]
    return [
        Figure("store, 64 clients, NORMAL", said["writes_normal"]["per_s"], "/s", at_least=15_000.0),
        Figure("store, 64 clients, FULL", said["writes_full"]["per_s"], "/s"),
        Figure("store, commit to view, p50", said["watch_sqlite"]["view"]["p50_ms"], "ms", at_most=0.2),
        Figure("store, commit to view, p99", said["watch_sqlite"]["view"]["p99_ms"], "ms"),
        Figure("store, listing among 100,000 / 100", lists["among_100000"] / lists["among_100"], "x", at_most=1.5),
    ]


_READ = {"ingress": _ingress, "store": _store}


if __name__ == "__main__":
    sys.exit(main())
