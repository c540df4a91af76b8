"""The system call filter of a sandbox, as classic BPF made here: no libseccomp is needed on the machine.

It denies kernel code that a sandbox has no use for, beneath what user namespace and capabilities deny already. There
is no `no_new_privs`, so setuid programs work; the filter is installed with the user namespace's own CAP_SYS_ADMIN and
holds for everything started later, since nothing can take it off again.

`clone3` answers ENOSYS because its flags lie in memory, where a filter cannot look; every libc then uses `clone`.
Foreign architectures (32-bit calls) kill the caller: their numbers mean other calls. Allowed calls cost nothing
measurable: the kernel caches the verdict per number for filters that do not look at arguments.
"""

from __future__ import annotations

import errno
import platform
import struct
from typing import Final, NamedTuple

from penstock.node.linux import syscalls

_LD_W_ABS: Final = 0x20
_JEQ: Final = 0x15
_JGE: Final = 0x35
_JSET: Final = 0x45
_RET: Final = 0x06
_ALLOW: Final = 0x7FFF_0000
_ERRNO: Final = 0x0005_0000
_KILL_PROCESS: Final = 0x8000_0000
# In struct seccomp_data; of arguments the low halves (little endian).
_NUMBER_AT, _ARCH_AT, _ARGUMENT0_AT, _ARGUMENT1_AT, _ARGUMENT2_AT = 0, 4, 16, 24, 32
_X32_BIT: Final = 0x4000_0000

_TIOCSTI: Final = 0x5412  # pushes input into a terminal, also into that of a less confined reader
_TIOCLINUX: Final = 0x541C
_FAMILIES: Final = (1, 2, 10, 16, 17)  # unix, inet, inet6, netlink; packet answers EPERM for want of a capability
_NETLINK: Final = 16
# route, sock_diag, audit (sudo asks), generic. Not: usersock, by which a sandbox sends itself messages that no cgroup
# counts (1.7 GiB in 2,000 sockets, measured); kobject_uevent, which tells of the host's devices.
_NETLINK_PROTOCOLS: Final = (0, 4, 9, 16)
_NEW_NAMESPACES: Final = (
    syscalls.CLONE_NEWUSER
    | syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWPID
    | syscalls.CLONE_NEWNET
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWUTS
    | syscalls.CLONE_NEWCGROUP
)

