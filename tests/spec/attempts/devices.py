"""Device nodes: making them, and opening the host's."""

import glob
import os
import stat

from attempt import attempt

DEVICES = {
    "/dev/mem": (stat.S_IFCHR, 1, 1),
    "/dev/kmsg": (stat.S_IFCHR, 1, 11),
    "/dev/vda": (stat.S_IFBLK, 254, 0),
    "/dev/sda": (stat.S_IFBLK, 8, 0),
    "/dev/loop0": (stat.S_IFBLK, 7, 0),
    "/dev/loop-control": (stat.S_IFCHR, 10, 237),
    "/dev/fuse": (stat.S_IFCHR, 10, 229),
    "/dev/kvm": (stat.S_IFCHR, 10, 232),
    "/dev/net/tun": (stat.S_IFCHR, 10, 200),
    "/dev/userfaultfd": (stat.S_IFCHR, 10, 126),
    "/dev/vsock": (stat.S_IFCHR, 10, 121),
    "/dev/tty0": (stat.S_IFCHR, 4, 0),
    "/dev/console": (stat.S_IFCHR, 5, 1),
    "/dev/mapper/control": (stat.S_IFCHR, 10, 236),
}


def made(path, kind, major, minor):
    try:
        os.unlink(path)
    except OSError:
        pass
    os.mknod(path, kind | 0o666, os.makedev(major, minor))
    return os.open(path, os.O_RDWR)


for path, (kind, major, minor) in DEVICES.items():
    attempt(f"open {path}", lambda path=path: os.open(path, os.O_RDWR | os.O_NONBLOCK))
    for folder in ("/dev", "/dev/shm", "/tmp", "/run"):
        place = f"{folder}/node"
        attempt(f"make {path} in {folder}", lambda a=place, b=kind, c=major, d=minor: made(a, b, c, d))
attempt("a null of our own", lambda: made("/tmp/null", stat.S_IFCHR, 1, 3))
attempt("the overlay's whiteout", lambda: made("/tmp/whiteout", stat.S_IFCHR, 0, 0))


def nodes():
    """Every device node anywhere, but the ones a sandbox has."""
    expected = {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty", "pts/ptmx")}
    found = []
    for folder, folders, names in os.walk("/"):
        folders[:] = [each for each in folders if os.path.join(folder, each) not in ("/proc", "/sys")]
        for name in names:
            path = os.path.join(folder, name)
            mode = os.lstat(path).st_mode
            if (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)) and path not in expected | set(glob.glob("/dev/pts/[0-9]*")):
                found.append(path)
    if not found:
        raise OSError("nothing")
    return found


attempt("any other node", nodes)
