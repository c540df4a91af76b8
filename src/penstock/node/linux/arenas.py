"""Where a child of the zygote writes its new objects: side by side, on pages it touches anyway.

After imports and a rehearsal CPython's small-object pools are half empty, thousands of holes on pages full of objects
that all children share. A child fills the holes first, one copied page for a few objects. So the zygote fills them
before it forks; its children begin on empty pools. Costs the zygote some 4 MiB, once. Source: Objects/obmalloc.c of
CPython 3.11 (pools of 16 KiB per size, sizes in steps of 16 bytes up to 512). Another allocator makes it useless, not
wrong.
"""

from __future__ import annotations

from typing import Final

_POOL_BYTES: Final = 16 * 1024
_POOL_HEAD_BYTES: Final = 48
_STEP_BYTES: Final = 16
_SMALL_BYTES_MAX: Final = 512
_BLOCKS_MAX: Final = 16_384  # of one size
_OVERHEAD_BYTES: Final = b"".__sizeof__()

_fillings: list[list[bytes]] = []  # kept for ever


def fill_holes() -> None:
    """Call last before the first fork, after a collection: what is freed later leaves new holes."""
    for size in range(_STEP_BYTES, _SMALL_BYTES_MAX + 1, _STEP_BYTES):
        if size > _OVERHEAD_BYTES + 1:  # shorter bytes are shared, or none
            _fillings.append(_fill(size))


def _fill(size: int) -> list[bytes]:
    """Blocks of `size`, until a pool's worth of them lay one after the other, as they do in an empty pool only."""
    wanted = (_POOL_BYTES - _POOL_HEAD_BYTES) // size - 1
    blocks: list[bytes] = [b""] * _BLOCKS_MAX  # of its full length, so that it never moves meanwhile
    in_a_row, before = 0, 0
    for number in range(_BLOCKS_MAX):
        block = blocks[number] = bytes(size - _OVERHEAD_BYTES)
        in_a_row = in_a_row + 1 if id(block) == before + size else 0
        before = id(block)
        if in_a_row == wanted:
            break
    return blocks
