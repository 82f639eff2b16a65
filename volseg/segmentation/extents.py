"""What the object table has only where it is asked for: gray values, and how far an object reaches in any direction.

All sums and projections are integers, so they are the same for every cutting into blocks. The longest extent is the largest
of widths along fixed directions (a maximum Feret diameter by sampled directions, as caliper measures do).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numba import njit

from volseg.box import VoxelSize

DIRECTIONS = 128  # over half a sphere: the nearest one is at most 11 degrees off, where a width is 1.8 % too short
SCALE = 1 << 10  # of directions in whole numbers, along the shortest voxel edge


@lru_cache(maxsize=8)
def directions(voxel_size_nm: VoxelSize) -> np.ndarray:
    """Directions that are evenly spread in nm, in voxels: int64 (`DIRECTIONS`, 3), z y x.

    The projection of a voxel's index on one of them, as a share of `lengths`, is in nm.

    >>> directions((40.0, 5.0, 5.0)).shape
    (128, 3)
    """
    k = np.arange(DIRECTIONS) + 0.5
    z, turn = 1 - k / DIRECTIONS, np.pi * (1 + 5**0.5) * k  # a Fibonacci lattice
    radius = np.sqrt(1 - z * z)
    unit = np.stack([z, radius * np.sin(turn), radius * np.cos(turn)], axis=1)
    size = np.array(voxel_size_nm)
    return np.rint(unit * (size / size.min() * SCALE)).astype(np.int64)


def longest_nm(reach: np.ndarray, voxel_size_nm: VoxelSize) -> np.ndarray:
    """The longest extent of objects, voxels being solid boxes.

    Parameters
    ----------
    reach
        int64 (n, `DIRECTIONS`, 2): lowest and highest projection of its voxels' indices.
    voxel_size_nm
        z y x

    Returns
    -------
    float64 (n,) nm, at most 1.8 % below the true one
    """
    along = directions(voxel_size_nm)
    norm = np.sqrt(((along / np.array(voxel_size_nm)) ** 2).sum(axis=1))
    width = (reach[..., 1] - reach[..., 0] + np.abs(along).sum(axis=1)) / norm
    return width.max(axis=1, initial=0.0)


def block_reach(region: np.ndarray, number: np.ndarray, start: np.ndarray, along: np.ndarray, size: int) -> np.ndarray:
    """The reach of each object of a block, as `longest_nm` takes it.

    Parameters
    ----------
    region
        uint32 (z, y, x): regions, 0 outside.
    number
        int64 (regions + 1,): number of the object of each region, 0 for none.
    start
        int64 (3,): where the block begins in the volume.
    along
        Of `directions`.
    size
        How many numbers there are.

    Returns
    -------
    int64 (size, directions, 2); the highest is below the lowest where an object has no voxel in the block

    Examples
    --------
    >>> row = np.array([[[0, 1, 1, 2]]], np.uint32)
    >>> along = np.array([[0, 0, 1], [1, 0, -1]])
    >>> block_reach(row, np.array([0, 1, 1]), np.array([5, 0, 0]), along, 2)[1].tolist()
    [[1, 3], [2, 4]]
    """
    out = np.empty((size, len(along), 2), np.int64)
    out[..., 0], out[..., 1] = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    _add_reach(region, number, start, along, out)
    return out


# A projection grows or falls along a run of voxels, so its ends are its extremes.
@njit(cache=True, nogil=True)
def _add_reach(region: np.ndarray, number: np.ndarray, start: np.ndarray, along: np.ndarray, out: np.ndarray) -> None:
    nz, ny, nx = region.shape
    for z in range(nz):
        for y in range(ny):
            row, x = region[z, y], 0
            while x < nx:
                n, begin = number[row[x]], x
                while x < nx and number[row[x]] == n:
                    x += 1
                if n == 0:
                    continue
                for d in range(along.shape[0]):
                    base = along[d, 0] * (z + start[0]) + along[d, 1] * (y + start[1])
                    first = base + along[d, 2] * (begin + start[2])
                    last = base + along[d, 2] * (x - 1 + start[2])
                    out[n, d, 0] = min(out[n, d, 0], first, last)
                    out[n, d, 1] = max(out[n, d, 1], first, last)


def gray_sums(region: np.ndarray, number: np.ndarray, gray: np.ndarray, size: int) -> np.ndarray:
    """The sum of the gray values of each object of a block, int64 (size,); ``gray`` holds whole numbers (z, y, x).

    >>> row = np.array([[[0, 1, 1, 2]]], np.uint32)
    >>> gray_sums(row, np.array([0, 1, 2]), np.array([[[9, 5, 6, 7]]], np.uint8), 3).tolist()
    [0, 11, 7]
    """
    out = np.zeros(size, np.int64)
    _add_gray(region, number, gray, out)
    out[0] = 0
    return out


@njit(cache=True, nogil=True)
def _add_gray(region: np.ndarray, number: np.ndarray, gray: np.ndarray, out: np.ndarray) -> None:
    for z in range(region.shape[0]):
        for y in range(region.shape[1]):
            for x in range(region.shape[2]):
                out[number[region[z, y, x]]] += np.int64(gray[z, y, x])
