"""The label of every basin, from the volume's basins and their edges alone: no voxel is read, so it takes seconds.

The rules, in this order:

1. seeds: basins join along the minimum spanning forest, where a saddle is no higher than the seed level or where at most one
   side holds a seed (`agglomerate.forest`). A seed reaches down to the low seed level.
2. persistence: two sides also join when the shallower one is less than that deep below their saddle.
3. mean: of touching components, those whose whole border has the lowest mean height join first, then the next, while
   that mean is low enough; borders of what has joined are added up (`agglomerate.agglomerate`).
4. too small, or without a seed: dropped. What a face of the volume cuts may count for more: beyond the face, it is taken to
   go on as the cube on its cut.
5. holes: dropped components that touch each other are one hole; a hole that is small enough and touches exactly one of
   the labeled components joins it. Then the same again with the background in it: a hole is now what has no object, dropped
   or outside the mask, connected by voxel faces (or as the mask is, inside the mask), and its background may not reach
   the volume's border. So a cavity that one object encloses becomes part of it.
6. too large: dropped.

Corrections, where there are some, change what rules 1 to 3 made (`constraints`); what they name is an object, whatever
rules 4 and 6 say.

All arithmetic is on integers, and ties go to the earlier first voxel, so no cutting into blocks changes anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, gcd, prod

import numpy as np

from volseg.box import VoxelSize
from volseg.config import Config
from volseg.segmentation.agglomerate import APART, agglomerate, borders, forest, rank_components
from volseg.segmentation.constraints import Constraints, replay
from volseg.segmentation.edges import connected_components
from volseg.segmentation.heights import height_difference, seed_height
from volseg.segmentation.holes import Holes
from volseg.segmentation.stitch import Basins, min_by_group, sum_by_group

NO_LIMIT = np.iinfo(np.int64).max  # voxels: no object is too large


@dataclass(frozen=True)
class Rules:
    """What decides about basins, in the units of their tables: heights and voxels.

    Attributes
    ----------
    seed_height
        Greatest height of a saddle at which seeds are one.
    persistence
        How far below a saddle both sides must reach to stay apart there.
    join_height
        Greatest mean height of a border that joins its sides; negative for none.
    min_voxels, max_voxels
        Smaller and larger objects are dropped.
    fill_voxels
        Greatest hole that is filled.
    keep_unseeded
        Whether objects without a seed are labeled.
    low_height
        Greatest height of a seed, where that is above ``seed_height``.
    cut_weights, voxel_weight
        Areas of a voxel's sides across z, y and x, and its volume, where what the volume's faces cut counts for more; else
        areas are 0.
    """

    seed_height: int
    persistence: int = 0
    join_height: int = -1
    min_voxels: int = 0
    max_voxels: int = NO_LIMIT
    fill_voxels: int = 0
    keep_unseeded: bool = False
    low_height: int = -1
    cut_weights: tuple[int, int, int] = (0, 0, 0)
    voxel_weight: int = 1

    @classmethod
    def from_config(cls, config: Config, voxel_size_nm: VoxelSize) -> Rules:
        """The rules of a run's settings.

        Parameters
        ----------
        config
            Its sections ``[stitch]`` and ``[fragments]`` are looked at.
        voxel_size_nm
            Size of a voxel along z y x.

        Raises
        ------
        UserError
            As `heights.distance_unit` does.

        Examples
        --------
        >>> from volseg.config import load
        >>> Rules.from_config(load(sets=["stitch.min_volume_nm3=80010"]), (5.0, 4.0, 4.0)).min_voxels
        1001
        """
        stitch, fragments = config.stitch, config.fragments
        voxel_nm3 = prod(Fraction(str(n)) for n in voxel_size_nm)
        weights, voxel_weight = cut_weights(voxel_size_nm) if stitch.count_cut else ((0, 0, 0), 1)
        return cls(
            seed_height=seed_height(stitch.seed, fragments, voxel_size_nm),
            persistence=height_difference(stitch.persistence, fragments, voxel_size_nm),
            join_height=seed_height(stitch.join_mean, fragments, voxel_size_nm) if stitch.join_mean else -1,
            min_voxels=max(stitch.min_voxels, ceil(Fraction(str(stitch.min_volume_nm3)) / voxel_nm3)),
            max_voxels=stitch.max_voxels or NO_LIMIT,
            fill_voxels=stitch.fill_holes_voxels,
            keep_unseeded=stitch.keep_unseeded,
            low_height=seed_height(stitch.seed_low, fragments, voxel_size_nm) if stitch.seed_low else -1,
            cut_weights=weights,
            voxel_weight=voxel_weight,
        )

    @property
    def seeds(self) -> tuple[int, int, int]:
        """The last arguments of `forest`: where seeds are one, what is a seed, and how deep both sides must be.

        Between the two levels a voxel is no side of its own: a side is at least one step deep.
        """
        low = max(self.seed_height, self.low_height)
        return self.seed_height, low, max(self.persistence, int(low > self.seed_height))

    def is_large(self, voxels: np.ndarray, cut: np.ndarray) -> np.ndarray:
        """Which objects are not too small; bool (n,).

        Parameters
        ----------
        voxels
            int64 (n,): of each object.
        cut
            int64 (n, 3): those of them on the volume's faces across z, y and x.

        Examples
        --------
        Of a cube of 1000 voxels a face may leave 500. The cut has 100, and the cube on it 1000.

        >>> half = np.array([500]), np.array([[100, 0, 0]])
        >>> Rules(0, min_voxels=600).is_large(*half), Rules(0, min_voxels=600, cut_weights=(1, 1, 1)).is_large(*half)
        (array([False]), array([ True]))
        """
        missing = np.maximum(self.min_voxels - voxels, 0) * float(self.voxel_weight)
        area = (cut @ np.array(self.cut_weights)).astype(float)  # of whole numbers: no order of adding changes it
        return missing * missing <= area * area * area


def cut_weights(voxel_size_nm: VoxelSize) -> tuple[tuple[int, int, int], int]:
    """`Rules.cut_weights` and `Rules.voxel_weight`: areas of a voxel's sides and its volume, in whole numbers.

    The unit is a hundredth of the shortest edge, or the longest that divides all three.

    >>> cut_weights((5.0, 5.0, 5.0)), cut_weights((25.0, 5.0, 5.0)), cut_weights((50.0, 4.6, 4.6))
    (((1, 1, 1), 1), ((1, 5, 5), 5), ((10000, 108700, 108700), 10870000))
    """
    edges = [round(100 * n / min(voxel_size_nm)) for n in voxel_size_nm]
    z, y, x = (n // gcd(*edges) for n in edges)
    return (y * x, z * x, z * y), z * y * x


def label_basins(
    basins: Basins, rules: Rules, holes: Holes | None = None, constraints: Constraints | None = None
) -> np.ndarray:
    """The label of each basin, and after them of each hole.

    Parameters
    ----------
    basins
        The volume's basins.
    rules
        What decides.
    holes
        The volume's holes; without them only dropped pieces inside the mask can be filled.
    constraints
        Corrections, by numbers of basins.

    Returns
    -------
    int64 (basins + holes,)
        1..n in the raster order of each object's first voxel; 0 for what is dropped or stays background.

    Examples
    --------
    Three basins in a row, with saddles 9 and 7 between them. At seed level 3 the last (5) holds no seed.

    >>> from volseg.segmentation.edges import EDGE
    >>> edges = np.zeros(2, EDGE)
    >>> edges["a"], edges["b"], edges["high"] = [1, 0], [2, 1], [7, 9]
    >>> voxels, first = np.array([4, 3, 2]), np.array([0, 4, 7])
    >>> basins = Basins(np.array([0, 1, 5], np.int32), voxels, first, 255 * voxels, np.zeros((3, 3), np.int64), edges)
    >>> label_basins(basins, Rules(3)).tolist(), label_basins(basins, Rules(9)).tolist()
    ([1, 2, 2], [1, 1, 1])
    >>> label_basins(basins, Rules(3, min_voxels=5)).tolist()
    [0, 1, 1]
    """
    return label_components(basins, rules, components(basins, rules, constraints), holes, constraints)


def components(basins: Basins, rules: Rules, constraints: Constraints | None = None) -> np.ndarray:
    """For each basin a number of its component after all joins, before any is dropped; int64 (basins,)."""
    edges = basins.edges
    root, action = forest(edges["a"], edges["b"], edges["high"], basins.minimum, *rules.seeds)
    joins: list[tuple[int, int, int, int, int]] = []
    group, first = root, basins.first
    if rules.join_height >= 0 and edges.size:
        group, first = rank_components(root, basins.first)
        joins = agglomerate(*borders(edges, group), rules.join_height)
    if constraints is not None:
        rows = np.r_[np.flatnonzero((action > 0) & (action < APART)), np.array([join[-1] for join in joins], np.int64)]
        return replay(edges["a"][rows], edges["b"][rows], basins.minimum.size, constraints)
    if not joins:
        return root
    absorbed_by = {q: p for p, q, *_ in joins}
    target = np.arange(first.size)
    for q in sorted(absorbed_by):  # p < q, so p has its root by now
        target[q] = target[absorbed_by[q]]
    return target[group]


def label_components(
    basins: Basins,
    rules: Rules,
    component: np.ndarray,
    holes: Holes | None = None,
    constraints: Constraints | None = None,
) -> np.ndarray:
    """`label_basins`, where ``component`` is what `components` gave for rules that join alike."""
    named = np.empty(0, np.int64) if constraints is None else constraints.named
    group, first = rank_components(component, basins.first)
    voxels = sum_by_group(basins.voxels, group, first.size)
    labeled = rules.is_large(voxels, sum_by_group(basins.cut, group, first.size))
    if not rules.keep_unseeded:
        labeled &= min_by_group(basins.minimum.astype(np.int64), group, first.size) <= rules.seeds[1]
    labeled[group[named]] = True
    if holes is not None or (rules.fill_voxels and not labeled.all()):
        group, voxels, labeled = _fill_holes(basins, group, labeled, voxels, rules.fill_voxels, holes)
    labeled &= voxels <= rules.max_voxels
    labeled[group[named]] = True
    return np.where(labeled, np.cumsum(labeled), 0)[group]


def label_dtype(objects: int) -> str:
    """The dtype that holds that many labels: uint32, or uint64 when there are more than it can count."""
    return "uint32" if objects < 2**32 else "uint64"


# ---------------------------------------------------------------- holes


def _fill_holes(
    basins: Basins, group: np.ndarray, labeled: np.ndarray, voxels: np.ndarray, max_voxels: int, holes: Holes | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Once holes are filled: the group of each basin and then of each hole, the groups' voxels, and which are labeled."""
    count = labeled.size
    target = _fill_targets(basins.edges, group, labeled, voxels, max_voxels)
    component, first, sizes = target[group], basins.first, basins.voxels
    if holes is not None:
        filled_voxels = sum_by_group(voxels, target, count)
        target = _fill_targets(basins.edges, component, labeled, filled_voxels, max_voxels, holes)
        component = np.r_[target[component], target[count:]]
        first, sizes = np.r_[first, holes.first], np.r_[sizes, holes.voxels]
        labeled = np.r_[labeled, np.zeros(holes.voxels.size, bool)]
    rank, first = rank_components(component, first)
    rank_labeled = np.zeros(first.size, bool)
    rank_labeled[rank] = labeled[component]
    return rank, sum_by_group(sizes, rank, first.size), rank_labeled


