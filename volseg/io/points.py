"""Points that people set, one in each object: tables that napari, BiaPy and spreadsheets save, and balls around them."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

from volseg.box import Box, Triple
from volseg.errors import UserError, printable
from volseg.io import files
from volseg.io.header import TripleNm, decoding, shape_text

VOXELS, NAPARI, NM = ("z", "y", "x"), ("axis-0", "axis-1", "axis-2"), ("z_nm", "y_nm", "x_nm")
RADIUS = "radius_nm"
DEFAULT_RADIUS = 5  # of a ball, in voxels of the plane, where nobody says
MAX_BYTES = 1 << 28  # of a table


@dataclass(frozen=True, eq=False)
class Points:
    """Points of a volume.

    Attributes
    ----------
    path
        The table.
    zyx
        float64 (n, 3): voxels, integers at their centers.
    radius_nm
        float64 (n,): of the ball around each.
    voxel_size_nm
        Of the volume; cubes of 1 where nobody says.
    notes
        What was decided when they were read, a line each.
    """

    path: str
    zyx: np.ndarray
    radius_nm: np.ndarray
    voxel_size_nm: TripleNm
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.zyx)


def is_points(path: str) -> bool:
    """Whether the file at ``path`` is a table, and none of napari's shapes."""
    return path.lower().endswith(".csv") and bool(names := _rows(path)[0]) and "shape-type" not in names


def read(path: str, shape: Triple, voxel_size_nm: TripleNm | None, radius_nm: float | None = None) -> Points:
    """The points in the table at ``path``, a row each.

    Parameters
    ----------
    path
        CSV with a heading that names ``z``, ``y``, ``x`` (voxels), ``axis-0``, ``axis-1``, ``axis-2`` (voxels, as napari
        saves them) or ``z_nm``, ``y_nm``, ``x_nm``, and perhaps ``radius_nm``; the first of these three that is there counts.
    shape, voxel_size_nm
        Of the volume; no size where nobody says.
    radius_nm
        Of the balls of rows that give none; None for `DEFAULT_RADIUS` voxels.

    Raises
    ------
    UserError
        With the number of the row, from 1 below the heading: a coordinate is missing or no number, a point lies outside of
        the volume, or in a voxel that another one has. Or there are no such columns or no rows, or nm are given, and nobody
        says how large a voxel is.
    """
    heading, rows = _rows(path)
    names = next((names for names in (VOXELS, NAPARI, NM) if set(names) <= set(heading)), None)
    if names is None or (names == NAPARI and "axis-3" in heading):
        raise UserError(
            f"{path} has the columns {printable(', '.join(heading)[:200])}: points of a volume have z, y, x (voxels) or z_nm, "
            "y_nm, x_nm, or axis-0, axis-1, axis-2 alone, as napari saves them; rename them"
        )
    if not rows:
        raise UserError(f"{path} holds no point; give a table with a row for each")
    if voxel_size_nm is None and (names == NM or radius_nm or any(row.get(RADIUS) for row in rows)):
        raise UserError(f"{path} has lengths in nm, but nobody says how large a voxel is; give voxel_size_nm")
    size = voxel_size_nm or (1.0, 1.0, 1.0)
    ball_nm = radius_nm or DEFAULT_RADIUS * max(size[1:])
    zyx, radii = np.empty((len(rows), 3)), np.full(len(rows), float(ball_nm))
    for i, row in enumerate(rows):
        zyx[i] = [_number(row, name, path, i) for name in names]
        if row.get(RADIUS):
            radii[i] = _number(row, RADIUS, path, i)
            if radii[i] <= 0:
                raise UserError(f"row {i + 1} of {path} has a radius_nm of {radii[i]:g}; give one above 0, or none")
    if names == NM:
        zyx /= size
    _check_places(zyx, path, shape)
    span = f"{radii.min():g}" if np.ptp(radii) == 0 else f"{radii.min():g} to {radii.max():g}"
    unit = "nm" if voxel_size_nm else "voxels, since nobody says how large one is,"
    note = f"{path}: {len(rows)} points ({', '.join(names)}) are balls of {span} {unit} radius; all else is background"
    return Points(path, zyx, radii, size, (printable(note),))


