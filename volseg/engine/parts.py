"""Where a run has something to do: blocks that lie beyond the region of interest get no task, no table and no shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from volseg.box import Blocks, Box, Triple
from volseg.engine.block_tables import BlockLabels
from volseg.segmentation import objects, stitch
from volseg.segmentation.basins import BlockBasins, no_basins

if TYPE_CHECKING:
    from volseg.engine.run import Run


@dataclass(frozen=True)
class Part:
    """The blocks of a grid that share a voxel with ``box``; all where it is None."""

    grid: Blocks
    box: Box | None = None

    @cached_property
    def numbers(self) -> Sequence[int]:
        """Of these blocks, in raster order."""
        return range(len(self.grid)) if self.box is None else self.grid.overlapping(self.box)

    @property
    def count(self) -> int:
        return len(self.grid) if self.box is None else self.grid.count_overlapping(self.box)

    @cached_property
    def shape(self) -> Triple:
        """Of the box that these blocks fill together."""
        if self.box is None:
            return self.grid.shape
        spans = self._spans
        z, y, x = (
            self.grid.edge(k, span.stop) - self.grid.edge(k, span.start) if span else 0 for k, span in enumerate(spans)
        )
        return z, y, x

    @property
    def voxels(self) -> int:
        """Of these blocks together."""
        return prod(self.shape)

    def holds(self, i: int) -> bool:
        return self.box is None or all(c in span for c, span in zip(self.grid.coords(i), self._spans, strict=True))

    @cached_property
    def _spans(self) -> tuple[range, range, range]:
        return self.grid.spans(self.box or Box.from_shape(self.grid.shape))


@dataclass(frozen=True)
class Parts:
    """The blocks of each grid of a run in which something is to be done.

    Beyond the box of the region of interest there are no probabilities, so no basins and no labels. Where holes are filled,
    or voxels without any probability belong to basins, all blocks are looked at.
    """

    run: Run

    @property
    def _wanted(self) -> Box | None:
        return self.run.roi.roi if self.run.roi else None

    @property
    def _bounded(self) -> bool:
        return bool(self.run.roi) and not self.run.fills_holes and self.run.config.fragments.threshold > 0

    def inferred(self, plane: str) -> Part:
        """Those that infer: also where tiles begin that reach a wanted voxel."""
        box = self._wanted and self.run.tiles_reaching(plane, self._wanted)
        return Part(self.run.grid_of(plane), box)

    def probabilities(self, level: int) -> Part:
        """Those that hold probabilities."""
        return Part(self.run.probability_grid(level), _scaled(self._wanted, self.run.probability_levels, level))

    @cached_property
    def own(self) -> Part:
        """Those that hold basins."""
        return Part(self.run.grid, self._wanted if self._bounded else None)

    def labels(self, level: int) -> Part:
        """Those that hold labels."""
        box = self.run.given_roi.roi if self.run.restored and self.run.given_roi else self._wanted
        return Part(self.run.level_grid(level), _scaled(box if self._bounded else None, self.run.levels, level))

    @cached_property
    def nothing(self) -> Nothing | None:
        return Nothing(self.own, self.labels(0), self.run.config.fragments.connectivity) if self._bounded else None


def _scaled(box: Box | None, levels: list[tuple[Triple, Triple]], level: int) -> Box | None:
    """The voxels of a level that are made from those of ``box``."""
    for shape, factor in levels[1 : level + 1] if box else ():
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
