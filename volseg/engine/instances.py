"""The stages from probabilities to labels: what is done to each block, and the decision on all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import fields
from functools import lru_cache

import numpy as np

from volseg import system
from volseg.engine import corrections, restore
from volseg.engine.block_tables import BlockLabels, Destinations, HoleContacts, Joins, Tally, Values
from volseg.engine.keys import basins_key, decision_key
from volseg.engine.partition import decided
from volseg.engine.receipt import Timings
from volseg.engine.restore import OutputBlock
from volseg.engine.run import Run
from volseg.engine.stored import recording, side_by_side
from volseg.errors import DamagedFileError
from volseg.io import pyramid
from volseg.segmentation import extents, hierarchy, holes, objects, saddles, stitch
from volseg.segmentation.basins import BlockBasins, no_basins, watershed_block
from volseg.segmentation.heights import block_heights, height_halo
from volseg.segmentation.rules import label_dtype

# ---------------------------------------------------------------- basins


def find_basins(run: Run, i: int, timings: Timings) -> dict:
    """Basins of block ``i`` are stored, with the table of how they touch."""
    box, settings = run.grid[i], run.config.fragments
    around = box.grow(height_halo(settings, run.voxel_size_nm)).clip(run.shape)
    wanted = run.wants_any(run.wanted_part(around))
    if settings.threshold > 0 and (not wanted or run.layout.probabilities.is_empty(around)):
        _refuse_late(run)
        run.layout.regions.clear(box)
        run.layout.block_basins.save(no_basins(settings.connectivity), i)
        return {"nothing_wanted": not wanted}
    with timings.phase("read"):
        probability = run.layout.probabilities.read(around)
        _refuse_late(run)
    with timings.phase("basins"):
        height = block_heights(probability, box, run.shape, settings, run.voxel_size_nm)
        mask = np.ascontiguousarray(probability[0][box.slices_within(around)])
        regions, basins = watershed_block(height, mask, box, run.shape, settings.connectivity)
    with timings.phase("write"):
        run.layout.regions.write(box, regions)
        run.layout.block_basins.save(basins, i)
    return {}


def link(run: Run, i: int, timings: Timings) -> dict:
    """The `stitch.Links` of block ``i`` are stored: where its basins go on in its neighbors."""

    @lru_cache
    def basins_of(j: int) -> BlockBasins:
        with timings.phase("read"):  # of a neighbor only its faces are looked at; edges are most of a table's bytes
            return run.layout.block_basins.load(j, skip=() if j == i else ("edges", "crossing_edges"))

    with timings.phase("link"):
        links = stitch.link(i, basins_of, run.grid)
    with timings.phase("write"):
        run.layout.links.save(links, i)
    return {"edges": int(basins_of(i).edges.size + links.edges.size)}


def tally(run: Run, i: int, timings: Timings) -> None:
    """What the object table needs of the probabilities of block ``i`` of the labels is stored, before they are dropped."""
    layout, box = run.layout, run.output_grid[i]
    with timings.phase("read"):
        if run.restored:
            numbers = {j: np.zeros(_numbers(run, j), np.uint8) for j in restore.own_blocks(run, i)}
            block = restore.output_block(run, i, numbers)
            region, count = block.region, block.label.size
        else:
            region, count = layout.regions.read(box), _numbers(run, i)
        mask = _mask_probability(run, i)
    with timings.phase("measure"):
        place = holes.number_holes(region) if run.fills_holes and not run.restored else region
        tallied = Tally(*objects.tally(place, mask, count))
    _refuse_late(run)
    layout.tallies.save(tallied, i)


def _numbers(run: Run, i: int) -> int:
    """How many regions block ``i`` has and, where they are filled, holes; and one for what is neither."""
    others = tuple(f.name for f in fields(BlockBasins) if f.name != "voxels")
    holes_ = run.layout.block_holes.load(i).voxels.size if run.fills_holes else 0
    return 1 + run.layout.block_basins.load(i, skip=others).voxels.size + holes_


def _refuse_late(run: Run) -> None:
    """Raises where the probabilities that were just read may have been dropped before: another worker did the block.

    They go when all that is made from them is done (`drop`): a shard becomes an empty file, which nobody can read, and in the
    end the array goes, first its description. So where that is still there, nothing that was read was missing.
    """
    if run.drops and not run.layout.probabilities.described:
        raise DamagedFileError(run.out, f"{run.layout.probabilities.name}/zarr.json", "was dropped")


def find_holes(run: Run, i: int, timings: Timings) -> None:
    """The pieces of background of block ``i`` are stored as a table."""
    with timings.phase("read"):
        regions = run.layout.regions.read(run.grid[i])
    with timings.phase("holes"):
        run.layout.block_holes.save(holes.block_holes(regions, run.grid[i], run.shape), i)


def link_holes(run: Run, i: int, timings: Timings) -> None:
    """What the holes of block ``i`` touch over its far faces, and what lies there touches holes, is stored."""
    with timings.phase("link"):
        pairs = holes.face_contacts(i, lru_cache(run.layout.block_holes.load), run.grid)
        run.layout.hole_contacts.save(HoleContacts(pairs), i)


# ---------------------------------------------------------------- one process decides


def stitch_all(run: Run, _: int, timings: Timings) -> dict:
    """The label of every region of every block is stored, and of its holes."""
    with system.untuned_malloc():
        return _stitch_all(run, timings)


def _stitch_all(run: Run, timings: Timings) -> dict:
    layout = run.layout
    with timings.phase("gather"):
        stored = _stored_basins(run)
        basins, basin_of = stored or _gather_basins(run)
        background, hole_of = _gather_holes(run, basin_of)
    with timings.phase("decide"):
        regions = corrections.region_constraints(run)
        wanted = regions and regions.looked_up(basin_of.__getitem__)
        label, label_of_hole = np.split(decided(run, basins, background, wanted), [basins.minimum.size])
    count = int(label.max(initial=0))
    with timings.phase("write"):
        confidence = saddles.confidence(basins, label, run.config.fragments, run.voxel_size_nm)
        layout.joins.remove_all()
        ranked = None if run.partition else saddles.rank_saddles(basins, run.rules, label, wanted)
        layout.joins.save(Joins(np.empty(0, saddles.ROW) if ranked is None else ranked, confidence), decision_key(run))
        dtype = label_dtype(count)

        def save(i: int) -> None:
            labels = np.r_[0, label[basin_of[i]], label_of_hole[hole_of[i]]].astype(dtype)
            layout.block_labels.save(BlockLabels(labels, basin_of[i], hole_of[i]), i)

        side_by_side(save, list(basin_of))
        if not stored:
            layout.save_basins(basins, basins_key(run))
    return {"objects": count, "basins": int(label.size), "edges": int(basins.edges.size)}


def _stored_basins(run: Run) -> tuple[stitch.Basins, dict[int, np.ndarray]] | None:
    """What `_gather_basins` gave when these basins were decided on before: a hundredth of the bytes of all tables."""
    try:
        basins = run.layout.load_basins(basins_key(run))
        if basins is None:
            return None
        blocks = run.parts.own.numbers
        each = run.layout.block_labels.load_each(blocks, skip=("label", "hole"))
        return basins, {i: labels.basin for i, labels in zip(blocks, each, strict=True)}
    except DamagedFileError:  # all tables have the same
        return None


def _gather_basins(run: Run) -> tuple[stitch.Basins, dict[int, np.ndarray]]:
    """The volume's basins, and the basin of each of a block's regions, from all tables. None are stored until all is."""
    layout, blocks = run.layout, run.parts.own.numbers
    layout.remove_basins()
    tables = layout.block_basins.load_each(blocks, skip=("crossing_edges", "face_voxel", "face_region"))
    basins, basin_of = stitch.gather(tables, layout.links.load_each(blocks), None if run.parts.own.is_whole else blocks)
    return basins, dict(zip(blocks, basin_of, strict=True))


def _gather_holes(run: Run, basin_of: dict[int, np.ndarray]) -> tuple[holes.Holes | None, dict[int, np.ndarray]]:
    """The volume's holes, stored for `calibrate`, and the hole of each of a block's holes; none where none is filled."""
    if not run.fills_holes:
        return None, dict.fromkeys(basin_of, np.empty(0, np.int64))
    layout, blocks = run.layout, list(basin_of)
    contacts = (contact.pairs for contact in layout.hole_contacts.load_each(blocks))
    background, hole_of = holes.gather(
        layout.block_holes.load_each(blocks, skip=("run_start", "run_piece")), contacts, list(basin_of.values())
    )
    layout.volume_holes.save(background)
    return background, dict(zip(blocks, hole_of, strict=True))


# ---------------------------------------------------------------- a tree of blocks decides


def contract(run: Run, n: int, timings: Timings, level: int) -> dict:
    """Part ``n`` of that level is contracted: what goes up is stored, what became of the rest, and what it finished."""
    layout, sizes = run.layout, []

    def counted(graph: hierarchy.Graph) -> hierarchy.Graph:
        sizes.append(graph.minimum.size)
        return graph

    with timings.phase("read"):
        if level == 0:
            near = hierarchy.linked_blocks(run.grid, n, run.config.fragments.connectivity)
            links = dict(zip(near, layout.links.load_each(near), strict=True))
            graph = hierarchy.block_graph(n, layout.block_basins.load(n), links, corrections.pinned_regions(run, n))
        else:
            children = [(level - 1, child) for child in hierarchy.children(run.grid, level, n)]
            graphs = layout.graphs.load_each(
                children, ahead=max(1, 8 >> level)
            )  # the higher, the larger: fewer at once
            graph = hierarchy.join(map(counted, graphs), run.grid, level, n)
    with timings.phase("contract"):
        rule = run.rules
        up, finished, destination = hierarchy.contract(graph, rule.seed_height)
        del graph
        labeled = hierarchy.labeled(finished, rule)
    with timings.phase("write"):
        layout.graphs.save(up, level, n)
        layout.destinations.save(Destinations(destination, labeled, np.array(sizes, np.int64)), level, n)
        layout.first_voxels.save(Values(finished.first[labeled]), level, n)
    rows = int(up.inner.size + up.outer.size)
    return {"components": int(destination.size), "basins": int(up.minimum.size), "rows": rows}


def rank(run: Run, layer: int, timings: Timings) -> dict:
    """The ranks of all objects whose first voxel lies in that layer of blocks are stored."""
    box = run.layers[layer]
    begin, end = (z * run.shape[1] * run.shape[2] for z in (box.start[0], box.stop[0]))
    levels = range(hierarchy.top_level(run.grid) + 1)
    with timings.phase("read"):
        parts = [(k, n) for k in levels for n in hierarchy.parts(run.grid, k).overlapping(box)]
        stored = (first.values for first in run.layout.first_voxels.load_each(parts))
        firsts = [first[slice(*np.searchsorted(first, (begin, end)))] for first in stored]
    with timings.phase("rank"):
        ranked = [(part, ranks) for part, ranks in zip(parts, hierarchy.ranks(firsts), strict=True) if ranks.size]
    with timings.phase("write"):
        side_by_side(lambda item: run.layout.ranks.save(Values(item[1]), *item[0], layer), ranked)
    return {"layer": layer, "objects": sum(ranks.size for _, ranks in ranked)}


def assign(run: Run, n: int, timings: Timings, level: int) -> None:
    """The labels of all components that part ``n`` of that level was given are stored, for each part that gave them."""
    layout = run.layout
    with timings.phase("read"):
        became = layout.destinations.load(level, n)
        offsets = layout.layer_offsets.load().values
        above = np.empty(0, np.int64)
        if level < hierarchy.top_level(run.grid):
            above = layout.part_labels.load(level, n).values
        finished = np.zeros(became.labeled.size, np.int64)
        finished[became.labeled] = _own_labels(run, n, level, offsets)
    with timings.phase("assign"):
        label = hierarchy.assign(became.destination, above, finished)
    with timings.phase("write"):
        if level == 0:
            labels = np.r_[0, label].astype(label_dtype(int(offsets[-1])))
            if run.corrections:
                layout.tree_labels.save(Values(labels), n)
            else:
                layout.block_labels.save(BlockLabels(labels), n)
            return
        shares = np.split(label, np.cumsum(became.sizes)[:-1])
        for child, share in zip(hierarchy.children(run.grid, level, n), shares, strict=True):
            layout.part_labels.save(Values(share), level - 1, child)


def _own_labels(run: Run, n: int, level: int, offsets: np.ndarray) -> np.ndarray:
    """Labels of the objects that a part finished, ascending; ``offsets``: the objects of all layers before each."""
    first = run.layout.first_voxels.load(level, n).values
    layers = np.unique(first // (run.shape[1] * run.shape[2] * run.block[0]))
    ranks = run.layout.ranks.load_each((level, n, int(layer)) for layer in layers)
    labels = (offsets[layer] + ranked.values + 1 for layer, ranked in zip(layers, ranks, strict=True))
    return np.concatenate([np.empty(0, np.int64), *labels])


def measure_borders(run: Run, i: int, timings: Timings) -> None:
    """Where a tree decided: which objects meet in block ``i`` and over its far faces, and how, is stored."""

    @lru_cache
    def label_of(j: int) -> np.ndarray:
        return run.layout.block_labels.load(j).label[1:].astype(np.int64)

    with timings.phase("borders"):
        basins = run.layout.block_basins.load(i, skip=("crossing_edges", "face_voxel", "face_region"))
        run.layout.borders.save(saddles.block_borders(i, basins, run.layout.links.load(i), label_of), i)


# ---------------------------------------------------------------- labels


def relabel(run: Run, i: int, timings: Timings) -> dict:
    """Labels of block ``i`` are stored, and its sums for the object table; kept where its id map gives what it has."""
    if run.restored:
        return _relabel_restored(run, i, timings)
    box, layout = run.grid[i], run.layout
    with timings.phase("read"):
        label = layout.block_labels.load(i).label
        behind = [_plane_behind(run, i, axis) for axis in range(3)]
    stamp = _stamp(basins_key(run), *sorted(run.config.output.measure), label, *behind)

    def make() -> None:
        if label.size == 1:  # no region, and no hole
            layout.labels().clear(box)
            layout.object_sums.save(objects.merge([]), i)
            return
        with timings.phase("read"):
            regions = layout.regions.read(box)
        place = holes.number_holes(regions) if run.fills_holes else regions
        sums = _measured(run, i, OutputBlock(place, label, behind), timings)
        with timings.phase("write"):
            layout.labels().write(box, objects.paint(place, label))
            layout.object_sums.save(sums, i)

    return _unless_kept(run, "relabel", i, stamp, make)


def _relabel_restored(run: Run, i: int, timings: Timings) -> dict:
    """The same of a block of the grid that labels are brought back to."""
    box, layout = run.output_grid[i], run.layout
    with timings.phase("read"):
        blocks = restore.own_blocks(run, i)
        labels = dict(zip(blocks, (each.label for each in layout.block_labels.load_each(blocks)), strict=True))
    stamp = _stamp(basins_key(run), str(run.output_shape), *sorted(run.config.output.measure), *labels.values())

    def make() -> None:
        if all(label.size == 1 for label in labels.values()):
            layout.labels().clear(box)
            layout.object_sums.save(objects.merge([]), i)
            return
        with timings.phase("read"):
            block = restore.output_block(run, i, labels)
        sums = _measured(run, i, block, timings)
        with timings.phase("write"):
            layout.labels().write(box, objects.paint(block.region, block.label))
            layout.object_sums.save(sums, i)

    return _unless_kept(run, "relabel", i, stamp, make)


def _measured(run: Run, i: int, block: OutputBlock, timings: Timings) -> objects.ObjectSums:
    """What block ``i`` of the labels adds to the object table."""
    box = run.output_grid[i]
    with timings.phase("read"):
        tally = run.layout.tallies.load(i) if run.drops else None
        mask = np.zeros(box.shape, np.uint8) if tally else _mask_probability(run, i)
        more = run.config.output.measure
        gray = run.output_source.read(box) if "gray" in more else None
    with timings.phase("measure"):
        along = extents.directions(run.output_voxel_size_nm) if "feret" in more else None
        sums = objects.measure(block.region, block.label, mask, box, block.behind, gray, along)
        return objects.with_tally(sums, block.label, tally.total, tally.lowest) if tally else sums


def _mask_probability(run: Run, i: int) -> np.ndarray:
    """The stored mask probability of block ``i`` of the labels, uint8 (z, y, x)."""
    if run.restored:
        return restore.output_probability(run, i)
    return run.layout.probabilities.read(run.grid[i], channel=0)


def downsample(run: Run, i: int, timings: Timings, level: int) -> dict:
    """Block ``i`` of a pyramid level is stored, made from the level above; kept where nothing of that has changed."""
    (above, _), (_, factor) = run.levels[level - 1], run.levels[level]
    box = run.level_grid(level)[i]
    parent = pyramid.parent_box(box, factor, above)
    finer_stage = f"pyramid{level - 1}" if level > 1 else "relabel"
    finer_part = run.parts.labels(level - 1)
    stamps = [
        run.layout.read_stamp(finer_stage, j, check=False) if finer_part.holds(j) else "nothing"
        for j in run.level_grid(level - 1).overlapping(parent)
    ]

    def make() -> None:
        part = run.parts.labeled(level, box)
        inside = pyramid.parent_box(part, factor, above)
        if not part.voxels or run.layout.labels(level - 1).is_empty(inside):
            run.layout.labels(level).clear(box)
            return
        with timings.phase("read"):
            finer = run.layout.labels(level - 1).read(inside)
        with timings.phase("downsample"):
            coarse = pyramid.placed(pyramid.downsample(finer, factor), part, box)
        with timings.phase("write"):
            run.layout.labels(level).write(box, coarse)

    return _unless_kept(run, f"pyramid{level}", i, _stamp(*stamps) if all(stamps) else "", make)


def _unless_kept(run: Run, stage: str, i: int, stamp: str, make: Callable[[], None]) -> dict:
    """What ``make`` stores of block ``i`` is there; it is not called where it stored the same before, as ``stamp`` says.

    Labels are written over those of earlier settings, so a block has no stamp from before its first byte to after its last.
    An empty stamp is never the same.
    """
    kept = stamp != "" and run.layout.read_stamp(stage, i) == stamp
    if kept:
        run.layout.record_stamped(stage, i)
    else:
        run.layout.write_stamp(stage, i, "", {})
        with recording() as written:
            make()
        run.layout.write_stamp(stage, i, stamp, written)
        run.layout.record_stamped(stage, i)
    return {"kept": kept}


def _stamp(*parts: str | np.ndarray | None) -> str:
    """A hash of all these."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(f"{part.dtype}{part.shape}".encode() if isinstance(part, np.ndarray) else f"{part}.".encode())
        if isinstance(part, np.ndarray):
            state.update(np.ascontiguousarray(part))
    return state.hexdigest()


def _plane_behind(run: Run, i: int, axis: int) -> np.ndarray | None:
    """Labels of the plane behind block ``i`` along an axis, from the next block's table; None where the volume ends."""
    if run.grid[i].stop[axis] == run.shape[axis]:
        return None
    j = run.grid.index(tuple(c + (k == axis) for k, c in enumerate(run.grid.coords(i))))
    label = run.layout.block_labels.load(j).label
    if run.fills_holes:
        return label[holes.face_plane(run.layout.block_holes.load(j), run.grid[j], 2 * axis)]
    basins = run.layout.block_basins.load(j, skip=("edges", "crossing_edges"))
    return objects.first_plane(basins.face_voxel, label[basins.face_region], run.grid[j], run.shape, axis)
