"""The object table: sums over each block's voxels that add up, and the rows made of them.

All sums are integers, and no float is made before they are complete, so the table is the same for every cutting into
blocks. A contact between two blocks is counted by the block in front of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from volseg.box import Box, Triple

MOMENTS = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))  # axes multiplied
WORD_BITS = 32  # bits of the lower word of a moment
MAX_RUN_VOXELS = 1 << 12  # voxels added at once: then a run's moments fit 63 bits on axes of up to 2**25 voxels

ROW = np.dtype(
    [
        ("id", np.uint64),
        ("voxels", np.int64),
        ("probability_sum", np.int64),  # sum of the stored mask probability
        ("min_probability", np.uint8),  # lowest of it
        (
            "faces",
            np.int64,
            3,
        ),  # exposed voxel faces across z y x; in one block's row those across its far ends are open
        ("sum", np.int64, 3),  # of the coordinates z y x
        ("moment", np.int64, (6, 2)),  # sum of coordinate products as in MOMENTS: high word, low word of 32 bits
        ("start", np.int64, 3),  # bounding box
        ("stop", np.int64, 3),
    ]
)


@dataclass(frozen=True)
class ObjectSums:
    """What a part of the volume adds to the table.

    rows      ROW, one for each label, sorted by id
    touching  uint64 (n, 2): pairs of labels ``a < b`` that share a voxel face, sorted, each once
    """

    rows: np.ndarray
    contacts: np.ndarray


# ---------------------------------------------------------------- one block


def measure(
    region: np.ndarray, label: np.ndarray, mass: np.ndarray, box: Box, behind: Sequence[np.ndarray | None]
) -> ObjectSums:
    """The `ObjectSums` of ``box``.

    ``region`` (uint32) numbers the block's regions from 1, ``label[region]`` is their label (``label[0]`` is 0), ``mass``
    is the stored mask probability (uint8). ``behind`` has for each axis the labels of the plane behind the block's far
    end (2-D), or None where the volume ends there. Axes may have up to 2**25 voxels, the block fewer than 2**31.
    """
    ids, number = np.unique(np.asarray(label, np.uint64), return_inverse=True)
    rows = np.zeros(ids.size, ROW)
    rows["id"] = ids
    *columns, joined, pairs = _add(region, number.astype(np.int64), mass, np.array(box.start, np.int64), ids.size)
    for name, column in zip(
        ("voxels", "probability_sum", "min_probability", "sum", "moment", "start", "stop"), columns, strict=True
    ):
        rows[name] = column
    touching = [ids[np.stack([pairs >> 32, pairs & 0xFFFFFFFF], axis=1)]]
    for axis in range(3):
        first, last = (number[np.take(region, end, axis)].ravel() for end in (0, -1))
        ends = _count(first, ids.size) * (box.start[axis] == 0)
        if behind[axis] is None:
            ends += _count(last, ids.size)
        else:
            here, there = ids[last], np.asarray(behind[axis], np.uint64).ravel()
            joined[:, axis] += _count(last[here == there], ids.size)
            apart = (here != there) & (here > 0) & (there > 0)
            touching.append(np.stack([here[apart], there[apart]], axis=1))
        rows["faces"][:, axis] = 2 * (rows["voxels"] - joined[:, axis]) - ends
    return merge([ObjectSums(rows[(rows["voxels"] > 0) & (ids > 0)], np.concatenate(touching))])


def paint(region: np.ndarray, label: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """``label[region]``, in ``out`` where that is given: of ``region``, 3-D, every number is less than ``label.size``."""
    out = np.empty(region.shape, label.dtype) if out is None else out
    _paint(region, label, out)
    return out


@njit(cache=True, nogil=True)
def _paint(region, label, out):
    for z in range(region.shape[0]):
        for y in range(region.shape[1]):
            of, to = region[z, y], out[z, y]
            for x in range(of.size):
                to[x] = label[of[x]]


def first_plane(face_at: np.ndarray, face_label: np.ndarray, box: Box, shape: Triple, axis: int) -> np.ndarray:
    """The labels (2-D, uint64) of the first plane of ``box`` along ``axis``.

    ``face_at`` holds the linear indices of all masked voxels on the box's faces, ``face_label`` their labels.

    >>> box = Box((1, 0, 0), (2, 1, 3))
    >>> first_plane(np.array([3, 5]), np.array([7, 8]), box, (2, 1, 3), 0).tolist()
    [[7, 0, 8]]
    """
    place = [p - a for p, a in zip(np.unravel_index(face_at, shape), box.start, strict=True)]
    here = place.pop(axis) == 0
    plane = np.zeros([n for i, n in enumerate(box.shape) if i != axis], np.uint64)
    plane[place[0][here], place[1][here]] = face_label[here]
    return plane


def _count(number: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(number[number > 0], minlength=size)


@njit(cache=True, nogil=True)
def _add(region, number, mass, origin, size):
    """The columns of a block's rows, contacts of like voxels by axis, and pairs ``low << 32 | high`` of unlike ones.

    Labels are told apart by ``number[region]``, which is 0 for background and less than ``size``.
    """
    nz, ny, nx = region.shape
    voxels, total = np.zeros(size, np.int64), np.zeros(size, np.int64)
    least = np.full(size, 255, np.uint8)
    sums, moment = np.zeros((size, 3), np.int64), np.zeros((size, 6, 2), np.int64)
    start, stop = np.full((size, 3), np.iinfo(np.int64).max), np.zeros((size, 3), np.int64)
    joined = np.zeros((size, 3), np.int64)
    pairs = {np.int64(0)}
    for z in range(nz):
        for y in range(ny):
            row, x = region[z, y], 0
            while x < nx:
                r = row[x]
                if r == 0:
                    x += 1
                    continue
                begin, end, n = x, min(nx, x + MAX_RUN_VOXELS), number[r]
                low, run = np.uint8(255), np.int64(0)
                while x < end and row[x] == r:
                    low = min(low, mass[z, y, x])
                    run += mass[z, y, x]
                    x += 1
                if n == 0:
                    continue
                voxels[n] += x - begin
                least[n] = min(least[n], low)
                total[n] += run
                joined[n, 2] += x - begin - 1
                if x < nx:
                    joined[n, 2] += _meet(r, row[x : x + 1], number, pairs)
                if y + 1 < ny:
                    joined[n, 1] += _meet(r, region[z, y + 1, begin:x], number, pairs)
                if z + 1 < nz:
                    joined[n, 0] += _meet(r, region[z + 1, y, begin:x], number, pairs)
                at = (z + origin[0], y + origin[1], begin + origin[2])
                _add_run(at, x - begin, sums[n], moment[n], start[n], stop[n])
    found = np.empty(len(pairs), np.int64)
    for i, pair in enumerate(pairs):
        found[i] = pair
    return voxels, total, least, sums, moment, start, stop, joined, found[found > 0]


@njit(cache=True, nogil=True)
def _meet(r, others, number, pairs):
    """How many of region r's neighbors have its label; other labels among them are entered in ``pairs``."""
    same = none = 0
    for other in others:
        same += other == r
        none += other == 0
    if same + none == others.size:
        return same
    n = number[r]
    for other in others:
        m = number[other]
        if other != r and m == n:
            same += 1
        elif m != n and m > 0:
            pairs.add((min(n, m) << 32) | max(n, m))
    return same


