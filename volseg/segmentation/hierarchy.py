"""Label a graph of basins that no process could hold: contract it in each block, then in steps of 2 x 2 x 2 blocks.

`rules` labels the minimum spanning forest of the regions, where a region that drains into another comes before all edges,
and a virtual root that knows every seed comes right after the edges that are no higher than the seed level. Two facts about
such forests (Tarjan, "Data structures and network algorithms", 1983, chapter 6) hold in any part of it:

- the highest edge of a cycle is not in the forest, so a part may drop it, whatever lies outside;
- the lowest edge that leaves a set of regions is in the forest, so a part may join along it once it knows all that leave.

Edges are totally ordered by `SADDLE_ORDER`, so both are certain, and the order of contraction does not matter. Of a part,
only what its outer faces leave open goes up: as much as its masked surface, not as its volume. What nothing leaves is
finished.

1. `block_graph`: the graph of one block. It knows every edge and drain over its faces, its neighbors' too.
2. `contract`: joins and drops what is certain.
3. `join`: the graph of up to eight parts, their common faces now inside. Back to 2, until one part is the volume.
4. `ranks` numbers the objects; on the way back `assign` tells each part the labels of the components that it passed up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field

import numpy as np
from numba import njit

from volseg.box import Blocks
from volseg.segmentation.basins import BlockBasins
from volseg.segmentation.edges import (
    EDGE,
    SADDLE_ORDER,
    argsort_rows,
    argsort_saddles,
    find,
    index_dtype,
    precedes,
    unite,
)
from volseg.segmentation.rules import Rules
from volseg.segmentation.stitch import REGION_MASK, Links, min_by_group, sum_by_group

_SADDLE = [(field, EDGE[field]) for field in SADDLE_ORDER]
INNER = np.dtype([("a", np.uint32), ("b", np.uint32), *_SADDLE])
OUTER = np.dtype([("component", np.uint32), ("region", np.int64), ("neighbor", np.int64), *_SADDLE])
ANSWER_FIELDS = ["component", "region", "neighbor"]  # what `join` keeps of a second side
ANSWER = np.dtype([(field, OUTER[field]) for field in ANSWER_FIELDS])
DRAIN = -1  # `high` of what joins before all edges; heights are not negative
SUMS = ("minimum", "voxels", "first", "probability_sum", "cut")


@dataclass(frozen=True)
class Graph:
    """Components of a part of the volume, and what is open about them.

    Attributes
    ----------
    minimum
        int32 (components,): lowest height so far.
    voxels, first, probability_sum
        int64 (components,): as in `BlockBasins`, so far.
    cut
        int64 (components, 3): as in `BlockBasins`, so far.
    inner
        INNER: edges between components, numbered from 0.
    outer
        OUTER: edges and drains from ``component``, whose ``region`` touches a ``neighbor`` outside the part (both global
        ids of `stitch`).
    pinned
        int64 (n,): components that corrections name, once each: objects, whatever their size.
    """

    minimum: np.ndarray
    voxels: np.ndarray
    first: np.ndarray
    probability_sum: np.ndarray
    cut: np.ndarray
    inner: np.ndarray
    outer: np.ndarray
    pinned: np.ndarray = dataclass_field(default_factory=lambda: np.empty(0, np.int64))


# ---------------------------------------------------------------- parts of the volume


def top_level(grid: Blocks) -> int:
    """The level whose one part is the volume; the parts of level 0 are the blocks."""
    return (max(grid.counts) - 1).bit_length()


def parts(grid: Blocks, level: int) -> Blocks:
    """The parts of that level: 2**level blocks along each axis.

    >>> grid = Blocks((5, 1, 1), (1, 1, 1))
    >>> [len(parts(grid, level)) for level in range(top_level(grid) + 1)]
    [5, 3, 2, 1]
    """
    z, y, x = (n << level for n in grid.block)
    return Blocks(grid.shape, (z, y, x))


def children(grid: Blocks, level: int, n: int) -> list[int]:
    """Parts of the level below that make up part ``n``, in raster order."""
    return parts(grid, level - 1).overlapping(parts(grid, level)[n])


# ---------------------------------------------------------------- 1


def linked_blocks(grid: Blocks, i: int, connectivity: int) -> list[int]:
    """Block ``i``, and all blocks in which its voxels can have neighbors."""
    return [i, *grid.neighbors(i)] if connectivity == 6 else grid.overlapping(grid[i].grow(1))


def block_graph(
    i: int, table: BlockBasins, links: Mapping[int, Links], pinned: np.ndarray | Sequence[int] = ()
) -> Graph:
    """The `Graph` of block ``i``, whose components are its regions.

    Parameters
    ----------
    i
        Number of the block.
    table
        Its table.
    links
        Those of all `linked_blocks`, by number.
    pinned
        Regions (from 1) of the block that corrections name.
    """
    inner = np.empty(table.edges.size, INNER)
    inner["a"], inner["b"] = table.edges["a"] - 1, table.edges["b"] - 1
    for field in SADDLE_ORDER:
        inner[field] = table.edges[field]
    own = links[i]
    outer = [_outer_drains(own.drains[:, 0], own.drains[:, 1]), _outer_edges(own.edges["a"], own.edges["b"], own.edges)]
    for j in links.keys() - {i}:
        drains = links[j].drains[links[j].drains[:, 1] >> 32 == i]
        edges = links[j].edges[links[j].edges["b"] >> 32 == i]
        outer += [_outer_drains(drains[:, 1], drains[:, 0]), _outer_edges(edges["b"], edges["a"], edges)]
    sums = {field: getattr(table, field) for field in SUMS}
    return Graph(**sums, inner=inner, outer=np.concatenate(outer), pinned=np.unique(np.array(pinned, np.int64)) - 1)


def _outer_drains(region: np.ndarray, neighbor: np.ndarray) -> np.ndarray:
    out = np.zeros(region.size, OUTER)
    out["component"], out["region"], out["neighbor"] = (region & REGION_MASK) - 1, region, neighbor
    out["high"] = DRAIN
    return out


def _outer_edges(region: np.ndarray, neighbor: np.ndarray, edges: np.ndarray) -> np.ndarray:
    out = _outer_drains(region, neighbor)
    for field in SADDLE_ORDER:
        out[field] = edges[field]
    return out


# ---------------------------------------------------------------- 2


def contract(graph: Graph, level: int) -> tuple[Graph, Graph, np.ndarray]:
    """What of a part goes up, what is finished, and the destination of each component.

    Parameters
    ----------
    graph
        The part.
    level
        The seed level: components whose minimum is at most this are seeds.

    Returns
    -------
    up
        `Graph` of what outer faces leave open. Of two rows to the same region outside only the lowest goes up.
    finished
        `Graph` without rows: the finished objects, ascending by ``first``.
    destination
        int64 (components,): the component's number in ``up``, or ``~number`` (below 0) in ``finished``.
    """
    count = graph.minimum.size
    neighbor, outside = _number_distinct(graph.outer["neighbor"])
    seeded = np.concatenate([graph.minimum <= level, np.zeros(outside, bool)])
    inner_order, outer_order = (
        argsort_saddles(*(rows[field] for field in SADDLE_ORDER)) for rows in (graph.inner, graph.outer)
    )
    possible, certain = (np.arange(size, dtype=index_dtype(seeded.size)) for size in (seeded.size, count))
    keep_inner, keep_outer = _contract(
        graph.inner, graph.outer, neighbor, inner_order, outer_order, seeded, possible, certain, level
    )
    del neighbor, seeded, inner_order, outer_order, possible
    inner, outer = graph.inner[keep_inner], graph.outer[keep_outer]
    group, sums = _sum(graph, certain)
    is_open = np.zeros(sums["minimum"].size, bool)
    for ends in (inner["a"], inner["b"], outer["component"]):
        is_open[group[ends]] = True
    finished = np.flatnonzero(~is_open)
    finished = finished[np.argsort(sums["first"][finished])]
    new_index = np.empty(is_open.size, np.int64)
    new_index[is_open] = np.arange(np.count_nonzero(is_open))
    new_index[finished] = ~np.arange(finished.size)
    destination = new_index[group]
    inner["a"], inner["b"] = destination[inner["a"]], destination[inner["b"]]
    outer["component"] = destination[outer["component"]]
    pinned = np.unique(destination[graph.pinned])
    up = _select(sums, is_open, inner, outer, pinned[pinned >= 0])
    return up, _select(sums, finished, inner[:0], outer[:0], ~pinned[pinned < 0]), destination


def _select(
    sums: dict[str, np.ndarray], components: np.ndarray, inner: np.ndarray, outer: np.ndarray, pinned: np.ndarray
) -> Graph:
    columns = {name: column[components] for name, column in sums.items()}
    return Graph(**columns, inner=inner, outer=outer, pinned=pinned)


def _number_distinct(ids: np.ndarray) -> tuple[np.ndarray, int]:
    """The number (from 0) of each id among the distinct ones in ascending order, and how many these are."""
    return _count_up(ids, argsort_rows(ids)) if ids.size else (np.empty(0, np.uint32), 0)


@njit(cache=True, nogil=True)
def _count_up(ids: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, int]:
    out = np.empty_like(order)
    last = 0
    for k in range(order.size):
        last += k > 0 and ids[order[k]] != ids[order[k - 1]]
        out[order[k]] = last
    return out, last + 1


# Kruskal's algorithm over inner and outer rows in one ascending order, with two union-finds: ``possible`` joins all that the
# rest of the volume could join, ``certain`` what it cannot prevent. Regions outside stand after the components, and nothing
# is known of them. A set of ``possible`` is ``closed`` while it has no seed and no such region: then all that leaves it is
# known, and the row at hand is the lowest, so a join over it is certain.
# Invariant: before a row, two nodes are in one set of ``possible`` if and only if lower rows connect them without joining two
# seeds; what ``certain`` joins is in the forest whatever lies outside.
@njit(cache=True, nogil=True)
def _contract(
    inner: np.ndarray,
    outer: np.ndarray,
    neighbor: np.ndarray,
    inner_order: np.ndarray,
    outer_order: np.ndarray,
    seeded: np.ndarray,
    possible: np.ndarray,
    certain: np.ndarray,
    level: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of both kinds must go up; ``certain`` becomes the root of each component along joins that are certain."""
    count = certain.size
    closed = np.zeros(seeded.size, np.bool_)
    for k in range(count):
        closed[k] = not seeded[k]
    keep_inner, keep_outer = np.zeros(inner.size, np.bool_), np.zeros(outer.size, np.bool_)
    i = j = 0
    while i < inner_order.size or j < outer_order.size:
        is_inner = j == outer_order.size or (
            i < inner_order.size and not precedes(outer[outer_order[j]], inner[inner_order[i]])
        )
        if is_inner:
            e = np.int64(inner_order[i])
            a, b, high = np.int64(inner[e].a), np.int64(inner[e].b), inner[e].high
            i += 1
        else:
            e = np.int64(outer_order[j])
            a, b, high = np.int64(outer[e].component), count + np.int64(neighbor[e]), outer[e].high
            j += 1
        p, q = find(possible, a), find(possible, b)
        joins_seeds = high <= level or high == DRAIN
        if p == q or (not joins_seeds and seeded[p] and seeded[q]):
            continue
        if is_inner and (joins_seeds or closed[p] or closed[q]):
            r, s = find(certain, a), find(certain, b)
            unite(certain, r, s)
        elif is_inner:
            keep_inner[e] = True
        else:
            keep_outer[e] = True
        root, child = unite(possible, p, q)
        seeded[root] = seeded[root] or seeded[child]
        closed[root] = closed[root] and closed[child]
    for k in range(count):
        certain[k] = find(certain, k)
    return keep_inner, keep_outer


