"""The label of every basin, from the volume's basins and their edges alone: no voxel is read, so it takes seconds.

Kruskal's algorithm over the edges in their total order. Join when the saddle is no higher than the seed level, or when at
most one side holds a seed, which is what reaches down to the low seed level. Where both levels are one, what comes out is the
minimum spanning forest rooted at the connected components of ``height <= seed level`` (Cousty et al. 2009; Zlateski and
Seung, arXiv 1505.00249). The other rules, in this order:

1. persistence: two sides also join when the shallower one is less than that deep below their saddle. Then the roots are
   the seeds that reach so deep below where they meet a deeper one: dynamics (Grimaud 1992), or h-minima.
2. mean: of touching components, those whose whole border has the lowest mean height join first, then the next, while
   that mean is low enough; borders of what has joined are added up.
3. too small, or without a seed: dropped.
4. holes: dropped components that touch each other are one hole; a hole that is small enough and touches exactly one of
   the kept components joins it. Then the same again with the background in it: a hole is now what has no object, dropped
   or outside the mask, connected by voxel faces (or as the mask is, inside the mask), and its background may not reach
   the volume's border. So a cavity that one object encloses becomes part of it.
5. too large: dropped.

All arithmetic is on integers, and ties go to the earlier first voxel, so no cutting into blocks changes anything.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, prod

import numpy as np
from numba import njit

from volseg.config import Config
from volseg.segmentation.fragments import depth_height, seed_height
from volseg.segmentation.holes import Voids, united
from volseg.segmentation.stitch import Basins, add_up, find, least

ANY = np.iinfo(np.int64).max  # no greatest size
SEED, UNSEEDED, SHALLOW, APART = 1, 2, 3, 4  # what `forest` did at an edge: why it joined, or that it did not


@dataclass(frozen=True)
class Rules:
    """What decides about basins, in the units of their tables. `rules` makes it of settings.

    seed_height    the greatest height of a saddle at which seeds are one
    depth          how far below a saddle both sides must reach to stay apart there
    join_height    the greatest mean height of a border that joins its sides; negative for none
    min_voxels, max_voxels   smaller and larger objects are dropped
    fill_voxels    the greatest hole that is filled
    keep_unseeded  whether objects without a seed are kept
    low_height     the greatest height of a seed, where that is above ``seed_height``
    """

    seed_height: int
    depth: int = 0
    join_height: int = -1
    min_voxels: int = 0
    max_voxels: int = ANY
    fill_voxels: int = 0
    keep_unseeded: bool = False
    low_height: int = -1

    @property
    def seeds(self) -> tuple[int, int, int]:
        """What `forest` wants: where seeds are one, what is a seed, and how deep both sides must be.

        Between the two levels a voxel is no side of its own: a side is at least one step deep.
        """
        low = max(self.seed_height, self.low_height)
        return self.seed_height, low, max(self.depth, int(low > self.seed_height))


def rules(config: Config, voxel_size_nm: tuple[float, float, float]) -> Rules:
    """The `Rules` of a run's settings.

    >>> from volseg.config import load
    >>> rules(load(sets=["stitch.min_volume_nm3=80010"]), (5.0, 4.0, 4.0)).min_voxels
    1001
    """
    knobs, of = config.stitch, config.fragments
    voxel_nm3 = prod(Fraction(str(n)) for n in voxel_size_nm)
    return Rules(
        seed_height=seed_height(knobs.seed, of, voxel_size_nm),
        depth=depth_height(knobs.persistence, of, voxel_size_nm),
        join_height=seed_height(knobs.join_mean, of, voxel_size_nm) if knobs.join_mean else -1,
        min_voxels=max(knobs.min_voxels, ceil(Fraction(str(knobs.min_volume_nm3)) / voxel_nm3)),
        max_voxels=knobs.max_voxels or ANY,
        fill_voxels=knobs.fill_holes_voxels,
        keep_unseeded=knobs.keep_unseeded,
        low_height=seed_height(knobs.seed_low, of, voxel_size_nm) if knobs.seed_low else -1,
    )


def decide(basins: Basins, rules: Rules, voids: Voids | None = None) -> np.ndarray:
    """The label of each basin, then of each void: 1..n in the raster order of each object's first voxel, 0 for what is
    dropped or stays background. Without ``voids`` only holes inside the mask can be filled."""
    return labels(basins, rules, components(basins, rules), voids)


def components(basins: Basins, rules: Rules) -> np.ndarray:
    """For each basin a number of its component after all joins, before any is dropped."""
    edges = basins.edges
    root, _ = forest(edges["a"], edges["b"], edges["high"], basins.depth, *rules.seeds)
    if rules.join_height < 0 or not edges.size:
        return root
    group, first = ranked(root, basins.first)
    joined = {q: p for p, q, *_ in agglomerate(*borders(edges, group), rules.join_height)}
    into = np.arange(first.size)
    for q in sorted(joined):  # p < q, so p has its root by now
        into[q] = into[joined[q]]
    return into[group]


def labels(basins: Basins, rules: Rules, component: np.ndarray, voids: Voids | None = None) -> np.ndarray:
    """The label of each basin, then of each void, once components are known."""
    group, first = ranked(component, basins.first)
    voxels = add_up(basins.voxels, group, first.size)
    keep = voxels >= rules.min_voxels
    if not rules.keep_unseeded:
        keep &= least(basins.depth.astype(np.int64), group, first.size) <= rules.seeds[1]
    if voids is not None or (rules.fill_voxels and not keep.all()):
        group, voxels, keep = _without_holes(basins, group, keep, voxels, rules.fill_voxels, voids)
    keep &= voxels <= rules.max_voxels
    return np.where(keep, np.cumsum(keep), 0)[group]


def label_dtype(objects: int) -> str:
    """The dtype that holds that many labels: uint32, or uint64 when there are more than it can count."""
    return "uint32" if objects < 2**32 else "uint64"


def ranked(component: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Components renumbered 0, 1, .. in the raster order of their first voxels, and these.

    >>> ranked(np.array([7, 3, 7]), np.array([5, 4, 2]))
    (array([0, 1, 0]), array([2, 4]))
    """
    names, group = np.unique(component, return_inverse=True)
    begin = least(first, group, names.size)
    order = np.argsort(begin)
    place = np.empty(names.size, np.int64)
    place[order] = np.arange(names.size)
    return place[group], begin[order]


