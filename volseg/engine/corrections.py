"""Corrections in a run: where they lie, and what is done about them after a tree has decided."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from volseg.box import Blocks, Box, Triple
from volseg.engine.block_tables import BlockLabels, Values
from volseg.engine.keys import labels_id, probabilities_id
from volseg.engine.receipt import Timings
from volseg.engine.run import Run
from volseg.io.corrections import Pair, entry, header
from volseg.segmentation import constraints, hierarchy
from volseg.segmentation.constraints import Constraints, look_up
from volseg.segmentation.rules import label_dtype

ReadRegions = Callable[[int, Box], np.ndarray]


def region_constraints(run: Run, grid: Blocks | None = None, read: ReadRegions | None = None) -> Constraints | None:
    """A run's corrections, of regions by their global ids; None for none.

    ``read`` gives the regions of a box of a block of ``grid``; the run's own, which are stored, if not given.
    """
    if not run.corrections:
        return None
    grid, read = grid or run.grid, read or (lambda i, box: run.layout.regions.read(box))

    def region_at(point: Triple) -> int:
        z, y, x = point
        voxel = Box(point, (z + 1, y + 1, x + 1))
        (block,) = grid.overlapping(voxel)
        region = int(read(block, voxel)[0, 0, 0])
        if not region:
            raise RuntimeError(f"a correction names voxel {z} {y} {x}, which lies in no basin")
        return block << 32 | region

    def regions_at(pairs: tuple[Pair, ...]) -> np.ndarray:
        return np.array([[region_at(point) for point in pair] for pair in pairs], np.int64).reshape(-1, 2)

    return Constraints(regions_at(run.corrections.joins), regions_at(run.corrections.splits))


def label_constraints(run: Run) -> Constraints | None:
    """A run's corrections, of its labels, once each block has its own."""
    regions, load = region_constraints(run), lru_cache(run.layout.block_labels.load)
    return regions and regions.looked_up(lambda i: load(i).label[1:].astype(np.int64))


def correction_file(run: Run) -> dict:
    """A run's corrections in the form of a file that `volseg.segment` takes."""
    head = header(probabilities_id(run), labels_id(run), run.shape)
    pairs = run.corrections.pairs if run.corrections else []
    return {**head, "corrections": [entry(do, pair) for do, pair in pairs]}


def pinned_regions(run: Run, i: int) -> list[int]:
    """Regions (from 1) of block ``i`` that corrections name; of other blocks nothing is read."""
    box, pairs = run.grid[i], run.corrections.pairs if run.corrections else []
    voxels = [Box((z, y, x), (z + 1, y + 1, x + 1)) for _, pair in pairs for z, y, x in pair]
    inside = (voxel for voxel in voxels if voxel.intersect(box) == voxel)
    return [int(run.layout.regions.read(voxel)[0, 0, 0]) for voxel in inside]


# ---------------------------------------------------------------- after a tree


def name_objects(run: Run, _: int, timings: Timings) -> None:
    """The labels before corrections of the objects that these name are stored."""
    with timings.phase("read"):
        regions = region_constraints(run)
        labels = look_up(regions.named, lambda i: run.layout.tree_labels.load(i).values[1:].astype(np.int64))
    with timings.phase("write"):
        run.layout.named_labels.save(Values(np.unique(labels)))


def collect_named(run: Run, i: int, timings: Timings) -> None:
    """What block ``i`` knows of these objects is stored."""

    @lru_cache
    def label_of(j: int) -> np.ndarray:
        return run.layout.tree_labels.load(j).values[1:].astype(np.int64)

    with timings.phase("read"):
        named = run.layout.named_labels.load().values
        table = run.layout.block_basins.load(i, skip=("crossing_edges", "face_voxel", "face_region"))
        links = run.layout.links.load(i)
    with timings.phase("correct"):
        parts = constraints.named_parts(i, table, links, label_of, named)
    with timings.phase("write"):
        run.layout.named_parts.save(parts, i)


def correct(run: Run, _: int, timings: Timings) -> dict:
    """What corrections make of these objects is stored."""
    layout = run.layout
    with timings.phase("read"):
        parts = list(layout.named_parts.load_each(range(len(run.grid))))
        regions = region_constraints(run)
        objects = int(layout.layer_offsets.load().values[-1])
    with timings.phase("correct"):
        corrected = constraints.correct_objects(parts, regions, lambda first: _begun_before(run, first), objects)
    with timings.phase("write"):
        layout.corrected_objects.save(corrected)
    return {"objects": int(corrected.objects[0])}


def _begun_before(run: Run, first: np.ndarray) -> np.ndarray:
    """How many of the tree's objects begin before each of these voxels, which ascend."""
    offsets, out = run.layout.layer_offsets.load().values, np.empty_like(first)
    plane = run.shape[1] * run.shape[2]
    layer_of = first // (plane * run.block[0])
    levels = range(hierarchy.top_level(run.grid) + 1)
    for layer in np.unique(layer_of):
        box = run.layers[int(layer)]
        parts = [(k, n) for k in levels for n in hierarchy.parts(run.grid, k).overlapping(box)]
        here = layer_of == layer
        out[here] = offsets[layer]
        for begun in run.layout.first_voxels.load_each(parts):
            before = np.searchsorted(begun.values, box.start[0] * plane)
            out[here] += np.maximum(np.searchsorted(begun.values, first[here]) - before, 0)
    return out


def renumber(run: Run, i: int, timings: Timings) -> None:
    """The labels of block ``i`` are stored as they are once objects are corrected."""
    with timings.phase("read"):
        label = run.layout.tree_labels.load(i).values
        corrected = run.layout.corrected_objects.load()
    with timings.phase("correct"):
        label = constraints.renumber(i, label, corrected).astype(label_dtype(int(corrected.objects[0])))
    with timings.phase("write"):
        run.layout.block_labels.save(BlockLabels(label), i)
