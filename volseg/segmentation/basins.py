"""Basins."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numba import njit

from volseg.box import Box, Triple
from volseg.segmentation.edges import EDGE, SADDLE_ORDER
from volseg.segmentation.heights import OUTSIDE


@dataclass(frozen=True)
class BlockBasins:
    """What one block says of its regions. A region is a basin, or the part of a neighbor's basin that drains through
    one voxel outside the block (an *exit*). Region numbers are 1..n in the block; row ``r - 1`` describes region r.

    root      linear index (in the volume) of the basin's minimum, or of the exit voxel
    minimum   height at the root
    is_exit   whether the root lies outside the block
    voxels    voxels of the region in this block
    first     lowest linear index among them
    probability_sum  sum of the stored mask probability (uint8) over them
    edges     EDGE rows between regions of this block
    crossing_edges  EDGE rows to voxels of other blocks that are ahead in linear order; ``b`` is the linear index of the voxel
    face_voxel   linear indices of masked voxels on faces that have a block behind them, ascending
    face_region   their regions
    """

    root: np.ndarray
    minimum: np.ndarray
    is_exit: np.ndarray
    voxels: np.ndarray
    first: np.ndarray
    probability_sum: np.ndarray
    edges: np.ndarray
    crossing_edges: np.ndarray
    face_voxel: np.ndarray
    face_region: np.ndarray


def watershed_block(
    height: np.ndarray, mass: np.ndarray, box: Box, shape: Triple, connectivity: int = 6
) -> tuple[np.ndarray, BlockBasins]:
    """The regions of one block (uint32, 0 outside the mask) and their `BlockBasins`, on a grid of 6 or 26 neighbors.

    ``height`` (int32) covers ``box`` grown by 1, `OUTSIDE` where there is no mask or no volume; ``mass`` (uint8) covers
    ``box``. Regions are numbered in the order of their first voxel.
    """
    steps, spans = _steps(connectivity, height.shape), _masked(height)
    region, roots = _follow(_descend(height, steps, spans), height, steps, spans)
    in_volume = _Raster(height.shape, box, shape)
    is_exit = in_volume.is_halo(roots)
    region.ravel()[roots[is_exit]] = 0  # so that only voxels of the block have a region
    core, voxels, first, total = _measure(region, mass, roots.size, spans)
    ahead = steps[len(steps) // 2 :]
    behind = [(a > 0, b < n) for a, b, n in zip(box.start, box.stop, shape, strict=True)]
    face = _faces(region, np.array(behind), spans)
    table = BlockBasins(
        root=in_volume(roots),
        minimum=height.ravel()[roots],
        is_exit=is_exit,
        voxels=voxels,
        first=in_volume(first),
        probability_sum=total,
        edges=_inner_edges(region, height, roots.size, in_volume, ahead, spans),
        crossing_edges=_crossing_edges(region, height, in_volume, ahead, face),
        face_voxel=in_volume(face),
        face_region=region.ravel()[face],
    )
    return core.view(np.uint32), table


@dataclass(frozen=True)
class _Raster:
    """Turns linear indices in a block grown by 1 (``padded``) into linear indices in the volume."""

    padded: Triple
    box: Box
    shape: Triple

    def __call__(self, index: np.ndarray) -> np.ndarray:
        return _in_volume(np.asarray(index, np.int64), self.padded, self.box.start, self.shape)

    def is_halo(self, index: np.ndarray) -> np.ndarray:
        """Which of the voxels lie outside the block."""
        at = np.unravel_index(index, self.padded)
        return np.any([(a == 0) | (a == n - 1) for a, n in zip(at, self.padded, strict=True)], axis=0)


@njit(cache=True, nogil=True)
def _in_volume(index, padded, start, shape):
    out = np.empty(index.size, np.int64)
    for k in range(index.size):
        row, x = index[k] // padded[2], index[k] % padded[2]
        z, y = row // padded[1], row % padded[1]
        out[k] = ((z + start[0] - 1) * shape[1] + (y + start[1] - 1)) * shape[2] + (x + start[2] - 1)
    return out


def _steps(connectivity: int, padded: Triple) -> tuple[int, ...]:
    """The way to each of a voxel's 6 or 26 neighbors in the linear index of an array of that shape, ascending.

    A tuple, so that numba compiles the loops over 6 and over 26 apart.

    >>> _steps(6, (4, 5, 7))
    (-35, -7, -1, 1, 7, 35)
    """
    ways = [
        way for way in product((-1, 0, 1), repeat=3) if any(way) and (connectivity == 26 or sum(map(abs, way)) == 1)
    ]
    return tuple((z * padded[1] + y) * padded[2] + x for z, y, x in ways)


@njit(cache=True, nogil=True)
def _masked(height):
    """By row, the first masked voxel inside the frame and the last + 1: what lies elsewhere is outside the mask."""
    nz, ny, nx = height.shape
    spans = np.zeros((nz, ny, 2), np.int32)
    for z in range(1, nz - 1):
        for y in range(1, ny - 1):
            least = np.int32(OUTSIDE)
            for x in range(1, nx - 1):
                least = min(least, height[z, y, x])
            if least == OUTSIDE:
                continue
            first, last = 1, nx - 1
            while height[z, y, first] == OUTSIDE:
                first += 1
            while height[z, y, last - 1] == OUTSIDE:
                last -= 1
            spans[z, y, 0], spans[z, y, 1] = first, last
    return spans


@njit(cache=True, nogil=True)
def _descend(height, steps, spans):
    """For each masked voxel inside the frame, 1 + the direction of its lowest lower neighbor; 0 for a minimum.

    Neighbors are visited in the order of their linear index, so that of equal ones the first wins.
    """
    nz, ny, nx = height.shape
    flat = height.ravel()
    down = np.zeros(flat.size, np.int8)
    for z in range(1, nz - 1):
        for y in range(1, ny - 1):
            row = (z * ny + y) * nx
            for v in range(row + spans[z, y, 0], row + spans[z, y, 1]):
                here = flat[v]
                if here == OUTSIDE:
                    continue
                best, best_h = 0, OUTSIDE
                for d in range(len(steps)):
                    h = flat[v + steps[d]]
                    if h < best_h:
                        best, best_h = d + 1, h
                if best_h < here or (best_h == here and best <= len(steps) // 2):
                    down[v] = best
    return down


@njit(cache=True, nogil=True)
def _follow(down, height, steps, spans):
    """Region numbers (int32, same shape as ``height``) and the linear index of each region's root.

    A root is a minimum inside the frame, or the voxel of the frame where a descent leaves.
    """
    nz, ny, nx = height.shape
    flat = height.ravel()
    region = np.zeros(flat.size, np.int32)
    roots = np.empty(1024, np.int64)
    count = 0
    for z in range(1, nz - 1):
        for y in range(1, ny - 1):
            row = (z * ny + y) * nx
            for start in range(row + spans[z, y, 0], row + spans[z, y, 1]):
                if flat[start] == OUTSIDE or region[start] != 0:
                    continue
                v = start
                while region[v] == 0 and down[v] != 0:
                    v += steps[down[v] - 1]
                if region[v] == 0:
                    if count == roots.size:
                        grown = np.empty(2 * count, np.int64)
                        grown[:count] = roots
                        roots = grown
                    roots[count] = v
                    count += 1
                    region[v] = count
                number = region[v]
                v = start
                while region[v] == 0:
                    region[v] = number
                    v += steps[down[v] - 1]
    return region.reshape(height.shape), roots[:count].copy()


@njit(cache=True, nogil=True)
def _measure(region, mass, count, spans):
    """``region`` without its frame; by region: voxels in the block, first of them (index in the frame's array), sum of
    ``mass``."""
    nz, ny, nx = region.shape
    core = np.zeros((nz - 2, ny - 2, nx - 2), np.int32)
    voxels = np.zeros(count, np.int64)
    first = np.zeros(count, np.int64)
    total = np.zeros(count, np.int64)
    for z in range(1, nz - 1):
        for y in range(1, ny - 1):
            for x in range(spans[z, y, 0], spans[z, y, 1]):
                r = region[z, y, x] - 1
                if r < 0:
                    continue
                core[z - 1, y - 1, x - 1] = r + 1
                if voxels[r] == 0:
                    first[r] = (z * ny + y) * nx + x
                voxels[r] += 1
                total[r] += mass[z - 1, y - 1, x - 1]
    return core, voxels, first, total


def _inner_edges(
    region: np.ndarray, height: np.ndarray, regions: int, in_volume: _Raster, ahead: tuple[int, ...], spans: np.ndarray
) -> np.ndarray:
    """EDGE rows, one for each pair of regions that touch inside the block, sorted by pair."""
    capacity = max(
        1024, 1 << (8 * regions).bit_length()
    )  # mostly enough at once: basins have two or three neighbors each
    while True:
        used, pairs, saddles = _collect(region, height, ahead, spans, capacity)
        if used <= capacity // 2:
            break
        capacity *= 4
    kept = np.argsort(pairs)
    rows = np.empty(kept.size, EDGE)
    rows["a"], rows["b"] = pairs[kept] >> 32, pairs[kept] & 0xFFFFFFFF
    for column, name in enumerate((*SADDLE_ORDER, "area", "height")):
        rows[name] = in_volume(saddles[kept, column]) if name.endswith("_voxel") else saddles[kept, column]
    return rows


@njit(cache=True, nogil=True)
def _collect(region, height, ahead, spans, capacity):
    """Touching pairs in the order in which they are met: how many, their codes ``a << 32 | b``, (KEY..., area, height) of each.

    ``ahead`` are the ways to the neighbors behind a voxel in linear order; only those along an axis share a face with it.
    A table with open addressing says where a pair stands. Stops early once it is more than half full: the caller tries
    again with a larger one.
    """
    nz, ny, nx = region.shape
    flat, of = height.ravel(), region.ravel()
    codes, slots = np.zeros(capacity, np.int64), np.empty(capacity, np.int32)  # the pair, and where it stands
    pairs = np.empty(capacity // 2, np.int64)
    saddles = np.empty((capacity // 2, 6), np.int64)
    used = 0
    for z in range(1, nz - 1):
        for y in range(1, ny - 1):
            row = (z * ny + y) * nx
            for v in range(row + spans[z, y, 0], row + spans[z, y, 1]):
                p = of[v]
                if p == 0:
                    continue
                for d in range(len(ahead)):
                    u = v + ahead[d]
                    q = of[u]
                    if q == 0 or q == p:
                        continue
                    code = (np.int64(min(p, q)) << 32) | np.int64(max(p, q))
                    slot = ((code * 0x9E3779B97F4A7C1) >> 20) & (capacity - 1)
                    while codes[slot] != 0 and codes[slot] != code:
                        slot = (slot + 1) & (capacity - 1)
                    hi, lo = (v, u) if flat[v] > flat[u] else (u, v)
                    new = codes[slot] == 0
                    if new:
                        if used == capacity // 2:
                            return used + 1, pairs, saddles
                        codes[slot], slots[slot] = code, used
                        pairs[used], saddles[used] = code, 0
                        used += 1
                    s = saddles[slots[slot]]
                    if new or _before(flat[hi], hi, flat[lo], lo, s):
                        s[0], s[1], s[2], s[3] = flat[hi], hi, flat[lo], lo
                    if u - v == 1 or u - v == nx or u - v == ny * nx:
                        s[4] += 1
                        s[5] += flat[hi]
    return used, pairs[:used], saddles[:used]


@njit(cache=True, nogil=True, inline="always")
def _before(high, high_voxel, low, low_voxel, s):
    """Whether an edge comes before the one in ``s`` in the total order of edges."""
    if high != s[0]:
        return high < s[0]
    if high_voxel != s[1]:
        return high_voxel < s[1]
    if low != s[2]:
        return low < s[2]
    return low_voxel < s[3]


def _crossing_edges(
    region: np.ndarray, height: np.ndarray, in_volume: _Raster, ahead: tuple[int, ...], face: np.ndarray
) -> np.ndarray:
    """EDGE rows from masked voxels (those at ``face``) to the masked voxels ahead of them that lie outside the block.

    The other end of an edge lies behind in linear order and lists nothing, so an edge stands in one block's table.
    """
    flat = height.ravel()
    _, ny, nx = height.shape
    rows = [np.empty(0, EDGE)]
    for step in ahead:
        near = face[in_volume.is_halo(face + step) & (flat[face + step] != OUTSIDE)]
        far = near + step
        high = np.where(flat[near] > flat[far], near, far)
        low = near + far - high
        row = np.empty(near.size, EDGE)
        row["a"], row["b"] = region.ravel()[near], in_volume(far)
        row["high"], row["high_voxel"], row["low"], row["low_voxel"] = (
            flat[high],
            in_volume(high),
            flat[low],
            in_volume(low),
        )
        row["area"] = step in (1, nx, ny * nx)
        row["height"] = row["area"] * row["high"]
        rows.append(row)
    return np.concatenate(rows)


@njit(cache=True, nogil=True)
def _faces(region, behind, spans):
    """Indices (in the block grown by 1) of the masked voxels on faces that have volume behind them, ascending.

    ``behind``: along each axis, whether there is volume before and after the block.
    """
    nz, ny, nx = region.shape
    found = np.empty(2 * ((ny - 2) * (nx - 2) + (nz - 2) * (nx - 2) + (nz - 2) * (ny - 2)), np.int64)
    count = 0
    for z in range(1, nz - 1):
        for y in range(1, ny - 1):
            whole = (behind[0, 0] and z == 1) or (behind[0, 1] and z == nz - 2)
            whole = whole or (behind[1, 0] and y == 1) or (behind[1, 1] and y == ny - 2)
            for x in range(spans[z, y, 0], spans[z, y, 1]):
                end = (behind[2, 0] and x == 1) or (behind[2, 1] and x == nx - 2)
                if (whole or end) and region[z, y, x] != 0:
                    found[count] = (z * ny + y) * nx + x
                    count += 1
    return found[:count].copy()
