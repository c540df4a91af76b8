"""Writing the kernel's settings and what looks like them."""

import os

from attempt import attempt, write

for path, text in (
    ("/proc/sys/kernel/core_pattern", "|/tmp/evil"),
    ("/proc/sys/kernel/modprobe", "/tmp/evil"),
    ("/proc/sys/kernel/hostname", "evil"),
    ("/proc/sys/kernel/ns_last_pid", "9"),
    ("/proc/sys/kernel/panic", "1"),
    ("/proc/sys/kernel/sysrq", "1"),
    ("/proc/sys/kernel/randomize_va_space", "0"),
    ("/proc/sys/kernel/random/boot_id", "evil"),
    ("/proc/sys/kernel/usermodehelper/bset", "0 0"),
    ("/proc/sys/kernel/yama/ptrace_scope", "0"),
    ("/proc/sys/kernel/shmmax", "1"),
    ("/proc/sys/kernel/msgmax", "1"),
    ("/proc/sys/fs/file-max", "10"),
    ("/proc/sys/fs/suid_dumpable", "2"),
    ("/proc/sys/fs/protected_symlinks", "0"),
    ("/proc/sys/fs/binfmt_misc/register", ":x:M::x::/tmp/evil:C"),
    ("/proc/sys/vm/drop_caches", "3"),
    ("/proc/sys/vm/overcommit_memory", "2"),
    ("/proc/sys/user/max_user_namespaces", "9"),
    ("/proc/sys/net/ipv4/ip_forward", "1"),
    ("/proc/sys/net/ipv4/conf/all/rp_filter", "0"),
    ("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"),
    ("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "0"),
    ("/proc/sysrq-trigger", "b"),
    ("/proc/kcore", "x"),
    ("/proc/irq/default_smp_affinity", "1"),
    ("/proc/mtrr", "disable=0"),
    ("/proc/self/uid_map", "0 0 1"),
    ("/proc/self/gid_map", "0 0 1"),
    ("/proc/self/setgroups", "allow"),
    ("/proc/1/uid_map", "0 0 4294967295"),
    ("/sys/kernel/uevent_helper", "/tmp/evil"),
    ("/sys/kernel/mm/transparent_hugepage/enabled", "never"),
    ("/sys/power/state", "mem"),
    ("/sys/block/loop0/uevent", "add"),
    ("/sys/class/net/eth0/mtu", "9000"),
    ("/sys/kernel/profiling", "1"),
):
    attempt(path, lambda path=path, text=text: write(path, text))


def writable_settings():
    """Every file below /proc/sys and /sys that can be opened for writing."""
    found = []
    for top in ("/proc/sys", "/sys", "/proc/irq", "/proc/tty", "/proc/pressure"):
        for folder, _, names in os.walk(top):
            for name in names:
                path = os.path.join(folder, name)
                try:
                    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                except OSError:
                    continue
                found.append(path)
    # These two may be opened by anybody; their writers are checked at the write (the first is attempted above,
    # pressure files only arm a watch of the caller's own).
    found = [path for path in found if path != "/proc/sys/kernel/ns_last_pid" and not path.startswith("/proc/pressure")]
    if not found:
        raise OSError("nothing")
    return found


attempt("any setting", writable_settings)
