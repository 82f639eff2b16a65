"""Read this first: the path of a voxel, one function per stage.

    predict    tiles of one block -> blended uint8 probabilities; of several planes, the mean of what each pass stored
    take       instead of predict: one block of probabilities that another network made -> uint8
    fragments  probabilities -> basins of one block, and a table of how they touch
    faces      a block's exits and crossing edges come to name its neighbors' basins
    voids      where holes are filled: pieces of background of one block; `rims`: what they touch over its faces
    stitch     all tables -> the label of every basin; beyond one memory by `tree`, `number` and `names`
    relabel    basins -> labels of one block, and sums for the object table
    pyramid    labels -> the next coarser level of one block

Each stage reads what earlier ones stored in the run's folder, writes whole shards, and then its done-marker. A stage's
key is the hash of all that determines its output, so a restart does only what no marker of that key covers.

All of this runs on workers. What they are told is a `run.Run`; `flow` says which block goes when, `launch` is a command
from its start to its end.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import islice
from math import prod
from typing import Any

import numpy as np

from volseg.box import Box, inverse_axes, transpose_axes
from volseg.engine import cluster
from volseg.engine.run import Run, level_of, tiles_of
from volseg.errors import OutOfMemoryError, UserError
from volseg.inference import backends, tiles
from volseg.inference.device import Call, out_of_memory_as
from volseg.inference.normalization import scale
from volseg.io import arrays, files, pyramid
from volseg.io import tables as store
from volseg.segmentation import hierarchy, holes, objects, saddles, stitch
from volseg.segmentation.basins import BlockBasins, watershed_block
from volseg.segmentation.heights import block_heights, height_halo
from volseg.segmentation.rules import Rules, label_basins, label_dtype
from volseg.system import trim_memory

INFERS = threading.Lock()  # held by the task of this process that infers, while others read and write


def predict(run: Run, i: int, seconds: dict[str, float]) -> dict:
    """Probabilities of block ``i`` are stored: those of its xy planes, or the mean of what several passes stored."""
    box = run.predict_grid[i]
    if run.passes:
        with cluster.timed(seconds, "read"):
            stored = [
                np.asarray(arrays.open_array(run.out, f"work/{s}")[(slice(None), *box.slices)]) for s in run.passes
            ]
        with cluster.timed(seconds, "average"):
            out, facts = tiles.mean_over_passes(stored), {}
    else:
        out, facts = _probabilities(run, "xy", box, seconds)
    with cluster.timed(seconds, "write"):
        arrays.write(arrays.open_array(run.out, "0"), box, out)
    return facts


def predict_plane(run: Run, i: int, seconds: dict[str, float], stage: str) -> dict:
    """Probabilities of block ``i`` of one pass are stored in the work folder."""
    plane = run.passes[stage]
    box = run.pass_grid(plane)[i]
    out, facts = _probabilities(run, plane, box, seconds)
    with cluster.timed(seconds, "write"):
        arrays.write(arrays.open_array(run.out, f"work/{stage}"), box, out)
    return facts


def _probabilities(run: Run, plane: str, box: Box, seconds: dict[str, float]) -> tuple[np.ndarray, dict]:
    """Probabilities of ``box``, uint8, channels z y x, 0 where no voxel is wanted; with them, what `_infer` returns."""
    out = np.zeros((len(run.heads), *box.shape), np.uint8)
    core = run.core(box)
    if not core.voxels or not run.any_wanted(core):
        return out, {"inferred": 0, "device": 0.0}
    with cluster.timed(seconds, "read"):
        wanted = run.wanted_in(core, plane)
    inside = out[(slice(None), *core.slices_within(box))].transpose(0, *(1 + a for a in tiles.PLANES[plane]))
    facts = _infer(run, plane, core, wanted, inside, seconds)
    if wanted is not None:
        inside *= wanted
    return out, facts


def _infer(
    run: Run, plane: str, box: Box, wanted: np.ndarray | None, out: np.ndarray, seconds: dict[str, float]
) -> dict:
    """``out`` (zeros before) holds the probabilities of the wanted voxels of ``box``.

    Tiles are blended section by section in raster order. One that is constant in all its sections is 0: whether it is
    depends on the volume alone. Everything has its axes in the order of the pass: sections, rows, columns. From gray
    voxels to uint8 probabilities all is done where the network runs. Returns how many voxels went through the network, the
    seconds in which the device computed, and the bytes that it was sent and that were fetched from it.
    """
    grid = run.tile_grid(plane)
    first, y, x = box.transpose(tiles.PLANES[plane]).slices
    todo = tiles_of(run, plane, box, wanted)
    device = backends.device(run.engine.backend, cluster.place_here())
    with cluster.timed(seconds, "read"):
        here = slab(run, plane, box, grid.meeting(y, x))
        with out_of_memory_as(f"{here.voxels.shape[0]} sections", "; smaller blocks.shape takes less"):
            there = replace(here, voxels=device.put(here.voxels))

    def batches() -> Iterator[tuple[list, Any]]:
        kept = ((z, tile) for z, tile in todo if not tiles.is_constant(here.sections(z, grid.place(tile))))
        while keys := list(islice(kept, run.batch)):
            batch = device.zeros((run.batch, run.sections, *grid.size))
            for row, (z, tile) in zip(batch, keys, strict=False):
                there.cut(z, grid.place(tile), row, scale(run.mean, run.std), device)
            yield keys, batch

    at, count = None, 0
    at_once = f"{run.batch} tile{'s' * (run.batch > 1)} of {grid.size[0]} x {grid.size[1]} at once"
    advice = "" if run.batch > 1 else "; a smaller predict.tile takes less"
    with _turn(seconds), out_of_memory_as(at_once, advice), cluster.timed(seconds, "infer"), device.stream():
        with cluster.timed(seconds, "load"):
            network = backends.TimedCall(device.synchronized(_network(run, grid.size)))
        made, blend = device.empty_output(out), tiles.Blend(len(run.heads), grid, y, x, device)
        for keys, probability in backends.imap(
            network, cluster.timed_each(seconds, "cut", batches()), threads=_threads(run)
        ):
            with cluster.timed(seconds, "blend"):
                for (z, tile), one in zip(keys, probability, strict=False):
                    if at not in (None, z):
                        blend.quantize(made[:, at - first.start])
                    at, count = z, count + 1
                    blend.add(tile, one)
        with cluster.timed(seconds, "blend"):
            if count:
                blend.quantize(made[:, at - first.start])
            device.copy_to_host(made, out)
    inferred = run.config.predict.tta * count * prod(grid.size)
    return {"inferred": inferred, "device": network.seconds, "sent": device.sent, "fetched": device.fetched}


@contextmanager
def _turn(seconds: dict[str, float]) -> Iterator[None]:
    """Inside, no other task of this process infers."""
    with cluster.timed(seconds, "wait"):
        INFERS.acquire()
    try:
        yield
    finally:
        INFERS.release()


def slab(run: Run, plane: str, box: Box, meeting: list[tuple[int, int]]) -> tiles.Slab:
    """The source under some tiles of the sections of ``box``, with neighboring sections, read at once."""
    axes, grid, around = tiles.PLANES[plane], run.tile_grid(plane), run.sections // 2
    places = [grid.place(tile) for tile in meeting]
    seen = box.transpose(axes)
    start = (seen.start[0] - around, min(p[0].start for p in places), min(p[1].start for p in places))
    stop = (seen.stop[0] + around, max(p[0].stop for p in places), max(p[1].stop for p in places))
    need = Box(start, stop).clip(transpose_axes(run.shape, axes))
    voxels = np.ascontiguousarray(run.source.read(need.transpose(inverse_axes(axes))).transpose(axes))
    return tiles.Slab(voxels, need.start, around, run.shape[axes[0]])


def take(run: Run, i: int, seconds: dict[str, float]) -> None:
    """Probabilities of block ``i`` are stored as another network made them, as uint8."""
    box = run.predict_grid[i]
    with cluster.timed(seconds, "read"):
        out = np.zeros((len(run.heads), *box.shape), np.uint8)
        core = run.core(box)
        if core.voxels and run.any_wanted(core):
            inside = out[(slice(None), *core.slices_within(box))]
            inside[:] = [channel.read(core) for channel in run.taken]
            if (wanted := run.wanted_in(core)) is not None:
                inside *= wanted
    with cluster.timed(seconds, "write"):
        arrays.write(arrays.open_array(run.out, "0"), box, out)


def fragments(run: Run, i: int, seconds: dict[str, float]) -> None:
    """Basins of block ``i`` are stored, with the table of how they touch."""
    box = run.grid[i]
    knobs = run.config.fragments
    have = box.grow(height_halo(knobs, run.voxel_size_nm)).clip(run.shape)
    with cluster.timed(seconds, "read"):
        probability = np.asarray(arrays.open_array(run.out, "0")[(slice(None), *have.slices)])
    with cluster.timed(seconds, "basins"):
        height = block_heights(probability, box, run.shape, knobs, run.voxel_size_nm)
        mass = np.ascontiguousarray(probability[0][box.slices_within(have)])
        region, table = watershed_block(height, mass, box, run.shape, knobs.connectivity)
    with cluster.timed(seconds, "write"):
        arrays.write(arrays.open_array(run.out, "work/fragments"), box, region)
        store.save(run.out, f"work/tables/{i}.npz", **asdict(table))


def faces(run: Run, i: int, seconds: dict[str, float]) -> dict:
    """The `stitch.Links` of block ``i`` are stored; returns how many edges the block has."""

    @lru_cache
    def table_of(j: int) -> BlockBasins:
        with cluster.timed(seconds, "read"):
            return BlockBasins(**store.load(run.out, f"work/tables/{j}.npz"))

    with cluster.timed(seconds, "link"):
        found = stitch.link(i, table_of, run.grid)
    with cluster.timed(seconds, "write"):
        store.save(run.out, f"work/links/{i}.npz", **asdict(found))
    return {"edges": int(table_of(i).edges.size + found.edges.size)}


def found_voids(run: Run, i: int, seconds: dict[str, float]) -> None:
    """The `holes.BlockHoles` of block ``i`` is stored."""
    region = np.asarray(arrays.open_array(run.out, "work/fragments")[run.grid[i].slices])
    with cluster.timed(seconds, "voids"):
        table = holes.block_holes(region, run.grid[i], run.shape)
    store.save(run.out, f"work/voids/{i}.npz", **asdict(table))


def rims(run: Run, i: int, seconds: dict[str, float]) -> None:
    """What the voids of block ``i`` touch over its far faces, and what lies there touches voids, is stored."""
    table_of = lru_cache(lambda j: holes.BlockHoles(**store.load(run.out, f"work/voids/{j}.npz")))
    store.save(run.out, f"work/rims/{i}.npz", pairs=holes.face_contacts(i, table_of, run.grid))


def stitched(run: Run, _: int, seconds: dict[str, float]) -> dict:
    """The label of every region of every block is stored, and of its voids; returns how many objects there are."""
    every = range(len(run.grid))
    with cluster.timed(seconds, "gather"):
        known = _known_basins(run)
        whole, basin_of = known or _gathered_basins(run)
        outside, void_of = _gathered_voids(run, basin_of)
    with cluster.timed(seconds, "decide"):
        rule = Rules.from_config(run.config, run.voxel_size_nm)
        label, of_void = np.split(label_basins(whole, rule, outside), [whole.minimum.size])
    found = int(label.max(initial=0))
    with cluster.timed(seconds, "write"):
        sure = saddles.confidence(whole, label, run.config.fragments, run.voxel_size_nm)
        told = {"rows": saddles.rank_saddles(whole, rule, label), "confidence": sure}
        files.remove(f"{run.out}/work/merges")
        store.save(run.out, f"work/merges/{run.keys['stitch']}.npz", **told)
        dtype = label_dtype(found)

        def save(i: int) -> None:
            ids = np.r_[0, label[basin_of[i]], of_void[void_of[i]]].astype(dtype)
            store.save(run.out, f"work/labels/{i}.npz", label=ids, basin=basin_of[i], void=void_of[i])

        with ThreadPoolExecutor(store.IO_THREADS) as pool:
            list(pool.map(save, every))
        if not known:
            store.save(run.out, "work/basins.npz", **asdict(whole), of=np.array(run.keys["fragments"]))
    return {"objects": found, "basins": int(label.size), "edges": int(whole.edges.size)}


def _known_basins(run: Run) -> tuple[stitch.Basins, list[np.ndarray]] | None:
    """What `_gathered_basins` gave when these basins were decided on before: a hundredth of the bytes of all tables."""
    if not files.exists(f"{run.out}/work/basins.npz"):
        return None
    stored = store.load(run.out, "work/basins.npz")
    if str(stored.pop("of", "")) != run.keys["fragments"]:
        return None
    each = store.load_each(run.out, [f"work/labels/{i}.npz" for i in range(len(run.grid))], skip=("label", "void"))
    return stitch.Basins(**stored), [of["basin"] for of in each]


def _gathered_basins(run: Run) -> tuple[stitch.Basins, list[np.ndarray]]:
    """The volume's basins, and the basin of each of a block's regions, from all tables. None are known until all is stored."""
    files.remove(f"{run.out}/work/basins.npz")
    every = range(len(run.grid))
    tables = store.load_each(
        run.out, [f"work/tables/{i}.npz" for i in every], skip=("crossing_edges", "face_voxel", "face_region")
    )
    links = store.load_each(run.out, [f"work/links/{i}.npz" for i in every])
    return stitch.gather((BlockBasins(**t) for t in tables), (stitch.Links(**l) for l in links))


def _gathered_voids(run: Run, basin_of: list[np.ndarray]) -> tuple[holes.Holes | None, list[np.ndarray]]:
    """The volume's voids, stored for `calibrate`, and the void of each of a block's voids; none where no hole is filled."""
    if not run.fills:
        return None, [np.empty(0, np.int64)] * len(run.grid)
    tables = store.load_each(
        run.out, [f"work/voids/{i}.npz" for i in range(len(run.grid))], skip=("run_start", "run_piece")
    )
    meets = store.load_each(run.out, [f"work/rims/{i}.npz" for i in range(len(run.grid))])
    whole, void_of = holes.gather((holes.BlockHoles(**t) for t in tables), (met["pairs"] for met in meets), basin_of)
    store.save(run.out, "work/voids.npz", **asdict(whole))
    return whole, void_of


def contracted(run: Run, n: int, seconds: dict[str, float], level: int) -> dict:
    """Part ``n`` of that level is contracted: what goes up is stored, what became of the rest, and what it finished."""
    sizes: list[int] = []

    def opened(columns: dict[str, np.ndarray]) -> hierarchy.Graph:
        sizes.append(columns["minimum"].size)
        return hierarchy.Graph(**columns)

    with cluster.timed(seconds, "read"):
        if level == 0:
            table = BlockBasins(**store.load(run.out, f"work/tables/{n}.npz"))
            near = hierarchy.linked_blocks(run.grid, n, run.config.fragments.connectivity)
            links = zip(near, store.load_each(run.out, [f"work/links/{j}.npz" for j in near]), strict=True)
            graph = hierarchy.block_graph(n, table, {j: stitch.Links(**l) for j, l in links})
        else:
            keys = [f"work/tree/{level - 1}/up/{c}.npz" for c in hierarchy.children(run.grid, level, n)]
            graphs = store.load_each(run.out, keys, pending=max(1, 8 >> level))  # the higher, the larger: fewer at once
            graph = hierarchy.join(map(opened, graphs), run.grid, level, n)
    with cluster.timed(seconds, "contract"):
        deciding = Rules.from_config(run.config, run.voxel_size_nm)
        up, finished, fate = hierarchy.contract(graph, deciding.seed_height)
        del graph
        kept = hierarchy.labeled(finished, deciding)
    with cluster.timed(seconds, "write"):
        store.save(run.out, f"work/tree/{level}/up/{n}.npz", **asdict(up))
        store.save(run.out, f"work/tree/{level}/fate/{n}.npz", fate=fate, kept=kept, sizes=np.array(sizes, np.int64))
        store.save(run.out, f"work/tree/{level}/first/{n}.npz", first=finished.first[kept])
    return {"components": int(fate.size), "up": int(up.minimum.size), "rows": int(up.inner.size + up.outer.size)}


def numbered(run: Run, layer: int, seconds: dict[str, float]) -> dict:
    """The ranks of all objects whose first voxel lies in that layer of blocks are stored; returns how many they are."""
    box = run.layers[layer]
    begin, end = (z * run.shape[1] * run.shape[2] for z in (box.start[0], box.stop[0]))
    places = [
        (k, n) for k in range(hierarchy.top_level(run.grid) + 1) for n in hierarchy.parts(run.grid, k).overlapping(box)
    ]
    stored = store.load_each(run.out, [f"work/tree/{k}/first/{n}.npz" for k, n in places])
    firsts = [first[slice(*np.searchsorted(first, (begin, end)))] for first in (s["first"] for s in stored)]
    some = [(place, rank) for place, rank in zip(places, hierarchy.ranks(firsts), strict=True) if rank.size]

    def save(item: tuple[tuple[int, int], np.ndarray]) -> None:
        (k, n), rank = item
        store.save(run.out, f"work/tree/{k}/rank/{n}-{layer}.npz", rank=rank)

    with ThreadPoolExecutor(store.IO_THREADS) as pool:
        list(pool.map(save, some))
    return {"layer": layer, "objects": sum(rank.size for _, rank in some)}


def named(run: Run, n: int, seconds: dict[str, float], level: int) -> None:
    """The labels of all components that part ``n`` of that level was given are stored, for each part that gave them."""
    fate = store.load(run.out, f"work/tree/{level}/fate/{n}.npz")
    before = store.load(run.out, "work/tree/before.npz")["before"]
    above = np.empty(0, np.int64)
    if level < hierarchy.top_level(run.grid):
        above = store.load(run.out, f"work/tree/{level}/label/{n}.npz")["label"]
    finished = np.zeros(fate["kept"].size, np.int64)
    finished[fate["kept"]] = _own_labels(run, n, level, before)
    label = hierarchy.assign(fate["fate"], above, finished)
    if level == 0:
        store.save(run.out, f"work/labels/{n}.npz", label=np.r_[0, label].astype(label_dtype(int(before[-1]))))
        return
    shares = np.split(label, np.cumsum(fate["sizes"])[:-1])
    for child, share in zip(hierarchy.children(run.grid, level, n), shares, strict=True):
        store.save(run.out, f"work/tree/{level - 1}/label/{child}.npz", label=share)


def _own_labels(run: Run, n: int, level: int, before: np.ndarray) -> np.ndarray:
    """Labels of the objects that a part finished, ascending; ``before`` counts the objects of all layers before each."""
    first = store.load(run.out, f"work/tree/{level}/first/{n}.npz")["first"]
    layers = np.unique(first // (run.shape[1] * run.shape[2] * run.block[0]))
    ranks = store.load_each(run.out, [f"work/tree/{level}/rank/{n}-{layer}.npz" for layer in layers])
    return np.concatenate(
        [np.empty(0, np.int64), *(before[layer] + r["rank"] + 1 for layer, r in zip(layers, ranks, strict=True))]
    )


def borders(run: Run, i: int, seconds: dict[str, float]) -> None:
    """Where a tree stitched: which objects meet in block ``i`` and over its far faces, and how, is stored."""
    label_of = lru_cache(lambda j: store.load(run.out, f"work/labels/{j}.npz")["label"][1:].astype(np.int64))
    table = BlockBasins(
        **store.load(run.out, f"work/tables/{i}.npz", skip=("crossing_edges", "face_voxel", "face_region"))
    )
    links = stitch.Links(**store.load(run.out, f"work/links/{i}.npz"))
    store.save(run.out, f"work/borders/{i}.npz", **asdict(saddles.block_borders(i, table, links, label_of)))


def relabel(run: Run, i: int, seconds: dict[str, float]) -> dict:
    """Labels of block ``i`` are stored, and its sums for the object table; kept where its id map gives what it has."""
    box = run.grid[i]
    with cluster.timed(seconds, "read"):
        label = store.load(run.out, f"work/labels/{i}.npz")["label"]
        behind = [_behind(run, i, axis) for axis in range(3)]
    stamp = _stamp(run.keys["fragments"], label, *behind)

    def make() -> None:
        with cluster.timed(seconds, "read"):
            region = np.asarray(arrays.open_array(run.out, "work/fragments")[box.slices])
            mass = np.asarray(arrays.open_array(run.out, "0")[(0, *box.slices)])
        with cluster.timed(seconds, "measure"):
            place = holes.number_holes(region) if run.fills else region
            sums = objects.measure(place, label, mass, box, behind)
        with cluster.timed(seconds, "write"):
            arrays.write(arrays.open_array(run.out, "labels/instances/0"), box, objects.paint(place, label))
            store.save(run.out, f"work/objects/{i}.npz", **asdict(sums))

    return _unless_kept(run, "relabel", i, stamp, make)


def _unless_kept(run: Run, stage: str, i: int, stamp: str, make: Callable[[], None]) -> dict:
    """What ``make`` stores of block ``i`` is there; it is not called where it stored the same before, as ``stamp`` says.

    Labels are written over those of earlier settings, so a block has no stamp from before its first byte to after its last.
    An empty stamp is never the same.
    """
    key = f"work/stamps/{stage}/{i}"
    kept = stamp != "" and _read_stamp(run, stage, i) == stamp
    if not kept:
        files.write_bytes(run.out, key, b"")
        make()
        files.write_bytes(run.out, key, stamp.encode())
    return {"kept": kept}


def _read_stamp(run: Run, stage: str, i: int) -> str:
    try:
        return files.read_bytes(run.out, f"work/stamps/{stage}/{i}").decode()
    except FileNotFoundError:
        return ""


def _stamp(*parts: str | np.ndarray | None) -> str:
    """A hash of all these."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(f"{part.dtype}{part.shape}".encode() if isinstance(part, np.ndarray) else f"{part}.".encode())
        if isinstance(part, np.ndarray):
            found.update(np.ascontiguousarray(part))
    return found.hexdigest()