def _fill_targets(
    edges: np.ndarray,
    group: np.ndarray,
    labeled: np.ndarray,
    voxels: np.ndarray,
    max_voxels: int,
    holes: Holes | None = None,
) -> np.ndarray:
    """The group that each group, and after them each hole, is part of once holes are filled."""
    low, high, *_ = borders(edges, group)
    is_closed = np.ones(labeled.size, bool)
    if holes is not None:
        low, high = np.r_[low, group[holes.contacts[:, 1]]], np.r_[high, labeled.size + holes.contacts[:, 0]]
        labeled, voxels = np.r_[labeled, np.zeros_like(holes.is_open)], np.r_[voxels, holes.voxels]
        is_closed = np.r_[is_closed, ~holes.is_open]
    count = labeled.size
    dropped = ~labeled[low] & ~labeled[high]
    hole = connected_components(low[dropped], high[dropped], count)
    rim = labeled[low] != labeled[high]
    inside, outside = np.where(labeled[low], high, low)[rim], np.where(labeled[low], low, high)[rim]
    pairs = np.unique(np.stack([hole[inside], outside]), axis=1)
    rim_holes, touched = np.unique(pairs[0], return_counts=True)
    fillable = (sum_by_group(voxels, hole, count) <= max_voxels) & (min_by_group(is_closed, hole, count) == 1)
    enclosed = rim_holes[(touched == 1) & fillable[rim_holes]]
    target = np.arange(count)
    target[enclosed] = pairs[1][np.searchsorted(pairs[0], enclosed)]
    return target[hole]
