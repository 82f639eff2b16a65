"""Regions that people drew: ImageJ's ROI files, their zip files, overlays of TIFF files, and shapes of napari.

Each lies in one section. Integer coordinates are corners of pixels, as in ImageJ, and
a pixel belongs to a region if its center lies inside.
"""

from __future__ import annotations

import csv
import io
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from volseg import system
from volseg.errors import UserError, printable
from volseg.io import files
from volseg.io.header import decoding
from volseg.io.tiff_layout import logged

MAX_BYTES = 1 << 26  # of one region, and of a table of shapes
AREAS = ("POLYGON", "RECT", "OVAL", "FREEHAND", "TRACED")  # types of ImageJ that enclose pixels
DRAWINGS = ("TEXT", "ARROW", "IMAGE")  # subtypes that do not
FIJI_NAME = re.compile(r"(\d{4,})-\d{4,}-\d{4,}")  # section, y, x: how Fiji names regions by itself
OBJECT_NAME = re.compile(r"(\d+)-z\d+")  # object and section, as `volseg export` names them
ELLIPSE_POINTS = 256
MOVE, PATH_POINTS = 0, {0: 1, 1: 1, 2: 2, 3: 3, 4: 0}  # move, line, square and cubic curve, close: points that follow
CURVE_STEPS = 16
SHAPE_COLUMNS = ("index", "shape-type", "vertex-index", "axis-0", "axis-1", "axis-2")
SAME_OBJECT = 0.5  # share of the smaller of two regions in neighboring sections from which on they are one object


@dataclass(frozen=True, eq=False)
class Region:
    """What was drawn in one section: the pixels inside an odd number of ``paths`` (n, 2), x y."""

    name: str
    section: int
    paths: tuple[np.ndarray, ...]


def is_regions(path: str) -> bool:
    """Whether the name is that of a file of regions.

    >>> is_regions("RoiSet.zip"), is_regions("em.zarr.zip")
    (True, False)
    """
    name = path.lower()
    return name.endswith((".roi", ".csv")) or (name.endswith(".zip") and not name.endswith(".zarr.zip"))


def read(path: str) -> tuple[list[Region], tuple[str, ...]]:
    """The regions in the file at ``path``, in the order in which they lie on each other, and notes.

    Raises
    ------
    UserError
        The file is damaged, holds no region, or one that names no section.
    """
    if os.path.getsize(path) == 0:
        raise UserError(f"{path} is empty (0 bytes); copy it again")
    files.refuse_pointer(path)
    if path.lower().endswith(".csv"):
        return _napari_shapes(path)
    return _imagej(path, list(_stored(path)))


def overlay(path: str, *, selection: bool = False) -> list[bytes]:
    """The regions of the overlay that ImageJ stored in a TIFF file, or where wanted its selection; empty without one."""
    import tifffile

    with decoding(path), logged(), tifffile.TiffFile(path) as tif:
        facts = (tif.imagej_metadata or {}) if tif.is_imagej else {}
        stored = facts.get("Overlays") or (selection and facts.get("ROI")) or []
    return [stored] if isinstance(stored, bytes) else list(stored)


def read_overlay(path: str) -> tuple[list[Region], tuple[str, ...]]:
    """The regions of a TIFF file's overlay, as `read` gives those of a file."""
    return _imagej(path, [(f"region {i}", data) for i, data in enumerate(overlay(path, selection=True), 1)])


# --------------------------------------------------------------------------------------------------------------- ImageJ


