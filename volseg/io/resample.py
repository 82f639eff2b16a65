"""A volume in voxels of another size, made as it is read: no voxel depends on the box that is asked for.

Along an axis with fewer voxels than are stored, each is the mean of what it covers; with more, it lies on the line between
its two nearest neighbors. Weights are shares of a power of two that a voxel's place alone decides, and whole numbers are
summed as whole numbers. So every cutting into blocks reads the same values, on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import prod

import numba
import numpy as np

from volseg.box import Blocks, Box, Triple

PIECE_VOXELS = 1 << 25  # stored voxels that are held at once
MAX_DENOMINATOR = 1 << 20  # of a ratio of lengths: more than any axis has voxels whose length matters

Read = Callable[[Box], np.ndarray]


@dataclass(frozen=True)
class Grid:
    """How the voxels of two grids lie over each other, both of which begin at one corner of space.

    Attributes
    ----------
    shape
        Voxels of this grid, z y x.
    other
        Voxels of the other one.
    steps
        For each axis, the length of this grid's voxels in those of the other one, as numerator and denominator.

    Examples
    --------
    >>> coarse = Grid.between((2, 4, 4), (20, 20, 20), (4, 4, 4), (10, 20, 20))
    >>> coarse.nearest(0, 0, 2).tolist(), str(coarse.covered(Box((1, 0, 0), (2, 4, 4))))
    ([1, 3], '2:4,0:4,0:4')
    """

    shape: Triple
    other: Triple
    steps: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

    @classmethod
    def between(
        cls, shape: Triple, size_nm: tuple[float, ...], other: Triple, other_size_nm: tuple[float, ...]
    ) -> Grid:
        """The grid of voxels of ``size_nm`` over one of ``other_size_nm``."""
        ratios = (
            Fraction(a / b).limit_denominator(MAX_DENOMINATOR) for a, b in zip(size_nm, other_size_nm, strict=True)
        )
        z, y, x = ((ratio.numerator, ratio.denominator) for ratio in ratios)
        return cls(shape, other, (z, y, x))

    def nearest(self, axis: int, start: int, stop: int) -> np.ndarray:
        """Along an axis, the voxel of the other grid in which the middle of each voxel lies."""
        up, down = self.steps[axis]
        middle = (2 * np.arange(start, stop, dtype=np.int64) + 1) * up // (2 * down)
        return np.minimum(middle, self.other[axis] - 1)

    def nearest_box(self, box: Box) -> Box:
        """The box of the other grid that `nearest` points into from ``box``, which is not empty."""
        spans = [self.nearest(axis, *span)[[0, -1]] for axis, span in enumerate(zip(box.start, box.stop, strict=True))]
        return Box(tuple(int(a) for a, _ in spans), tuple(int(b) + 1 for _, b in spans))

    def inside(self, box: Box) -> Box:
        """The voxels of this grid whose `nearest` lies in a box of the other one; empty where there are none.

        >>> str(Grid((2, 4, 4), (4, 4, 4), ((2, 1), (1, 1), (1, 1))).inside(Box((2, 0, 0), (4, 2, 4))))
        '1:2,0:2,0:4'
        """
        spans = []
        for axis, (low, high) in enumerate(zip(box.start, box.stop, strict=True)):
            up, down = self.steps[axis]
            first = min(max(0, low * down // up - 1), self.shape[axis])
            last = min(high * down // up + 2, self.shape[axis])
            last = self.shape[axis] if high == self.other[axis] else last
            spans.append(first + np.searchsorted(self.nearest(axis, first, last), (low, high)))
        return Box(tuple(int(a) for a, _ in spans), tuple(int(b) for _, b in spans))

    def covered(self, box: Box) -> Box:
        """The voxels of the other grid that share space with those of ``box``."""
        spans = list(zip(self.steps, box.start, box.stop, self.other, strict=True))
        start = tuple(min(a * up // down, n - 1) for (up, down), a, _, n in spans)
        stop = tuple(min(-(-b * up // down), n) for (up, down), _, b, n in spans)
        return Box(start, tuple(max(a + 1, b) for a, b in zip(start, stop, strict=True)))

    def take(self, values: np.ndarray, inside: Box, box: Box) -> np.ndarray:
        """``values``, those of a box ``inside`` the other grid, at the middles of the voxels of ``box``."""
        for axis, (start, stop) in enumerate(zip(box.start, box.stop, strict=True)):
            values = values.take(self.nearest(axis, start, stop) - inside.start[axis], axis)
        return values


def shape_at(shape: Triple, size_nm: tuple[float, ...], wanted_nm: tuple[float, ...]) -> Triple:
    """How many voxels of about ``wanted_nm`` cover a volume.

    >>> shape_at((25, 384, 512), (10.0, 20.0, 20.0), (5.0, 5.0, 5.0))
    (50, 1536, 2048)
    """
    return tuple(max(1, round(n * a / b)) for n, a, b in zip(shape, size_nm, wanted_nm, strict=True))


def resample(read: Read, stored: Triple, dtype: str, shape: Triple, box: Box) -> np.ndarray:
    """The voxels of ``box`` of a volume with ``shape`` voxels, read from one with ``stored`` voxels in the same space.

    Parameters
    ----------
    read
        Gives the stored voxels of a box.
    stored, dtype
        Shape z y x and type of what is stored.
    shape
        Voxels z y x of the volume that is made.
    box
        Inside it.

    Returns
    -------
    numpy.ndarray
        Of ``dtype``; whole numbers are rounded half up.
    """
    out = np.empty(box.shape, dtype)
    for part in Blocks(box.shape, _piece(box, stored, shape)):
        place = part.shift(box.start)
        spans = zip(stored, shape, place.start, place.stop, strict=True)
        taps = [_taps(n, m, a, b, _weight_bits(dtype)) for n, m, a, b in spans]
        start, stop = tuple(int(i.min()) for i, _ in taps), tuple(int(i.max()) + 1 for i, _ in taps)
        out[part.slices] = _weigh(read(Box(start, stop)), [(i - a, w) for (i, w), a in zip(taps, start, strict=True)])
    return out


def _piece(box: Box, stored: Triple, shape: Triple) -> Triple:
    """The largest part of ``box``, cut along z and then y, for which few enough stored voxels are read."""
    z, y, x = box.shape
    each = [n / m for n, m in zip(stored, shape, strict=True)]
    rows = max(1, min(y, int(PIECE_VOXELS / (prod(each) * x))))
    return max(1, min(z, int(PIECE_VOXELS / (prod(each) * x * rows)))), rows, x


def _weight_bits(dtype: str | np.dtype) -> int:
    """Bits of a weight: three weights and a value fit the integer in which they are multiplied; 0 for floats."""
    kind = np.dtype(dtype)
    return 8 if kind == np.uint8 else 12 if kind.kind in "iu" and kind.itemsize <= 2 else 0


def _taps(stored: int, shape: int, start: int, stop: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """For each voxel from ``start`` to ``stop``: indices of stored voxels (n, taps), and their weights (n, taps).

    >>> index, weight = _taps(4, 2, 0, 2, 8)
    >>> index.tolist(), weight.tolist()
    ([[0, 1], [2, 3]], [[128, 128], [128, 128]])
    >>> index, weight = _taps(2, 4, 0, 4, 8)
    >>> index.tolist(), weight.tolist()
    ([[0, 0], [0, 1], [0, 1], [1, 1]], [[64, 192], [192, 64], [64, 192], [192, 64]])
    """
    i, one = np.arange(start, stop, dtype=np.int64), 1 << (bits or 40)
    if shape == stored:
        index, weight = i[:, None], np.full((i.size, 1), one)
    elif shape > stored:
        place = (2 * i + 1) * stored - shape  # of the middle, times twice ``shape``
        low, rest = place // (2 * shape), place % (2 * shape)
        high_weight = rest * one // (2 * shape)
        index = np.clip(np.stack([low, low + 1], axis=1), 0, stored - 1)
        weight = np.stack([one - high_weight, high_weight], axis=1)
    else:
        first = i * stored // shape
        count = int((-(-(i + 1) * stored // shape) - first).max())
        edges = np.clip((first[:, None] + np.arange(count + 1)) * shape - i[:, None] * stored, 0, stored)
        weight = np.diff(edges * one // stored, axis=1)
        index = np.minimum(first[:, None] + np.arange(count), stored - 1)
    return index, weight if bits else weight / one


def _weigh(values: np.ndarray, taps: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The weighted sums of stored voxels, of their type."""
    dtype = values.dtype.newbyteorder("=")
    values = np.ascontiguousarray(values, np.float32 if dtype == np.float16 else dtype)  # what numba knows
    bits, out = _weight_bits(dtype), np.empty([len(index) for index, _ in taps], dtype)
    if bits:
        kind = np.dtype(np.uint32 if bits == 8 else np.int64)
        arguments = [part for index, weight in taps for part in (index, weight.astype(kind))]
        _weigh_integers(values, *arguments, kind.type(1 << (3 * bits - 1)), 3 * bits, out)
        return out
    arguments = [part for pair in taps for part in pair]
    sums = np.empty(out.shape, np.float64)
    _weigh_floats(values, *arguments, sums)
    return (sums if dtype.kind == "f" else np.floor(sums + 0.5)).astype(dtype)


