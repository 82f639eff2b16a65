"""Corrections are looked at before a run is decided anew by them: every point lies in a basin, and none contradicts another.

The basin of a point is found by descent from the stored probabilities, block after block, so no table is needed; in a run that
dropped them, by the regions and tables of its blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import lru_cache, partial

import numpy as np

from volseg.box import Box, Triple
from volseg.engine.keys import labels_id, probabilities_id
from volseg.engine.run import Run
from volseg.errors import UserError
from volseg.io import volume
from volseg.io.corrections import CorrectionFile, Corrections, Entry, Pair
from volseg.segmentation.basins import watershed_block
from volseg.segmentation.heights import block_heights, height_halo

REACH = 16  # voxels around a point that are looked at at once

Named = list[tuple[Entry, Pair]]  # corrections, with the voxels of the run's own grid that they name
MinimumOf = Callable[[Triple], int | None]


def checked_corrections(file: CorrectionFile | None, old: Run, run: Run) -> Corrections | None:
    """The corrections with which a run is to be decided anew; None for none.

    Parameters
    ----------
    file
        The file that has them; None keeps those of the run.
    old
        The run as it lies there, whose labels the file may name.
    run
        The same as it is to be decided.

    Raises
    ------
    UserError
        With the line, for a file of another run, a point or label that there is not, a point in the background, a split
        inside one basin, and a contradiction.
    """
    if file is None:
        return _kept(old, run)
    if file.run != probabilities_id(old):
        raise UserError(
            f"{file.name} was made for another run: its probabilities are {file.run!r}, those of {old.out} are "
            f"{probabilities_id(old)!r}; volseg review writes a file for this one"
        )
    if old.corrections and old.corrections.file == file.digest:  # given once more: labels may have other numbers by now
        return _kept(old, run)
    if file.shape not in (old.shape, old.output_shape):
        raise UserError(
            f"{file.name} has points of a volume of shape {_text(file.shape)} (z y x), the labels of {old.out} have "
            f"{_text(old.output_shape)}"
        )
    minimum_of = _minimum_finder(old, run)
    named = [(entry, _voxels(entry, file, old, minimum_of)) for entry in file.entries]
    _check(named, minimum_of, run)
    joins, splits = (tuple(pair for entry, pair in named if entry.do == do) for do in ("join", "split"))
    return Corrections(joins, splits, file.digest) if named else None


def _kept(old: Run, run: Run) -> Corrections | None:
    """The corrections that a run has; refused where its basins are to be others and they do not fit these."""
    if old.corrections and run.config.fragments != old.config.fragments:
        where = f"correction {{}} of {old.out}/corrections.json"
        pairs = enumerate(old.corrections.pairs, 1)
        named = [(Entry(where.format(k), do, points=pair), pair) for k, (do, pair) in pairs]
        _check(named, _minimum_finder(old, run), run)
    return old.corrections


# ---------------------------------------------------------------- places


def _voxels(entry: Entry, file: CorrectionFile, old: Run, minimum_of: MinimumOf) -> Pair:
    """The two voxels, in the run's own grid, that a correction names."""
    if entry.points:
        first, second = (_own_voxel(entry, point, file.shape, old) for point in entry.points)
        return first, second
    if file.labels != labels_id(old) or not old.layout.finished:
        raise UserError(
            f"{entry}: these labels are of another decision than those of {old.out}, and labels change with it; give points, "
            "or what volseg review writes now"
        )
    a, b = entry.labels or (0, 0)
    if a == b:
        raise UserError(f"{entry}: both are one label; give the labels of two objects, or two points")
    return _voxel_of_label(entry, a, old, minimum_of), _voxel_of_label(entry, b, old, minimum_of)


def _own_voxel(entry: Entry, point: Triple, shape: Triple, old: Run) -> Triple:
    if not all(place < n for place, n in zip(point, shape, strict=True)):
        raise UserError(f"{entry}: point {_text(point)} lies outside of the volume of shape {_text(shape)} (z y x)")
    return _in_own_grid(point, old) if shape != old.shape else point


def _in_own_grid(point: Triple, run: Run) -> Triple:
    """The voxel of the run's own grid at a voxel of its labels."""
    if not run.restored:
        return point
    z, y, x = point
    return run.to_own.nearest_box(Box(point, (z + 1, y + 1, x + 1))).start


