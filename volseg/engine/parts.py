"""Where a run has something to do: blocks in which nothing is wanted get no task, no marker, no table and no shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from volseg.box import Blocks, Box, Triple, inverse_axes, transpose_axes
from volseg.engine.block_tables import BlockLabels
from volseg.inference import tiles
from volseg.io.roi import RegionOfInterest
from volseg.segmentation import objects, stitch
from volseg.segmentation.basins import BlockBasins, no_basins
from volseg.segmentation.heights import smoothing_reach

if TYPE_CHECKING:
    from volseg.engine.run import Run


@dataclass(frozen=True)
class Part:
    """The blocks of a grid in which there is something to do.

    grid      all blocks
    box       the others share no voxel with it; None where all blocks are looked at
    counted   gives of each block under ``box``, z y x, the voxels that there are to do, 0 where there is nothing; None where
              these are all that it shares with ``box``
    """

    grid: Blocks
    box: Box | None = None
    counted: Callable[[], np.ndarray] | None = field(default=None, compare=False)

    @cached_property
    def rows(self) -> tuple[range, range, range]:
        """Along each axis, the blocks under the box."""
        return self.grid.spans(self.box or Box.from_shape(self.grid.shape))

    @cached_property
    def each(self) -> np.ndarray | None:
        """What `counted` gives, z y x."""
        return self.counted() if self.counted else None

    @cached_property
    def numbers(self) -> Sequence[int]:
        """Of these blocks, in raster order."""
        if self.each is None:
            return range(len(self.grid)) if self.box is None else self.grid.overlapping(self.box)
        _, ny, nx = self.grid.counts
        z, y, x = (at + row.start for at, row in zip(np.nonzero(self.each), self.rows, strict=True))
        return ((z * ny + y) * nx + x).tolist()

    @cached_property
    def count(self) -> int:
        return prod(map(len, self.rows)) if self.each is None else int(np.count_nonzero(self.each))

    @property
    def is_whole(self) -> bool:
        """Whether these are all blocks of the grid."""
        return self.count == len(self.grid)

    @property
    def _all(self) -> Box:
        """Where there is something to do."""
        whole = Box.from_shape(self.grid.shape)
        return whole.intersect(self.box) if self.box else whole

    @cached_property
    def voxels(self) -> int:
        """That there are to do in all of these blocks."""
        return self._all.voxels if self.each is None else int(self.each.sum())

    @property
    def block_voxels(self) -> int:
        """Of all of these blocks as a whole."""
        if self.each is None:
            ends = ((self.grid.edge(k, row.start), self.grid.edge(k, row.stop)) for k, row in enumerate(self.rows))
            return prod(stop - start for start, stop in ends)
        z, y, x = (
            np.diff([self.grid.edge(k, c) for c in range(row.start, row.stop + 1)]) for k, row in enumerate(self.rows)
        )
        return int((self.each > 0) @ x @ y @ z)

    def voxels_of(self, i: int) -> int:
        """That there are to do in block ``i``; 0 where it is none of these."""
        coords = self.grid.coords(i)
        if not all(c in row for c, row in zip(coords, self.rows, strict=True)):
            return 0
        if self.each is None:
            return self.grid[i].intersect(self._all).voxels
        return int(self.each[tuple(c - row.start for c, row in zip(coords, self.rows, strict=True))])

    def holds(self, i: int) -> bool:
        return self.voxels_of(i) > 0


@dataclass(frozen=True)
class Parts:
    """The blocks of each grid of a run in which something is to be done.

    Where nothing is wanted there are no probabilities, so no basins and no labels. Where holes are filled, or voxels without
    any probability belong to basins, all blocks are looked at.
    """

    run: Run
    known: dict[tuple[str, int | str], Part] = field(default_factory=dict, compare=False)

    @property
    def _bounded(self) -> bool:
        return bool(self.run.roi) and not self.run.fills_holes and self.run.config.fragments.threshold > 0

    @cached_property
    def _smoothed(self) -> Triple:
        """Voxels that smoothing may carry the mask beyond what is wanted."""
        masked = bool(self.run.roi and self.run.roi.mask)
        return smoothing_reach(self.run.config.fragments, convex=not masked)

    def inferred(self, plane: str) -> Part:
        """Those that infer: also where tiles begin that reach a wanted voxel."""
        rows, columns = self.run.tile_grid(plane).size
        ahead = transpose_axes((0, rows - 1, columns - 1), inverse_axes(tiles.PLANES[plane]))
        part = self._part("inferred", plane, self.run.grid_of(plane), self.run.roi, ahead=ahead)
        if part.box is None or part.counted:
            return part
        counted = partial(_shares_of_tiles, self.run, plane, part)
        return self.known.setdefault(("counted", plane), replace(part, counted=counted))

    def probabilities(self, level: int) -> Part:
        """Those that hold probabilities."""
        grid, levels = self.run.probability_grid(level), self.run.probability_levels
        return self._part("probabilities", level, grid, self.run.roi, levels=levels[: level + 1])

    @property
    def own(self) -> Part:
        """Those that hold basins."""
        region = self.run.roi if self._bounded else None
        return self._part("own", 0, self.run.grid, region, around=self._smoothed)

    def labels(self, level: int) -> Part:
        """Those that hold labels."""
        region, around = self._labeled
        levels = self.run.levels[: level + 1]
        return self._part("labels", level, self.run.level_grid(level), region, around=around, levels=levels)

    @property
    def _labeled(self) -> tuple[RegionOfInterest | None, Triple]:
        """The region of the labels, and how far beyond it they may reach."""
        region, around = (self.run.given_roi, (0, 0, 0)) if self.run.restored else (self.run.roi, self._smoothed)
        return (region, around) if self._bounded else (None, (0, 0, 0))

    def probable(self, level: int, box: Box) -> Box:
        """The part of ``box``, of that level of the probabilities, outside of which they are 0."""
        return _part_at(self.run.roi, (0, 0, 0), self.run.probability_levels[: level + 1], box)

    def labeled(self, level: int, box: Box) -> Box:
        """The part of ``box``, of that level of the labels, outside of which there are none."""
        return _part_at(*self._labeled, self.run.levels[: level + 1], box)

    @cached_property
    def nothing(self) -> Nothing | None:
        return Nothing(self.own, self.labels(0), self.run.config.fragments.connectivity) if self._bounded else None

    def _part(
        self, what: str, which: int | str, grid: Blocks, region: RegionOfInterest | None, *, around: Triple = (0, 0, 0),
        ahead: Triple = (0, 0, 0), levels: Sequence[tuple[Triple, Triple]] = (),
    ) -> Part:  # fmt: skip
        """The blocks from which something of the region is not farther than ``around``, or ``ahead`` behind their far end.

        ``levels``: from the finest on, to the one that the grid is of.
        """
        if (what, which) not in self.known:
            self.known[what, which] = _part_of(grid, region, around, ahead, list(levels)[1:])
        return self.known[what, which]


def _part_of(
    grid: Blocks, region: RegionOfInterest | None, around: Triple, ahead: Triple, coarser: list[tuple[Triple, Triple]]
) -> Part:
    if region is None:
        return Part(grid)
    z, y, x = (max(0, a - n - m) for a, n, m in zip(region.roi.start, around, ahead, strict=True))
    dz, dy, dx = (b + n for b, n in zip(region.roi.stop, around, strict=True))
    box = _scaled(Box((z, y, x), (dz, dy, dx)), coarser).clip(grid.shape)
    if region.occupied is None:
        return Part(grid, box)
    factor = _factor([factor for _, factor in coarser])
    edges = [np.array([grid.edge(k, c) for c in range(row.start, row.stop + 1)]) * factor[k]
             for k, row in enumerate(grid.spans(box))]  # fmt: skip

    def counted() -> np.ndarray:
        own = [(edge[:-1], edge[1:]) for edge in edges]
        voxels = region.count(own)
        if any(around) or any(ahead):
            near = [(start - n, stop + n + m) for (start, stop), n, m in zip(own, around, ahead, strict=True)]
            voxels = np.where(region.count(near) > 0, np.maximum(voxels, 1), 0)
        return voxels

    return Part(grid, box, counted)


def _shares_of_tiles(run: Run, plane: str, part: Part) -> np.ndarray:
    """The wanted voxels of a pass, shared among its blocks, z y x, as the tiles that begin in them are: so is the time."""
    wanted, grid = run.wanted_part(Box.from_shape(run.shape)), run.tile_grid(plane)
    along = {}
    for axis, of_tiles in zip(tiles.PLANES[plane], (None, grid.y, grid.x), strict=True):
        row, start, stop = part.rows[axis], wanted.start[axis], wanted.stop[axis]
        blocks = list(pairwise(part.grid.edge(axis, k) for k in range(row.start, row.stop + 1)))
        if of_tiles is None:
            along[axis] = [max(0, min(stop, end) - max(start, begin)) for begin, end in blocks]
        else:
            reach = of_tiles.overlapping(start, stop)
            begun = (of_tiles.starting(begin, end) for begin, end in blocks)
            along[axis] = [len(range(max(reach.start, of.start), min(reach.stop, of.stop))) for of in begun]
    z, y, x = np.ix_(*(np.array(along[axis], np.float64) for axis in range(3)))
    count = z * y * x
    return np.maximum(1, np.rint(run.wanted_voxels * (count / max(1, count.sum())))).astype(np.int64)


def _part_at(region: RegionOfInterest | None, around: Triple, levels: Sequence[tuple[Triple, Triple]], box: Box) -> Box:
    """The part of ``box``, of the last of these levels, made from what is no farther than ``around`` from the region."""
    if region is None:
        return box
    factor = _factor([factor for _, factor in levels])
    start, stop = ([n * f for n, f in zip(end, factor, strict=True)] for end in (box.start, box.stop))
    finest = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])).clip(levels[0][0])
    wanted = region.part(finest.grow(around))
    if not wanted.voxels:
        return Box(box.start, box.start)
    return _scaled(wanted.grow(around).clip(levels[0][0]), list(levels)[1:]).intersect(box)


def _factor(factors: Sequence[Triple]) -> Triple:
    """Of several levels together."""
    z, y, x = (prod(along) for along in zip((1, 1, 1), *factors, strict=True))
    return z, y, x


def _scaled(box: Box, coarser: list[tuple[Triple, Triple]]) -> Box:
    """The voxels of a coarser level that are made from those of ``box``."""
    for shape, factor in coarser:
        ends = zip(box.start, box.stop, factor, strict=True)
        z, y, x = ((a // f, -(-b // f)) for a, b, f in ends)
        box = Box((z[0], y[0], x[0]), (z[1], y[1], x[1])).clip(shape)
    return box


@dataclass(frozen=True)
class Nothing:
    """What the tables of blocks without a wanted voxel would hold."""

    own: Part
    output: Part
    connectivity: int

    def basins(self, i: int) -> BlockBasins | None:
        return None if self.own.holds(i) else no_basins(self.connectivity)

    def links(self, i: int) -> stitch.Links | None:
        return None if self.own.holds(i) else _no_links(self.connectivity)

    def labels(self, i: int) -> BlockLabels | None:
        return None if self.own.holds(i) else BlockLabels(np.zeros(1, np.uint32))

    def sums(self, i: int) -> objects.ObjectSums | None:
        return None if self.output.holds(i) else objects.merge([])


@lru_cache(maxsize=2)
def _no_links(connectivity: int) -> stitch.Links:
    return stitch.link(0, lambda i: no_basins(connectivity), Blocks((1, 1, 1), (1, 1, 1)))
