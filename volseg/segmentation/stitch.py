"""Stitch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    merge_parallel,
    permute,
)

REGION_MASK = 0xFFFFFFFF  # the part of a name that is the region


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

    depth, voxels, first, mass   per basin, as in `BlockBasins`, now complete
    edges    EDGE rows, ``a < b`` basin numbers from 0, one for each pair that touches, in the total order of edges
    """

    minimum: np.ndarray
    voxels: np.ndarray
    first: np.ndarray
    probability_sum: np.ndarray
    edges: np.ndarray


def global_id(block: int, region: np.ndarray) -> np.ndarray:
    """Names, unique in the volume, of a block's regions."""
    return (np.int64(block) << 32) | np.asarray(region, np.int64)


# ---------------------------------------------------------------- 1


def link(i: int, table_of: Callable[[int], BlockBasins], grid: Blocks) -> Links:
    """The `Links` of block ``i``. ``table_of`` gives the table of ``i`` and of all blocks that touch it."""
    own = table_of(i)
    exits = np.flatnonzero(own.is_exit)
    drains = np.stack([global_id(i, exits + 1), _regions_at(own.root[exits], table_of, grid)], axis=1)
    edges = own.crossing_edges.copy()
    edges["a"] = global_id(i, own.crossing_edges["a"])
    edges["b"] = _regions_at(own.crossing_edges["b"], table_of, grid)
    return Links(drains, merge_parallel(edges))


def _regions_at(voxels: np.ndarray, table_of: Callable[[int], BlockBasins], grid: Blocks) -> np.ndarray:
    """Names of the regions that hold these face voxels of other blocks (linear indices)."""
    out = np.empty(voxels.size, np.int64)
    place = np.unravel_index(voxels, grid.shape)
    block = np.ravel_multi_index([p // b for p, b in zip(place, grid.block, strict=True)], grid.counts)
    for j in np.unique(block):
        here = block == j
        table = table_of(int(j))
        row = np.searchsorted(table.face_voxel, voxels[here])
        if table.face_voxel.size == 0 or np.any(
            table.face_voxel[np.minimum(row, table.face_voxel.size - 1)] != voxels[here]
        ):
            raise RuntimeError(f"blocks disagree on the mask at the face of block {j}: its table is of another run")
        out[here] = global_id(int(j), table.face_region[row])
    return out


# ---------------------------------------------------------------- 2


def gather(tables: Iterable[BlockBasins], links: Iterable[Links]) -> tuple[Basins, list[np.ndarray]]:
    """The volume's `Basins`, and for each block the basin (from 0) of each of its regions.

    Tables and links come in the order of blocks and are taken one at a time. Of all edges there is only one copy, which
    is renamed, collapsed and sorted where it lies.
    """
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("minimum", "voxels", "first", "probability_sum")}
    drains, edges = [np.empty((0, 2), np.int64)], _Pile()
    for i, (table, link) in enumerate(zip(tables, links, strict=True)):
        for field, column in columns.items():
            column.append(getattr(table, field))
        drains.append(link.drains)
        edges.add(_named(table.edges, i))
        edges.add(link.edges)
    offset = np.cumsum([0, *(minimum.size for minimum in columns["minimum"])])
    basin, is_basin = _true_basins(np.concatenate(drains), offset)
    count = int(np.count_nonzero(is_basin))
    basins = Basins(
        minimum=_all(columns, "minimum", np.int32)[is_basin],
        voxels=sum_by_group(_all(columns, "voxels"), basin, count),
        first=min_by_group(_all(columns, "first"), basin, count),
        probability_sum=sum_by_group(_all(columns, "probability_sum"), basin, count),
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
    out["a"], out["b"] = global_id(block, edges["a"]), global_id(block, edges["b"])
    return out


def _true_basins(drains: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The basin (from 0) of every region, block after block, and which regions hold a basin's minimum."""
    parent = np.arange(offset[-1])
    parent[_dense(drains[:, 0], offset)] = _dense(drains[:, 1], offset)
    is_basin = parent == np.arange(parent.size)
    _to_the_end(parent)
    return (np.cumsum(is_basin) - 1)[parent], is_basin


def _dense(names: np.ndarray, offset: np.ndarray) -> np.ndarray:
    return offset[names >> 32] + (names & REGION_MASK) - 1


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


def sum_by_group(values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    out = np.zeros(groups, np.int64)
    np.add.at(out, group, values)
    return out


def min_by_group(values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    out = np.full(groups, np.iinfo(np.int64).max)
    np.minimum.at(out, group, values)
    return out


def _between(edges: np.ndarray, basin: np.ndarray, offset: np.ndarray, count: int) -> np.ndarray:
    """Edges made to join basins, without those inside one basin, one for each pair, in the total order."""
    edges.resize(_rename(edges, basin, offset), refcheck=False)
    edges.resize(collapse(edges, np.empty(edges.size, index_dtype(edges.size)), count), refcheck=False)
    permute(edges, argsort_saddles(*(edges[key] for key in SADDLE_ORDER)))
    return edges


@njit(cache=True)
def _rename(edges, basin, offset):
    """Names become basin numbers ``a < b``; rows inside one basin are overwritten. Returns how many are left."""
    used = 0
    for e in range(edges.size):
        a = basin[offset[edges[e].a >> 32] + (edges[e].a & REGION_MASK) - 1]
        b = basin[offset[edges[e].b >> 32] + (edges[e].b & REGION_MASK) - 1]
        if a != b:
            edges[used] = edges[e]
            edges[used].a, edges[used].b = min(a, b), max(a, b)
            used += 1
    return used
