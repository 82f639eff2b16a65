"""Cut one block of probabilities into watershed basins, and list how they touch.

Voxels are ordered by ``(height, linear index)`` and edges of the grid (6 or 26 neighbours) by their higher end, then their
lower end, in that order. Both orders are total, so the minimum spanning forest is unique. An edge's order starts with its
higher end because then the first edge out of any voxel is the one to its lowest neighbour: steepest descent *is* the
first step of the forest (Cousty et al., "Watershed cuts", PAMI 2009), and every cutting into blocks takes the same one.

Nothing here knows seeds or sizes: those are decided in `stitch` from the tables alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numba import njit

from volseg.box import Box, Triple
from volseg.config import Fragments

LEVELS = 64  # steps of smoothed probability for each step of the stored uint8
TOP = 255 * LEVELS
OUTSIDE = np.iinfo(np.int32).max  # height of what is not in the mask

EDGE = np.dtype(
    [
        ("a", np.int64),  # regions on the two sides, a < b once they are global
        ("b", np.int64),
        ("high", np.int32),  # the lowest saddle: height and linear index of its higher end, then of its lower end
        ("high_at", np.int64),
        ("low", np.int32),
        ("low_at", np.int64),
        ("area", np.int64),  # voxel faces in contact: 0 where basins touch by an edge or corner alone (26 neighbours)
        ("height", np.int64),  # sum over those faces of the height of the higher end
    ]
)
KEY = ("high", "high_at", "low", "low_at")


@dataclass(frozen=True)
class Table:
    """What one block says of its regions. A region is a basin, or the part of a neighbour's basin that drains through
    one voxel outside the block (an *exit*). Region numbers are 1..n in the block; row ``r - 1`` describes region r.

    root      linear index (in the volume) of the basin's minimum, or of the exit voxel
    depth     height at the root
    is_exit   whether the root lies outside the block
    voxels    voxels of the region in this block
    first     lowest linear index among them
    mass      sum of the stored mask probability (uint8) over them
    edges     EDGE rows between regions of this block
    crossing  EDGE rows to voxels of other blocks that are ahead in linear order; ``b`` is the linear index of the voxel
    face_at   linear indices of masked voxels on faces that have a block behind them, ascending
    face_of   their regions
    """

    root: np.ndarray
    depth: np.ndarray
    is_exit: np.ndarray
    voxels: np.ndarray
    first: np.ndarray
    mass: np.ndarray
    edges: np.ndarray
    crossing: np.ndarray
    face_at: np.ndarray
    face_of: np.ndarray


# ---------------------------------------------------------------- heights


def halo(knobs: Fragments) -> Triple:
    """Voxels of probability needed around a block so that its fragments are exact, z y x."""
    return tuple(passes + knobs.distance + 1 for passes in knobs.smooth)


def mask_level(threshold: float) -> int:
    """The smoothed value from which on a voxel is in the mask."""
    return int(np.ceil(threshold * TOP))


def seed_height(seed: float, knobs: Fragments) -> int:
    """The greatest height at which a voxel is a seed: smoothed probability at least ``seed``."""
    cap = knobs.distance**2
    return (TOP - mask_level(seed)) * (cap + 1) + cap


def probability_of(height: np.ndarray, knobs: Fragments) -> np.ndarray:
    """The smoothed probability (less the contour) of heights, or of means of heights; distances to the border are left out.

    >>> probability_of(np.array([0, seed_height(0.6, Fragments())]), Fragments()).tolist()
    [1.0, 0.6]
    """
    return (TOP - np.floor_divide(height, knobs.distance**2 + 1)) / TOP if knobs.distance else (TOP - height) / TOP


def heights(probability: np.ndarray, box: Box, shape: Triple, knobs: Fragments) -> np.ndarray:
    """Heights (int32, low inside objects) of ``box`` grown by 1; `OUTSIDE` where there is no mask or no volume.

    ``probability`` is uint8 (channels mask, contour; z y x) and covers ``box`` grown by `halo`, cut to the volume of that
    ``shape``. All arithmetic is on integers, and a voxel's height depends only on voxels within the halo, so two blocks
    that share a voxel agree on it. Beyond the volume the last voxel is repeated.
    """
    full = box.grow(halo(knobs))
    have = full.clip(shape)
    if probability.shape[1:] != have.shape:
        raise ValueError(f"probability of {box} has shape {probability.shape[1:]}, wanted {have.shape} with its halo")
    missing = [(h - f, g - e) for f, h, e, g in zip(full.start, have.start, have.stop, full.stop, strict=True)]
    padded = np.pad(probability, [(0, 0), *missing], mode="edge")
    level = _smooth(padded[0], knobs.smooth)
    inside = level if knobs.contour == 0 else _smooth(_less_contour(padded, round(knobs.contour * 256)), knobs.smooth)
    near = full.grow(tuple(-p for p in knobs.smooth))
    mask = level >= mask_level(knobs.threshold)
    real = near.clip(shape).inside(near)
    squared = _squared_distance(mask, real, knobs.distance)
    out = _compose(inside, mask, squared, knobs.distance)
    out = out[box.grow(1).inside(near)]
    keep = box.grow(1).clip(shape).inside(box.grow(1))
    framed = np.full(out.shape, OUTSIDE, np.int32)
    framed[keep] = out[keep]
    return framed


def _less_contour(probability: np.ndarray, weight: int) -> np.ndarray:
    """Mask minus contour probability, not below 0, uint8."""
    return _subtract(np.ascontiguousarray(probability[0]), np.ascontiguousarray(probability[1]), weight)


@njit(cache=True, nogil=True)
def _subtract(mask, contour, weight):
    out = np.empty_like(mask)
    m, c, o = mask.ravel(), contour.ravel(), out.ravel()
    for i in range(m.size):
        o[i] = max(0, np.int32(m[i]) - ((np.int32(c[i]) * weight) >> 8))
    return out


def _smooth(field: np.ndarray, passes: Triple) -> np.ndarray:
    """``field`` after ``passes`` of the filter [1 2 1] / 4 along each axis, in steps of 1 / `LEVELS`, rounded down once.

    The result is shorter by ``2 * passes`` on each axis. uint16.
    """
    sums = field
    for axis, n in enumerate(passes):
        if n:
            sums = _filter(np.ascontiguousarray(sums), _binomial(n), axis)
    return _scale(sums, 2 * sum(passes))


def _binomial(n: int) -> np.ndarray:
    row = np.array([1], np.int32)
    for _ in range(n):
        row = np.convolve(row, [1, 2, 1]).astype(np.int32)
    return row


def _filter(field: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    """Weighted sums of neighbours along one axis where all exist, int32."""
    shape = list(field.shape)
    shape[axis] -= len(weights) - 1
    stride = int(np.prod(field.shape[axis + 1 :], initial=1))
    out = np.empty(shape, np.int32)
    rows = field.reshape(-1, field.shape[axis], stride)
    _filter_rows(rows, weights, out.reshape(-1, shape[axis], stride))
    return out


@njit(cache=True, nogil=True)
def _filter_rows(rows, weights, out):
    outer, length, stride = out.shape
    taps = weights.size
    for i in range(outer):
        if stride == 1:
            for j in range(length):
                total = np.int32(0)
                for t in range(taps):
                    total += weights[t] * np.int32(rows[i, j + t, 0])
                out[i, j, 0] = total
        else:
            for j in range(length):
                for k in range(stride):
                    out[i, j, k] = weights[0] * np.int32(rows[i, j, k])
                for t in range(1, taps):
                    for k in range(stride):
                        out[i, j, k] += weights[t] * np.int32(rows[i, j + t, k])


@njit(cache=True, nogil=True)
def _scale(sums, shift):
    out = np.empty(sums.shape, np.uint16)
    s, o = sums.ravel(), out.ravel()
    for i in range(s.size):
        o[i] = (np.int64(s[i]) * LEVELS) >> shift
    return out


def _squared_distance(mask: np.ndarray, real: tuple, cap: int) -> np.ndarray:
    """Squared distance (voxels) of each masked voxel to the nearest voxel of the volume outside the mask, at most cap**2.

    Exact where ``cap`` voxels lie around it. Three passes of lower envelopes over a window of ``cap``, as in Felzenszwalb
    and Huttenlocher, "Distance transforms of sampled functions", 2012, whose general case a cap makes needless.
    """
    if cap == 0:
        return np.zeros(mask.shape, np.uint16)
    background = np.zeros(mask.shape, np.bool_)
    background[real] = ~mask[real]
    along_x = _runs(background, mask, cap)
    z, y, x = mask.shape
    along_y = np.empty(mask.shape, np.uint16)
    _envelope(along_x, mask.reshape(z, y, x), along_y, cap)
    along_z = np.empty((1, z, y * x), np.uint16)
    _envelope(along_y.reshape(1, z, y * x), mask.reshape(1, z, y * x), along_z, cap)
    return along_z.reshape(mask.shape)


@njit(cache=True, nogil=True)
def _runs(background, mask, cap):
    """Squared distance along x to the background, at most cap**2; 0 on the background."""
    nz, ny, nx = background.shape
    out = np.empty(background.shape, np.uint16)
    for z in range(nz):
        for y in range(ny):
            gap = cap
            for x in range(nx):
                gap = 0 if background[z, y, x] else min(gap + 1, cap)
                out[z, y, x] = gap
            gap = cap
            for x in range(nx - 1, -1, -1):
                gap = 0 if background[z, y, x] else min(gap + 1, cap)
                near = min(gap, np.int64(out[z, y, x]))
                out[z, y, x] = near * near
    return out


@njit(cache=True, nogil=True)
def _envelope(field, mask, out, cap):
    """min over d of field[j + d] + d * d along the middle axis, |d| < cap, for masked voxels; others are copied."""
    outer, length, stride = field.shape
    for i in range(outer):
        for j in range(length):
            for k in range(stride):
                best = np.int64(field[i, j, k])
                if mask[i, j, k]:
                    d = 1
                    while d < cap and d * d < best:
                        if j >= d:
                            best = min(best, np.int64(field[i, j - d, k]) + d * d)
                        if j + d < length:
                            best = min(best, np.int64(field[i, j + d, k]) + d * d)
                        d += 1
                out[i, j, k] = best


@njit(cache=True, nogil=True)
def _compose(inside, mask, squared, cap):
    """Height: probability first, distance to the mask's border second."""
    out = np.empty(mask.shape, np.int32)
    p, m, d, o = inside.ravel(), mask.ravel(), squared.ravel(), out.ravel()
    most = cap * cap
    for i in range(m.size):
        o[i] = (TOP - np.int32(p[i])) * (most + 1) + (most - np.int32(d[i])) if m[i] else OUTSIDE
    return out


