"""What a box of a finished run can tell for sure, whatever lies around it: `check_box` counts the voxels that are wrong.

Labels come from a forest over the whole volume, so a box alone cannot tell them. It can tell:

    heights  cut into thin pieces, the heights are those of the box in one piece
    basins   each voxel's stored basin is that of the voxel it descends to, and a minimum's is its own (needs ``work``)
    ids      labels are the stored id map applied to the stored regions (needs ``work``)
    mask     no label outside the mask, but in holes that one object encloses, where holes are filled
    rule     one label per basin; basins that the forest must join, in any surroundings, have one label; an object that
             is complete in the box is kept or dropped by its size and seed, is alone with its id, and ids are in raster order;
             objects that corrections name are left out, and of those of a partition one label per basin is all
    table    objects complete in the box have exactly the table's row; parts of others stay inside its bounding box
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numba import njit

from volseg.box import Blocks, Box, VoxelSize
from volseg.evaluation.stored import StoredRun
from volseg.segmentation import holes, stitch
from volseg.segmentation.basins import BlockBasins, watershed_block
from volseg.segmentation.edges import SADDLE_ORDER, find
from volseg.segmentation.heights import block_heights
from volseg.segmentation.rules import NO_LIMIT, Rules

CHECKS = ("heights", "basins", "ids", "mask", "rule", "table")
THIN = (5, 31)  # voxels along z and y, beside the halo, of the pieces that heights are recomputed in
CACHED_BLOCKS = 64  # blocks whose tables are kept while descents are followed

TableOf = Callable[[int], "BlockBasins | None"]


@dataclass(frozen=True)
class BoxCheck:
    """What one box told.

    Attributes
    ----------
    box
        The voxels that were checked.
    masked
        How many of them lie in the mask.
    regions
        How many basins the box has when it is cut out alone.
    sure_joins
        How many joins of these happen in any surroundings.
    complete_objects
        How many objects lie whole in the box.
    wrong
        Voxels that are wrong by each of `CHECKS`; None where it could not be checked.
    first
        The first wrong voxel (z, y, x) of each check that failed.
    """

    box: Box
    masked: int
    regions: int
    sure_joins: int
    complete_objects: int
    wrong: dict[str, int | None]
    first: dict[str, list[int]]

    def to_json(self) -> dict:
        """Plain values that ``json.dumps`` takes."""
        return {"box": str(self.box), "voxels": self.box.voxels, "masked": self.masked, "regions": self.regions,
                "joins": self.sure_joins, "whole": self.complete_objects, "wrong": self.wrong, "first": self.first}  # fmt: skip


def check_box(run: StoredRun, box: Box) -> BoxCheck:
    """The voxels of ``box`` are compared with what any surroundings of the box would give them."""
    probability = run.probability(box)
    height = heights(run, probability, box)
    mass = inner(run, probability[0], box)
    region, table = watershed_block(height, mass, box, run.shape, run.config.fragments.connectivity)
    label = run.labels.read(box)
    wrong, joins, complete = _against_rule(run, box, region, table, label)
    masks = {
        "heights": _heights_differ(run, box, probability, height),
        "mask": _against_holes(run, box, region, label) if run.fills else (label != 0) & (region == 0),
        "rule": wrong,
        "table": _against_table(run, box, label, mass, run.voxel_size_nm),
    }
    if not run.missing:
        masks |= _against_work(run, box, region, table, label)
    places = dict.fromkeys(CHECKS, box)
    if run.run.restored:
        output = run.run.to_own.inside(box)
        places |= {"ids": output, "table": output}
        masks |= _against_output(run, box, output, label, mass)
    counts = {name: int(np.count_nonzero(masks[name])) if name in masks else None for name in CHECKS}
    return BoxCheck(
        box=box,
        masked=int(np.count_nonzero(region)),
        regions=int(table.root.size),
        sure_joins=joins,
        complete_objects=complete,
        wrong=counts,
        first={name: first_voxel(masks[name], places[name]) for name, count in counts.items() if count},
    )


def heights(run: StoredRun, probability: np.ndarray, box: Box) -> np.ndarray:
    """Heights of ``box`` and one voxel around it; ``probability`` is that of the box and its halo, cut to the volume."""
    return block_heights(probability, box, run.shape, run.config.fragments, run.voxel_size_nm)


def inner(run: StoredRun, field: np.ndarray, box: Box) -> np.ndarray:
    """The voxels of ``box`` of a field that holds its halo too."""
    return np.ascontiguousarray(field[box.slices_within(box.grow(run.halo).clip(run.shape))])


def first_voxel(wrong: np.ndarray, box: Box) -> list[int]:
    """The first marked voxel of a box, z y x in the volume."""
    index = np.unravel_index(np.argmax(wrong), wrong.shape)
    return [int(a + b) for a, b in zip(index, box.start, strict=True)]


def _heights_differ(run: StoredRun, box: Box, probability: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Which voxels of ``box`` have another height when the box is cut into thin pieces."""
    halo = run.halo
    padded = box.grow(halo).clip(run.shape)
    out = np.zeros(box.shape, bool)
    for part in Blocks(box.shape, (THIN[0] + halo[0], THIN[1] + halo[1], box.shape[2])):
        piece = part.shift(box.start)
        needed = piece.grow(halo).clip(run.shape)
        cut = heights(run, probability[(slice(None), *needed.slices_within(padded))], piece)
        expected = height[piece.grow(1).slices_within(box.grow(1))]
        out[part.slices] = (cut != expected)[1:-1, 1:-1, 1:-1]
    return out


