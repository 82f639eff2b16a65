"""The stages that store probabilities: tiles of a block through the network, or what another network made."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache
from math import prod

import numpy as np

from volseg.box import Blocks, Box, inverse_axes, transpose_axes
from volseg.engine import cluster
from volseg.engine.receipts import Timings
from volseg.engine.run import Run, needed_tiles, stored_run
from volseg.engine.stored import StoredArray
from volseg.errors import UserError
from volseg.inference import backends, tiles
from volseg.inference.backends import Engine
from volseg.inference.device import Call, out_of_memory_as
from volseg.inference.normalization import scale
from volseg.inference.sections import blend_sections, varying_tiles
from volseg.io import pyramid
from volseg.system import trim_memory

PIECES = 8  # into which a block is cut that was too much for a worker's memory
_IN_PIECES: ContextVar[bool] = ContextVar("in_pieces", default=False)
DEVICE_LOCK = threading.Lock()  # held by the task of this process that infers, while others read and write


def predict(run: Run, i: int, timings: Timings) -> dict:
    """Probabilities of block ``i`` are stored: those of its xy planes."""
    return _store_probabilities(run, "xy", run.predict_grid[i], run.layout.probabilities, timings)


def predict_plane(run: Run, i: int, timings: Timings, stage: str) -> dict:
    """Probabilities of block ``i`` of one pass are stored in the work folder."""
    plane = run.passes[stage]
    return _store_probabilities(run, plane, run.pass_grid(plane)[i], run.layout.plane_probabilities(stage), timings)


def _store_probabilities(run: Run, plane: str, box: Box, array: StoredArray, timings: Timings) -> dict:
    """Probabilities of one pass are stored for ``box``; facts of a `Receipt`."""
    if not run.wants_any(run.wanted_part(box)):
        array.clear(box)
        return {}
    probabilities, facts = _probabilities(run, plane, box, timings)
    with timings.phase("write"):
        array.write(box, probabilities)
    return facts


def average_planes(run: Run, i: int, timings: Timings) -> None:
    """Probabilities of block ``i`` are stored: the mean of what the passes stored."""
    box, passes = run.predict_grid[i], [run.layout.plane_probabilities(stage) for stage in run.passes]
    if all(array.is_empty(box) for array in passes):
        run.layout.probabilities.clear(box)
        return
    with timings.phase("read"):
        stored = [array.read(box) for array in passes]
    with timings.phase("average"):
        mean = tiles.mean_over_passes(stored)
    with timings.phase("write"):
        run.layout.probabilities.write(box, mean)


def coarsen(run: Run, i: int, timings: Timings, level: int) -> None:
    """Block ``i`` of a coarser level of the probabilities is stored: the mean of each cell of the level above."""
    array, levels, box = run.layout.probability_level, run.probability_levels, run.probability_grid(level)[i]
    finest = box
    for k in range(level, 0, -1):
        finest = pyramid.parent_box(finest, levels[k][1], levels[k - 1][0])
    if not run.wants_any(run.wanted_part(finest)):
        array(level).clear(box)
        return
    _coarsen(array(level - 1), array(level), box, levels[level - 1 : level + 1], timings)


def copy_image(run: Run, i: int, timings: Timings) -> None:
    """Block ``i`` of the volume is stored in the run, on the grid of the labels."""
    box = run.output_grid[i]
    with timings.phase("read"):
        voxels = run.output_source.read(box)
    with timings.phase("write"):
        run.layout.image().write(box, voxels)


def coarsen_image(run: Run, i: int, timings: Timings, level: int) -> None:
    """The same as `coarsen` of the copy of the volume."""
    array, levels = run.layout.image, run.image_levels
    _coarsen(array(level - 1), array(level), run.level_grid(level)[i], levels[level - 1 : level + 1], timings)


def _coarsen(finer: StoredArray, coarser: StoredArray, box: Box, levels: list, timings: Timings) -> None:
    """The voxels of ``box`` are stored in ``coarser``; ``levels`` are the shapes and factors of both."""
    (above, _), (_, factor) = levels
    parent = pyramid.parent_box(box, factor, above)
    if finer.is_empty(parent):
        coarser.clear(box)
        return
    with timings.phase("read"):
        voxels = finer.read(parent)
    with timings.phase("downsample"):
        channels = voxels if voxels.ndim == 4 else voxels[None]
        coarse = np.stack([pyramid.downsample_mean(channel, factor) for channel in channels])
    with timings.phase("write"):
        coarser.write(box, coarse if voxels.ndim == 4 else coarse[0])


def import_probabilities(run: Run, i: int, timings: Timings) -> None:
    """Probabilities of block ``i`` are stored as another network made them, as uint8."""
    box = run.predict_grid[i]
    part = run.wanted_part(box)
    if not run.wants_any(part):
        run.layout.probabilities.clear(box)
        return
    with timings.phase("read"):
        out = np.zeros((len(run.heads), *box.shape), np.uint8)
        inside = out[(slice(None), *part.slices_within(box))]
        for piece in _pieces(part, 0):
            for channel, plane in zip(run.channels, inside, strict=True):
                plane[piece.slices_within(part)] = channel.read(piece)
        if (mask := run.read_mask(part)) is not None:
            inside *= mask
    with timings.phase("write"):
        run.layout.probabilities.write(box, out)


# ---------------------------------------------------------------- the tiles of one block


def _probabilities(run: Run, plane: str, box: Box, timings: Timings) -> tuple[np.ndarray, dict]:
    """Probabilities of ``box``, uint8, channels z y x, 0 where no voxel is wanted; with them, what `_infer` returns."""
    out = np.zeros((len(run.heads), *box.shape), np.uint8)
    part = run.wanted_part(box)
    with timings.phase("read"):
        mask = run.read_mask(part, plane)
    axes = tiles.PLANES[plane]
    inside = out[(slice(None), *part.slices_within(box))].transpose(0, *(1 + a for a in axes))
    facts: Counter[str] = Counter()
    for piece in _pieces(part, axes[0]):
        sections = piece.transpose(axes).slices_within(part.transpose(axes))[0]
        some = None if mask is None else mask[sections]
        facts.update(_infer(run, plane, piece, some, inside[:, sections], timings))
    if mask is not None:
        inside *= mask
    return out, dict(facts)


@contextmanager
def in_pieces() -> Iterator[None]:
    """Inside, blocks are read and inferred in `PIECES` along the sections and tiles one by one: to the same bytes."""
    token = _IN_PIECES.set(True)
    try:
        yield
    finally:
        _IN_PIECES.reset(token)


def _pieces(box: Box, axis: int) -> list[Box]:
    """The pieces of ``box`` along an axis: one, or up to `PIECES` inside `in_pieces`."""
    length = box.shape[axis]
    depth = -(-length // PIECES) if _IN_PIECES.get() else length
    block = tuple(depth if k == axis else n for k, n in enumerate(box.shape))
    return [piece.shift(box.start) for piece in Blocks(box.shape, block)]


def _infer(run: Run, plane: str, box: Box, mask: np.ndarray | None, out: np.ndarray, timings: Timings) -> dict:
    """``out`` (zeros before) holds the probabilities of the wanted voxels of ``box``.

    Tiles are blended section by section in raster order. One that is constant in all its sections is 0: whether it is
    depends on the volume alone. Everything has its axes in the order of the pass: sections, rows, columns. From gray
    voxels to uint8 probabilities all is done where the network runs. Returns facts of a `Receipt`.
    """
    grid = run.tile_grid(plane)
    sections, y, x = box.transpose(tiles.PLANES[plane]).slices
    todo = needed_tiles(run, plane, box, mask)
    device = backends.device(run.engine.backend, cluster.place_here())
    with timings.phase("read"):
        source = read_slab(run, plane, box, grid.overlapping(y, x))
        with out_of_memory_as(f"{source.voxels.shape[0]} sections", "; smaller blocks.shape takes less"):
            on_device = replace(source, voxels=device.put(source.voxels))

    at_once = f"{run.batch} tile{'s' * (run.batch > 1)} of {grid.size[0]} x {grid.size[1]} at once"
    advice = "" if run.batch > 1 else "; a smaller predict.tile takes less"
    with _device_held(timings), out_of_memory_as(at_once, advice), timings.phase("infer"), device.stream():
        with timings.phase("load"):
            network = backends.TimedCall(device.synchronized(_network(run, grid.size)))
        probabilities, blend = device.empty_output(out), tiles.Blend(len(run.heads), grid, y, x, device)
        count, varying = 0, varying_tiles(source, grid, todo)
        for z, added in blend_sections(
            network, on_device, varying, blend, scale=scale(run.mean, run.std), batch=run.batch, threads=_threads(run),
            timed=timings.phase,
        ):  # fmt: skip
            with timings.phase("blend"):
                blend.quantize(probabilities[:, z - sections.start])
            count += added
        with timings.phase("blend"):
            device.copy_to_host(probabilities, out)
    return {
        "inferred_voxels": run.config.predict.tta * count * prod(grid.size),
        "device_seconds": network.seconds,
        "bytes_sent": device.sent,
        "bytes_fetched": device.fetched,
    }


@contextmanager
def _device_held(timings: Timings) -> Iterator[None]:
    """Inside, no other task of this process infers."""
    with timings.phase("wait"):
        DEVICE_LOCK.acquire()
    try:
        yield
    finally:
        DEVICE_LOCK.release()


def read_slab(run: Run, plane: str, box: Box, window: tiles.TileWindow) -> tiles.Slab:
    """The source under some tiles of the sections of ``box``, with neighboring sections, read at once."""
    axes, grid, around = tiles.PLANES[plane], run.tile_grid(plane), run.sections // 2
    places = [grid.place(tile) for tile in window]
    seen = box.transpose(axes)
    start = (seen.start[0] - around, min(p[0].start for p in places), min(p[1].start for p in places))
    stop = (seen.stop[0] + around, max(p[0].stop for p in places), max(p[1].stop for p in places))
    need = Box(start, stop).clip(transpose_axes(run.shape, axes))
    voxels = np.ascontiguousarray(run.source.read(need.transpose(inverse_axes(axes))).transpose(axes))
    return tiles.Slab(voxels, need.start, around, run.shape[axes[0]])


# ---------------------------------------------------------------- the network


def _network(run: Run, size: tuple[int, int]) -> Call:
    """The network for tiles of one size where they lie, its mean over the flips of ``predict.tta``."""
    ways = tiles.dihedrals(run.config.predict.tta)
    loaded = {s: _loaded(run.out, run.id, s) for s in dict.fromkeys((size, size[::-1]) if len(ways) == 8 else (size,))}
    if len(ways) == 1:
        return loaded[size]
    return lambda batch: tiles.mean_over_dihedrals(lambda tile: loaded[tile.shape[2:]](tile), batch, ways)


@lru_cache(maxsize=2)  # tiles, and tiles on their side
def _loaded(path: str, run_id: str, size: tuple[int, int]) -> Call:
    """The network of a run for tiles of one size, loaded once for each worker process."""
    run = stored_run(path, run_id)
    begun = run.engine.arithmetic
    available = Engine.here(run.engine.backend, run.engine.precision, cluster.place_here(), batch=run.batch).arithmetic
    if available != begun:
        raise UserError(
            f"this worker would run {available}, the run was begun with {begun}; their bits differ, so they cannot share it"
        )
    shape = (run.batch, run.sections, *size)
    engine = run.engine.backend, run.engine.precision
    return backends.network(run.layout.load_model(), *engine, shape, _threads(run), cluster.place_here())


def release_network() -> None:
    """This process keeps no network, nor memory that it does not use."""
    _loaded.cache_clear()
    trim_memory()


def _threads(run: Run) -> int:
    """Batches under way at once in this worker: on a GPU one is queued while the other is computed."""
    if _IN_PIECES.get():
        return 1
    return 2 if run.engine.device == "cuda" else cluster.threads_here()
