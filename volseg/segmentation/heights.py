"""Heights of voxels."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from math import ceil, gcd

import numpy as np
from numba import njit

from volseg.box import Box, Triple, VoxelSize
from volseg.config import Fragments
from volseg.errors import UserError

STEPS_PER_VALUE = 64  # steps of smoothed probability for each step of the stored uint8
MAX_LEVEL = 255 * STEPS_PER_VALUE
MAX_CAP = 255  # greatest cap of distances: its square fits uint16, and heights fit int32
STRETCH_VOXELS = 16  # voxels of a row that are smoothed together or not at all; at least the filter's reach
OUTSIDE = np.iinfo(np.int32).max  # height of what is not in the mask


@dataclass(frozen=True)
class DistanceUnit:
    """Whole-number distances, so that they are exact: ``spacing`` of voxels along z y x, and the ``cap`` up to which they
    count, all in one unit."""

    spacing: Triple
    cap: int

    @property
    def reach(self) -> Triple:
        """Voxels within the cap, z y x."""
        return tuple(-(-self.cap // edge) for edge in self.spacing)


def distance_unit(settings: Fragments, voxel_size_nm: VoxelSize | None = None) -> DistanceUnit:
    """The `DistanceUnit` of ``knobs.distance``, whose unit is one voxel on every axis, or of ``knobs.distance_nm``.

    In nm the unit is 1/16 of the smallest edge, or a multiple of it that divides all edges, or the next of 1/8, 1/4, 1/2
    and 1 that keeps the cap within `MAX_CAP`. Longer edges are rounded to whole units, and so by less than 1/32 of the
    smallest edge where the unit is 1/16. Raises `UserError` for a cap beyond `MAX_CAP` voxels.

    >>> distance_unit(Fragments(distance_nm=40), (50, 4.6, 4.6)), distance_unit(Fragments(distance_nm=40), (8, 8, 8))
    (DistanceUnit(spacing=(87, 8, 8), cap=70), DistanceUnit(spacing=(1, 1, 1), cap=5))
    """
    if not settings.distance_nm:
        return DistanceUnit((1, 1, 1), settings.distance)
    if voxel_size_nm is None:
        raise ValueError("fragments.distance_nm is not 0, so a voxel's size is needed; give voxel_size_nm")
    smallest = min(voxel_size_nm)
    for fine in (16, 8, 4, 2, 1):
        edges = [round(fine * edge / smallest) for edge in voxel_size_nm]
        unit = gcd(*edges)
        cap = max(1, round(settings.distance_nm * fine / (smallest * unit)))
        if cap <= MAX_CAP:
            return DistanceUnit(tuple(edge // unit for edge in edges), cap)
    raise UserError(f"fragments.distance_nm = {settings.distance_nm:g} is more than {MAX_CAP} voxels of {smallest:g} nm; "
                    f"give at most {MAX_CAP * smallest:g}")  # fmt: skip


def height_halo(settings: Fragments, voxel_size_nm: VoxelSize | None = None) -> Triple:
    """Voxels of probability needed around a block so that its fragments are exact, z y x."""
    return tuple(
        n + far + 1 for n, far in zip(settings.smooth, distance_unit(settings, voxel_size_nm).reach, strict=True)
    )


def mask_level(threshold: float) -> int:
    """The smoothed value from which on a voxel is in the mask."""
    return int(np.ceil(threshold * MAX_LEVEL))


def seed_height(seed: float, settings: Fragments, voxel_size_nm: VoxelSize | None = None) -> int:
    """The greatest height at which a voxel is a seed: what ``knobs.height`` names is at least ``seed``.

    That is the smoothed value of 0..1, or the distance as a share of its cap.
    """
    most = distance_unit(settings, voxel_size_nm).cap ** 2
    if settings.height == "distance":
        return (most - ceil(Fraction(str(seed)) ** 2 * most)) * (MAX_LEVEL + 1) + MAX_LEVEL
    return (MAX_LEVEL - mask_level(seed)) * (most + 1) + most


def height_to_probability(
    height: np.ndarray, settings: Fragments, voxel_size_nm: VoxelSize | None = None
) -> np.ndarray:
    """What `seed_height` takes, of heights or of means of heights: mostly the smoothed probability less the contour.

    What comes second in a height is left out.

    >>> height_to_probability(np.array([0, seed_height(0.6, Fragments())]), Fragments()).tolist()
    [1.0, 0.6]
    >>> far = Fragments(height="distance", distance=10)
    >>> height_to_probability(np.array([seed_height(0.6, far)]), far).tolist()
    [0.6]
    """
    most = distance_unit(settings, voxel_size_nm).cap ** 2
    if settings.height == "distance":
        return np.sqrt((most - np.floor_divide(height, MAX_LEVEL + 1)) / most)
    return (MAX_LEVEL - np.floor_divide(height, most + 1)) / MAX_LEVEL if most else (MAX_LEVEL - height) / MAX_LEVEL


def height_difference(share: float, settings: Fragments, voxel_size_nm: VoxelSize | None = None) -> int:
    """The difference of height that ``share`` of what ``knobs.height`` names makes; of distances, of the squared cap."""
    most = distance_unit(settings, voxel_size_nm).cap ** 2
    if settings.height == "distance":
        return ceil(Fraction(str(share)) * most) * (MAX_LEVEL + 1)
    return mask_level(share) * (most + 1)


def block_heights(
    probability: np.ndarray, box: Box, shape: Triple, settings: Fragments, voxel_size_nm: VoxelSize | None = None
) -> np.ndarray:
    """Heights (int32, low inside objects) of ``box`` grown by 1; `OUTSIDE` where there is no mask or no volume.

    ``probability`` is uint8 (channels mask, contour, perhaps distance; z y x) and covers ``box`` grown by `height_halo`, cut to
    the volume of that ``shape``. All arithmetic is on integers, and a voxel's height depends only on voxels within the
    halo, so two blocks that share a voxel agree on it. Beyond the volume the last voxel is repeated.
    """
    around = distance_unit(settings, voxel_size_nm)
    full = box.grow(height_halo(settings, voxel_size_nm))
    have = full.clip(shape)
    if probability.shape[1:] != have.shape:
        raise ValueError(f"probability of {box} has shape {probability.shape[1:]}, wanted {have.shape} with its halo")
    if int(probability[0].max()) * STEPS_PER_VALUE < mask_level(
        settings.threshold
    ):  # smoothing lifts nothing above its neighbors
        return np.full(box.grow(1).shape, OUTSIDE, np.int32)
    missing = [(h - f, g - e) for f, h, e, g in zip(full.start, have.start, have.stop, full.stop, strict=True)]
    padded = np.pad(probability, [(0, 0), *missing], mode="edge") if np.any(missing) else probability
    fits = full.grow(tuple(-p for p in settings.smooth))
    out = _block_heights(padded, fits.clip(shape).slices_within(fits), settings, around)
    return np.ascontiguousarray(out[box.grow(1).slices_within(fits)])


def _block_heights(probability: np.ndarray, real: tuple, settings: Fragments, around: DistanceUnit) -> np.ndarray:
    """Heights where the filter fits; ``real`` is the part of them that lies in the volume."""
    first = np.ascontiguousarray(probability[0])
    level = _smooth(
        first, settings.smooth, _near(first, settings.smooth, -(-mask_level(settings.threshold) // STEPS_PER_VALUE))
    )
    mask = level >= mask_level(settings.threshold)
    in_mask = _holds(mask.view(np.uint8), np.uint8(1))

    def smooth(field: np.ndarray) -> np.ndarray:
        return _smooth(field, settings.smooth, in_mask)

    def composed(first: np.ndarray, second: np.ndarray, most_first: int, most_second: int) -> np.ndarray:
        for axis, part in enumerate(real):  # where there is no volume is no mask
            along = np.moveaxis(mask, axis, 0)
            along[: part.start], along[part.stop :] = False, False
        return _compose(first, second, mask, in_mask, most_first, most_second)

    most = around.cap**2
    if settings.height == "contour":
        return composed(smooth(255 - probability[1]), _squared_distance(mask, real, around), MAX_LEVEL, most)
    if settings.height == "head":
        return composed(smooth(probability[2]), _squared_distance(mask, real, around), MAX_LEVEL, most)
    inside = smooth(_less_contour(probability, round(settings.contour * 256))) if settings.contour else level
    if settings.height == "distance":
        body = mask & (inside >= mask_level(settings.threshold))
        return composed(_squared_distance(body, real, around), inside, most, MAX_LEVEL)
    return composed(inside, _squared_distance(mask, real, around), MAX_LEVEL, most)


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
    """Where `_smooth` may give ``least`` or more, in stretches of `STRETCH_VOXELS` voxels along x; bool (z, y, stretches).

    A mean is at most the greatest of what it is a mean of.
    """
    z, y, x = (n - 2 * p for n, p in zip(field.shape, passes, strict=True))
    return _dilated(_holds(field, np.uint8(least)), z, y, -(-x // STRETCH_VOXELS))


@njit(cache=True, nogil=True)
def _holds(field, least):
    """Which stretches hold a voxel that is ``least`` or more. A row is compared first, then eight voxels are seen at once."""
    nz, ny, nx = field.shape
    out = np.zeros((nz, ny, (nx + STRETCH_VOXELS - 1) // STRETCH_VOXELS), np.bool_)
    room = np.zeros(out.shape[2] * STRETCH_VOXELS, np.uint8)
    reached, words = room[:nx], room.view(np.uint64).reshape(out.shape[2], STRETCH_VOXELS // 8)
    for z in range(nz):
        for y in range(ny):
            row, found = field[z, y], out[z, y]
            for x in range(row.size):
                reached[x] = row[x] >= least
            for s in range(found.size):
                some = words[s, 0]
                for k in range(1, STRETCH_VOXELS // 8):
                    some |= words[s, k]
                found[s] = some != 0
    return out


def _dilated(holds: np.ndarray, nz: int, ny: int, stretches: int) -> np.ndarray:
    """Which stretches of a mean, shorter than the field by its windows, lie over one that holds something."""
    holds = reduce(np.logical_or, (holds[t : t + nz] for t in range(holds.shape[0] - nz + 1)))
    holds = reduce(np.logical_or, (holds[:, t : t + ny] for t in range(holds.shape[1] - ny + 1)))
    return (holds | np.concatenate([holds[..., 1:], holds[..., -1:]], axis=2))[..., :stretches]


def _smooth(field: np.ndarray, passes: Triple, near: np.ndarray) -> np.ndarray:
    """``field`` after ``passes`` of the filter [1 2 1] / 4 along each axis, in steps of 1 / 64, rounded down once.

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
    made = np.empty((rows, (columns + STRETCH_VOXELS - 1) // STRETCH_VOXELS), np.bool_)
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
                first = s * STRETCH_VOXELS
                while s < stretches and near[z, y, s]:
                    s += 1
                last = min(s * STRETCH_VOXELS, nx)
                stop = last + 2 * along_x
                for below in range(y, y + 2 * along_y + 1):
                    _sum_columns(voxels, along_z, z, below, first, stop, sheet, made, columns)
                _filter(sheet, y * columns + first, columns, along_y, row, first, stop)
                _filter(row, first, 1, along_x, sums, first, last)
                rounded = out[z, y]
                for x in range(first, last):
                    rounded[x] = (sums[x] * np.uint32(STEPS_PER_VALUE)) >> np.uint32(2 * (along_z + along_y + along_x))
    return out


@njit(cache=True, nogil=True)
def _sum_columns(voxels, passes, z, y, first, stop, sheet, made, columns):
    """Row ``y`` of the plane holds the sums over z in all stretches from ``first`` to ``stop``; ``made`` are those done."""
    s, until = first // STRETCH_VOXELS, (stop - 1) // STRETCH_VOXELS + 1
    while s < until:
        if made[y, s]:
            s += 1
            continue
        begin = s * STRETCH_VOXELS
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
            row + min(columns, s * STRETCH_VOXELS),
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


def _squared_distance(body: np.ndarray, real: tuple, around: DistanceUnit) -> np.ndarray:
    """Squared distance of each voxel of ``body`` to the nearest voxel of the volume outside it, at most cap**2; uint16.

    Exact where `Metric.reach` voxels lie around it. Three passes of lower envelopes over a window of the cap, as in
    Felzenszwalb and Huttenlocher, "Distance transforms of sampled functions", 2012, whose general case a cap makes
    needless.
    """
    if around.cap == 0:
        return np.zeros(body.shape, np.uint16)
    background = np.zeros(body.shape, np.bool_)
    background[real] = ~body[real]
    (edge_z, edge_y, edge_x), cap = around.spacing, around.cap
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
                for x in range(s * STRETCH_VOXELS, min(nx, (s + 1) * STRETCH_VOXELS)):
                    if mask[z, y, x]:
                        rest = most_second - np.int32(second[z, y, x])
                        out[z, y, x] = (most_first - np.int32(first[z, y, x])) * (most_second + 1) + rest
    return out