# ---------------------------------------------------------------- stored basins


def _against_work(
    run: StoredRun, box: Box, region: np.ndarray, table: BlockBasins, label: np.ndarray
) -> dict[str, np.ndarray]:
    """Which voxels have another basin than their descent says, and which another label than the id map gives.

    A descent that ends in the box names its minimum. One that leaves names the first voxel outside, whose stored basin
    must be the same; so every step of every descent is compared in some box.
    """
    padded = box.grow(1).clip(run.shape)
    root, mapped = _stored_basins(run, padded)
    ends = np.unravel_index(table.root, run.shape)
    index = tuple(np.clip(a - b, 0, n - 1) for a, b, n in zip(ends, padded.start, padded.shape, strict=True))
    expected = np.r_[-1, np.where(table.is_exit, root[index], table.root)]
    core = box.slices_within(padded)
    return {"basins": root[core] != expected[region], "ids": mapped[core] != label.astype(np.int64)}


def _stored_basins(run: StoredRun, box: Box) -> tuple[np.ndarray, np.ndarray]:
    """For each voxel the linear index of the minimum of its stored basin (-1: none, -2: its region is unknown), and the
    label that the id map gives it (-2: unknown)."""
    grid = run.grid
    table_of = lru_cache(CACHED_BLOCKS)(lambda j: run.layout.block_basins.load(j) if j < len(grid) else None)
    drains_of = lru_cache(CACHED_BLOCKS)(lambda j: run.layout.links.load(j).drains)
    region = run.regions(box)
    root, mapped = np.empty(box.shape, np.int64), np.empty(box.shape, np.int64)
    for j in grid.overlapping(box):
        part = grid[j].intersect(box).slices_within(box)
        used, index = np.unique(region[part], return_inverse=True)
        root[part] = _minima(j, used.astype(np.int64), table_of, drains_of)[index.reshape(region[part].shape)]
        place = region[part]
        if run.fills:
            place = holes.number_holes(run.regions(grid[j]))[grid[j].intersect(box).slices_within(grid[j])]
        ids = np.r_[run.layout.block_labels.load(j).label.astype(np.int64), -2]
        mapped[part] = ids[np.minimum(place, ids.size - 1)]
    return root, mapped


def _minima(block: int, regions: np.ndarray, table_of: TableOf, drains_of: Callable[[int], np.ndarray]) -> np.ndarray:
    """The minimum (linear index) of each region's basin, following exits from block to block; -1 for region 0, -2 where
    the tables lead nowhere or not down."""
    out = np.where(regions == 0, -1, -2)
    todo = np.flatnonzero(regions > 0)
    names = stitch.global_id(block, regions[todo])
    last = np.full((2, todo.size), np.iinfo(np.int64).max)  # height and index that the next exit must be below
    while todo.size:
        known, leaves, depth, root = region_rows(names, table_of)
        out[todo[known & ~leaves]] = root[known & ~leaves]
        down = known & leaves & ((depth < last[0]) | ((depth == last[0]) & (root < last[1])))
        todo, last = todo[down], np.stack([depth, root])[:, down]
        names = _drained_into(names[down], drains_of)
    return out