# ---------------------------------------------------------------- seeds


@njit(cache=True)
def forest(a, b, saddle, depth, level, low, persistence):
    """The root of each basin after Kruskal's algorithm over edges given in ascending order, and what each edge did.

    That is 0 where both ends were joined before, or `SEED`, `UNSEEDED`, `SHALLOW`, `APART`. The last three arguments
    are `Rules.seeds`.
    """
    parent, deepest = np.arange(depth.size), depth.astype(np.int64)
    did = np.zeros(a.size, np.int8)
    for e in range(a.size):
        p, q = find(parent, a[e]), find(parent, b[e])
        if p == q:
            continue
        shallow = max(deepest[p], deepest[q])
        if saddle[e] <= level:
            did[e] = SEED
        elif shallow > low:
            did[e] = UNSEEDED
        elif saddle[e] - shallow < persistence:
            did[e] = SHALLOW
        else:
            did[e] = APART
            continue
        top, under = min(p, q), max(p, q)
        parent[under] = top
        deepest[top] = min(deepest[top], deepest[under])
    for i in range(parent.size):
        parent[i] = find(parent, i)
    return parent, did


# ---------------------------------------------------------------- means


def borders(edges: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pairs ``p < q`` of groups that touch: sums of contact area and height, and the row of their lowest saddle.

    Edges come in the total order, ``a`` and ``b`` index ``group``.
    """
    a, b = group[edges["a"]], group[edges["b"]]
    apart = np.flatnonzero(a != b)
    low, high = np.minimum(a, b)[apart], np.maximum(a, b)[apart]
    order = np.lexsort([apart, high, low])
    low, high, row = low[order], high[order], apart[order]
    start = np.flatnonzero(np.r_[True, (low[1:] != low[:-1]) | (high[1:] != high[:-1])][: low.size])
    area, height = (np.add.reduceat(edges[name][row], start) if start.size else row for name in ("area", "height"))
    return low[start], high[start], area, height, row[start]


def agglomerate(
    low: np.ndarray, high: np.ndarray, area: np.ndarray, height: np.ndarray, row: np.ndarray, limit: int
) -> list[tuple[int, int, int, int, int]]:
    """Joins ``(p, q, area, height, row)`` in their order: q becomes part of p, the earlier of the two.

    Arguments are as `borders` gives them. Each time the pair of the lowest mean height joins, of equal ones the first by
    ``(p, q)``, while that mean is at most ``limit``. Only clusters that some border within the limit connects can ever
    join, since the mean of a sum is no lower than the lowest of its parts; all others are left out from the start.
    """
    near: dict[int, dict[int, tuple[int, int, int]]] = {}
    for p, q, n, h, e in _within_reach(low, high, area, height, row, limit):
        near.setdefault(p, {})[q] = near.setdefault(q, {})[p] = (n, h, e)
    waiting = [(_order(*of[q]), p, q) for p, of in near.items() for q in of if p < q and _low(*of[q], limit)]
    heapq.heapify(waiting)
    joins = []
    while waiting:
        mean, p, q = heapq.heappop(waiting)
        border = near.get(p, {}).get(q)
        if border is None or not border[0] or _order(*border) != mean:
            continue
        joins.append((p, q, *border))
        del near[p][q]
        for r, (n, h, e) in near.pop(q).items():
            if r == p:
                continue
            del near[r][q]
            m, g, f = near[p].get(r, (0, 0, e))
            near[p][r] = near[r][p] = both = (m + n, g + h, min(e, f))
            if _low(*both, limit):
                heapq.heappush(waiting, (_order(*both), min(p, r), max(p, r)))
    return joins


def _low(area: int, height: int, _: int, limit: int) -> bool:
    """Whether a border's mean height is within the limit; one of edges and corners alone has none."""
    return area > 0 and height <= limit * area


def _order(area: int, height: int, _: int) -> int:
    """A number that orders means ``height / area`` exactly: two of them differ by more than 2**-126."""
    return (height << 128) // area


def _within_reach(low, high, area, height, row, limit):
    """The borders between clusters that borders within the limit connect, as tuples of Python's integers."""
    size = int(high.max(initial=-1)) + 1
    within = (area > 0) & (height <= limit * area)
    zero = np.zeros(np.count_nonzero(within), np.int64)
    root, _ = forest(low[within], high[within], zero, np.zeros(size, np.int64), 0, 0, 0)
    kept = root[low] == root[high]
    return zip(*(column[kept].tolist() for column in (low, high, area, height, row)), strict=True)


# ---------------------------------------------------------------- holes


def _without_holes(
    basins: Basins, group: np.ndarray, keep: np.ndarray, voxels: np.ndarray, most: int, voids: Voids | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Once holes are filled: the group of each basin and then of each void, the groups' voxels and which are kept."""
    count = keep.size
    part = _filled(basins.edges, group, keep, voxels, most)
    component, first, sizes = part[group], basins.first, basins.voxels
    if voids is not None:
        part = _filled(basins.edges, component, keep, add_up(voxels, part, count), most, voids)
        component = np.r_[part[component], part[count:]]
        first, sizes = np.r_[first, voids.first], np.r_[sizes, voids.voxels]
        keep = np.r_[keep, np.zeros(voids.voxels.size, bool)]
    place, first = ranked(component, first)
    kept = np.zeros(first.size, bool)
    kept[place] = keep[component]
    return place, add_up(sizes, place, first.size), kept


def _filled(
    edges: np.ndarray, group: np.ndarray, keep: np.ndarray, voxels: np.ndarray, most: int, voids: Voids | None = None
) -> np.ndarray:
    """The group that each group, and after them each void, is part of once holes are filled."""
    low, high, *_ = borders(edges, group)
    shut = np.ones(keep.size, bool)
    if voids is not None:
        low, high = np.r_[low, group[voids.rim[:, 1]]], np.r_[high, keep.size + voids.rim[:, 0]]
        keep, voxels, shut = (
            np.r_[keep, np.zeros_like(voids.open)],
            np.r_[voxels, voids.voxels],
            np.r_[shut, ~voids.open],
        )
    dropped = ~keep[low] & ~keep[high]
    hole = united(low[dropped], high[dropped], keep.size)
    rim = keep[low] != keep[high]
    inside, around = np.where(keep[low], high, low)[rim], np.where(keep[low], low, high)[rim]
    pairs = np.unique(np.stack([hole[inside], around]), axis=1)
    holes, touched = np.unique(pairs[0], return_counts=True)
    small = (add_up(voxels, hole, keep.size) <= most) & (least(shut, hole, keep.size) == 1)
    only = holes[(touched == 1) & small[holes]]
    into = np.arange(keep.size)
    into[only] = pairs[1][np.searchsorted(pairs[0], only)]
    return into[hole]
