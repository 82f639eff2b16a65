"""Recompute parts of a finished run with other cuts and compare bit for bit; look for seams at its block faces.

Labels come from a forest over the whole volume, so a box alone cannot tell them. What a box can tell for sure, whatever
lies around it, is checked there, in voxels that are wrong:

    heights  cut into thin pieces, the heights are those of the box in one piece
    basins   each voxel's stored basin is that of the voxel it descends to, and a minimum's is its own (needs ``work``)
    ids      labels are the stored id map applied to the stored regions (needs ``work``)
    mask     no label outside the mask, but in voids that one object encloses, where holes are filled
    rule     one label per basin; basins that the forest must join, in any surroundings, have one label; an object that
             lies whole in the box is kept or dropped by its size and seed, is alone with its id, and ids are in raster order
    table    objects whole in the box have exactly the table's row; parts of others stay inside its bounding box

No box sees the forest as a whole. So a volume of at most `WHOLE` voxels is also labeled anew, in other blocks, and
every label compared; and where ``work`` was kept, the stored tables are joined anew and every id map compared.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import comb, prod
from typing import Any

import numpy as np
import pandas
from numba import njit

from volseg.box import Blocks, Box, Triple
from volseg.config import Config
from volseg.errors import UserError
from volseg.io import arrays, files, volume
from volseg.segmentation import fragments, stitch
from volseg.segmentation import holes as voids
from volseg.segmentation.rules import ANY, Rules, decide, label_dtype, rules

BOX = (64, 256, 256)  # voxels checked at once
WHOLE = 64 << 20  # voxels up to which a volume is labeled anew
ROWS = 50_000_000  # regions and edges up to which stored tables are joined anew
WINDOW = 512  # longest edge of the part of a plane that is looked at for seams, voxels
PLANES = 24  # planes of each kind looked at on each axis
SHUFFLES = 9999
SMALL = 0.05  # a p-value below this is called a seam
CHECKS = ("heights", "basins", "ids", "mask", "rule", "table")
MEASURES = ("changes", "ends", "objects", "size")


# ---------------------------------------------------------------- what the run stored


@dataclass(frozen=True)
class Stored:
    """A finished run to read from. ``why_not`` says why its basins cannot be read, ``""`` where they can."""

    path: str
    config: Config
    block: Triple
    predict_block: Triple
    labels: volume.Volume
    table: pandas.DataFrame
    voxel_size_nm: tuple[float, float, float]
    why_not: str

    @property
    def shape(self) -> Triple:
        return self.labels.shape

    @property
    def grid(self) -> Blocks:
        return Blocks(self.shape, self.block)

    @property
    def roi(self) -> Box:
        """The part that was wanted."""
        return Box.parse(self.config.input.roi) if self.config.input.roi else Box.whole(self.shape)

    @property
    def rules(self) -> Rules:
        return rules(self.config, self.voxel_size_nm)

    @property
    def fills(self) -> bool:
        return self.rules.fill_voxels > 0

    @property
    def halo(self) -> Triple:
        """Voxels around a box that its heights need."""
        return fragments.halo(self.config.fragments, self.voxel_size_nm)

    def probability(self, box: Box) -> np.ndarray:
        """Stored probabilities (uint8; channels, z, y, x) of ``box`` with the halo that heights need, cut to the volume."""
        return _read(self.path, "0", box.grow(self.halo).clip(self.shape))

    def heights(self, probability: np.ndarray, box: Box) -> np.ndarray:
        return fragments.heights(probability, box, self.shape, self.config.fragments, self.voxel_size_nm)

    def regions(self, height: np.ndarray, mass: np.ndarray, box: Box) -> tuple[np.ndarray, fragments.Table]:
        return fragments.fragments(height, mass, box, self.shape, self.config.fragments.connectivity)


def load(run: str) -> Stored:
    """The finished run at ``run``; `UserError` where there is none."""
    try:
        facts = json.loads(files.read_bytes(run, "run.json"))
        config, block, slab = Config(**facts["config"]), tuple(facts["block"]), tuple(facts["predict_block"])
        voxel_size_nm = tuple(facts["voxel_size_nm"])
    except OSError:
        raise UserError(
            f"{run} is no finished run: it holds no run.json; give the --out of a finished volseg infer"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{run} is no run of this volseg: its run.json does not describe one; run volseg infer again"
        ) from None
    labels = volume.open(run, dataset="labels/instances/0")
    table = pandas.read_parquet(io.BytesIO(_bytes(run, "tables/objects.parquet")))
    lack = _lack(run, len(Blocks(labels.shape, block)), config.stitch.fill_holes_voxels > 0)
    return Stored(run, config, block, slab, labels, table, voxel_size_nm, lack)


def _lack(run: str, blocks: int, fills: bool) -> str:
    """What keeps the basins of a run from being read; ``""`` for nothing."""
    if not files.exists(f"{run}/work/fragments"):
        return "the run's work folder was cleaned: stored basins and id maps cannot be checked, the rest is"
    for name in ("tables", "links", "labels", *(("voids", "rims") if fills else ())):
        have = len([key for key in files.list_keys(run, f"work/{name}") if key.endswith(".npz")])
        if have < blocks:
            return (
                f"work/{name} holds {have} of {blocks} blocks: stored basins and id maps cannot be checked, the rest is"
            )
    return ""


def _bytes(run: str, key: str) -> bytes:
    try:
        return files.read_bytes(run, key)
    except FileNotFoundError:
        raise UserError(
            f"{run} lacks {key}, which a finished run has: it was damaged; run volseg infer again"
        ) from None


def _arrays(run: str, key: str) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(_bytes(run, key))) as stored:  # allow_pickle is off
            return {name: stored[name] for name in stored.files}
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise UserError(f"cannot read {key} of {run}: {error}; it was damaged; run volseg infer again") from None


def _read(run: str, name: str, box: Box) -> np.ndarray:
    """Voxels of ``box`` of an array of the run, all channels."""
    array = arrays.open_array(run, name)
    try:
        return np.ascontiguousarray(array[(slice(None),) * (array.ndim - 3) + box.slices])
    except (RuntimeError, ValueError, OSError) as error:
        cause = " ".join(str(error).split())[:300]
        raise UserError(
            f"cannot read {name} of {run} in box {box}: {cause}; it was damaged; run volseg infer again"
        ) from None


# ---------------------------------------------------------------- a whole verification


def verify(run: str, *, boxes: int = 5, seed: int = 0) -> dict:
    """What a finished run's labels are worth: plain Python values; ``ok`` is whether nothing exact is wrong.

    ``boxes`` boxes of `BOX` voxels drawn with ``seed`` are checked, every other one around a corner of blocks; fewer where
    boxes coincide because the volume is small. Seams are reported and do not decide ``ok``. Memory depends on the box,
    the tables and `WHOLE`, not on the volume. Raises `UserError` where there is no finished run, or it cannot be read.
    """
    if boxes < 1:
        raise UserError(f"{boxes} boxes to verify; give 1 or more")
    stored = load(run)
    rng = np.random.default_rng(seed)
    checked = [check(stored, box) for box in places(stored, boxes, rng)]
    whole = recut(stored, other_block(stored)) if prod(stored.shape) <= WHOLE else None
    joined = None if stored.why_not else rejoin(stored)
    wrong = [row["wrong"] for row in (joined, whole) if row] + [n for row in checked for n in row["wrong"].values()]
    return {
        "run": run,
        "ok": not any(wrong),
        "shape": list(stored.shape),
        "block": list(stored.block),
        "objects": len(stored.table),
        "seed": seed,
        "notes": [note for note in (stored.why_not, _empty(checked)) if note],
        "boxes": checked,
        "joined": joined,
        "whole": whole,
        "seams": seams(stored, rng),
    }


def _empty(checked: list[dict]) -> str:
    """That no box held anything, where it is so."""
    held = any(row["masked"] for row in checked)
    return "" if held else "no box held a voxel of the mask: give more --blocks or another --seed"


def places(stored: Stored, count: int, rng: np.random.Generator) -> list[Box]:
    """Up to ``count`` different random boxes in what was wanted, every other one around a corner where blocks meet."""
    size = np.minimum(BOX, stored.shape)
    least = np.minimum(stored.roi.start, stored.shape - size)
    room = np.maximum(least, np.array(stored.roi.stop) - size)
    found = []
    for i in range(count):
        start = rng.integers(least, room + 1)
        if i % 2 == 0:
            counts = np.array(stored.grid.counts)
            first, end = np.array(stored.roi.start) // stored.block + 1, -(-np.array(stored.roi.stop) // stored.block)
            corner = rng.integers(first, np.maximum(end, first + 1)) * stored.block
            start = np.where(counts > 1, np.clip(corner - size // 2, least, room), start)
        found.append(Box(tuple(start.tolist()), tuple((start + size).tolist())))
    return list(dict.fromkeys(found))


# ---------------------------------------------------------------- one box


def check(stored: Stored, box: Box) -> dict:
    """Of one box: voxels, masked voxels, regions, how many joins were sure and how many objects whole; voxels that are
    ``wrong`` by each check (None: could not be checked), and the ``first`` wrong voxel (z y x) of each that failed."""
    probability = stored.probability(box)
    height = stored.heights(probability, box)
    mass = _core(probability[0], box, stored)
    region, table = stored.regions(height, mass, box)
    label = stored.labels.read(box)
    wrong, joins, whole = _against_rule(stored, box, region, table, label)
    masks = {
        "heights": _heights_differ(stored, box, probability, height),
        "mask": _against_voids(stored, box, region, label) if stored.fills else (label != 0) & (region == 0),
        "rule": wrong,
        "table": _against_table(stored, box, label, mass),
    }
    if not stored.why_not:
        masks |= _against_work(stored, box, region, table, label)
    counts = {name: int(np.count_nonzero(masks[name])) if name in masks else None for name in CHECKS}
    first = {name: _first(masks[name], box) for name, count in counts.items() if count}
    return {"box": str(box), "voxels": box.voxels, "masked": int(np.count_nonzero(region)), "regions": int(table.root.size),
            "joins": joins, "whole": whole, "wrong": counts, "first": first}  # fmt: skip


def _core(probability: np.ndarray, box: Box, stored: Stored) -> np.ndarray:
    have = box.grow(stored.halo).clip(stored.shape)
    return np.ascontiguousarray(probability[box.inside(have)])


def _first(wrong: np.ndarray, box: Box) -> list[int]:
    at = np.unravel_index(np.argmax(wrong), wrong.shape)
    return [int(a + b) for a, b in zip(at, box.start, strict=True)]


def _heights_differ(stored: Stored, box: Box, probability: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Which voxels of ``box`` have another height when the box is cut into thin pieces."""
    halo = stored.halo
    have = box.grow(halo).clip(stored.shape)
    out = np.zeros(box.shape, bool)
    for part in Blocks(box.shape, (5 + halo[0], 31 + halo[1], box.shape[2])):
        piece = part.shift(box.start)
        need = piece.grow(halo).clip(stored.shape)
        cut = stored.heights(probability[(slice(None), *need.inside(have))], piece)
        around = height[piece.grow(1).inside(box.grow(1))]
        out[part.slices] = (cut != around)[1:-1, 1:-1, 1:-1]
    return out