@njit(cache=True, nogil=True)
def _add_run(at, length, sums, moment, start, stop):
    """Adds ``length`` voxels in a row along x, from ``at`` on, to one label's sums."""
    z, y, x = at
    along = length * (2 * x + length - 1) // 2
    squares = length * x * x + x * length * (length - 1) + (length - 1) * length * (2 * length - 1) // 6
    for axis, value in enumerate((length * z, length * y, along)):
        sums[axis] += value
        start[axis] = min(start[axis], at[axis])
        stop[axis] = max(stop[axis], at[axis] + (length if axis == 2 else 1))
    for k, value in enumerate((length * z * z, length * y * y, squares, length * z * y, z * along, y * along)):
        moment[k, 0] += value >> WORD_BITS
        moment[k, 1] += value & ((1 << WORD_BITS) - 1)


# ---------------------------------------------------------------- all blocks


def merge(parts: Sequence[ObjectSums]) -> ObjectSums:
    """The `ObjectSums` of several blocks together; order and grouping do not matter."""
    touching = np.concatenate([np.empty((0, 2), np.uint64), *(part.contacts for part in parts)])
    touching = np.unique(np.sort(touching, axis=1), axis=0)
    rows = np.concatenate([np.empty(0, ROW), *(part.rows for part in parts)])
    if not rows.size:
        return ObjectSums(rows, touching)
    rows = rows[np.argsort(rows["id"], kind="stable")]
    first = np.flatnonzero(np.r_[True, rows["id"][1:] != rows["id"][:-1]])
    out = rows[first]
    how = {"min_probability": np.minimum, "start": np.minimum, "stop": np.maximum}
    for field in ROW.names[1:]:
        out[field] = how.get(field, np.add).reduceat(rows[field], first, axis=0)
    carry = out["moment"][..., 1] >> WORD_BITS
    out["moment"][..., 0] += carry
    out["moment"][..., 1] -= carry << WORD_BITS
    return ObjectSums(out, touching)


