"""Edges of a graph of regions: their total order, what sorts and merges them, and the union-find that joins along them.

An edge says that two regions touch, and stands for their lowest saddle: the grid edge between their voxels whose higher end
is lowest. Grid edges are ordered by height and linear index of the higher end, then of the lower end. No two of them are
equal, so whatever takes edges in this order, as Kruskal's algorithm does, gives one result however the volume was cut.

Kruskal's algorithm is `argsort_saddles`, then `find` and `unite` for one edge after the other. What lies between the two
differs: `agglomerate.forest` asks for seeds, `hierarchy.contract` for what outer faces leave open. `find`, `unite` and
`precedes` are compiled into the kernels of other modules, whose caches do not notice a change here: clear them after one
(``find . -name '*.nb?' -delete``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

EDGE = np.dtype(
    [
        ("a", np.int64),  # regions on the two sides; a < b once they are numbers of basins
        ("b", np.int64),
        ("high", np.int32),  # the lowest saddle: height and linear index of its higher end, then of its lower end
        ("high_voxel", np.int64),
        ("low", np.int32),
        ("low_voxel", np.int64),
        ("area", np.int64),  # voxel faces in contact; 0 where regions touch by an edge or corner alone (26 neighbors)
        ("height", np.int64),  # sum over those faces of the height of the higher end
    ]
)
SADDLE_ORDER = ("high", "high_voxel", "low", "low_voxel")  # the fields that order edges
UINT32_MAX = 0xFFFFFFFF
SMALL_SORT_ROWS = 1 << 15  # rows that numpy sorts as fast
DIGIT_BITS = 12


def index_dtype(size: int) -> type[np.unsignedinteger] | type[np.signedinteger]:
    """The dtype that holds positions in that many rows."""
    return np.uint32 if size <= UINT32_MAX else np.int64


# ---------------------------------------------------------------- union-find


@njit(cache=True, nogil=True)
def find(parent: np.ndarray, i: int) -> int:
    """The root of ``i``; halves the path to it (Tarjan and van Leeuwen, JACM 1984)."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@njit(cache=True, nogil=True)
def unite(parent: np.ndarray, p: int, q: int) -> tuple[int, int]:
    """Two roots become one: the lower. Returns it, and the one below it now."""
    root, child = min(p, q), max(p, q)
    parent[child] = root
    return root, child


@njit(cache=True)
def connected_components(a: np.ndarray, b: np.ndarray, count: int) -> np.ndarray:
    """The lowest member of the component of each of ``count`` nodes, which edges from ``a`` to ``b`` connect.

    Parameters
    ----------
    a, b
        Integer (n,): nodes from 0.
    count
        How many nodes there are.

    Returns
    -------
    int64 (count,)

    Examples
    --------
    >>> connected_components(np.array([3, 1]), np.array([1, 4]), 5).tolist()
    [0, 1, 2, 1, 1]
    """
    parent = np.arange(count)
    for e in range(a.size):
        unite(parent, find(parent, a[e]), find(parent, b[e]))
    for n in range(count):
        parent[n] = find(parent, n)
    return parent


# ---------------------------------------------------------------- the order of edges


@njit(cache=True, nogil=True)
def precedes(e: Any, f: Any) -> bool:
    """Whether row ``e`` comes before row ``f`` in the total order of edges."""
    if e.high != f.high:
        return e.high < f.high
    if e.high_voxel != f.high_voxel:
        return e.high_voxel < f.high_voxel
    if e.low != f.low:
        return e.low < f.low
    return e.low_voxel < f.low_voxel


def argsort_saddles(high: np.ndarray, high_voxel: np.ndarray, low: np.ndarray, low_voxel: np.ndarray) -> np.ndarray:
    """The positions that bring edges into their total order.

    Few edges share their higher end, so sorting by that does nearly all of the work.

    Parameters
    ----------
    high, high_voxel, low, low_voxel
        Integer (n,): the columns of `SADDLE_ORDER`.

    Returns
    -------
    `index_dtype` (n,)

    Examples
    --------
    >>> argsort_saddles(*np.array([[5, 4, 5], [8, 9, 8], [3, 2, 1], [7, 7, 9]])).tolist()
    [1, 2, 0]
    """
    rows = argsort_rows(high, high_voxel)
    _sort_ties(rows, high, high_voxel, low, low_voxel)
    return rows


@njit(cache=True, nogil=True)
def _sort_ties(
    rows: np.ndarray, high: np.ndarray, high_voxel: np.ndarray, low: np.ndarray, low_voxel: np.ndarray
) -> None:
    """Among rows that share their higher end, insertion by the lower end."""
    for i in range(1, rows.size):
        e, j = rows[i], i
        while j > 0:
            f = rows[j - 1]
            if high_voxel[f] != high_voxel[e] or high[f] != high[e]:
                break
            if low[f] < low[e] or (low[f] == low[e] and low_voxel[f] <= low_voxel[e]):
                break
            rows[j] = f
            j -= 1
        rows[j] = e


def argsort_rows(*columns: np.ndarray) -> np.ndarray:
    """The positions that sort rows by the first column, then by the next ones; equal rows stay as they are.

    A radix sort from the last digit on (LSD) of integer columns. A digit that all rows share costs nothing.

    Parameters
    ----------
    columns
        Integer (n,) each.

    Returns
    -------
    `index_dtype` (n,), equal to ``numpy.lexsort(columns[::-1])``

    Examples
    --------
    >>> argsort_rows(np.array([2, 1, 2]), np.array([5, 9, 4])).tolist()
    [1, 2, 0]
    """
    size = columns[0].size
    if size < SMALL_SORT_ROWS:
        return np.lexsort(columns[::-1]).astype(index_dtype(size))
    rows, spare = np.arange(size, dtype=index_dtype(size)), np.empty(size, index_dtype(size))
    for column in reversed(columns):
        lowest = column.min()
        for shift in range(0, int(column.max() - lowest).bit_length(), DIGIT_BITS):
            _sort_digit(column, lowest, shift, rows, spare)
            rows, spare = spare, rows
    return rows