# ---------------------------------------------------------------- stored basins


def _against_work(stored: Stored, box: Box, region: np.ndarray, table: fragments.Table, label: np.ndarray) -> dict:
    """Which voxels have another basin than their descent says, and which another label than the id map gives.

    A descent that ends in the box names its minimum. One that leaves names the first voxel outside, whose stored basin
    must be the same; so every step of every descent is compared in some box.
    """
    have = box.grow(1).clip(stored.shape)
    root, mapped = _stored_basins(stored, have)
    at = np.unravel_index(table.root, stored.shape)
    in_have = tuple(np.clip(a - b, 0, n - 1) for a, b, n in zip(at, have.start, have.shape, strict=True))
    wanted = np.r_[-1, np.where(table.is_exit, root[in_have], table.root)]
    inner = box.inside(have)
    return {"basins": root[inner] != wanted[region], "ids": mapped[inner] != label.astype(np.int64)}


def _stored_basins(stored: Stored, box: Box) -> tuple[np.ndarray, np.ndarray]:
    """For each voxel the linear index of the minimum of its stored basin (-1: none, -2: its region is unknown), and the
    label that the id map gives it (-2: unknown)."""
    run, grid = stored.path, stored.grid
    table_of = lru_cache(64)(
        lambda j: fragments.Table(**_arrays(run, f"work/tables/{j}.npz")) if j < len(grid) else None
    )
    drains_of = lru_cache(64)(lambda j: _arrays(run, f"work/links/{j}.npz")["drains"])
    region = _read(run, "work/fragments", box)
    root, mapped = np.empty(box.shape, np.int64), np.empty(box.shape, np.int64)
    for j in grid.meeting(box):
        part = grid[j].intersect(box).inside(box)
        used, at = np.unique(region[part], return_inverse=True)
        root[part] = _minima(j, used.astype(np.int64), table_of, drains_of)[at.reshape(region[part].shape)]
        place = region[part]
        if stored.fills:
            place = voids.places(_read(run, "work/fragments", grid[j]))[grid[j].intersect(box).inside(grid[j])]
        ids = np.r_[_arrays(run, f"work/labels/{j}.npz")["label"].astype(np.int64), -2]
        mapped[part] = ids[np.minimum(place, ids.size - 1)]
    return root, mapped


