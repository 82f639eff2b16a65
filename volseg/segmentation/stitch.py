"""Join the regions of all blocks into the basins of the volume, from their tables alone.

Written as numbered steps:

1. `link`: a block's exits and crossing edges, which name voxels of the next block, come to name that block's regions.
2. `gather`: follow exits to true basins (descents end, so this ends), add up what each basin has, keep the lowest saddle
   of each pair that touches.

What becomes of the basins is up to `decide`.

A region is named ``block << 32 | region``. Minimum and integer sums are associative and commutative, so neither the
order of blocks nor a block told twice as links changes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numba import njit

from volseg.box import Blocks
from volseg.segmentation.fragments import EDGE, KEY, Table

LOCAL = 0xFFFFFFFF  # the part of a name that is the region
_FEW = 1 << 15  # rows that numpy sorts as fast
_DIGIT = 12  # bits


@dataclass(frozen=True)
class Links:
    """What a block's faces say once its neighbors are known.

    drains  int64 (n, 2): each exit region, and the neighbor's region that it drains into
    edges   EDGE rows between this block's regions and those of blocks ahead
    """

    drains: np.ndarray
    edges: np.ndarray


@dataclass(frozen=True)
class Basins:
    """The whole volume's basins and how they touch: enough for every later decision.

    depth, voxels, first, mass   per basin, as in `Table`, now complete
    edges    EDGE rows, ``a < b`` basin numbers from 0, one for each pair that touches, in the total order of edges
    """

    depth: np.ndarray
    voxels: np.ndarray
    first: np.ndarray
    mass: np.ndarray
    edges: np.ndarray


def name(block: int, region: np.ndarray) -> np.ndarray:
    """Names, unique in the volume, of a block's regions."""
    return (np.int64(block) << 32) | np.asarray(region, np.int64)


def lowest(edges: np.ndarray) -> np.ndarray:
    """One row for each pair ``a, b``: its lowest saddle and the sums over its contact faces. Sorted by pair."""
    if not edges.size:
        return edges
    edges = edges[np.lexsort([edges[key] for key in (*reversed(KEY), "b", "a")])]
    fresh = np.r_[True, (edges["a"][1:] != edges["a"][:-1]) | (edges["b"][1:] != edges["b"][:-1])]
    start = np.flatnonzero(fresh)
    out = edges[start]
    for name in ("area", "height"):
        out[name] = np.add.reduceat(edges[name], start)
    return out


# ---------------------------------------------------------------- 1


def link(i: int, table_of: Callable[[int], Table], grid: Blocks) -> Links:
    """The `Links` of block ``i``. ``table_of`` gives the table of ``i`` and of all blocks that touch it."""
    own = table_of(i)
    exits = np.flatnonzero(own.is_exit)
    drains = np.stack([name(i, exits + 1), _regions_at(own.root[exits], table_of, grid)], axis=1)
    edges = own.crossing.copy()
    edges["a"] = name(i, own.crossing["a"])
    edges["b"] = _regions_at(own.crossing["b"], table_of, grid)
    return Links(drains, lowest(edges))


