"""Where a volume lies in the world that its file speaks of: the center of its first voxel, in its own voxels z y x.

Some formats tell where the center of the first voxel lies (OME-Zarr, N5, NRRD, NIfTI, MRC, xarray), others where its outer
corner does, half a voxel before (precomputed, Imaris). Counted in voxels, a place needs no unit, and stays what it is where
somebody knows the size of voxels better than the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, isfinite
from typing import Any

import numpy as np

Place = tuple[float, float, float]

ORIGIN: Place = (0.0, 0.0, 0.0)  # of a volume that says nothing
FARTHEST = 2.0**40  # voxels: beyond, metadata are damaged
DIGITS = 9  # after the point that a ratio of two lengths has


def placed(voxels: Sequence[float | None]) -> Place:
    """Three numbers as a place; the origin where one is absent, or none that a volume can have.

    >>> placed((2.0000000000004, 0.5, -3)), placed((None, 1, 1)), placed((float("inf"), 1, 1))
    ((2.0, 0.5, -3.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    """
    known = [float(n) for n in voxels if n is not None]
    if len(known) != 3 or not all(isfinite(n) and abs(n) < FARTHEST for n in known):
        return ORIGIN
    z, y, x = (round(n, DIGITS) + 0.0 for n in known)
    return z, y, x


def from_lengths(lengths: Any, steps: Any) -> Place:
    """The place that ``lengths`` are from the origin, of voxels that are ``steps`` long, in the same unit; z y x.

    >>> from_lengths([280, 0, 28.2], [40, 4, 4]), from_lengths([1, 2], [1, 1, 1]), from_lengths("?", None)
    ((7.0, 0.0, 7.05), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    """
    try:
        pairs = zip(np.ravel(lengths).tolist(), np.ravel(steps).tolist(), strict=True)
        return placed([float(length) / float(step) for length, step in pairs])
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return ORIGIN


def from_coordinates(axes: Sequence[Any]) -> Place:
    """The place that coordinates of voxels along z, y and x tell, as xarray has them; the origin where they are not even.

    >>> from_coordinates([[80, 120], [0, 4, 8], [28, 32, 36]])
    (2.0, 0.0, 7.0)
    """
    first, steps = [], []
    for axis in axes:
        try:
            values = np.asarray(axis, np.float64)
        except (TypeError, ValueError):  # dates
            return ORIGIN
        if values.ndim != 1 or values.size < 2 or not np.isfinite(values).all():
            return ORIGIN
        step = float(values[-1] - values[0]) / (values.size - 1)
        if not step or np.abs(np.diff(values) - step).max() > 1e-3 * abs(step):
            return ORIGIN
        first.append(float(values[0]))
        steps.append(step)
    return from_lengths(first, steps)


def from_attributes(attributes: Any, ndim: int, space: Sequence[int]) -> Place:
    """The place that ``offset`` beside ``resolution`` (or ``voxel_size``) tells, as CREMI, Paintera and daisy write them.

    They are in the order of axes; ``space`` are z y x of an array of ``ndim`` axes.

    >>> from_attributes({"offset": [80, 0, 8], "resolution": [40, 4, 4]}, 3, [0, 1, 2])
    (2.0, 0.0, 2.0)
    """
    told = [attributes.get(key) for key in ("offset", "resolution", "voxel_size")]
    offset, step = told[0], told[1] if told[1] is not None else told[2]
    if offset is None or step is None:
        return ORIGIN
    try:
        picked = [np.ravel(one)[list(space)] if np.size(one) == ndim > 3 else one for one in (offset, step)]
    except (TypeError, ValueError):  # rows of several lengths
        return ORIGIN
    return from_lengths(*picked)


def from_affine(directions: Any, origin: Any) -> tuple[Place, bool]:
    """The place of a volume whose axes x, y and z point along the rows of ``directions``, and whether they are turned.

    A turned one lies where it does along its own axes: so do all that are cut out of it.

    >>> from_affine([[4, 0, 0], [0, 4, 0], [0, 0, 40]], [28, 0, 80])
    ((2.0, 0.0, 7.0), False)
    >>> from_affine([[0, 4, 0], [-4, 0, 0], [0, 0, 40]], [28, 8, 80])
    ((2.0, -7.0, 2.0), True)
    """
    try:
        rows, start = np.asarray(directions, np.float64), np.asarray(origin, np.float64)
        if rows.shape != (3, 3) or start.shape != (3,):
            return ORIGIN, False
        place = placed(np.linalg.solve(rows.T, start)[::-1].tolist())
    except (TypeError, ValueError, np.linalg.LinAlgError):
        return ORIGIN, False
    aside = np.abs(rows - np.diag(np.diag(rows))).max() > 1e-6 * np.abs(rows).max()
    return place, place != ORIGIN and bool(aside or np.diag(rows).min() < 0)


def turned_note(where: str) -> str:
    """What is told of a volume whose axes are turned."""
    return (
        f"{where} has axes that are turned against its world: its place is kept along them, and nothing is turned back"
    )


def regridded(place: Place, size: Sequence[float], other: Sequence[float]) -> Place:
    """The place of a grid of voxels of ``other`` size from the same outer corner on.

    >>> regridded((2.0, 0.0, 7.0), (40, 4, 4), (40, 8, 2))
    (2.0, 0.25, 13.5)
    """
    return placed([(n - 0.5) * a / b + 0.5 for n, a, b in zip(place, size, other, strict=True)])


def nm(place: Place, size: Sequence[float]) -> Place:
    """Nanometers, z y x."""
    z, y, x = (round(n * length, 6) + 0.0 for n, length in zip(place, size, strict=True))
    return z, y, x


def whole(place: Place) -> tuple[tuple[int, int, int], bool]:
    """The voxel of a grid that begins at the origin in which the first voxel's center lies, and whether that says all.

    A format of corners counts in such voxels. That a center of 0 becomes a corner of 0 is half a voxel between two
    conventions, and no place of its own.

    >>> whole((7.0, 0.5, -1.0)), whole((0.3, 2.0, 2.0))
    (((7, 0, -1), True), ((0, 2, 2), False))
    """
    z, y, x = (floor(round(n, 6)) for n in place)
    return (z, y, x), all(round(2 * n, 6) % 1 == 0 for n in place)
