"""Hierarchy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from volseg.box import Blocks
from volseg.segmentation.basins import BlockBasins
from volseg.segmentation.edges import EDGE, SADDLE_ORDER, argsort_rows, argsort_saddles, find, index_dtype, precedes
from volseg.segmentation.rules import Rules
from volseg.segmentation.stitch import REGION_MASK, Links, min_by_group, sum_by_group

_SADDLE = [(key, EDGE[key]) for key in SADDLE_ORDER]
INNER = np.dtype([("a", np.uint32), ("b", np.uint32), *_SADDLE])
OUTER = np.dtype([("component", np.uint32), ("region", np.int64), ("neighbor", np.int64), *_SADDLE])
BACK = np.dtype(
    [("component", np.uint32), ("region", np.int64), ("neighbor", np.int64)]
)  # what `join` keeps of a second side
DRAIN = -1  # `high` of what is joined before all edges; heights are not negative
SUMS = ("minimum", "voxels", "first", "probability_sum")


@dataclass(frozen=True)
class Graph:
    """Components of a part of the volume and what is open about them.

    depth, voxels, first, mass   per component, so far: lowest height, sums and lowest linear index
    inner    INNER rows between components (numbers from 0)
    outer    OUTER rows from component ``of``, whose region ``here`` meets region ``there`` outside the part
    """

    minimum: np.ndarray
    voxels: np.ndarray
    first: np.ndarray
    probability_sum: np.ndarray
    inner: np.ndarray
    outer: np.ndarray


# ---------------------------------------------------------------- parts of the volume


def top_level(grid: Blocks) -> int:
    """The level whose one part is the volume; level 0 has the blocks."""
    return (max(grid.counts) - 1).bit_length()


def parts(grid: Blocks, level: int) -> Blocks:
    """The parts of that level: 2**level blocks along each axis.

    >>> grid = Blocks((5, 1, 1), (1, 1, 1))
    >>> [len(parts(grid, level)) for level in range(top_level(grid) + 1)]
    [5, 3, 2, 1]
    """
    return Blocks(grid.shape, tuple(b << level for b in grid.block))


def children(grid: Blocks, level: int, n: int) -> list[int]:
    """Parts of the level below that make up part ``n``, in raster order."""
    return parts(grid, level - 1).overlapping(parts(grid, level)[n])


# ---------------------------------------------------------------- 1


def linked_blocks(grid: Blocks, i: int, connectivity: int) -> list[int]:
    """Block ``i`` and the blocks whose links `block_graph` needs: all that voxels of ``i`` can have neighbors in."""
    return [i, *grid.neighbors(i)] if connectivity == 6 else grid.overlapping(grid[i].grow(1))


def block_graph(i: int, table: BlockBasins, links: Mapping[int, Links]) -> Graph:
    """The `Graph` of block ``i``; its components are its regions. ``links`` are those of all blocks `linked_blocks` it."""
    inner = np.empty(table.edges.size, INNER)
    inner["a"], inner["b"] = table.edges["a"] - 1, table.edges["b"] - 1
    for key in SADDLE_ORDER:
        inner[key] = table.edges[key]
    own = links[i]
    outer = [_drains(own.drains[:, 0], own.drains[:, 1]), _crossing(own.edges["a"], own.edges["b"], own.edges)]
    for j in links.keys() - {i}:
        into = links[j].drains[links[j].drains[:, 1] >> 32 == i]
        edges = links[j].edges[links[j].edges["b"] >> 32 == i]
        outer += [_drains(into[:, 1], into[:, 0]), _crossing(edges["b"], edges["a"], edges)]
    return Graph(table.minimum, table.voxels, table.first, table.probability_sum, inner, np.concatenate(outer))


def _drains(here: np.ndarray, there: np.ndarray) -> np.ndarray:
    out = np.zeros(here.size, OUTER)
    out["component"], out["region"], out["neighbor"], out["high"] = (here & REGION_MASK) - 1, here, there, DRAIN
    return out


def _crossing(here: np.ndarray, there: np.ndarray, edges: np.ndarray) -> np.ndarray:
    out = _drains(here, there)
    for key in SADDLE_ORDER:
        out[key] = edges[key]
    return out


# ---------------------------------------------------------------- 2


def contract(graph: Graph, level: int) -> tuple[Graph, Graph, np.ndarray]:
    """What goes up, the finished objects (ascending by ``first``, without rows), and what became of each component.

    That is its number among those that go up, or ``~number`` (below 0) among the finished. Seeds are the components of
    depth at most ``level``; of two rows to the same region outside only the lowest goes up.
    """
    count = graph.minimum.size
    there, outside = _numbered(graph.outer["neighbor"])
    seeded = np.concatenate([graph.minimum <= level, np.zeros(outside, bool)])
    by_inner, by_outer = (argsort_saddles(*(rows[key] for key in SADDLE_ORDER)) for rows in (graph.inner, graph.outer))
    whole, root = (np.arange(size, dtype=index_dtype(seeded.size)) for size in (seeded.size, count))
    of_inner, of_outer = _contract(graph.inner, graph.outer, there, by_inner, by_outer, seeded, whole, root, level)
    del there, seeded, by_inner, by_outer, whole
    inner, outer = graph.inner[of_inner], graph.outer[of_outer]
    group, sums = _sum(graph, root)
    is_open = np.zeros(sums["minimum"].size, bool)
    for ends in (inner["a"], inner["b"], outer["component"]):
        is_open[group[ends]] = True
    done = np.flatnonzero(~is_open)
    done = done[np.argsort(sums["first"][done])]
    new_index = np.empty(is_open.size, np.int64)
    new_index[is_open] = np.arange(np.count_nonzero(is_open))
    new_index[done] = ~np.arange(done.size)
    destination = new_index[group]
    inner["a"], inner["b"], outer["component"] = (
        destination[inner["a"]],
        destination[inner["b"]],
        destination[outer["component"]],
    )
    up = Graph(**{name: column[is_open] for name, column in sums.items()}, inner=inner, outer=outer)
    finished = Graph(**{name: column[done] for name, column in sums.items()}, inner=inner[:0], outer=outer[:0])
    return up, finished, destination


def _numbered(names: np.ndarray) -> tuple[np.ndarray, int]:
    """The number (from 0) of each name among the distinct ones in ascending order, and how many these are."""
    return _count_up(names, argsort_rows(names)) if names.size else (np.empty(0, np.uint32), 0)


@njit(cache=True, nogil=True)
def _count_up(names, rows):
    out = np.empty_like(rows)
    last = 0
    for k in range(rows.size):
        last += k > 0 and names[rows[k]] != names[rows[k - 1]]
        out[rows[k]] = last
    return out, last + 1


@njit(cache=True, nogil=True)
def _contract(inner, outer, there, by_inner, by_outer, seeded, whole, sure, level):
    """Which rows of both kinds must go up; ``sure`` becomes the root of each component along joins that are certain.

    Rows are taken in ascending order, as Kruskal's algorithm does, once with all that could be joined (``whole``) and once
    with what is certain (``sure``). A set without a seed, of which nothing unknown is reached by lower rows, knows all that
    leaves it: the row at hand is the lowest. Regions outside, which are unknown, stand after the components.
    """
    count = sure.size
    shut = np.zeros(seeded.size, np.bool_)
    for k in range(count):
        shut[k] = not seeded[k]
    keep_inner, keep_outer = np.zeros(inner.size, np.bool_), np.zeros(outer.size, np.bool_)
    i = j = 0
    while i < by_inner.size or j < by_outer.size:
        known = j == by_outer.size or (i < by_inner.size and not precedes(outer[by_outer[j]], inner[by_inner[i]]))
        if known:
            e = np.int64(by_inner[i])
            a, b, high = np.int64(inner[e].a), np.int64(inner[e].b), inner[e].high
            i += 1
        else:
            e = np.int64(by_outer[j])
            a, b, high = np.int64(outer[e].component), count + np.int64(there[e]), outer[e].high
            j += 1
        p, q = find(whole, a), find(whole, b)
        free = high <= level or high == DRAIN
        if p == q or (not free and seeded[p] and seeded[q]):
            continue
        if known and (free or shut[p] or shut[q]):
            r, s = find(sure, a), find(sure, b)
            sure[max(r, s)] = min(r, s)
        elif known:
            keep_inner[e] = True
        else:
            keep_outer[e] = True
        whole[q] = p
        seeded[p] = seeded[p] or seeded[q]
        shut[p] = shut[p] and shut[q]
    for k in range(count):
        sure[k] = find(sure, k)
    return keep_inner, keep_outer


def _sum(graph: Graph, root: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The group (from 0) of each component, and the groups' sums."""
    is_root = root == np.arange(root.size)
    group = (np.cumsum(is_root) - 1)[root]
    groups = np.count_nonzero(is_root)
    return group, {
        "minimum": min_by_group(graph.minimum, group, groups).astype(np.int32),
        "voxels": sum_by_group(graph.voxels, group, groups),
        "first": min_by_group(graph.first, group, groups),
        "probability_sum": sum_by_group(graph.probability_sum, group, groups),
    }


