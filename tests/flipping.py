"""Bits of a file, flipped one at a time."""

from collections.abc import Iterator
from pathlib import Path


def flips(path: Path, every: int = 1) -> Iterator[int]:
    """Flip every n-th bit of a file, alone, and say which; in the end the file is as it was."""
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), every):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        yield bit
    path.write_bytes(whole)
