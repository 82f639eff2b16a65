"""Files whose voxels lie in them as they are: mapped once in a process, with few of their pages in its memory."""

from __future__ import annotations

import mmap
import threading
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from volseg.io import files

KEPT_BYTES = 128 << 20  # of a file that may count as memory of this process
LOOK_BYTES = 16 << 20  # about so many are mapped before the system is asked how many really are
FAULT_BYTES = 64 << 10  # that the system maps around one voxel, at least: newer ones map up to 2 MiB


class Mapping:
    """A file that is mapped as long as something uses it. Pages that were looked at are let go of now and then."""

    def __init__(self, path: str) -> None:
        with files.open_binary(path) as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.lock = threading.Lock()
        self.touched, self.resident_before = 0, _resident_files()

    def array(self, shape: tuple[int, ...], dtype: np.dtype, offset: int, *, reversed_axes: bool = False) -> np.ndarray:
        """The voxels from byte ``offset`` on; with ``reversed_axes`` the first axis is the fastest."""
        return np.ndarray(shape, dtype, self.map, offset, order="F" if reversed_axes else "C")

    def copy(self, view: np.ndarray, out: np.ndarray) -> None:
        """``out`` holds what ``view``, a part of an :meth:`array`, does; its type may be another."""
        slowest = max(range(view.ndim), key=lambda axis: abs(view.strides[axis]) if view.shape[axis] > 1 else 0)
        view, out = np.moveaxis(view, slowest, 0), np.moveaxis(out, slowest, 0)
        step = max(1, view.shape[0] * LOOK_BYTES // max(1, spread(view)))
        for start in range(0, view.shape[0], step):
            part = view[start : start + step]
            out[start : start + step] = part
            self._count(spread(part))

    def _count(self, nbytes: int) -> None:
        """Lets go of all pages once there may be too many; the system keeps them cached, and whoever reads finds them again."""
        with self.lock:
            self.touched += nbytes
            if self.touched < LOOK_BYTES:
                return
            self.touched = 0
            if _resident_files() - self.resident_before > KEPT_BYTES and hasattr(mmap, "MADV_DONTNEED"):
                self.map.madvise(mmap.MADV_DONTNEED)


def _resident_files() -> int:
    """Bytes of files that count as memory of this process; where the system does not tell, more than may be kept."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[2]) * mmap.PAGESIZE
    except OSError:
        return 2 * KEPT_BYTES


def spread(view: np.ndarray) -> int:
    """About how many bytes of a file are mapped when a view of it is read.

    >>> spread(np.empty((4, 1 << 10, 1 << 10), np.uint8)[:, :256, :256]) >> 10
    1277
    """
    axes = sorted(range(view.ndim), key=lambda axis: -abs(view.strides[axis]))
    sizes = [(view.shape[axis], abs(view.strides[axis])) for axis in axes]

    def mapped(depth: int) -> int:
        inner = view.itemsize + sum((n - 1) * stride for n, stride in sizes[depth:])
        return prod(n for n, _ in sizes[:depth]) * (inner + (FAULT_BYTES if depth else 0))

    return min(mapped(depth) for depth in range(view.ndim + 1))


@lru_cache(maxsize=16)
def _cached(path: str, stamp: Any) -> Mapping:
    return Mapping(path)


def mapping(path: str) -> Mapping:
    """The local file at ``path``, mapped anew when it has changed."""
    return _cached(path, files.stamp(path))