def _behind(run: Run, i: int, axis: int) -> np.ndarray | None:
    """Labels of the plane behind block ``i`` along an axis, from the next block's table; None where the volume ends."""
    if run.grid[i].stop[axis] == run.shape[axis]:
        return None
    j = run.grid.index(tuple(c + (k == axis) for k, c in enumerate(run.grid.coords(i))))
    label = store.load(run.out, f"work/labels/{j}.npz")["label"]
    if run.fills:
        return label[
            holes.face_plane(holes.BlockHoles(**store.load(run.out, f"work/voids/{j}.npz")), run.grid[j], 2 * axis)
        ]
    table = store.load(run.out, f"work/tables/{j}.npz", skip=("edges", "crossing_edges"))
    return objects.first_plane(table["face_voxel"], label[table["face_region"]], run.grid[j], run.shape, axis)


def coarser(run: Run, i: int, seconds: dict[str, float], level: int) -> dict:
    """Block ``i`` of a pyramid level is stored, made from the level above; kept where nothing of that has changed."""
    (above, _), (_, factor) = run.levels[level - 1], run.levels[level]
    box = run.level_grid(level)[i]
    parent = pyramid.parent_box(box, factor, above)
    stage = f"pyramid{level - 1}" if level > 1 else "relabel"
    stamps = [_read_stamp(run, stage, j) for j in run.level_grid(level - 1).overlapping(parent)]

    def make() -> None:
        with cluster.timed(seconds, "read"):
            finer = np.asarray(arrays.open_array(run.out, f"labels/instances/{level - 1}")[parent.slices])
        with cluster.timed(seconds, "downsample"):
            coarse = pyramid.downsample(finer, factor)
        with cluster.timed(seconds, "write"):
            arrays.write(arrays.open_array(run.out, f"labels/instances/{level}"), box, coarse)

    return _unless_kept(run, f"pyramid{level}", i, _stamp(*stamps) if all(stamps) else "", make)


