"""The object table: sums over each block's voxels that add up, and the rows made of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit

from volseg.box import Box, Triple

SUMS = np.dtype(
    [
        ("id", np.uint64),
        ("voxels", np.int64),
        ("mass", np.int64),  # sum of the stored mask probability
        ("sum", np.int64, 3),  # of the coordinates z y x
        ("start", np.int64, 3),  # bounding box
        ("stop", np.int64, 3),
    ]
)


def measure(region: np.ndarray, label: np.ndarray, mass: np.ndarray, box: Box) -> np.ndarray:
    """SUMS rows, one for each label in ``box``, sorted by id.

    ``region`` (uint32) numbers the block's regions from 1, ``label[region]`` is their label (``label[0]`` is 0), ``mass``
    is the stored mask probability (uint8).
    """
    rows = np.zeros(label.size, SUMS)
    rows["start"] = np.iinfo(np.int64).max
    rows["id"] = label
    _add(region, mass, np.array(box.start, np.int64), rows["voxels"], rows["mass"], rows["sum"], rows["start"],
         rows["stop"])  # fmt: skip
    return merge([rows[(rows["voxels"] > 0) & (rows["id"] > 0)]])


@njit(cache=True, nogil=True)
def _add(region, mass, origin, voxels, total, sums, start, stop):
    nz, ny, nx = region.shape
    at = np.empty(3, np.int64)
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                r = region[z, y, x]
                if r == 0:
                    continue
                at[0], at[1], at[2] = z + origin[0], y + origin[1], x + origin[2]
                voxels[r] += 1
                total[r] += mass[z, y, x]
                for axis in range(3):
                    sums[r, axis] += at[axis]
                    start[r, axis] = min(start[r, axis], at[axis])
                    stop[r, axis] = max(stop[r, axis], at[axis] + 1)


def merge(parts: Sequence[np.ndarray]) -> np.ndarray:
    """SUMS rows of several blocks added up, one row for each id, sorted by id; order and grouping do not matter."""
    rows = np.concatenate([np.empty(0, SUMS), *parts])
    if not rows.size:
        return rows
    rows = rows[np.argsort(rows["id"], kind="stable")]
    first = np.flatnonzero(np.r_[True, rows["id"][1:] != rows["id"][:-1]])
    out = rows[first]
    for field, add in (("voxels", np.add), ("mass", np.add), ("sum", np.add), ("start", np.minimum),
                       ("stop", np.maximum)):  # fmt: skip
        out[field] = add.reduceat(rows[field], first, axis=0)
    return out


def table(rows: np.ndarray, shape: Triple, voxel_size_nm: tuple[float, float, float]) -> dict[str, np.ndarray]:
    """Columns of the object table from complete SUMS rows.

    ``z0 .. x1`` bound the object (voxels, half-open), ``centroid_*_nm`` is the mean of its voxels' positions, a voxel's
    position being its index times the voxel size; ``mean_probability`` is 0..1; ``touches_border`` says that the volume's
    border cuts it, so that its volume is a lower bound.
    """
    voxel_um3 = float(np.prod(voxel_size_nm)) * 1e-9
    columns = {"id": rows["id"], "voxels": rows["voxels"], "volume_um3": rows["voxels"] * voxel_um3}
    for i, axis in enumerate("zyx"):
        columns[f"{axis}0"], columns[f"{axis}1"] = rows["start"][:, i], rows["stop"][:, i]
    for i, axis in enumerate("zyx"):
        columns[f"centroid_{axis}_nm"] = rows["sum"][:, i] / rows["voxels"] * voxel_size_nm[i]
    columns["mean_probability"] = rows["mass"] / (255.0 * rows["voxels"])
    columns["touches_border"] = np.any((rows["start"] == 0) | (rows["stop"] == np.array(shape)), axis=1)
    return columns
