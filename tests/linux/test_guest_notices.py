"""Notices and the sync of the disk in a real sandbox on template `base`: what its user sees, and cannot do."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
import pytest_asyncio
from tests.linux.launchlab import Lab
from tests.unit.guest.house import RunningGuest

from penstock.node.linux.base import build_base
from penstock.node.linux.guests import SocketGuests
from penstock.node.ports import Notice

pytestmark = [pytest.mark.root, pytest.mark.asyncio(loop_scope="module")]

T = TypeVar("T")
MARK = b"quiesce-writes-this-out-"
GUIDE = Path(__file__).parents[2] / "docs/guest.md"
WITHIN_S = 20.0


@dataclass
class House:
    guest: RunningGuest
    run_dir: str
    image: Path
    guests: SocketGuests
    epoch: int = 0

    async def notify(self, **facts: float | str) -> Notice:
        self.epoch += 1
        notice = Notice(epoch=self.epoch, reason="an upgrade", soft_by=1_800_000_000.0, hard_by=1_800_000_060.5)
        await self.guests.notify(self.run_dir, notice, within_s=WITHIN_S)
        return notice

    async def withdraw(self) -> None:
        await self.guests.notify(self.run_dir, Notice(epoch=self.epoch, withdrawn=True), within_s=WITHIN_S)

    async def sh(self, script: str, user: str = "user") -> str:
        got = await calling(lambda: self.guest.run("/bin/bash", "-c", script, user=user))
        assert got.error is None, got.error
        return got.stdout.decode() + got.stderr.decode()


async def calling(work: Callable[[], T]) -> T:
    return await asyncio.wait_for(asyncio.to_thread(work), 30)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("notices")
    lab = Lab(folder, "tnotice", guest="penstock.guest.main")
    lab.layer = build_base(str(folder / "layers")).path
    try:
        await lab.open()
        async with lab.sandbox("one") as opened:
            run_dir = opened.order.run_dir
            guest = RunningGuest(Path(run_dir), opened.process.pid, -1, None)
            yield House(guest, run_dir, Path(opened.order.disk.path), SocketGuests())
    finally:
        await lab.close()


async def test_programs_know_where_to_look_before_there_is_anything(house: House) -> None:
    assert await house.sh('echo "$PENSTOCK_NOTICE"') == "/run/penstock/notice.json\n"
    assert await house.sh("ls -A /run/penstock; stat -c '%U %a' /run/penstock /run") == "root 755\nroot 755\n"


async def test_the_notice_is_in_the_file_when_the_daemon_was_answered(house: House) -> None:
    notice = await house.notify()
    read = json.loads(await house.sh('cat "$PENSTOCK_NOTICE"'))
    assert read == {"epoch": house.epoch, "reason": "an upgrade", "soft_by": notice.soft_by, "hard_by": notice.hard_by}
    await house.withdraw()
    assert await house.sh('test -e "$PENSTOCK_NOTICE" || echo gone') == "gone\n"


async def test_a_user_cannot_fake_hide_or_move_it(house: House) -> None:
    attempts = (
        "echo {} > /run/penstock/notice.json",
        "echo {} > /run/penstock/other",
        "rm -f /run/penstock/notice.json",
        "mv /run/penstock/notice.json /tmp/",
        "mv /run/penstock /run/elsewhere",
        "rmdir /run/penstock",
        "ln -sfn /tmp /run/penstock",
        "mkdir /run/mine",
        "chmod 777 /run/penstock",
        "python3 -c \"import os; os.link('/etc/hostname', '/run/penstock/linked')\"",
    )
    await house.withdraw()
    for there in (False, True):
        if there:
            await house.notify()
        for attempt in attempts:
            done = await house.sh(f"({attempt}) 2>/dev/null; echo $?; ls -A /run/penstock")
            status = int(done.splitlines()[0])
            assert status != 0 or (attempt.startswith("rm -f") and not there), attempt
            assert done.splitlines()[1:] == (["notice.json"] if there else []), attempt
    assert json.loads(await house.sh('cat "$PENSTOCK_NOTICE"'))["epoch"] == house.epoch


async def test_the_user_cannot_speak_for_the_daemon(house: House) -> None:
    for path in ("notice", "quiesce"):
        ask = f"curl -s -o /dev/null -w '%{{http_code}}' -d '{{\"epoch\": 999}}' http://127.0.0.1:49983/{path}"
        assert await house.sh(ask) == "404"


async def test_not_even_a_trap_of_root_inside_is_followed(house: House) -> None:
    await house.sh("rm -rf /run/penstock; mkdir /tmp/trap; echo mine > /tmp/trap/notice.json", user="root")
    await house.sh("ln -s /tmp/trap /run/penstock", user="root")
    await house.notify()
    assert await house.sh("cat /tmp/trap/notice.json; stat -c %F /run/penstock") == "mine\ndirectory\n"
    await house.sh("rm /run/penstock/notice.json; ln -s /etc/hostname /run/penstock/notice.json", user="root")
    before = await house.sh("cat /etc/hostname")
    await house.notify()
    assert await house.sh("cat /etc/hostname") == before
    assert json.loads(await house.sh('cat "$PENSTOCK_NOTICE"'))["epoch"] == house.epoch


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(), re.DOTALL)


@pytest.mark.parametrize("language", ["bash", "python"])
async def test_the_guide_s_examples_do_what_it_says(house: House, language: str) -> None:
    (text,) = await asyncio.to_thread(examples, language)
    await house.withdraw()
    program = {"bash": ("/bin/bash", "-c", text), "python": ("/usr/bin/python3", "-u", "-c", text)}[language]
    running = await calling(lambda: house.guest.start(*program, user="user"))
    await calling(running.pid)
    await asyncio.sleep(0.3)
    await house.notify()
    said = await calling(lambda: running.until("stdout", b"\n"))
    assert b"an upgrade" in said
    while (event := await calling(running.event)) is not None:
        ended = event.get("end", {})
    assert ended["status"] == "exit status 0"


async def test_what_was_written_is_on_the_disk_after_a_quiesce(house: House) -> None:
    name = MARK + os.urandom(8).hex().encode()
    await house.sh(f"printf %s {name.decode()} > ~/written; sync ~/written")
    assert not await asyncio.to_thread(holds, house.image, name), "sync inside does something: quiesce is not needed"
    assert await house.guests.quiesce(house.run_dir, within_s=WITHIN_S) > 0
    assert await asyncio.to_thread(holds, house.image, name)


def holds(image: Path, text: bytes) -> bool:
    return text in image.read_bytes()


async def test_the_disk_is_out_of_reach_of_the_user(house: House) -> None:
    """The guest keeps it open; root inside has the guest's uid and yet may not look at its descriptors."""
    for user in ("user", "root"):
        assert "Permission denied" in await house.sh("ls /proc/1/fd", user=user)
        held = await house.sh("ls -l /proc/self/fd", user=user)
        assert held.count("->") == 4, held
