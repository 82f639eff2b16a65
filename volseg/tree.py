"""Decide a graph of basins that no process could hold: contract it in each block, then in steps of 2 x 2 x 2 blocks.

What `decide` computes is the minimum spanning forest of the regions, where a region that drains into another comes before
all edges, and a virtual root that knows every seed comes right after the edges that are no higher than the seed level.
Two facts about such forests (Tarjan, "Data structures and network algorithms", 1983, chapter 6) hold in any part of it:

- the highest edge of a cycle is not in the forest, so a part may drop it, whatever lies outside;
- the lowest edge that leaves a set of regions is in the forest, so a part may join along it once it knows all that leave.

Edges are totally ordered by `KEY`, so both are certain and the order of contraction does not matter. Of a part, only what
its outer faces leave open goes up: as much as its masked surface, not as its volume. What nothing leaves is finished.

1. `leaf`: the graph of one block. It knows every edge and drain over its faces, its neighbours' too.
2. `contract`: joins and drops what is certain.
3. `join`: the graph of up to eight parts, their common faces now inside. Back to 2, until one part is the volume.

On the way back each part tells its parts what became of the components that they passed up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from volseg.box import Blocks
from volseg.decide import Rules
from volseg.fragments import EDGE, KEY, Table
from volseg.stitch import LOCAL, Links, add_up, by_key, find, least, order

_SADDLE = [(key, EDGE[key]) for key in KEY]
INNER = np.dtype([("a", np.int64), ("b", np.int64), *_SADDLE])
OUTER = np.dtype([("of", np.int64), ("here", np.int64), ("there", np.int64), *_SADDLE])
DRAIN = -1  # `high` of what is joined before all edges; heights are not negative
SUMS = ("depth", "voxels", "first", "mass")


@dataclass(frozen=True)
class Graph:
    """Components of a part of the volume and what is open about them.

    depth, voxels, first, mass   per component, so far: lowest height, sums and lowest linear index
    inner    INNER rows between components (numbers from 0)
    outer    OUTER rows from component ``of``, whose region ``here`` meets region ``there`` outside the part
    """

    depth: np.ndarray
    voxels: np.ndarray
    first: np.ndarray
    mass: np.ndarray
    inner: np.ndarray
    outer: np.ndarray


# ---------------------------------------------------------------- parts of the volume


def top(grid: Blocks) -> int:
    """The level whose one part is the volume; level 0 has the blocks."""
    return (max(grid.counts) - 1).bit_length()


def parts(grid: Blocks, level: int) -> Blocks:
    """The parts of that level: 2**level blocks along each axis.

    >>> grid = Blocks((5, 1, 1), (1, 1, 1))
    >>> [len(parts(grid, level)) for level in range(top(grid) + 1)]
    [5, 3, 2, 1]
    """
    return Blocks(grid.shape, tuple(b << level for b in grid.block))


def children(grid: Blocks, level: int, n: int) -> list[int]:
    """Parts of the level below that make up part ``n``, in raster order."""
    return parts(grid, level - 1).meeting(parts(grid, level)[n])


# ---------------------------------------------------------------- 1


def near(grid: Blocks, i: int, connectivity: int) -> list[int]:
    """Block ``i`` and the blocks whose links `leaf` needs: all that voxels of ``i`` can have neighbours in."""
    return [i, *grid.neighbours(i)] if connectivity == 6 else grid.meeting(grid[i].grow(1))


def leaf(i: int, table: Table, links: Mapping[int, Links]) -> Graph:
    """The `Graph` of block ``i``; its components are its regions. ``links`` are those of all blocks `near` it."""
    inner = np.empty(table.edges.size, INNER)
    inner["a"], inner["b"] = table.edges["a"] - 1, table.edges["b"] - 1
    for key in KEY:
        inner[key] = table.edges[key]
    own = links[i]
    outer = [_drains(own.drains[:, 0], own.drains[:, 1]), _crossing(own.edges["a"], own.edges["b"], own.edges)]
    for j in links.keys() - {i}:
        into = links[j].drains[links[j].drains[:, 1] >> 32 == i]
        edges = links[j].edges[links[j].edges["b"] >> 32 == i]
        outer += [_drains(into[:, 1], into[:, 0]), _crossing(edges["b"], edges["a"], edges)]
    return Graph(table.depth, table.voxels, table.first, table.mass, inner, np.concatenate(outer))


def _drains(here: np.ndarray, there: np.ndarray) -> np.ndarray:
    out = np.zeros(here.size, OUTER)
    out["of"], out["here"], out["there"], out["high"] = (here & LOCAL) - 1, here, there, DRAIN
    return out


def _crossing(here: np.ndarray, there: np.ndarray, edges: np.ndarray) -> np.ndarray:
    out = _drains(here, there)
    for key in KEY:
        out[key] = edges[key]
    return out


# ---------------------------------------------------------------- 2


def contract(graph: Graph, level: int) -> tuple[Graph, Graph, np.ndarray]:
    """What goes up, the finished objects (ascending by ``first``, without rows), and what became of each component.

    That is its number among those that go up, or ``~number`` (below 0) among the finished. Seeds are the components of
    depth at most ``level``; of two rows to the same region outside only the lowest goes up.
    """
    count = graph.depth.size
    outside, there = np.unique(graph.outer["there"], return_inverse=True)
    a = np.concatenate([graph.inner["a"], graph.outer["of"]])
    b = np.concatenate([graph.inner["b"], there + count])
    keys = [np.concatenate([graph.inner[key], graph.outer[key]]) for key in KEY]
    known = np.arange(count + outside.size) < count
    seeded = np.concatenate([graph.depth <= level, np.zeros(outside.size, bool)])
    root, keep = _contract(a, b, keys[0], by_key(*keys), known, seeded, level)
    inner, outer = graph.inner[keep[: graph.inner.size]], graph.outer[keep[graph.inner.size :]]
    group, sums = _sum(graph, root[:count])
    is_open = np.zeros(sums["depth"].size, bool)
    for ends in (inner["a"], inner["b"], outer["of"]):
        is_open[group[ends]] = True
    done = np.flatnonzero(~is_open)
    done = done[np.argsort(sums["first"][done])]
    became = np.empty(is_open.size, np.int64)
    became[is_open] = np.arange(np.count_nonzero(is_open))
    became[done] = ~np.arange(done.size)
    fate = became[group]
    inner["a"], inner["b"], outer["of"] = fate[inner["a"]], fate[inner["b"]], fate[outer["of"]]
    up = Graph(**{name: column[is_open] for name, column in sums.items()}, inner=inner, outer=outer)
    finished = Graph(**{name: column[done] for name, column in sums.items()}, inner=inner[:0], outer=outer[:0])
    return up, finished, fate


@njit(cache=True, nogil=True)
def _contract(a, b, high, rows, known, seeded, level):
    """The root of each component along joins that are certain, and which rows must go up.

    Rows are taken in ascending order, as Kruskal's algorithm does, once with all that could be joined (``whole``) and once
    with what is certain (``sure``). A set without a seed, of which nothing unknown is reached by lower rows, knows all that
    leaves it: the row at hand is the lowest.
    """
    whole, sure = np.arange(known.size), np.arange(known.size)
    shut = known.copy()
    for k in range(known.size):
        shut[k] = known[k] and not seeded[k]
    keep = np.zeros(a.size, np.bool_)
    for e in rows:
        p, q = find(whole, a[e]), find(whole, b[e])
        free = high[e] <= level or high[e] == DRAIN
        if p == q or (not free and seeded[p] and seeded[q]):
            continue
        if known[b[e]] and (free or shut[p] or shut[q]):
            r, s = find(sure, a[e]), find(sure, b[e])
            sure[max(r, s)] = min(r, s)
        else:
            keep[e] = True
        whole[q] = p
        seeded[p] = seeded[p] or seeded[q]
        shut[p] = shut[p] and shut[q]
    for k in range(sure.size):
        sure[k] = find(sure, k)
    return sure, keep


def _sum(graph: Graph, root: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The group (from 0) of each component, and the groups' sums."""
    is_root = root == np.arange(root.size)
    group = (np.cumsum(is_root) - 1)[root]
    groups = np.count_nonzero(is_root)
    return group, {
        "depth": least(graph.depth, group, groups).astype(np.int32),
        "voxels": add_up(graph.voxels, group, groups),
        "first": least(graph.first, group, groups),
        "mass": add_up(graph.mass, group, groups),
    }


