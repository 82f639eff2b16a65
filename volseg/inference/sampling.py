"""Tiles of a volume as a network takes them, for what is measured before a run and for the ranges of an int8 form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from volseg.box import Box, inverse_axes, transpose_axes
from volseg.inference import hardware, tiles
from volseg.inference.normalization import standardized

if TYPE_CHECKING:
    from volseg.config import Predict
    from volseg.inference.model_card import ModelCard
    from volseg.io.volume import Volume

SAMPLES = 4  # tiles that backends are compared on
MAX_CPU_TILE = 512  # voxels a side: on a CPU the speed hardly depends on it


def read_tiles(
    source: Volume,
    place: tuple[slice, slice],
    z: range,
    *,
    sections: int,
    norm: tuple[float, float],
    plane: str = "xy",
) -> np.ndarray:
    """One tile of consecutive sections, each with its neighboring sections as channels.

    Parameters
    ----------
    source
        The volume.
    place
        Rows and columns of the tile, from `tiles.Grid.place`; it is mirrored past the plane's end.
    z
        Consecutive sections of the pass. Beyond the volume's first and last section, that section is seen again.
    sections
        How many sections a tile sees, odd.
    norm
        Mean and standard deviation by which gray values are standardized.
    plane
        The pass, of `tiles.PLANES`: what sections, rows and columns are.

    Returns
    -------
    float32 (len(z), sections, Y, X)
    """
    axes, around = tiles.PLANES[plane], sections // 2
    depth, rows, columns = transpose_axes(source.shape, axes)
    y, x = place
    first, last = max(0, z.start - around), min(depth, z.stop + around)
    box = Box((first, y.start, x.start), (last, min(y.stop, rows), min(x.stop, columns)))
    voxels = source.read(box.transpose(inverse_axes(axes))).transpose(axes)
    voxels = standardized(tiles.cut(voxels, slice(0, y.stop - y.start), slice(0, x.stop - x.start)), *norm)
    seen = np.arange(z.start, z.stop)[:, None] + np.arange(-around, around + 1)
    return voxels[np.clip(seen, 0, depth - 1) - first]


def spread_tiles(source: Volume, card: ModelCard, predict: Predict, norm: tuple[float, float]) -> np.ndarray:
    """`SAMPLES` tiles of xy planes, spread over a volume's depth and plane; float32 (samples, sections, Y, X).

    They are as large as a run's; on a CPU at most `MAX_CPU_TILE` a side.
    """
    longest = predict.tile if hardware.gpu_count() else min(MAX_CPU_TILE, predict.tile)
    grid = tiles.grid(source.shape[1:], longest, 0, card.multiple)
    window = grid.overlapping(*(slice(0, n) for n in source.shape[1:]))
    middles = [2 * k + 1 for k in range(SAMPLES)]  # of so many equal shares, in halves of a share
    samples = [(m * source.shape[0] // (2 * SAMPLES), window[m * len(window) // (2 * SAMPLES)]) for m in middles]
    return np.concatenate([
        read_tiles(source, grid.place(tile), range(z, z + 1), sections=card.sections, norm=norm) for z, tile in samples
    ])  # fmt: skip
