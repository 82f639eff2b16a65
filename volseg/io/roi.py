"""The region of interest of a run: the voxels of a box and, of these, those where a mask is not 0.

Elsewhere the run's probabilities are 0. Whether a voxel belongs to the region depends on that voxel alone, and no voxel of
the region needs a tile that is left out. So inside, a run holds what it would hold without a mask, for every blocking.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from volseg.box import Blocks, Box, Triple
from volseg.config import Input
from volseg.errors import UserError
from volseg.io import volume
from volseg.io.header import shape_text
from volseg.io.resample import Grid

READ_SHAPE = (64, 1024, 1024)  # voxels of a mask that are read at once
MAX_SCANNED_VOXELS = 1 << 32  # larger masks are not read whole before the run, but in patches


@dataclass(frozen=True)
class RegionOfInterest:
    """A box of the volume, and a mask whose voxels stand for ``factor`` of the volume's along each axis.

    ``voxels`` counts those of the region; it is an estimate where the mask has more than `MAX_SCANNED_VOXELS`.
    ``checksum`` is the mask's. ``grid`` leads from a resampled volume's voxels to those of the volume that the mask lies on;
    None where these are the same.
    """

    roi: Box
    mask: volume.Volume | None = None
    factor: Triple = (1, 1, 1)
    checksum: str = ""
    voxels: int = 0
    grid: Grid | None = None

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
        inside = self.roi.intersect(box)
        if inside.voxels:
            out[inside.slices_within(box)] = self._masked(inside)
        return out

    def meets(self, box: Box) -> bool:
        """Whether any voxel of ``box`` belongs to the region."""
        inside = self.roi.intersect(box)
        return bool(inside.voxels and (self.mask is None or _nonzero(self.mask, self._mask_box(inside)).any()))

    def _masked(self, box: Box) -> np.ndarray | bool:
        """The mask's nearest voxels to those of ``box``."""
        if self.mask is None:
            return True
        mask_box = self._mask_box(box)
        inside = _nonzero(self.mask, mask_box)
        for axis in range(3):
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
    region = RegionOfInterest(box, mask, factor)
    counts = full_counts if prod(mask.shape) <= MAX_SCANNED_VOXELS else sampled_counts
    return replace(region, **counts(region))


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


def full_counts(region: RegionOfInterest) -> dict:
    """``checksum`` of all voxels of the mask, and ``voxels``: how many of the volume's belong to the region."""
    mask, voxels = region.mask, 0
    digest = hashlib.sha256(f"{mask.shape}".encode())
    for box in Blocks(mask.shape, READ_SHAPE):
        part = _nonzero(mask, box)
        digest.update(np.packbits(part).tobytes())
        z, y, x = (region.voxels_per_mask_voxel(axis)[span] for axis, span in enumerate(box.slices))
        voxels += int(part @ x @ y @ z)
    return {"checksum": digest.hexdigest(), "voxels": voxels}


def sampled_counts(region: RegionOfInterest) -> dict:
    """The same, estimated from patches of a large mask."""
    shares = [_nonzero(region.mask, box).mean() for box in volume.patches(region.mask.shape)]
    return {"checksum": region.mask.checksum(), "voxels": round(float(np.mean(shares)) * region.roi.voxels)}


def _nonzero(mask: volume.Volume, box: Box) -> np.ndarray:
    return mask.read(box) != 0