def _stored(path: str) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each region in a zip file, or of the one in a file of its own."""
    if not path.lower().endswith(".zip"):
        with decoding(path):
            yield os.path.basename(path), files.read_range(path, 0, MAX_BYTES)
        return
    with decoding(path), zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if not entry.filename.lower().endswith(".roi"):
                continue
            if entry.file_size > MAX_BYTES:
                raise UserError(f"{path} holds {entry.filename} of {entry.file_size} bytes, which is no region")
            yield entry.filename, archive.read(entry)


def _imagej(path: str, stored: Sequence[tuple[str, bytes]]) -> tuple[list[Region], tuple[str, ...]]:
    system.require("roifile", extra="formats")
    import roifile

    regions, left_out = [], 0
    for entry, data in stored:
        with decoding(f"{entry} of {path}"), logged("roifile"):
            roi = roifile.ImagejRoi.frombytes(data)
            paths = _paths(roi)
            if not all(np.isfinite(path).all() for path in paths):
                raise ValueError("its coordinates are no numbers")
        if paths:
            name = roi.name or os.path.splitext(os.path.basename(entry))[0]
            regions.append(Region(name, _section(roi, name, path), paths))
        else:
            left_out += 1
    if not regions:
        without = " that enclose pixels" if left_out else ""
        raise UserError(f"{path} holds no regions{without}; save those of ImageJ's ROI Manager with More > Save")
    note = f"{path}: {left_out} regions that enclose no pixels (points, lines, text) are left out"
    return regions, (printable(note),) if left_out else ()


def _section(roi: Any, name: str, path: str) -> int:
    """The section (from 0) that a region names: ImageJ counts from 1, and 0 stands for none."""
    automatic = FIJI_NAME.match(name)
    number = roi.z_position or roi.position or (int(automatic[1]) if automatic else 0)
    if number < 1:
        raise UserError(
            f"region {name} of {path} does not say in which section it lies; in Fiji, update it in the ROI Manager with its "
            "section in view and ROI Manager > More > Options > Associate ROIs with slices set"
        )
    return number - 1


def _paths(roi: Any) -> tuple[np.ndarray, ...]:
    """The outlines of a region; none where it encloses no pixels."""
    if roi.roitype.name not in AREAS or roi.subtype.name in DRAWINGS:
        return ()
    if roi.multi_coordinates is not None:
        return tuple(_outlines(np.asarray(roi.multi_coordinates, float).tolist()))
    if roi.roitype.name == "OVAL":
        return (_ellipse(roi.left, roi.top, roi.right, roi.bottom),)
    corners = np.asarray(roi.coordinates(), float)
    return (corners,) if len(corners) > 2 else ()


def _outlines(path: list[float]) -> Iterator[np.ndarray]:
    """The outlines of a composite region, which ImageJ keeps as Java's paths do: commands with their points; curves become
    `CURVE_STEPS` lines."""
    points: list[np.ndarray] = []
    at = 0
    while at < len(path):
        command = int(path[at])
        if path[at] not in PATH_POINTS or at + 2 * PATH_POINTS[command] >= len(path):
            raise ValueError(f"its path has the command {path[at]:g}, or ends early")
        count = PATH_POINTS[command]
        ends = [np.array(path[i : i + 2]) for i in range(at + 1, at + 1 + 2 * count, 2)]
        at += 1 + 2 * count
        if command == MOVE and len(points) > 2:
            yield np.array(points)
        if command == MOVE:
            points = ends
        elif count == 1:
            points += ends
        elif count > 1 and points:
            controls = np.array([points[-1], *ends])
            t = np.arange(1, CURVE_STEPS + 1)[:, None] / CURVE_STEPS
            weights = [comb(count, k) * t**k * (1 - t) ** (count - k) for k in range(count + 1)]
            points += list(np.hstack(weights) @ controls)
    if len(points) > 2:
        yield np.array(points)


def _ellipse(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    angle = np.arange(ELLIPSE_POINTS) * (2 * np.pi / ELLIPSE_POINTS)
    x, y = (left + right + (right - left) * np.cos(angle)) / 2, (top + bottom + (bottom - top) * np.sin(angle)) / 2
    return np.stack([x, y], axis=1)


# --------------------------------------------------------------------------------------------------------------- napari


def _napari_shapes(path: str) -> tuple[list[Region], tuple[str, ...]]:
    """The shapes that napari saves as a table: a row for each vertex, axes z y x, integers at the centers of voxels."""
    with decoding(path):
        text = files.read_range(path, 0, MAX_BYTES).decode()
        rows = list(csv.DictReader(io.StringIO(text)))
    if not rows or not set(SHAPE_COLUMNS) <= set(rows[0]):
        raise UserError(
            f"{path} is no table of napari's shapes with three axes: it lacks a row, or one of the columns "
            f"{', '.join(SHAPE_COLUMNS)}; save the layer of a 3-D image with File > Save Selected Layers"
        )
    vertices: dict[str, list[list[float]]] = {}
    kinds: dict[str, str] = {}
    with decoding(path):
        for row in rows:
            vertices.setdefault(row["index"], []).append([float(row[name]) for name in SHAPE_COLUMNS[3:]])
            kinds[row["index"]] = row["shape-type"]
    regions, left_out = [], 0
    for index, kind in kinds.items():
        zyx = np.array(vertices[index])
        if kind not in ("polygon", "rectangle", "ellipse"):
            left_out += 1
            continue
        if not np.isfinite(zyx).all() or np.ptp(np.round(zyx[:, 0])) > 0 or zyx[0, 0] < -0.5:
            raise UserError(f"shape {index} of {path} does not lie in one section; draw each in a section of its own")
        if len(zyx) < 3 or (kind == "ellipse" and len(zyx) != 4):
            raise UserError(
                f"shape {index} of {path}, a {kind}, has {len(zyx)} corners: the file is cut short or was changed"
            )
        xy = zyx[:, :0:-1] + 0.5
        if kind == "ellipse":
            xy = _ellipse_in(xy)
        regions.append(Region(f"shape {index}", int(np.round(zyx[0, 0])), (xy,)))
    if not regions:
        raise UserError(f"{path} holds no polygon, rectangle or ellipse; draw some in napari and save them again")
    return regions, (printable(f"{path}: {left_out} lines and paths are left out"),) if left_out else ()


def _ellipse_in(corners: np.ndarray) -> np.ndarray:
    """The ellipse in a rectangle, which may be turned, of four corners x y."""
    center, first, second = corners.mean(axis=0), corners[1] - corners[0], corners[3] - corners[0]
    angle = np.arange(ELLIPSE_POINTS) * (2 * np.pi / ELLIPSE_POINTS)
    return center + (np.cos(angle)[:, None] * first + np.sin(angle)[:, None] * second) / 2


# --------------------------------------------------------------------------------------------------------------- pixels


def inside(paths: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """The pixels whose centers lie inside an odd number of paths.

    Parameters
    ----------
    paths
        Corners (n, 2), x y; the last is joined to the first. They may reach beyond the plane.
    shape
        The plane's, y x.

    Returns
    -------
    numpy.ndarray
        bool (y, x).

    Examples
    --------
    >>> inside([np.array([[1, 0], [3, 0], [3, 1], [1, 1]])], (2, 4)).astype(int).tolist()
    [[0, 1, 1, 0], [0, 0, 0, 0]]
    """
    crossings = np.zeros((shape[0], shape[1] + 1), np.int32)  # of each row's middle, by the first pixel to their right
    for path in paths:
        begin, end = np.asarray(path, float), np.roll(np.asarray(path, float), -1, axis=0)
        lower, upper = np.minimum(begin[:, 1], end[:, 1]), np.maximum(begin[:, 1], end[:, 1])
        first, stop = (np.clip(np.ceil(y - 0.5), 0, shape[0]).astype(int) for y in (lower, upper))
        counts = np.maximum(0, stop - first)
        edge = np.repeat(np.arange(len(begin)), counts)
        row = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
        (x0, y0), (x1, y1) = begin[edge].T, end[edge].T
        x = x0 + (row + 0.5 - y0) * (x1 - x0) / (y1 - y0)
        np.add.at(crossings, (row, np.clip(np.ceil(x - 0.5), 0, shape[1]).astype(int)), 1)
    return (np.cumsum(crossings, axis=1)[:, :-1] & 1).astype(bool)


def paint(regions: Sequence[Region], ids: Sequence[int], shape: tuple[int, int]) -> np.ndarray:
    """A section with its regions, the later ones on top: uint32 (y, x), 0 for background, else each region's id."""
    plane = np.zeros(shape, np.uint32)
    for region, number in zip(regions, ids, strict=True):
        corners = np.concatenate(region.paths)
        x0, y0 = np.clip(np.floor(corners.min(axis=0)), 0, shape[::-1]).astype(int)
        x1, y1 = np.clip(np.ceil(corners.max(axis=0)), 0, shape[::-1]).astype(int)
        if x1 > x0 and y1 > y0:
            near = inside([path - (x0, y0) for path in region.paths], (y1 - y0, x1 - x0))
            plane[y0:y1, x0:x1][near] = number
    return plane


