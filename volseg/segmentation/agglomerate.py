"""Agglomerate."""

from __future__ import annotations

import heapq

import numpy as np
from numba import njit

from volseg.segmentation.edges import find
from volseg.segmentation.stitch import min_by_group

SEED, UNSEEDED, SHALLOW, APART = 1, 2, 3, 4  # what `forest` did at an edge: why it joined, or that it did not


def rank_components(component: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Components renumbered 0, 1, .. in the raster order of their first voxels, and these.

    >>> rank_components(np.array([7, 3, 7]), np.array([5, 4, 2]))
    (array([0, 1, 0]), array([2, 4]))
    """
    names, group = np.unique(component, return_inverse=True)
    begin = min_by_group(first, group, names.size)
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
    action = np.zeros(a.size, np.int8)
    for e in range(a.size):
        p, q = find(parent, a[e]), find(parent, b[e])
        if p == q:
            continue
        shallow = max(deepest[p], deepest[q])
        if saddle[e] <= level:
            action[e] = SEED
        elif shallow > low:
            action[e] = UNSEEDED
        elif saddle[e] - shallow < persistence:
            action[e] = SHALLOW
        else:
            action[e] = APART
            continue
        top, under = min(p, q), max(p, q)
        parent[under] = top
        deepest[top] = min(deepest[top], deepest[under])
    for i in range(parent.size):
        parent[i] = find(parent, i)
    return parent, action


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
