"""Basins as a graph for solvers elsewhere, and a partition of them as labels.

A basin is called by the linear index of its first voxel: whatever the blocks, that is the same number, and no two basins share
it. So a graph, and a partition of it, are of the basins of a volume, and not of how a run was cut.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from volseg.box import Triple, VoxelSize
from volseg.config import Fragments
from volseg.segmentation.agglomerate import rank_components
from volseg.segmentation.heights import height_to_probability
from volseg.segmentation.stitch import Basins


@dataclass(frozen=True)
class Partition:
    """Which basins are one object.

    Attributes
    ----------
    basin
        int64 (n,): the first voxel (linear index) of each basin of a volume, ascending.
    label
        int64 (n,): 1..m in the order of each object's first basin; 0 for none.
    """

    basin: np.ndarray
    label: np.ndarray

    @classmethod
    def of(cls, basin: np.ndarray, group: np.ndarray) -> Partition:
        """The partition in which basins of one group, a number above 0, are one object.

        Parameters
        ----------
        basin
            Integer (n,): the first voxel of each basin, each once, in any order.
        group
            Integer (n,): of each; 0 for none.

        Examples
        --------
        >>> Partition.of(np.array([30, 10, 20]), np.array([8, 9, 8]))
        Partition(basin=array([10, 20, 30]), label=array([1, 2, 2]))
        """
        order = np.argsort(basin)
        basin, group = basin[order].astype(np.int64), group[order]
        label, is_object = np.zeros(basin.size, np.int64), group > 0
        label[is_object] = 1 + rank_components(group[is_object], basin[is_object])[0]
        return cls(basin, label)

    @property
    def name(self) -> str:
        """The hash of what it says, whatever its objects were called."""
        return hashlib.sha256(self.basin.tobytes() + self.label.tobytes()).hexdigest()[:16]

    def labels_of(self, basins: Basins) -> np.ndarray:
        """The label of each basin of the volume, whatever their order; int64 (n,).

        Raises
        ------
        RuntimeError
            These are other basins.
        """
        if not np.array_equal(np.sort(basins.first), self.basin):
            raise RuntimeError("a partition is of other basins than the run has")
        return self.label[np.searchsorted(self.basin, basins.first)]


def graph_tables(
    basins: Basins, label: np.ndarray, settings: Fragments, shape: Triple, voxel_size_nm: VoxelSize
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The nodes, by ascending ``basin``, and the edges, by ``basin_a`` and ``basin_b``, as columns of tables.

    Parameters
    ----------
    basins
        The volume's basins.
    label
        int64 (basins,): the object of each in the run; 0 for none.
    settings, voxel_size_nm
        Of the run: what heights are made of.
    shape
        Shape of the volume, z y x.
    """
    order = np.argsort(basins.first)
    name = basins.first[order]
    voxels = basins.voxels[order]

    def probability(height: np.ndarray) -> np.ndarray:
        return height_to_probability(height, settings, voxel_size_nm)

    nodes = {
        "basin": name,
        "object": label[order],
        "voxels": voxels,
        **dict(zip("zyx", np.unravel_index(name, shape), strict=True)),
        "highest_probability": probability(basins.minimum[order]),
        "mask_sum": basins.probability_sum[order],
        "mean_mask": basins.probability_sum[order] / (255 * voxels),
        **dict(zip(("cut_z", "cut_y", "cut_x"), basins.cut[order].T, strict=True)),
        "minimum": basins.minimum[order],
    }
    edges = basins.edges
    ends = np.sort(np.stack([basins.first[edges["a"]], basins.first[edges["b"]]]), axis=0)
    order = np.lexsort(ends[::-1])
    ends, edges = ends[:, order], edges[order]
    area, total = edges["area"], edges["height"]
    mean = np.where(area > 0, total / np.maximum(1, area), edges["high"])
    return nodes, {
        "basin_a": ends[0],
        "basin_b": ends[1],
        "contact_faces": area,
        "mean_probability": probability(mean),
        "saddle_probability": probability(edges["high"]),
        **dict(zip("zyx", np.unravel_index(edges["high_voxel"], shape), strict=True)),
        "height_sum": total,
        "saddle": edges["high"],
    }