# Of no use without the initial namespace's capabilities, or too much kernel for what they give: EPERM.
_REFUSED: Final = (
    *("mount", "umount2", "pivot_root", "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount", "fspick"),
    *("mount_setattr", "open_tree_attr", "setns", "swapon", "swapoff", "reboot", "acct", "quotactl", "quotactl_fd"),
    *("init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "open_by_handle_at", "bpf"),
    *("perf_event_open", "userfaultfd", "settimeofday", "clock_settime", "clock_adjtime", "syslog", "lookup_dcookie"),
    *("vhangup", "iopl", "ioperm"),
)
# A program asks whether the kernel has these, and has another way when not: ENOSYS.
_ABSENT: Final = (
    *("clone3", "io_uring_setup", "io_uring_enter", "io_uring_register", "add_key", "request_key", "keyctl"),
    *("nfsservctl", "uselib", "sysfs", "_sysctl", "create_module"),
)


def _table(text: str) -> dict[str, int]:
    """`name number name number …` → a dict."""
    words = text.split()
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


_SHARED_NUMBERS: Final = _table(
    """
    io_uring_setup 425 io_uring_enter 426 io_uring_register 427 open_tree 428 move_mount 429 fsopen 430 fsconfig 431
    fsmount 432 fspick 433 clone3 435 mount_setattr 442 quotactl_fd 443 open_tree_attr 467
    """
)
_X86_64: Final = _SHARED_NUMBERS | _table(
    """
    ioctl 16 socket 41 socketpair 53 clone 56 uselib 134 sysfs 139 vhangup 153 pivot_root 155 _sysctl 156
    acct 163 settimeofday 164 mount 165 umount2 166 swapon 167 swapoff 168 reboot 169 iopl 172 ioperm 173
    create_module 174 init_module 175 delete_module 176 quotactl 179 nfsservctl 180 syslog 103
    lookup_dcookie 212 clock_settime 227 kexec_load 246 add_key 248 request_key 249 keyctl 250 unshare 272
    perf_event_open 298 open_by_handle_at 304 clock_adjtime 305 setns 308 finit_module 313 kexec_file_load 320
    bpf 321 userfaultfd 323
    """
)
_AARCH64: Final = _SHARED_NUMBERS | _table(
    """
    ioctl 29 umount2 39 mount 40 pivot_root 41 nfsservctl 42 lookup_dcookie 18 vhangup 58 quotactl 60 acct 89
    unshare 97 kexec_load 104 init_module 105 delete_module 106 clock_settime 112 syslog 116 reboot 142
    settimeofday 170 socket 198 socketpair 199 add_key 217 request_key 218 keyctl 219 clone 220 swapon 224
    swapoff 225 perf_event_open 241 open_by_handle_at 265 clock_adjtime 266 setns 268 finit_module 273 bpf 280
    userfaultfd 282 kexec_file_load 294
    """
)
_ARCHITECTURES: Final[dict[str, tuple[int, dict[str, int]]]] = {
    "x86_64": (0xC000_003E, _X86_64),
    "aarch64": (0xC000_00B7, _AARCH64),
}


class _Instruction(NamedTuple):
    code: int
    jump_true: int
    jump_false: int
    value: int


def build(machine: str | None = None) -> bytes:
    """The filter for `machine` (default: this one). Raises KeyError for an architecture without a table."""
    audit_arch, numbers = _ARCHITECTURES[machine or platform.machine()]
    program = [
        _Instruction(_LD_W_ABS, 0, 0, _ARCH_AT),
        _Instruction(_JEQ, 1, 0, audit_arch),
        _Instruction(_RET, 0, 0, _KILL_PROCESS),
        _Instruction(_LD_W_ABS, 0, 0, _NUMBER_AT),
        _Instruction(_JGE, 0, 1, _X32_BIT),
        _Instruction(_RET, 0, 0, _ERRNO | errno.ENOSYS),
    ]
    program += _deny(numbers, _REFUSED, errno.EPERM)
    program += _deny(numbers, _ABSENT, errno.ENOSYS)
    program += _deny_flags(numbers["clone"], _NEW_NAMESPACES)  # the time flag is part of the exit signal here
    program += _deny_flags(numbers["unshare"], _NEW_NAMESPACES | syscalls.CLONE_NEWTIME)
    program += _only_netlink(numbers["socket"], _NETLINK_PROTOCOLS)
    program += _only(numbers["socket"], _FAMILIES, errno.EAFNOSUPPORT)
    program += _only(numbers["socketpair"], _FAMILIES, errno.EAFNOSUPPORT)
    program += _deny_ioctls(numbers["ioctl"], (_TIOCSTI, _TIOCLINUX))
    program.append(_Instruction(_RET, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _deny(numbers: dict[str, int], names: tuple[str, ...], error: int) -> list[_Instruction]:
    """Answer `error` to every call of `names` that this architecture has."""
    known = sorted(numbers[name] for name in names if name in numbers)
    count = len(known)
    assert 0 < count < 255, "a jump reaches 255 instructions"
    checks = [
        _Instruction(_JEQ, count - 1 - index, int(index == count - 1), number) for index, number in enumerate(known)
    ]
    return [*checks, _Instruction(_RET, 0, 0, _ERRNO | error)]


def _deny_flags(number: int, flags: int) -> list[_Instruction]:
    """EPERM when the first argument has any of `flags`. Leaves the accumulator holding the call's number."""
    return [
        _Instruction(_JEQ, 0, 4, number),
        _Instruction(_LD_W_ABS, 0, 0, _ARGUMENT0_AT),
        _Instruction(_JSET, 0, 1, flags),
        _Instruction(_RET, 0, 0, _ERRNO | errno.EPERM),
        _Instruction(_RET, 0, 0, _ALLOW),
    ]


def _only(number: int, values: tuple[int, ...], error: int) -> list[_Instruction]:
    """`error` unless the first argument is one of `values`."""
    count = len(values)
    checks = [_Instruction(_JEQ, count - index, 0, value) for index, value in enumerate(values)]
    return [
        _Instruction(_JEQ, 0, count + 3, number),
        _Instruction(_LD_W_ABS, 0, 0, _ARGUMENT0_AT),
        *checks,
        _Instruction(_RET, 0, 0, _ERRNO | error),
        _Instruction(_RET, 0, 0, _ALLOW),
    ]


def _only_netlink(number: int, protocols: tuple[int, ...]) -> list[_Instruction]:
    """EPROTONOSUPPORT to a netlink socket of another protocol. Leaves the accumulator holding the call's number."""
    count = len(protocols)
    checks = [_Instruction(_JEQ, count - index, 0, protocol) for index, protocol in enumerate(protocols)]
    return [
        _Instruction(_JEQ, 0, count + 6, number),
        _Instruction(_LD_W_ABS, 0, 0, _ARGUMENT0_AT),
        _Instruction(_JEQ, 0, count + 3, _NETLINK),
        _Instruction(_LD_W_ABS, 0, 0, _ARGUMENT2_AT),
        *checks,
        _Instruction(_RET, 0, 0, _ERRNO | errno.EPROTONOSUPPORT),
        _Instruction(_RET, 0, 0, _ALLOW),
        _Instruction(_LD_W_ABS, 0, 0, _NUMBER_AT),
    ]


def _deny_ioctls(number: int, requests: tuple[int, ...]) -> list[_Instruction]:
    count = len(requests)
    checks = [_Instruction(_JEQ, count - index, 0, request) for index, request in enumerate(requests)]
    return [
        _Instruction(_JEQ, 0, count + 3, number),
        _Instruction(_LD_W_ABS, 0, 0, _ARGUMENT1_AT),
        *checks,
        _Instruction(_RET, 0, 0, _ALLOW),
        _Instruction(_RET, 0, 0, _ERRNO | errno.EPERM),
    ]
