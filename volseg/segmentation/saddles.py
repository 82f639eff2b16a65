"""Saddles."""

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
from volseg.segmentation.edges import EDGE, SADDLE_ORDER, argsort_saddles, merge_parallel
from volseg.segmentation.heights import height_difference, height_to_probability
from volseg.segmentation.rules import Rules
from volseg.segmentation.stitch import REGION_MASK, Basins, Links, min_by_group, sum_by_group

MAX_ROWS = 100_000  # rows
MEAN = APART  # after the codes of `forest`
KINDS, RULES = ("join", "border"), ("", "seed", "unseeded", "persistence", "mean")
ROW = np.dtype(
    [
        ("margin", np.float64),  # in heights
        ("kind", np.int8),  # index of KINDS
        ("rule", np.int8),  # index of RULES
        ("saddle", np.int64),  # height
        ("voxel", np.int64),  # linear index of its higher end
        ("edge", np.int64),  # its row in the edges of `Basins`
        ("area", np.int64),  # voxel faces, and the sum of their heights
        ("height", np.int64),
        ("label", np.int64, 2),
        ("voxels", np.int64, 2),
    ]
)


def rank_saddles(basins: Basins, rules: Rules, label: np.ndarray) -> np.ndarray:
    """ROW of each join and border, least certain first; ``label`` is what `decide` gave."""
    edges = basins.edges
    root, action = forest(edges["a"], edges["b"], edges["high"], basins.minimum, *rules.seeds)
    rows = np.concatenate([
        _forest_joins(basins, rules, label, action),
        _mean_joins(basins, rules, label, root),
        _borders(basins, rules, label),
    ])  # fmt: skip
    return rows[np.lexsort([rows["edge"], rows["kind"], rows["margin"]])][:MAX_ROWS]


def _forest_joins(basins: Basins, rules: Rules, label: np.ndarray, action: np.ndarray) -> np.ndarray:
    at = np.flatnonzero((action > 0) & (action < APART))
    edges = basins.edges[at]
    voxels, shallow = _sides(edges["a"], edges["b"], basins.voxels, basins.minimum)
    large = (voxels.min(axis=1, initial=np.iinfo(np.int64).max) >= max(1, rules.min_voxels)) & (label[edges["a"]] > 0)
    shallow, action = shallow[large], action[at][large]
    rows = _rows(basins, at[large], "join", label)
    rows["rule"], rows["voxels"] = action, np.sort(voxels[large])[:, ::-1]
    by_level = np.where(action == UNSEEDED, shallow - rules.seeds[1], rules.seed_height - rows["saddle"])
    too_shallow = rules.seeds[2] - (rows["saddle"] - shallow)
    rows["margin"] = np.where(action == SHALLOW, too_shallow, np.maximum(by_level, too_shallow))
    return rows


@njit(cache=True)
def _sides(a, b, voxels, depth):
    """Of each of a sequence of joins: the voxels of both sides, and the height at the bottom of the shallower one."""
    parent, total, deepest = np.arange(voxels.size), voxels.copy(), depth.astype(np.int64)
    out, shallow = np.empty((a.size, 2), np.int64), np.empty(a.size, np.int64)
    for e in range(a.size):
        p, q = a[e], b[e]
        while parent[p] != p:
            parent[p] = parent[parent[p]]
            p = parent[p]
        while parent[q] != q:
            parent[q] = parent[parent[q]]
            q = parent[q]
        out[e, 0], out[e, 1], shallow[e] = total[p], total[q], max(deepest[p], deepest[q])
        parent[q] = p
        total[p] += total[q]
        deepest[p] = min(deepest[p], deepest[q])
    return out, shallow


def _mean_joins(basins: Basins, rules: Rules, label: np.ndarray, root: np.ndarray) -> np.ndarray:
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
    return rows[
        (rows["voxels"].min(axis=1, initial=np.iinfo(np.int64).max) >= rules.min_voxels) & (rows["label"][:, 0] > 0)
    ]


def _borders(basins: Basins, rules: Rules, label: np.ndarray) -> np.ndarray:
    low, high, area, height, row = _between(basins, label)
    rows = _rows(basins, row, "border", label)
    rows["label"], rows["area"], rows["height"] = np.stack([low, high], axis=1), area, height
    size = int(label.max(initial=0)) + 1
    rows["voxels"] = sum_by_group(basins.voxels, label, size)[rows["label"]]
    deepest = min_by_group(basins.minimum, label, size)
    never = np.full(rows.size, np.inf)
    shallow = np.maximum(deepest[low], deepest[high])
    level, least_seed, depth = rules.seeds
    mean = np.where(area > 0, height / np.maximum(1, area) - rules.join_height, np.inf)
    margins = {
        SEED: rows["saddle"] - level,
        UNSEEDED: least_seed - shallow if least_seed > level else never,
        SHALLOW: rows["saddle"] - shallow - depth if depth else never,
        MEAN: mean if rules.join_height >= 0 else never,
    }
    rows["rule"] = np.array(list(margins))[np.argmin(list(margins.values()), axis=0)]
    rows["margin"] = np.min(list(margins.values()), axis=0)
    return rows


def _between(basins: Basins, label: np.ndarray) -> list[np.ndarray]:
    """The `borders` between two objects, without those between one and what was dropped."""
    columns = borders(basins.edges, label)
    return [column[columns[0] > 0] for column in columns]