def region_rows(names: np.ndarray, table_of: TableOf) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each region: whether its table knows it, whether it is an exit, height and linear index at its root.

    ``table_of`` gives a block's table, None where there is no such block.
    """
    known, leaves = np.zeros(names.size, bool), np.zeros(names.size, bool)
    depth, root = np.zeros(names.size, np.int64), np.zeros(names.size, np.int64)
    for j in np.unique(names[names >= 0] >> 32):
        table, index = table_of(int(j)), np.flatnonzero(names >> 32 == j)
        if table is None:
            continue
        row = (names[index] & stitch.REGION_MASK) - 1
        fits = (row >= 0) & (row < table.root.size)
        index, row = index[fits], row[fits]
        known[index], leaves[index] = True, table.is_exit[row]
        depth[index], root[index] = table.minimum[row], table.root[row]
    return known, leaves, depth, root


def _drained_into(names: np.ndarray, drains_of: Callable[[int], np.ndarray]) -> np.ndarray:
    """The region that each exit region drains into; -1 where the links do not say."""
    out = np.full(names.size, -1, np.int64)
    for j in np.unique(names >> 32):
        index, drains = np.flatnonzero(names >> 32 == j), drains_of(int(j))
        row = np.searchsorted(drains[:, 0], names[index])
        listed = row < len(drains)
        index, row = index[listed], row[listed]
        out[index] = np.where(drains[row, 0] == names[index], drains[row, 1], -1)
    return out


# ---------------------------------------------------------------- the rule


def _against_rule(
    run: StoredRun, box: Box, region: np.ndarray, table: BlockBasins, label: np.ndarray
) -> tuple[np.ndarray, int, int]:
    """Which voxels have a label that no surroundings of the box could give; how many joins are sure, objects complete."""
    rules, size = run.rules, table.root.size
    edges = table.edges[np.lexsort([table.edges[key] for key in reversed(SADDLE_ORDER)])]
    outward = table.is_exit.copy()
    outward[table.face_region.astype(np.int64) - 1] = True
    root, seeded, complete = sure_joins(edges["a"] - 1, edges["b"] - 1, edges["high"], table.minimum, outward, rules)
    joins = size - int(np.count_nonzero(root == np.arange(size)))
    region_label = np.zeros(size + 1, label.dtype)
    region_label[region.ravel()[::-1]] = label.ravel()[::-1]  # of its first voxel, which is written last
    region_label[0] = 0
    if run.run.partition:  # what says which basins are one object
        return label != region_label[region], 0, 0
    voxels = np.bincount(root, weights=table.voxels, minlength=size).astype(np.int64)[root]
    kept = rules.is_large(voxels, stitch.sum_by_group(table.cut, root, size)[root])
    kept &= seeded[root] | rules.keep_unseeded
    complete = complete[root]
    kept &= (rules.max_voxels == NO_LIMIT) | (complete & (voxels <= rules.max_voxels) & (not run.fills))
    stored = region_label[1:]
    corrected = np.isin(stored, run.corrected)
    complete &= ~(np.bincount(root, weights=corrected, minlength=size) > 0)[root]
    bad = stored != stored[root]
    bad |= kept & (stored == 0)
    if run.fills:  # what is dropped may lie in a hole, and a hole in the first corner begin before its object
        bad |= _out_of_order(stored, root, complete & kept & any(box.start), table.first)
    else:
        bad |= complete & ~kept & (stored != 0)
        bad |= complete & (stored != 0) & _shared(stored, root)
        bad |= _out_of_order(stored, root, complete, table.first)
    bad &= ~corrected
    wrong = (region != 0) & (np.r_[False, bad][region] | (label != region_label[region]))
    return wrong, joins, int(np.count_nonzero(complete & kept & (root == np.arange(size))))


def sure_joins(
    a: np.ndarray, b: np.ndarray, saddle: np.ndarray, depth: np.ndarray, outward: np.ndarray, rules: Rules
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The joins of Kruskal's algorithm on part of a graph that happen whatever the rest of the graph is.

    An edge joins for sure at most at the seed height, or when one side has neither seed nor unlisted edges: that side is
    then complete, and this its lowest edge out. Where rules on whole borders or holes may join what the forest keeps
    apart, only objects that touch no other are complete. So are, under a rule of depth, only those that all others stay
    clear of whatever the rest is: what lies outside can make a side deeper, never shallower.

    Parameters
    ----------
    a, b
        The regions (from 0) at the two ends of each edge; edges come in ascending order.
    saddle
        Height of each edge.
    depth
        Height of each region's minimum.
    outward
        Which regions may have edges that are not listed.
    rules
        The run's rules.

    Returns
    -------
    root
        The first region of each region's component.
    seeded
        At roots: whether the component has a seed for sure.
    complete
        At roots: whether the component is a complete object.

    Examples
    --------
    >>> depth = np.array([3, 9, 3])
    >>> sure_joins(np.array([0, 1]), np.array([1, 2]), np.array([9, 9]), depth, np.zeros(3, bool), Rules(3))
    (array([0, 0, 2]), array([ True, False,  True]), array([ True,  True,  True]))
    """
    alone = rules.join_height >= 0 or rules.fill_voxels > 0
    return _sure_joins(a, b, saddle, depth, outward.copy(), *rules.seeds, alone)


