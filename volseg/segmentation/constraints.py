"""Corrections of a decision: basins that are one object, and basins that are not, whatever the rules say.

The rules make an object by a sequence of joins: those of the forest in the order of edges, then those by mean. `replay`
goes through that sequence again. What must be one is joined first; then each join happens unless it would bring together
what must be apart. So of the joins between two points of one object the last is left out: the object is cut at its weakest
edge between them. No join is added but those that were asked for, so no other object changes. What a correction names is
an object, whatever its size. The sequence depends on no blocks, so what is made of it does not either.

Where a tree decided (`hierarchy`), no process knows the sequence, and none needs it all:

1. `named_parts`: the regions of a block that belong to objects which corrections name, and how these touch.
2. `correct_objects`: the spanning forest of these, which is their part of the whole one, and its `replay`.
3. `renumber`: all labels once more in the order of first voxels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numba import njit

from volseg.segmentation.agglomerate import SEED, forest, rank_components
from volseg.segmentation.basins import BlockBasins
from volseg.segmentation.edges import EDGE, SADDLE_ORDER, argsort_saddles, find, unite
from volseg.segmentation.stitch import REGION_MASK, Links, global_id


@dataclass(frozen=True)
class Constraints:
    """What corrections ask for.

    Attributes
    ----------
    joins
        int64 (n, 2): pairs of basins, or of regions by their global ids, that are in one object.
    splits
        int64 (n, 2): pairs that are in two.
    """

    joins: np.ndarray
    splits: np.ndarray

    @property
    def named(self) -> np.ndarray:
        """Every basin that is named, once, ascending."""
        return np.unique(np.concatenate([self.joins, self.splits]))

    def renamed(self, name: Callable[[np.ndarray], np.ndarray]) -> Constraints:
        """The same of basins, or regions, of other numbers."""
        return Constraints(name(self.joins), name(self.splits))

    def looked_up(self, values_of: Callable[[int], np.ndarray]) -> Constraints:
        """The same of what each region is known by; ``values_of`` gives that of the regions 1, 2, and so on of a block."""
        return self.renamed(lambda ids: look_up(ids, values_of))


def look_up(ids: np.ndarray, values_of: Callable[[int], np.ndarray]) -> np.ndarray:
    """The values of regions that are given by their global ids; int64, of the shape of ``ids``.

    >>> look_up(np.array([[1 << 32 | 2, 1]]), {0: np.array([7]), 1: np.array([8, 9])}.__getitem__).tolist()
    [[9, 7]]
    """
    out = np.empty(ids.shape, np.int64)
    for i in np.unique(ids >> 32):
        inside = ids >> 32 == i
        out[inside] = values_of(int(i))[(ids[inside] & REGION_MASK) - 1]
    return out


# ---------------------------------------------------------------- the sequence of joins once more


def replay(a: np.ndarray, b: np.ndarray, count: int, constraints: Constraints) -> np.ndarray:
    """The component of each of ``count`` basins after these joins, as far as the constraints allow them.

    Parameters
    ----------
    a, b
        Integer (joins,): basins on the two sides of each join, in the order of joins.
    count
        How many basins there are.
    constraints
        Of basins.

    Returns
    -------
    int64 (count,): the lowest basin of each one's component.

    Raises
    ------
    ValueError
        If a split is between basins that joins make one.

    Examples
    --------
    A chain of four basins, joined at its ends first. Where the ends must be apart, the last join between them is left out;
    where the first two must be, theirs is.

    >>> a, b, nothing = np.array([0, 2, 1]), np.array([1, 3, 2]), np.empty((0, 2), np.int64)
    >>> replay(a, b, 4, Constraints(nothing, np.array([[0, 3]]))).tolist()
    [0, 0, 2, 2]
    >>> replay(a, b, 4, Constraints(np.array([[0, 3]]), np.array([[1, 0]]))).tolist()
    [0, 1, 0, 0]
    """
    split = np.ascontiguousarray(constraints.splits).ravel()
    slot = np.full(count, -1, np.int32)
    named = np.unique(split)
    slot[named] = np.arange(named.size)
    joins = constraints.joins
    sequence = np.concatenate([joins[:, 0], a]), np.concatenate([joins[:, 1], b])
    root, left_out = _replay(*sequence, split, slot, np.searchsorted(named, split), named.size)
    if left_out[: len(joins)].any():
        raise ValueError("basins that must be one object must be two as well")
    return root


# Each component knows its ends: basins of it that must be apart from another one. They are a linked list from ``head`` to
# ``tail``, in the slot of the component's root (-1: none), and lists of components that join are hung together.
# Invariant: no component holds both ends of a split.
@njit(cache=True)
def _replay(
    a: np.ndarray, b: np.ndarray, split: np.ndarray, slot: np.ndarray, slot_of_end: np.ndarray, slots: int
) -> tuple[np.ndarray, np.ndarray]:
    """Roots, and which joins were left out; ``split`` has the two basins of each split one after the other, its ends."""
    head, tail = np.full(slots, -1, np.int64), np.full(slots, -1, np.int64)
    size, after = np.zeros(slots, np.int64), np.full(split.size, -1, np.int64)
    for end in range(split.size):
        s = slot_of_end[end]
        if size[s] == 0:
            head[s] = end
        else:
            after[tail[s]] = end
        tail[s] = end
        size[s] += 1
    parent, left_out = np.arange(slot.size), np.zeros(a.size, np.bool_)
    for e in range(a.size):
        p, q = find(parent, a[e]), find(parent, b[e])
        if p == q:
            continue
        s, t = slot[p], slot[q]
        if s >= 0 and t >= 0:
            if size[s] > size[t]:
                p, q, s, t = q, p, t, s
            end = head[s]
            while end >= 0 and find(parent, split[end ^ 1]) != q:
                end = after[end]
            if end >= 0:
                left_out[e] = True
                continue
            after[tail[s]] = head[t]
            tail[s] = tail[t]
            size[s] += size[t]
        root, _ = unite(parent, p, q)
        slot[root] = max(s, t) if s < 0 or t < 0 else s
    for i in range(parent.size):
        parent[i] = find(parent, i)
    return parent, left_out


# ---------------------------------------------------------------- after a tree


@dataclass(frozen=True)
class NamedParts:
    """What one block knows of the objects that corrections name.

    Attributes
    ----------
    region
        int64 (n,): global ids of their regions in the block, ascending.
    label, first
        int64 (n,): the label that the tree gave each, and its first voxel in the block.
    drains
        int64 (m, 2): as in `stitch.Links`.
    edges
        EDGE: between regions of one object, by global ids; of those inside the block and over its far faces, the spanning
        forest.
    """

    region: np.ndarray
    label: np.ndarray
    first: np.ndarray
    drains: np.ndarray
    edges: np.ndarray


@dataclass(frozen=True)
class CorrectedObjects:
    """What corrections make of the objects that they name.

    Attributes
    ----------
    replaced
        int64 (n,): labels that the tree gave these, ascending.
    place
        int64 (m,): of each object that there is instead, in the order of first voxels, how many of the tree's objects begin
        before it.
    region, label
        int64 (k,): global ids of all their regions, ascending, and the labels that these have now.
    objects
        int64 (1,): how many objects the volume has now.
    """

    replaced: np.ndarray
    place: np.ndarray
    region: np.ndarray
    label: np.ndarray
    objects: np.ndarray


def named_parts(
    i: int, table: BlockBasins, links: Links, label_of: Callable[[int], np.ndarray], named: np.ndarray
) -> NamedParts:
    """The `NamedParts` of block ``i``.

    Parameters
    ----------
    i
        Number of the block.
    table, links
        The block's; of the table neither ``crossing_edges`` nor the face are looked at.
    label_of
        Gives int64 (regions,): the tree's labels of regions 1, 2, and so on of a block; asked for ``i`` and blocks ahead.
    named
        int64: labels of objects that corrections name.
    """
    own = label_of(i)
    inside = np.isin(own, named)
    if not inside.any():
        nothing = np.empty(0, np.int64)
        return NamedParts(nothing, nothing, nothing, links.drains[:0], links.edges[:0])
    inner = table.edges.copy()
    for end in "ab":
        inner[end] = global_id(i, inner[end])
    edges = np.concatenate([inner, links.edges])
    edges = edges[inside[(edges["a"] & REGION_MASK) - 1]]
    label = own[(edges["a"] & REGION_MASK) - 1]
    other, block = np.empty_like(label), edges["b"] >> 32
    for j in np.unique(block):
        other[block == j] = label_of(int(j))[(edges["b"][block == j] & REGION_MASK) - 1]
    drains = links.drains[inside[(links.drains[:, 0] & REGION_MASK) - 1]]
    region = np.flatnonzero(inside)
    return NamedParts(
        global_id(i, region + 1), own[region], table.first[region], drains, _spanning(drains, edges[label == other])
    )


def _spanning(drains: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Of these edges, in their total order, those of the spanning forest in which each drain comes before all edges."""
    edges = edges[argsort_saddles(*(edges[field] for field in SADDLE_ORDER))]
    ids = np.unique(np.concatenate([drains.ravel(), edges["a"], edges["b"]]))
    a, b = (np.searchsorted(ids, np.r_[drains[:, k], edges["ab"[k]]]) for k in (0, 1))
    _, action = forest(a, b, np.zeros(a.size, np.int64), np.zeros(ids.size, np.int32), 0, 0, 0)
    return edges[action[len(drains) :] == SEED]


