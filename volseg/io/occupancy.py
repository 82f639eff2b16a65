"""Where a mask holds something, as cells of a coarse grid: what nobody wants is known there without a look at the mask."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from volseg.box import Blocks, Box, Triple

MOST_CELLS = 1 << 22

Spans = Sequence[tuple[np.ndarray, np.ndarray]]  # along z, y, x: where boxes that form a grid start and stop


@dataclass(frozen=True)
class Occupancy:
    """The cells of ``edge`` voxels a side in which a mask of that ``shape`` may hold a voxel that is not 0.

    ``packed`` has a bit for each cell, compressed, as text.

    >>> part = np.zeros((1, 4, 6), bool)
    >>> part[0, 3, 4] = True
    >>> found = Occupied((1, 4, 6), most=8)
    >>> found.add(Box((0, 0, 0), (1, 4, 6)), part)
    >>> occupancy = found.occupancy()
    >>> occupancy.edge, occupancy.held.tolist(), str(occupancy.bounds(Box((0, 0, 3), (1, 4, 6))))
    (2, [[[False, False, False], [False, False, True]]], '0:1,2:4,4:6')
    """

    shape: Triple
    edge: int
    packed: str

    @classmethod
    def of(cls, shape: Triple, edge: int, held: np.ndarray) -> Occupancy:
        return cls(shape, edge, base64.b64encode(zlib.compress(np.packbits(held).tobytes(), 9)).decode())

    @property
    def cells(self) -> Blocks:
        return Blocks(self.shape, (self.edge,) * 3)

    @cached_property
    def held(self) -> np.ndarray:
        """Of each cell, z y x: whether there may be something in it. Raises `ValueError` where nobody can tell."""
        try:
            bits = np.frombuffer(zlib.decompress(base64.b64decode(self.packed)), np.uint8)
        except zlib.error as error:
            raise ValueError(f"cells of a mask are damaged ({error})") from None
        if bits.size != -(-len(self.cells) // 8):
            raise ValueError(f"{8 * bits.size} bits are not of {len(self.cells)} cells")
        return np.unpackbits(bits, count=len(self.cells)).astype(bool).reshape(self.cells.counts)

    def check(self, shape: Triple) -> None:
        """Raises `ValueError` where these are no cells of a mask of that shape."""
        if self.shape != shape or self.edge < 1 or self.held.shape != self.cells.counts:
            raise ValueError(f"cells of {self.edge} voxels are not those of a mask of {shape}")

    def bounds(self, box: Box) -> Box:
        """The smallest box that has all of these cells' voxels that ``box`` has; an empty one where it has none."""
        spans = self.cells.spans(box)
        held = self.held[tuple(slice(span.start, span.stop) for span in spans)]
        if not held.any():
            return Box(box.start, box.start)
        start, stop = [], []
        for axis, span in enumerate(spans):
            along = np.flatnonzero(held.any(axis=tuple(k for k in range(3) if k != axis)))
            start.append((span.start + int(along[0])) * self.edge)
            stop.append((span.start + int(along[-1]) + 1) * self.edge)
        return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])).intersect(box)

    def count(self, spans: Spans) -> np.ndarray:
        """How many voxels of these cells lie in each box of a grid of boxes, int64 z y x.

        >>> occupancy = Occupancy.of((1, 1, 6), 2, np.array([[[True, False, True]]]))
        >>> one = np.array([0]), np.array([1])
        >>> occupancy.count([one, one, (np.array([0, 1, 2, 3]), np.array([6, 5, 4, 6]))]).tolist()
        [[[4, 2, 0, 2]]]
        """
        found = self.held.astype(np.int64)
        for axis, (start, stop) in enumerate(spans):
            before = self._before(found, axis)
            found = before(np.asarray(stop)) - before(np.asarray(start))
        return found

    def _before(self, values: np.ndarray, axis: int) -> Callable[[np.ndarray], np.ndarray]:
        """Sums of ``values`` of cells, times their voxels along an axis, up to a voxel of that axis."""
        length = np.minimum(self.edge, self.shape[axis] - self.edge * np.arange(values.shape[axis]))
        each = np.moveaxis(values, axis, -1)
        sums = np.concatenate([np.zeros((*each.shape[:-1], 1), np.int64), (each * length).cumsum(-1)], -1)

        def up_to(voxel: np.ndarray) -> np.ndarray:
            cell = np.minimum(voxel // self.edge, length.size - 1)
            return np.moveaxis(sums[..., cell] + each[..., cell] * (voxel - cell * self.edge), -1, axis)

        return up_to


class Occupied:
    """Cells that turn out to hold something while a mask of that shape is looked through; ``most`` of them at most."""

    def __init__(self, shape: Triple, most: int = MOST_CELLS) -> None:
        edge = 1
        while len(Blocks(shape, (edge,) * 3)) > most:
            edge *= 2
        self.cells = Blocks(shape, (edge,) * 3)
        self.held = np.zeros(self.cells.counts, bool)

    def add(self, box: Box, part: np.ndarray | None = None) -> None:
        """In ``box`` are the voxels ``part``, bool z y x; without it, each may be one."""
        spans = self.cells.spans(box)
        place = tuple(slice(span.start, span.stop) for span in spans)
        if part is None:
            self.held[place] = True
            return
        for axis, span in enumerate(spans):
            first = np.maximum(np.array(span) * self.cells.block[axis] - box.start[axis], 0)
            part = np.logical_or.reduceat(part, first, axis)
        self.held[place] |= part

    def occupancy(self) -> Occupancy:
        return Occupancy.of(self.cells.shape, self.cells.block[0], self.held)


@dataclass(frozen=True)
class Stored:
    """The boxes that an array stores one by one, and which of these are there: in others every voxel is 0."""

    grid: Blocks
    there: np.ndarray

    @property
    def voxels(self) -> int:
        """Of those that are there."""
        return int(self.there.sum()) * prod(self.grid.block)

    def any(self, box: Box) -> bool:
        """Whether anything is stored that ``box`` has a voxel of."""
        return bool(self.there[tuple(slice(span.start, span.stop) for span in self.grid.spans(box))].any())

    def boxes(self) -> list[Box]:
        """Those that are there, in raster order."""
        return [self.grid[int(i)] for i in np.flatnonzero(self.there)]
