"""Launching /bin/true: Penstock against runc and bubblewrap, in the same run, on the same root file system.

    .venv/bin/python bench/launch.py [--quick] [--json FILE]

All three start from the layer of template `base`. runc and bubblewrap mount it read-only, run the program and clear up
in one command, which is what a user would type: what is timed is that command. Penstock is timed from a raw create to
the end of /bin/true in the new sandbox (which has a disk, a network, limits and a guest that the others lack), and
once more with the kill. Rounds alternate, so that a busy machine is busy for all.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import figures
import house
from caller import Api, Guest
from figures import Figure, quantile

ROUNDS = 60
ROUNDS_QUICK = 12
PART_S = 40.0


def main() -> None:
    asked = figures.options(__doc__).parse_args()
    with house.installation() as home, tempfile.TemporaryDirectory(prefix="penstock-bench-") as scratch:
        layer = _layer(home)
        contenders: dict[str, Callable[[], None]] = {}
        if shutil.which("runc"):
            contenders["runc"] = _runc(Path(scratch), layer)
        if shutil.which("bwrap"):
            contenders["bubblewrap"] = _bwrap(layer)
        found = _measure(home, contenders, ROUNDS_QUICK if asked.quick else ROUNDS)
    figures.publish(found, asked.json)


def _measure(home: house.Installation, contenders: dict[str, Callable[[], None]], rounds: int) -> list[Figure]:
    api = Api(home.env)
    took: dict[str, list[float]] = {name: [] for name in (*contenders, "ours", "ours, with the kill")}
    until = time.monotonic() + PART_S
    for number in range(rounds + 1):
        if time.monotonic() > until:
            break
        began = time.perf_counter()
        made = api.create()
        guest = Guest(home.env, made)
        guest.run("/bin/true")
        ran = time.perf_counter()
        guest.close()
        api.kill(made["sandboxID"])
        ended = time.perf_counter()
        one_round = {"ours": ran - began, "ours, with the kill": ended - began}
        for name, launch in contenders.items():
            began = time.perf_counter()
            launch()
            one_round[name] = time.perf_counter() - began
        if number:  # the first round warms
            for name, seconds in one_round.items():
                took[name].append(seconds * 1000)
    api.close()
    note = f"n={len(took['ours'])}"
    found = [
        Figure(f"launch /bin/true: {name}, p50", quantile(each, 0.5), "ms", note=note) for name, each in took.items()
    ]
    ours = quantile(took["ours"], 0.5)
    return found + [
        Figure(f"launch /bin/true: {name} / ours", quantile(took[name], 0.5) / ours, "x", note=note)
        for name in contenders
    ]


def _layer(home: house.Installation) -> Path:
    """The layer of `base`: the only one of a fresh installation."""
    (layer,) = (home.data / "layers").glob("*/tree")
    return layer


def _runc(scratch: Path, layer: Path) -> Callable[[], None]:
    """What `runc spec` proposes, with our program, our root and no terminal."""
    subprocess.run(["runc", "spec"], cwd=scratch, check=True)
    config = json.loads((scratch / "config.json").read_text())
    config["process"] |= {"terminal": False, "args": ["/bin/true"]}
    config["root"] = {"path": str(layer), "readonly": True}
    (scratch / "config.json").write_text(json.dumps(config))
    argv = ["runc", "--root", f"{scratch}/state", "run", "--bundle", str(scratch), f"penstock-bench-{os.getpid()}"]
    return lambda: _run(argv)


def _bwrap(layer: Path) -> Callable[[], None]:
    argv = ["bwrap", "--ro-bind", str(layer), "/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    return lambda: _run([*argv, "--unshare-all", "--die-with-parent", "/bin/true"])


def _run(argv: list[str]) -> None:
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=30)


if __name__ == "__main__":
    main()
