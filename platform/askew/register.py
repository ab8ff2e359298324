"""The register: what prepare must know of all items at once, in 88 bytes each, memory-mapped.

An id is known here by a 64-bit hash alone (among 10⁸ ids two meet with a chance of 0.03 %); texts and photos
stay in the parts. Knows nothing of where items come from, or what a split is for.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from pandas.util import hash_array

Hashes = NDArray[np.uint64]
Numbers = NDArray[np.int64]

ROW = np.dtype(
    [
        ("id", "<u8"),  # hash of the item's id
        ("content", "<u4"),  # hash of all that it holds, to tell a repeated item from two of one id
        ("title", "<u8"),  # hash of its title, case folded
        ("photo", "<u8"),  # perceptual hash of its photo; 0 where there is none
        ("detail", "<u8", 4),  # 256 bits of it, finer
        ("colour", "u1", 3),  # mean colour of its photo
        ("split", "u1"),  # number of its split's name
        ("kind", "<u4"),  # hash of the field that says what kind of product it is
        ("traits", "<u4"),  # hash of the fields that tell products of one kind apart
    ]
)


def hashes(values: pa.Array | Sequence[str]) -> Hashes:
    """Hash n strings to 64 bits, the same on every machine (SipHash); a null is hashed as an empty string."""
    strings = values.to_pylist() if isinstance(values, pa.Array) else values
    table = np.array([value or "" for value in strings], dtype=object)
    return (
        np.asarray(hash_array(table, categorize=False), dtype=np.uint64) if len(table) else np.empty(0, np.uint64)
    )


class Register:
    """The rows of all items in the order of their parts, found by the hash of their id."""

    def __init__(self, folder: Path) -> None:
        self.rows = np.load(folder / "rows.npy", mmap_mode="r")
        self._order = np.load(folder / "order.npy", mmap_mode="r")
        self._ids = np.load(folder / "ids.npy", mmap_mode="r")

    @classmethod
    def gather(cls, parts: Sequence[Path], folder: Path, recode: Sequence[NDArray[np.uint8]]) -> "Register":
        """Concatenate parts' rows into `folder` and sort their ids; `recode` renumbers each part's splits."""
        chosen = [np.load(part, mmap_mode="r") for part in parts]
        out = _new(folder, sum(map(len, chosen)))
        at = 0
        for rows, numbers in zip(chosen, recode, strict=True):
            here = slice(at, at := at + len(rows))
            out[here] = rows
            out["split"][here] = numbers[rows["split"]]
        return cls._sorted(out, folder)

    def kept(self, keep: NDArray[np.bool_], split: NDArray[np.uint8], folder: Path) -> "Register":
        """Copy the rows that are kept into `folder`, with their final splits."""
        out = _new(folder, int(keep.sum()))
        out[:] = self.rows[keep]
        out["split"] = split[keep]
        return self._sorted(out, folder)

    @classmethod
    def _sorted(cls, out: NDArray[np.void], folder: Path) -> "Register":
        order = np.argsort(out["id"], kind="stable")
        np.save(folder / "order.npy", order)
        np.save(folder / "ids.npy", out["id"][order])
        return cls(folder)

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, ids: Hashes) -> Numbers:
        """Find the number of each of n ids; −1 where no item has it. Of items with one id, the first."""
        if not len(self._ids):
            return np.full(len(ids), -1, dtype=np.int64)
        at = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        return np.where(self._ids[at] == ids, self._order[at], -1).astype(np.int64)

    def repeated(self) -> tuple[Numbers, NDArray[np.bool_]]:
        """Tell the numbers of items whose id an earlier one has, in order, and whether both hold the same."""
        if not len(self._ids):
            return np.empty(0, np.int64), np.empty(0, np.bool_)
        starts = np.r_[True, self._ids[1:] != self._ids[:-1]]
        first = np.asarray(self._order)[np.maximum.accumulate(np.where(starts, np.arange(len(starts)), 0))]
        later = np.flatnonzero(~starts)
        numbers = np.asarray(self._order)[later]
        same = self.rows["content"][numbers] == self.rows["content"][first[later]]
        by_number = np.argsort(numbers)
        return numbers[by_number].astype(np.int64), same[by_number]


def _new(folder: Path, num_rows: int) -> NDArray[np.void]:
    folder.mkdir(parents=True, exist_ok=True)
    return open_memmap(folder / "rows.npy", "w+", ROW, (num_rows,))
