"""How bright a volume is: the constants by which training and inference standardise it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from volseg.box import Box, Triple

SAMPLES = 24  # patches that are looked at
LARGEST = 2048  # their longest edge, voxels


def normalisation(shape: Triple, read: Callable[[Box], np.ndarray]) -> tuple[float, float]:
    """Mean and standard deviation of a volume, from sections (or patches of large ones) spread evenly over it.

    Voxels of 0 are taken for padding; the deviation is positive. A function of the volume alone, never of a block or tile.
    """
    size = tuple(min(n, m) for n, m in zip((1, LARGEST, LARGEST), shape, strict=True))
    count = total = squares = 0.0
    for i in range(SAMPLES):
        at = tuple(
            (i * step) % SAMPLES * (n - s) // (SAMPLES - 1) for n, s, step in zip(shape, size, (1, 7, 5), strict=True)
        )
        patch = read(Box(at, tuple(a + s for a, s in zip(at, size, strict=True)))).astype(np.float64)
        patch = patch[patch != 0]
        count, total, squares = count + patch.size, total + patch.sum(), squares + (patch**2).sum()
    if not count:
        return 0.0, 1.0
    mean = total / count
    return float(mean), float(np.sqrt(max(squares / count - mean**2, 0.0)) or 1.0)
