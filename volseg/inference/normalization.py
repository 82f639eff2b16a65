"""How bright a volume is: the constants by which training and inference standardize it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from volseg.box import Box, Triple
from volseg.errors import printable

T = TypeVar("T")
PATCHES = 24  # patches that are looked at
MAX_PATCH_EDGE = 2048  # their longest edge, voxels
PATCHES_AT_ONCE = 4  # patches read side by side
COMMON_VALUES = 4  # of a patch's border, that are counted
BORDER_SHARE = (
    0.25  # of the voxels at sections' borders, that padding of the lowest or the highest value fills at least
)
GRAY_BORDER_SHARE = 0.5  # that padding of another value does
TOLD_SHARE = 0.05  # of the voxels that are 0, from which on it is told that they are padding
COMPARED_ROWS = 64  # of a patch, whose voxels are compared with their neighbors
# Shares of voxels that are like all four neighbors, and unlike all: EM has 0.00 and 0.8 or more, labels and masks 0.9 and 0.00.
MIN_FLAT, MAX_ISOLATED = 0.8, 0.01


@dataclass(frozen=True)
class GrayLevels:
    """Gray values of a volume, as patches spread over it tell.

    Attributes
    ----------
    mean, std
        Of the image's voxels; ``std`` is positive. 0 and 1 where there is none.
    lowest, highest
        Of all voxels, padding included.
    padding
        Values of voxels that are no image.
    padded
        Share of the voxels that have them, 0..1.
    flat, isolated
        Shares of the other voxels that are like all four neighbors in their section, and unlike all of them.
    blank
        Sections of one value throughout among those that were looked at whole, if others are not.
    """

    mean: float
    std: float
    lowest: float
    highest: float
    padding: tuple[float, ...]
    padded: float
    flat: float = 0.0
    isolated: float = 1.0
    blank: int = 0

    def notes(self, where: str) -> tuple[str, ...]:
        """What a user may want to know of it, a line each."""
        return tuple(
            printable(f"{where}{said}") for said in (self._extremes(), self._sameness(), self._blank()) if said
        )

    def _blank(self) -> str:
        """That sections were lost."""
        if not self.blank:
            return ""
        seen = (
            "one between two others is seen as the one before it"
            if self.padding
            else "seen as they are (input.padding)"
        )
        return f": {self.blank} of {PATCHES} sections that were looked at are of one gray value; {seen}"

    def _sameness(self) -> str:
        """What is odd about voxels beside each other."""
        if self.lowest == self.highest or self.flat < MIN_FLAT or self.isolated > MAX_ISOLATED:
            return ""
        return (
            f" looks like labels or a mask, not like an image: {self.flat:.0%} of the voxels that were looked at (but padding) "
            "are like all their neighbors"
        )

    def _extremes(self) -> str:
        """What is odd about the lowest and the highest value."""
        values = " and ".join(f"{value:g}" for value in self.padding)
        if self.lowest == self.highest:
            return f" has the value {self.lowest:g} in every voxel that was looked at: nothing to segment there"
        if self.padded == 1:
            return f" holds nothing but padding, {values}, in every voxel that was looked at"
        if self.padded >= (TOLD_SHARE if self.padding == (0.0,) else 1e-9):
            return f": voxels of {values} ({self.padded:.0%} of those looked at) count as padding, not as image (input.padding)"
        return ""


def gray_levels(shape: Triple, read: Callable[[Box], np.ndarray], padding: str | float = "auto") -> GrayLevels:
    """Gray values of a volume, from sections (or patches of large ones) spread evenly over it.

    A function of the volume alone, never of a block or tile.

    Parameters
    ----------
    shape
        Of the volume, z y x.
    read
        Gives the voxels of a box; called from `PATCHES_AT_ONCE` threads.
    padding
        The value of voxels that are no image, beside 0; "none"; or "auto": 0 and a value that at
        least `BORDER_SHARE` of the voxels at the sections' borders have, `GRAY_BORDER_SHARE` where it is no extreme one.
    """
    known: tuple[float, ...] = (0.0,) if isinstance(padding, str) else tuple(sorted({0.0, float(padding)}))
    if padding == "none":
        known = ()
    patches = _map(lambda box: _Patch.of(read(box), box, shape, known), shape)
    lowest, highest = min(patch.lowest for patch in patches), max(patch.highest for patch in patches)
    if padding == "auto" and (found := _border_value(patches, lowest, highest)) not in (None, 0.0):
        known = (0.0, found)
        patches = _map(lambda box: _Patch.of(read(box), box, shape, known), shape)
    count = total = squares = 0.0
    for patch in patches:
        count, total, squares = count + patch.count, total + patch.total, squares + patch.squares
    seen = sum(patch.size for patch in patches)
    mean = total / count if count else 0.0
    std = float(np.sqrt(max(squares / count - mean**2, 0.0)) or 1.0) if count else 1.0
    compared, like, unlike = (sum(counts) for counts in zip(*(patch.neighbors for patch in patches), strict=True))
    flat, isolated = (like / compared, unlike / compared) if compared else (0.0, 1.0)
    blank = sum(patch.lowest == patch.highest and patch.size == shape[1] * shape[2] for patch in patches)
    blank = blank if lowest < highest and shape[0] >= PATCHES else 0
    return GrayLevels(float(mean), std, lowest, highest, known, 1 - count / seen, flat, isolated, blank)


def gray_range(
    shape: Triple, read: Callable[[Box], np.ndarray], percentiles: tuple[float, float], padding: tuple[float, ...]
) -> tuple[float, float]:
    """The gray values at two percentiles of the patches that `gray_levels` looks at, of every other row and column.

    Voxels with a value of ``padding`` do not count. The second is above the first, whatever the volume.

    Examples
    --------
    >>> image = np.broadcast_to(np.arange(101, dtype=np.uint8), (1, 4, 101))
    >>> gray_range(image.shape, lambda box: image[box.slices], (0.0, 100.0), (0.0,))
    (2.0, 100.0)
    """

    def some(box: Box) -> np.ndarray:
        patch = read(box)[:, ::2, ::2]
        return patch[~np.isin(patch, padding)]

    voxels = np.concatenate(_map(some, shape))
    low, high = map(float, np.percentile(voxels, percentiles)) if voxels.size else (0.0, 1.0)
    return low, high if high > low else low + 1.0


def gray_statistics(shape: Triple, read: Callable[[Box], np.ndarray]) -> tuple[float, float]:
    """Mean and standard deviation of a volume, see `gray_levels`; 0 and 1 where all voxels are padding.

    Examples
    --------
    >>> image = np.zeros((4, 8, 8), np.uint8)
    >>> image[:, :, :3], image[:, :, 3:6] = 100, 120
    >>> gray_statistics(image.shape, lambda box: image[box.slices])
    (110.0, 10.0)
    """
    levels = gray_levels(shape, read)
    return levels.mean, levels.std


def _map(measure: Callable[[Box], T], shape: Triple) -> list[T]:
    """``measure`` of each patch, in order."""
    size = tuple(min(n, m) for n, m in zip((1, MAX_PATCH_EDGE, MAX_PATCH_EDGE), shape, strict=True))

    def one(i: int) -> _Patch:
        at = tuple(
            (i * step) % PATCHES * (n - s) // (PATCHES - 1) for n, s, step in zip(shape, size, (1, 7, 5), strict=True)
        )
        return measure(Box(at, tuple(a + s for a, s in zip(at, size, strict=True))))

    with ThreadPoolExecutor(PATCHES_AT_ONCE) as pool:
        return list(pool.map(one, range(PATCHES)))


@dataclass(frozen=True)
class _Patch:
    """What a patch tells: voxels, and count, sum and sum of squares of those that are no padding."""

    size: int
    count: int
    total: float
    squares: float
    lowest: float
    highest: float
    border: int  # voxels at the sections' borders
    common: dict[float, int]  # of these, how many have each of the few most common values
    neighbors: tuple[int, int, int]  # voxels that were compared with theirs, like all of them, unlike all

    @classmethod
    def of(cls, patch: np.ndarray, box: Box, shape: Triple, padding: tuple[float, ...]) -> _Patch:
        sums = _counted(patch, padding) if patch.dtype == np.uint8 else _summed(patch.astype(np.float64), padding)
        lowest, highest = patch.min(), patch.max()
        edges = [
            patch.take(place, axis).ravel()
            for axis in (1, 2)
            for place, outside in ((0, box.start[axis] == 0), (-1, box.stop[axis] == shape[axis]))
            if outside
        ]
        border = np.concatenate(edges) if edges else patch[:0].ravel()
        values, counts = np.unique(border, return_counts=True)
        most = np.argsort(counts, kind="stable")[-COMMON_VALUES:]
        count, total, squares = sums
        return cls(
            patch.size,
            count,
            total,
            squares,
            float(lowest),
            float(highest),
            border.size,
            dict(zip(values[most].astype(float).tolist(), counts[most].tolist(), strict=True)),
            _compared(patch, padding),
        )


def _compared(patch: np.ndarray, padding: tuple[float, ...]) -> tuple[int, int, int]:
    """Voxels in some rows of a patch that are no padding; how many are like all four neighbors, how many unlike all."""
    (plane,) = patch
    if min(plane.shape) < 3:
        return 0, 0, 0
    rows = np.unique(np.linspace(1, len(plane) - 2, COMPARED_ROWS).astype(int))
    inner = plane[rows, 1:-1]
    counts = ~np.isin(inner, padding)
    neighbors = plane[rows - 1, 1:-1], plane[rows + 1, 1:-1], plane[rows, :-2], plane[rows, 2:]
    same = [inner == near for near in neighbors]
    flat, isolated = counts & np.logical_and.reduce(same), counts & ~np.logical_or.reduce(same)
    return int(counts.sum()), int(flat.sum()), int(isolated.sum())


def _border_value(patches: list[_Patch], lowest: float, highest: float) -> float | None:
    """The value that is padding, as far as the borders of sections tell; None where there is none."""
    border, counts = sum(patch.border for patch in patches), Counter[float]()
    for patch in patches:
        counts.update(patch.common)
    counts.pop(0.0, None)  # which is padding in any case
    shares = {value: BORDER_SHARE if value in (lowest, highest) else GRAY_BORDER_SHARE for value in counts}
    enough = [value for value, count in counts.items() if count >= shares[value] * border]
    return max(enough, key=lambda value: counts[value], default=None) if lowest < highest else None


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


def _summed(patch: np.ndarray, padding: tuple[float, ...]) -> tuple[int, float, float]:
    """How many voxels are no padding, their sum, and the sum of their squares."""
    for value in padding:
        patch = patch[patch != value]
    return patch.size, float(patch.sum()), float((patch**2).sum())


def _counted(patch: np.ndarray, padding: tuple[float, ...]) -> tuple[int, float, float]:
    """What `_summed` gives for uint8, exactly: sums of so few bits are exact in float64 too."""
    count, level = np.bincount(patch.ravel(), minlength=256), np.arange(256)
    count[np.isin(level, padding)] = 0
    return int(count.sum()), float(count @ level), float(count @ level**2)
