"""Boxes of voxels, and the grids of blocks that tile a volume. Axes are z, y, x throughout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

Triple = tuple[int, int, int]
VoxelSize = tuple[float, float, float]  # nm, z y x
Slices = tuple[slice, slice, slice]


def transpose_axes(triple: Triple, axes: Triple) -> Triple:
    """``triple`` with its axes in another order, as `numpy.transpose` takes them.

    >>> transpose_axes((5, 6, 7), (2, 0, 1))
    (7, 5, 6)
    """
    z, y, x = axes
    return triple[z], triple[y], triple[x]


def inverse_axes(axes: Triple) -> Triple:
    """The order of axes that undoes ``axes``.

    >>> transpose_axes(transpose_axes((5, 6, 7), (2, 0, 1)), inverse_axes((2, 0, 1)))
    (5, 6, 7)
    """
    return axes.index(0), axes.index(1), axes.index(2)


@dataclass(frozen=True, order=True)
class Box:
    """The voxels with ``start <= index < stop``, z y x.

    >>> Box((0, 0, 0), (2, 3, 4)).grow(1).clip((9, 9, 9))
    Box(start=(0, 0, 0), stop=(3, 4, 5))
    """

    start: Triple
    stop: Triple

    @classmethod
    def from_shape(cls, shape: tuple[int, ...]) -> Box:
        """The box of all voxels of a volume.

        Parameters
        ----------
        shape
            Voxels along z, y and x.
        """
        z, y, x = shape
        return cls((0, 0, 0), (int(z), int(y), int(x)))

    @classmethod
    def parse(cls, text: str) -> Box:
        """The box written as ``z0:z1,y0:y1,x0:x1``.

        Raises
        ------
        ValueError
            If the text has another form, or the box is empty or begins below 0.

        Examples
        --------
        >>> str(Box.parse("0:10,5:20,7:9"))
        '0:10,5:20,7:9'
        """
        try:
            pairs = [tuple(int(n) for n in part.split(":")) for part in text.split(",")]
            (z0, z1), (y0, y1), (x0, x1) = pairs
        except ValueError:
            raise ValueError(f"box {text!r} is not of the form z0:z1,y0:y1,x0:x1 with whole numbers") from None
        if min(z0, y0, x0) < 0:
            raise ValueError(f"box {text!r} begins before the first voxel, which is 0 along each axis")
        if not (z0 < z1 and y0 < y1 and x0 < x1):
            raise ValueError(f"box {text!r} is empty; each axis needs start < stop")
        return cls((z0, y0, x0), (z1, y1, x1))

    def __str__(self) -> str:
        return ",".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True))

    @property
    def shape(self) -> Triple:
        """Voxels along z, y and x; 0 or less on an axis where the box is empty."""
        (z0, y0, x0), (z1, y1, x1) = self.start, self.stop
        return z1 - z0, y1 - y0, x1 - x0

    @property
    def voxels(self) -> int:
        """How many voxels the box holds."""
        return prod(max(0, n) for n in self.shape)

    @property
    def slices(self) -> Slices:
        """Slices that cut the box out of an array of the volume."""
        (z0, y0, x0), (z1, y1, x1) = self.start, self.stop
        return slice(z0, z1), slice(y0, y1), slice(x0, x1)

    def grow(self, halo: int | Triple) -> Box:
        """This box with ``halo`` voxels more on both sides of each axis; it may leave the volume."""
        dz, dy, dx = (halo,) * 3 if isinstance(halo, int) else halo
        (z0, y0, x0), (z1, y1, x1) = self.start, self.stop
        return Box((z0 - dz, y0 - dy, x0 - dx), (z1 + dz, y1 + dy, x1 + dx))

    def intersect(self, other: Box) -> Box:
        """The voxels in both boxes; where there are none, an empty box (some axis has length 0)."""
        z0, y0, x0 = (max(a, b) for a, b in zip(self.start, other.start, strict=True))
        z1, y1, x1 = (min(a, b) for a, b in zip(self.stop, other.stop, strict=True))
        return Box((z0, y0, x0), (max(z0, z1), max(y0, y1), max(x0, x1)))

    def clip(self, shape: Triple) -> Box:
        """The part of this box that lies in a volume of that shape."""
        return self.intersect(Box.from_shape(shape))

    def shift(self, offset: Triple) -> Box:
        """This box moved by ``offset`` voxels."""
        (z0, y0, x0), (z1, y1, x1), (dz, dy, dx) = self.start, self.stop, offset
        return Box((z0 + dz, y0 + dy, x0 + dx), (z1 + dz, y1 + dy, x1 + dx))

    def transpose(self, axes: Triple) -> Box:
        """This box with its axes in another order.

        >>> str(Box((0, 2, 4), (1, 3, 5)).transpose((2, 0, 1)))
        '4:5,0:1,2:3'
        """
        return Box(transpose_axes(self.start, axes), transpose_axes(self.stop, axes))

    def slices_within(self, outer: Box) -> Slices:
        """Slices that cut this box out of an array that holds ``outer``.

        >>> Box((4, 0, 2), (5, 1, 3)).slices_within(Box((3, 0, 0), (9, 9, 9)))
        (slice(1, 2, None), slice(0, 1, None), slice(2, 3, None))
        """
        z, y, x = outer.start
        return self.shift((-z, -y, -x)).slices


@dataclass(frozen=True)
class Blocks:
    """A volume cut into a regular grid of blocks; those at the far end may be shorter.

    Blocks meet at multiples of ``block``, or ``shift`` voxels before them. No block of ``tail`` voxels or fewer is left at the
    far end: they belong to the last one.

    >>> grid = Blocks((5, 4, 4), (2, 4, 4))
    >>> len(grid), str(grid[2]), grid.index((2, 0, 0))
    (3, '4:5,0:4,0:4', 2)
    >>> [str(box) for box in Blocks((9, 1, 1), (4, 1, 1), shift=(1, 0, 0), tail=(1, 0, 0))]
    ['0:3,0:1,0:1', '3:9,0:1,0:1']
    """

    shape: Triple
    block: Triple
    shift: Triple = (0, 0, 0)
    tail: Triple = (0, 0, 0)

    @cached_property
    def counts(self) -> Triple:
        """Blocks along each axis."""
        z, y, x = (max(1, -(-(n - t) // b)) for n, b, t in zip(self.shape, self.block, self.tail, strict=True))
        return z, y, x

    def edge(self, axis: int, k: int) -> int:
        """Where block ``k`` along an axis begins, and the one before it ends."""
        if k == self.counts[axis]:
            return self.shape[axis]
        return k * self.block[axis] - self.shift[axis] if k else 0

    def position(self, axis: int, voxel: int) -> int:
        """Which block along an axis holds a voxel."""
        return min((voxel + self.shift[axis]) // self.block[axis], self.counts[axis] - 1)

    def __len__(self) -> int:
        return prod(self.counts)

    def coords(self, i: int) -> Triple:
        """Grid position of block ``i`` (raster order)."""
        _, ny, nx = self.counts
        return i // (ny * nx), i // nx % ny, i % nx

    def index(self, coords: Triple) -> int:
        """Number of the block at a grid position."""
        _, ny, nx = self.counts
        return (coords[0] * ny + coords[1]) * nx + coords[2]

    def __getitem__(self, i: int) -> Box:
        if not 0 <= i < len(self):
            raise IndexError(i)
        z, y, x = self.coords(i)
        start = self.edge(0, z), self.edge(1, y), self.edge(2, x)
        return Box(start, (self.edge(0, z + 1), self.edge(1, y + 1), self.edge(2, x + 1)))

    def __iter__(self) -> Iterator[Box]:
        return (self[i] for i in range(len(self)))

    def next_along(self, i: int, axis: int) -> int | None:
        """Number of the block behind block ``i`` along an axis; None where the volume ends.

        >>> grid = Blocks((5, 4, 4), (2, 4, 4))
        >>> grid.next_along(1, 0), grid.next_along(2, 0)
        (2, None)
        """
        z, y, x = (c + (k == axis) for k, c in enumerate(self.coords(i)))
        return self.index((z, y, x)) if self[i].stop[axis] < self.shape[axis] else None

    def neighbors(self, i: int) -> list[int]:
        """Numbers of the blocks that share a face with block ``i``."""
        z, y, x = self.coords(i)
        numbers = []
        for axis, step in product(range(3), (-1, 1)):
            neighbor = z + step * (axis == 0), y + step * (axis == 1), x + step * (axis == 2)
            if 0 <= neighbor[axis] < self.counts[axis]:
                numbers.append(self.index(neighbor))
        return numbers

    def overlapping(self, box: Box) -> list[int]:
        """Numbers of the blocks that share a voxel with ``box``, in raster order."""
        return [self.index((z, y, x)) for z, y, x in product(*self.spans(box))]

    def count_overlapping(self, box: Box) -> int:
        """How many blocks share a voxel with ``box``.

        >>> Blocks((1 << 40, 4, 4), (2, 2, 4)).count_overlapping(Box((1, 1, 0), (1 << 39, 4, 9)))
        549755813888
        """
        return prod(map(len, self.spans(box)))

    def spans(self, box: Box) -> tuple[range, range, range]:
        """Along each axis, the grid positions of the blocks that share a voxel with ``box``."""
        box = box.clip(self.shape)
        if not box.voxels:
            return range(0), range(0), range(0)
        ends = zip(range(3), box.start, box.stop, strict=True)
        z, y, x = (range(self.position(k, a), self.position(k, b - 1) + 1) for k, a, b in ends)
        return z, y, x
