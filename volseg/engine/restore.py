"""Labels of a volume that was resampled, on the grid of the volume as it was given.

A voxel of that grid has the label of the run's own voxel in which its middle lies. So it depends on its place alone, and the
sums for the object table are of the voxels that are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from volseg.box import Box
from volseg.engine.run import Run
from volseg.segmentation import holes


@dataclass(frozen=True)
class OutputBlock:
    """One block of the labels' grid.

    region       uint32 (z, y, x): numbers over all of the run's blocks that it meets, 0 outside
    label        of each of these, ``label[0]`` is 0
    behind       the labels of the plane behind its far end along each axis; None where the volume ends
    """

    region: np.ndarray
    label: np.ndarray
    behind: list[np.ndarray | None]


def own_box(run: Run, box: Box) -> Box:
    """The part of the run's own grid that a box of the labels' grid, with a voxel behind it, is made from."""
    stop = tuple(min(b + 1, n) for b, n in zip(box.stop, run.output_shape, strict=True))
    return run.to_own.nearest_box(Box(box.start, stop))


def own_blocks(run: Run, i: int) -> list[int]:
    """The run's own blocks that block ``i`` of the labels' grid, with a voxel behind it, is made from."""
    return run.grid.overlapping(own_box(run, run.output_grid[i]))


def output_block(run: Run, i: int, labels: dict[int, np.ndarray]) -> OutputBlock:
    """Block ``i`` of the labels' grid; ``labels`` are those of the regions of each of `own_blocks`."""
    box, around, to_own = run.output_grid[i], _with_behind(run, i), run.to_own
    inside = to_own.nearest_box(around)
    region, label = own_regions(run, inside, labels)
    region = to_own.take(region, inside, around)
    if run.given_roi:
        region *= run.given_roi.read(around)
    behind = [_plane(label[region], box, axis, run.output_shape[axis]) for axis in range(3)]
    return OutputBlock(np.ascontiguousarray(region[box.slices_within(around)]), label, behind)


def output_probability(run: Run, i: int) -> np.ndarray:
    """The stored mask probability of block ``i`` of the labels' grid, uint8 (z, y, x)."""
    box = run.output_grid[i]
    own_box = run.to_own.nearest_box(box)
    return run.to_own.take(run.layout.probabilities.read(own_box, channel=0), own_box, box)


def own_regions(run: Run, box: Box, labels: dict[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The regions in a box of the run's own grid, numbered over its blocks, and the label of each."""
    region, each = np.zeros(box.shape, np.uint32), [np.zeros(1, next(iter(labels.values())).dtype)]
    count = 0
    for j in run.grid.overlapping(box):
        part = run.grid[j].intersect(box)
        if run.fills_holes:
            number = holes.number_holes(run.layout.regions.read(run.grid[j]))[part.slices_within(run.grid[j])]
        else:
            number = run.layout.regions.read(part)
        region[part.slices_within(box)] = np.where(number > 0, number + count, 0)
        each.append(labels[j][1:])
        count += labels[j].size - 1
    return region, np.concatenate(each)


def _with_behind(run: Run, i: int) -> Box:
    box = run.output_grid[i]
    stop = tuple(min(b + 1, n) for b, n in zip(box.stop, run.output_shape, strict=True))
    return Box(box.start, stop)


def _plane(labels: np.ndarray, box: Box, axis: int, length: int) -> np.ndarray | None:
    """The plane behind a box, of ``labels`` of the box and what lies behind it."""
    if box.stop[axis] == length:
        return None
    z, y, x = (n if k == axis else slice(n) for k, n in enumerate(box.shape))
    return labels[z, y, x]
