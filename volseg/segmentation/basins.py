"""The basins of one block of heights, and the table of how they touch.

Voxels are ordered by ``(height, linear index)`` and edges of the grid (6 or 26 neighbors) by their higher end, then their
lower end, in that order. Both orders are total, so the minimum spanning forest is unique. An edge's order starts with its
higher end because then the first edge out of any voxel is the one to its lowest neighbor: steepest descent *is* the
first step of the forest (Cousty et al., "Watershed cuts", PAMI 2009), and every cutting into blocks takes the same one.

Seeds and sizes are unknown here: `rules` decides on them from the tables alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from numba import njit

from volseg.box import Box, Triple
from volseg.segmentation.edges import EDGE
from volseg.segmentation.heights import OUTSIDE


@dataclass(frozen=True)
class BlockBasins:
    """What one block knows of its regions and of what they touch.

    A region is a basin, or the part of a neighbor's basin that drains through one voxel outside the block (an *exit*).
    Regions are numbered 1..n in the block, in the order of their first voxels; row ``r - 1`` describes region r.

    Attributes
    ----------
    root
        int64 (n,): linear index, in the volume, of the basin's minimum, or of the exit.
    minimum
        int32 (n,): height at the root.
    is_exit
        bool (n,): whether the root lies outside the block.
    voxels
        int64 (n,): voxels of the region in this block.
    first
        int64 (n,): lowest linear index among them.
    probability_sum
        int64 (n,): sum of the stored mask probability (uint8) over them.
    cut
        int64 (n, 3): those of them on the volume's outer faces, of the faces across z, across y and across x.
    edges
        EDGE: between regions of this block, one for each pair, sorted by pair.
    crossing_edges
        EDGE: grid edges to voxels of other blocks that are ahead in linear order; ``b`` is the voxel's linear index.
    face_voxel
        int64 (f,): linear indices of masked voxels on faces that have a block behind them, ascending.
    face_region
        int32 (f,): their regions.
    """

    root: np.ndarray
    minimum: np.ndarray
    is_exit: np.ndarray
    voxels: np.ndarray
    first: np.ndarray
    probability_sum: np.ndarray
    cut: np.ndarray
    edges: np.ndarray
    crossing_edges: np.ndarray
    face_voxel: np.ndarray
    face_region: np.ndarray


def watershed_block(
    height: np.ndarray, probability: np.ndarray, box: Box, shape: Triple, connectivity: int = 6
) -> tuple[np.ndarray, BlockBasins]:
    """The basins of one block, as far as the block can tell.

    Each voxel goes to its lowest neighbor until none is lower, or until it leaves the block. The first edge out of a voxel
    leads there, so this is the first step of Boruvka's algorithm on the graph of voxels (Cousty et al., PAMI 2009; on
    affinities Zlateski and Seung, arXiv 1505.00249, call the result the steepest ascent graph).

    Parameters
    ----------
    height
        int32 (z, y, x): heights of ``box`` grown by 1; `OUTSIDE` where there is no mask or no volume.
    probability
        uint8 (z, y, x): mask probability of ``box``.
    box
        The block.
    shape
        Shape of the volume, z y x.
    connectivity
        Neighbors of a voxel: 6 that share a face, or 26 that share a face, an edge or a corner.

    Returns
    -------
    region
        uint32 (z, y, x): the region of each voxel of the block, 0 outside the mask.
    table
        `BlockBasins`

    Examples
    --------
    Two valleys in a row, and the first four of its seven voxels as a block. The ridge (9) goes to its lower neighbor, which
    lies in the next block: voxel 4 is an exit, and the root of region 2.

    >>> row = np.array([OUTSIDE, 4, 0, 3, 9, 2, 1, 5, OUTSIDE], np.int32)
    >>> height = np.full((3, 3, 6), OUTSIDE, np.int32)
    >>> height[1, 1] = row[:6]
    >>> box = Box((0, 0, 0), (1, 1, 4))
    >>> region, table = watershed_block(height, np.full(box.shape, 255, np.uint8), box, (1, 1, 7))
    >>> region.tolist()
    [[[1, 1, 1, 2]]]
    >>> table.root.tolist(), table.minimum.tolist(), table.is_exit.tolist(), table.voxels.tolist()
    ([1, 4], [0, 2], [False, True], [3, 1])

    They touch once, and the saddle is the ridge. Voxel 3 of region 2 has one neighbor ahead in another block, voxel 4:

    >>> table.edges[["a", "b", "high", "high_voxel", "low", "area"]].tolist()
    [(1, 2, 9, 3, 3, 1)]
    >>> table.crossing_edges[["a", "b", "high", "low"]].tolist(), table.face_voxel.tolist()
    ([(2, 4, 9, 2)], [3])
    """
    steps, spans = _neighbor_steps(connectivity, height.shape), np.zeros((*height.shape[:2], 2), np.int32)
    region = np.zeros(height.shape, np.int32)
    _find_masked_spans(height, spans)
    _descend(height, steps, spans, region)
    roots = _number(region, height, spans)
    raster = _Raster(height.shape, box, shape)
    is_exit = raster.is_halo(roots)
    region.ravel()[roots[is_exit]] = 0  # so that only voxels of the block have a region
    has_block = np.array([(start > 0, stop < n) for start, stop, n in zip(box.start, box.stop, shape, strict=True)])
    core, cut = np.zeros(box.shape, np.int32), np.zeros((roots.size, 3), np.int64)
    voxels, first, probability_sum = np.zeros((3, roots.size), np.int64)
    _measure(region, probability, has_block, spans, core, voxels, first, probability_sum, cut)
    forward = steps[len(steps) // 2 :]
    face = _face_voxels(region, has_block, spans)
    table = BlockBasins(
        root=raster.in_volume(roots),
        minimum=height.ravel()[roots],
        is_exit=is_exit,
        voxels=voxels,
        first=raster.in_volume(first),
        probability_sum=probability_sum,
        cut=cut,
        edges=_inner_edges(region, height, roots.size, raster, forward, spans),
        crossing_edges=_crossing_edges(region, height, raster, forward, face),
        face_voxel=raster.in_volume(face),
        face_region=region.ravel()[face],
    )
    return core.view(np.uint32), table


@dataclass(frozen=True)
class _Raster:
    """Linear indices in a block grown by 1, whose shape is ``padded``."""

    padded: Triple
    box: Box
    shape: Triple

    def in_volume(self, index: np.ndarray) -> np.ndarray:
        """The linear indices of these voxels in the volume."""
        return _in_volume(np.asarray(index, np.int64), self.padded, self.box.start, self.shape)

    def is_halo(self, index: np.ndarray) -> np.ndarray:
        """Which of the voxels lie outside the block."""
        zyx = np.unravel_index(index, self.padded)
        return np.any([(place == 0) | (place == n - 1) for place, n in zip(zyx, self.padded, strict=True)], axis=0)


@njit(cache=True, nogil=True)
def _in_volume(index: np.ndarray, padded: Triple, start: Triple, shape: Triple) -> np.ndarray:
    out = np.empty(index.size, np.int64)
    ny, nx = np.uint32(padded[1]), np.uint32(padded[2])
    for k in range(index.size):
        row = np.uint32(index[k]) // nx
        z = row // ny
        y, x = np.int64(row - z * ny), np.int64(np.uint32(index[k]) - row * nx)
        out[k] = ((z + start[0] - 1) * shape[1] + (y + start[1] - 1)) * shape[2] + (x + start[2] - 1)
    return out


def _neighbor_steps(connectivity: int, padded: Triple) -> tuple[int, ...]:
    """From a voxel to each of its 6 or 26 neighbors in the linear index of an array of that shape, ascending.

    A tuple, so that numba compiles the loops over 6 and over 26 apart.

    >>> _neighbor_steps(6, (4, 5, 7))
    (-35, -7, -1, 1, 7, 35)
    """
    offsets = (offset for offset in product((-1, 0, 1), repeat=3) if any(offset))
    return tuple(
        (z * padded[1] + y) * padded[2] + x
        for z, y, x in offsets
        if connectivity == 26 or abs(z) + abs(y) + abs(x) == 1
    )


# ---------------------------------------------------------------- regions


@njit(cache=True, nogil=True)
def _find_masked_spans(height: np.ndarray, spans: np.ndarray) -> None:
    """``spans`` (zeros before): by row the first masked voxel inside the frame and the last + 1; elsewhere is no mask."""
    nz, ny, nx = height.shape
    for z in range(1, nz - 1):
        for y in range(1, ny - 1):
            lowest_in_row = np.int32(OUTSIDE)
            for x in range(1, nx - 1):
                lowest_in_row = min(lowest_in_row, height[z, y, x])
            if lowest_in_row == OUTSIDE:
                continue
            first, last = 1, nx - 1
            while height[z, y, first] == OUTSIDE:
                first += 1
            while height[z, y, last - 1] == OUTSIDE:
                last -= 1
            spans[z, y, 0], spans[z, y, 1] = first, last


# Unsigned indices and no branches: the compiler computes several voxels at a time.
@njit(cache=True, nogil=True)
def _descend(height: np.ndarray, steps: tuple[int, ...], spans: np.ndarray, out: np.ndarray) -> None:
    """``out`` (zeros before): of masked voxels inside the frame ``~`` the index of their lowest lower neighbor, or 0 (minima).

    Neighbors are visited in the order of their linear index, so that of equal ones the first wins.
    """
    nz, ny, nx = height.shape
    flat, below = height.ravel(), out.ravel()
    for z in range(1, nz - 1):
        for y in range(1, ny - 1):
            first = np.uint64((z * ny + y) * nx + spans[z, y, 0])
            for k in range(np.uint64(spans[z, y, 1] - spans[z, y, 0])):
                v = first + k
                own, lowest, step = flat[v], np.int32(OUTSIDE), np.int32(0)
                for d in range(len(steps)):
                    h = flat[v + np.uint64(steps[d])]
                    step = np.int32(steps[d]) if h < lowest else step
                    lowest = min(h, lowest)
                falls = (own != OUTSIDE) & ((lowest < own) | ((lowest == own) & (step < 0)))
                below[v] = ~(np.int32(v) + step) if falls else np.int32(0)


# Each voxel in raster order walks down until it meets a voxel with a region, a minimum, or the frame; then the way is walked
# again to number it. No voxel is numbered twice, so this is linear in the voxels.
# Invariant: whatever lies below a numbered voxel has its number; others still have what `_descend` gave them.
@njit(cache=True, nogil=True)
def _number(below: np.ndarray, height: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """The numbers of regions take the place of what `_descend` gave. Returns the linear index of each region's root.

    A root is a minimum inside the frame, or the voxel of the frame where a descent leaves.
    """
    nz, ny, nx = height.shape
    flat, region = height.ravel(), below.ravel()
    roots = np.empty(1024, np.int64)
    count = 0
    for z in range(1, nz - 1):
        for y in range(1, ny - 1):
            row = (z * ny + y) * nx
            for start in range(row + spans[z, y, 0], row + spans[z, y, 1]):
                number = region[start]
                if number > 0 or (number == 0 and flat[start] == OUTSIDE):
                    continue
                v = np.uint64(start)
                while number < 0:
                    v = np.uint64(~number)
                    number = region[v]
                if number == 0:
                    if count == roots.size:
                        grown = np.empty(2 * count, np.int64)
                        for k in range(count):  # a slice takes two seconds to compile, for what it says of wrong shapes
                            grown[k] = roots[k]
                        roots = grown
                    roots[count] = v
                    count += 1
                    number = region[v] = np.int32(count)
                v = np.uint64(start)
                below_v = region[v]
                while below_v < 0:
                    region[v] = number
                    v = np.uint64(~below_v)
                    below_v = region[v]
    return roots[:count].copy()


@njit(cache=True, nogil=True)
def _measure(
    region: np.ndarray, probability: np.ndarray, has_block: np.ndarray, spans: np.ndarray, core: np.ndarray,
    voxels: np.ndarray, first: np.ndarray, probability_sum: np.ndarray, cut: np.ndarray,
) -> None:  # fmt: skip
    """The last five (zeros before) hold ``region`` without its frame and, by region: voxels in the block, first of them (index
    in the frame's array), sum of ``probability``, voxels on faces of the volume. ``has_block`` is as in `_face_voxels`."""
    nz, ny, nx = region.shape
    for z in range(1, nz - 1):
        z_cut = (not has_block[0, 0] and z == 1) or (not has_block[0, 1] and z == nz - 2)
        for y in range(1, ny - 1):
            y_cut = (not has_block[1, 0] and y == 1) or (not has_block[1, 1] and y == ny - 2)
            begin, end = spans[z, y]
            for x in range(begin, end):
                r = region[z, y, x] - 1
                if r < 0:
                    continue
                core[z - 1, y - 1, x - 1] = r + 1
                if voxels[r] == 0:
                    first[r] = (z * ny + y) * nx + x
                voxels[r] += 1
                probability_sum[r] += probability[z - 1, y - 1, x - 1]
                if z_cut or y_cut:
                    cut[r, 0] += z_cut
                    cut[r, 1] += y_cut
            if begin == 1 and not has_block[2, 0]:
                cut[region[z, y, 1] - 1, 2] += 1
            if end == nx - 1 and not has_block[2, 1] and (nx > 3 or has_block[2, 0]):  # a single voxel counts once
                cut[region[z, y, nx - 2] - 1, 2] += 1


@njit(cache=True, nogil=True)
def _face_voxels(region: np.ndarray, has_block: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Indices (in the block grown by 1) of the masked voxels on faces that have volume behind them, ascending.

    ``has_block``: along each axis, whether there is volume before and after the block.
    """
    nz, ny, nx = region.shape
    out = np.empty(2 * ((ny - 2) * (nx - 2) + (nz - 2) * (nx - 2) + (nz - 2) * (ny - 2)), np.int64)
    count = 0
    for z in range(1, nz - 1):
        for y in range(1, ny - 1):
            row_on_face = (has_block[0, 0] and z == 1) or (has_block[0, 1] and z == nz - 2)
            row_on_face = row_on_face or (has_block[1, 0] and y == 1) or (has_block[1, 1] and y == ny - 2)
            for x in range(spans[z, y, 0], spans[z, y, 1]):
                on_face = row_on_face or (has_block[2, 0] and x == 1) or (has_block[2, 1] and x == nx - 2)
                if on_face and region[z, y, x] != 0:
                    out[count] = (z * ny + y) * nx + x
                    count += 1
    return out[:count].copy()


# ---------------------------------------------------------------- edges


def _inner_edges(
    region: np.ndarray, height: np.ndarray, regions: int, raster: _Raster, forward: tuple[int, ...], spans: np.ndarray
) -> np.ndarray:
    """EDGE rows, one for each pair of regions that touch inside the block, sorted by pair."""
    capacity = max(1024, 1 << (12 * regions).bit_length())  # a basin has some five neighbors: mostly enough at once
    while True:
        used, pairs, saddles = _collect_pairs(region, height, forward, spans, capacity)
        if used <= capacity // 2:
            break
        capacity *= 4
    order = np.argsort(pairs)
    rows = np.empty(order.size, EDGE)
    rows["a"], rows["b"] = pairs[order] >> 32, pairs[order] & 0xFFFFFFFF
    high, low, rows["area"], rows["height"] = saddles[order].T
    rows["high"], rows["high_voxel"] = high >> 32, raster.in_volume(high & 0xFFFFFFFF)
    rows["low"], rows["low_voxel"] = low >> 32, raster.in_volume(low & 0xFFFFFFFF)
    return rows


# One pass over all grid edges between voxels of two regions: those of a row are listed first, without a branch.
# A hash table with open addressing maps a pair of regions to its row; the row keeps the lowest saddle so far, the number of
# faces, and the sum of their heights. An end of an edge is one number, ``height << 32 | voxel``: these are ordered as ends are.
# Invariant: row k is the k-th pair that was met, and complete for all edges visited.
@njit(cache=True, nogil=True)
def _collect_pairs(
    region: np.ndarray, height: np.ndarray, forward: tuple[int, ...], spans: np.ndarray, capacity: int
) -> tuple[int, np.ndarray, np.ndarray]:
    """Touching pairs in the order in which they are met: how many, ``a << 32 | b``, and higher end, lower end, area, height.

    ``forward`` are the steps to the neighbors behind a voxel in linear order; only those along an axis share a face with it.
    Stops early once the table is more than half full: the caller tries again with a larger one.
    """
    nz, ny, nx = region.shape
    flat, regions = height.ravel(), region.ravel()
    codes, slots = np.zeros(capacity, np.int64), np.empty(capacity, np.int32)  # the pair, and its row
    pairs = np.empty(capacity // 2, np.int64)
    saddles = np.empty((capacity // 2, 4), np.int64)
    step_of, is_face = np.empty(len(forward), np.uint64), np.empty(len(forward), np.int64)
    for d in range(len(forward)):
        step_of[d], is_face[d] = np.uint64(forward[d]), forward[d] in (1, nx, ny * nx)
    met, met_along = np.empty(nx * len(forward), np.uint64), np.empty(nx * len(forward), np.uint8)
    used, in_table = 0, np.uint64(capacity - 1)
    for z in range(1, nz - 1):
        for y in range(1, ny - 1):
            first, count = np.uint64((z * ny + y) * nx + spans[z, y, 0]), np.uint64(0)
            for k in range(np.uint64(spans[z, y, 1] - spans[z, y, 0])):
                p = regions[first + k]
                for d in range(len(forward)):
                    q = regions[first + k + np.uint64(forward[d])]
                    met[count], met_along[count] = first + k, d
                    count += np.uint64((p != q) & (p != 0) & (q != 0))
            for k in range(count):
                d = met_along[k]
                v, u = met[k], met[k] + step_of[d]
                p, q = np.int64(regions[v]), np.int64(regions[u])
                code = (min(p, q) << 32) | max(p, q)
                slot = np.uint64((code * 0x9E3779B97F4A7C1) >> 32) & in_table
                while codes[slot] != 0 and codes[slot] != code:
                    slot = (slot + np.uint64(1)) & in_table
                if codes[slot] == 0:
                    if used == capacity // 2:
                        return used + 1, pairs, saddles
                    codes[slot], slots[slot], pairs[used] = code, used, code
                    saddles[used, 0], saddles[used, 1] = np.iinfo(np.int64).max, 0
                    saddles[used, 2], saddles[used, 3] = 0, 0
                    used += 1
                row = np.uint64(slots[slot])
                at_v, at_u = (np.int64(flat[v]) << 32) | np.int64(v), (np.int64(flat[u]) << 32) | np.int64(u)
                high, low = max(at_v, at_u), min(at_v, at_u)
                if high < saddles[row, 0] or (high == saddles[row, 0] and low < saddles[row, 1]):
                    saddles[row, 0], saddles[row, 1] = high, low
                saddles[row, 2] += is_face[d]
                saddles[row, 3] += is_face[d] * (high >> 32)
    return used, pairs[:used], saddles[:used]


def _crossing_edges(
    region: np.ndarray, height: np.ndarray, raster: _Raster, forward: tuple[int, ...], face: np.ndarray
) -> np.ndarray:
    """EDGE rows from the masked voxels of ``face`` to the masked voxels ahead of them that lie outside the block.

    The other end of an edge lies behind in linear order and lists nothing, so an edge stands in one block's table.
    """
    flat, regions = height.ravel(), region.ravel()
    _, ny, nx = height.shape
    rows = [np.empty(0, EDGE)]
    for step in forward:
        inner = face[(regions[face + step] == 0) & (flat[face + step] != OUTSIDE)]  # in the mask, of no region: outside
        outer = inner + step
        high = np.where(flat[inner] > flat[outer], inner, outer)
        low = inner + outer - high
        row = np.empty(inner.size, EDGE)
        inner_voxel, outer_voxel = raster.in_volume(inner), raster.in_volume(outer)
        row["a"], row["b"] = regions[inner], outer_voxel
        row["high"], row["high_voxel"] = flat[high], np.where(high == inner, inner_voxel, outer_voxel)
        row["low"], row["low_voxel"] = flat[low], np.where(high == inner, outer_voxel, inner_voxel)
        row["area"] = step in (1, nx, ny * nx)
        row["height"] = row["area"] * row["high"]
        rows.append(row)
    return np.concatenate(rows)


@lru_cache(maxsize=2)
def no_basins(connectivity: int) -> BlockBasins:
    """The table of a block without mask, whatever its shape."""
    box, height = Box((0, 0, 0), (1, 1, 1)), np.full((3, 3, 3), OUTSIDE, np.int32)
    return watershed_block(height, np.zeros(box.shape, np.uint8), box, box.shape, connectivity)[1]