def labeled(finished: Graph, rules: Rules) -> np.ndarray:
    """Which finished objects are labeled: the rules of `decide` that see an object's sums and nothing else."""
    keep = (finished.voxels >= rules.min_voxels) & (finished.voxels <= rules.max_voxels)
    return keep if rules.keep_unseeded else keep & (finished.minimum <= rules.seeds[1])


# ---------------------------------------------------------------- 3


def join(below: Iterable[Graph], grid: Blocks, level: int, n: int) -> Graph:
    """The `Graph` of part ``n`` of that level from those of its `children`; components are numbered one after another.

    A row over a face between two of them is an edge where both still have it: what either dropped is in no forest. They
    are taken one at a time, and what is no longer needed of one is let go before the next.
    """
    sums: dict[str, list[np.ndarray]] = {name: [] for name in SUMS}
    inner, outer = [np.empty(0, INNER)], [np.empty(0, OUTER)]
    ahead, back = {}, {}  # by pair of children: what the first lists of the second, and the second of the first
    each, graphs, count = children(grid, level, n), iter(below), 0
    for child in each:
        graph = next(graphs)
        inner.append(_moved(graph.inner, ("a", "b"), count))
        rows = _moved(graph.outer, ("component",), count)
        for name, column in sums.items():
            column.append(getattr(graph, name))
        count += graph.minimum.size
        del graph
        at = _parts_of(rows["neighbor"], grid, level - 1)
        outer.append(rows[~np.isin(at, each)])
        for other in each:
            if other > child:
                ahead[child, other] = rows[at == other]
            elif other < child:
                back[other, child] = rows[at == other][[*BACK.names]].astype(BACK)
        del rows, at
    for pair in list(ahead):
        inner.append(_meet(ahead.pop(pair), back.pop(pair)))
    return Graph(
        **{name: np.concatenate(column) for name, column in sums.items()}, inner=_all(inner), outer=_all(outer)
    )


