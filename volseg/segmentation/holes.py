"""Holes: pieces of background, so that those which one object encloses can be filled, exactly, however the volume is cut.

A hole is a piece of what is outside the mask, connected by voxel faces, whatever neighbors the mask itself has (as
`scipy.ndimage.binary_fill_holes` does by default). Holes are found in each block from its regions alone, no probability
is read, and joined over faces, as basins are:

1. `number_holes`, `block_holes`: a block's holes, the regions they touch, and what lies on its faces.
2. `face_contacts`: what touches what over the faces to the blocks behind.
3. `gather`: the volume's holes, and the basins that each touches. `rules` decides which are filled.

Regions and holes of a block are its *pieces*: holes are numbered after the regions, so one number names any of them.
"""

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
    """What one block knows of its holes, in the order of their first voxels.

    Attributes
    ----------
    regions
        int64 (): how many regions the block has; its holes are the pieces from ``regions + 1`` on.
    voxels
        int64 (holes,): voxels of the hole in this block.
    first
        int64 (holes,): lowest linear index (in the volume) among them.
    is_open
        bool (holes,): whether one of them lies on the volume's border.
    contacts
        int64 (n, 2): holes (pieces) and the regions that share a voxel face with them inside the block.
    face_offset, run_start, run_piece
        int64 (7,) and (runs,), uint32 (runs,): the block's faces in the order low z, high z, low y, and so on. Of face f,
        rows ``face_offset[f]:face_offset[f + 1]`` tell which piece there is from which voxel of the face (raster order)
        on; there are none where the volume ends.
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
    """The volume's holes.

    Attributes
    ----------
    voxels, first, is_open
        As in `BlockHoles`, now complete.
    contacts
        int64 (n, 2): holes (from 0) and the basins (from 0) that share a voxel face with them.
    """

    voxels: np.ndarray
    first: np.ndarray
    is_open: np.ndarray
    contacts: np.ndarray


# ---------------------------------------------------------------- 1


def number_holes(region: np.ndarray) -> np.ndarray:
    """The piece of each voxel: its region, or the number of regions plus that of its hole (from 1).

    Parameters
    ----------
    region
        uint32 (z, y, x): a block's regions, numbered from 1 without gaps; 0 outside the mask.

    Returns
    -------
    uint32 (z, y, x)

    Examples
    --------
    >>> number_holes(np.array([[[1, 0, 2, 0]]], np.uint32))
    array([[[1, 3, 2, 4]]], dtype=uint32)
    """
    return _number_pieces(region, np.uint32(region.max(initial=0)))[0]


def block_holes(region: np.ndarray, box: Box, shape: Triple) -> BlockHoles:
    """The `BlockHoles` of one block.

    Parameters
    ----------
    region
        As in `number_holes`.
    box
        The block.
    shape
        Shape of the volume, z y x.

    Examples
    --------
    Two holes between and after two regions; the first of them touches both, the second lies on the volume's border as all
    voxels of a single row do.

    >>> row = np.array([[[1, 0, 2, 0]]], np.uint32)
    >>> table = block_holes(row, Box((0, 0, 0), (1, 1, 4)), (1, 1, 4))
    >>> table.voxels.tolist(), table.first.tolist(), table.is_open.tolist(), table.contacts.tolist()
    ([1, 1], [1, 3], [True, True], [[3, 1], [3, 2], [4, 2]])
    """
    regions = int(region.max(initial=0))
    piece, voxels, first = _number_pieces(region, np.uint32(regions))
    is_open = np.zeros(regions + 1 + voxels.size, bool)
    runs = []
    for axis in range(3):
        for end, is_border in ((0, box.start[axis] == 0), (-1, box.stop[axis] == shape[axis])):
            face = np.take(piece, end, axis).ravel()
            is_open[face] |= is_border
            start = np.flatnonzero(np.r_[not is_border, (face[1:] != face[:-1]) & (not is_border)])
            runs.append((start, face[start]))
    return BlockHoles(
        regions=np.array(regions),
        voxels=voxels,
        first=_in_volume(first, box, shape),
        is_open=is_open[regions + 1 :],
        contacts=_hole_contacts(piece, regions),
        face_offset=np.cumsum([0, *(start.size for start, _ in runs)]),
        run_start=np.concatenate([start for start, _ in runs]),
        run_piece=np.concatenate([run_piece for _, run_piece in runs]),
    )


def _in_volume(index: np.ndarray, box: Box, shape: Triple) -> np.ndarray:
    zyx = [place + start for place, start in zip(np.unravel_index(index, box.shape), box.start, strict=True)]
    return np.ravel_multi_index(zyx, shape).astype(np.int64)


# Connected components by union-find over runs along x, as in Wu, Otoo and Suzuki, "Optimizing two-pass connected-component
# labeling algorithms" (2009). The first pass numbers runs, and unites a run with those that it touches before it in y and z,
# once for each stretch of contact. The second writes pieces over the runs.
# Invariant: the root of a hole is its first run, so roots in ascending order are in raster order.
@njit(cache=True, nogil=True)
def _number_pieces(region: np.ndarray, regions: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of a block, and of each hole its voxels and first voxel (linear index in the block)."""
    nz, ny, nx = region.shape
    out = np.empty(region.shape, np.uint32)
    parent = np.empty(1024, np.int64)
    runs = 0
    for z in range(nz):
        for y in range(ny):
            in_run = False
            for x in range(nx):
                if region[z, y, x] != 0:
                    in_run = False
                    continue
                touches_y = y > 0 and region[z, y - 1, x] == 0
                touches_z = z > 0 and region[z - 1, y, x] == 0
                if in_run:
                    n = np.int64(out[z, y, x - 1])
                    touches_y = touches_y and region[z, y - 1, x - 1] != 0
                    touches_z = touches_z and region[z - 1, y, x - 1] != 0
                elif touches_y:
                    n = np.int64(out[z, y - 1, x])
                    touches_y = False
                elif touches_z:
                    n = np.int64(out[z - 1, y, x])
                    touches_z = False
                else:
                    if runs == parent.size:
                        parent = _doubled(parent)
                    n = np.int64(runs)
                    parent[n] = n
                    runs += 1
                if touches_y:
                    unite(parent, find(parent, n), find(parent, np.int64(out[z, y - 1, x])))
                if touches_z:
                    unite(parent, find(parent, n), find(parent, np.int64(out[z - 1, y, x])))
                out[z, y, x] = n
                in_run = True
    number = np.zeros(runs, np.uint32)
    count = 0
    for run in range(runs):
        if parent[run] == run:
            count += 1
            number[run] = count
        else:
            number[run] = number[find(parent, run)]
    voxels, first = np.zeros(count, np.int64), np.zeros(count, np.int64)
    flat_region, flat = region.ravel(), out.ravel()
    for v in range(flat.size):
        if flat_region[v] != 0:
            flat[v] = flat_region[v]
            continue
        n = number[flat[v]]
        if voxels[n - 1] == 0:
            first[n - 1] = v
        voxels[n - 1] += 1
        flat[v] = regions + n
    return out, voxels, first


