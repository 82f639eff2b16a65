"""Join basins into objects: by seeds along the minimum spanning forest, then by the mean height of whole borders.

`forest` is Kruskal's algorithm with the rules on seeds; `agglomerate` joins, again and again, the two objects whose border
has the lowest mean. Both take edges in a total order and compute on integers, so no cutting into blocks changes anything.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np
from numba import njit

from volseg.segmentation.edges import connected_components, find, unite
from volseg.segmentation.stitch import min_by_group

SEED, UNSEEDED, SHALLOW, APART = 1, 2, 3, 4  # what `forest` did at an edge: why it joined, or that it did not


def rank_components(component: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Components renumbered 0, 1, .. in the raster order of their first voxels, and these voxels.

    Parameters
    ----------
    component
        Integer (n,): any number of the component of each basin.
    first
        int64 (n,): each basin's first voxel (linear index).

    Returns
    -------
    rank
        int64 (n,)
    first
        int64 (components,), ascending

    Examples
    --------
    >>> rank_components(np.array([7, 3, 7]), np.array([5, 4, 2]))
    (array([0, 1, 0]), array([2, 4]))
    """
    ids, group = np.unique(component, return_inverse=True)
    group_first = min_by_group(first, group, ids.size)
    order = np.argsort(group_first)
    rank = np.empty(ids.size, np.int64)
    rank[order] = np.arange(ids.size)
    return rank[group], group_first[order]


# ---------------------------------------------------------------- seeds


# Edges are taken in ascending order. Of each component is known how deep it reaches; whether it holds a seed follows from
# that. Invariant: before edge e, components are those of the joins among all lower edges.
@njit(cache=True)
def forest(
    a: np.ndarray, b: np.ndarray, saddle: np.ndarray, minimum: np.ndarray, level: int, low: int, persistence: int
) -> tuple[np.ndarray, np.ndarray]:
    """Kruskal's algorithm with seeds: the watershed cut where ``level`` is ``low`` and ``persistence`` 0.

    An edge joins its sides where its saddle is at most ``level``, where a side holds no seed, or where the shallower side is
    less than ``persistence`` deep below the saddle. With the first two rules alone the result is the minimum spanning
    forest rooted at the connected components of ``height <= level`` (Cousty et al., PAMI 2009; Zlateski and Seung, arXiv
    1505.00249). The third is dynamics (Grimaud 1992), or h-minima.

    Parameters
    ----------
    a, b, saddle
        Integer (edges,): the basins on both sides and the height of the saddle, in the total order of edges.
    minimum
        int32 (basins,): height at the minimum.
    level, low, persistence
        `rules.Rules.seeds`: heights up to which seeds are one, and up to which a voxel is a seed; difference of heights.

    Returns
    -------
    root
        int64 (basins,): the lowest basin of the component.
    action
        int8 (edges,): 0 where both sides were joined before, or `SEED`, `UNSEEDED`, `SHALLOW`, `APART`.

    Examples
    --------
    Two seeds (0 and 1) apart at 9; the basin at 5 has no seed up to 3, and joins the side with the lower saddle.

    >>> a, b, saddle = np.array([1, 0]), np.array([2, 1]), np.array([7, 9])
    >>> forest(a, b, saddle, np.array([0, 1, 5]), 3, 3, 0)
    (array([0, 1, 1]), array([2, 4], dtype=int8))
    """
    parent, deepest = np.arange(minimum.size), minimum.astype(np.int64)
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
        root, child = unite(parent, p, q)
        deepest[root] = min(deepest[root], deepest[child])
    for i in range(parent.size):
        parent[i] = find(parent, i)
    return parent, action


# ---------------------------------------------------------------- means