def objects(regions: Sequence[Region], shape: tuple[int, int]) -> list[int]:
    """The object (from 1) that each region belongs to.

    Where all have the names that `volseg export` gives, these tell. Else two regions in neighboring sections are one object
    if neither overlaps another more, and they share at least `SAME_OBJECT` of the smaller.
    """
    names = [OBJECT_NAME.fullmatch(region.name) for region in regions]
    if all(names):
        return [int(name[1]) for name in names]  # type: ignore[index]
    by_section: dict[int, list[int]] = {}
    for i, region in enumerate(regions):
        by_section.setdefault(region.section, []).append(i)
    pairs, before, previous = [], np.zeros(shape, np.uint32), -2
    for section in sorted(by_section):
        own = by_section[section]
        plane = paint([regions[i] for i in own], [i + 1 for i in own], shape)
        if section == previous + 1:
            pairs += partners(before, plane)
        before, previous = plane, section
    return joined(len(regions), pairs)[1:].tolist()


def joined(count: int, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """New numbers of ids 0 to ``count``, of which pairs are one object: 0 stays, the others are 1..N in order; uint32.

    >>> joined(4, [(4, 2)]).tolist()
    [0, 1, 2, 3, 2]
    """
    first, second = np.array(pairs, np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(first), bool), (first, second)), (count + 1, count + 1))
    component = connected_components(graph, directed=False)[1]
    _, place, inverse = np.unique(component, return_index=True, return_inverse=True)
    rank = np.empty(len(place), np.uint32)
    rank[np.argsort(place)] = np.arange(len(place))
    return rank[inverse]


def partners(a: np.ndarray, b: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of ids of two planes that overlap each other most, and by at least `SAME_OBJECT` of the smaller."""
    both = (a > 0) & (b > 0)
    pairs, counts = np.unique(np.stack([a[both], b[both]], axis=1), axis=0, return_counts=True)
    sizes = [dict(zip(*np.unique(plane, return_counts=True), strict=True)) for plane in (a, b)]
    best: list[dict] = [{}, {}]
    for (first, second), count in zip(pairs.tolist(), counts.tolist(), strict=True):
        for side, number in ((0, first), (1, second)):
            if count > best[side].get(number, (0, None))[0]:
                best[side][number] = (count, (first, second))
    return [
        pair
        for count, pair in best[0].values()
        if best[1][pair[1]][1] == pair and count >= SAME_OBJECT * min(sizes[0][pair[0]], sizes[1][pair[1]])
    ]