def correct_objects(
    parts: Iterable[NamedParts],
    constraints: Constraints,
    begun_before: Callable[[np.ndarray], np.ndarray],
    objects: int,
) -> CorrectedObjects:
    """What becomes of the objects that corrections name.

    Parameters
    ----------
    parts
        Of each block in the order of blocks.
    constraints
        Of regions, by global ids.
    begun_before
        Gives, for first voxels in ascending order, how many of the tree's objects begin before each.
    objects
        How many objects the tree found.
    """
    each = list(parts)
    region, label, first = (np.concatenate([getattr(p, name) for p in each]) for name in ("region", "label", "first"))
    drains = np.concatenate([part.drains for part in each])
    edges = _spanning(drains, np.concatenate([np.empty(0, EDGE), *(part.edges for part in each)]))

    def node(ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(region, ids)

    wanted = constraints.renamed(node)
    joins = np.concatenate([node(drains), wanted.joins])  # regions of one basin are one, before all else
    root = replay(node(edges["a"]), node(edges["b"]), region.size, Constraints(joins, wanted.splits))
    component, firsts = rank_components(root, first)
    replaced, place = np.unique(label), begun_before(firsts)
    own = np.arange(1, firsts.size + 1) + place - np.searchsorted(replaced, place, side="right")
    count = objects - replaced.size + firsts.size
    return CorrectedObjects(replaced, place, region, own[component], np.array([count]))


def renumber(i: int, label: np.ndarray, corrected: CorrectedObjects) -> np.ndarray:
    """The labels of regions 0 (none), 1, 2, and so on of block ``i``, once objects are corrected; int64.

    Parameters
    ----------
    i
        Number of the block.
    label
        Integer (regions + 1,): those that the tree gave; 0 for none.
    corrected
        What became of the objects that corrections name.

    Examples
    --------
    Of three objects the second falls apart: a part in block 0 begins where it did, the other after the third.

    >>> two = CorrectedObjects(np.array([2]), np.array([1, 3]), np.array([2, 4]), np.array([2, 4]), np.array([4]))
    >>> renumber(0, np.array([0, 1, 2, 3, 2]), two).tolist()
    [0, 1, 2, 3, 4]
    """
    label = label.astype(np.int64)
    moved = label - np.searchsorted(corrected.replaced, label) + np.searchsorted(corrected.place, label)
    out = np.where(label > 0, moved, 0)
    here = slice(*np.searchsorted(corrected.region, (i << 32, (i + 1) << 32)))
    out[corrected.region[here] & REGION_MASK] = corrected.label[here]
    return out