# Kruskal over the edges in ascending order, of which only those join that any surroundings would join too. ``seeded`` is
# what is sure of a component: an edge that may or may not join makes one seed count for both ends, and neither is complete.
@njit(cache=True)
def _sure_joins(a, b, saddle, depth, outward, level, low, persistence, alone):
    parent, deepest, seeded = np.arange(depth.size), depth.astype(np.int64), depth <= low
    complete = ~outward
    for e in range(a.size):
        p, q = find(parent, a[e]), find(parent, b[e])
        if p == q:
            continue
        free = (not seeded[p] and not outward[p]) or (not seeded[q] and not outward[q])
        if free or saddle[e] <= level:
            top, under = min(p, q), max(p, q)
            parent[under] = top
            seeded[top] = seeded[top] or seeded[under]
            deepest[top] = min(deepest[top], deepest[under])
            outward[top] = outward[top] or outward[under]
            complete[top] = complete[top] and complete[under]
        elif not (seeded[p] and seeded[q]):  # they join unless both have a seed: then one seed is enough for both
            seeded[p] = seeded[q] = seeded[p] or seeded[q]
            complete[p] = complete[q] = False
        elif alone or saddle[e] - max(deepest[p], deepest[q]) < persistence:
            complete[p] = complete[q] = False
    for i in range(parent.size):
        parent[i] = find(parent, i)
    return parent, seeded, complete