@njit(cache=True, nogil=True)
def _doubled(full: np.ndarray) -> np.ndarray:
    """``full`` with as much room again behind it."""
    grown = np.empty(2 * full.size, full.dtype)
    grown[: full.size] = full
    return grown


def _hole_contacts(piece: np.ndarray, regions: int) -> np.ndarray:
    """Pairs of a hole and a region that share a voxel face, each once."""
    codes = np.unique(_contact_codes(piece, np.int64(regions)))
    return np.stack([codes >> 32, codes & REGION_MASK], axis=1)


# One pass over all voxel faces. Neighboring faces mostly repeat a contact, so of each axis the last one is remembered and not
# written again; `numpy.unique` drops the rest.
@njit(cache=True, nogil=True)
def _contact_codes(piece: np.ndarray, regions: int) -> np.ndarray:
    """``hole << 32 | region`` where they share a voxel face; most of them several times."""
    nz, ny, nx = piece.shape
    out = np.empty(1024, np.int64)
    used = 0
    last = np.zeros(3, np.int64)
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                p = np.int64(piece[z, y, x])
                for axis in range(3):
                    if axis == 0 and z + 1 < nz:
                        q = np.int64(piece[z + 1, y, x])
                    elif axis == 1 and y + 1 < ny:
                        q = np.int64(piece[z, y + 1, x])
                    elif axis == 2 and x + 1 < nx:
                        q = np.int64(piece[z, y, x + 1])
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
    """The contacts of holes over the faces of block ``i`` to the blocks behind it.

    Parameters
    ----------
    i
        Number of the block in ``grid``.
    table_of
        Gives the table of a block by its number; asked for ``i`` and the blocks behind it.
    grid
        The volume's blocks.

    Returns
    -------
    int64 (n, 2), sorted, each pair once
        Ids ``block << 32 | piece`` of pieces that share a voxel face, at least one of them a hole's.
    """
    pairs = [np.empty((0, 2), np.int64)]
    for axis in range(3):
        j = grid.next_along(i, axis)
        if j is None:
            continue
        own, next_table = table_of(i), table_of(j)
        (start, piece), (start_behind, piece_behind) = _face_runs(own, 2 * axis + 1), _face_runs(next_table, 2 * axis)
        starts = np.union1d(start, start_behind)
        a = piece[np.searchsorted(start, starts, "right") - 1]
        b = piece_behind[np.searchsorted(start_behind, starts, "right") - 1]
        has_hole = (a > own.regions) | (b > next_table.regions)
        pairs.append(np.stack([global_id(i, a[has_hole]), global_id(j, b[has_hole])], axis=1))
    return np.unique(np.concatenate(pairs), axis=0)


