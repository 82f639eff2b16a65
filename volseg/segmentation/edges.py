"""Edges."""

from __future__ import annotations

import numpy as np
from numba import njit

EDGE = np.dtype(
    [
        ("a", np.int64),  # regions on the two sides, a < b once they are global
        ("b", np.int64),
        ("high", np.int32),  # the lowest saddle: height and linear index of its higher end, then of its lower end
        ("high_voxel", np.int64),
        ("low", np.int32),
        ("low_voxel", np.int64),
        ("area", np.int64),  # voxel faces in contact: 0 where basins touch by an edge or corner alone (26 neighbors)
        ("height", np.int64),  # sum over those faces of the height of the higher end
    ]
)
SADDLE_ORDER = ("high", "high_voxel", "low", "low_voxel")
SMALL_SORT_ROWS = 1 << 15  # rows that numpy sorts as fast
DIGIT_BITS = 12  # bits


def merge_parallel(edges: np.ndarray) -> np.ndarray:
    """One row for each pair ``a, b``: its lowest saddle and the sums over its contact faces. Sorted by pair."""
    if not edges.size:
        return edges
    edges = edges[np.lexsort([edges[key] for key in (*reversed(SADDLE_ORDER), "b", "a")])]
    fresh = np.r_[True, (edges["a"][1:] != edges["a"][:-1]) | (edges["b"][1:] != edges["b"][:-1])]
    start = np.flatnonzero(fresh)
    out = edges[start]
    for name in ("area", "height"):
        out[name] = np.add.reduceat(edges[name], start)
    return out


# ---------------------------------------------------------------- union-find


@njit(cache=True, nogil=True)
def find(parent, i):
    """The root of ``i``, halving the path on the way (Tarjan and van Leeuwen 1984)."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@njit(cache=True, nogil=True)
def unite(parent, a, b):
    """One set of two; its root is the lower of theirs."""
    a, b = find(parent, a), find(parent, b)
    parent[max(a, b)] = min(a, b)


@njit(cache=True)
def connected_components(a, b, count):
    """The root of each of ``count`` sets after those of ``a`` and ``b`` were united, pair by pair."""
    parent = np.arange(count)
    for e in range(a.size):
        unite(parent, a[e], b[e])
    for n in range(count):
        parent[n] = find(parent, n)
    return parent


# ---------------------------------------------------------------- in place


@njit(cache=True)
def collapse(edges, rows, count):
    """The rows of each pair become one: its lowest saddle and the sums over its faces. Returns how many are left.

    ``rows`` is room for as many positions. Rows are brought together by ``a`` (of ``count`` basins), then by ``b``.
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
def _merge_pairs(edges, rows):
    """Of these rows, all of one ``a``, the lowest of each ``b`` has their areas and heights; the others have area -1."""
    partner = np.empty(rows.size, np.int64)
    for k in range(rows.size):
        partner[k] = edges[rows[k]].b
    by_partner = np.argsort(partner)
    best = np.int64(-1)
    for k in by_partner:
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


@njit(cache=True, nogil=True)
def precedes(e, f):
    """Whether edge ``e`` comes before ``f`` in the total order."""
    if e.high != f.high:
        return e.high < f.high
    if e.high_voxel != f.high_voxel:
        return e.high_voxel < f.high_voxel
    if e.low != f.low:
        return e.low < f.low
    return e.low_voxel < f.low_voxel


@njit(cache=True)
def permute(rows, positions):
    """``rows`` becomes ``rows[positions]`` without a copy; ``positions`` is used up."""
    for first in range(rows.size):
        if positions[first] == first:
            continue
        spare, to = rows[first : first + 1].copy(), first
        while positions[to] != first:
            rows[to] = rows[positions[to]]
            positions[to], to = to, positions[to]
        rows[to] = spare[0]
        positions[to] = to


# ---------------------------------------------------------------- orders


def argsort_saddles(high: np.ndarray, high_at: np.ndarray, low: np.ndarray, low_at: np.ndarray) -> np.ndarray:
    """The positions that bring edges into their total order. Few edges share their higher end, so two columns nearly do.

    >>> argsort_saddles(*np.array([[5, 4, 5], [8, 9, 8], [3, 2, 1], [7, 7, 9]])).tolist()
    [1, 2, 0]
    """
    rows = argsort_rows(high, high_at)
    _settle(rows, high, high_at, low, low_at)
    return rows


@njit(cache=True, nogil=True)
def _settle(rows, high, high_at, low, low_at):
    """Among rows that share their higher end, insertion by the lower end."""
    for i in range(1, rows.size):
        e, j = rows[i], i
        while j > 0:
            f = rows[j - 1]
            if high_at[f] != high_at[e] or high[f] != high[e]:
                break
            if low[f] < low[e] or (low[f] == low[e] and low_at[f] <= low_at[e]):
                break
            rows[j] = f
            j -= 1
        rows[j] = e


def argsort_rows(*columns: np.ndarray) -> np.ndarray:
    """The positions that sort rows by the first column, then by the next ones; equal rows stay as they are.

    Radix sort from the last digit on, for integer columns: a digit that all rows share costs nothing.

    >>> argsort_rows(np.array([2, 1, 2]), np.array([5, 9, 4])).tolist()
    [1, 2, 0]
    """
    size = columns[0].size
    if size < SMALL_SORT_ROWS:
        return np.lexsort(columns[::-1]).astype(index_dtype(size))
    rows, spare = np.arange(size, dtype=index_dtype(size)), np.empty(size, index_dtype(size))
    for column in reversed(columns):
        merge_parallel = column.min()
        for shift in range(0, int(column.max() - merge_parallel).bit_length(), DIGIT_BITS):
            _by_digit(column, merge_parallel, shift, rows, spare)
            rows, spare = spare, rows
    return rows


def index_dtype(size: int) -> type:
    """The dtype that holds positions in so many rows."""
    return np.uint32 if size <= 0xFFFFFFFF else np.int64


@njit(cache=True, nogil=True)
def _by_digit(column, merge_parallel, shift, rows, out):
    mask = (1 << DIGIT_BITS) - 1
    place = np.zeros(mask + 2, np.int64)
    for value in column:
        place[(((np.int64(value) - merge_parallel) >> shift) & mask) + 1] += 1
    for digit in range(mask):
        place[digit + 1] += place[digit]
    for e in rows:
        digit = ((np.int64(column[e]) - merge_parallel) >> shift) & mask
        out[place[digit]] = e
        place[digit] += 1