def _rows(basins: Basins, at: np.ndarray, kind: str, label: np.ndarray) -> np.ndarray:
    """ROWs of the edges ``at``, without margins and sizes."""
    edges, rows = basins.edges[at], np.zeros(at.size, ROW)
    rows["edge"] = at
    rows["kind"], rows["saddle"], rows["voxel"] = KINDS.index(kind), edges["high"], edges["high_voxel"]
    rows["area"], rows["height"] = edges["area"], edges["height"]
    rows["label"] = np.stack([label[edges["a"]], label[edges["b"]]], axis=1)
    return rows


# ---------------------------------------------------------------- without the basins of the volume


@dataclass(frozen=True)
class BlockBorders:
    """What a block says of objects once they are labeled.

    label, minimum, voxels   each label there is, its lowest height and its voxels in the block
    edges                  EDGE rows between labels, one for each pair
    """

    label: np.ndarray
    minimum: np.ndarray
    voxels: np.ndarray
    edges: np.ndarray


def block_borders(i: int, table: BlockBasins, links: Links, label_of: Callable[[int], np.ndarray]) -> BlockBorders:
    """The `BlockBorders` of block ``i``. ``label_of`` gives the labels (int64) of regions 1.. of ``i`` and blocks ahead."""
    edges = np.concatenate([table.edges, links.edges])
    here, ahead = slice(table.edges.size), links.edges["b"] >> 32
    edges["a"] = label_of(i)[(edges["a"] & REGION_MASK) - 1]
    edges["b"][here] = label_of(i)[table.edges["b"] - 1]
    for j in np.unique(ahead):
        there = table.edges.size + np.flatnonzero(ahead == j)
        edges["b"][there] = label_of(int(j))[(edges["b"][there] & REGION_MASK) - 1]
    edges = edges[(edges["a"] != edges["b"]) & (edges["a"] > 0) & (edges["b"] > 0)]
    edges["a"], edges["b"] = np.minimum(edges["a"], edges["b"]), np.maximum(edges["a"], edges["b"])
    ids, of = np.unique(label_of(i), return_inverse=True)
    own = ids > 0
    depth = min_by_group(table.minimum.astype(np.int64), of, ids.size)[own]
    return BlockBorders(ids[own], depth, sum_by_group(table.voxels, of, ids.size)[own], merge_parallel(edges))


def object_graph(parts: Iterable[BlockBorders]) -> Basins:
    """The objects 1..n of the volume and their borders, each object as one basin; first voxels and masses are left 0."""
    parts = list(parts)
    label = np.concatenate([part.label for part in parts]) - 1
    count = int(label.max(initial=-1)) + 1
    edges = merge_parallel(np.concatenate([np.empty(0, EDGE), *(part.edges for part in parts)]))
    edges = edges[argsort_saddles(*(edges[key] for key in SADDLE_ORDER))]
    edges["a"], edges["b"] = edges["a"] - 1, edges["b"] - 1
    depth = min_by_group(np.concatenate([part.minimum for part in parts]), label, count).astype(np.int32)
    voxels = sum_by_group(np.concatenate([part.voxels for part in parts]), label, count)
    return Basins(depth, voxels, np.zeros(count, np.int64), np.zeros(count, np.int64), edges)


# ---------------------------------------------------------------- what is told


def saddles_table(
    rows: np.ndarray, settings: Fragments, shape: Triple, voxel_size_nm: tuple[float, float, float]
) -> dict[str, np.ndarray]:
    """Columns of the table of merges.

    ``z y x`` is the saddle's voxel. Probabilities are what heights are made of (`fragments.probability_of`).
    ``contact_faces`` counts voxel faces; ``contact_um2`` takes the mean face of a voxel where voxels are no cubes.
    ``voxels_a`` and ``voxels_b`` are, of a join, its two parts at that step, the larger first.
    """
    step = height_difference(1.0, settings, voxel_size_nm)
    z, y, x = np.unravel_index(rows["voxel"], shape)
    face_um2 = sum(np.prod(np.delete(voxel_size_nm, i)) for i in range(3)) / 3 * 1e-6
    mean = np.where(rows["area"] > 0, rows["height"] / np.maximum(1, rows["area"]), rows["saddle"])
    return {
        "kind": np.array(KINDS)[rows["kind"]],
        "rule": np.array(RULES)[rows["rule"]],
        "margin": rows["margin"] / step,
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
    }


def confidence(
    basins: Basins, label: np.ndarray, settings: Fragments, voxel_size_nm: VoxelSize | None = None
) -> np.ndarray:
    """For labels 1..n the probability at the object's deepest point, less that of its lowest saddle to another object.

    An object that touches no other has the whole of it.
    """
    size = int(label.max(initial=0)) + 1
    deepest = min_by_group(basins.minimum, label, size)
    low, high, *_, row = _between(basins, label)
    saddle = np.minimum(*(min_by_group(basins.edges["high"][row], end, size) for end in (low, high)))
    known = saddle < np.iinfo(np.int64).max
    to = np.where(known, height_to_probability(np.where(known, saddle, 0), settings, voxel_size_nm), 0.0)
    return (height_to_probability(deepest, settings, voxel_size_nm) - to)[1:]