def face_plane(table: BlockHoles, box: Box, face: int) -> np.ndarray:
    """The pieces on a face of a block that has volume behind it; uint32 (2-D), face as in `BlockHoles`."""
    a, b = (n for axis, n in enumerate(box.shape) if axis != face // 2)
    start, piece = _face_runs(table, face)
    return np.repeat(piece, np.diff(np.r_[start, a * b])).reshape(a, b)


def _face_runs(table: BlockHoles, face: int) -> tuple[np.ndarray, np.ndarray]:
    rows = slice(table.face_offset[face], table.face_offset[face + 1])
    return table.run_start[rows], table.run_piece[rows]


# ---------------------------------------------------------------- 3


def gather(
    tables: Iterable[BlockHoles], contacts: Iterable[np.ndarray], basin_of: Sequence[np.ndarray]
) -> tuple[Holes, list[np.ndarray]]:
    """The volume's `Holes`, and for each block the hole of each of its holes.

    Parameters
    ----------
    tables, contacts
        Of each block in the order of blocks, ``contacts`` as `face_contacts` gives them; ``run_start`` and ``run_piece``
        are not looked at.
    basin_of
        As `stitch.gather` gives it: the basin of each block's regions.

    Returns
    -------
    holes
        `Holes`
    hole_of
        For each block int64 (holes,): the volume's hole, from 0, of its first hole, its second, and so on.
    """
    tables = [replace(table, run_start=table.run_start[:0], run_piece=table.run_piece[:0]) for table in tables]
    regions = np.array([int(table.regions) for table in tables])
    offset = np.cumsum([0, *(table.voxels.size for table in tables)])
    pairs = np.concatenate([*(global_id(i, table.contacts) for i, table in enumerate(tables)), *contacts])
    block, piece = pairs >> 32, pairs & REGION_MASK
    is_hole = piece > regions[block]
    number = np.where(is_hole, piece - 1 + (offset[:-1] - regions)[block], 0)
    both_holes = is_hole.all(axis=1)
    root = connected_components(*number[both_holes].T.copy(), int(offset[-1]))
    _, hole = np.unique(root, return_inverse=True)
    count = int(hole.max(initial=-1)) + 1
    first_region, basin = np.cumsum([0, *regions]), np.concatenate(basin_of)
    number[~is_hole] = basin[(first_region[block] + piece - 1)[~is_hole]]
    hole_and_basin = np.where(is_hole[:, :1], number, number[:, ::-1])[~both_holes]
    hole_and_basin[:, 0] = hole[hole_and_basin[:, 0]]
    holes = Holes(
        voxels=sum_by_group(_concatenate(tables, "voxels"), hole, count),
        first=min_by_group(_concatenate(tables, "first"), hole, count),
        is_open=min_by_group(~_concatenate(tables, "is_open"), hole, count) == 0,
        contacts=np.unique(hole_and_basin, axis=0),
    )
    return holes, np.split(hole, offset[1:-1])


def _concatenate(tables: list[BlockHoles], field: str) -> np.ndarray:
    return np.concatenate([getattr(table, field) for table in tables])