def _minima(block: int, regions: np.ndarray, table_of: Any, drains_of: Any) -> np.ndarray:
    """The minimum (linear index) of each region's basin, following exits from block to block; -1 for region 0, -2 where
    the tables lead nowhere or not down."""
    out = np.where(regions == 0, -1, -2)
    todo = np.flatnonzero(regions > 0)
    names = stitch.name(block, regions[todo])
    last = np.full((2, todo.size), np.iinfo(np.int64).max)  # height and index that the next exit must be below
    while todo.size:
        known, leaves, depth, root = _rows(names, table_of)
        out[todo[known & ~leaves]] = root[known & ~leaves]
        down = known & leaves & ((depth < last[0]) | ((depth == last[0]) & (root < last[1])))
        todo, last = todo[down], np.stack([depth, root])[:, down]
        names = _follow(names[down], drains_of)
    return out


def _rows(names: np.ndarray, table_of: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each region: whether its table knows it, whether it is an exit, height and linear index at its root.

    ``table_of`` gives a block's table, None where there is no such block.
    """
    known, leaves = np.zeros(names.size, bool), np.zeros(names.size, bool)
    depth, root = np.zeros(names.size, np.int64), np.zeros(names.size, np.int64)
    for j in np.unique(names[names >= 0] >> 32):
        table, here = table_of(int(j)), np.flatnonzero(names >> 32 == j)
        if table is None:
            continue
        row = (names[here] & 0xFFFFFFFF) - 1
        fits = (row >= 0) & (row < table.root.size)
        here, row = here[fits], row[fits]
        known[here], leaves[here], depth[here], root[here] = True, table.is_exit[row], table.depth[row], table.root[row]
    return known, leaves, depth, root


def _follow(names: np.ndarray, drains_of: Any) -> np.ndarray:
    """The region that each exit region drains into; -1 where the links do not say."""
    out = np.full(names.size, -1, np.int64)
    for j in np.unique(names >> 32):
        here, drains = np.flatnonzero(names >> 32 == j), drains_of(int(j))
        row = np.searchsorted(drains[:, 0], names[here])
        found = row < len(drains)
        here, row = here[found], row[found]
        out[here] = np.where(drains[row, 0] == names[here], drains[row, 1], -1)
    return out


# ---------------------------------------------------------------- the rule


def _against_rule(
    stored: Stored, box: Box, region: np.ndarray, table: fragments.Table, label: np.ndarray
) -> tuple[np.ndarray, int, int]:
    """Which voxels have a label that no surroundings of the box could give; how many joins were sure, objects whole."""
    rules, size = stored.rules, table.root.size
    edges = table.edges[np.lexsort([table.edges[key] for key in reversed(fragments.KEY)])]
    outward = table.is_exit.copy()
    outward[table.face_of.astype(np.int64) - 1] = True
    root, seeded, whole = sure(edges["a"] - 1, edges["b"] - 1, edges["high"], table.depth, outward, rules)
    joins = size - int(np.count_nonzero(root == np.arange(size)))
    of_region = np.zeros(size + 1, label.dtype)
    of_region[region.ravel()[::-1]] = label.ravel()[::-1]  # of its first voxel, which is written last
    of_region[0] = 0
    voxels = np.bincount(root, weights=table.voxels, minlength=size).astype(np.int64)[root]
    large = (voxels >= rules.min_voxels) & (seeded[root] | rules.keep_unseeded)
    whole = whole[root]
    large &= (rules.max_voxels == ANY) | (whole & (voxels <= rules.max_voxels) & (not stored.fills))
    given = of_region[1:]
    bad = given != given[root]
    bad |= large & (given == 0)
    if stored.fills:  # what is dropped may lie in a hole, and a hole in the first corner begin before its object
        bad |= _out_of_order(given, root, whole & large & any(box.start), table.first)
    else:
        bad |= whole & ~large & (given != 0)
        bad |= whole & (given != 0) & _shared(given, root)
        bad |= _out_of_order(given, root, whole, table.first)
    mask = (region != 0) & (np.r_[False, bad][region] | (label != of_region[region]))
    return mask, joins, int(np.count_nonzero(whole & large & (root == np.arange(size))))


def sure(
    a: np.ndarray, b: np.ndarray, saddle: np.ndarray, depth: np.ndarray, outward: np.ndarray, rules: Rules
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The joins of Kruskal's algorithm on part of a graph that happen whatever the rest of the graph is.

    Edges ``a, b`` (regions from 0) come in ascending order. ``outward`` regions may have edges that are not listed.
    An edge joins for sure at most at the seed height, or when one side has neither seed nor unlisted edges: that side is
    then complete, and this its lowest edge out. Returns the root of each region, and at roots: whether it has a seed for
    sure, and whether it is a complete object. Where rules on whole borders or holes may join what the forest keeps apart,
    only objects that touch no other are complete. So are, under a rule of depth, only those that all others stay clear of
    whatever the rest is: what lies outside can make a side deeper, never shallower.

    >>> depth = np.array([3, 9, 3])
    >>> sure(np.array([0, 1]), np.array([1, 2]), np.array([9, 9]), depth, np.zeros(3, bool), Rules(3))
    (array([0, 0, 2]), array([ True, False,  True]), array([ True,  True,  True]))
    """
    alone = rules.join_height >= 0 or rules.fill_voxels > 0
    return _sure(a, b, saddle, depth, outward.copy(), *rules.seeds, alone)


@njit(cache=True)
def _sure(a, b, saddle, depth, outward, level, low, persistence, alone):
    parent, deepest, seeded = np.arange(depth.size), depth.astype(np.int64), depth <= low
    whole = ~outward
    for e in range(a.size):
        p, q = stitch.find(parent, a[e]), stitch.find(parent, b[e])
        if p == q:
            continue
        free = (not seeded[p] and not outward[p]) or (not seeded[q] and not outward[q])
        if free or saddle[e] <= level:
            top, under = min(p, q), max(p, q)
            parent[under] = top
            seeded[top] = seeded[top] or seeded[under]
            deepest[top] = min(deepest[top], deepest[under])
            outward[top] = outward[top] or outward[under]
            whole[top] = whole[top] and whole[under]
        elif not (seeded[p] and seeded[q]):  # they join unless both have a seed: then one seed is enough for both
            seeded[p] = seeded[q] = seeded[p] or seeded[q]
            whole[p] = whole[q] = False
        elif alone or saddle[e] - max(deepest[p], deepest[q]) < persistence:
            whole[p] = whole[q] = False
    for i in range(parent.size):
        parent[i] = stitch.find(parent, i)
    return parent, seeded, whole


def _shared(given: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Which regions have a label that also stands in another joined group."""
    pairs = np.unique(np.stack([given.astype(np.int64), root]), axis=1)
    ids, groups = np.unique(pairs[0], return_counts=True)
    return np.isin(given, ids[groups > 1])


def _out_of_order(given: np.ndarray, root: np.ndarray, whole: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Which regions are of a whole object whose id is not above those of all whole objects that begin before it."""
    begin = np.full(root.size, np.iinfo(np.int64).max)
    np.minimum.at(begin, root, first)
    tops = np.flatnonzero(whole & (given != 0) & (root == np.arange(root.size)))
    tops = tops[np.argsort(begin[tops])]
    ids = given[tops].astype(np.int64)
    late = tops[1:][ids[1:] <= np.maximum.accumulate(ids)[:-1]]
    return np.isin(root, late)


def _against_voids(stored: Stored, box: Box, region: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Which voxels outside the mask have a label that they cannot have, or lack the one they must have.

    A void has one label. With one, it is small, reaches no border of the volume and touches nothing of another label.
    A void that lies whole in the box, is like that and touches one label alone, has it.
    """
    table, place = voids.describe(region, box, stored.shape), voids.places(region)
    regions, count = int(table.regions), table.voxels.size
    given = np.zeros(regions + 1 + count, np.int64)
    given[place.ravel()[::-1]] = label.ravel()[::-1]
    number, touched = table.rim[:, 0] - regions - 1, given[table.rim[:, 1]]
    low = stitch.least(touched, number, count)
    same = low == -stitch.least(-touched, number, count)
    whole = np.ones(given.size, bool)
    whole[table.place] = False
    fit = ~table.open & (table.voxels <= stored.rules.fill_voxels) & same
    own = given[regions + 1 :]
    bad = np.where(own > 0, ~fit | (own != low), whole[regions + 1 :] & fit & (low > 0))
    return (region == 0) & (np.r_[np.zeros(regions + 1, bool), bad][place] | (label != given[place]))


# ---------------------------------------------------------------- the object table


def _against_table(stored: Stored, box: Box, label: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """Which voxels have a label that the object table does not know, or whose row they contradict."""
    ids, group = np.unique(label[label != 0], return_inverse=True)
    found = _measured(group, np.nonzero(label), mass[label != 0], box, stored.voxel_size_nm)
    table = stored.table
    row = np.minimum(np.searchsorted(table["id"].to_numpy(), ids), max(0, len(table) - 1))
    right = np.isin(ids, table["id"].to_numpy())
    want = {name: table[name].to_numpy()[row[right]] for name in found}
    have = {name: column[right] for name, column in found.items()}
    whole = np.ones(right.sum(), bool)
    fits = have["voxels"] <= want["voxels"]
    for axis, low, high in zip("zyx", box.start, box.stop, strict=True):
        whole &= (want[f"{axis}0"] >= low) & (want[f"{axis}1"] <= high)
        fits &= (have[f"{axis}0"] >= want[f"{axis}0"]) & (have[f"{axis}1"] <= want[f"{axis}1"])
    same = np.all([have[name] == want[name] for name in found], axis=0)
    right[right] = fits & (same | ~whole)
    out = np.zeros(label.shape, bool)
    out[label != 0] = ~right[group]
    return out


def _measured(
    group: np.ndarray, at: tuple[np.ndarray, ...], mass: np.ndarray, box: Box, voxel_size_nm: tuple[float, float, float]
) -> dict[str, np.ndarray]:
    """Columns of the object table, from voxels at ``at`` (z, y, x in the box) of objects ``group`` (0..n-1).

    Reckoned otherwise than in `objects`, from the same integers, so that the floats are equal too.
    """
    voxels = np.bincount(group)
    columns = {"voxels": voxels, "mean_probability": np.bincount(group, mass).astype(np.int64) / (255.0 * voxels)}
    for axis, place, origin, size_nm in zip("zyx", at, box.start, voxel_size_nm, strict=True):
        place = place + origin
        low, high = np.full(voxels.size, np.iinfo(np.int64).max), np.zeros(voxels.size, np.int64)
        np.minimum.at(low, group, place)
        np.maximum.at(high, group, place + 1)
        columns |= {f"{axis}0": low, f"{axis}1": high}
        columns[f"centroid_{axis}_nm"] = np.bincount(group, place).astype(np.int64) / voxels * size_nm
    return columns


# ---------------------------------------------------------------- the whole volume


def other_block(stored: Stored) -> Triple:
    """A block shape that is not the run's on any axis where there is a choice, and fits no shard or tile."""
    halo = stored.halo
    wanted = [min(c + 2 * h, n // 2 + 1) for c, h, n in zip((37, 101, 127), halo, stored.shape, strict=True)]
    return tuple(max(1, w - (w == b)) for w, b in zip(wanted, stored.block, strict=True))


def recut(stored: Stored, block: Triple) -> dict:
    """All labels computed anew from the stored probabilities in blocks of that shape: objects, and labels that differ."""
    grid = Blocks(stored.shape, block)
    regions, tables = zip(*(_fragments(stored, box) for box in grid), strict=True)
    links = [stitch.link(i, tables.__getitem__, grid) for i in range(len(grid))]
    parts, meets = [], []
    if stored.fills:
        parts = [voids.describe(region, box, stored.shape) for region, box in zip(regions, grid, strict=True)]
        meets = [voids.meet(i, parts.__getitem__, grid) for i in range(len(grid))]
    ids = _ids(stored, tables, links, parts, meets)
    found = max(int(of_block.max()) for of_block in ids)
    wrong, first = 0, None
    for box, region, of_block in zip(grid, regions, ids, strict=True):
        differs = of_block[voids.places(region) if stored.fills else region] != stored.labels.read(box).astype(np.int64)
        wrong += int(np.count_nonzero(differs))
        first = first or (_first(differs, box) if differs.any() else None)
    if stored.labels.dtype != label_dtype(found):
        wrong, first = prod(stored.shape), [0, 0, 0]
    return {"block": list(block), "blocks": len(grid), "objects": found, "wrong": wrong, "first": first}


def _ids(
    stored: Stored,
    tables: Sequence[fragments.Table],
    links: Sequence[stitch.Links],
    parts: Sequence[voids.Table],
    meets: Sequence[np.ndarray],
) -> list[np.ndarray]:
    """For each block the label of region 0 (none), 1, 2, ... and then of its voids; of these ``parts`` and ``meets`` tell."""
    basins, basin_of = stitch.gather(tables, links)
    if not stored.fills:
        label = decide(basins, stored.rules)
        return [np.r_[0, label[basin]] for basin in basin_of]
    outside, void_of = voids.gather(parts, meets, basin_of)
    label, of_void = np.split(decide(basins, stored.rules, outside), [basins.depth.size])
    return [np.r_[0, label[basin], of_void[void]] for basin, void in zip(basin_of, void_of, strict=True)]


def _fragments(stored: Stored, box: Box) -> tuple[np.ndarray, fragments.Table]:
    probability = stored.probability(box)
    return stored.regions(stored.heights(probability, box), _core(probability[0], box, stored), box)


def rejoin(stored: Stored) -> dict | None:
    """The stored tables joined anew: regions, and how many have another label in the stored id maps, or lead nowhere.

    None where the tables have more than `ROWS` rows.
    """
    tables, links, rows = [], [], 0
    for i in range(len(stored.grid)):
        whole = fragments.Table(**_arrays(stored.path, f"work/tables/{i}.npz"))
        tables.append(replace(whole, crossing=whole.crossing[:0], face_at=whole.face_at[:0], face_of=whole.face_of[:0]))
        links.append(stitch.Links(**_arrays(stored.path, f"work/links/{i}.npz")))
        rows += whole.root.size + whole.edges.size + links[-1].edges.size
        if rows > ROWS:
            return None
    regions = sum(table.root.size for table in tables)
    each = range(len(stored.grid)) if stored.fills else ()
    parts = [voids.Table(**_arrays(stored.path, f"work/voids/{i}.npz")) for i in each]
    meets = [_arrays(stored.path, f"work/rims/{i}.npz")["pairs"] for i in each]
    astray = sum(_astray(link, tables) for link in links) + _voids_astray(parts, meets, tables)
    if astray:
        return {"regions": regions, "wrong": astray}
    wrong = 0
    for i, wanted in enumerate(_ids(stored, tables, links, parts, meets)):
        have = _arrays(stored.path, f"work/labels/{i}.npz")["label"].astype(np.int64)
        wrong += int(np.count_nonzero(have != wanted)) if have.size == wanted.size else wanted.size
    return {"regions": regions, "wrong": wrong}


def _astray(link: stitch.Links, tables: list[fragments.Table]) -> int:
    """How many links of a block name a region that no table has, or drain to one that is not lower."""
    table_of = dict(enumerate(tables)).get
    (known, _, depth, root), (there, leaves, low, at) = (_rows(names, table_of) for names in link.drains.T)
    lower = (low < depth) | ((low == depth) & ((at < root) | ((at == root) & ~leaves)))
    ends = [_rows(link.edges[end], table_of)[0] for end in "ab"]
    return int(np.count_nonzero(~(known & there & lower)) + np.count_nonzero(~(ends[0] & ends[1])))


def _voids_astray(parts: list[voids.Table], meets: list[np.ndarray], tables: list[fragments.Table]) -> int:
    """How many tables of voids count other regions than there are, and how many contacts name a place that no table has."""
    if not parts:
        return 0
    last = np.array([table.root.size + part.voxels.size for part, table in zip(parts, tables, strict=True)])
    other = sum(int(part.regions) != table.root.size for part, table in zip(parts, tables, strict=True))
    names = np.concatenate([np.empty((0, 2), np.int64), *meets, *(stitch.name(i, p.rim) for i, p in enumerate(parts))])
    block, place = names >> 32, names & stitch.LOCAL
    known = (block >= 0) & (block < len(parts)) & (place > 0) & (place <= last[np.clip(block, 0, len(parts) - 1)])
    return other + int(np.count_nonzero(~known.all(axis=1)))


# ---------------------------------------------------------------- seams


def seams(stored: Stored, rng: np.random.Generator) -> dict:
    """Whether labels at block faces look other than at planes half a block away.

    Up to `PLANES` planes of each kind and axis are looked at, in a random window of at most `WINDOW` on a side. Across
    each: ``changes``, the share of pairs of masked voxels whose labels differ; ``ends``, the share of objects there that
    lie on one side only; ``objects``, how many there are; ``size``, their mean log voxels. ``p`` is that of a permutation
    test that exchanges faces and controls of one axis, times the number of measures (Bonferroni); None where there are
    too few planes for it to be small. ``visible`` is whether it is below `SMALL`.
    """
    rows = []
    for axis in range(3):
        for kind, planes in zip(("face", "control"), _planes(stored, axis), strict=True):
            chosen = rng.permutation(planes)[:PLANES]
            rows += [(axis, kind == "face", *across(stored, axis, int(at), rng)) for at in np.sort(chosen)]
    values = np.array(rows, float).reshape(-1, 2 + len(MEASURES))
    measures = {name: _compare(values[:, [0, 1, 2 + i]], rng) for i, name in enumerate(MEASURES)}
    tested = [row["p"] for row in measures.values() if row["p"] is not None]
    p = min(1.0, len(tested) * min(tested)) if tested else None
    face = values[:, 1] == 1
    return {"faces": int(face.sum()), "controls": int((~face).sum()), "measures": measures, "p": p,
            "visible": p is not None and p < SMALL}  # fmt: skip


def _planes(stored: Stored, axis: int) -> tuple[list[int], list[int]]:
    """Where blocks meet along an axis, and the planes half a block further that are no such place."""
    n, block = stored.shape[axis], stored.block[axis]
    met = {at for b in (block, stored.predict_block[axis]) for at in range(b, n, b)}
    control = [at for at in range(block // 2, n, block) if at > 0 and at not in met]
    return (sorted(met), control) if met and control else ([], [])


def across(stored: Stored, axis: int, at: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """The `MEASURES` of labels on both sides of plane ``at``, between voxels ``at - 1`` and ``at``; NaN where empty."""
    size = np.minimum(WINDOW, stored.shape)
    start = rng.integers(0, stored.shape - size + 1)
    start[axis], size[axis] = at - 1, 2
    box = Box(tuple(start.tolist()), tuple((start + size).tolist()))
    height = stored.heights(stored.probability(box), box)[1:-1, 1:-1, 1:-1]
    both = np.all(height != fragments.OUTSIDE, axis=axis)
    near, far = np.moveaxis(stored.labels.read(box), axis, 0)
    here, there = (np.setdiff1d(side, 0) for side in (near, far))
    ids = np.union1d(here, there)
    changes = float(np.mean(near[both] != far[both])) if both.any() else np.nan
    if not ids.size:
        return changes, np.nan, 0.0, np.nan
    known = stored.table["voxels"].to_numpy()[stored.table["id"].isin(ids).to_numpy()]
    size_there = float(np.log(known).mean()) if known.size else np.nan
    return changes, 1 - np.intersect1d(here, there).size / ids.size, float(ids.size), size_there


def _compare(rows: np.ndarray, rng: np.random.Generator) -> dict:
    """Means of a measure at faces and at controls, and the p-value of their difference; rows are (axis, face?, value)."""
    rows = rows[np.isfinite(rows[:, 2])]
    groups = [rows[rows[:, 0] == axis] for axis in range(3)]
    groups = [g for g in groups if 0 < g[:, 1].sum() < len(g)]
    if not groups:
        return {"face": None, "control": None, "p": None}
    rows = np.concatenate(groups)
    means = {name: float(rows[rows[:, 1] == kind, 2].mean()) for name, kind in (("face", 1), ("control", 0))}
    ways = prod(comb(len(g), int(g[:, 1].sum())) for g in groups)
    if len(MEASURES) * 2 / ways > SMALL:
        return {**means, "p": None}
    return {**means, "p": permuted([(g[:, 1] == 1, g[:, 2]) for g in groups], rng)}


def permuted(groups: list[tuple[np.ndarray, np.ndarray]], rng: np.random.Generator) -> float:
    """Two-sided p-value of a difference between marked and other values, when marks change places inside each group.

    Groups are (marks, values). Values are scaled to unit deviation in their group.
    """
    seen, chance = 0.0, np.zeros(SHUFFLES)
    for mark, value in groups:
        scaled = (value - value.mean()) / (value.std() or 1.0)
        seen += scaled[mark].sum()
        chance += rng.permuted(np.tile(scaled, (SHUFFLES, 1)), axis=1)[:, : mark.sum()].sum(axis=1)
    return float((1 + np.count_nonzero(np.abs(chance) >= abs(seen) - 1e-9)) / (SHUFFLES + 1))


# ---------------------------------------------------------------- to read


LEGEND = (
    "masked: voxels in the mask; joins: edges that must join in any surroundings; whole: objects that lie whole in the box",
    "then how many voxels are wrong by each check ('-': could not be checked): heights cut thin, basins by descent, ids by the",
    "stored map, labels outside the mask, the rule of forest and sizes, rows of the object table",
)


def table(result: dict) -> str:
    """The result of `verify` as lines of text."""
    lines = [
        f"{result['run']}: {_by(result['shape'])} voxels in blocks of {_by(result['block'])}, {result['objects']} objects"
    ]
    lines += result["notes"]
    lines.append(f"{'box':<32}" + "".join(f"{name:>9}" for name in ("masked", "joins", "whole", *CHECKS)))
    for row in result["boxes"]:
        cells = [row["masked"], row["joins"], row["whole"], *(_verdict(row["wrong"][name]) for name in CHECKS)]
        lines.append(f"{row['box']:<32}" + "".join(f"{cell:>9}" for cell in cells))
        lines += [f"  {name}: first wrong voxel at z y x {at}" for name, at in row["first"].items()]
    lines += [*LEGEND, *_joined_line(result["joined"]), _whole_line(result["whole"]), *_seam_lines(result["seams"])]
    return "\n".join([*lines, _last(result)])


def _by(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def _verdict(wrong: int | None) -> str:
    return "-" if wrong is None else str(wrong) if wrong else "equal"


def _joined_line(joined: dict | None) -> list[str]:
    if joined is None:
        return []
    says = f"{joined['wrong']} differ or lead nowhere" if joined["wrong"] else "every id map equal"
    return [f"stored tables of {joined['regions']} regions joined anew: {says}"]


def _whole_line(whole: dict | None) -> str:
    if whole is None:
        return f"whole volume: more than {WHOLE >> 20} Mvoxel, so only boxes were checked"
    if not whole["wrong"]:
        return f"whole volume in {whole['blocks']} blocks of {_by(whole['block'])}: every label equal"
    return (f"whole volume in {whole['blocks']} blocks of {_by(whole['block'])}: {whole['wrong']} labels differ, first at "
            f"z y x {whole['first']}; {whole['objects']} objects")  # fmt: skip


def _seam_lines(found: dict) -> list[str]:
    """What was seen at block faces, one line for each measure, and what follows."""
    if not found["faces"]:
        return ["seams: no block face with a plane half a block away to compare it with"]
    lines = [f"at {found['faces']} block faces, and {found['controls']} planes half a block away:"]
    for name, row in found["measures"].items():
        if row["face"] is not None:
            p = "" if row["p"] is None else f"  p = {row['p']:.3g}"
            lines.append(f"  {name:<8}{row['face']:>10.4g}{row['control']:>10.4g}{p}")
    if found["p"] is None:
        return [*lines, "too few planes to tell seams from chance"]
    says = "block faces differ from other planes" if found["visible"] else "no seams visible"
    return [*lines, f"{says} (p = {found['p']:.3g}, for {len(MEASURES)} measures)"]


def _last(result: dict) -> str:
    return "all that was checked is equal" if result["ok"] else "NOT EQUAL: the labels are not those of this run's rule"
