"""Claims of slots, ids and addresses: no two installations of a host overlap, and what is stale is given away."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from penstock.model.errors import Conflict, Invalid
from penstock.node.linux.claims import UID_END, UID_FIRST, Block, Claims, HostFull

NETWORK = "10.201.0.0/16"


def data_of(folder: Path, name: str) -> str:
    data = folder / "data" / name
    data.mkdir(parents=True, exist_ok=True)
    (data / "installation").write_text(name + "\n")
    return str(data)


class Host:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.living: set[str] = set()
        self.claims = Claims(str(folder / "run"), in_use=lambda name: name in self.living)

    def claim(self, name: str, *, slots: int = 100, network: str = NETWORK) -> Block:
        return self.claims.claim_block(name, data=data_of(self.folder, name), slots=slots, network=network)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def uids(block: Block) -> set[range]:
    return {range(block.uid_base(number), block.uid_base(number) + 65_536) for number in (0, block.count - 1)}


def test_blocks_do_not_overlap(host: Host) -> None:
    one, two = host.claim("one000"), host.claim("two000", slots=3000)
    assert (one.count, two.count) == (1024, 3072)
    assert one.uid_base(one.count - 1) + 65_536 <= two.uid_base(0)
    assert one.uid_first >= UID_FIRST
    assert two.uid_base(two.count - 1) + 65_536 <= UID_END
    assert {one.address(n) for n in one.numbers}.isdisjoint(two.address(n) for n in two.numbers)
    assert set(one.uplink_addresses).isdisjoint(two.uplink_addresses)
    assert one.address(0) == "10.201.0.1"
    assert one.uplink_addresses == ("10.201.252.0", "10.201.252.1")


def test_addresses_name_their_slot(host: Host) -> None:
    host.claim("one000")
    block = host.claim("two000")
    assert [block.number_at(block.address(number)) for number in (0, 1023)] == [0, 1023]
    assert block.number_at("10.201.0.1") is None


def test_the_same_installation_keeps_its_block(host: Host) -> None:
    host.claim("one000")
    two = host.claim("two000")
    host.claims.release("one000")
    assert host.claim("two000") == two
    assert host.claim("three0").first_slot == 0


def test_a_claim_whose_folder_is_gone_is_given_away_unless_something_lives(host: Host) -> None:
    host.claim("one000")
    shutil.rmtree(host.folder / "data/one000")
    host.living.add("one000")
    assert host.claim("two000").first_slot == 1024
    host.living.clear()
    assert host.claim("three0").first_slot == 0


def test_a_copied_folder_is_noticed(host: Host) -> None:
    host.claim("one000")
    copy = host.folder / "copy"
    shutil.copytree(host.folder / "data/one000", copy)
    with pytest.raises(Conflict, match="same installation id"):
        host.claims.claim_block("one000", data=str(copy), slots=10, network=NETWORK)


def test_a_moved_folder_keeps_its_block(host: Host) -> None:
    host.claim("zero00")
    block = host.claim("one000")
    (host.folder / "data/one000").rename(host.folder / "moved")
    assert host.claims.claim_block("one000", data=str(host.folder / "moved"), slots=10, network=NETWORK) == block


def test_a_full_host_says_so(host: Host) -> None:
    host.claim("one000", slots=28 * 1024)
    with pytest.raises(HostFull, match="28 of 28"):
        host.claim("two000")


def test_networks_are_judged(host: Host) -> None:
    with pytest.raises(Invalid, match="too small"):
        host.claim("one000", network="10.201.0.0/22")
    with pytest.raises(Invalid):
        host.claim("one000", network="10.201.0.1/16")
    assert host.claim("one000", network="10.201.0.0/21").count == 1024
    with pytest.raises(HostFull):
        host.claim("two000", network="10.201.0.0/21")


def test_many_at_once_get_different_blocks(host: Host) -> None:
    found: list[Block] = []
    threads = [threading.Thread(target=lambda i=i: found.append(host.claim(f"inst{i:02d}"))) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({block.first_slot for block in found}) == 12


def test_claims_that_come_and_go_at_once_never_collide_and_leave_nothing(host: Host) -> None:
    failures: list[Exception] = []

    def come_and_go(name: str) -> None:
        data = data_of(host.folder, name)
        try:
            for _ in range(50):
                host.claims.claim_block(name, data=data, slots=10, network=NETWORK)
                host.claims.release(name)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=come_and_go, args=(f"i{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not (host.folder / "run").exists()
