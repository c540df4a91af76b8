"""Take every byte of a file system."""

from __future__ import annotations

from pathlib import Path

MIB = 1024 * 1024


def fill(folder: Path) -> Path:
    """The file that now holds all of what was free where `folder` lies; unlink it to make room again."""
    hog = folder / "hog"
    with hog.open("ab", buffering=0) as file:
        for size in (MIB, 4096, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                continue
    return hog
