"""Coarser levels of labels and images, as a pure function of the level above: no blocking changes a voxel."""

from __future__ import annotations

from math import sqrt

import numba
import numpy as np

from volseg.box import Box, Triple

AT_ONCE = 32  # cells along x that are looked at together where there may be no label
SMALLEST_LEVEL = 64  # a level whose longest axis is at most this is the last one


def levels(
    shape: Triple, voxel_size_nm: tuple[float, float, float] | None, count: int, smallest: int = SMALLEST_LEVEL
) -> list[tuple[Triple, Triple]]:
    """Up to ``count`` levels, finest first: each one's shape and its factor (z y x) against the level above.

    The first whose longest axis has ``smallest`` voxels or fewer is the last. An axis is halved while its voxels are at most
    the square root of 2 longer than the shortest, so that voxels tend to cubes; without a voxel size all axes are. The first
    factor is (1, 1, 1).

    >>> levels((100, 400, 400), (50, 5, 5), 3)
    [((100, 400, 400), (1, 1, 1)), ((100, 200, 200), (1, 2, 2)), ((100, 100, 100), (1, 2, 2))]
    """
    size = tuple(voxel_size_nm or (1.0, 1.0, 1.0))
    pairs = [(tuple(shape), (1, 1, 1))]
    while len(pairs) < count and max(pairs[-1][0]) > smallest:
        above = pairs[-1][0]
        limit = sqrt(2) * min(s for s, n in zip(size, above, strict=True) if n > 1)
        factor = tuple(2 if n > 1 and s <= limit else 1 for s, n in zip(size, above, strict=True))
        size = tuple(s * f for s, f in zip(size, factor, strict=True))
        pairs.append((tuple(-(-n // f) for n, f in zip(above, factor, strict=True)), factor))
    return pairs


def sizes(levels: list[tuple[Triple, Triple]], voxel_size_nm: tuple[float, float, float]) -> list[tuple[float, ...]]:
    """Voxel size z y x in nm of each level that :func:`levels` gave."""
    out: list[tuple[float, ...]] = []
    for _, factor in levels:
        above = out[-1] if out else voxel_size_nm
        out.append(tuple(float(s) * f for s, f in zip(above, factor, strict=True)))
    return out


def parent_box(box: Box, factor: Triple, above: Triple) -> Box:
    """The voxels of the level above, of that shape, from which ``box`` is made.

    >>> str(parent_box(Box((1, 0, 2), (2, 3, 4)), (1, 2, 2), (2, 5, 8)))
    '1:2,0:5,4:8'
    """
    start = tuple(a * f for a, f in zip(box.start, factor, strict=True))
    stop = tuple(b * f for b, f in zip(box.stop, factor, strict=True))
    return Box(start, stop).clip(above)


def placed(values: np.ndarray, part: Box, box: Box) -> np.ndarray:
    """The voxels of ``box``: ``values`` are those of its ``part``, others are 0.

    >>> placed(np.array([[[7]]]), Box((0, 0, 1), (1, 1, 2)), Box((0, 0, 0), (1, 1, 3))).tolist()
    [[[0, 7, 0]]]
    """
    if part == box:
        return values
    out = np.zeros(box.shape, values.dtype)
    out[part.slices_within(box)] = values
    return out


def downsample(labels: np.ndarray, factor: Triple) -> np.ndarray:
    """Each cell of ``factor`` voxels (1 or 2 along z y x) as its most frequent label; type kept, shape rounded up.

    Ties go to the smallest label that is not 0. Cells cut short by the far end count the voxels they have, so a box
    must start at a multiple of ``factor``, and end at one or at the end of the volume (see :func:`parent_box`).

    >>> downsample(np.array([[[0, 7, 3, 3], [0, 5, 0, 0]]]), (1, 2, 2))
    array([[[0, 3]]])
    """
    if not set(factor) <= {1, 2}:
        raise ValueError(f"factor {factor} must be 1 or 2 along each axis; make more levels instead")
    out = np.empty(tuple(-(-n // f) for n, f in zip(labels.shape, factor, strict=True)), labels.dtype)
    _modes(np.ascontiguousarray(labels), np.array(factor, np.int64), out)
    return out


@numba.njit(cache=True, nogil=True)
def _modes(labels: np.ndarray, factor: np.ndarray, out: np.ndarray) -> None:
    fz, fy, fx = factor
    nx = labels.shape[2]
    cell = np.empty(8, labels.dtype)
    for z in range(out.shape[0]):
        for y in range(out.shape[1]):
            rows = labels[z * fz : z * fz + fz, y * fy : y * fy + fy]
            for first in range(0, out.shape[2], AT_ONCE):
                last = min(first + AT_ONCE, out.shape[2])
                if not _something(rows[:, :, first * fx : last * fx]):
                    out[z, y, first:last] = 0
                    continue
                for x in range(first, last):
                    n = 0
                    equal = True
                    for k in range(rows.shape[0]):
                        for j in range(rows.shape[1]):
                            for i in range(x * fx, min(nx, x * fx + fx)):
                                cell[n] = rows[k, j, i]
                                equal = equal and cell[n] == cell[0]
                                n += 1
                    out[z, y, x] = cell[0] if equal else _mode(cell, n)


@numba.njit(cache=True, nogil=True)
def _something(labels: np.ndarray) -> bool:
    """Whether any label is not 0, without a branch for each."""
    for k in range(labels.shape[0]):
        for j in range(labels.shape[1]):
            row = labels[k, j]
            found = row[0]
            for label in row:
                found |= label
            if found != 0:
                return True
    return False


@numba.njit(cache=True, nogil=True)
def _mode(cell: np.ndarray, n: int) -> int:
    """The most frequent of the first ``n`` values; ties go to the smallest that is not 0."""
    best = cell[0]
    most = 0
    for i in range(n):
        value = cell[i]
        count = 0
        for j in range(n):
            count += cell[j] == value
        if count > most or (count == most and value != 0 and (best == 0 or value < best)):
            best, most = value, count
    return best


def downsample_mean(image: np.ndarray, factor: Triple) -> np.ndarray:
    """Each cell of ``factor`` voxels (1 or 2 along z y x) as its mean; type kept, halves rounded up, shape rounded up.

    Cells cut short by the far end count the voxels they have, as in :func:`downsample`.

    >>> downsample_mean(np.array([[[0, 7, 3, 4], [0, 5, 3, 4]]], np.uint8), (1, 2, 2))
    array([[[3, 4]]], dtype=uint8)
    """
    if not set(factor) <= {1, 2}:
        raise ValueError(f"factor {factor} must be 1 or 2 along each axis; make more levels instead")
    if image.dtype.kind in "iu" and image.dtype.itemsize == 8:
        raise ValueError(f"{image.dtype} voxels are labels, whose mean says nothing; use downsample")
    if image.dtype == np.float16:  # which numba does not know
        return downsample_mean(image.astype(np.float32), factor).astype(np.float16)
    out = np.empty(tuple(-(-n // f) for n, f in zip(image.shape, factor, strict=True)), image.dtype)
    image, factors = np.ascontiguousarray(image), np.array(factor, np.int64)
    if image.dtype.kind in "iu":
        _means(image, factors, np.empty(image.shape[2], np.int64 if image.dtype.itemsize > 2 else np.int32), out)
    else:
        _float_means(image, factors, out)
    return out


# Rows are summed first, which is done many voxels at a time; then those of each cell along x. The sum of a cell and its
# count are whole numbers, so halves are rounded up exactly.
@numba.njit(cache=True, nogil=True)
def _means(image: np.ndarray, factor: np.ndarray, row: np.ndarray, out: np.ndarray) -> None:
    fz, fy, fx = factor
    nz, ny, nx = image.shape
    for z in range(out.shape[0]):
        for y in range(out.shape[1]):
            row[:] = 0
            rows = 0
            for k in range(z * fz, min(nz, z * fz + fz)):
                for j in range(y * fy, min(ny, y * fy + fy)):
                    line = image[k, j]
                    for x in range(nx):
                        row[x] += line[x]
                    rows += 1
            line_out, whole = out[z, y], nx // fx
            shift = 0
            while (1 << shift) < rows * fx:
                shift += 1
            half = rows * fx // 2
            if 1 << shift != rows * fx:
                whole = 0
            elif fx == 2:
                for x in range(whole):
                    line_out[x] = (row[2 * x] + row[2 * x + 1] + half) >> shift
            else:
                for x in range(whole):
                    line_out[x] = (row[x] + half) >> shift
            for x in range(whole, out.shape[2]):
                total = np.int64(0)
                n = 0
                for i in range(x * fx, min(nx, x * fx + fx)):
                    total += row[i]
                    n += rows
                line_out[x] = (2 * total + n) // (2 * n)


@numba.njit(cache=True, nogil=True)
def _float_means(image: np.ndarray, factor: np.ndarray, out: np.ndarray) -> None:
    fz, fy, fx = factor
    nz, ny, nx = image.shape
    for z in range(out.shape[0]):
        for y in range(out.shape[1]):
            for x in range(out.shape[2]):
                total, n = 0.0, 0
                for k in range(z * fz, min(nz, z * fz + fz)):
                    for j in range(y * fy, min(ny, y * fy + fy)):
                        for i in range(x * fx, min(nx, x * fx + fx)):
                            total += np.float64(image[k, j, i])
                            n += 1
                out[z, y, x] = total / n
