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

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from volseg.box import Blocks
from volseg.fragments import EDGE, KEY, Table

_LOCAL = 0xFFFFFFFF


@dataclass(frozen=True)
class Links:
    """What a block's faces say once its neighbours are known.

    drains  int64 (n, 2): each exit region, and the neighbour's region that it drains into
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


def gather(tables: Sequence[Table], links: Sequence[Links]) -> tuple[Basins, list[np.ndarray]]:
    """The volume's `Basins`, and for each block the basin (from 0) of each of its regions."""
    sizes = np.array([table.root.size for table in tables], np.int64)
    offset = np.r_[0, np.cumsum(sizes)]

    def dense(names: np.ndarray) -> np.ndarray:
        return offset[names >> 32] + (names & _LOCAL) - 1

    drains = np.concatenate([np.empty((0, 2), np.int64), *(l.drains for l in links)])
    parent = np.arange(offset[-1])
    parent[dense(drains[:, 0])] = dense(drains[:, 1])
    while True:
        further = parent[parent]
        if np.array_equal(further, parent):
            break
        parent = further
    is_basin = parent == np.arange(parent.size)
    number = np.cumsum(is_basin) - 1
    basin = number[parent]
    inner = [_named(table.edges, i) for i, table in enumerate(tables)]
    edges = np.concatenate([np.empty(0, EDGE), *inner, *(l.edges for l in links)])
    basins = Basins(
        depth=_all(tables, "depth", np.int32)[is_basin],
        voxels=add_up(_all(tables, "voxels"), basin, is_basin.sum()),
        first=least(_all(tables, "first"), basin, is_basin.sum()),
        mass=add_up(_all(tables, "mass"), basin, is_basin.sum()),
        edges=_between(edges, basin[dense(edges["a"])], basin[dense(edges["b"])]),
    )
    return basins, np.split(basin, offset[1:-1])


def _named(edges: np.ndarray, block: int) -> np.ndarray:
    out = edges.copy()
    out["a"], out["b"] = name(block, edges["a"]), name(block, edges["b"])
    return out


def _all(tables: Sequence[Table], field: str, dtype: type = np.int64) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *(getattr(table, field) for table in tables)])


def add_up(values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    out = np.zeros(groups, np.int64)
    np.add.at(out, group, values)
    return out


def least(values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    out = np.full(groups, np.iinfo(np.int64).max)
    np.minimum.at(out, group, values)
    return out


def _between(edges: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Edges renamed to join ``a`` and ``b``, without those inside one basin, one for each pair, in the total order."""
    apart = a != b
    edges = edges[apart]
    edges["a"], edges["b"] = np.minimum(a, b)[apart], np.maximum(a, b)[apart]
    edges = lowest(edges)
    return edges[np.lexsort([edges[key] for key in reversed(KEY)])]
