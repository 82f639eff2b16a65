"""The region of interest of a run: the voxels of a box and, of these, those where a mask is not 0.

Elsewhere the run's probabilities are 0. Whether a voxel belongs to the region depends on that voxel alone, and no voxel of
the region needs a tile that is left out. So inside, a run holds what it would hold without a mask, for every blocking.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from volseg.box import Blocks, Box, Triple
from volseg.config import Input
from volseg.errors import UserError
from volseg.io import volume
from volseg.io.header import shape_text
from volseg.io.occupancy import Occupancy, Occupied, Spans, Stored
from volseg.io.resample import Grid

READ_SHAPE = (64, 1024, 1024)  # voxels of a mask that are read at once
MAX_SCANNED_VOXELS = 1 << 32  # masks that store more are not read whole before the run, but in patches


@dataclass(frozen=True)
class RegionOfInterest:
    """A box of the volume, and a mask whose voxels stand for ``factor`` of the volume's along each axis.

    ``voxels`` counts those of the region; it is an estimate where the mask stores more than `MAX_SCANNED_VOXELS`.
    ``checksum`` is the mask's. ``grid`` leads from a resampled volume's voxels to those of the volume that the mask lies on;
    None where these are the same. ``occupied`` are cells of the mask outside of which it is 0; None where nobody knows. They
    decide no byte.
    """

    roi: Box
    mask: volume.Volume | None = None
    factor: Triple = (1, 1, 1)
    checksum: str = ""
    voxels: int = 0
    grid: Grid | None = None
    occupied: Occupancy | None = field(default=None, compare=False)

    @property
    def key(self) -> tuple:
        """What decides the bytes of a run: the box, the mask's voxels and their factor."""
        return str(self.roi), self.checksum, self.factor

    def resampled(self, grid: Grid) -> RegionOfInterest:
        """The region in the voxels of ``grid``, which lies over the volume's own: all that share space with its box, and of
        these those whose middle the mask wants."""
        back = Grid(grid.other, grid.shape, tuple((down, up) for up, down in grid.steps))
        region = replace(self, roi=back.covered(self.roi), grid=grid)
        if self.mask is None:
            return replace(region, voxels=region.roi.voxels)
        return replace(region, voxels=round(self.voxels / self.roi.voxels * region.roi.voxels) if self.voxels else 0)

    def read(self, box: Box) -> np.ndarray:
        """Which voxels of ``box`` belong to the region, bool z y x."""
        out = np.zeros(box.shape, bool)
        inside = self.part(box)
        if inside.voxels:
            out[inside.slices_within(box)] = self._masked(inside)
        return out

    def meets(self, box: Box) -> bool:
        """Whether any voxel of ``box`` belongs to the region."""
        inside = self.part(box)
        if not inside.voxels or self.mask is None:
            return inside.voxels > 0
        whole = self._mask_box(inside)
        parts = (self._held(part.shift(whole.start)) for part in Blocks(whole.shape, READ_SHAPE))
        return any(bool(_nonzero(self.mask, part).any()) for part in parts if part.voxels)

    def _held(self, mask_box: Box) -> Box:
        """The part of a box of the mask outside of which that is known to be 0."""
        return self.occupied.bounds(mask_box) if self.occupied else mask_box

    def part(self, box: Box) -> Box:
        """The part of ``box`` outside of which no voxel belongs to the region, as far as that is known without a look."""
        inside = self.roi.intersect(box)
        if self.occupied is None or not inside.voxels:
            return inside
        held = self._held(self._mask_box(inside))
        if not held.voxels:
            return Box(inside.start, inside.start)
        start, stop = [], []
        for axis in range(3):
            index = self._mask_index(axis, inside.start[axis], inside.stop[axis])
            first, last = np.searchsorted(index, held.start[axis]), np.searchsorted(index, held.stop[axis] - 1, "right")
            start.append(inside.start[axis] + int(first))
            stop.append(inside.start[axis] + int(last))
        return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))

    def count(self, spans: Spans) -> np.ndarray:
        """About how many voxels of each box of a grid of boxes belong to the region, int64 z y x: 0 only where none does."""
        clipped = [
            (np.clip(start, a, b), np.clip(stop, a, b))
            for (start, stop), a, b in zip(spans, self.roi.start, self.roi.stop, strict=True)
        ]
        z, y, x = (np.maximum(stop - start, 0).astype(float) for start, stop in clipped)
        voxels = z[:, None, None] * y[:, None] * x
        if self.occupied is None:
            return voxels.astype(np.int64)
        places = [self._mask_places(axis, *span) for axis, span in enumerate(clipped)]
        z, y, x = (np.maximum(stop - start, 1).astype(float) for start, stop in places)
        held = self.occupied.count(places)
        return np.ceil(voxels * held / (z[:, None, None] * y[:, None] * x)).astype(np.int64)

    def _mask_places(self, axis: int, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where boxes that start and stop there do so along an axis of the mask."""
        index = self._mask_index(axis, 0, self.roi.stop[axis])
        first = index[np.minimum(start, index.size - 1)]
        return first, np.where(stop > start, index[np.maximum(stop - 1, 0)] + 1, first)

    def _masked(self, box: Box) -> np.ndarray | bool:
        """The mask's nearest voxels to those of ``box``."""
        if self.mask is None:
            return True
        mask_box = self._mask_box(box)
        inside = _nonzero(self.mask, mask_box)
        for axis in range(3):
            if self.grid or self.factor[axis] > 1:
                index = self._mask_index(axis, box.start[axis], box.stop[axis]) - mask_box.start[axis]
                inside = inside.take(index, axis)
        return inside

    def voxels_per_mask_voxel(self, axis: int) -> np.ndarray:
        """How many voxels of the box along an axis each voxel of the mask stands for."""
        return np.bincount(
            self._mask_index(axis, self.roi.start[axis], self.roi.stop[axis]), minlength=self.mask.shape[axis]
        )

    def _mask_index(self, axis: int, start: int, stop: int) -> np.ndarray:
        """The mask's voxel for each of the volume's along an axis; beyond its end, where it was rounded down, its last."""
        place = self.grid.nearest(axis, start, stop) if self.grid else np.arange(start, stop)
        return np.minimum(place // self.factor[axis], self.mask.shape[axis] - 1)

    def _mask_box(self, box: Box) -> Box:
        """The mask's voxels that stand for those of ``box``."""
        start = tuple(int(self._mask_index(axis, a, a + 1)[0]) for axis, a in enumerate(box.start))
        return Box(start, tuple(int(self._mask_index(axis, b - 1, b)[0]) + 1 for axis, b in enumerate(box.stop)))

    def __str__(self) -> str:
        mask = f"mask {self.mask.path}" if self.mask else ""
        if self.mask and self.factor != (1, 1, 1):
            mask += f" (each voxel stands for {' x '.join(map(str, self.factor))})"
        nothing = "; nothing is left to segment" if self.voxels == 0 else ""
        return f"wanted are {self.voxels} voxels of box {self.roi}{', ' * bool(mask)}{mask}{nothing}"


def find(settings: Input, shape: Triple, voxel_size_nm: tuple[float, float, float] | None) -> RegionOfInterest | None:
    """The region that ``settings.mask`` and ``settings.roi`` name in a volume of that shape; None where both are empty.

    Raises `UserError` for a box that leaves the volume, and a mask whose shape is not the volume's divided by whole
    numbers.
    """
    if not settings.mask and not settings.roi:
        return None
    box = Box.parse(settings.roi) if settings.roi else Box.from_shape(shape)
    if box.clip(shape) != box:
        shown = shape_text(shape)
        raise UserError(
            f"roi {box} leaves the volume, whose shape is {shown} z y x; give --roi (input.roi) a box inside it"
        )
    if not settings.mask:
        return RegionOfInterest(box, voxels=box.voxels)
    mask = volume.open(settings.mask, allow_gaps=settings.allow_gaps)
    factor = tuple(
        _factor(n, m, size) for n, m, size in zip(shape, mask.shape, _ratio(mask, voxel_size_nm), strict=True)
    )
    if 0 in factor:
        raise UserError(
            f"mask {mask.path} has shape {shape_text(mask.shape)} and the volume {shape_text(shape)}, z y x; a mask has the "
            "volume's shape, or that divided by a whole number on each axis, rounded up or down"
        )
    return _counted(RegionOfInterest(box, mask, factor))


def _counted(region: RegionOfInterest) -> RegionOfInterest:
    """The region with what its mask holds: from all voxels, or of a large one from those that it stores, or from patches."""
    stored = region.mask.stored()
    if prod(region.mask.shape) <= MAX_SCANNED_VOXELS:
        return replace(region, **full_counts(region, stored))
    if stored and stored.voxels <= MAX_SCANNED_VOXELS:
        return replace(region, **stored_counts(region, stored))
    return replace(region, **sampled_counts(region, stored))


def _factor(length: int, mask: int, ratio: float | None) -> int:
    """How many voxels of an axis one of the mask's stands for; 0 where no whole number fits.

    Of several that fit, the one nearest to the ratio of the voxels' sizes; else a power of two, else the least.

    >>> _factor(165, 21, None), _factor(165, 20, None), _factor(10, 3, None), _factor(10, 3, 3.0), _factor(10, 7, None)
    (8, 8, 4, 3, 0)
    """
    near = range(max(1, length // (mask + 1)), length // mask + 2)
    fits = [f for f in near if mask in (-(-length // f), length // f)]
    if ratio:
        return min(fits, key=lambda f: abs(f - ratio), default=0)
    return next((f for f in fits if f & (f - 1) == 0), min(fits, default=0))


def _ratio(mask: volume.Volume, voxel_size_nm: tuple | None) -> tuple[float | None, ...]:
    """How much longer the mask's voxels are; None where either size is unknown."""
    if not mask.voxel_size_nm or not voxel_size_nm:
        return None, None, None
    return tuple(m / v for m, v in zip(mask.voxel_size_nm, voxel_size_nm, strict=True))


def full_counts(region: RegionOfInterest, stored: Stored | None = None) -> dict:
    """``checksum`` of all voxels of the mask, ``voxels``: how many of the volume's belong to the region, and ``occupied``."""
    mask, counter = region.mask, _Counter(region)
    digest = hashlib.sha256(f"{mask.shape}".encode())
    for box in Blocks(mask.shape, READ_SHAPE):
        part = np.zeros(box.shape, bool)
        if stored is None or stored.any(box):
            part = _nonzero(mask, box)
            counter.add(box, part)
        digest.update(np.packbits(part).tobytes())
    return {"checksum": digest.hexdigest(), **counter.facts()}


def stored_counts(region: RegionOfInterest, stored: Stored) -> dict:
    """The same of a mask of which little is stored: each chunk or shard of that is read once, and others are 0."""
    mask, counter = region.mask, _Counter(region)
    digest = hashlib.sha256(f"{mask.shape}, stored".encode())
    for outer in stored.boxes():
        for inner in Blocks(outer.shape, READ_SHAPE):
            box = inner.shift(outer.start)
            part = _nonzero(mask, box)
            if part.any():
                counter.add(box, part)
                digest.update(f"{box}".encode())
                digest.update(np.packbits(part).tobytes())
    return {"checksum": digest.hexdigest(), **counter.facts()}


def sampled_counts(region: RegionOfInterest, stored: Stored | None = None) -> dict:
    """The same, estimated from patches of a large mask; ``occupied`` is all that it stores, if that is known."""
    shares = [_nonzero(region.mask, box).mean() for box in volume.patches(region.mask.shape)]
    counts = {"checksum": region.mask.checksum(), "voxels": round(float(np.mean(shares)) * region.roi.voxels)}
    if stored is None:
        return counts
    occupied = Occupied(region.mask.shape)
    for box in stored.boxes():
        occupied.add(box)
    return {**counts, "occupied": occupied.occupancy()}


class _Counter:
    """Counts a region's voxels, and the cells of its mask that hold some, part by part."""

    def __init__(self, region: RegionOfInterest) -> None:
        self.each = [region.voxels_per_mask_voxel(axis) for axis in range(3)]
        self.occupied = Occupied(region.mask.shape)
        self.voxels = 0

    def add(self, box: Box, part: np.ndarray) -> None:
        if part.any():
            z, y, x = (each[span] for each, span in zip(self.each, box.slices, strict=True))
            self.voxels += int(part @ x @ y @ z)
            self.occupied.add(box, part)

    def facts(self) -> dict:
        return {"voxels": self.voxels, "occupied": self.occupied.occupancy()}


def _nonzero(mask: volume.Volume, box: Box) -> np.ndarray:
    return mask.read(box) != 0