def _shared(label: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Which regions have a label that also stands in another component."""
    pairs = np.unique(np.stack([label.astype(np.int64), root]), axis=1)
    ids, groups = np.unique(pairs[0], return_counts=True)
    return np.isin(label, ids[groups > 1])


def _out_of_order(label: np.ndarray, root: np.ndarray, complete: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Which regions are of a complete object whose id is not above those of all complete objects that begin before it."""
    begin = np.full(root.size, np.iinfo(np.int64).max)
    np.minimum.at(begin, root, first)
    tops = np.flatnonzero(complete & (label != 0) & (root == np.arange(root.size)))
    tops = tops[np.argsort(begin[tops])]
    ids = label[tops].astype(np.int64)
    late = tops[1:][ids[1:] <= np.maximum.accumulate(ids)[:-1]]
    return np.isin(root, late)


def _against_holes(run: StoredRun, box: Box, region: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Which voxels outside the mask have a label that they cannot have, or lack the one they must have.

    A hole has one label. With one, it is small, reaches no border of the volume and touches nothing of another label.
    A hole that is complete in the box, is like that and touches one label alone, has it.
    """
    table, place = holes.block_holes(region, box, run.shape), holes.number_holes(region)
    regions, count = int(table.regions), table.voxels.size
    place_label = np.zeros(regions + 1 + count, np.int64)
    place_label[place.ravel()[::-1]] = label.ravel()[::-1]
    number, touched = table.contacts[:, 0] - regions - 1, place_label[table.contacts[:, 1]]
    lowest = stitch.min_by_group(touched, number, count)
    one_label = lowest == -stitch.min_by_group(-touched, number, count)
    complete = np.ones(place_label.size, bool)
    complete[table.run_piece] = False
    fillable = ~table.is_open & (table.voxels <= run.rules.fill_voxels) & one_label
    own = place_label[regions + 1 :]
    bad = np.where(own > 0, ~fillable | (own != lowest), complete[regions + 1 :] & fillable & (lowest > 0))
    return (region == 0) & (np.r_[np.zeros(regions + 1, bool), bad][place] | (label != place_label[place]))


# ---------------------------------------------------------------- the object table


def _against_output(
    run: StoredRun, box: Box, output: Box, label: np.ndarray, mass: np.ndarray
) -> dict[str, np.ndarray]:
    """Of a run whose labels were brought back to its source's grid: which of the voxels ``output`` there, those with their
    middle in ``box``, have another label than the run's own voxel, or one that the object table contradicts."""
    if not output.voxels:
        return {name: np.zeros(output.shape, bool) for name in ("ids", "table")}
    to_own = run.run.to_own
    expected, masses = (to_own.take(field, box, output) for field in (label, mass))
    if run.run.given_roi:
        expected = expected * run.run.given_roi.read(output)
    stored = run.output_labels(output)
    table = _against_table(run, output, stored, masses, run.run.output_voxel_size_nm)
    return {"ids": stored != expected, "table": table}


def _against_table(
    run: StoredRun, box: Box, label: np.ndarray, mass: np.ndarray, voxel_size_nm: VoxelSize
) -> np.ndarray:
    """Which voxels have a label that the object table does not know, or whose row they contradict."""
    ids, group = np.unique(label[label != 0], return_inverse=True)
    measured = _measure_objects(group, np.nonzero(label), mass[label != 0], box, voxel_size_nm)
    table = run.objects
    row = np.minimum(np.searchsorted(table["id"], ids), max(0, table["id"].size - 1))
    right = np.isin(ids, table["id"])
    expected = {name: table[name][row[right]] for name in measured}
    measured = {name: column[right] for name, column in measured.items()}
    complete = np.ones(right.sum(), bool)
    fits = measured["voxels"] <= expected["voxels"]
    for axis, low, high in zip("zyx", box.start, box.stop, strict=True):
        complete &= (expected[f"{axis}0"] >= low) & (expected[f"{axis}1"] <= high)
        fits &= measured[f"{axis}0"] >= expected[f"{axis}0"]
        fits &= measured[f"{axis}1"] <= expected[f"{axis}1"]
    same = np.all([measured[name] == expected[name] for name in measured], axis=0)
    right[right] = fits & (same | ~complete)
    out = np.zeros(label.shape, bool)
    out[label != 0] = ~right[group]
    return out


def _measure_objects(
    group: np.ndarray, index: tuple[np.ndarray, ...], mass: np.ndarray, box: Box, voxel_size_nm: VoxelSize
) -> dict[str, np.ndarray]:
    """Columns of the object table, from voxels at ``index`` (z, y, x in the box) of objects ``group`` (0..n-1).

    Computed otherwise than in `objects`, from the same integers, so that the floats are equal too.
    """
    voxels = np.bincount(group)
    columns = {"voxels": voxels, "mean_probability": np.bincount(group, mass).astype(np.int64) / (255.0 * voxels)}
    for axis, place, origin, size_nm in zip("zyx", index, box.start, voxel_size_nm, strict=True):
        place = place + origin
        low, high = np.full(voxels.size, np.iinfo(np.int64).max), np.zeros(voxels.size, np.int64)
        np.minimum.at(low, group, place)
        np.maximum.at(high, group, place + 1)
        columns |= {f"{axis}0": low, f"{axis}1": high}
        columns[f"centroid_{axis}_nm"] = np.bincount(group, place).astype(np.int64) / voxels * size_nm
    return columns
