"""Meshes and skeletons of a run's objects, each from its own box: objects of one neighborhood are read together, large ones
coarser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import numpy as np

from volseg.box import Blocks, Box, Triple
from volseg.io import volume
from volseg.io.export import meshes, skeletons
from volseg.io.header import TripleNm
from volseg.io.place import ORIGIN

NEIGHBORHOOD = (128, 256, 256)  # voxels: small objects that begin in one such block are read together
SMALL_VOXELS = 1 << 22  # of an object's box, up to which it is one of several in a task
TOGETHER_VOXELS = 1 << 25  # that are read at once
MASK_VOXELS = 1 << 26  # of an object's box at the level it is meshed from; larger ones are meshed from coarser voxels
LINE_VOXELS = 1 << 24  # the same for skeletons, which take more memory, and change less where voxels are coarser


@dataclass(frozen=True)
class MeshJob:
    """Objects of ``levels`` (finest first) become files in ``path``; ``max_error_nm`` is simplification's, at least, and
    ``begin_nm`` (z y x) the outer corner of the first voxel."""

    path: str
    kind: str
    levels: tuple[volume.Volume, ...]
    max_error_nm: float
    begin_nm: TripleNm = ORIGIN


@dataclass(frozen=True)
class Object:
    """An object and its box, in voxels of the finest level."""

    label: int
    box: Box


def objects_of(columns: dict[str, np.ndarray], chosen: tuple[int, ...] = ()) -> list[Object]:
    """The objects of a table, or those of the ``chosen`` labels among them."""
    bounds = [columns[name].tolist() for name in ("z0", "y0", "x0", "z1", "y1", "x1")]
    rows = zip(columns["id"].tolist(), *bounds, strict=True)
    wanted = set(chosen)
    return [
        Object(label, Box(tuple(ends[:3]), tuple(ends[3:]))) for label, *ends in rows if not wanted or label in wanted
    ]


def groups(found: list[Object], shape: Triple) -> Iterator[tuple[Object, ...]]:
    """The objects in parts for one task each."""
    grid, small = Blocks(shape, NEIGHBORHOOD), {}  # type: ignore[var-annotated]
    for each in found:
        if each.box.voxels > SMALL_VOXELS:
            yield (each,)
            continue
        place = tuple(a // b for a, b in zip(each.box.start, NEIGHBORHOOD, strict=True))
        small.setdefault(grid.index(place), []).append(each)
    for number in sorted(small):
        yield tuple(small[number])


def write_meshes(job: MeshJob, objects: tuple[Object, ...]) -> int:
    """The meshes of some objects are stored; how many had no surface at their level."""
    finest, missing = job.levels[0], 0
    outer = reduce(_join, (each.box for each in objects))
    together = finest.read(outer) if len(objects) > 1 and outer.voxels <= TOGETHER_VOXELS else None
    for each in objects:
        if together is not None:
            mask = together[each.box.slices_within(outer)] == each.label
            mesh = meshes.surface(mask, each.box.start, finest.voxel_size_nm, job.max_error_nm, job.begin_nm)
        else:
            mesh = mesh_of(job.levels, each, job.max_error_nm, begin_nm=job.begin_nm)
        if len(mesh.triangles):
            meshes.save(job.path, job.kind, each.label, mesh)
        missing += not len(mesh.triangles)
    return missing


def mesh_of(
    levels: tuple[volume.Volume, ...], each: Object, max_error_nm: float, most: int = 0, begin_nm: TripleNm = ORIGIN
) -> meshes.Mesh:
    """The surface of one object, from the finest voxels of which at most ``most`` fill its box."""
    mask, start, size = _mask_of(levels, each, most or MASK_VOXELS)
    error = max_error_nm * max(b / a for a, b in zip(levels[0].voxel_size_nm, size, strict=True))
    return meshes.surface(mask, start, size, error, begin_nm)


def write_skeletons(job: MeshJob, objects: tuple[Object, ...]) -> list[tuple]:
    """The skeletons of some objects are stored; by label, what `skeletons.COLUMNS` say of each."""
    rows = []
    for each in objects:
        found = skeletons.center_lines(*_mask_of(job.levels, each, LINE_VOXELS), job.begin_nm)
        if found:
            skeletons.save(job.path, job.kind, each.label, found)
        rows.append((each.label, *found.measures) if found else (each.label,))
    return rows


def _mask_of(levels: tuple[volume.Volume, ...], each: Object, most: int) -> tuple[np.ndarray, Triple, TripleNm]:
    """One object in the finest voxels of which at most ``most`` fill its box: its mask, where it begins, their size."""
    finest = levels[0].voxel_size_nm
    for level in levels:
        scale = [round(b / a) for a, b in zip(finest, level.voxel_size_nm, strict=True)]
        start = tuple(a // s for a, s in zip(each.box.start, scale, strict=True))
        stop = tuple(-(-b // s) for b, s in zip(each.box.stop, scale, strict=True))
        box = Box(start, stop)
        if box.voxels <= most:
            break
    factor = 1
    while box.voxels > most * factor**3:
        factor *= 2
    z, y, x = (n // factor for n in box.start)
    size = tuple(n * factor for n in level.voxel_size_nm)
    return meshes.read_mask(level, box, each.label, factor), (z, y, x), size


def _join(a: Box, b: Box) -> Box:
    """The smallest box around both."""
    return Box(tuple(map(min, a.start, b.start)), tuple(map(max, a.stop, b.stop)))
