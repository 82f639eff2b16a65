"""Boxes: half-open voxel regions, and the lists of blocks that tile a volume. Axes are z, y, x throughout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

Triple = tuple[int, int, int]
VoxelSize = tuple[float, float, float]  # nm, z y x


def turned(triple: Triple, axes: Triple) -> Triple:
    """``triple`` with its axes in another order, as `numpy.transpose` takes them; `back` of ``axes`` undoes it."""
    return tuple(triple[a] for a in axes)


def back(axes: Triple) -> Triple:
    """The order of axes that undoes ``axes``.

    >>> turned(turned((5, 6, 7), (2, 0, 1)), back((2, 0, 1)))
    (5, 6, 7)
    """
    return tuple(axes.index(k) for k in range(3))


@dataclass(frozen=True, order=True)
class Box:
    """The voxels with ``start <= index < stop``, z y x.

    >>> Box((0, 0, 0), (2, 3, 4)).grow(1).clip((9, 9, 9))
    Box(start=(0, 0, 0), stop=(3, 4, 5))
    """

    start: Triple
    stop: Triple

    @classmethod
    def whole(cls, shape: Triple) -> Box:
        """The box of a volume of that shape."""
        return cls((0, 0, 0), tuple(int(n) for n in shape))

    @classmethod
    def parse(cls, text: str) -> Box:
        """The box written as ``z0:z1,y0:y1,x0:x1``.

        >>> str(Box.parse("0:10,5:20,7:9"))
        '0:10,5:20,7:9'
        """
        try:
            pairs = [tuple(int(n) for n in part.split(":")) for part in text.split(",")]
            (z0, z1), (y0, y1), (x0, x1) = pairs
        except ValueError:
            raise ValueError(f"box {text!r} is not of the form z0:z1,y0:y1,x0:x1 with whole numbers") from None
        if not (0 <= z0 < z1 and 0 <= y0 < y1 and 0 <= x0 < x1):
            raise ValueError(f"box {text!r} is empty or negative; each axis needs 0 <= start < stop")
        return cls((z0, y0, x0), (z1, y1, x1))

    def __str__(self) -> str:
        return ",".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True))

    @property
    def shape(self) -> Triple:
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def voxels(self) -> int:
        return prod(max(0, n) for n in self.shape)

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    def grow(self, halo: int | Triple) -> Box:
        """This box with ``halo`` voxels more on both sides of each axis; may leave the volume."""
        halo = (halo,) * 3 if isinstance(halo, int) else halo
        return Box(
            tuple(a - h for a, h in zip(self.start, halo, strict=True)),
            tuple(b + h for b, h in zip(self.stop, halo, strict=True)),
        )

    def intersect(self, other: Box) -> Box:
        """The voxels in both boxes; where there are none, an empty box (some axis of length 0)."""
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        stop = tuple(min(a, b) for a, b in zip(self.stop, other.stop, strict=True))
        return Box(start, tuple(max(a, b) for a, b in zip(start, stop, strict=True)))

    def clip(self, shape: Triple) -> Box:
        """The part of this box that lies in a volume of that shape."""
        return self.intersect(Box.whole(shape))

    def shift(self, offset: Triple) -> Box:
        """This box moved by ``offset`` voxels."""
        return Box(
            tuple(a + o for a, o in zip(self.start, offset, strict=True)),
            tuple(b + o for b, o in zip(self.stop, offset, strict=True)),
        )

    def turned(self, axes: Triple) -> Box:
        """This box with its axes in another order.

        >>> str(Box((0, 2, 4), (1, 3, 5)).turned((2, 0, 1)))
        '4:5,0:1,2:3'
        """
        return Box(turned(self.start, axes), turned(self.stop, axes))

    def inside(self, outer: Box) -> tuple[slice, slice, slice]:
        """Slices that cut this box out of an array that holds ``outer``."""
        return self.shift(tuple(-a for a in outer.start)).slices


@dataclass(frozen=True)
class Blocks:
    """A volume cut into a regular grid of blocks; those at the far end may be shorter.

    >>> grid = Blocks((5, 4, 4), (2, 4, 4))
    >>> len(grid), str(grid[2]), grid.index((2, 0, 0))
    (3, '4:5,0:4,0:4', 2)
    """

    shape: Triple
    block: Triple

    @property
    def counts(self) -> Triple:
        """Blocks along each axis."""
        return tuple(-(-n // b) for n, b in zip(self.shape, self.block, strict=True))

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
        start = tuple(c * b for c, b in zip(self.coords(i), self.block, strict=True))
        return Box(start, tuple(a + b for a, b in zip(start, self.block, strict=True))).clip(self.shape)

    def __iter__(self) -> Iterator[Box]:
        return (self[i] for i in range(len(self)))

    def neighbors(self, i: int) -> list[int]:
        """Numbers of the blocks that share a face with block ``i``."""
        here = self.coords(i)
        found = []
        for axis, step in product(range(3), (-1, 1)):
            there = list(here)
            there[axis] += step
            if 0 <= there[axis] < self.counts[axis]:
                found.append(self.index(tuple(there)))
        return found

    def meeting(self, box: Box) -> list[int]:
        """Numbers of the blocks that share a voxel with ``box``, in raster order."""
        box = box.clip(self.shape)
        if not box.voxels:
            return []
        spans = [range(a // b, -(-e // b)) for a, e, b in zip(box.start, box.stop, self.block, strict=True)]
        return [self.index(c) for c in product(*spans)]