def kept(finished: Graph, rules: Rules) -> np.ndarray:
    """Which finished objects are labelled: the rules of `decide` that see an object's sums and nothing else."""
    keep = (finished.voxels >= rules.min_voxels) & (finished.voxels <= rules.max_voxels)
    return keep if rules.keep_unseeded else keep & (finished.depth <= rules.seeds[1])


# ---------------------------------------------------------------- 3


def join(below: Sequence[Graph], grid: Blocks, level: int, n: int) -> Graph:
    """The `Graph` of part ``n`` of that level from those of its `children`; components are numbered one after another.

    A row over a face between two of them is an edge where both still have it: what either dropped is in no forest.
    """
    offset = np.cumsum([0, *(graph.depth.size for graph in below)])
    inner = [_moved(graph.inner, ("a", "b"), by) for graph, by in zip(below, offset, strict=False)]
    outer = np.concatenate([_moved(graph.outer, ("of",), by) for graph, by in zip(below, offset, strict=False)])
    within = _inside(outer["there"], grid, level, n)
    sums = {name: np.concatenate([getattr(graph, name) for graph in below]) for name in SUMS}
    return Graph(**sums, inner=np.concatenate([*inner, _meet(outer[within])]), outer=outer[~within])


def _moved(rows: np.ndarray, fields: tuple[str, ...], by: int) -> np.ndarray:
    out = rows.copy()
    for field in fields:
        out[field] += by
    return out


