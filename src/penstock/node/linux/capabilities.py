"""What root inside a sandbox may do, beyond what its user namespace already forbids.

All of these count in the sandbox's own user namespace only, which owns no mount, network, pid or uts namespace.
Dropping the rest from the bounding set takes away kernel code that no package manager, compiler or server needs.
"""

from __future__ import annotations

from typing import Final

from penstock.node.linux import syscalls

# Numbers from include/uapi/linux/capability.h.
KEPT: Final[dict[str, int]] = {
    "chown": 0,
    "dac_override": 1,
    "fowner": 3,
    "fsetid": 4,
    "kill": 5,
    "setgid": 6,
    "setuid": 7,
    "setpcap": 8,
    "net_bind_service": 10,
    "net_raw": 13,  # so that `ping` with this file capability can be executed; the network namespace is not its own
    "sys_chroot": 18,
    "mknod": 27,  # fifos and sockets by tar and dpkg; devices are refused outside the initial namespace
    "audit_write": 29,  # sudo asks for it
    "setfcap": 31,
}
MASK: Final = sum(1 << number for number in KEPT.values())
_LAST_FILE: Final = "/proc/sys/kernel/cap_last_cap"


def last() -> int:
    """The highest capability this kernel knows."""
    with open(_LAST_FILE) as file:
        return int(file.read())


def drop_all_but_kept(last_capability: int) -> None:
    """Trim the bounding, permitted, effective and inheritable sets of the calling process to KEPT."""
    for number in range(last_capability + 1):
        if not MASK >> number & 1:
            syscalls.prctl(syscalls.PR_CAPBSET_DROP, number)
    syscalls.capset(MASK, MASK, 0)
