"""The loops over a block's voxels behind the table of objects: what `objects.measure` adds up."""

from __future__ import annotations

import numpy as np
from numba import njit

from volseg.box import Triple

WORD_BITS = 32  # of the lower word of a moment
MAX_RUN_VOXELS = 1 << 12  # added at once: then a run's moments fit 63 bits on axes of up to 2**25 voxels


# Voxels are added in runs of one region along x: sums of coordinates over a run have a closed form, so a voxel costs one
# comparison. Contacts are counted to the next voxel along each axis; those to another block are left to the caller.
# Invariant: after a run all its voxels, and their contacts to what lies behind them, are in the sums of its label.
@njit(cache=True, nogil=True)
def add_voxels(
    region: np.ndarray, number: np.ndarray, probability: np.ndarray, origin: np.ndarray, columns: tuple[np.ndarray, ...],
    same_faces: np.ndarray,
) -> int:  # fmt: skip
    """A block's voxels are in ``columns``, those of `objects.ADDED`, and its faces between like voxels, by axis.

    Returns how many faces lie between unlike labels.

    Labels are told apart by ``number[region]``, which is 0 for background.
    """
    nz, ny, nx = region.shape
    voxels, probability_sum, lowest, sums, moment, start, stop = columns
    unlike = 0
    for z in range(nz):
        for y in range(ny):
            row, x = region[z, y], 0
            while x < nx:
                r = row[x]
                if r == 0:
                    x += 1
                    continue
                begin, end, n = x, min(nx, x + MAX_RUN_VOXELS), number[r]
                low, run_sum = np.uint8(255), np.int64(0)
                while x < end and row[x] == r:
                    low = min(low, probability[z, y, x])
                    run_sum += probability[z, y, x]
                    x += 1
                if n == 0:
                    continue
                voxels[n] += x - begin
                lowest[n] = min(lowest[n], low)
                probability_sum[n] += run_sum
                same_faces[n, 2] += x - begin - 1
                if x < nx:
                    same, other = _count_same(r, row[x : x + 1], number)
                    same_faces[n, 2] += same
                    unlike += other
                if y + 1 < ny:
                    same, other = _count_same(r, region[z, y + 1, begin:x], number)
                    same_faces[n, 1] += same
                    unlike += other
                if z + 1 < nz:
                    same, other = _count_same(r, region[z + 1, y, begin:x], number)
                    same_faces[n, 0] += same
                    unlike += other
                zyx = (z + origin[0], y + origin[1], begin + origin[2])
                _add_run(zyx, x - begin, sums[n], moment[n], start[n], stop[n])
    return unlike


@njit(cache=True, nogil=True)
def _count_same(r: int, others: np.ndarray, number: np.ndarray) -> tuple[int, int]:
    """How many of region r's neighbors have its label, and how many have another one."""
    same = none = 0
    for other in others:
        same += other == r
        none += other == 0
    if same + none == others.size:
        return same, 0
    n, unlike = number[r], 0
    for other in others:
        m = number[other]
        same += other != r and m == n
        unlike += m != n and m > 0
    return same, unlike


@njit(cache=True, nogil=True)
def enter_contacts(region: np.ndarray, number: np.ndarray, pairs: np.ndarray) -> int:
    """``pairs`` begins with ``low << 32 | high`` of unlike labels in contact, many more than once; how many there are."""
    nz, ny, nx = region.shape
    count = 0
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                n = number[region[z, y, x]]
                if n == 0:
                    continue
                for axis in range(3):
                    at = z + (axis == 0), y + (axis == 1), x + (axis == 2)
                    if at[0] < nz and at[1] < ny and at[2] < nx:
                        m = number[region[at]]
                        if m != n and m > 0:
                            pairs[count] = (min(n, m) << 32) | max(n, m)
                            count += count == 0 or pairs[count] != pairs[count - 1]
    return count


@njit(cache=True, nogil=True)
def _add_run(
    zyx: Triple, length: int, sums: np.ndarray, moment: np.ndarray, start: np.ndarray, stop: np.ndarray
) -> None:
    """Adds ``length`` voxels in a row along x, from ``zyx`` on, to one label's sums."""
    z, y, x = zyx
    along = length * (2 * x + length - 1) // 2
    squares = length * x * x + x * length * (length - 1) + (length - 1) * length * (2 * length - 1) // 6
    for axis, value in enumerate((length * z, length * y, along)):
        sums[axis] += value
        start[axis] = min(start[axis], zyx[axis])
        stop[axis] = max(stop[axis], zyx[axis] + (length if axis == 2 else 1))
    for k, value in enumerate((length * z * z, length * y * y, squares, length * z * y, z * along, y * along)):
        moment[k, 0] += value >> WORD_BITS
        moment[k, 1] += value & ((1 << WORD_BITS) - 1)