@njit(cache=True, nogil=True)
def _sort_digit(column: np.ndarray, lowest: int, shift: int, rows: np.ndarray, out: np.ndarray) -> None:
    """``out`` has ``rows`` in the order of one digit of ``column``; equal ones stay in theirs."""
    mask = (1 << DIGIT_BITS) - 1
    place = np.zeros(mask + 2, np.int64)
    for value in column:
        place[(((np.int64(value) - lowest) >> shift) & mask) + 1] += 1
    for k in range(mask):
        place[k + 1] += place[k]
    for e in rows:
        digit = ((np.int64(column[e]) - lowest) >> shift) & mask
        out[place[digit]] = e
        place[digit] += 1


# ---------------------------------------------------------------- one edge for each pair


def merge_parallel(edges: np.ndarray) -> np.ndarray:
    """One edge for each pair ``a, b``: its lowest saddle, and the sums over all its contact faces.

    Parameters
    ----------
    edges
        EDGE (n,).

    Returns
    -------
    EDGE (at most n,), sorted by pair

    Examples
    --------
    Two regions that touch over two faces, at 7 and at 5, have one edge at 5:

    >>> edges = np.zeros(2, EDGE)
    >>> edges["a"], edges["b"], edges["high"], edges["area"], edges["height"] = 1, 2, [7, 5], 1, [7, 5]
    >>> merge_parallel(edges)[["a", "b", "high", "area", "height"]].tolist()
    [(1, 2, 5, 2, 12)]
    """
    if not edges.size:
        return edges
    edges = edges[np.lexsort([edges[field] for field in (*reversed(SADDLE_ORDER), "b", "a")])]
    is_first = np.r_[True, (edges["a"][1:] != edges["a"][:-1]) | (edges["b"][1:] != edges["b"][:-1])]
    start = np.flatnonzero(is_first)
    merged = edges[start]
    for field in ("area", "height"):
        merged[field] = np.add.reduceat(edges[field], start)
    return merged


# A counting sort by ``a`` brings the edges of one basin together, and a sort by ``b`` those of one pair. Only positions are
# moved: an edge is 56 bytes, and there may be billions. The rows of a pair that lose are marked by area -1, and left out in
# the end. Invariant: before a basin's turn its rows are as they came; after it, each of its pairs has one row of area >= 0.
@njit(cache=True)
def collapse(edges: np.ndarray, rows: np.ndarray, count: int) -> int:
    """`merge_parallel` in place, for edges from ``count`` basins. Returns how many are left, at the front, in any order.

    ``rows`` is room for as many positions as there are edges.
    """
    start = np.zeros(count + 1, np.int64)
    for e in range(edges.size):
        start[edges[e].a + 1] += 1
    for a in range(count):
        start[a + 1] += start[a]
    place = start[:-1].copy()
    for e in range(edges.size):
        rows[place[edges[e].a]] = e
        place[edges[e].a] += 1
    for a in range(count):
        _merge_pairs(edges, rows[start[a] : start[a + 1]])
    used = 0
    for e in range(edges.size):
        if edges[e].area >= 0:
            edges[used] = edges[e]
            used += 1
    return used


@njit(cache=True)
def _merge_pairs(edges: np.ndarray, rows: np.ndarray) -> None:
    """Of these rows, all of one ``a``, the lowest of each ``b`` has their areas and heights; the others have area -1."""
    partner = np.empty(rows.size, np.int64)
    for k in range(rows.size):
        partner[k] = edges[rows[k]].b
    _heapsort(partner, rows)
    best = np.int64(-1)
    for k in range(rows.size):
        e = np.int64(rows[k])
        if best < 0 or edges[best].b != edges[e].b:
            best = e
            continue
        worse = e
        if precedes(edges[e], edges[best]):
            best, worse = e, best
        edges[best].area += edges[worse].area
        edges[best].height += edges[worse].height
        edges[worse].area = -1


# numba's own sort takes three seconds to compile on each new machine; most basins have few edges.
@njit(cache=True)
def _heapsort(values: np.ndarray, rows: np.ndarray) -> None:
    """``values`` ascend, and ``rows`` have gone with them."""
    for top in range(values.size // 2 - 1, -1, -1):
        _sift(values, rows, top, values.size)
    for last in range(values.size - 1, 0, -1):
        values[0], values[last] = values[last], values[0]
        rows[0], rows[last] = rows[last], rows[0]
        _sift(values, rows, 0, last)


@njit(cache=True)
def _sift(values: np.ndarray, rows: np.ndarray, top: int, size: int) -> None:
    """The heap of the first ``size`` values is one again, where only the one at ``top`` may be too small."""
    value, row = values[top], rows[top]
    child = 2 * top + 1
    while child < size:
        if child + 1 < size and values[child + 1] > values[child]:
            child += 1
        if values[child] <= value:
            break
        values[top], rows[top] = values[child], rows[child]
        top, child = child, 2 * child + 1
    values[top], rows[top] = value, row


@njit(cache=True)
def permute(rows: np.ndarray, positions: np.ndarray) -> None:
    """``rows`` becomes ``rows[positions]`` without a copy, cycle by cycle; ``positions`` is used up."""
    for first in range(rows.size):
        if positions[first] == first:
            continue
        spare, target = rows[first : first + 1].copy(), first
        while positions[target] != first:
            rows[target] = rows[positions[target]]
            positions[target], target = target, positions[target]
        rows[target] = spare[0]
        positions[target] = target
