"""The daemon is killed at every write to its records, one after the other, and started again: it adopts or undoes.

A step (create, park, kill, ...) is begun again and again, and the daemon dies at its first write, its second, and so on
until the step is through with none left to die at. After each death the host is looked at, not Penstock's word: nobody
who was ready has lost its first process or its command, what was being made or removed is whole or gone, and nothing
exists that belongs to nobody. The moments (before the write, in the middle of it, after it) take turns;
`PENSTOCK_TEST_ALL_MOMENTS=1` dies at all three of each write.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import httpx
import pytest
from tests.crashing import Crashing, end_forking
from tests.sandboxes import Box, create, eventually

from penstock.run.children import start_ticks
from penstock.run.leaks import look

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]

MOMENTS = ("before", "torn", "after")
ALL_MOMENTS = bool(os.environ.get("PENSTOCK_TEST_ALL_MOMENTS"))
UNLINKING = {"start-up", "park", "kill", "drain"}
WRITES_MAX = 60  # of one step; it has far fewer
QUIET_S = 0.25  # after a step the pools write for 0.1 s
MARK = "/home/user/mark"
TICKING = """exec python3 -uc 'import time
while True: print(end=".", file=open("ticks", "a")); time.sleep(0.05)'"""


class World:
    """One installation, a witness that runs through it all, and a subject that the steps are about."""

    def __init__(self, one: Crashing) -> None:
        self.one = one
        name = (one.data / "installation").read_text().strip()
        self.cgroups = Path("/sys/fs/cgroup/pids") / f"penstock-{name}"
        self.witness = create(one, timeout=3600)
        self.command = self.witness.sdk.commands.run(TICKING, background=True, timeout=0)
        eventually(lambda: self.witness.sdk.files.exists("ticks"))
        self.was = self.processes(self.witness.id)
        self.ticks = 0
        self.subject: Box | None = None
        self.subject_was = ""  # its first process when the step began

    # ---- orders, any of which may be the daemon's last

    def order(self, method: str, path: str, body: object = None, *, admin: bool = False) -> httpx.Response | None:
        """None: the daemon died over it."""
        env = self.one.env
        token = (self.one.data / "admin-token").read_text().strip()
        headers = {"X-Admin-Token": token} if admin else {"X-API-Key": env["E2B_API_KEY"]}
        try:
            return httpx.request(method, env["E2B_API_URL"] + path, json=body, headers=headers, timeout=30)
        except httpx.HTTPError:
            assert self.one.armed, f"{method} {path} was cut off, and the daemon was not to die"
            return None

    def about(self, method: str, what: str = "", body: object = None) -> httpx.Response | None:
        assert self.subject is not None
        return self.order(method, f"/sandboxes/{self.subject.id}{what}", body)

    def told(self) -> dict[str, str]:
        """Sandbox to state, running or paused, as the API has it."""
        reply = must(self.order("GET", "/v2/sandboxes?state=running,paused"))
        return {each["sandboxID"]: each["state"] for each in reply.json()}

    # ---- the subject, in the state that a step begins with

    def running(self) -> None:
        state = self.told().get(self.subject.id) if self.subject is not None else None
        if state == "paused":
            must(self.about("POST", "/connect", {"timeout": 3600}))
        elif state is None:
            self.subject = create(self.one, timeout=3600)
            self.subject.sdk.files.write(MARK, self.subject.id)
        assert self.subject is not None
        assert self.subject.sdk.files.read(MARK) == self.subject.id, "what it had written is lost"
        self.subject_was = self.processes(self.subject.id)[0]

    def frozen(self) -> None:
        self.running()
        must(self.about("POST", "/pause"))

    def parked(self) -> None:
        self.running()
        must(self.about("POST", "/pause", {"memory": False}))

    def absent(self) -> None:
        for sandbox in self.told():
            if sandbox != self.witness.id:
                must(self.order("DELETE", f"/sandboxes/{sandbox}"))
        self.subject = None

    def alone(self) -> None:
        """On a node that takes sandboxes again, and without the witness, which a drain would end."""
        if self.was:
            self.was = []
            must(self.order("DELETE", f"/sandboxes/{self.witness.id}"))
        undrained = self.order("POST", "/nodes/local/undrain", admin=True)
        assert undrained is not None and undrained.status_code in (200, 409), undrained and undrained.text
        self.running()

    # ---- what must hold, as the host sees it

    def well(self, *, same_process: bool) -> None:
        """The witness goes on, every sandbox is whole or gone, and nothing is nobody's."""
        if self.was:
            assert self.processes(self.witness.id) == self.was, "the witness was harmed"
            self.ticks = eventually(self._more_ticks, what="the witness's command")
        if same_process:
            assert self.subject is not None
            assert self.processes(self.subject.id)[0] == self.subject_was, "the subject was harmed"
        differing: list[object] = []
        with suppress(AssertionError):
            eventually(lambda: not differing.__setitem__(slice(None), self._differing()) and not differing)
        assert differing == []
        assert look(self.one.data) == []

    def processes(self, sandbox: str) -> list[str]:
        """Pid and start time of each, its first one first."""
        pids: list[str] = []
        for name in ("cgroup.procs", "user/cgroup.procs"):
            with suppress(OSError):
                pids += (self.cgroups / f"sb-{sandbox}" / name).read_text().split()
        return [f"{pid} {ticks}" for pid in pids if (ticks := start_ticks(int(pid)))]

    def _more_ticks(self) -> int:
        size = os.stat(f"/proc/{self.was[0].split()[0]}/root/home/user/ticks").st_size
        return size if size > self.ticks else 0

    def _differing(self) -> list[object]:
        """In what the API and the host are not of one mind."""
        told = self.told()
        frozen = {one for one in told if self.processes(one) and self._is_frozen(one)}
        images = list((self.one.data / "disks/.kept").glob("*.img"))
        alive = {one for one, state in told.items() if state == "running"} | frozen
        return [
            *((one, "paused, yet running") for one in frozen if told[one] != "paused"),
            *((one, "paused, and nowhere") for one in told.keys() - alive if not images),
            *((one, "has no process") for one in alive if not self.processes(one)),
            *((one, "should have nothing, or have it") for one in alive ^ self._everybody()),
        ]

    def _is_frozen(self, sandbox: str) -> bool:
        here = f"{self.cgroups.name}/sb-{sandbox}"
        for path, word in ((f"unified/{here}/cgroup.events", "frozen 1"), (f"{here}/cgroup.events", "frozen 1")):
            with suppress(OSError):
                return word in Path("/sys/fs/cgroup", path).read_text()
        return "FROZEN" in Path("/sys/fs/cgroup/freezer", here, "freezer.state").read_text()

    def _everybody(self) -> set[str]:
        """All of whom the host has a cgroup, a record or a run folder."""
        found = {path.name.removeprefix("sb-") for path in self.cgroups.glob("sb-*")}
        found |= {path.stem for path in (self.one.data / "records").glob("i*.log")}
        return found | {path.name for path in (self.one.data / "run/sb").iterdir()}


