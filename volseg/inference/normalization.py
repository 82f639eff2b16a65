"""How bright a volume is: the constants by which training and inference standardize it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from volseg.box import Box, Triple

PATCHES = 24  # patches that are looked at
MAX_PATCH_EDGE = 2048  # their longest edge, voxels
PATCHES_AT_ONCE = 4  # patches read side by side


def gray_statistics(shape: Triple, read: Callable[[Box], np.ndarray]) -> tuple[float, float]:
    """Mean and standard deviation of a volume, from sections (or patches of large ones) spread evenly over it.

    Voxels of 0 are taken for padding. A function of the volume alone, never of a block or tile.

    Parameters
    ----------
    shape
        Of the volume, z y x.
    read
        Gives the voxels of a box; called from `PATCHES_AT_ONCE` threads.

    Returns
    -------
    mean, std : float
        Of gray values; ``std`` is positive. 0 and 1 where all voxels are 0.

    Examples
    --------
    >>> image = np.zeros((4, 8, 8), np.uint8)
    >>> image[:, :, :4], image[:, :, 4:6] = 100, 120
    >>> [round(value, 2) for value in gray_statistics(image.shape, lambda box: image[box.slices])]
    [106.67, 9.43]
    """
    size = tuple(min(n, m) for n, m in zip((1, MAX_PATCH_EDGE, MAX_PATCH_EDGE), shape, strict=True))

    def sums(i: int) -> tuple[int, float, float]:
        at = tuple(
            (i * step) % PATCHES * (n - s) // (PATCHES - 1) for n, s, step in zip(shape, size, (1, 7, 5), strict=True)
        )
        patch = read(Box(at, tuple(a + s for a, s in zip(at, size, strict=True))))
        return _counted(patch) if patch.dtype == np.uint8 else _summed(patch.astype(np.float64))

    count = total = squares = 0.0
    with ThreadPoolExecutor(PATCHES_AT_ONCE) as pool:
        for voxels, level, square in pool.map(sums, range(PATCHES)):
            count, total, squares = count + voxels, total + level, squares + square
    if not count:
        return 0.0, 1.0
    mean = total / count
    return float(mean), float(np.sqrt(max(squares / count - mean**2, 0.0)) or 1.0)


def standardized(voxels: np.ndarray, mean: float, std: float) -> np.ndarray:
    """Voxels as a network takes them: float32, ``mean`` away and divided by ``std``."""
    less, times = scale(mean, std)
    out = voxels.astype(np.float32)
    out -= less
    out *= times
    return out


def scale(mean: float, std: float) -> tuple[float, float]:
    """What is taken from a voxel, and what it is multiplied by then, each as float32 has it: as `standardized` does."""
    return float(np.float32(mean)), float(np.float32(1 / std))


def _summed(patch: np.ndarray) -> tuple[int, float, float]:
    """How many voxels are not 0, their sum, and the sum of their squares."""
    patch = patch[patch != 0]
    return patch.size, patch.sum(), (patch**2).sum()


def _counted(patch: np.ndarray) -> tuple[int, float, float]:
    """What `_summed` gives for uint8, exactly: sums of so few bits are exact in float64 too."""
    count, level = np.bincount(patch.ravel(), minlength=256), np.arange(256)
    return int(count[1:].sum()), float(count @ level), float(count @ level**2)