def _voxel_of_label(entry: Entry, label: int, old: Run, minimum_of: MinimumOf) -> Triple:
    """The first voxel of an object that lies in a basin."""
    table = old.layout.read_columns("objects")
    ids = table["id"].to_numpy()
    row = int(np.searchsorted(ids, label))
    if row == ids.size or ids[row] != label:
        raise UserError(f"{entry}: {old.out} has no object {label}; its labels are 1 to {ids.size}")
    (z0, _), (y0, y1), (x0, x1) = ((table[f"{axis}0"][row].as_py(), table[f"{axis}1"][row].as_py()) for axis in "zyx")
    box = Box((z0, y0, x0), (z0 + 1, y1, x1))
    labels = volume.open(old.out, dataset="labels/instances/0").read(box)
    for place in np.argwhere(labels == label).tolist():
        z, y, x = (int(a) + b for a, b in zip(place, box.start, strict=True))
        own = _in_own_grid((z, y, x), old)
        if minimum_of(own) is not None:
            return own
    raise UserError(f"{entry}: object {label} has no voxel in the mask of these settings; give points")


def _minimum_finder(old: Run, run: Run) -> MinimumOf:
    """Gives the minimum (linear index) of the basin of a voxel, under the settings of ``run``; None outside the mask."""
    if old.drops:
        return _stored_minimum_finder(old)
    settings, shape, voxel_size_nm = run.config.fragments, run.shape, run.voxel_size_nm
    halo, read = height_halo(settings, voxel_size_nm), old.layout.probabilities.read

    @lru_cache(maxsize=1 << 16)
    def minimum_of(voxel: Triple) -> int | None:
        while True:
            z, y, x = voxel
            box = Box(voxel, (z + 1, y + 1, x + 1)).grow(REACH).clip(shape)
            around = box.grow(halo).clip(shape)
            probability = read(around)
            height = block_heights(probability, box, shape, settings, voxel_size_nm)
            mask = np.ascontiguousarray(probability[0][box.slices_within(around)])
            region, table = watershed_block(height, mask, box, shape, settings.connectivity)
            place = tuple(a - b for a, b in zip(voxel, box.start, strict=True))
            row = int(region[place]) - 1
            if row < 0 or not table.is_exit[row]:
                return int(table.root[row]) if row >= 0 else None
            z, y, x = (int(n) for n in np.unravel_index(table.root[row], shape))  # the descent leaves the box there
            voxel = z, y, x

    return minimum_of


def _stored_minimum_finder(old: Run) -> MinimumOf:
    """The same under the settings that the run has, from what it stored of its basins."""
    table_of = lru_cache(maxsize=64)(partial(old.layout.block_basins.load, skip=("edges", "crossing_edges")))

    @lru_cache(maxsize=1 << 16)
    def minimum_of(voxel: Triple) -> int | None:
        while True:
            z, y, x = voxel
            box = Box(voxel, (z + 1, y + 1, x + 1))
            table, row = table_of(old.grid.overlapping(box)[0]), int(old.layout.regions.read(box)[0, 0, 0]) - 1
            if row < 0 or not table.is_exit[row]:
                return int(table.root[row]) if row >= 0 else None
            z, y, x = (int(n) for n in np.unravel_index(table.root[row], old.shape))
            voxel = z, y, x

    return minimum_of


def _text(point: Iterable[int]) -> str:
    return " ".join(map(str, point))


# ---------------------------------------------------------------- what cannot be


def _check(named: Named, minimum_of: MinimumOf, run: Run) -> None:
    """Refuses points in the background, splits inside one basin, and splits of what joins make one."""
    joined: dict[int, list[tuple[int, Entry]]] = {}
    splits = []
    for entry, pair in named:
        a, b = (_basin(entry, voxel, minimum_of, run) for voxel in pair)
        if entry.do == "join":
            joined.setdefault(a, []).append((b, entry))
            joined.setdefault(b, []).append((a, entry))
        else:
            splits.append((entry, a, b))
    for entry, a, b in splits:
        if a == b:
            raise UserError(
                f"{entry}: both points lie in one basin, which nothing can cut; less fragments.smooth or a lower "
                "fragments.contour makes other basins"
            )
        if between := _path(joined, a, b):
            lines = ", ".join(dict.fromkeys(each.where for each in between))
            raise UserError(f"{entry}: contradicts {lines}, by which they are one object; take one of them back")


def _basin(entry: Entry, voxel: Triple, minimum_of: MinimumOf, run: Run) -> int:
    minimum = minimum_of(voxel)
    if minimum is None:
        raise UserError(
            f"{entry}: voxel {_text(voxel)} lies in the background, where the mask does not reach fragments.threshold = "
            f"{run.config.fragments.threshold:g}; give a point inside an object"
        )
    return minimum


def _path(joined: dict[int, list[tuple[int, Entry]]], start: int, end: int) -> list[Entry]:
    """The fewest joins that make two basins one; none where nothing does."""
    paths: dict[int, list[Entry]] = {start: []}
    queue = deque([start])
    while queue and end not in paths:
        here = queue.popleft()
        for there, entry in joined.get(here, ()):
            if there not in paths:
                paths[there] = [*paths[here], entry]
                queue.append(there)
    return paths.get(end, [])
