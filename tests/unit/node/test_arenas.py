"""What the zygote does so that its children's new objects lie side by side."""

from __future__ import annotations

import os

from penstock.node.linux import arenas

SIZES = range(48, 513, 16)


def test_new_objects_of_a_child_follow_one_another() -> None:
    """In a fork, because the filling is kept for ever. Before it, a test runner's pools are full of holes."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            arenas.fill_holes()
            status = 0 if all(_neighbours(size) for size in SIZES) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _neighbours(size: int) -> bool:
    """Whether five blocks of this size lie within one page."""
    blocks = [bytes(size - b"".__sizeof__()) for _ in range(5)]
    found = [id(block) for block in blocks]
    return max(found) - min(found) < 4096