def _sum(graph: Graph, root: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The group (from 0) of each component, and the groups' sums."""
    is_root = root == np.arange(root.size)
    group = (np.cumsum(is_root) - 1)[root]
    groups = int(np.count_nonzero(is_root))
    return group, {
        "minimum": min_by_group(graph.minimum, group, groups).astype(np.int32),
        "voxels": sum_by_group(graph.voxels, group, groups),
        "first": min_by_group(graph.first, group, groups),
        "probability_sum": sum_by_group(graph.probability_sum, group, groups),
        "cut": sum_by_group(graph.cut, group, groups),
    }


def labeled(finished: Graph, rules: Rules) -> np.ndarray:
    """Which finished objects have a label, by the rules that see an object's sums and nothing else; bool (objects,)."""
    kept = rules.is_large(finished.voxels, finished.cut) & (finished.voxels <= rules.max_voxels)
    if not rules.keep_unseeded:
        kept &= finished.minimum <= rules.seeds[1]
    kept[finished.pinned] = True
    return kept


# ---------------------------------------------------------------- 3


def join(below: Iterable[Graph], grid: Blocks, level: int, n: int) -> Graph:
    """The `Graph` of one part from those of its children; components are numbered one after another.

    A row over a face between two children is an edge where both still have it: what either dropped is in no forest.

    Parameters
    ----------
    below
        What goes up from each of the part's `children`, in their order. They are taken one at a time, and what is no longer
        needed of one is dropped before the next.
    grid
        The volume's blocks.
    level, n
        The part.
    """
    sums: dict[str, list[np.ndarray]] = {field: [] for field in SUMS}
    inner, outer, pinned = [np.empty(0, INNER)], [np.empty(0, OUTER)], [np.empty(0, np.int64)]
    claims: dict[tuple[int, int], np.ndarray] = {}  # by pair of children: what the first lists of the second
    answers: dict[tuple[int, int], np.ndarray] = {}  # and the second of the first
    siblings, graphs, count = children(grid, level, n), iter(below), 0
    for child in siblings:
        graph = next(graphs)
        inner.append(_shifted(graph.inner, ("a", "b"), count))
        rows = _shifted(graph.outer, ("component",), count)
        pinned.append(graph.pinned + count)
        for field, column in sums.items():
            column.append(getattr(graph, field))
        count += graph.minimum.size
        del graph
        part = _parts_of(rows["neighbor"], grid, level - 1)
        outer.append(rows[~np.isin(part, siblings)])
        for sibling in siblings:
            if sibling > child:
                claims[child, sibling] = rows[part == sibling]
            elif sibling < child:
                answers[sibling, child] = rows[part == sibling][ANSWER_FIELDS].astype(ANSWER)
        del rows, part
    for pair in list(claims):
        inner.append(_common_edges(claims.pop(pair), answers.pop(pair)))
    columns = {field: np.concatenate(column) for field, column in sums.items()}
    return Graph(**columns, inner=_concatenate(inner), outer=_concatenate(outer), pinned=np.concatenate(pinned))


def _concatenate(pieces: list[np.ndarray]) -> np.ndarray:
    """The pieces in one array; the list is empty then."""
    out = np.concatenate(pieces)
    pieces.clear()
    return out


def _shifted(rows: np.ndarray, fields: tuple[str, ...], offset: int) -> np.ndarray:
    out = rows.copy()
    for field in fields:
        out[field] += offset
    return out


def _parts_of(ids: np.ndarray, grid: Blocks, level: int) -> np.ndarray:
    """The part of that level in which each region lies."""
    zyx = np.unravel_index(ids >> 32, grid.counts)
    return np.ravel_multi_index([place >> level for place in zyx], parts(grid, level).counts)


def _common_edges(claims: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """INNER rows of the pairs of regions that both sides list: OUTER rows of one, and ANSWER rows of the other.

    A contracted graph lists no pair twice.
    """
    order = argsort_rows(claims["region"], claims["neighbor"])
    answer_order = argsort_rows(answers["neighbor"], answers["region"])
    rows, component = _match(claims, answers, order, answer_order)
    out = np.empty(rows.size, INNER)
    out["a"], out["b"] = claims["component"][rows], component
    for field in SADDLE_ORDER:
        out[field] = claims[field][rows]
    return out


@njit(cache=True, nogil=True)
def _match(
    claims: np.ndarray, answers: np.ndarray, order: np.ndarray, answer_order: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Claims that are answered, and the components of their answers, in the order of the pair; ``order`` is used up."""
    used = j = 0
    component = np.empty(min(claims.size, answers.size), np.uint32)
    for e in order:
        region, neighbor = claims[e].region, claims[e].neighbor
        while j < answer_order.size and (
            answers[answer_order[j]].neighbor < region
            or (answers[answer_order[j]].neighbor == region and answers[answer_order[j]].region < neighbor)
        ):
            j += 1
        if (
            j < answer_order.size
            and answers[answer_order[j]].neighbor == region
            and answers[answer_order[j]].region == neighbor
        ):
            order[used], component[used] = e, answers[answer_order[j]].component
            used += 1
    return order[:used], component[:used]


# ---------------------------------------------------------------- 4


def ranks(firsts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The place (from 0) of each of these distinct voxels among all of them.

    Parameters
    ----------
    firsts
        int64 arrays of linear indices.

    Returns
    -------
    list of int64 arrays of the same sizes

    Examples
    --------
    >>> [rank.tolist() for rank in ranks([np.array([5, 9]), np.array([7])])]
    [[0, 2], [1]]
    """
    voxels = np.concatenate([np.empty(0, np.int64), *firsts])
    rank = np.empty(voxels.size, np.int64)
    rank[np.argsort(voxels)] = np.arange(voxels.size)
    return np.split(rank, np.cumsum([first.size for first in firsts])[:-1]) if firsts else []


def assign(destination: np.ndarray, up: np.ndarray, finished: np.ndarray) -> np.ndarray:
    """The label of each component of a part.

    Parameters
    ----------
    destination
        As `contract` gave it.
    up, finished
        int64: labels of what went up, and of what was finished.

    Returns
    -------
    int64 (components,)

    Examples
    --------
    >>> assign(np.array([0, ~1, ~0, 1]), np.array([7, 8]), np.array([3, 0])).tolist()
    [7, 0, 3, 8]
    """
    return np.concatenate([up, finished[::-1]])[destination]
