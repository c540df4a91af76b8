"""A launch that does not succeed leaves nothing: no process, mount, loop device, socket or descriptor."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio
from tests.linux.launchlab import Lab, children_of, make_layer

from penstock.core.deadlines import DeadlinePassed
from penstock.model.errors import LaunchFailed, Unavailable
from penstock.node.linux.zygote_client import ZygoteClient
from penstock.node.ports import LaunchOrder

pytestmark = [pytest.mark.root, pytest.mark.asyncio(loop_scope="module")]
STEPS = (
    *("dev", "cgroups", "disk", "etc", "layers", "overlay", "proc", "network", "sys", "attach", "masks"),
    *("boot_id", "names", "pivot", "session", "userns", "ids", "seccomp", "capabilities", "rlimits", "tidy", "guest"),
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    folder = tmp_path_factory.mktemp("launch")
    made = Lab(folder, "tfail")
    made.layer = make_layer(folder / "layer")
    try:
        await made.open()
        yield made
    finally:
        await made.close()


async def gone(lab: Lab, order: LaunchOrder) -> None:
    """Nothing of the launch is left before anybody cleans up; and after the clean-up nothing of the sandbox is."""
    assert lab.zygote is not None
    assert children_of(lab.zygote.pid) == []
    assert lab.cgroups.pids(order.cgroup) == []
    assert os.listdir(order.run_dir) == []
    await lab.end(order)
    assert {kind: found for kind, found in lab.traces().items() if found} == {}


async def launch(lab: Lab, order: LaunchOrder) -> None:
    process = await lab.launcher.launch(order, within_s=20)
    process.close()


@pytest.mark.parametrize("step", STEPS)
async def test_a_step_that_fails_is_named_and_leaves_nothing(lab: Lab, step: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    order = await lab.order("failing", env={"FAIL": step})
    with pytest.raises(LaunchFailed, match=f"made to fail at {step}") as failed:
        await launch(lab, order)
    assert failed.value.step == step
    await gone(lab, order)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("how", "why"), [("serve", "told to fail"), ("exit", "without a word"), ("crash", "a word")])
async def test_a_guest_that_fails_before_it_serves(lab: Lab, how: str, why: str) -> None:
    order = await lab.order("failing", env={"FAIL": how})
    with pytest.raises(LaunchFailed, match=why) as failed:
        await launch(lab, order)
    assert failed.value.step == "guest"
    await gone(lab, order)


async def test_a_guest_that_never_gets_ready_is_killed_at_the_deadline(lab: Lab) -> None:
    order = await lab.order("hanging", env={"FAIL": "hang"})
    with pytest.raises(DeadlinePassed, match="launch of hanging"):
        await lab.launcher.launch(order, within_s=0.5)
    await gone(lab, order)


@pytest.mark.parametrize("after_ms", [0, 1, 2, 4, 8, 16, 32, 100])
async def test_a_cancelled_launch_is_undone_before_the_cancellation_goes_on(lab: Lab, after_ms: int) -> None:
    order = await lab.order("cancelled", env={"FAIL": "hang"})
    launching = asyncio.ensure_future(lab.launcher.launch(order, within_s=20))
    await asyncio.sleep(after_ms / 1000)
    launching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await launching
    await gone(lab, order)


async def test_an_order_that_cannot_be_packed(lab: Lab) -> None:
    order = await lab.order("unpacked")
    with pytest.raises(LaunchFailed, match="No such file") as failed:
        await launch(lab, msgspec.structs.replace(order, layers=["/nowhere/at/all"]))
    assert failed.value.step == "pack"
    await gone(lab, order)


async def test_descriptors_of_the_wrong_kind(lab: Lab) -> None:
    order = await lab.order("mixed")
    slot = msgspec.structs.replace(order.slot, netns_fd=order.slot.userns_fd)
    with pytest.raises(LaunchFailed) as failed:
        await launch(lab, msgspec.structs.replace(order, slot=slot))
    assert failed.value.step == "network"
    slot = msgspec.structs.replace(order.slot, userns_fd=order.slot.netns_fd)
    with pytest.raises(LaunchFailed) as failed:
        await launch(lab, msgspec.structs.replace(order, slot=slot))
    assert failed.value.step == "disk"
    await gone(lab, order)


async def test_a_cgroup_that_is_gone(lab: Lab) -> None:
    order = await lab.order("homeless")
    await lab.cgroups.remove(order.cgroup, within_s=5)
    with pytest.raises(LaunchFailed, match="No such file") as failed:
        await launch(lab, order)
    assert failed.value.step == "pack"
    await gone(lab, order)


@pytest.mark.parametrize("_round", range(8))  # the child may die before or after the zygote hears of it
async def test_a_launcher_that_dies_takes_its_half_made_child_along(lab: Lab, _round: int) -> None:
    """The child finds nobody to tell that it is ready, and does not begin. The zygote serves on."""
    order = await lab.order("orphan")
    baggage = lab.launcher._pack(order, "boot")
    line = await lab.client.connect()
    line.send({"op": "launch", "luggage": baggage.luggage}, baggage.fds)
    baggage.close()
    line.close()
    os.close(await lab.client.create_userns(1 << 20))  # answered in order: the clone has been made by now
    assert lab.zygote is not None
    until = time.monotonic() + 10
    while lab.cgroups.pids(order.cgroup) or children_of(lab.zygote.pid):
        assert time.monotonic() < until
        await asyncio.sleep(0.01)
    await lab.end(order)


async def test_without_a_zygote(lab: Lab) -> None:
    """Last but one in this file."""
    order = await lab.order("early")
    launcher = lab.launcher
    launcher._client = ZygoteClient(str(lab.folder / "run/none.sock"), replaced_s=0.1)
    try:
        with pytest.raises(LaunchFailed, match="does not answer") as failed:
            await launch(lab, order)
        with pytest.raises(Unavailable):
            await launcher._client.create_userns(1 << 20)
    finally:
        launcher._client = lab.client
    assert failed.value.step == "zygote"
    await gone(lab, order)
    assert not await ZygoteClient(str(lab.folder / "run/none.sock")).answers(within_s=1)


async def test_a_zygote_that_dies_in_a_launch(lab: Lab) -> None:
    """Last in this file: it kills the zygote. The child lives on without parent, hence is killed as an orphan."""
    order = await lab.order("orphaned", env={"FAIL": "hang"})
    launching = asyncio.ensure_future(lab.launcher.launch(order, within_s=1.5))
    await asyncio.sleep(0.4)
    assert lab.zygote is not None
    lab.zygote.kill()
    lab.zygote.wait()
    with pytest.raises(DeadlinePassed):
        await launching
    assert lab.cgroups.pids(order.cgroup) == []
    await lab.end(order)