def _regions_at(voxels: np.ndarray, table_of: Callable[[int], Table], grid: Blocks) -> np.ndarray:
    """Names of the regions that hold these face voxels of other blocks (linear indices)."""
    out = np.empty(voxels.size, np.int64)
    place = np.unravel_index(voxels, grid.shape)
    block = np.ravel_multi_index([p // b for p, b in zip(place, grid.block, strict=True)], grid.counts)
    for j in np.unique(block):
        here = block == j
        table = table_of(int(j))
        row = np.searchsorted(table.face_at, voxels[here])
        if table.face_at.size == 0 or np.any(table.face_at[np.minimum(row, table.face_at.size - 1)] != voxels[here]):
            raise RuntimeError(f"blocks disagree on the mask at the face of block {j}: its table is of another run")
        out[here] = name(int(j), table.face_of[row])
    return out


# ---------------------------------------------------------------- 2


def gather(tables: Iterable[Table], links: Iterable[Links]) -> tuple[Basins, list[np.ndarray]]:
    """The volume's `Basins`, and for each block the basin (from 0) of each of its regions.

    Tables and links come in the order of blocks and are taken one at a time. Of all edges there is only one copy, which
    is renamed, collapsed and sorted where it lies.
    """
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("depth", "voxels", "first", "mass")}
    drains, edges = [np.empty((0, 2), np.int64)], _Pile()
    for i, (table, link) in enumerate(zip(tables, links, strict=True)):
        for field, column in columns.items():
            column.append(getattr(table, field))
        drains.append(link.drains)
        edges.add(_named(table.edges, i))
        edges.add(link.edges)
    offset = np.cumsum([0, *(depth.size for depth in columns["depth"])])
    basin, is_basin = _true_basins(np.concatenate(drains), offset)
    count = int(np.count_nonzero(is_basin))
    basins = Basins(
        depth=_all(columns, "depth", np.int32)[is_basin],
        voxels=add_up(_all(columns, "voxels"), basin, count),
        first=least(_all(columns, "first"), basin, count),
        mass=add_up(_all(columns, "mass"), basin, count),
        edges=_between(edges.done(), basin, offset, count),
    )
    return basins, np.split(basin, offset[1:-1])


class _Pile:
    """EDGE rows that grow in place: their memory is made longer, as a rule without a copy."""

    def __init__(self) -> None:
        self.rows, self.used = np.empty(0, EDGE), 0

    def add(self, more: np.ndarray) -> None:
        end = self.used + more.size
        if end > self.rows.size:
            self.rows.resize(end + max(1 << 12, end >> 4), refcheck=False)
        self.rows[self.used : end] = more
        self.used = end

    def done(self) -> np.ndarray:
        self.rows.resize(self.used, refcheck=False)
        return self.rows


def _named(edges: np.ndarray, block: int) -> np.ndarray:
    out = edges.copy()
    out["a"], out["b"] = name(block, edges["a"]), name(block, edges["b"])
    return out


def _true_basins(drains: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The basin (from 0) of every region, block after block, and which regions hold a basin's minimum."""
    parent = np.arange(offset[-1])
    parent[_dense(drains[:, 0], offset)] = _dense(drains[:, 1], offset)
    is_basin = parent == np.arange(parent.size)
    _to_the_end(parent)
    return (np.cumsum(is_basin) - 1)[parent], is_basin


def _dense(names: np.ndarray, offset: np.ndarray) -> np.ndarray:
    return offset[names >> 32] + (names & LOCAL) - 1


@njit(cache=True)
def _to_the_end(parent):
    """Every entry names the end of its chain."""
    for i in range(parent.size):
        end = i
        while parent[end] != end:
            end = parent[end]
        j = i
        while parent[j] != end:
            parent[j], j = end, parent[j]


def _all(columns: dict[str, list[np.ndarray]], field: str, dtype: type = np.int64) -> np.ndarray:
    """The parts of a column in one piece; the parts are let go."""
    return np.concatenate([np.empty(0, dtype), *columns.pop(field)])


def add_up(values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    out = np.zeros(groups, np.int64)
    np.add.at(out, group, values)
    return out


def least(values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    out = np.full(groups, np.iinfo(np.int64).max)
    np.minimum.at(out, group, values)
    return out


@njit(cache=True, nogil=True)
def find(parent, i):
    """The root of ``i``, halving the path on the way (Tarjan and van Leeuwen 1984)."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


# ---------------------------------------------------------------- edges of the whole volume, in place


def _between(edges: np.ndarray, basin: np.ndarray, offset: np.ndarray, count: int) -> np.ndarray:
    """Edges made to join basins, without those inside one basin, one for each pair, in the total order."""
    edges.resize(_rename(edges, basin, offset), refcheck=False)
    edges.resize(_collapse(edges, np.empty(edges.size, positions(edges.size)), count), refcheck=False)
    _rearrange(edges, by_key(*(edges[key] for key in KEY)))
    return edges


@njit(cache=True)
def _rename(edges, basin, offset):
    """Names become basin numbers ``a < b``; rows inside one basin are overwritten. Returns how many are left."""
    used = 0
    for e in range(edges.size):
        a = basin[offset[edges[e].a >> 32] + (edges[e].a & LOCAL) - 1]
        b = basin[offset[edges[e].b >> 32] + (edges[e].b & LOCAL) - 1]
        if a != b:
            edges[used] = edges[e]
            edges[used].a, edges[used].b = min(a, b), max(a, b)
            used += 1
    return used


@njit(cache=True)
def _collapse(edges, rows, count):
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
        if before(edges[e], edges[best]):
            best, worse = e, best
        edges[best].area += edges[worse].area
        edges[best].height += edges[worse].height
        edges[worse].area = -1


@njit(cache=True, nogil=True)
def before(e, f):
    """Whether edge ``e`` comes before ``f`` in the total order."""
    if e.high != f.high:
        return e.high < f.high
    if e.high_at != f.high_at:
        return e.high_at < f.high_at
    if e.low != f.low:
        return e.low < f.low
    return e.low_at < f.low_at


@njit(cache=True)
def _rearrange(rows, positions):
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


def by_key(high: np.ndarray, high_at: np.ndarray, low: np.ndarray, low_at: np.ndarray) -> np.ndarray:
    """The positions that bring edges into their total order. Few edges share their higher end, so two columns nearly do.

    >>> by_key(*np.array([[5, 4, 5], [8, 9, 8], [3, 2, 1], [7, 7, 9]])).tolist()
    [1, 2, 0]
    """
    rows = order(high, high_at)
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


def order(*columns: np.ndarray) -> np.ndarray:
    """The positions that sort rows by the first column, then by the next ones; equal rows stay as they are.

    Radix sort from the last digit on, for integer columns: a digit that all rows share costs nothing.

    >>> order(np.array([2, 1, 2]), np.array([5, 9, 4])).tolist()
    [1, 2, 0]
    """
    size = columns[0].size
    if size < _FEW:
        return np.lexsort(columns[::-1]).astype(positions(size))
    rows, spare = np.arange(size, dtype=positions(size)), np.empty(size, positions(size))
    for column in reversed(columns):
        lowest = column.min()
        for shift in range(0, int(column.max() - lowest).bit_length(), _DIGIT):
            _by_digit(column, lowest, shift, rows, spare)
            rows, spare = spare, rows
    return rows


def positions(size: int) -> type:
    """The dtype that holds positions in so many rows."""
    return np.uint32 if size <= LOCAL else np.int64


@njit(cache=True, nogil=True)
def _by_digit(column, lowest, shift, rows, out):
    mask = (1 << _DIGIT) - 1
    place = np.zeros(mask + 2, np.int64)
    for value in column:
        place[(((np.int64(value) - lowest) >> shift) & mask) + 1] += 1
    for digit in range(mask):
        place[digit + 1] += place[digit]
    for e in rows:
        digit = ((np.int64(column[e]) - lowest) >> shift) & mask
        out[place[digit]] = e
        place[digit] += 1
