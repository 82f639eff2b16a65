"""Cut one block of probabilities into watershed basins, and list how they touch.

Voxels are ordered by ``(height, linear index)`` and edges of the grid (6 or 26 neighbors) by their higher end, then their
lower end, in that order. Both orders are total, so the minimum spanning forest is unique. An edge's order starts with its
higher end because then the first edge out of any voxel is the one to its lowest neighbor: steepest descent *is* the
first step of the forest (Cousty et al., "Watershed cuts", PAMI 2009), and every cutting into blocks takes the same one.

Nothing here knows seeds or sizes: those are decided in `stitch` from the tables alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from itertools import product
from math import ceil, gcd

import numpy as np
from numba import njit

from volseg.box import Box, Triple
from volseg.config import Fragments
from volseg.errors import UserError

LEVELS = 64  # steps of smoothed probability for each step of the stored uint8
TOP = 255 * LEVELS
FARTHEST = 255  # greatest cap of distances: its square fits uint16, and heights fit int32
STRETCH = 16  # voxels of a row that are smoothed together or not at all; at least the filter's reach
OUTSIDE = np.iinfo(np.int32).max  # height of what is not in the mask

Nm3 = tuple[float, float, float]  # a voxel's size z y x

EDGE = np.dtype(
    [
        ("a", np.int64),  # regions on the two sides, a < b once they are global
        ("b", np.int64),
        ("high", np.int32),  # the lowest saddle: height and linear index of its higher end, then of its lower end
        ("high_at", np.int64),
        ("low", np.int32),
        ("low_at", np.int64),
        ("area", np.int64),  # voxel faces in contact: 0 where basins touch by an edge or corner alone (26 neighbors)
        ("height", np.int64),  # sum over those faces of the height of the higher end
    ]
)
KEY = ("high", "high_at", "low", "low_at")


@dataclass(frozen=True)
class Table:
    """What one block says of its regions. A region is a basin, or the part of a neighbor's basin that drains through
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


