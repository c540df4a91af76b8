"""What the zygote does so that its children's new objects lie side by side."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = '''
import gc, penstock.guest.main
from penstock.node.linux import arenas

def neighbours(size):
    """Whether five blocks of this size lie within one page."""
    blocks = [bytes(size - b"".__sizeof__()) for _ in range(5)]
    found = [id(block) for block in blocks]
    return max(found) - min(found) < 4096

sizes = range(48, 513, 16)
before = sum(map(neighbours, sizes))
gc.collect()
arenas.fill_holes()
print(before < len(sizes), all(map(neighbours, sizes)))
'''


def test_new_objects_follow_one_another_once_the_holes_are_filled() -> None:
    """In an interpreter of its own, as full as the zygote's: a test runner has more holes than it is made for."""
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", "True"], "holes before, none after"