STAGES: dict[str, Callable] = {
    "predict": predict, "take": take, "fragments": fragments, "faces": faces, "voids": found_voids, "rims": rims,
    "stitch": stitched, "number": numbered, "borders": borders, "relabel": relabel,
}  # fmt: skip


OF_LEVEL: dict[str, Callable] = {"tree": contracted, "names": named, "pyramid": coarser}


def work(out: str, key: str, stage: str, i: int) -> dict:
    """One block of one stage on a worker, start to finish; returns its receipt."""
    run = _run(out, key)
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    facts, full = None, ""
    try:
        facts = _done(run, stage, i, seconds)
    except OutOfMemoryError as error:
        full = str(error)
    if full:  # the run may begin again with a smaller batch, which needs the room of all that the error refers to
        let_go()
        raise OutOfMemoryError(full)
    seconds["other"] = time.perf_counter() - start - sum(seconds.values())
    receipt = {"voxels": run.grid_of(stage)[i].voxels, "seconds": seconds, **(facts or {})}
    cluster.count(stage, receipt)
    return cluster.mark(out, stage, run.keys[stage], i, receipt)


def _done(run: Run, stage: str, i: int, seconds: dict[str, float]) -> dict | None:
    if stage in run.passes:
        return predict_plane(run, i, seconds, stage)
    if stage in STAGES:
        return STAGES[stage](run, i, seconds)
    name, level = level_of(stage)
    return OF_LEVEL[name](run, i, seconds, level)


