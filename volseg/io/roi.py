"""The voxels that a run is asked for: those of a box, and of them those that a mask volume names.

Elsewhere its probabilities are 0. Whether a voxel is wanted depends on that voxel alone, and no wanted voxel sees a tile
left out, so what the wanted ones hold is what they would hold without a mask, for every blocking.
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

READ = (64, 1024, 1024)  # voxels of a mask that are looked at together
LARGEST = 1 << 32  # voxels up to which a mask is read whole before the run; of a larger one, patches


@dataclass(frozen=True)
class Wanted:
    """A box of the volume, and a mask whose voxels stand for ``factor`` of the volume's along each axis.

    ``voxels`` are wanted, of a mask beyond `LARGEST` an estimate; ``checksum`` is the mask's.
    """

    roi: Box
    mask: volume.Volume | None = None
    factor: Triple = (1, 1, 1)
    checksum: str = ""
    voxels: int = 0

    @property
    def key(self) -> tuple:
        """What of it decides the bytes of a run."""
        return str(self.roi), self.checksum, self.factor

    def read(self, box: Box) -> np.ndarray:
        """Which voxels of ``box`` are wanted, bool z y x."""
        out = np.zeros(box.shape, bool)
        inside = self.roi.intersect(box)
        if inside.voxels:
            out[inside.inside(box)] = self._masked(inside)
        return out

    def any(self, box: Box) -> bool:
        """Whether any voxel of ``box`` is wanted."""
        inside = self.roi.intersect(box)
        return bool(inside.voxels and (self.mask is None or _read(self.mask, self._under(inside)).any()))

    def _masked(self, box: Box) -> np.ndarray | bool:
        """The mask's nearest voxels to those of ``box``."""
        if self.mask is None:
            return True
        under = self._under(box)
        found = _read(self.mask, under)
        for axis in range(3):
            found = found.take(self._place(axis, box.start[axis], box.stop[axis]) - under.start[axis], axis)
        return found

    def each(self, axis: int) -> np.ndarray:
        """How many voxels of the box along an axis each voxel of the mask stands for."""
        return np.bincount(
            self._place(axis, self.roi.start[axis], self.roi.stop[axis]), minlength=self.mask.shape[axis]
        )

    def _place(self, axis: int, start: int, stop: int) -> np.ndarray:
        """The mask's voxel for each of the volume's along an axis; beyond its end, where it was rounded down, its last."""
        return np.minimum(np.arange(start, stop) // self.factor[axis], self.mask.shape[axis] - 1)

    def _under(self, box: Box) -> Box:
        """The mask's voxels that stand for those of ``box``."""
        start = tuple(int(self._place(axis, a, a + 1)[0]) for axis, a in enumerate(box.start))
        return Box(start, tuple(int(self._place(axis, b - 1, b)[0]) + 1 for axis, b in enumerate(box.stop)))

    def __str__(self) -> str:
        mask = f"mask {self.mask.path}" if self.mask else ""
        if self.mask and self.factor != (1, 1, 1):
            mask += f" (each voxel stands for {' x '.join(map(str, self.factor))})"
        return f"wanted are {self.voxels} voxels of box {self.roi}{', ' * bool(mask)}{mask}"


def find(knobs: Input, shape: Triple, voxel_size_nm: tuple[float, float, float] | None) -> Wanted | None:
    """What ``knobs.mask`` and ``knobs.roi`` want of a volume of that shape; None where they are empty.

    Raises `UserError` for a box that leaves the volume, and a mask whose shape is not the volume's divided by whole
    numbers.
    """
    if not knobs.mask and not knobs.roi:
        return None
    roi = Box.parse(knobs.roi) if knobs.roi else Box.whole(shape)
    if roi.clip(shape) != roi:
        raise UserError(f"input.roi = {roi} leaves the volume, whose shape is {_by(shape)} z y x; give a box inside it")
    if not knobs.mask:
        return Wanted(roi, voxels=roi.voxels)
    mask = volume.open(knobs.mask)
    factor = tuple(
        _factor(n, m, size) for n, m, size in zip(shape, mask.shape, _ratio(mask, voxel_size_nm), strict=True)
    )
    if 0 in factor:
        raise UserError(
            f"mask {mask.path} has shape {_by(mask.shape)} and the volume {_by(shape)}, z y x; a mask has the volume's "
            "shape, or that divided by a whole number on each axis, rounded up or down"
        )
    found = Wanted(roi, mask, factor)
    return replace(found, **(_look(found) if prod(mask.shape) <= LARGEST else _glance(found)))


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


def _look(wanted: Wanted) -> dict:
    """Fingerprint of all voxels of a mask, and how many voxels of the volume it wants."""
    mask, voxels = wanted.mask, 0
    digest = hashlib.sha256(f"{mask.shape}".encode())
    for box in Blocks(mask.shape, READ):
        part = _read(mask, box)
        digest.update(np.packbits(part).tobytes())
        z, y, x = (wanted.each(axis)[place] for axis, place in enumerate(box.slices))
        voxels += int(part @ x @ y @ z)
    return {"checksum": digest.hexdigest(), "voxels": voxels}


def _glance(wanted: Wanted) -> dict:
    """The same from patches of a large mask."""
    parts = [_read(wanted.mask, box).mean() for box in volume.patches(wanted.mask.shape)]
    return {"checksum": wanted.mask.checksum(), "voxels": round(float(np.mean(parts)) * wanted.roi.voxels)}


def _read(mask: volume.Volume, box: Box) -> np.ndarray:
    return mask.read(box) != 0


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
