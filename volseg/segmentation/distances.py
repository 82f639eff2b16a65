"""Squared distances to the border of a body, in whole numbers, for voxels of any proportions."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
from numba import njit

from volseg.box import Slices, Triple, VoxelSize
from volseg.config import Fragments
from volseg.errors import UserError

MAX_CAP = 255  # of distances: its square fits uint16, and heights fit int32


@dataclass(frozen=True)
class DistanceUnit:
    """How distances are counted in whole numbers, so that they are exact.

    Attributes
    ----------
    spacing
        Distance between neighboring voxels along z y x, in units.
    cap
        Distance up to which is counted, in units; 0 where no distance counts.
    """

    spacing: Triple
    cap: int

    @property
    def reach(self) -> Triple:
        """Voxels within the cap, z y x."""
        z, y, x = (-(-self.cap // step) for step in self.spacing)
        return z, y, x


def distance_unit(settings: Fragments, voxel_size_nm: VoxelSize | None = None) -> DistanceUnit:
    """The `DistanceUnit` of ``settings.distance``, which is one voxel on every axis, or of ``settings.distance_nm``.

    In nm the unit is 1/16 of the smallest edge of a voxel, or a multiple of it that divides all edges, or the next of 1/8,
    1/4, 1/2 and 1 that keeps the cap within `MAX_CAP`. Longer edges are rounded to whole units: by less than 1/32 of the
    smallest edge where the unit is 1/16.

    Parameters
    ----------
    settings
        The section ``[fragments]``.
    voxel_size_nm
        Size of a voxel along z y x; may be None where ``distance_nm`` is 0.

    Raises
    ------
    UserError
        If the cap is more than `MAX_CAP` voxels.
    ValueError
        If a distance in nm has no voxel size.

    Examples
    --------
    >>> distance_unit(Fragments(distance_nm=40), (50, 4.6, 4.6)), distance_unit(Fragments(distance_nm=40), (8, 8, 8))
    (DistanceUnit(spacing=(87, 8, 8), cap=70), DistanceUnit(spacing=(1, 1, 1), cap=5))
    """
    if not settings.distance_nm:
        return DistanceUnit((1, 1, 1), settings.distance)
    if voxel_size_nm is None:
        raise ValueError("fragments.distance_nm is not 0, so a voxel's size is needed; give voxel_size_nm")
    smallest = min(voxel_size_nm)
    for fraction in (16, 8, 4, 2, 1):
        z, y, x = (round(fraction * edge / smallest) for edge in voxel_size_nm)
        unit = gcd(z, y, x)
        cap = max(1, round(settings.distance_nm * fraction / (smallest * unit)))
        if cap <= MAX_CAP:
            return DistanceUnit((z // unit, y // unit, x // unit), cap)
    raise UserError(f"fragments.distance_nm = {settings.distance_nm:g} is more than {MAX_CAP} voxels of {smallest:g} nm; "
                    f"give at most {MAX_CAP * smallest:g}")  # fmt: skip


def squared_distance(body: np.ndarray, in_volume: Slices, unit: DistanceUnit) -> np.ndarray:
    """Squared distance of each voxel of a body to the nearest voxel of the volume outside it.

    It is exact where `DistanceUnit.reach` voxels lie around it. One axis after the other takes the lower envelope of
    parabolas (Felzenszwalb and Huttenlocher, "Distance transforms of sampled functions", Theory of Computing 2012); within
    a cap a window of candidates is enough.

    Parameters
    ----------
    body
        bool (z, y, x).
    in_volume
        The part of it that lies in the volume.
    unit
        How distances are counted.

    Returns
    -------
    uint16 (z, y, x), at most cap**2; 0 outside the body

    Examples
    --------
    >>> row = np.array([[[False, True, True, True, True, True]]])
    >>> squared_distance(row, (slice(1), slice(1), slice(6)), DistanceUnit((1, 1, 1), cap=4))
    array([[[ 0,  1,  4,  9, 16, 16]]], dtype=uint16)
    """
    if unit.cap == 0:
        return np.zeros(body.shape, np.uint16)
    background = np.zeros(body.shape, np.bool_)
    background[in_volume] = ~body[in_volume]
    (step_z, step_y, step_x), cap = unit.spacing, unit.cap
    along_x = _runs(background, step_x, cap)
    z, y, x = body.shape
    along_y = np.empty(body.shape, np.uint16)
    _envelope(along_x, body, along_y, step_y, cap)
    along_z = np.empty((1, z, y * x), np.uint16)
    _envelope(along_y.reshape(1, z, y * x), body.reshape(1, z, y * x), along_z, step_z, cap)
    return along_z.reshape(body.shape)


@njit(cache=True, nogil=True)
def _runs(background: np.ndarray, step: int, cap: int) -> np.ndarray:
    """Squared distance along x to the background, at most cap**2; 0 on the background."""
    nz, ny, nx = background.shape
    out = np.empty(background.shape, np.uint16)
    for z in range(nz):
        for y in range(ny):
            gap = cap
            for x in range(nx):
                gap = 0 if background[z, y, x] else min(gap + step, cap)
                out[z, y, x] = gap
            gap = cap
            for x in range(nx - 1, -1, -1):
                gap = 0 if background[z, y, x] else min(gap + step, cap)
                shorter: Any = min(gap, np.int64(out[z, y, x]))
                out[z, y, x] = shorter * shorter
    return out


@njit(cache=True, nogil=True)
def _envelope(field: np.ndarray, body: np.ndarray, out: np.ndarray, step: int, cap: int) -> None:
    """In the body min over d of field[j + d] + (d * step)**2 along the middle axis, within the cap; else a copy."""
    outer, length, stride = field.shape
    for i in range(outer):
        for j in range(length):
            for k in range(stride):
                best = np.int64(field[i, j, k])
                if body[i, j, k]:
                    d, distance = 1, step
                    while distance < cap and distance * distance < best:
                        if j >= d:
                            best = min(best, np.int64(field[i, j - d, k]) + distance * distance)
                        if j + d < length:
                            best = min(best, np.int64(field[i, j + d, k]) + distance * distance)
                        d += 1
                        distance += step
                out[i, j, k] = best