def _all(parts: list[np.ndarray]) -> np.ndarray:
    """The parts in one piece; the list is empty then."""
    out = np.concatenate(parts)
    parts.clear()
    return out


def _moved(rows: np.ndarray, fields: tuple[str, ...], by: int) -> np.ndarray:
    out = rows.copy()
    for field in fields:
        out[field] += by
    return out


def _parts_of(names: np.ndarray, grid: Blocks, level: int) -> np.ndarray:
    """The part of that level in which each named region lies."""
    place = np.unravel_index(names >> 32, grid.counts)
    return np.ravel_multi_index([p >> level for p in place], parts(grid, level).counts)


def _meet(ahead: np.ndarray, back: np.ndarray) -> np.ndarray:
    """INNER rows of the pairs of regions that both sides list: OUTER rows, and BACK rows of the other side.

    A contracted graph lists no pair twice.
    """
    found, of = _paired(
        ahead, back, argsort_rows(ahead["region"], ahead["neighbor"]), argsort_rows(back["neighbor"], back["region"])
    )
    out = np.empty(found.size, INNER)
    out["a"], out["b"] = ahead["component"][found], of
    for key in SADDLE_ORDER:
        out[key] = ahead[key][found]
    return out


@njit(cache=True, nogil=True)
def _paired(ahead, back, by_ahead, by_back):
    """Positions of the rows ahead that are answered, and the components of those that answer. Both in order of the pair."""
    used = j = 0
    of = np.empty(min(ahead.size, back.size), np.uint32)
    for e in by_ahead:
        here, there = ahead[e].region, ahead[e].neighbor
        while j < by_back.size and (
            back[by_back[j]].neighbor < here or (back[by_back[j]].neighbor == here and back[by_back[j]].region < there)
        ):
            j += 1
        if j < by_back.size and back[by_back[j]].neighbor == here and back[by_back[j]].region == there:
            by_ahead[used], of[used] = e, back[by_back[j]].component
            used += 1
    return by_ahead[:used], of[:used]


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


def assign(destination: np.ndarray, above: np.ndarray, finished: np.ndarray) -> np.ndarray:
    """The label of each component, from its fate and the labels of what went up and of what was finished.

    >>> assign(np.array([0, ~1, ~0, 1]), np.array([7, 8]), np.array([3, 0])).tolist()
    [7, 0, 3, 8]
    """
    return np.concatenate([above, finished[::-1]])[destination]
