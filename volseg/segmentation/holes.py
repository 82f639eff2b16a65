"""Holes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numba import njit

from volseg.box import Blocks, Box, Triple
from volseg.segmentation.edges import connected_components, find, unite
from volseg.segmentation.stitch import REGION_MASK, global_id, min_by_group, sum_by_group


@dataclass(frozen=True)
class BlockHoles:
    """What one block says of its voids, in the order of their first voxels; they are the places from ``regions + 1`` on.

    regions  how many regions the block has
    voxels   voxels of each void in this block
    first    lowest linear index (in the volume) among them
    open     whether one of them lies on the volume's border
    rim      int64 (n, 2): voids (places) and the regions that share a voxel face with them inside the block
    begin, start, place   the block's faces, low z, high z, low y, ..: rows ``begin[f]:begin[f + 1]`` say from which voxel
             of face f on (raster order) which place there is; none where the volume ends
    """

    regions: np.ndarray
    voxels: np.ndarray
    first: np.ndarray
    is_open: np.ndarray
    contacts: np.ndarray
    face_offset: np.ndarray
    run_start: np.ndarray
    run_piece: np.ndarray


@dataclass(frozen=True)
class Holes:
    """The volume's holes: voxels, lowest linear index and whether they reach the border, as in `BlockHoles`, now complete.

    contacts  int64 (n, 2): voids (from 0) and the basins (from 0) that share a voxel face with them
    """

    voxels: np.ndarray
    first: np.ndarray
    is_open: np.ndarray
    contacts: np.ndarray


# ---------------------------------------------------------------- 1


def number_holes(region: np.ndarray) -> np.ndarray:
    """The place of each voxel: its region, or the number of regions plus its void's (from 1). uint32.

    >>> number_holes(np.array([[[1, 0, 2, 0]]], np.uint32))
    array([[[1, 3, 2, 4]]], dtype=uint32)
    """
    return _numbered(region, np.uint32(region.max(initial=0)))[0]


def block_holes(region: np.ndarray, box: Box, shape: Triple) -> BlockHoles:
    """The `BlockHoles` of a block from its regions (uint32, 0 outside the mask), which are numbered from 1 without gaps."""
    regions = int(region.max(initial=0))
    place, voxels, first = _numbered(region, np.uint32(regions))
    is_open = np.zeros(regions + 1 + voxels.size, bool)
    runs = []
    for axis in range(3):
        for end, ends in ((0, box.start[axis] == 0), (-1, box.stop[axis] == shape[axis])):
            face = np.take(place, end, axis).ravel()
            is_open[face] |= ends
            at = np.flatnonzero(np.r_[not ends, (face[1:] != face[:-1]) & (not ends)])
            runs.append((at, face[at]))
    return BlockHoles(
        regions=np.array(regions),
        voxels=voxels,
        first=_in_volume(first, box, shape),
        is_open=is_open[regions + 1 :],
        contacts=_hole_contacts(place, regions),
        face_offset=np.cumsum([0, *(start.size for start, _ in runs)]),
        run_start=np.concatenate([start for start, _ in runs]),
        run_piece=np.concatenate([of for _, of in runs]),
    )


def _in_volume(index: np.ndarray, box: Box, shape: Triple) -> np.ndarray:
    at = [p + a for p, a in zip(np.unravel_index(index, box.shape), box.start, strict=True)]
    return np.ravel_multi_index(at, shape).astype(np.int64)


@njit(cache=True, nogil=True)
def _numbered(region, regions):
    """Places of a block, and of each void its voxels and first voxel (linear index in the block).

    Union-find over runs along x: the root of a void is its first run, so roots in ascending order are in raster order.
    """
    nz, ny, nx = region.shape
    out = np.empty(region.shape, np.uint32)
    parent = np.empty(1024, np.int64)
    runs = 0
    for z in range(nz):
        for y in range(ny):
            left = False
            for x in range(nx):
                if region[z, y, x] != 0:
                    left = False
                    continue
                up = y > 0 and region[z, y - 1, x] == 0
                back = z > 0 and region[z - 1, y, x] == 0
                if left:
                    n = np.int64(out[z, y, x - 1])
                    up = up and region[z, y - 1, x - 1] != 0
                    back = back and region[z - 1, y, x - 1] != 0
                elif up:
                    n = np.int64(out[z, y - 1, x])
                    up = False
                elif back:
                    n = np.int64(out[z - 1, y, x])
                    back = False
                else:
                    if runs == parent.size:
                        parent = _doubled(parent)
                    n = runs
                    parent[n] = n
                    runs += 1
                if up:
                    unite(parent, n, np.int64(out[z, y - 1, x]))
                if back:
                    unite(parent, n, np.int64(out[z - 1, y, x]))
                out[z, y, x] = n
                left = True
    number = np.zeros(runs, np.uint32)
    count = 0
    for n in range(runs):
        if parent[n] == n:
            count += 1
            number[n] = count
        else:
            number[n] = number[find(parent, n)]
    voxels, first = np.zeros(count, np.int64), np.zeros(count, np.int64)
    of, flat = region.ravel(), out.ravel()
    for v in range(flat.size):
        if of[v] != 0:
            flat[v] = of[v]
            continue
        n = number[flat[v]]
        if voxels[n - 1] == 0:
            first[n - 1] = v
        voxels[n - 1] += 1
        flat[v] = regions + n
    return out, voxels, first


@njit(cache=True, nogil=True)
def _doubled(full):
    """``full`` with as much room again behind it."""
    grown = np.empty(2 * full.size, full.dtype)
    grown[: full.size] = full
    return grown


def _hole_contacts(place: np.ndarray, regions: int) -> np.ndarray:
    """Pairs of a void and a region that share a voxel face, each once."""
    codes = np.unique(_touching(place, np.int64(regions)))
    return np.stack([codes >> 32, codes & REGION_MASK], axis=1)


@njit(cache=True, nogil=True)
def _touching(place, regions):
    """``void << 32 | region`` where they meet, most of them several times."""
    nz, ny, nx = place.shape
    out = np.empty(1024, np.int64)
    used = 0
    last = np.zeros(3, np.int64)
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                p = np.int64(place[z, y, x])
                for axis in range(3):
                    if axis == 0 and z + 1 < nz:
                        q = np.int64(place[z + 1, y, x])
                    elif axis == 1 and y + 1 < ny:
                        q = np.int64(place[z, y + 1, x])
                    elif axis == 2 and x + 1 < nx:
                        q = np.int64(place[z, y, x + 1])
                    else:
                        continue
                    if (p > regions) == (q > regions):
                        continue
                    code = (max(p, q) << 32) | min(p, q)
                    if code == last[axis]:
                        continue
                    last[axis] = code
                    if used == out.size:
                        out = _doubled(out)
                    out[used] = code
                    used += 1
    return out[:used]


# ---------------------------------------------------------------- 2


def face_contacts(i: int, table_of: Callable[[int], BlockHoles], grid: Blocks) -> np.ndarray:
    """Pairs of names (int64 (n, 2)) that share a face of block ``i`` with a block behind it, at least one a void's.

    ``table_of`` gives the table of ``i`` and of the blocks behind it. A name is ``block << 32 | place``.
    """
    found = [np.empty((0, 2), np.int64)]
    for axis in range(3):
        if grid[i].stop[axis] == grid.shape[axis]:
            continue
        j = grid.index(tuple(c + (k == axis) for k, c in enumerate(grid.coords(i))))
        here, there = table_of(i), table_of(j)
        (start, of), (start_there, of_there) = _face(here, 2 * axis + 1), _face(there, 2 * axis)
        at = np.union1d(start, start_there)
        a = of[np.searchsorted(start, at, "right") - 1]
        b = of_there[np.searchsorted(start_there, at, "right") - 1]
        with_void = (a > here.regions) | (b > there.regions)
        found.append(np.stack([global_id(i, a[with_void]), global_id(j, b[with_void])], axis=1))
    return np.unique(np.concatenate(found), axis=0)


def face_plane(table: BlockHoles, box: Box, face: int) -> np.ndarray:
    """The places (2-D) on a face of a block that has volume behind it."""
    shape = [n for axis, n in enumerate(box.shape) if axis != face // 2]
    start, place = _face(table, face)
    return np.repeat(place, np.diff(np.r_[start, shape[0] * shape[1]])).reshape(shape)


def _face(table: BlockHoles, face: int) -> tuple[np.ndarray, np.ndarray]:
    rows = slice(*table.face_offset[face : face + 2])
    return table.run_start[rows], table.run_piece[rows]


# ---------------------------------------------------------------- 3


def gather(
    tables: Iterable[BlockHoles], meets: Iterable[np.ndarray], basin_of: Sequence[np.ndarray]
) -> tuple[Holes, list[np.ndarray]]:
    """The volume's `Holes`, and for each block the void (from 0) of each of its voids.

    Tables and meets come in the order of blocks; ``basin_of`` has the basin of each block's regions.
    """
    tables = [replace(table, run_start=table.run_start[:0], run_piece=table.run_piece[:0]) for table in tables]
    regions = np.array([int(table.regions) for table in tables])
    offset = np.cumsum([0, *(table.voxels.size for table in tables)])
    pairs = np.concatenate([*(global_id(i, table.contacts) for i, table in enumerate(tables)), *meets])
    block, place = pairs >> 32, pairs & REGION_MASK
    is_void = place > regions[block]
    number = np.where(is_void, place - 1 + (offset[:-1] - regions)[block], 0)
    both = is_void.all(axis=1)
    _, of = np.unique(connected_components(*number[both].T.copy(), int(offset[-1])), return_inverse=True)
    count = int(of.max(initial=-1)) + 1
    begin, basin = np.cumsum([0, *regions]), np.concatenate(basin_of)
    number[~is_void] = basin[(begin[block] + place - 1)[~is_void]]
    rim = np.where(is_void[:, :1], number, number[:, ::-1])[~both]
    rim[:, 0] = of[rim[:, 0]]
    whole = Holes(
        voxels=sum_by_group(_column(tables, "voxels"), of, count),
        first=min_by_group(_column(tables, "first"), of, count),
        is_open=min_by_group(~_column(tables, "is_open"), of, count) == 0,
        contacts=np.unique(rim, axis=0),
    )
    return whole, np.split(of, offset[1:-1])


def _column(tables: list[BlockHoles], field: str) -> np.ndarray:
    return np.concatenate([getattr(table, field) for table in tables])
