"""The watershed of a volume in memory, in blocks of any shape."""

from __future__ import annotations

import numpy as np

from volseg.box import Blocks, Triple, VoxelSize
from volseg.config import Fragments
from volseg.segmentation.basins import watershed_block
from volseg.segmentation.heights import block_heights, height_halo
from volseg.segmentation.stitch import Basins, gather, link


def find_basins(
    probability: np.ndarray, settings: Fragments, voxel_size_nm: VoxelSize, block: Triple | None = None
) -> tuple[Basins, np.ndarray]:
    """Basins of probabilities (uint8; channels, z, y, x), and 1 + the number of each voxel's basin (0: none).

    The volume is one block unless a shape is given; that does not change what is found.
    """
    shape = probability.shape[1:]
    grid, halo = Blocks(shape, block or shape), height_halo(settings, voxel_size_nm)
    regions, tables = [], []
    for box in grid:
        part = probability[(slice(None), *box.grow(halo).clip(shape).slices)]
        height = block_heights(part, box, shape, settings, voxel_size_nm)
        mask = np.ascontiguousarray(probability[(0, *box.slices)])
        region, table = watershed_block(height, mask, box, shape, settings.connectivity)
        regions.append(region)
        tables.append(table)
    basins, basin_of = gather(tables, [link(i, tables.__getitem__, grid) for i in range(len(grid))])
    numbers = np.zeros(shape, np.int64)
    for box, region, basin in zip(grid, regions, basin_of, strict=True):
        numbers[box.slices] = np.r_[0, 1 + basin][region]
    return basins, numbers
