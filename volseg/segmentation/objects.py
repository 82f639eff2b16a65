"""The object table: sums over each block's voxels, and the rows made of them.

All sums are integers, and no float is made before they are complete, so the table is the same for every cutting into
blocks. A contact between two blocks is counted by the block in front of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numba import njit

from volseg.box import Box, Triple, VoxelSize
from volseg.segmentation import extents
from volseg.segmentation.object_sums import WORD_BITS, add_voxels, enter_contacts

MOMENTS = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))  # axes multiplied
ROW = np.dtype(
    [
        ("id", np.uint64),
        ("voxels", np.int64),
        ("probability_sum", np.int64),  # of the stored mask probability (uint8)
        ("min_probability", np.uint8),  # lowest of it
        ("faces", np.int64, 3),  # exposed voxel faces across z y x; of one block, those across its far ends are open
        ("sum", np.int64, 3),  # of the coordinates z y x
        ("moment", np.int64, (6, 2)),  # sum of coordinate products as in MOMENTS: high word, low word of 32 bits
        ("start", np.int64, 3),  # bounding box
        ("stop", np.int64, 3),
    ]
)
ADDED = ("voxels", "probability_sum", "min_probability", "sum", "moment", "start", "stop")  # voxel by voxel
REDUCTIONS = {
    "voxels": np.add, "probability_sum": np.add, "min_probability": np.minimum, "faces": np.add, "sum": np.add,
    "moment": np.add, "start": np.minimum, "stop": np.maximum,
}  # fmt: skip


@dataclass(frozen=True)
class ObjectSums:
    """What a part of the volume adds to the table.

    Attributes
    ----------
    rows
        ROW: one for each label, sorted by id.
    contacts
        uint64 (n, 2): pairs of labels ``a < b`` that share a voxel face, sorted, each once.
    gray, reach
        Of each row, as `volseg.segmentation.extents` has them, where asked for; else None.
    """

    rows: np.ndarray
    contacts: np.ndarray
    gray: np.ndarray | None = None
    reach: np.ndarray | None = None


# ---------------------------------------------------------------- one block


def measure(
    region: np.ndarray,
    label: np.ndarray,
    probability: np.ndarray,
    box: Box,
    behind: Sequence[np.ndarray | None],
    gray: np.ndarray | None = None,
    along: np.ndarray | None = None,
) -> ObjectSums:
    """The `ObjectSums` of one block. Axes may have up to 2**25 voxels, the block fewer than 2**31.

    Parameters
    ----------
    region
        uint32 (z, y, x): the block's regions, from 1; 0 outside.
    label
        Integer (regions + 1,): the label of each region; ``label[0]`` is 0.
    probability
        uint8 (z, y, x): the stored mask probability.
    box
        The block.
    behind
        For each axis the labels of the plane behind the block's far end (2-D), or None where the volume ends there.
    gray
        Whole numbers (z, y, x): the volume's gray values, where their sums are wanted.
    along
        Of `extents.directions`, where the reach is wanted.

    Examples
    --------
    One block of a row: two voxels of label 7, and one of label 9, behind which the volume goes on with 9.

    >>> row = np.array([[[1, 1, 2]]], np.uint32)
    >>> behind = [None, None, np.array([[9]])]
    >>> sums = measure(row, np.array([0, 7, 9]), np.full(row.shape, 255, np.uint8), Box((0, 0, 0), (1, 1, 3)), behind)
    >>> sums.rows[["id", "voxels"]].tolist(), sums.contacts.tolist(), sums.rows["faces"][:, 2].tolist()
    ([(7, 2), (9, 1)], [[7, 9]], [1, 0])
    """
    ids, number = np.unique(np.asarray(label, np.uint64), return_inverse=True)
    rows = np.zeros(ids.size, ROW)
    rows["id"] = ids
    start, number = np.array(box.start, np.int64), number.astype(np.int64)
    columns = {field: np.zeros((ids.size, *ROW[field].shape), np.int64) for field in ADDED}
    columns["start"][:] = np.iinfo(np.int64).max
    columns["min_probability"][:] = 255
    same_faces = np.zeros((ids.size, 3), np.int64)
    unlike = add_voxels(region, number, probability, start, tuple(columns.values()), same_faces)
    for field, column in columns.items():
        rows[field] = column
    pairs = np.empty(unlike, np.int64)
    if unlike:
        pairs = np.unique(pairs[: enter_contacts(region, number, pairs)])
    contacts = [ids[np.stack([pairs >> 32, pairs & 0xFFFFFFFF], axis=1)]]
    for axis in range(3):
        first, last = (number[np.take(region, end, axis)].ravel() for end in (0, -1))
        border_faces = _count(first, ids.size) * (box.start[axis] == 0)
        plane_behind = behind[axis]
        if plane_behind is None:
            border_faces += _count(last, ids.size)
        else:
            own_label, next_label = ids[last], np.asarray(plane_behind, np.uint64).ravel()
            same_faces[:, axis] += _count(last[own_label == next_label], ids.size)
            unlike = (own_label != next_label) & (own_label > 0) & (next_label > 0)
            contacts.append(np.stack([own_label[unlike], next_label[unlike]], axis=1))
        rows["faces"][:, axis] = 2 * (rows["voxels"] - same_faces[:, axis]) - border_faces
    here = (rows["voxels"] > 0) & (ids > 0)
    sums = None if gray is None else extents.gray_sums(region, number, gray, ids.size)[here]
    reach = None if along is None else extents.block_reach(region, number, start, along, ids.size)[here]
    return merge([ObjectSums(rows[here], np.concatenate(contacts), sums, reach)])


def tally(region: np.ndarray, probability: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """What `measure` takes from the probabilities, for each region before it is known which of them are one object.

    Parameters
    ----------
    region
        uint32 (z, y, x): from 1; 0 outside.
    probability
        uint8 (z, y, x): the stored mask probability.
    count
        How many numbers there are, 0 among them.

    Returns
    -------
    int64 (count,), uint8 (count,)
        The sum over the voxels of each, and the lowest; 255 where there is none.

    Examples
    --------
    >>> [column.tolist() for column in tally(np.array([[[1, 1, 0]]], np.uint32), np.array([[[9, 5, 1]]], np.uint8), 3)]
    [[1, 14, 0], [1, 5, 255]]
    """
    total, lowest = np.zeros(count, np.int64), np.full(count, 255, np.uint8)
    _tally(region, probability, total, lowest)
    return total, lowest


@njit(cache=True, nogil=True)
def _tally(region: np.ndarray, probability: np.ndarray, total: np.ndarray, lowest: np.ndarray) -> None:
    for z in range(region.shape[0]):
        for y in range(region.shape[1]):
            for x in range(region.shape[2]):
                r = region[z, y, x]
                total[r] += probability[z, y, x]
                lowest[r] = min(lowest[r], probability[z, y, x])


def with_tally(sums: ObjectSums, label: np.ndarray, total: np.ndarray, lowest: np.ndarray) -> ObjectSums:
    """``sums`` of a block that was measured without its probabilities, with what `tally` found of each region.

    Examples
    --------
    >>> row, label = np.array([[[1, 1, 2]]], np.uint32), np.array([0, 7, 7])
    >>> probability, box = np.array([[[200, 100, 50]]], np.uint8), Box((0, 0, 0), (1, 1, 3))
    >>> without = measure(row, label, np.zeros_like(probability), box, [None, None, None])
    >>> made = with_tally(without, label, *tally(row, probability, label.size))
    >>> made.rows.tobytes() == measure(row, label, probability, box, [None, None, None]).rows.tobytes()
    True
    """
    rows = sums.rows.copy()
    place = np.searchsorted(rows["id"], label.astype(np.uint64))
    here = (label > 0) & (place < rows.size)
    here[here] = rows["id"][place[here]] == label[here]  # others have no voxel in the block
    rows["min_probability"] = 255
    np.add.at(rows["probability_sum"], place[here], total[here])
    np.minimum.at(rows["min_probability"], place[here], lowest[here])
    return replace(sums, rows=rows)


def paint(region: np.ndarray, label: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """``label[region]``.

    Parameters
    ----------
    region
        Unsigned (z, y, x), every number less than ``label.size``.
    label
        (regions + 1,) of any dtype.
    out
        Zeros of the same shape, where to write it; a new array where there is none.

    Returns
    -------
    ``out``
    """
    out = np.zeros(region.shape, label.dtype) if out is None else out
    _paint(region, label, out)
    return out


@njit(cache=True, nogil=True)
def _paint(region: np.ndarray, label: np.ndarray, out: np.ndarray) -> None:
    for z in range(region.shape[0]):
        for y in range(region.shape[1]):
            regions, labels = region[z, y], out[z, y]
            bits = regions[0]
            for x in range(1, regions.size):
                bits |= regions[x]
            if bits == 0 and label[0] == 0:  # as most rows of most volumes are
                continue
            for x in range(regions.size):
                labels[x] = label[regions[x]]


def first_plane(face_voxel: np.ndarray, face_label: np.ndarray, box: Box, shape: Triple, axis: int) -> np.ndarray:
    """The labels of the first plane of a block along an axis, from those of its face voxels alone.

    Parameters
    ----------
    face_voxel
        int64 (n,): linear indices of all masked voxels on the block's faces.
    face_label
        Integer (n,): their labels.
    box
        The block.
    shape
        Shape of the volume, z y x.
    axis
        0, 1 or 2.

    Returns
    -------
    uint64 (2-D), 0 outside the mask

    Examples
    --------
    >>> box = Box((1, 0, 0), (2, 1, 3))
    >>> first_plane(np.array([3, 5]), np.array([7, 8]), box, (2, 1, 3), 0).tolist()
    [[7, 0, 8]]
    """
    zyx = [place - start for place, start in zip(np.unravel_index(face_voxel, shape), box.start, strict=True)]
    in_plane = zyx.pop(axis) == 0
    plane = np.zeros([n for i, n in enumerate(box.shape) if i != axis], np.uint64)
    plane[zyx[0][in_plane], zyx[1][in_plane]] = face_label[in_plane]
    return plane


def _count(number: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(number[number > 0], minlength=size)


# ---------------------------------------------------------------- all blocks


def merge(parts: Sequence[ObjectSums]) -> ObjectSums:
    """The `ObjectSums` of several parts of the volume together; order and grouping do not matter."""
    contacts = np.concatenate([np.empty((0, 2), np.uint64), *(part.contacts for part in parts)])
    contacts = np.unique(np.sort(contacts, axis=1), axis=0)
    rows = np.concatenate([np.empty(0, ROW), *(part.rows for part in parts)])
    if not rows.size:
        return ObjectSums(rows, contacts)
    order = np.argsort(rows["id"], kind="stable")
    rows = rows[order]
    first = np.flatnonzero(np.r_[True, rows["id"][1:] != rows["id"][:-1]])
    merged = rows[first]
    for field, reduce in REDUCTIONS.items():
        merged[field] = reduce.reduceat(rows[field], first, axis=0)
    carry = merged["moment"][..., 1] >> WORD_BITS
    merged["moment"][..., 0] += carry
    merged["moment"][..., 1] -= carry << WORD_BITS
    some = [part for part in parts if part.rows.size]
    gray = reach = None
    if all(part.gray is not None for part in some):
        gray = np.add.reduceat(np.concatenate([part.gray for part in some])[order], first)
    if all(part.reach is not None for part in some):
        each = np.concatenate([part.reach for part in some])[order]
        lowest, highest = np.minimum.reduceat(each[..., 0], first), np.maximum.reduceat(each[..., 1], first)
        reach = np.stack([lowest, highest], axis=-1)
    return ObjectSums(merged, contacts, gray, reach)


def objects_table(
    sums: ObjectSums, shape: Triple, voxel_size_nm: VoxelSize, confidence: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Columns of the object table.

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

    ``equivalent_diameter_nm`` is that of the sphere with its volume. ``elongation`` is ``sd0_nm / sd1_nm`` and ``flatness``
    ``sd1_nm / sd2_nm``, both at least 1, as ITK defines them. ``sphericity`` is the surface of that sphere as a share of the
    object's (Wadell 1932); since voxel faces overestimate surfaces, a ball has about 0.67. ``nearest_id`` is the object whose
    centroid is nearest, ``nearest_nm`` how far that is; 0 and NaN where there is no other.

    ``mean_gray`` is the mean of the volume's gray values, and ``feret_nm`` the longest extent of the object, its voxels being
    solid boxes, at most 1.8 % too short; both are there where they were asked for.

    ``confidence`` is the probability at an object's deepest point less that of the lowest saddle to another object; all of
    it where there is no other, NaN where it is not given.

    Parameters
    ----------
    sums
        Of the whole volume.
    shape
        Shape of the volume, z y x.
    voxel_size_nm
        Size of a voxel along z y x.
    confidence
        float64: of labels 1..n, as `saddles.confidence` gives it.

    Returns
    -------
    dict of arrays, one entry for each object, by ascending id
    """
    rows, size = sums.rows, np.array(voxel_size_nm, np.float64)
    variance, axis0 = _principal(_covariance(rows, size))
    sd = np.sqrt(variance)
    columns = {"id": rows["id"], "voxels": rows["voxels"], "volume_um3": rows["voxels"] * (float(np.prod(size)) * 1e-9)}
    across_z, across_y, across_x = (rows["faces"][:, i] * (np.prod(np.delete(size, i)) * 1e-6) for i in range(3))
    columns["surface_area_um2"] = across_z + across_y + across_x
    for i, axis in enumerate("zyx"):
        columns[f"{axis}0"], columns[f"{axis}1"] = rows["start"][:, i], rows["stop"][:, i]
    for i, axis in enumerate("zyx"):
        columns[f"centroid_{axis}_nm"] = rows["sum"][:, i] / rows["voxels"] * size[i]
    columns["length_nm"] = 2 * np.sqrt(5.0) * sd[:, 0]
    columns.update({f"sd{k}_nm": sd[:, k] for k in range(3)})
    columns.update({f"axis0_{axis}": axis0[:, i] for i, axis in enumerate("zyx")})
    columns["mean_probability"] = rows["probability_sum"] / (255.0 * rows["voxels"])
    columns["min_probability"] = rows["min_probability"] / 255.0
    unknown = np.full(rows.size, np.nan)
    columns["confidence"] = unknown if confidence is None else confidence[rows["id"].astype(np.int64) - 1]
    volume_nm3 = rows["voxels"] * float(np.prod(size))
    columns["equivalent_diameter_nm"] = np.cbrt(6 * volume_nm3 / np.pi)
    columns["elongation"], columns["flatness"] = sd[:, 0] / sd[:, 1], sd[:, 1] / sd[:, 2]
    area_nm2 = 1e6 * columns["surface_area_um2"]
    ball_nm2 = np.cbrt(np.pi) * np.cbrt(6 * volume_nm3) ** 2
    columns["sphericity"] = np.divide(ball_nm2, area_nm2, out=np.full(rows.size, np.nan), where=area_nm2 > 0)
    centroids = np.stack([columns[f"centroid_{axis}_nm"] for axis in "zyx"], axis=1)
    if sums.gray is not None:
        columns["mean_gray"] = sums.gray / rows["voxels"]
    if sums.reach is not None:
        columns["feret_nm"] = extents.longest_nm(sums.reach, voxel_size_nm)
    columns["nearest_id"], columns["nearest_nm"] = _nearest(rows["id"], centroids)
    contact_rows = np.searchsorted(rows["id"], sums.contacts).ravel()
    columns["neighbors"] = np.bincount(contact_rows, minlength=rows.size)
    columns["touches_border"] = np.any((rows["start"] == 0) | (rows["stop"] == np.array(shape)), axis=1)
    return columns


def _nearest(ids: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The object whose centroid is nearest to each one's, and how far it is; 0 and NaN where there is no other."""
    if len(ids) < 2:
        return np.zeros(len(ids), np.uint64), np.full(len(ids), np.nan)
    from scipy.spatial import cKDTree  # takes 0.2 s, which no worker needs

    distance, row = cKDTree(centroids).query(centroids, k=2)
    own = row[:, 0] == np.arange(len(ids))
    other = np.where(own, 1, 0)
    each = np.arange(len(ids))
    return ids[row[each, other]], distance[each, other]


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