def let_go() -> None:
    """This process keeps no network, nor memory that it does not use."""
    _loaded.cache_clear()
    trim_memory()


@lru_cache(maxsize=2)
def _run(out: str, key: str) -> Run:
    """The run stored at ``out``; ``key`` is its id, so that a new run at the same place is read anew.

    The network of an earlier run makes room for its own.
    """
    let_go()
    return replace(Run.from_json(json.loads(files.read_bytes(out, "work/run.json"))), out=out)


def _network(run: Run, size: tuple[int, int]) -> Call:
    """The network for tiles of one size where they lie, its mean over the ways that ``predict.tta`` lays them."""
    ways = tiles.dihedrals(run.config.predict.tta)
    loaded = {s: _loaded(run.out, run.id, s) for s in dict.fromkeys((size, size[::-1]) if len(ways) == 8 else (size,))}
    if len(ways) == 1:
        return loaded[size]
    return lambda batch: tiles.mean_over_dihedrals(lambda turned: loaded[turned.shape[2:]](turned), batch, ways)


@lru_cache(maxsize=2)  # tiles, and tiles on their side
def _loaded(out: str, key: str, size: tuple[int, int]) -> Call:
    """The network of a run for tiles of one size, once for each worker process."""
    run = _run(out, key)
    begun = run.engine.arithmetic
    here = backends.Engine.here(
        run.engine.backend, run.engine.precision, cluster.place_here(), batch=run.batch
    ).arithmetic
    if here != begun:
        raise UserError(
            f"this worker would run {here}, the run was begun with {begun}; their bits differ, so they cannot share it"
        )
    shape = (run.batch, run.sections, *size)
    blob = files.read_bytes(out, "work/model.bin")
    engine = run.engine.backend, run.engine.precision
    return backends.network(blob, *engine, shape, _threads(run), cluster.place_here())


def _threads(run: Run) -> int:
    """Batches under way at once in this worker: on a GPU one is queued while the other is computed."""
    return 2 if run.engine.device == "cuda" else cluster.threads_here()
