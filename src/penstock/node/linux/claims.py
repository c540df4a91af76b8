"""Which installation of this host holds which slots, user ids and addresses.

All claims of a host are files in one folder under one lock, so two installations can neither start on the same range
nor clear away each other's. The folder lies on a file system that a reboot empties, as a reboot empties the kernel.
A claim is stale when its data folder is gone and nothing of it runs; then its range is free again.
"""

from __future__ import annotations

import fcntl
import glob
import ipaddress
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from penstock.core.errors import Kind, PenstockError
from penstock.model.errors import Conflict, Invalid

FOLDER_DEFAULT: Final = "/run/penstock"
SLOTS_PER_BLOCK: Final = 1024
UIDS_PER_SLOT: Final = 65_536
# Below: users of the host and the usual /etc/subuid ranges. Above: `ping_group_range` ends at 2^31 - 1.
UID_FIRST: Final = 0x1000_0000
UID_END: Final = 0x8000_0000
_BLOCKS: Final = (UID_END - UID_FIRST) // (UIDS_PER_SLOT * SLOTS_PER_BLOCK)  # 28
_PREFIX_MAX: Final = 21  # a smaller network has no room for one block and the router's own addresses


class HostFull(PenstockError):
    """Raised by `claim_block`: the other installations of this host hold every range."""

    kind = Kind.EXHAUSTED
    code = "host_full"


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """What one installation may use. Slots are numbered from 0 within it; the rest of the host never sees numbers."""

    first_slot: int  # the host-wide number of our slot 0
    count: int
    network: str  # the configured CIDR that addresses are taken from

    @property
    def numbers(self) -> range:
        return range(self.count)

    @property
    def uid_first(self) -> int:
        return self.uid_base(0)

    def uid_base(self, number: int) -> int:
        """The first of the 65,536 host ids of a slot."""
        assert 0 <= number < self.count, f"slot {number} is outside of this installation's block"
        return UID_FIRST + (self.first_slot + number) * UIDS_PER_SLOT

    def address(self, number: int) -> str:
        """The outer address of a slot."""
        assert 0 <= number < self.count, f"slot {number} is outside of this installation's block"
        return str(ipaddress.IPv4Network(self.network)[1 + self.first_slot + number])

    def number_at(self, address: str) -> int | None:
        """The slot of an outer address, or None when it is not of this block."""
        base = int(ipaddress.IPv4Network(self.network)[1 + self.first_slot])
        number = int(ipaddress.IPv4Address(address)) - base
        return number if 0 <= number < self.count else None

    @property
    def uplink_addresses(self) -> tuple[str, str]:
        """(host's, router's): a /31 of the last 1,024 addresses, which no slot uses; one per block of the host."""
        network = ipaddress.IPv4Network(self.network)
        first = network.num_addresses - SLOTS_PER_BLOCK + 2 * (self.first_slot // SLOTS_PER_BLOCK)
        return str(network[first]), str(network[first + 1])


class _Claim(msgspec.Struct, frozen=True, kw_only=True):
    installation: str
    data: str
    pid: int
    first_slot: int
    count: int
    network: str
    forwarding_set: str = ""  # the host's link whose forwarding we switched on


class Claims:
    """The claims of this host, kept in `folder`. `in_use(installation)` tells whether anything of it still runs."""

    def __init__(self, folder: str = FOLDER_DEFAULT, *, in_use: Callable[[str], bool] | None = None) -> None:
        self._folder = Path(folder)
        self._in_use = in_use or has_cgroups

    def claim_block(
        self, installation: str, *, data: str, slots: int, network: str, avoid: Sequence[Block] = ()
    ) -> Block:
        """This installation's block: the one it has, or a free one of at least `slots` slots; none of `avoid`.

        `data` is its data folder. Raises HostFull, Invalid (the network is too small), or Conflict when another
        living data folder carries the same installation id (a copied folder).
        """
        room = blocks_in(network)
        wanted = -(-slots // SLOTS_PER_BLOCK)
        with self.locked():
            claims = self._read_all()
            mine = claims.pop(installation, None)
            if mine is not None and mine.data != data and _is_data_of(mine.data, installation):
                raise Conflict(
                    "two data folders carry the same installation id",
                    which=data,
                    why=f"{mine.data} uses it",
                    now=f"stop that one, or remove the file {data}/installation of a copy",
                )
            fits = mine is not None and mine.count >= slots and mine.network == network
            if mine is not None and fits and _block(mine) not in avoid:
                self._write(msgspec.structs.replace(mine, data=data, pid=os.getpid()))
                return _block(mine)
            for name, claim in list(claims.items()):
                if self._is_stale(claim):
                    self._path(name).unlink(missing_ok=True)
                    del claims[name]
            ranges = [_blocks_of(claim) for claim in claims.values()] + [_blocks_of(block) for block in avoid]
            taken = {number for numbers in ranges for number in numbers} | _foreign_blocks()
            first = _first_free(taken, wanted, min(room, _BLOCKS))
            if first is None:
                raise HostFull(
                    "no range of slots, ids and addresses is free",
                    which=installation,
                    why=f"{len(taken)} of {min(room, _BLOCKS)} blocks are taken and {wanted} are needed in a row",
                    now="destroy another installation, ask for fewer slots, or set a larger network",
                )
            claim = _Claim(
                installation=installation,
                data=data,
                pid=os.getpid(),
                first_slot=first * SLOTS_PER_BLOCK,
                count=wanted * SLOTS_PER_BLOCK,
                network=network,
            )
            self._write(claim)
            return _block(claim)

    def block_of(self, installation: str) -> Block | None:
        """The block an installation has, only looked at: no lock (claims are replaced whole), nothing made."""
        try:
            return _block(msgspec.json.decode(self._path(installation).read_bytes(), type=_Claim))
        except FileNotFoundError:
            return None

    def installation_at(self, data: str) -> str | None:
        """Whose claim names `data` as its data folder, only looked at."""
        return next((claim.installation for claim in self._read_all().values() if claim.data == data), None)

    def installations_at(self, data: str) -> list[str]:
        """Every installation whose claim names `data`, only looked at: one, unless its id was changed."""
        return [claim.installation for claim in self._read_all().values() if claim.data == data]

    def release(self, installation: str) -> None:
        """Give the block back. Absent is success."""
        with self.locked():
            self._path(installation).unlink(missing_ok=True)
            self._tidy()

    def note_forwarding(self, installation: str, link: str) -> None:
        """Remember that we switched `link`'s forwarding on. Call within `locked()`."""
        claim = self._read_all().get(installation)
        if claim is not None:
            self._write(msgspec.structs.replace(claim, forwarding_set=link))

    def forwarding_of(self, installation: str) -> tuple[str, bool]:
        """(the link whose forwarding we switched on or "", whether another installation relies on it too).

        Call within `locked()`.
        """
        claims = self._read_all()
        mine = claims.pop(installation, None)
        link = mine.forwarding_set if mine else ""
        return link, any(other.forwarding_set == link for other in claims.values())

    def another_set(self, link: str) -> bool:
        """Whether some installation switched `link`'s forwarding on. Call within `locked()`."""
        return any(claim.forwarding_set == link for claim in self._read_all().values())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the host. Short sections only: every installation waits for it."""
        fd = self._take_lock()
        try:
            yield
        finally:
            os.close(fd)

    def _take_lock(self) -> int:
        path = self._folder / "host.lock"
        while True:
            try:
                os.makedirs(self._folder, mode=0o700, exist_ok=True)
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except (FileNotFoundError, FileExistsError):
                continue  # the last release took the folder away meanwhile
            fcntl.flock(fd, fcntl.LOCK_EX)
            # The last release unlinks the file: whoever waited for it then holds a lock that nobody else can see.
            if _is_at(fd, path):
                (self._folder / "claims").mkdir(mode=0o700, exist_ok=True)
                return fd
            os.close(fd)

    def _tidy(self) -> None:
        """Leave nothing on the host when the last claim is gone. Call within `locked()`, as its last act."""
        try:
            (self._folder / "claims").rmdir()
            (self._folder / "host.lock").unlink(missing_ok=True)
            self._folder.rmdir()
        except OSError:
            pass  # Safe: others have claims, or files of theirs in it.

    def _is_stale(self, claim: _Claim) -> bool:
        return not _is_data_of(claim.data, claim.installation) and not self._in_use(claim.installation)

    def _path(self, installation: str) -> Path:
        return self._folder / "claims" / f"{installation}.json"

    def _read_all(self) -> dict[str, _Claim]:
        found: dict[str, _Claim] = {}
        for path in sorted((self._folder / "claims").glob("*.json")):
            claim = msgspec.json.decode(path.read_bytes(), type=_Claim)
            found[claim.installation] = claim
        return found

    def _write(self, claim: _Claim) -> None:
        path = self._path(claim.installation)
        draft = path.with_suffix(".new")
        draft.write_bytes(msgspec.json.encode(claim))
        draft.rename(path)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def has_cgroups(installation: str) -> bool:
    """Whether a sandbox's cgroup of this installation exists on the host."""
    return any(glob.glob(f"/sys/fs/cgroup{depth}/penstock-{installation}/sb-*") for depth in ("", "/*"))


def _block(claim: _Claim) -> Block:
    return Block(first_slot=claim.first_slot, count=claim.count, network=claim.network)


def _blocks_of(claim: _Claim | Block) -> range:
    first = claim.first_slot // SLOTS_PER_BLOCK
    return range(first, first + -(-claim.count // SLOTS_PER_BLOCK))


def blocks_in(network: str) -> int:
    """How many blocks fit into `network`. Raises Invalid when it is not one, or has no room for any."""
    try:
        parsed = ipaddress.IPv4Network(network)
    except ValueError as bad:
        raise Invalid("network_cidr", str(bad), now="write it as 10.201.0.0/16") from None
    if parsed.prefixlen > _PREFIX_MAX:
        raise Invalid("network_cidr", f"{network} is too small", now=f"use a prefix of at most /{_PREFIX_MAX}")
    return parsed.num_addresses // SLOTS_PER_BLOCK - 1


def _first_free(taken: set[int], wanted: int, room: int) -> int | None:
    for first in range(room - wanted + 1):
        if taken.isdisjoint(range(first, first + wanted)):
            return first
    return None


def _is_data_of(data: str, installation: str) -> bool:
    try:
        return (Path(data) / "installation").read_text().strip() == installation
    except OSError:
        return False


def _foreign_blocks() -> set[int]:
    """Blocks whose ids the administrator gave to somebody in /etc/subuid or /etc/subgid."""
    span = UIDS_PER_SLOT * SLOTS_PER_BLOCK
    taken: set[int] = set()
    for table in ("/etc/subuid", "/etc/subgid"):
        try:
            lines = Path(table).read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            fields = line.split(":")
            if len(fields) == 3 and fields[1].isdecimal() and fields[2].isdecimal():
                first, count = int(fields[1]), int(fields[2])
                if count and first < UID_END and first + count > UID_FIRST:
                    low = max(first - UID_FIRST, 0) // span
                    taken.update(range(low, min((first + count - 1 - UID_FIRST) // span, _BLOCKS) + 1))
    return taken