def _rows(path: str) -> tuple[list[str], list[dict]]:
    """The names of a table's columns, in lower case, and its rows."""
    if os.path.getsize(path) == 0:
        raise UserError(f"{path} is empty (0 bytes); copy it again")
    files.refuse_pointer(path)
    with decoding(path):
        reader = csv.reader(io.StringIO(files.read_range(path, 0, MAX_BYTES).decode("utf-8-sig")))
        heading = [name.strip().lower() for name in next(reader, [])]
        return heading, [dict(zip(heading, map(str.strip, row), strict=False)) for row in reader if row]


def _number(row: dict, name: str, path: str, i: int) -> float:
    try:
        value = float(row[name])
    except (KeyError, ValueError):
        value = float("nan")
    if not isfinite(value):
        given = printable(repr(row.get(name, ""))[:80])
        raise UserError(f"row {i + 1} of {path}, from 1 below the heading, has the {name} {given}; give a number")
    return value


def _check_places(zyx: np.ndarray, path: str, shape: Triple) -> None:
    """Refuses points that lie outside of the volume, and all but one of those in the same voxel."""
    outside = ((zyx < -0.5) | (zyx >= np.array(shape) - 0.5)).any(axis=1)
    if outside.any():
        i = int(outside.argmax())
        raise UserError(
            f"row {i + 1} of {path}, from 1 below the heading, lies at {place_text(zyx[i])} (z, y, x), outside of the volume "
            f"of {shape_text(shape)} voxels; are these points of another image, or of other units?"
        )
    _, first, inverse = np.unique(_voxel(zyx), axis=0, return_index=True, return_inverse=True)
    again = first[inverse.ravel()] != np.arange(len(zyx))
    if again.any():
        i = int(again.argmax())
        before = int(first[inverse.ravel()[i]])
        raise UserError(
            f"row {i + 1} of {path}, from 1 below the heading, is a point in the voxel of row {before + 1}; leave out one of "
            "them"
        )


def _voxel(zyx: np.ndarray) -> np.ndarray:
    """The voxel that a place lies in."""
    return np.floor(zyx + 0.5).astype(np.int64)


def place_text(zyx: Sequence[float]) -> str:
    """
    >>> place_text((3, 4.25, 100.0))
    '3, 4.25, 100'
    """
    return ", ".join(f"{n:.10g}" for n in zyx)


def balls(points: Points, box: Box) -> np.ndarray:
    """The ball around each point, as its row's number from 1.

    A voxel belongs to the nearest of the points whose radius reaches its center, and to the first of points that are equally
    near. A ball of less than a voxel is the voxel that its point lies in.

    Parameters
    ----------
    points
        In voxels of a volume.
    box
        The part of it that is wanted.

    Returns
    -------
    numpy.ndarray
        uint32 of the shape of ``box``; 0 outside of balls.

    Examples
    --------
    >>> two = Points("", np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 4.0]]), np.array([10.0, 10.0]), (50.0, 5.0, 5.0))
    >>> balls(two, Box((0, 0, 0), (2, 1, 8))).tolist()
    [[[1, 1, 1, 2, 2, 2, 2, 0]], [[0, 0, 0, 0, 0, 0, 0, 0]]]
    """
    out = np.zeros(box.shape, np.uint32)
    size = np.array(points.voxel_size_nm)
    reach, own = points.radius_nm[:, None] / size, _voxel(points.zyx)
    first = np.maximum(np.minimum(np.ceil(points.zyx - reach), own), box.start).astype(np.int64)
    stop = np.minimum(np.maximum(np.floor(points.zyx + reach), own) + 1, box.stop).astype(np.int64)
    inside = np.flatnonzero((first < stop).all(axis=1))
    for z in range(box.start[0], box.stop[0]):
        nearest = np.full(box.shape[1:], np.inf)
        for i in inside[(first[inside, 0] <= z) & (z < stop[inside, 0])]:
            y, x = (np.arange(first[i, axis], stop[i, axis]) for axis in (1, 2))
            dz, dy, dx = ((n - c) * s for n, c, s in zip((z, y, x), points.zyx[i], size, strict=True))
            squared = dz**2 + (dy**2)[:, None] + dx**2
            part = (
                slice(y[0] - box.start[1], y[-1] + 1 - box.start[1]),
                slice(x[0] - box.start[2], x[-1] + 1 - box.start[2]),
            )
            ball = squared <= points.radius_nm[i] ** 2
            if z == own[i, 0]:
                ball |= (y == own[i, 1])[:, None] & (x == own[i, 2])
            ball &= squared < nearest[part]
            nearest[part][ball] = squared[ball]
            out[z - box.start[0]][part][ball] = i + 1
    return out
