"""Reading files of the host: argv holds paths that exist there and must not be reachable."""

import glob
import os
import sys

from attempt import attempt, read

ways = ("", "/proc/1/root", "/proc/1/cwd", "/proc/self/root", "/proc/self/cwd/../../../..", "/dev/fd/../../../..",
        "/proc/thread-self/root/proc/1/root", "/sys/../../..", "/u/upper", "/l/0", "/r", "/run/../../..")  # fmt: skip
for path in sys.argv[1:]:
    for way in ways:
        attempt(way + path, lambda full=way + path: read(full))


def elsewhere():
    """Roots of other processes, and descriptors of them, that lead out of our own root."""
    own = os.stat("/")
    found = []
    for link in glob.glob("/proc/[0-9]*/root") + glob.glob("/proc/[0-9]*/cwd"):
        try:
            status = os.stat(link)
        except OSError:
            continue
        if link.endswith("root") and (status.st_dev, status.st_ino) != (own.st_dev, own.st_ino):
            found.append(link)
    if not found:
        raise OSError("nothing")
    return found


def chroot_out():
    """The classic: chroot deeper while keeping a descriptor above, then climb."""
    above = os.open("/", os.O_RDONLY)
    os.makedirs("/tmp/jail", exist_ok=True)
    os.chroot("/tmp/jail")
    os.fchdir(above)
    for _ in range(64):
        os.chdir("..")
    os.chroot(".")
    found = [path for path in sys.argv[1:] if os.path.exists(path)]
    if not found:
        raise OSError("nothing")
    return found


attempt("another root", elsewhere)
attempt("climbing out of a chroot", chroot_out)
