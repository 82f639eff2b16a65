"""Join the regions of all blocks into the basins of the volume, from their tables alone.

1. `link`: a block's exits and crossing edges, which name voxels of the next block, come to name that block's regions.
2. `gather`: follow exits to true basins (descents end, so this ends), add up what each basin has, keep the lowest saddle
   of each pair that touches.

`rules` decides what becomes of the basins.

A region's id in the volume is ``block << 32 | region``. Minimum and integer sums are associative and commutative, so neither
the order of blocks nor a block given twice changes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from volseg.box import Blocks
from volseg.segmentation.basins import BlockBasins
from volseg.segmentation.edges import (
    EDGE,
    SADDLE_ORDER,
    argsort_saddles,
    collapse,
    index_dtype,
    permute,
)

REGION_MASK = 0xFFFFFFFF  # the bits of a global id that are the region


@dataclass(frozen=True)
class Links:
    """What a block's faces say once its neighbors are known.

    Attributes
    ----------
    drains
        int64 (n, 2): global ids of each exit region, and of the neighbor's region that it drains into.
    edges
        EDGE: between this block's regions and those of blocks ahead, by global ids, one for each pair.
    """

    drains: np.ndarray
    edges: np.ndarray


@dataclass(frozen=True)
class Basins:
    """The volume's basins and how they touch: enough for every later decision.

    Attributes
    ----------
    minimum
        int32 (n,): height at the basin's minimum.
    voxels, first, probability_sum
        int64 (n,): as in `BlockBasins`, now complete.
    cut
        int64 (n, 3): as in `BlockBasins`, now complete.
    edges
        EDGE: ``a < b`` are numbers of basins from 0; one for each pair that touches, in the total order of edges.
    """

    minimum: np.ndarray
    voxels: np.ndarray
    first: np.ndarray
    probability_sum: np.ndarray
    cut: np.ndarray
    edges: np.ndarray


def global_id(block: int | np.ndarray, region: np.ndarray) -> np.ndarray:
    """Ids, unique in the volume, of a block's regions.

    >>> hex(global_id(2, np.array([5]))[0])
    '0x200000005'
    """
    return (np.asarray(block, np.int64) << 32) | np.asarray(region, np.int64)


# ---------------------------------------------------------------- 1


def link(i: int, table_of: Callable[[int], BlockBasins], grid: Blocks) -> Links:
    """The `Links` of block ``i``.

    Parameters
    ----------
    i
        Number of the block in ``grid``.
    table_of
        Gives the table of a block by its number; asked for ``i`` and blocks that touch it.
    grid
        The volume's blocks.

    Raises
    ------
    RuntimeError
        If blocks disagree on the mask at a face, as tables of two runs do.

    Examples
    --------
    A row of heights 4 0 3 9 2 1 5 in blocks of four voxels. The ridge (9) of the first block leaves it through voxel 4, which
    lies in region 1 of the second; its one crossing edge leads there too.

    >>> from volseg.segmentation.basins import watershed_block
    >>> from volseg.segmentation.heights import OUTSIDE
    >>> row = np.full((3, 3, 9), OUTSIDE, np.int32)
    >>> row[1, 1, 1:8] = [4, 0, 3, 9, 2, 1, 5]
    >>> grid = Blocks((1, 1, 7), (1, 1, 4))
    >>> first = watershed_block(row[..., :6], np.ones((1, 1, 4), np.uint8), grid[0], grid.shape)[1]
    >>> second = watershed_block(row[..., 4:], np.ones((1, 1, 3), np.uint8), grid[1], grid.shape)[1]
    >>> tables = [first, second]
    >>> links = link(0, tables.__getitem__, grid)
    >>> links.drains.tolist() == [[0 << 32 | 2, 1 << 32 | 1]]
    True
    >>> links.edges[["a", "b", "high", "low"]].tolist() == [(0 << 32 | 2, 1 << 32 | 1, 9, 2)]
    True
    """
    own = table_of(i)
    exits = np.flatnonzero(own.is_exit)
    drains = np.stack([global_id(i, exits + 1), _region_ids(own.root[exits], table_of, grid)], axis=1)
    edges = own.crossing_edges.copy()
    edges["b"] = _region_ids(own.crossing_edges["b"], table_of, grid)
    edges = edges[: collapse(edges, np.empty(edges.size, index_dtype(edges.size)), own.root.size + 1)]
    edges = edges[np.lexsort((edges["b"], edges["a"]))]
    edges["a"] = global_id(i, edges["a"])
    return Links(drains, edges)


def _region_ids(voxels: np.ndarray, table_of: Callable[[int], BlockBasins], grid: Blocks) -> np.ndarray:
    """Global ids of the regions that hold these face voxels of other blocks (linear indices)."""
    out = np.empty(voxels.size, np.int64)
    zyx = np.unravel_index(voxels, grid.shape)
    block = np.ravel_multi_index([place // n for place, n in zip(zyx, grid.block, strict=True)], grid.counts)
    for j in np.unique(block):
        in_block = block == j
        table = table_of(int(j))
        row = np.searchsorted(table.face_voxel, voxels[in_block])
        last = table.face_voxel.size - 1
        if last < 0 or np.any(table.face_voxel[np.minimum(row, last)] != voxels[in_block]):
            raise RuntimeError(f"blocks disagree on the mask at the face of block {j}: its table is of another run")
        out[in_block] = global_id(int(j), table.face_region[row])
    return out


# ---------------------------------------------------------------- 2


def gather(
    tables: Iterable[BlockBasins], links: Iterable[Links], blocks: Sequence[int] | None = None
) -> tuple[Basins, list[np.ndarray]]:
    """The volume's `Basins`, and for each block the basin of each of its regions.

    Of all edges there is only one copy, which is renamed, merged and sorted where it lies.

    Parameters
    ----------
    tables, links
        Of each block in the order of blocks. They are taken one at a time; `BlockBasins.crossing_edges`, ``face_voxel``
        and ``face_region`` are not looked at.
    blocks
        Numbers of these blocks, ascending, by which links name them; None for 0, 1, 2 and so on.

    Returns
    -------
    basins
        `Basins`
    basin_of
        For each block int64 (regions,): the basin, from 0, of region 1, 2, and so on.

    Examples
    --------
    The row of heights 4 0 3 9 2 1 5 again, in blocks of four (see `link`): two basins, whose saddle is the ridge.

    >>> from volseg.segmentation.basins import watershed_block
    >>> from volseg.segmentation.heights import OUTSIDE
    >>> row = np.full((3, 3, 9), OUTSIDE, np.int32)
    >>> row[1, 1, 1:8] = [4, 0, 3, 9, 2, 1, 5]
    >>> grid = Blocks((1, 1, 7), (1, 1, 4))
    >>> first = watershed_block(row[..., :6], np.ones((1, 1, 4), np.uint8), grid[0], grid.shape)[1]
    >>> second = watershed_block(row[..., 4:], np.ones((1, 1, 3), np.uint8), grid[1], grid.shape)[1]
    >>> tables = [first, second]
    >>> basins, basin_of = gather(tables, [link(i, tables.__getitem__, grid) for i in range(2)])
    >>> basins.minimum.tolist(), basins.voxels.tolist(), basins.first.tolist()
    ([0, 1], [3, 4], [0, 3])
    >>> basins.edges[["a", "b", "high", "high_voxel", "low"]].tolist(), [basin.tolist() for basin in basin_of]
    ([(0, 1, 9, 3, 3)], [[0, 1], [1]])
    """
    sums = ("minimum", "voxels", "first", "probability_sum", "cut")
    columns: dict[str, list[np.ndarray]] = {field: [] for field in sums}
    drains, edges = [np.empty((0, 2), np.int64)], _EdgeBuffer()
    numbers = None if blocks is None else np.asarray(blocks)
    for i, (table, block_links) in enumerate(zip(tables, links, strict=True)):
        for field, column in columns.items():
            column.append(getattr(table, field))
        if numbers is not None:
            block_links = _renumbered(block_links, numbers)
        drains.append(block_links.drains)
        inner = edges.append(table.edges)
        inner["a"], inner["b"] = global_id(i, inner["a"]), global_id(i, inner["b"])
        edges.append(block_links.edges)
    offset = np.cumsum([0, *(minimum.size for minimum in columns["minimum"])])
    basin, is_basin = _true_basins(np.concatenate(drains), offset)
    count = int(np.count_nonzero(is_basin))
    basins = Basins(
        minimum=_concatenate(columns, "minimum", np.int32)[is_basin],
        voxels=sum_by_group(_concatenate(columns, "voxels"), basin, count),
        first=min_by_group(_concatenate(columns, "first"), basin, count),
        probability_sum=sum_by_group(_concatenate(columns, "probability_sum"), basin, count),
        cut=sum_by_group(np.concatenate([np.empty((0, 3), np.int64), *columns.pop("cut")]), basin, count),
        edges=_basin_edges(edges.rows(), basin, offset, count),
    )
    return basins, np.split(basin, offset[1:])[:-1]


class _EdgeBuffer:
    """EDGE rows that grow in place: their memory is made longer, as a rule without a copy."""

    def __init__(self) -> None:
        self._rows, self._used = np.empty(0, EDGE), 0

    def append(self, rows: np.ndarray) -> np.ndarray:
        """Returns where they lie now, until more are appended."""
        end = self._used + rows.size
        if end > self._rows.size:
            self._rows.resize(end + max(1 << 12, end >> 4), refcheck=False)
        self._rows[self._used : end] = rows
        begin, self._used = self._used, end
        return self._rows[begin:end]

    def rows(self) -> np.ndarray:
        self._rows.resize(self._used, refcheck=False)
        return self._rows


def _renumbered(links: Links, blocks: np.ndarray) -> Links:
    """The same with blocks numbered by their place in ``blocks``."""

    def renumbered(ids: np.ndarray) -> np.ndarray:
        return global_id(np.searchsorted(blocks, ids >> 32), ids & REGION_MASK)

    edges = links.edges.copy()
    edges["a"], edges["b"] = renumbered(edges["a"]), renumbered(edges["b"])
    return Links(drains=renumbered(links.drains), edges=edges)


def _true_basins(drains: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The basin (from 0) of every region, block after block, and which regions hold a basin's minimum."""
    parent = np.arange(offset[-1])
    parent[_row_of(drains[:, 0], offset)] = _row_of(drains[:, 1], offset)
    is_basin = parent == np.arange(parent.size)
    _follow_chains(parent)
    return (np.cumsum(is_basin) - 1)[parent], is_basin