def must(reply: httpx.Response | None) -> httpx.Response:
    assert reply is not None and reply.is_success, reply and reply.text
    return reply


# ---- the steps


@dataclass(frozen=True)
class Step:
    begin: Callable[[World], None]
    act: Callable[[World], object]
    same_process: bool = False  # whatever happens, the subject's first process is the one it was


def start_up(world: World) -> None:
    world.one.kill()
    world.one.up()


def make(world: World) -> None:
    world.order("POST", "/v2/sandboxes", {"templateID": "base", "timeout": 3600})


def drain(world: World) -> None:
    assert world.subject is not None
    place, order = world.cgroups / f"sb-{world.subject.id}", {"yes": True, "softS": 0, "hardS": 15}
    if world.order("POST", "/nodes/local/drain", order, admin=True) is not None:
        eventually(lambda: world.one.left == 0 or not place.exists(), what="the end of who is drained")


STEPS = {
    "start-up": Step(World.running, start_up, same_process=True),
    "create": Step(World.absent, make),
    "network": Step(
        World.running, lambda world: world.about("PUT", "/network", {"denyOut": ["8.8.8.8"]}), same_process=True
    ),
    "freeze": Step(World.running, lambda world: world.about("POST", "/pause"), same_process=True),
    "thaw": Step(World.frozen, lambda world: world.about("POST", "/connect", {"timeout": 3600}), same_process=True),
    "checkpoint": Step(World.running, lambda world: world.about("POST", "/snapshots", {}), same_process=True),
    "park": Step(World.running, lambda world: world.about("POST", "/pause", {"memory": False})),
    "resume": Step(World.parked, lambda world: world.about("POST", "/connect", {"timeout": 3600})),
    "kill": Step(World.running, lambda world: world.about("DELETE")),
    "drain": Step(World.alone, drain),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    data = Path(tmp_path_factory.mktemp("failpoints")) / "data"
    data.mkdir()
    (data / "penstock.toml").write_text("slots_ready = 1\nslots_max = 16\n")
    one = Crashing(data)
    try:
        one.up()
        yield World(one)
    finally:
        one.disarm()
        one.destroy()
        end_forking()


@pytest.mark.parametrize("name", STEPS)
def test_a_daemon_that_dies_at_any_write_of_it_loses_and_leaks_nothing(world: World, name: str) -> None:
    step, deaths = STEPS[name], len(world.one.died_at)
    for number in count(1):
        assert number < WRITES_MAX, "it dies over and over"
        died = [_dies(world, step, number, moment) for moment in _moments(number)]
        if not all(died):
            break
    print(name, *world.one.died_at[deaths:], sep="\n  ")
    assert ("unlink" in " ".join(world.one.died_at[deaths:])) is (name in UNLINKING)


def _moments(number: int) -> tuple[str, ...]:
    return MOMENTS if ALL_MOMENTS else (MOMENTS[number % 3],)


def _dies(world: World, step: Step, number: int, moment: str) -> bool:
    """Whether the step has that many writes. Either way the daemon is up afterwards, and all is well."""
    step.begin(world)
    world.one.arm(number, moment)
    step.act(world)
    died = world.one.dies(QUIET_S)
    world.one.disarm()
    if died:
        world.one.up()
    world.well(same_process=step.same_process)
    return died