# Both kernels: stored rows are summed to one row first, which is then summed along x. Invariant: the order of a voxel's sums
# is that of its taps, and taps without weight add nothing; so what a voxel gets does not depend on the box around it.
@numba.njit(cache=True, nogil=True)
def _weigh_integers(values, zi, zw, yi, yw, xi, xw, half, shift, out):
    row = np.empty(values.shape[2], zw.dtype)
    for z in range(out.shape[0]):
        for y in range(out.shape[1]):
            row[:] = 0
            for a in range(zi.shape[1]):
                for b in range(yi.shape[1]):
                    weight = zw[z, a] * yw[y, b]
                    if weight:
                        line = values[zi[z, a], yi[y, b]]
                        for x in range(row.size):
                            row[x] += weight * line[x]
            for x in range(out.shape[2]):
                total = half
                for c in range(xi.shape[1]):
                    total += xw[x, c] * row[xi[x, c]]
                out[z, y, x] = total >> shift


@numba.njit(cache=True, nogil=True)
def _weigh_floats(values, zi, zw, yi, yw, xi, xw, out):
    row = np.empty(values.shape[2], np.float64)
    for z in range(out.shape[0]):
        for y in range(out.shape[1]):
            row[:] = 0
            for a in range(zi.shape[1]):
                for b in range(yi.shape[1]):
                    weight = zw[z, a] * yw[y, b]
                    if weight:
                        line = values[zi[z, a], yi[y, b]]
                        for x in range(row.size):
                            row[x] += weight * line[x]
            for x in range(out.shape[2]):
                total = 0.0
                for c in range(xi.shape[1]):
                    if xw[x, c]:
                        total += xw[x, c] * row[xi[x, c]]
                out[z, y, x] = total