def _row_of(ids: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """The place of each region among those of all blocks; ``offset`` is where each block's begin."""
    return offset[ids >> 32] + (ids & REGION_MASK) - 1


@njit(cache=True)
def _follow_chains(parent: np.ndarray) -> None:
    """Every entry becomes the end of its chain."""
    for i in range(parent.size):
        end = i
        while parent[end] != end:
            end = parent[end]
        j = i
        while parent[j] != end:
            parent[j], j = end, parent[j]


def _basin_edges(edges: np.ndarray, basin: np.ndarray, offset: np.ndarray, count: int) -> np.ndarray:
    """Edges between basins instead of regions, one for each pair, in the total order; made of ``edges`` in place."""
    edges.resize(_rename_ends(edges, basin, offset), refcheck=False)
    edges.resize(collapse(edges, np.empty(edges.size, index_dtype(edges.size)), count), refcheck=False)
    permute(edges, argsort_saddles(*(edges[field] for field in SADDLE_ORDER)))
    return edges


@njit(cache=True)
def _rename_ends(edges: np.ndarray, basin: np.ndarray, offset: np.ndarray) -> int:
    """Ids of regions become numbers of basins ``a < b``; rows inside one basin are overwritten. Returns how many are left."""
    used = 0
    for e in range(edges.size):
        a = basin[offset[edges[e].a >> 32] + (edges[e].a & REGION_MASK) - 1]
        b = basin[offset[edges[e].b >> 32] + (edges[e].b & REGION_MASK) - 1]
        if a != b:
            edges[used] = edges[e]
            edges[used].a, edges[used].b = min(a, b), max(a, b)
            used += 1
    return used


# ---------------------------------------------------------------- columns


def _concatenate(columns: dict[str, list[np.ndarray]], field: str, dtype: type = np.int64) -> np.ndarray:
    """The parts of a column in one piece; the parts are dropped."""
    return np.concatenate([np.empty(0, dtype), *columns.pop(field)])


def sum_by_group(values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """The sum of ``values`` in each of ``groups``, int64; ``group`` has the group (from 0) of each value, or row of values.

    >>> sum_by_group(np.array([5, 6, 7]), np.array([0, 2, 0]), 3).tolist()
    [12, 0, 6]
    """
    out = np.zeros((groups, *values.shape[1:]), np.int64)
    np.add.at(out, group, values)
    return out


def min_by_group(values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """The lowest of ``values`` in each of ``groups``, int64; the greatest int64 in a group that has none.

    >>> min_by_group(np.array([5, 6, 7]), np.array([0, 1, 0]), 2).tolist()
    [5, 6]
    """
    out = np.full(groups, np.iinfo(np.int64).max)
    np.minimum.at(out, group, values)
    return out