def objects_table(
    sums: ObjectSums, shape: Triple, voxel_size_nm: tuple[float, float, float], confidence: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Columns of the object table from complete `ObjectSums`.

    ``z0 .. x1`` bound the object (voxels, half-open). ``centroid_*_nm`` is the mean of its voxels' positions, a voxel's
    position being its index times the voxel size. ``mean_probability`` and ``min_probability`` are 0..1. ``neighbors``
    counts the other labels that share a voxel face with it. ``touches_border`` says that the volume's border cuts it, so
    that its volume, surface and lengths are lower bounds.

    ``surface_area_um2`` adds up voxel faces towards background or another label; where the volume ends there is a cut,
    not a surface. Voxel faces follow a smooth surface in steps: a plane is overestimated by up to sqrt(3), a sphere by
    1.5, and finer voxels do not help. Compare objects with each other, not with other methods.

    ``sd0_nm >= sd1_nm >= sd2_nm`` are the standard deviations along the object's principal axes, every voxel a solid
    box (which adds size**2 / 12 along z y x). ``axis0_z, axis0_y, axis0_x`` is the unit vector of the first axis in nm
    space, its largest component positive; it means little where ``sd0_nm`` is close to ``sd1_nm``. ``length_nm`` is
    2 * sqrt(5) * ``sd0_nm``, the longest axis of the solid ellipsoid with these moments (scikit-image's
    ``axis_major_length`` in 3-D). For a straight rod that is 1.29 of its length, which is sqrt(12) * ``sd0_nm``; for a
    bent one it is about its reach, not its path.

    ``confidence`` is the probability at an object's deepest point less that of the lowest saddle to another object
    (`merges.confidence`, for labels 1..n); all of it where there is no other, NaN where it is not given.
    """
    rows, size = sums.rows, np.array(voxel_size_nm, np.float64)
    variance, axis0 = _principal(_covariance(rows, size))
    sd = np.sqrt(variance)
    columns = {"id": rows["id"], "voxels": rows["voxels"], "volume_um3": rows["voxels"] * (float(np.prod(size)) * 1e-9)}
    columns["surface_area_um2"] = sum(rows["faces"][:, i] * (np.prod(np.delete(size, i)) * 1e-6) for i in range(3))
    for i, axis in enumerate("zyx"):
        columns[f"{axis}0"], columns[f"{axis}1"] = rows["start"][:, i], rows["stop"][:, i]
    for i, axis in enumerate("zyx"):
        columns[f"centroid_{axis}_nm"] = rows["sum"][:, i] / rows["voxels"] * size[i]
    columns["length_nm"] = 2 * np.sqrt(5.0) * sd[:, 0]
    columns.update({f"sd{k}_nm": sd[:, k] for k in range(3)})
    columns.update({f"axis0_{axis}": axis0[:, i] for i, axis in enumerate("zyx")})
    columns["mean_probability"] = rows["probability_sum"] / (255.0 * rows["voxels"])
    columns["min_probability"] = rows["min_probability"] / 255.0
    known = np.full(rows.size, np.nan) if confidence is None else confidence[rows["id"].astype(np.int64) - 1]
    columns["confidence"] = known
    columns["neighbors"] = np.bincount(np.searchsorted(rows["id"], sums.contacts).ravel(), minlength=rows.size)
    columns["touches_border"] = np.any((rows["start"] == 0) | (rows["stop"] == np.array(shape)), axis=1)
    return columns


def _covariance(rows: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The second central moments (n, 3, 3) in nm**2, every voxel a solid box of ``size`` nm.

    In Python's integers up to the one division, which rounds correctly.
    """
    out = np.zeros((rows.size, 3, 3))
    voxels, total = rows["voxels"].astype(object), rows["sum"].astype(object)
    for k, (i, j) in enumerate(MOMENTS):
        moment = (rows["moment"][:, k, 0].astype(object) << WORD_BITS) + rows["moment"][:, k, 1]
        central = (voxels * moment - total[:, i] * total[:, j]) / (voxels * voxels)
        out[:, i, j] = out[:, j, i] = central.astype(np.float64) * (size[i] * size[j])
    return out + np.diag(size**2 / 12)


def _principal(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variances along the principal axes, largest first, and the unit vector of the first, its largest component > 0."""
    variance, vector = np.linalg.eigh(covariance)
    axis0 = vector[:, :, -1]
    largest = np.take_along_axis(axis0, np.abs(axis0).argmax(axis=1)[:, None], axis=1)
    return variance[:, ::-1], axis0 * np.sign(largest)