@dataclass(frozen=True)
class Metric:
    """Whole-number distances, so that they are exact: ``edges`` of a voxel along z y x, and the ``cap`` up to which they
    count, all in one unit."""

    edges: Triple
    cap: int

    @property
    def reach(self) -> Triple:
        """Voxels within the cap, z y x."""
        return tuple(-(-self.cap // edge) for edge in self.edges)


def metric(knobs: Fragments, voxel_size_nm: Nm3 | None = None) -> Metric:
    """The `Metric` of ``knobs.distance``, whose unit is one voxel on every axis, or of ``knobs.distance_nm``.

    In nm the unit is 1/16 of the smallest edge, or a multiple of it that divides all edges, or the next of 1/8, 1/4, 1/2
    and 1 that keeps the cap within `FARTHEST`. Longer edges are rounded to whole units, and so by less than 1/32 of the
    smallest edge where the unit is 1/16. Raises `UserError` for a cap beyond `FARTHEST` voxels.

    >>> metric(Fragments(distance_nm=40), (50, 4.6, 4.6)), metric(Fragments(distance_nm=40), (8, 8, 8))
    (Metric(edges=(87, 8, 8), cap=70), Metric(edges=(1, 1, 1), cap=5))
    """
    if not knobs.distance_nm:
        return Metric((1, 1, 1), knobs.distance)
    if voxel_size_nm is None:
        raise ValueError("fragments.distance_nm is not 0, so a voxel's size is needed; give voxel_size_nm")
    smallest = min(voxel_size_nm)
    for fine in (16, 8, 4, 2, 1):
        edges = [round(fine * edge / smallest) for edge in voxel_size_nm]
        unit = gcd(*edges)
        cap = max(1, round(knobs.distance_nm * fine / (smallest * unit)))
        if cap <= FARTHEST:
            return Metric(tuple(edge // unit for edge in edges), cap)
    raise UserError(f"fragments.distance_nm = {knobs.distance_nm:g} is more than {FARTHEST} voxels of {smallest:g} nm; "
                    f"give at most {FARTHEST * smallest:g}")  # fmt: skip


def halo(knobs: Fragments, voxel_size_nm: Nm3 | None = None) -> Triple:
    """Voxels of probability needed around a block so that its fragments are exact, z y x."""
    return tuple(n + far + 1 for n, far in zip(knobs.smooth, metric(knobs, voxel_size_nm).reach, strict=True))


def mask_level(threshold: float) -> int:
    """The smoothed value from which on a voxel is in the mask."""
    return int(np.ceil(threshold * TOP))


def seed_height(seed: float, knobs: Fragments, voxel_size_nm: Nm3 | None = None) -> int:
    """The greatest height at which a voxel is a seed: what ``knobs.height`` names is at least ``seed``.

    That is the smoothed value of 0..1, or the distance as a share of its cap.
    """
    most = metric(knobs, voxel_size_nm).cap ** 2
    if knobs.height == "distance":
        return (most - ceil(Fraction(str(seed)) ** 2 * most)) * (TOP + 1) + TOP
    return (TOP - mask_level(seed)) * (most + 1) + most


def probability_of(height: np.ndarray, knobs: Fragments, voxel_size_nm: Nm3 | None = None) -> np.ndarray:
    """What `seed_height` takes, of heights or of means of heights: mostly the smoothed probability less the contour.

    What comes second in a height is left out.

    >>> probability_of(np.array([0, seed_height(0.6, Fragments())]), Fragments()).tolist()
    [1.0, 0.6]
    >>> far = Fragments(height="distance", distance=10)
    >>> probability_of(np.array([seed_height(0.6, far)]), far).tolist()
    [0.6]
    """
    most = metric(knobs, voxel_size_nm).cap ** 2
    if knobs.height == "distance":
        return np.sqrt((most - np.floor_divide(height, TOP + 1)) / most)
    return (TOP - np.floor_divide(height, most + 1)) / TOP if most else (TOP - height) / TOP


def depth_height(share: float, knobs: Fragments, voxel_size_nm: Nm3 | None = None) -> int:
    """The difference of height that ``share`` of what ``knobs.height`` names makes; of distances, of the squared cap."""
    most = metric(knobs, voxel_size_nm).cap ** 2
    if knobs.height == "distance":
        return ceil(Fraction(str(share)) * most) * (TOP + 1)
    return mask_level(share) * (most + 1)


def heights(
    probability: np.ndarray, box: Box, shape: Triple, knobs: Fragments, voxel_size_nm: Nm3 | None = None
) -> np.ndarray:
    """Heights (int32, low inside objects) of ``box`` grown by 1; `OUTSIDE` where there is no mask or no volume.

    ``probability`` is uint8 (channels mask, contour, perhaps distance; z y x) and covers ``box`` grown by `halo`, cut to
    the volume of that ``shape``. All arithmetic is on integers, and a voxel's height depends only on voxels within the
    halo, so two blocks that share a voxel agree on it. Beyond the volume the last voxel is repeated.
    """
    around = metric(knobs, voxel_size_nm)
    full = box.grow(halo(knobs, voxel_size_nm))
    have = full.clip(shape)
    if probability.shape[1:] != have.shape:
        raise ValueError(f"probability of {box} has shape {probability.shape[1:]}, wanted {have.shape} with its halo")
    if int(probability[0].max()) * LEVELS < mask_level(knobs.threshold):  # smoothing lifts nothing above its neighbors
        return np.full(box.grow(1).shape, OUTSIDE, np.int32)
    missing = [(h - f, g - e) for f, h, e, g in zip(full.start, have.start, have.stop, full.stop, strict=True)]
    padded = np.pad(probability, [(0, 0), *missing], mode="edge") if np.any(missing) else probability
    fits = full.grow(tuple(-p for p in knobs.smooth))
    out = _heights(padded, fits.clip(shape).inside(fits), knobs, around)
    return np.ascontiguousarray(out[box.grow(1).inside(fits)])


def _heights(probability: np.ndarray, real: tuple, knobs: Fragments, around: Metric) -> np.ndarray:
    """Heights where the filter fits; ``real`` is the part of them that lies in the volume."""
    first = np.ascontiguousarray(probability[0])
    level = _smooth(first, knobs.smooth, _near(first, knobs.smooth, -(-mask_level(knobs.threshold) // LEVELS)))
    mask = level >= mask_level(knobs.threshold)
    in_mask = _holds(mask.view(np.uint8), np.uint8(1))

    def smooth(field: np.ndarray) -> np.ndarray:
        return _smooth(field, knobs.smooth, in_mask)

    def composed(first: np.ndarray, second: np.ndarray, most_first: int, most_second: int) -> np.ndarray:
        for axis, part in enumerate(real):  # where there is no volume is no mask
            along = np.moveaxis(mask, axis, 0)
            along[: part.start], along[part.stop :] = False, False
        return _compose(first, second, mask, in_mask, most_first, most_second)

    most = around.cap**2
    if knobs.height == "contour":
        return composed(smooth(255 - probability[1]), _squared_distance(mask, real, around), TOP, most)
    if knobs.height == "head":
        return composed(smooth(probability[2]), _squared_distance(mask, real, around), TOP, most)
    inside = smooth(_less_contour(probability, round(knobs.contour * 256))) if knobs.contour else level
    if knobs.height == "distance":
        body = mask & (inside >= mask_level(knobs.threshold))
        return composed(_squared_distance(body, real, around), inside, most, TOP)
    return composed(inside, _squared_distance(mask, real, around), TOP, most)


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


def _near(field: np.ndarray, passes: Triple, least: int) -> np.ndarray:
    """Where `_smooth` may give ``least`` or more, in stretches of `STRETCH` voxels along x; bool (z, y, stretches).

    A mean is at most the greatest of what it is a mean of.
    """
    z, y, x = (n - 2 * p for n, p in zip(field.shape, passes, strict=True))
    return _dilated(_holds(field, np.uint8(least)), z, y, -(-x // STRETCH))


@njit(cache=True, nogil=True)
def _holds(field, least):
    """Which stretches hold a voxel that is ``least`` or more. A row is compared first, then eight voxels are seen at once."""
    nz, ny, nx = field.shape
    out = np.zeros((nz, ny, (nx + STRETCH - 1) // STRETCH), np.bool_)
    room = np.zeros(out.shape[2] * STRETCH, np.uint8)
    reached, words = room[:nx], room.view(np.uint64).reshape(out.shape[2], STRETCH // 8)
    for z in range(nz):
        for y in range(ny):
            row, found = field[z, y], out[z, y]
            for x in range(row.size):
                reached[x] = row[x] >= least
            for s in range(found.size):
                some = words[s, 0]
                for k in range(1, STRETCH // 8):
                    some |= words[s, k]
                found[s] = some != 0
    return out


def _dilated(holds: np.ndarray, nz: int, ny: int, stretches: int) -> np.ndarray:
    """Which stretches of a mean, shorter than the field by its windows, lie over one that holds something."""
    holds = reduce(np.logical_or, (holds[t : t + nz] for t in range(holds.shape[0] - nz + 1)))
    holds = reduce(np.logical_or, (holds[:, t : t + ny] for t in range(holds.shape[1] - ny + 1)))
    return (holds | np.concatenate([holds[..., 1:], holds[..., -1:]], axis=2))[..., :stretches]


def _smooth(field: np.ndarray, passes: Triple, near: np.ndarray) -> np.ndarray:
    """``field`` after ``passes`` of the filter [1 2 1] / 4 along each axis, in steps of 1 / `LEVELS`, rounded down once.

    The result is shorter by ``2 * passes`` on each axis, and 0 where it is not `_near`. uint16.
    """
    small = 255 * 4 ** (passes[0] + passes[1]) <= np.iinfo(np.uint16).max  # what sums along z and y fit
    plane = np.empty(field.shape[1:], np.uint16 if small else np.uint32)
    return _smooth_rows(np.ascontiguousarray(field), passes, near, plane)


@njit(cache=True, nogil=True)
def _smooth_rows(field, passes, near, plane):
    """Sums over z in a ``plane``, of these over y in a row, and of these over x: only what is near."""
    along_z, along_y, along_x = passes
    nz, ny, stretches = near.shape
    _, rows, columns = field.shape
    nx = columns - 2 * along_x
    out = np.zeros((nz, ny, nx), np.uint16)
    made = np.empty((rows, (columns + STRETCH - 1) // STRETCH), np.bool_)
    row, sums = np.empty(columns, plane.dtype), np.empty(nx, np.uint32)
    voxels, sheet = field.reshape(-1), plane.reshape(-1)
    for z in range(nz):
        made[:] = False
        for y in range(ny):
            s = 0
            while s < stretches:
                if not near[z, y, s]:
                    s += 1
                    continue
                first = s * STRETCH
                while s < stretches and near[z, y, s]:
                    s += 1
                last = min(s * STRETCH, nx)
                stop = last + 2 * along_x
                for below in range(y, y + 2 * along_y + 1):
                    _sum_columns(voxels, along_z, z, below, first, stop, sheet, made, columns)
                _filter(sheet, y * columns + first, columns, along_y, row, first, stop)
                _filter(row, first, 1, along_x, sums, first, last)
                rounded = out[z, y]
                for x in range(first, last):
                    rounded[x] = (sums[x] * np.uint32(LEVELS)) >> np.uint32(2 * (along_z + along_y + along_x))
    return out


@njit(cache=True, nogil=True)
def _sum_columns(voxels, passes, z, y, first, stop, sheet, made, columns):
    """Row ``y`` of the plane holds the sums over z in all stretches from ``first`` to ``stop``; ``made`` are those done."""
    s, until = first // STRETCH, (stop - 1) // STRETCH + 1
    while s < until:
        if made[y, s]:
            s += 1
            continue
        begin = s * STRETCH
        while s < until and not made[y, s]:
            made[y, s] = True
            s += 1
        row = y * columns
        _filter(
            voxels,
            z * sheet.size + row + begin,
            sheet.size,
            passes,
            sheet,
            row + begin,
            row + min(columns, s * STRETCH),
        )


@njit(cache=True, nogil=True)
def _filter(values, at, step, passes, out, first, last):
    """``out[first:last]``: passes of [1 2 1], not divided, over ``values[at]``, ``values[at + step]``, ...; then from the next.

    Places are unsigned: where none can be negative, the compiler makes several at a time.
    """
    i, o, one, n = np.uint64(at), np.uint64(first), np.uint64(step), np.uint64(last - first)
    two = one + one
    three, four = two + one, two + two
    five, six = four + one, three + three
    if passes == 0:
        for x in range(n):
            out[o + x] = values[i + x]
    elif passes == 1:
        for x in range(n):
            k = i + x
            out[o + x] = values[k] + 2 * values[k + one] + values[k + two]
    elif passes == 2:
        for x in range(n):
            k = i + x
            inner = values[k + one] + values[k + three]
            out[o + x] = values[k] + 4 * inner + 6 * values[k + two] + values[k + four]
    else:
        for x in range(n):
            k = i + x
            outer, inner = values[k + one] + values[k + five], values[k + two] + values[k + four]
            out[o + x] = values[k] + 6 * outer + 15 * inner + 20 * values[k + three] + values[k + six]


def _squared_distance(body: np.ndarray, real: tuple, around: Metric) -> np.ndarray:
    """Squared distance of each voxel of ``body`` to the nearest voxel of the volume outside it, at most cap**2; uint16.

    Exact where `Metric.reach` voxels lie around it. Three passes of lower envelopes over a window of the cap, as in
    Felzenszwalb and Huttenlocher, "Distance transforms of sampled functions", 2012, whose general case a cap makes
    needless.
    """
    if around.cap == 0:
        return np.zeros(body.shape, np.uint16)
    background = np.zeros(body.shape, np.bool_)
    background[real] = ~body[real]
    (edge_z, edge_y, edge_x), cap = around.edges, around.cap
    along_x = _runs(background, edge_x, cap)
    z, y, x = body.shape
    along_y = np.empty(body.shape, np.uint16)
    _envelope(along_x, body, along_y, edge_y, cap)
    along_z = np.empty((1, z, y * x), np.uint16)
    _envelope(along_y.reshape(1, z, y * x), body.reshape(1, z, y * x), along_z, edge_z, cap)
    return along_z.reshape(body.shape)


@njit(cache=True, nogil=True)
def _runs(background, edge, cap):
    """Squared distance along x to the background, at most cap**2; 0 on the background."""
    nz, ny, nx = background.shape
    out = np.empty(background.shape, np.uint16)
    for z in range(nz):
        for y in range(ny):
            gap = cap
            for x in range(nx):
                gap = 0 if background[z, y, x] else min(gap + edge, cap)
                out[z, y, x] = gap
            gap = cap
            for x in range(nx - 1, -1, -1):
                gap = 0 if background[z, y, x] else min(gap + edge, cap)
                near = min(gap, np.int64(out[z, y, x]))
                out[z, y, x] = near * near
    return out


@njit(cache=True, nogil=True)
def _envelope(field, body, out, edge, cap):
    """min over d of field[j + d] + (d * edge)**2 along the middle axis, within the cap, in the body; else a copy."""
    outer, length, stride = field.shape
    for i in range(outer):
        for j in range(length):
            for k in range(stride):
                best = np.int64(field[i, j, k])
                if body[i, j, k]:
                    d, far = 1, edge
                    while far < cap and far * far < best:
                        if j >= d:
                            best = min(best, np.int64(field[i, j - d, k]) + far * far)
                        if j + d < length:
                            best = min(best, np.int64(field[i, j + d, k]) + far * far)
                        d += 1
                        far += edge
                out[i, j, k] = best


@njit(cache=True, nogil=True)
def _compose(first, second, mask, in_mask, most_first, most_second):
    """Height: low where ``first`` is high, and among equals where ``second`` is high; `OUTSIDE` outside the mask."""
    nz, ny, nx = mask.shape
    out = np.full(mask.shape, OUTSIDE, np.int32)
    for z in range(nz):
        for y in range(ny):
            for s in range(in_mask.shape[2]):
                if not in_mask[z, y, s]:
                    continue
                for x in range(s * STRETCH, min(nx, (s + 1) * STRETCH)):
                    if mask[z, y, x]:
                        rest = most_second - np.int32(second[z, y, x])
                        out[z, y, x] = (most_first - np.int32(first[z, y, x])) * (most_second + 1) + rest
    return out


# ---------------------------------------------------------------- basins


def fragments(
    height: np.ndarray, mass: np.ndarray, box: Box, shape: Triple, connectivity: int = 6
) -> tuple[np.ndarray, Table]:
    """The regions of one block (uint32, 0 outside the mask) and their `Table`, on a grid of 6 or 26 neighbors.

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
    table = Table(
        root=in_volume(roots),
        depth=height.ravel()[roots],
        is_exit=is_exit,
        voxels=voxels,
        first=in_volume(first),
        mass=total,
        edges=_inner_edges(region, height, roots.size, in_volume, ahead, spans),
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
    for column, name in enumerate((*KEY, "area", "height")):
        rows[name] = in_volume(saddles[kept, column]) if name.endswith("_at") else saddles[kept, column]
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
