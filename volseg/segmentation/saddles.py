"""The proofreading queue: joins and borders of objects, each with how little would have decided it otherwise.

A row is a saddle. ``margin`` is how far the number that decided lies from where it would have decided otherwise, in
probability: the least certain rows come first. Listed are

    border  every pair of labels that touch
    join    a step of `rules` that put two parts of an object together, where each part alone had the minimum size

and of these the `MAX_ROWS` least certain. Joins with a part below the minimum size are left out: every voxel of a flat
interior makes one. ``rule`` says which number decided:

    seed         saddle against seed level. Of a join it is how much higher than the level the saddle's probability is
    unseeded     one part of a join holds no seed: how much below the (low) seed level its highest probability is; of a border,
                 where there is a low level, how much above it the highest of the lesser object is
    persistence  how deep the shallower part lies below the saddle, against ``stitch.persistence``
    mean         the whole border's mean probability, against ``stitch.join_mean``

A join by several rules has the greatest margin of them, a border that several rules could join the smallest. What
corrections say is certain, and not listed.

Where a `hierarchy` stitched, no process knows the order of joins inside an object, so borders alone are listed:
`block_borders` finds them in each block's tables, and `object_graph` makes of them what `rank_saddles` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numba import njit

from volseg.box import Triple, VoxelSize
from volseg.config import Fragments
from volseg.segmentation.agglomerate import (
    APART,
    SEED,
    SHALLOW,
    UNSEEDED,
    agglomerate,
    borders,
    forest,
    rank_components,
)
from volseg.segmentation.basins import BlockBasins
from volseg.segmentation.constraints import Constraints
from volseg.segmentation.edges import EDGE, SADDLE_ORDER, argsort_saddles, find, merge_parallel, unite
from volseg.segmentation.heights import height_difference, height_to_probability
from volseg.segmentation.rules import Rules
from volseg.segmentation.stitch import REGION_MASK, Basins, Links, min_by_group, sum_by_group

MAX_ROWS = 100_000
MEAN = APART  # a rule, numbered after those of `forest`
KINDS, RULES = ("join", "border"), ("", "seed", "unseeded", "persistence", "mean")
INT64_MAX = np.iinfo(np.int64).max

ROW = np.dtype(
    [
        ("margin", np.float64),  # in heights
        ("kind", np.int8),  # index of KINDS
        ("rule", np.int8),  # index of RULES
        ("saddle", np.int64),  # height
        ("voxel", np.int64),  # linear index of its higher end, and of its lower one: they lie on the two sides
        ("low_voxel", np.int64),
        ("edge", np.int64),  # its row in the edges of `Basins`
        ("area", np.int64),  # voxel faces, and the sum of their heights
        ("height", np.int64),
        ("label", np.int64, 2),
        ("voxels", np.int64, 2),
    ]
)


def rank_saddles(basins: Basins, rules: Rules, label: np.ndarray, constraints: Constraints | None = None) -> np.ndarray:
    """Joins and borders, least certain first.

    Parameters
    ----------
    basins
        The volume's basins.
    rules
        What decided.
    label
        int64 (basins,): what `rules.label_basins` gave.
    constraints
        Corrections, by numbers of basins.

    Returns
    -------
    ROW (at most `MAX_ROWS`,)
    """
    edges = basins.edges
    root, action = forest(edges["a"], edges["b"], edges["high"], basins.minimum, *rules.seeds)
    rows = np.concatenate([
        _forest_joins(basins, rules, label, action),
        _mean_joins(basins, rules, label, root),
        _object_borders(basins, rules, label),
    ])  # fmt: skip
    if constraints is not None:
        rows = rows[~_are_corrected(rows, basins, label, constraints)]
    return rows[np.lexsort([rows["edge"], rows["kind"], rows["margin"]])][:MAX_ROWS]


def _are_corrected(rows: np.ndarray, basins: Basins, label: np.ndarray, constraints: Constraints) -> np.ndarray:
    """Which rows corrections decide: joins of a pair of basins that they join, borders of objects that they hold apart."""
    edges = basins.edges[rows["edge"]]
    joined = _are_among(np.stack([edges["a"], edges["b"]], axis=1), constraints.joins)
    apart = _are_among(rows["label"], label[constraints.splits])
    return np.where(rows["kind"] == KINDS.index("join"), joined, apart)


def _are_among(pairs: np.ndarray, listed: np.ndarray) -> np.ndarray:
    """Which pairs are listed, in either order."""
    both = np.concatenate([np.sort(listed, axis=1), np.sort(pairs, axis=1)])
    _, number = np.unique(both, axis=0, return_inverse=True)
    number = number.ravel()
    return np.isin(number[len(listed) :], number[: len(listed)])


def _forest_joins(basins: Basins, rules: Rules, label: np.ndarray, action: np.ndarray) -> np.ndarray:
    """Joins of `forest`, replayed: a part's size is known only at its step."""
    row = np.flatnonzero((action > 0) & (action < APART))
    row = row[label[basins.edges["a"][row]] == label[basins.edges["b"][row]]]  # corrections leave joins out
    edges = basins.edges[row]
    voxels, shallow = _join_sides(edges["a"], edges["b"], basins.voxels, basins.minimum)
    large = (voxels.min(axis=1, initial=INT64_MAX) >= max(1, rules.min_voxels)) & (label[edges["a"]] > 0)
    shallow, action = shallow[large], action[row][large]
    rows = _rows(basins, row[large], "join", label)
    rows["rule"], rows["voxels"] = action, np.sort(voxels[large])[:, ::-1]
    by_level = np.where(action == UNSEEDED, shallow - rules.seeds[1], rules.seed_height - rows["saddle"])
    too_shallow = rules.seeds[2] - (rows["saddle"] - shallow)
    rows["margin"] = np.where(action == SHALLOW, too_shallow, np.maximum(by_level, too_shallow))
    return rows