def borders(edges: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The borders between groups of basins: one for each pair that touches.

    Parameters
    ----------
    edges
        EDGE between basins, in the total order.
    group
        int64 (basins,): the group (from 0) of each.

    Returns
    -------
    low, high
        int64 (borders,): the two groups, ``low < high``, sorted.
    area, height
        int64 (borders,): sums over their edges, as in EDGE.
    row
        int64 (borders,): the row in ``edges`` of their lowest saddle.
    """
    a, b = group[edges["a"]], group[edges["b"]]
    apart = np.flatnonzero(a != b)
    low, high = np.minimum(a, b)[apart], np.maximum(a, b)[apart]
    order = np.lexsort([apart, high, low])
    low, high, row = low[order], high[order], apart[order]
    start = np.flatnonzero(np.r_[True, (low[1:] != low[:-1]) | (high[1:] != high[:-1])][: low.size])
    area, height = (np.add.reduceat(edges[field][row], start) if start.size else row for field in ("area", "height"))
    return low[start], high[start], area, height, row[start]


def agglomerate(
    low: np.ndarray, high: np.ndarray, area: np.ndarray, height: np.ndarray, row: np.ndarray, limit: int
) -> list[tuple[int, int, int, int, int]]:
    """The joins of hierarchical agglomeration by mean border height, in their order.

    Each time the pair of the lowest mean joins, of equal ones the first by ``(p, q)``, while that mean is at most ``limit``;
    borders of what has joined are added up. Only clusters that some border within the limit connects can ever join, since
    the mean of a sum is no lower than the lowest of its parts: all others are left out from the start.

    Parameters
    ----------
    low, high, area, height, row
        As `borders` gives them.
    limit
        Greatest mean height of a border that joins.

    Returns
    -------
    list of ``(p, q, area, height, row)``
        q becomes part of p, the earlier of the two, over a border of this area, sum of heights and lowest saddle.

    Examples
    --------
    Three groups in a ring. 0 and 1 touch over 2 faces of mean 4, 1 and 2 over one of 6, 0 and 2 over one of 9. Once 0 and 1
    are one, their border with 2 has the mean (6 + 9) / 2.

    >>> ring = [np.array(column) for column in ([0, 0, 1], [1, 2, 2], [2, 1, 1], [8, 9, 6], [0, 2, 1])]
    >>> agglomerate(*ring, limit=7)
    [(0, 1, 2, 8, 0)]
    >>> agglomerate(*ring, limit=8)
    [(0, 1, 2, 8, 0), (0, 2, 2, 15, 1)]
    """
    neighbors: dict[int, dict[int, tuple[int, int, int]]] = {}
    for p, q, n, h, e in _within_reach(low, high, area, height, row, limit):
        neighbors.setdefault(p, {})[q] = neighbors.setdefault(q, {})[p] = (n, h, e)
    queue = [
        (_exact_mean(n, h), p, q)
        for p, others in neighbors.items()
        for q, (n, h, _) in others.items()
        if p < q and _is_within(n, h, limit)
    ]
    heapq.heapify(queue)
    joins = []
    while queue:
        mean, p, q = heapq.heappop(queue)
        border = neighbors.get(p, {}).get(q)
        if border is None or not border[0] or _exact_mean(*border[:2]) != mean:
            continue  # one side has joined another since
        joins.append((p, q, *border))
        del neighbors[p][q]
        for r, (n, h, e) in neighbors.pop(q).items():
            if r == p:
                continue
            del neighbors[r][q]
            m, g, f = neighbors[p].get(r, (0, 0, e))
            neighbors[p][r] = neighbors[r][p] = (m + n, g + h, min(e, f))
            if _is_within(m + n, g + h, limit):
                heapq.heappush(queue, (_exact_mean(m + n, g + h), min(p, r), max(p, r)))
    return joins


def _is_within(area: int, height: int, limit: int) -> bool:
    """Whether a border's mean height is within the limit; one of edges and corners alone has none."""
    return area > 0 and height <= limit * area


def _exact_mean(area: int, height: int) -> int:
    """A number that orders means ``height / area`` exactly: two of them differ by more than 2**-126."""
    return (height << 128) // area


def _within_reach(
    low: np.ndarray, high: np.ndarray, area: np.ndarray, height: np.ndarray, row: np.ndarray, limit: int
) -> Iterator[tuple[int, ...]]:
    """The borders inside clusters that borders within the limit connect, as tuples of Python's integers."""
    size = int(high.max(initial=-1)) + 1
    within = (area > 0) & (height <= limit * area)
    root = connected_components(low[within], high[within], size)
    inside = root[low] == root[high]
    return zip(*(column[inside].tolist() for column in (low, high, area, height, row)), strict=True)