# ---------------------------------------------------------------- basins


def fragments(
    height: np.ndarray, mass: np.ndarray, box: Box, shape: Triple, connectivity: int = 6
) -> tuple[np.ndarray, Table]:
    """The regions of one block (uint32, 0 outside the mask) and their `Table`, on a grid of 6 or 26 neighbours.

    ``height`` (int32) covers ``box`` grown by 1, `OUTSIDE` where there is no mask or no volume; ``mass`` (uint8) covers
    ``box``. Regions are numbered in the order of their first voxel.
    """
    steps = _steps(connectivity, height.shape)
    region, roots = _follow(_descend(height, steps), height, steps)
    in_volume = _Raster(height.shape, box, shape)
    is_exit = in_volume.is_halo(roots)
    region.ravel()[roots[is_exit]] = 0  # so that only voxels of the block have a region
    core = np.ascontiguousarray(region[1:-1, 1:-1, 1:-1])
    voxels, first, total = _measure(region, mass, roots.size)
    ahead = steps[len(steps) // 2 :]
    face = _faces(core, box, shape)
    table = Table(
        root=in_volume(roots),
        depth=height.ravel()[roots],
        is_exit=is_exit,
        voxels=voxels,
        first=in_volume(first),
        mass=total,
        edges=_inner_edges(region, height, in_volume, ahead),
        crossing=_crossing_edges(region, height, in_volume, ahead, face),
        face_at=in_volume(face),
        face_of=region.ravel()[face],
    )
    return core.view(np.uint32), table


@dataclass(frozen=True)
class _Raster:
    """Turns linear indices in a block grown by 1 (``padded``) into linear indices in the volume."""

    padded: Triple
    box: Box
    shape: Triple

    def __call__(self, index: np.ndarray) -> np.ndarray:
        z, y, x = np.unravel_index(np.asarray(index, np.int64), self.padded)
        (z0, y0, x0), (_, ny, nx) = self.box.start, self.shape
        return ((z + (z0 - 1)) * ny + (y + (y0 - 1))) * np.int64(nx) + (x + (x0 - 1))

    def is_halo(self, index: np.ndarray) -> np.ndarray:
        """Which of the voxels lie outside the block."""
        at = np.unravel_index(index, self.padded)
        return np.any([(a == 0) | (a == n - 1) for a, n in zip(at, self.padded, strict=True)], axis=0)


def _steps(connectivity: int, padded: Triple) -> tuple[int, ...]:
    """The way to each of a voxel's 6 or 26 neighbours in the linear index of an array of that shape, ascending.

    A tuple, so that numba compiles the loops over 6 and over 26 apart.

    >>> _steps(6, (4, 5, 7))
    (-35, -7, -1, 1, 7, 35)
    """
    ways = [way for way in product((-1, 0, 1), repeat=3) if any(way) and (connectivity == 26 or sum(map(abs, way)) == 1)]
    return tuple((z * padded[1] + y) * padded[2] + x for z, y, x in ways)


@njit(cache=True, nogil=True)
def _descend(height, steps):
    """For each masked voxel inside the frame, 1 + the direction of its lowest lower neighbour; 0 for a minimum.

    Neighbours are visited in the order of their linear index, so that of equal ones the first wins.
    """
    nz, ny, nx = height.shape
    flat = height.ravel()
    down = np.zeros(flat.size, np.int8)
    for z in range(1, nz - 1):
        for y in range(1, ny - 1):
            row = (z * ny + y) * nx
            for v in range(row + 1, row + nx - 1):
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
def _follow(down, height, steps):
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
            for start in range(row + 1, row + nx - 1):
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
def _measure(region, mass, count):
    """Per region: voxels in the block, first of them (index in the frame's array), sum of ``mass``."""
    nz, ny, nx = region.shape
    voxels = np.zeros(count, np.int64)
    first = np.zeros(count, np.int64)
    total = np.zeros(count, np.int64)
    for z in range(1, nz - 1):
        for y in range(1, ny - 1):
            for x in range(1, nx - 1):
                r = region[z, y, x] - 1
                if r < 0:
                    continue
                if voxels[r] == 0:
                    first[r] = (z * ny + y) * nx + x
                voxels[r] += 1
                total[r] += mass[z - 1, y - 1, x - 1]
    return voxels, first, total


def _inner_edges(region: np.ndarray, height: np.ndarray, in_volume: _Raster, ahead: tuple[int, ...]) -> np.ndarray:
    """EDGE rows, one for each pair of regions that touch inside the block, sorted by pair."""
    capacity = 1024
    while True:
        used, pairs, saddles = _collect(region, height, ahead, capacity)
        if used <= capacity // 2:
            break
        capacity *= 4
    kept = np.flatnonzero(pairs)
    kept = kept[np.argsort(pairs[kept])]
    rows = np.empty(kept.size, EDGE)
    rows["a"], rows["b"] = pairs[kept] >> 32, pairs[kept] & 0xFFFFFFFF
    for column, name in enumerate((*KEY, "area", "height")):
        rows[name] = in_volume(saddles[kept, column]) if name.endswith("_at") else saddles[kept, column]
    return rows


@njit(cache=True, nogil=True)
def _collect(region, height, ahead, capacity):
    """Open-addressing table of touching pairs: how many, their codes ``a << 32 | b``, and (KEY..., area, height) of each.

    ``ahead`` are the ways to the neighbours behind a voxel in linear order; only those along an axis share a face with it.
    Stops early once more than half full: the caller tries again with a larger table.
    """
    nz, ny, nx = region.shape
    flat, of = height.ravel(), region.ravel()
    pairs = np.zeros(capacity, np.int64)
    saddles = np.zeros((capacity, 6), np.int64)
    used = 0
    for z in range(1, nz - 1):
        for y in range(1, ny - 1):
            row = (z * ny + y) * nx
            for v in range(row + 1, row + nx - 1):
                if of[v] == 0:
                    continue
                for d in range(len(ahead)):
                    u = v + ahead[d]
                    if of[u] == 0 or of[u] == of[v]:
                        continue
                    a, b = min(of[v], of[u]), max(of[v], of[u])
                    code = (np.int64(a) << 32) | np.int64(b)
                    slot = ((code * 0x9E3779B97F4A7C1) >> 20) & (capacity - 1)
                    while pairs[slot] != 0 and pairs[slot] != code:
                        slot = (slot + 1) & (capacity - 1)
                    hi, lo = (v, u) if flat[v] > flat[u] else (u, v)
                    s = saddles[slot]
                    if pairs[slot] == 0:
                        used += 1
                        if used > capacity // 2:
                            return used, pairs, saddles
                        pairs[slot] = code
                    if s[1] == 0 or _before(flat[hi], hi, flat[lo], lo, s):
                        s[0], s[1], s[2], s[3] = flat[hi], hi, flat[lo], lo
                    if u - v == 1 or u - v == nx or u - v == ny * nx:
                        s[4] += 1
                        s[5] += flat[hi]
    return used, pairs, saddles


@njit(cache=True, nogil=True, inline="always")
def _before(high, high_at, low, low_at, s):
    """Whether an edge comes before the one in ``s`` in the total order of edges."""
    if high != s[0]:
        return high < s[0]
    if high_at != s[1]:
        return high_at < s[1]
    if low != s[2]:
        return low < s[2]
    return low_at < s[3]


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
        row["high"], row["high_at"], row["low"], row["low_at"] = flat[high], in_volume(high), flat[low], in_volume(low)
        row["area"] = step in (1, nx, ny * nx)
        row["height"] = row["area"] * row["high"]
        rows.append(row)
    return np.concatenate(rows)


def _faces(core: np.ndarray, box: Box, shape: Triple) -> np.ndarray:
    """Indices (in the block grown by 1) of the masked voxels on faces that have volume behind them."""
    on_face = np.zeros(core.shape, bool)
    for axis in range(3):
        plane = [slice(None)] * 3
        if box.start[axis] > 0:
            plane[axis] = 0
            on_face[tuple(plane)] = True
        if box.stop[axis] < shape[axis]:
            plane[axis] = -1
            on_face[tuple(plane)] = True
    return np.flatnonzero(np.pad(on_face & (core != 0), 1))