def _inside(names: np.ndarray, grid: Blocks, level: int, n: int) -> np.ndarray:
    """Which of the named regions lie in part ``n``."""
    place = np.unravel_index(names >> 32, grid.counts)
    return np.all([p >> level == c for p, c in zip(place, parts(grid, level).coords(n), strict=True)], axis=0)


def _meet(outer: np.ndarray) -> np.ndarray:
    """INNER rows of the pairs of regions that both sides list."""
    low, high = np.minimum(outer["here"], outer["there"]), np.maximum(outer["here"], outer["there"])
    rows = order(low, high)
    same = np.flatnonzero((low[rows[1:]] == low[rows[:-1]]) & (high[rows[1:]] == high[rows[:-1]]))
    one, other = outer[rows[same]], outer["of"][rows[same + 1]]
    out = np.empty(one.size, INNER)
    out["a"], out["b"] = one["of"], other
    for key in KEY:
        out[key] = one[key]
    return out


# ---------------------------------------------------------------- numbers, and the way back


def ranks(firsts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The place (from 0) of each of these distinct voxels among all of them.

    >>> [rank.tolist() for rank in ranks([np.array([5, 9]), np.array([7])])]
    [[0, 2], [1]]
    """
    every = np.concatenate([np.empty(0, np.int64), *firsts])
    rank = np.empty(every.size, np.int64)
    rank[np.argsort(every)] = np.arange(every.size)
    return np.split(rank, np.cumsum([first.size for first in firsts])[:-1]) if firsts else []


def named(fate: np.ndarray, above: np.ndarray, finished: np.ndarray) -> np.ndarray:
    """The label of each component, from its fate and the labels of what went up and of what was finished.

    >>> named(np.array([0, ~1, ~0, 1]), np.array([7, 8]), np.array([3, 0])).tolist()
    [7, 0, 3, 8]
    """
    return np.concatenate([above, finished[::-1]])[fate]
