"""Rules."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, prod

import numpy as np

from volseg.box import VoxelSize
from volseg.config import Config
from volseg.segmentation.agglomerate import agglomerate, borders, forest, rank_components
from volseg.segmentation.edges import connected_components
from volseg.segmentation.heights import height_difference, seed_height
from volseg.segmentation.holes import Holes
from volseg.segmentation.stitch import Basins, min_by_group, sum_by_group

NO_LIMIT = np.iinfo(np.int64).max  # no greatest size


@dataclass(frozen=True)
class Rules:
    """What decides about basins, in the units of their tables. `from_config` makes it of settings.

    seed_height    the greatest height of a saddle at which seeds are one
    persistence    how far below a saddle both sides must reach to stay apart there
    join_height    the greatest mean height of a border that joins its sides; negative for none
    min_voxels, max_voxels   smaller and larger objects are dropped
    fill_voxels    the greatest hole that is filled
    keep_unseeded  whether objects without a seed are kept
    low_height     the greatest height of a seed, where that is above ``seed_height``
    """

    seed_height: int
    persistence: int = 0
    join_height: int = -1
    min_voxels: int = 0
    max_voxels: int = NO_LIMIT
    fill_voxels: int = 0
    keep_unseeded: bool = False
    low_height: int = -1

    @classmethod
    def from_config(cls, config: Config, voxel_size_nm: VoxelSize) -> Rules:
        """The `Rules` of a run's settings.

        >>> from volseg.config import load
        >>> Rules.from_config(load(sets=["stitch.min_volume_nm3=80010"]), (5.0, 4.0, 4.0)).min_voxels
        1001
        """
        stitch, fragments = config.stitch, config.fragments
        voxel_nm3 = prod(Fraction(str(n)) for n in voxel_size_nm)
        return cls(
            seed_height=seed_height(stitch.seed, fragments, voxel_size_nm),
            persistence=height_difference(stitch.persistence, fragments, voxel_size_nm),
            join_height=seed_height(stitch.join_mean, fragments, voxel_size_nm) if stitch.join_mean else -1,
            min_voxels=max(stitch.min_voxels, ceil(Fraction(str(stitch.min_volume_nm3)) / voxel_nm3)),
            max_voxels=stitch.max_voxels or NO_LIMIT,
            fill_voxels=stitch.fill_holes_voxels,
            keep_unseeded=stitch.keep_unseeded,
            low_height=seed_height(stitch.seed_low, fragments, voxel_size_nm) if stitch.seed_low else -1,
        )

    @property
    def seeds(self) -> tuple[int, int, int]:
        """What `forest` wants: where seeds are one, what is a seed, and how deep both sides must be.

        Between the two levels a voxel is no side of its own: a side is at least one step deep.
        """
        low = max(self.seed_height, self.low_height)
        return self.seed_height, low, max(self.persistence, int(low > self.seed_height))


def label_basins(basins: Basins, rules: Rules, voids: Holes | None = None) -> np.ndarray:
    """The label of each basin, then of each void: 1..n in the raster order of each object's first voxel, 0 for what is
    dropped or stays background. Without ``voids`` only holes inside the mask can be filled."""
    return label_components(basins, rules, components(basins, rules), voids)


def components(basins: Basins, rules: Rules) -> np.ndarray:
    """For each basin a number of its component after all joins, before any is dropped."""
    edges = basins.edges
    root, _ = forest(edges["a"], edges["b"], edges["high"], basins.minimum, *rules.seeds)
    if rules.join_height < 0 or not edges.size:
        return root
    group, first = rank_components(root, basins.first)
    joined = {q: p for p, q, *_ in agglomerate(*borders(edges, group), rules.join_height)}
    into = np.arange(first.size)
    for q in sorted(joined):  # p < q, so p has its root by now
        into[q] = into[joined[q]]
    return into[group]


def label_components(basins: Basins, rules: Rules, component: np.ndarray, voids: Holes | None = None) -> np.ndarray:
    """The label of each basin, then of each void, once components are known."""
    group, first = rank_components(component, basins.first)
    voxels = sum_by_group(basins.voxels, group, first.size)
    keep = voxels >= rules.min_voxels
    if not rules.keep_unseeded:
        keep &= min_by_group(basins.minimum.astype(np.int64), group, first.size) <= rules.seeds[1]
    if voids is not None or (rules.fill_voxels and not keep.all()):
        group, voxels, keep = _without_holes(basins, group, keep, voxels, rules.fill_voxels, voids)
    keep &= voxels <= rules.max_voxels
    return np.where(keep, np.cumsum(keep), 0)[group]


def label_dtype(objects: int) -> str:
    """The dtype that holds that many labels: uint32, or uint64 when there are more than it can count."""
    return "uint32" if objects < 2**32 else "uint64"


# ---------------------------------------------------------------- holes


def _without_holes(
    basins: Basins, group: np.ndarray, keep: np.ndarray, voxels: np.ndarray, most: int, voids: Holes | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Once holes are filled: the group of each basin and then of each void, the groups' voxels and which are kept."""
    count = keep.size
    part = _filled(basins.edges, group, keep, voxels, most)
    component, first, sizes = part[group], basins.first, basins.voxels
    if voids is not None:
        part = _filled(basins.edges, component, keep, sum_by_group(voxels, part, count), most, voids)
        component = np.r_[part[component], part[count:]]
        first, sizes = np.r_[first, voids.first], np.r_[sizes, voids.voxels]
        keep = np.r_[keep, np.zeros(voids.voxels.size, bool)]
    place, first = rank_components(component, first)
    kept = np.zeros(first.size, bool)
    kept[place] = keep[component]
    return place, sum_by_group(sizes, place, first.size), kept


def _filled(
    edges: np.ndarray, group: np.ndarray, keep: np.ndarray, voxels: np.ndarray, most: int, voids: Holes | None = None
) -> np.ndarray:
    """The group that each group, and after them each void, is part of once holes are filled."""
    low, high, *_ = borders(edges, group)
    shut = np.ones(keep.size, bool)
    if voids is not None:
        low, high = np.r_[low, group[voids.contacts[:, 1]]], np.r_[high, keep.size + voids.contacts[:, 0]]
        keep, voxels, shut = (
            np.r_[keep, np.zeros_like(voids.is_open)],
            np.r_[voxels, voids.voxels],
            np.r_[shut, ~voids.is_open],
        )
    dropped = ~keep[low] & ~keep[high]
    hole = connected_components(low[dropped], high[dropped], keep.size)
    rim = keep[low] != keep[high]
    inside, around = np.where(keep[low], high, low)[rim], np.where(keep[low], low, high)[rim]
    pairs = np.unique(np.stack([hole[inside], around]), axis=1)
    holes, touched = np.unique(pairs[0], return_counts=True)
    small = (sum_by_group(voxels, hole, keep.size) <= most) & (min_by_group(shut, hole, keep.size) == 1)
    only = holes[(touched == 1) & small[holes]]
    into = np.arange(keep.size)
    into[only] = pairs[1][np.searchsorted(pairs[0], only)]
    return into[hole]
