"""Heights: one whole number a voxel, low inside objects, that the watershed follows.

A height is made of two parts: what ``fragments.height`` names (mostly the smoothed mask probability less the contour)
comes first, and what splits its plateaus (mostly the distance to the mask's border) second. All arithmetic is on
integers, and a height depends only on voxels within the halo of its own, so blocks that share a voxel agree on it.
"""

from __future__ import annotations

from fractions import Fraction
from functools import reduce
from math import ceil, comb, prod

import numpy as np
from numba import njit

from volseg.box import Box, Slices, Triple, VoxelSize
from volseg.config import Fragments
from volseg.segmentation.distances import DistanceUnit, distance_unit, squared_distance

STEPS_PER_VALUE = 64  # steps of smoothed probability for each step of the stored uint8
MAX_LEVEL = 255 * STEPS_PER_VALUE  # of smoothed probability: stands for 1
STRETCH_VOXELS = 16  # of a row, smoothed together or not at all; at least the filter's reach
OUTSIDE = np.iinfo(np.int32).max  # height of what is not in the mask


# ---------------------------------------------------------------- probabilities


def to_uint8(probability: np.ndarray) -> np.ndarray:
    """Probabilities as runs store them.

    Parameters
    ----------
    probability
        uint8 of 0..255, which stay; uint16 of 0..65535, floats of 0..1, or bool.

    Returns
    -------
    uint8 of the same shape: 255 * probability to the nearest, halves up

    Raises
    ------
    ValueError
        Where a float does not round to 0..255, with its place. Blended tiles may overshoot 1 by their rounding.

    Examples
    --------
    >>> to_uint8(np.array([[[0, 128, 129, 65535]]], np.uint16)).tolist()
    [[[0, 0, 1, 255]]]
    >>> to_uint8(np.array([[[0, 0.5, 1.001]]], np.float32)).tolist()
    [[[0, 128, 255]]]
    """
    if probability.dtype == np.uint8:
        return probability
    if probability.dtype == np.bool_:
        return probability * np.uint8(255)
    if probability.dtype == np.uint16:
        return ((probability.astype(np.uint32) + 128) // 257).astype(np.uint8)
    out = np.empty(probability.shape, np.uint8)
    dtype = np.float32 if probability.dtype == np.float16 else probability.dtype
    bad = _quantize(np.ascontiguousarray(probability, dtype).ravel(), out.ravel())
    if bad >= 0:
        index = np.unravel_index(bad, probability.shape)
        place = ", ".join(map(str, index))
        raise ValueError(f"voxel {place} of it is {probability[index]:g}, and float probabilities lie in 0..1")
    return out


@njit(cache=True, nogil=True)
def _quantize(values: np.ndarray, out: np.ndarray) -> int:
    """Fills ``out``; returns the index of the first value that is no probability, or -1. In double: 255 * float32 is exact."""
    for i in range(values.size):
        scaled = np.floor(np.float64(values[i]) * 255 + 0.5)
        if not 0 <= scaled <= 255:
            return i
        out[i] = np.uint8(scaled)
    return -1


# ---------------------------------------------------------------- units


def height_halo(settings: Fragments, voxel_size_nm: VoxelSize | None = None) -> Triple:
    """Voxels of probability, z y x, that `block_heights` needs around a block.

    Raises as `distance_unit` does.
    """
    reach = distance_unit(settings, voxel_size_nm).reach
    z, y, x = (passes + voxels + 1 for passes, voxels in zip(settings.smooth, reach, strict=True))
    return z, y, x


def smoothing_reach(settings: Fragments, *, convex: bool) -> Triple:
    """Voxels z y x that the smoothed mask may reach beyond where there are probabilities at all; 0 where it stays within.

    In a box without probabilities it is above the threshold at most next to its corners, where they surround it; if what has
    some is ``convex``, next to its faces.

    >>> [smoothing_reach(Fragments(threshold=t, smooth=(1, 1, 1)), convex=c) for t, c in [(0.3, True), (0.3, False)]]
    [(0, 0, 0), (1, 1, 1)]
    """
    beyond = [(1 - comb(2 * n, n) / 4**n) / 2 for n in settings.smooth]  # share of a filter that lies beyond a face
    most = max(beyond) if convex else 1 - prod(1 - share for share in beyond)
    return settings.smooth if settings.threshold <= most else (0, 0, 0)


def mask_level(threshold: float) -> int:
    """The smoothed value, 0..`MAX_LEVEL`, from which on a voxel is in the mask."""
    return ceil(threshold * MAX_LEVEL)


def smooth_mask(probability: np.ndarray, passes: Triple) -> np.ndarray:
    """Return the smoothed mask probability of a whole volume, as `block_heights` holds it against `mask_level`.

    Parameters
    ----------
    probability
        uint8 (z, y, x), 255 for 1.
    passes
        Passes of the filter [1 2 1] / 4 along z, y, x. Beyond the volume the last voxel is repeated.

    Returns
    -------
    numpy.ndarray
        uint16 (z, y, x), `MAX_LEVEL` for 1.

    Examples
    --------
    >>> smooth_mask(np.array([[[0, 0, 255, 0, 0]]], np.uint8), (0, 0, 1))[0, 0].tolist()
    [0, 4080, 8160, 4080, 0]
    """
    padded = np.pad(probability, [(n, n) for n in passes], mode="edge")
    return _smooth(padded, passes, _reachable(padded, passes, 0))


def seed_height(seed: float, settings: Fragments, voxel_size_nm: VoxelSize | None = None) -> int:
    """The greatest height at which a voxel is a seed: what ``settings.height`` names is at least ``seed``.

    Parameters
    ----------
    seed
        A smoothed probability 0..1, or for heights of distance a share of its cap.
    settings, voxel_size_nm
        As in `distances.distance_unit`, which also says what is raised.
    """
    max_squared = distance_unit(settings, voxel_size_nm).cap ** 2
    if settings.height == "distance":
        return (max_squared - ceil(Fraction(str(seed)) ** 2 * max_squared)) * (MAX_LEVEL + 1) + MAX_LEVEL
    return (MAX_LEVEL - mask_level(seed)) * (max_squared + 1) + max_squared


def height_to_probability(
    height: np.ndarray, settings: Fragments, voxel_size_nm: VoxelSize | None = None
) -> np.ndarray:
    """What `seed_height` takes, from heights: mostly the smoothed probability less the contour.

    The second part of a height is left out.

    Parameters
    ----------
    height
        Heights of voxels in the mask (integers), or means of them (floats).
    settings, voxel_size_nm
        As in `distances.distance_unit`, which also says what is raised.

    Returns
    -------
    float64 of the same shape, 0..1.

    Examples
    --------
    >>> height_to_probability(np.array([0, seed_height(0.6, Fragments())]), Fragments()).tolist()
    [1.0, 0.6]
    >>> distance = Fragments(height="distance", distance=10)
    >>> height_to_probability(np.array([seed_height(0.6, distance)]), distance).tolist()
    [0.6]
    """
    max_squared = distance_unit(settings, voxel_size_nm).cap ** 2
    if settings.height == "distance":
        return np.sqrt((max_squared - np.floor_divide(height, MAX_LEVEL + 1)) / max_squared)
    level = np.floor_divide(height, max_squared + 1) if max_squared else height
    return (MAX_LEVEL - level) / MAX_LEVEL


def height_difference(share: float, settings: Fragments, voxel_size_nm: VoxelSize | None = None) -> int:
    """The difference of height that makes ``share`` of what ``settings.height`` names; of distances, of the squared cap.

    Parameters are those of `seed_height`.
    """
    max_squared = distance_unit(settings, voxel_size_nm).cap ** 2
    if settings.height == "distance":
        return ceil(Fraction(str(share)) * max_squared) * (MAX_LEVEL + 1)
    return mask_level(share) * (max_squared + 1)


# ---------------------------------------------------------------- one block


def block_heights(
    probability: np.ndarray, box: Box, shape: Triple, settings: Fragments, voxel_size_nm: VoxelSize | None = None
) -> np.ndarray:
    """Heights of ``box`` grown by 1.

    Parameters
    ----------
    probability
        uint8, (channel, z, y, x): mask, contour, and where ``settings.height`` is "head" a third. It covers ``box`` grown
        by `height_halo` and cut to the volume; beyond the volume its last voxel is repeated.
    box
        The block.
    shape
        Shape of the volume, z y x.
    settings, voxel_size_nm
        As in `distances.distance_unit`, which also says what else is raised.

    Returns
    -------
    int32 (z, y, x), low inside objects; `OUTSIDE` where there is no mask or no volume.

    Raises
    ------
    ValueError
        If ``probability`` has not the shape of the block and its halo.

    Examples
    --------
    A row of five voxels; from 0.5 on (128 of 255) they are in the mask:

    >>> mask = np.array([[[[0, 128, 255, 254, 0]]]], np.uint8)
    >>> settings = Fragments(smooth=(0, 0, 0), contour=0, distance=0)
    >>> block_heights(mask, Box((0, 0, 0), (1, 1, 5)), (1, 1, 5), settings)[1, 1, 2:5]
    array([8128,    0,   64], dtype=int32)
    """
    unit = distance_unit(settings, voxel_size_nm)
    padded_box = box.grow(height_halo(settings, voxel_size_nm))
    covered = padded_box.clip(shape)
    if probability.shape[1:] != covered.shape:
        raise ValueError(
            f"probability of {box} has shape {probability.shape[1:]}, wanted {covered.shape} with its halo"
        )
    if int(probability[0].max()) * STEPS_PER_VALUE < mask_level(settings.threshold):  # smoothing raises no maximum
        return np.full(box.grow(1).shape, OUTSIDE, np.int32)
    ends = zip(padded_box.start, covered.start, covered.stop, padded_box.stop, strict=True)
    missing = [(first - start, stop - last) for start, first, last, stop in ends]
    padded = np.pad(probability, [(0, 0), *missing], mode="edge") if np.any(missing) else probability
    z, y, x = settings.smooth
    smoothed_box = padded_box.grow((-z, -y, -x))
    height = _smoothed_heights(padded, smoothed_box.clip(shape).slices_within(smoothed_box), settings, unit)
    return np.ascontiguousarray(height[box.grow(1).slices_within(smoothed_box)])


def _smoothed_heights(
    probability: np.ndarray, in_volume: Slices, settings: Fragments, unit: DistanceUnit
) -> np.ndarray:
    """Heights where the filter fits; ``in_volume`` cuts out the part of them that lies in the volume."""
    mask_probability, min_level = np.ascontiguousarray(probability[0]), mask_level(settings.threshold)
    near_mask = _reachable(mask_probability, settings.smooth, -(-min_level // STEPS_PER_VALUE))
    level = _smooth(mask_probability, settings.smooth, near_mask)
    mask = level >= min_level
    in_mask = _stretches_with(mask.view(np.uint8), 1)

    def smooth(field: np.ndarray) -> np.ndarray:
        return _smooth(field, settings.smooth, in_mask)

    def compose(first: np.ndarray, second: np.ndarray, max_first: int, max_second: int) -> np.ndarray:
        for axis, part in enumerate(in_volume):  # where there is no volume is no mask
            along = np.moveaxis(mask, axis, 0)
            along[: part.start], along[part.stop :] = False, False
        return _compose(first, second, mask, in_mask, max_first, max_second)

    max_squared = unit.cap**2
    if settings.height == "contour":
        return compose(smooth(255 - probability[1]), squared_distance(mask, in_volume, unit), MAX_LEVEL, max_squared)
    if settings.height == "head":
        return compose(smooth(probability[2]), squared_distance(mask, in_volume, unit), MAX_LEVEL, max_squared)
    inside = smooth(_less_contour(probability, round(settings.contour * 256))) if settings.contour else level
    if settings.height == "distance":
        body = mask & (inside >= min_level)
        return compose(squared_distance(body, in_volume, unit), inside, max_squared, MAX_LEVEL)
    return compose(inside, squared_distance(mask, in_volume, unit), MAX_LEVEL, max_squared)


def _less_contour(probability: np.ndarray, weight: int) -> np.ndarray:
    """Mask minus contour probability times ``weight`` / 256, not below 0, uint8."""
    return _subtract(np.ascontiguousarray(probability[0]), np.ascontiguousarray(probability[1]), weight)


@njit(cache=True, nogil=True)
def _subtract(mask: np.ndarray, contour: np.ndarray, weight: int) -> np.ndarray:
    out = np.empty_like(mask)
    m, c, o = mask.ravel(), contour.ravel(), out.ravel()
    for i in range(m.size):
        o[i] = max(0, np.int32(m[i]) - ((np.int32(c[i]) * weight) >> 8))
    return out


# ---------------------------------------------------------------- smoothing

# Most of a volume is background. So a row is cut into stretches of `STRETCH_VOXELS`, and a stretch is smoothed only where
# the result may matter. A mean is at most the greatest of what it is a mean of: what is left out is below the threshold.


def _reachable(field: np.ndarray, passes: Triple, min_value: int) -> np.ndarray:
    """The stretches in which `_smooth` may give ``min_value`` or more; bool (z, y, stretches)."""
    z, y, x = (n - 2 * p for n, p in zip(field.shape, passes, strict=True))
    return _dilate(_stretches_with(field, min_value), z, y, -(-x // STRETCH_VOXELS))


def _stretches_with(field: np.ndarray, min_value: int) -> np.ndarray:
    """The stretches that hold a voxel of ``min_value`` or more."""
    nz, ny, nx = field.shape
    out = np.empty((nz, ny, -(-nx // STRETCH_VOXELS)), np.bool_)
    padded = np.zeros(out.shape[2] * STRETCH_VOXELS, np.uint8)
    _find_stretches(field, np.uint8(min_value), padded[:nx], padded.view(np.uint64).reshape(out.shape[2], -1), out)
    return out


@njit(cache=True, nogil=True)
def _find_stretches(field: np.ndarray, min_value: int, reached: np.ndarray, words: np.ndarray, out: np.ndarray) -> None:
    """A row is compared first, then read eight voxels at once: ``reached`` and ``words`` are the same memory."""
    nz, ny, _ = field.shape
    for z in range(nz):
        for y in range(ny):
            row, stretches = field[z, y], out[z, y]
            for x in range(row.size):
                reached[x] = row[x] >= min_value
            for s in range(stretches.size):
                word = words[s, 0]
                for k in range(1, STRETCH_VOXELS // 8):
                    word |= words[s, k]
                stretches[s] = word != 0


def _dilate(stretches: np.ndarray, nz: int, ny: int, nx: int) -> np.ndarray:
    """The stretches of a mean, shorter than the field by its windows, that lie over one of these."""
    along_z = reduce(np.logical_or, (stretches[k : k + nz] for k in range(stretches.shape[0] - nz + 1)))
    both = reduce(np.logical_or, (along_z[:, k : k + ny] for k in range(along_z.shape[1] - ny + 1)))
    next_one = np.concatenate([both[..., 1:], both[..., -1:]], axis=2)
    return (both | next_one)[..., :nx]


def _smooth(field: np.ndarray, passes: Triple, stretches: np.ndarray) -> np.ndarray:
    """``field`` after ``passes`` of the filter [1 2 1] / 4 along each axis, in steps of 1 / `STEPS_PER_VALUE`.

    It is rounded down once, at the end. uint16, shorter by ``2 * passes`` on each axis, 0 outside ``stretches``.
    """
    small = 255 * 4 ** (passes[0] + passes[1]) <= np.iinfo(np.uint16).max  # sums along z and y fit
    _, rows, columns = field.shape
    plane = np.empty((rows, columns), np.uint16 if small else np.uint32)
    out = np.zeros((*stretches.shape[:2], columns - 2 * passes[2]), np.uint16)
    summed = np.empty((rows, -(-columns // STRETCH_VOXELS)), np.bool_)
    row, sums = np.empty(columns, plane.dtype), np.empty(out.shape[2], np.uint32)
    _smooth_rows(np.ascontiguousarray(field), passes, stretches, plane, summed, row, sums, out)
    return out


# The filter is separable: sums over z go into one ``plane``, sums of these over y into one row, and sums of these over x
# into another, from where a row of the result is rounded. So each sum is made once, in memory that stays in cache.
# Invariant: in section z, ``plane`` holds the sums over z of exactly the stretches of ``summed``.
@njit(cache=True, nogil=True)
def _smooth_rows(
    field: np.ndarray, passes: Triple, stretches: np.ndarray, plane: np.ndarray, summed: np.ndarray, row: np.ndarray,
    sums: np.ndarray, out: np.ndarray,
) -> None:  # fmt: skip
    along_z, along_y, along_x = passes
    nz, ny, count = stretches.shape
    columns, nx = field.shape[2], out.shape[2]
    voxels, sheet = field.reshape(-1), plane.reshape(-1)
    for z in range(nz):
        summed[:] = False
        for y in range(ny):
            s = 0
            while s < count:
                if not stretches[z, y, s]:
                    s += 1
                    continue
                first = s * STRETCH_VOXELS
                while s < count and stretches[z, y, s]:
                    s += 1
                last = min(s * STRETCH_VOXELS, nx)
                stop = last + 2 * along_x
                for source in range(y, y + 2 * along_y + 1):
                    _sum_columns(voxels, along_z, z, source, first, stop, sheet, summed, columns)
                _filter(sheet, y * columns + first, columns, along_y, row, first, stop)
                _filter(row, first, 1, along_x, sums, first, last)
                rounded = out[z, y]
                for x in range(first, last):
                    rounded[x] = (sums[x] * np.uint32(STEPS_PER_VALUE)) >> np.uint32(2 * (along_z + along_y + along_x))


@njit(cache=True, nogil=True)
def _sum_columns(
    voxels: np.ndarray,
    passes: int,
    z: int,
    y: int,
    first: int,
    stop: int,
    sheet: np.ndarray,
    summed: np.ndarray,
    columns: int,
) -> None:
    """Row ``y`` of the plane holds the sums over z in all stretches from ``first`` to ``stop``."""
    s, end = first // STRETCH_VOXELS, (stop - 1) // STRETCH_VOXELS + 1
    row = y * columns
    while s < end:
        if summed[y, s]:
            s += 1
            continue
        begin = row + s * STRETCH_VOXELS
        while s < end and not summed[y, s]:
            summed[y, s] = True
            s += 1
        _filter(
            voxels, z * sheet.size + begin, sheet.size, passes, sheet, begin, row + min(columns, s * STRETCH_VOXELS)
        )


# One pass is [1 2 1], two are [1 4 6 4 1], three [1 6 15 20 15 6 1]: written out, so that no sum is stored between passes.
# Indices are unsigned: where none can be negative, the compiler computes several voxels at a time.
@njit(cache=True, nogil=True)
def _filter(values: np.ndarray, start: int, step: int, passes: int, out: np.ndarray, first: int, last: int) -> None:
    """``out[first:last]``: passes of [1 2 1], not divided, over ``values[start]``, ``values[start + step]``, and so on."""
    i, o, one, n = np.uint64(start), np.uint64(first), np.uint64(step), np.uint64(last - first)
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


@njit(cache=True, nogil=True)
def _compose(
    first: np.ndarray, second: np.ndarray, mask: np.ndarray, in_mask: np.ndarray, max_first: int, max_second: int
) -> np.ndarray:
    """Heights: low where ``first`` is high, and among equals where ``second`` is high; `OUTSIDE` outside the mask."""
    nz, ny, nx = mask.shape
    out = np.full(mask.shape, OUTSIDE, np.int32)
    for z in range(nz):
        for y in range(ny):
            for s in range(in_mask.shape[2]):
                if not in_mask[z, y, s]:
                    continue
                for x in range(s * STRETCH_VOXELS, min(nx, (s + 1) * STRETCH_VOXELS)):
                    if mask[z, y, x]:
                        rest = max_second - np.int32(second[z, y, x])
                        out[z, y, x] = (max_first - np.int32(first[z, y, x])) * (max_second + 1) + rest
    return out