@njit(cache=True)
def _join_sides(a: np.ndarray, b: np.ndarray, voxels: np.ndarray, minimum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each of a sequence of joins: the voxels of both sides, and the height at the bottom of the shallower one."""
    parent, total, deepest = np.arange(voxels.size), voxels.copy(), minimum.astype(np.int64)
    sides, shallow = np.empty((a.size, 2), np.int64), np.empty(a.size, np.int64)
    for e in range(a.size):
        p, q = find(parent, a[e]), find(parent, b[e])
        sides[e, 0], sides[e, 1], shallow[e] = total[p], total[q], max(deepest[p], deepest[q])
        root, child = unite(parent, p, q)
        total[root] += total[child]
        deepest[root] = min(deepest[root], deepest[child])
    return sides, shallow


def _mean_joins(basins: Basins, rules: Rules, label: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Joins of `agglomerate`, replayed."""
    if rules.join_height < 0 or not basins.edges.size:
        return np.empty(0, ROW)
    group, first = rank_components(root, basins.first)
    joins = np.array(agglomerate(*borders(basins.edges, group), rules.join_height), np.int64).reshape(-1, 5)
    rows = _rows(basins, joins[:, 4], "join", label)
    rows["rule"], rows["area"], rows["height"] = MEAN, joins[:, 2], joins[:, 3]
    rows["margin"] = rules.join_height - rows["height"] / np.maximum(1, rows["area"])
    voxels = sum_by_group(basins.voxels, group, first.size)
    for row, (p, q, *_) in zip(rows, joins.tolist(), strict=True):
        row["voxels"] = max(voxels[p], voxels[q]), min(voxels[p], voxels[q])
        voxels[p] += voxels[q]
    large = rows["voxels"].min(axis=1, initial=INT64_MAX) >= rules.min_voxels
    return rows[large & (rows["label"][:, 0] > 0) & (rows["label"][:, 0] == rows["label"][:, 1])]


def _object_borders(basins: Basins, rules: Rules, label: np.ndarray) -> np.ndarray:
    low, high, area, height, row = _borders_of_objects(basins, label)
    rows = _rows(basins, row, "border", label)
    rows["label"], rows["area"], rows["height"] = np.stack([low, high], axis=1), area, height
    size = int(label.max(initial=0)) + 1
    rows["voxels"] = sum_by_group(basins.voxels, label, size)[rows["label"]]
    deepest = min_by_group(basins.minimum, label, size)
    never = np.full(rows.size, np.inf)
    shallow = np.maximum(deepest[low], deepest[high])
    level, low_level, persistence = rules.seeds
    mean = np.where(area > 0, height / np.maximum(1, area) - rules.join_height, np.inf)
    margins = {
        SEED: rows["saddle"] - level,
        UNSEEDED: low_level - shallow if low_level > level else never,
        SHALLOW: rows["saddle"] - shallow - persistence if persistence else never,
        MEAN: mean if rules.join_height >= 0 else never,
    }
    rows["rule"] = np.array(list(margins))[np.argmin(list(margins.values()), axis=0)]
    rows["margin"] = np.min(list(margins.values()), axis=0)
    return rows


def _borders_of_objects(basins: Basins, label: np.ndarray) -> list[np.ndarray]:
    """The `borders` between two objects, without those between one and what was dropped."""
    columns = borders(basins.edges, label)
    return [column[columns[0] > 0] for column in columns]


def _rows(basins: Basins, row: np.ndarray, kind: str, label: np.ndarray) -> np.ndarray:
    """ROW of the edges in these rows, without margins and sizes."""
    edges, rows = basins.edges[row], np.zeros(row.size, ROW)
    rows["edge"] = row
    rows["kind"], rows["saddle"], rows["voxel"] = KINDS.index(kind), edges["high"], edges["high_voxel"]
    rows["low_voxel"] = edges["low_voxel"]
    rows["area"], rows["height"] = edges["area"], edges["height"]
    rows["label"] = np.stack([label[edges["a"]], label[edges["b"]]], axis=1)
    return rows


# ---------------------------------------------------------------- without the basins of the volume


@dataclass(frozen=True)
class BlockBorders:
    """What one block knows of the borders of labeled objects.

    Attributes
    ----------
    label
        int64 (objects,): each label there is, ascending.
    minimum, voxels
        int64 (objects,): lowest height of the object in the block, and its voxels there.
    edges
        EDGE: between labels, one for each pair.
    """

    label: np.ndarray
    minimum: np.ndarray
    voxels: np.ndarray
    edges: np.ndarray


def block_borders(i: int, table: BlockBasins, links: Links, label_of: Callable[[int], np.ndarray]) -> BlockBorders:
    """The `BlockBorders` of one block.

    Parameters
    ----------
    i
        Number of the block.
    table, links
        The block's; of the table neither ``crossing_edges`` nor the face are looked at.
    label_of
        Gives int64 (regions,): the labels of regions 1, 2, and so on of a block; asked for ``i`` and blocks ahead.
    """
    edges = np.concatenate([table.edges, links.edges])
    inner, block = slice(table.edges.size), links.edges["b"] >> 32
    edges["a"] = label_of(i)[(edges["a"] & REGION_MASK) - 1]
    edges["b"][inner] = label_of(i)[table.edges["b"] - 1]
    for j in np.unique(block):
        rows = table.edges.size + np.flatnonzero(block == j)
        edges["b"][rows] = label_of(int(j))[(edges["b"][rows] & REGION_MASK) - 1]
    edges = edges[(edges["a"] != edges["b"]) & (edges["a"] > 0) & (edges["b"] > 0)]
    edges["a"], edges["b"] = np.minimum(edges["a"], edges["b"]), np.maximum(edges["a"], edges["b"])
    ids, group = np.unique(label_of(i), return_inverse=True)
    is_object = ids > 0
    minimum = min_by_group(table.minimum.astype(np.int64), group, ids.size)[is_object]
    voxels = sum_by_group(table.voxels, group, ids.size)[is_object]
    return BlockBorders(ids[is_object], minimum, voxels, merge_parallel(edges))


def object_graph(blocks: Iterable[BlockBorders]) -> Basins:
    """The objects 1..n of the volume and their borders, each object as one basin.

    First voxels, sums of probability and cuts are left 0.
    """
    blocks = list(blocks)
    basin = np.concatenate([block.label for block in blocks]) - 1
    count = int(basin.max(initial=-1)) + 1
    edges = merge_parallel(np.concatenate([np.empty(0, EDGE), *(block.edges for block in blocks)]))
    edges = edges[argsort_saddles(*(edges[field] for field in SADDLE_ORDER))]
    edges["a"], edges["b"] = edges["a"] - 1, edges["b"] - 1
    minimum = min_by_group(np.concatenate([block.minimum for block in blocks]), basin, count).astype(np.int32)
    voxels = sum_by_group(np.concatenate([block.voxels for block in blocks]), basin, count)
    nothing = np.zeros(count, np.int64)
    return Basins(minimum, voxels, nothing, nothing, np.zeros((count, 3), np.int64), edges)


# ---------------------------------------------------------------- tables


def saddles_table(
    rows: np.ndarray, settings: Fragments, shape: Triple, voxel_size_nm: VoxelSize
) -> dict[str, np.ndarray]:
    """Columns of the table of joins and borders, from what `rank_saddles` gave.

    ``z y x`` is the saddle's voxel. Probabilities are what heights are made of (`heights.height_to_probability`).
    ``contact_faces`` counts voxel faces; ``contact_um2`` takes the mean face of a voxel where voxels are no cubes.
    ``voxels_a`` and ``voxels_b`` are, of a join, its two parts at that step, the larger first. ``voxel_a`` and ``voxel_b``
    are linear indices of voxels on the two sides of the saddle, in the grid in which was decided.

    Parameters
    ----------
    rows
        ROW (n,).
    settings
        The section ``[fragments]``.
    shape
        Shape of the volume, z y x.
    voxel_size_nm
        Size of a voxel along z y x.

    Returns
    -------
    dict of (n,) arrays
    """
    full_height = height_difference(1.0, settings, voxel_size_nm)
    z, y, x = np.unravel_index(rows["voxel"], shape)
    face_um2 = sum(np.prod(np.delete(voxel_size_nm, i)) for i in range(3)) / 3 * 1e-6
    mean = np.where(rows["area"] > 0, rows["height"] / np.maximum(1, rows["area"]), rows["saddle"])
    return {
        "kind": np.array(KINDS)[rows["kind"]],
        "rule": np.array(RULES)[rows["rule"]],
        "margin": rows["margin"] / full_height,
        "saddle_probability": height_to_probability(rows["saddle"], settings, voxel_size_nm),
        "mean_probability": height_to_probability(mean, settings, voxel_size_nm),
        "contact_faces": rows["area"],
        "contact_um2": rows["area"] * face_um2,
        "label_a": rows["label"][:, 0],
        "label_b": rows["label"][:, 1],
        "voxels_a": rows["voxels"][:, 0],
        "voxels_b": rows["voxels"][:, 1],
        **{"z": z, "y": y, "x": x},
        **{f"{axis}_nm": place * float(n) for axis, place, n in zip("zyx", (z, y, x), voxel_size_nm, strict=True)},
        "voxel_a": rows["voxel"],
        "voxel_b": rows["low_voxel"],
    }


def confidence(
    basins: Basins, label: np.ndarray, settings: Fragments, voxel_size_nm: VoxelSize | None = None
) -> np.ndarray:
    """The probability at each object's deepest point, less that of its lowest saddle to another object.

    An object that touches no other has the whole of it.

    Parameters
    ----------
    basins
        The volume's basins.
    label
        int64 (basins,): their labels 1..n, each of them given; 0 for none.
    settings, voxel_size_nm
        As in `heights.height_to_probability`.

    Returns
    -------
    float64 (n,)
    """
    size = int(label.max(initial=0)) + 1
    deepest = min_by_group(basins.minimum, label, size)[1:]  # where nothing is dropped, label 0 has no height
    low, high, *_, row = _borders_of_objects(basins, label)
    saddle = np.minimum(*(min_by_group(basins.edges["high"][row], side, size) for side in (low, high)))[1:]
    touches = saddle < INT64_MAX
    at_saddle = height_to_probability(np.where(touches, saddle, 0), settings, voxel_size_nm)
    return height_to_probability(deepest, settings, voxel_size_nm) - np.where(touches, at_saddle, 0.0)
