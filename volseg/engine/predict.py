"""The stages that store probabilities: tiles of a block through the network, or what another network made."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from volseg.box import Blocks, Box, inverse_axes, transpose_axes
from volseg.engine import cluster
from volseg.engine.blocks import SPAN
from volseg.engine.data_wait import DataWait
from volseg.engine.keys import probability_key
from volseg.engine.receipt import Timings
from volseg.engine.run import Run, digest, stored_run
from volseg.engine.shares import HandedOver, Plane, Share, Taken, bounds_of_tiles
from volseg.engine.stored import StoredArray
from volseg.errors import UserError
from volseg.inference import backends, tiles
from volseg.inference.backends import Engine
from volseg.inference.device import Call, out_of_memory_as
from volseg.inference.normalization import scale
from volseg.inference.sections import TileKey, blend_sections, varying_tiles
from volseg.io import probabilities, pyramid
from volseg.io.filling import record_lost
from volseg.system import trim_memory

MOST_UNNEEDED = 2  # times the area under the tiles of some sections that is read for them
PIECES = 8  # into which a block is cut that was too much for a worker's memory
_IN_PIECES: ContextVar[bool] = ContextVar("in_pieces", default=False)
DEVICE_LOCK = threading.Lock()  # held by the task of this process that infers, while others read and write
DATA_WAIT = DataWait()  # of the device that this process has


def predict(run: Run, i: int, timings: Timings) -> dict:
    """Probabilities of block ``i`` are stored: those of its xy planes."""
    return _store_probabilities(run, "xy", i, run.layout.probabilities, timings)


def predict_plane(run: Run, i: int, timings: Timings, stage: str) -> dict:
    """Probabilities of block ``i`` of one pass are stored in the work folder."""
    plane = run.passes[stage]
    return _store_probabilities(run, plane, i, run.layout.plane_probabilities(stage), timings)


def _store_probabilities(run: Run, plane: str, i: int, array: StoredArray, timings: Timings) -> dict:
    """Probabilities of one pass are stored for block ``i``, shard after shard; facts of a `Receipt`."""
    share = Share.of_block(run, plane, i)
    if not run.wants_any(share.of_volume(share.reach)):
        array.clear(share.box)
        return {"nothing_wanted": True}
    inference = Inference(share, timings, digest(probability_key(run), plane))
    for layer in _layers(run, plane, share.box):
        out = inference.run(layer)
        with timings.phase("write"):
            if out is None:
                array.clear(layer)
            else:
                array.write(layer, out)
    return inference.end()


def _layers(run: Run, plane: str, box: Box) -> list[Box]:
    """What a block writes at once: some of its sections, whole shards, one layer after the other."""
    axis = tiles.PLANES[plane][0]
    depth = run.stored_together(plane)[axis]
    layers = Blocks(run.shape, (*run.shape[:axis], depth, *run.shape[axis + 1 :]))
    return [layers[k].intersect(box) for k in layers.overlapping(box)]


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
    part = run.parts.probable(level, box)
    _coarsen(array(level - 1), array(level), box, part, levels[level - 1 : level + 1], timings)


def copy_image(run: Run, i: int, timings: Timings) -> None:
    """Block ``i`` of the volume is stored in the run, on the grid of the labels."""
    box = run.output_grid[i]
    with timings.phase("read"):
        voxels = run.output_source.read(box)
    with timings.phase("write"):
        run.layout.image().write(box, voxels)


def coarsen_image(run: Run, i: int, timings: Timings, level: int) -> None:
    """The same as `coarsen` of the copy of the volume."""
    array, levels, box = run.layout.image, run.image_levels, run.level_grid(level)[i]
    _coarsen(array(level - 1), array(level), box, box, levels[level - 1 : level + 1], timings)


def _coarsen(finer: StoredArray, coarser: StoredArray, box: Box, part: Box, levels: list, timings: Timings) -> None:
    """The voxels of ``box``, 0 outside of ``part``, are stored in ``coarser``; ``levels``: shapes and factors of both."""
    (above, _), (_, factor) = levels
    parent = pyramid.parent_box(part, factor, above)
    if not part.voxels or finer.is_empty(parent):
        coarser.clear(box)
        return
    with timings.phase("read"):
        voxels = finer.read(parent)
    with timings.phase("downsample"):
        channels = voxels if voxels.ndim == 4 else voxels[None]
        each = (pyramid.placed(pyramid.downsample_mean(channel, factor), part, box) for channel in channels)
        coarse = np.stack(list(each))
    with timings.phase("write"):
        coarser.write(box, coarse if voxels.ndim == 4 else coarse[0])


def import_probabilities(run: Run, i: int, timings: Timings) -> dict:
    """Probabilities of block ``i`` are stored as another network made them, as uint8."""
    box = run.predict_grid[i]
    part = run.wanted_part(box)
    if not run.wants_any(part):
        run.layout.probabilities.clear(box)
        return {"nothing_wanted": True}
    with timings.phase("read"):
        out = np.zeros((len(run.heads), *box.shape), np.uint8)
        inside = out[(slice(None), *part.slices_within(box))]
        for piece in _thin(part):
            inside[(slice(None), *piece.slices_within(part))] = probabilities.read(run.channels, piece)
        if (mask := run.read_mask(part)) is not None:
            inside *= mask
    with timings.phase("write"):
        run.layout.probabilities.write(box, out)
    return {}


def _thin(box: Box) -> list[Box]:
    """``box``, or its up to `PIECES` pieces along z inside `in_pieces`."""
    z, y, x = box.shape
    depth = -(-z // PIECES) if _IN_PIECES.get() else z
    return [piece.shift(box.start) for piece in Blocks(box.shape, (depth, y, x))]


# ---------------------------------------------------------------- the tiles of one block


class Inference:
    """The sections of one block on their way through the network, in order.

    From gray voxels to uint8 probabilities all is done where the network runs. Everything has its axes in the order of the
    pass: sections, rows, columns. Tiles are blended section by section in raster order, those that other blocks handed over
    among those inferred here. A tile that is constant in all its sections is 0, and so is padding in any tile: whether it is
    depends on the volume alone.
    """

    def __init__(self, share: Share, timings: Timings, key: str = "") -> None:
        self.share, self.run_, self.timings = share, share.run, timings
        run = share.run
        self.grid = share.tiles
        self.device = backends.device(run.engine.backend, cluster.place_here())
        self.facts: dict[str, float] = {"inferred_voxels": 0, "device_seconds": 0.0}
        self.sections = share.reach.slices[0]  # to infer, of which `done` are
        self.done = self.sections.start
        self.begun = self.done // SPAN
        self.taken = Taken(share, key, range(self.begun, -(-self.sections.stop // SPAN)))
        self.handed = HandedOver(share, key)
        self.reader: SlabReader | None = None
        self.y, self.x = share.part.slices[1:]
        self.blend: tiles.Blend | None = None

    def run(self, layer: Box) -> np.ndarray | None:
        """Probabilities of ``layer``, uint8, channels z y x of the volume, 0 where no voxel is wanted; None for 0 throughout.

        All its sections follow those of the calls before.
        """
        run, axes = self.run_, self.share.axes
        sections = layer.transpose(axes).slices[0]
        part = self.share.part.intersect(layer.transpose(axes))
        out = np.zeros((len(run.heads), *layer.shape), np.uint8) if run.wanted_part(layer).voxels else None
        stop = min(sections.stop, self.sections.stop)
        for piece in self._pieces(max(sections.start, self.done), stop):
            if not run.wanted_part(self.share.of_volume(_sections(self.share.reach, piece))).voxels:
                self._ended(piece)
                continue
            with _reading(self.timings):
                mask = self._mask(piece)
            inside = None
            if out is not None:
                volume_part = self.share.of_volume(_sections(part, piece))
                inside = out[(slice(None), *volume_part.slices_within(layer))].transpose(0, *(1 + a for a in axes))
            self._infer(piece, mask, inside)
            if mask is not None and inside is not None:
                wanted = _sections(part, piece)
                inside *= mask[wanted.slices_within(_sections(self.share.reach, piece))]
        return out

    def end(self) -> dict:
        """What was handed to the block is gone; facts of a `Receipt`."""
        self._hand_over(-(-self.sections.stop // SPAN))
        self.taken.remove()
        sent = {"bytes_sent": self.device.sent, "bytes_fetched": self.device.fetched}
        return {**self.facts, **sent, "data_wait_seconds": DATA_WAIT.take()}

    def _pieces(self, start: int, stop: int) -> list[slice]:
        """Sections from ``start`` to ``stop``, cut where the chunks that they and those around them lie in end."""
        run = self.run_
        depth, around = run.read_together(self.share.plane), run.sections // 2
        if _IN_PIECES.get():
            depth, around = -(-max(1, stop - start) // PIECES), 0
        if not depth:
            return [slice(start, stop)] if start < stop else []
        first = (start + around) // depth + 1
        edges = [start, *(k * depth - around for k in range(first, -(-(stop + around) // depth))), stop]
        return [slice(a, b) for a, b in pairwise(edges) if a < b]

    def _mask(self, piece: slice) -> np.ndarray | None:
        """Which voxels are wanted in ``piece`` of all that the block's tiles reach; None: all."""
        box = self.share.of_volume(_sections(self.share.reach, piece))
        return self.run_.read_mask(box, self.share.plane)

    def _infer(self, piece: slice, mask: np.ndarray | None, out: np.ndarray | None) -> None:
        """``out`` (zeros before; None: none of it is wanted) holds the probabilities of some sections of the block's part."""
        run, device = self.run_, self.device
        todo, source = self._todo(piece, mask), None
        if todo:
            with _reading(self.timings):
                source = self._reader_of(todo).read(piece.start, piece.stop)
                with out_of_memory_as(f"{len(source.voxels)} sections", "; smaller blocks.shape takes less"):
                    on_device = replace(source, voxels=device.put_sections(source.voxels))
            varying = varying_tiles(source, self.grid, todo)
        else:
            varying, on_device = iter(()), tiles.Slab(np.zeros((0, 0, 0)), (0, 0, 0), run.sections // 2, 1)
        size = self.grid.size
        at_once = f"{run.batch} tile{'s' * (run.batch > 1)} of {size[0]} x {size[1]} at once"
        advice = "" if run.batch > 1 else "; a smaller predict.tile takes less"
        timings, count = self.timings, 0
        with _device_held(timings), out_of_memory_as(at_once, advice), timings.phase("infer"), device.stream():
            with timings.phase("load"):
                network = backends.TimedCall(device.synchronized(_network(run, size)))
            if self.blend is None:
                self.blend = tiles.Blend(len(run.heads), self.grid, self.y, self.x, device)
            probabilities = None if out is None else device.empty_output(out)
            for z, added in blend_sections(
                network, on_device, varying, self.blend, scale=scale(run.mean, run.std), batch=run.batch,
                threads=_threads(run), timed=timings.phase, parts=self._parts(piece), give=self._give, as_uint8=True,
                source=source, lost=record_lost if self.share.axes[0] == 0 else lambda z: None,
            ):  # fmt: skip
                if probabilities is not None:
                    with timings.phase("blend"):
                        self.blend.quantize(probabilities[:, z - piece.start])
                count += added
            if probabilities is not None:
                with timings.phase("blend"):
                    device.copy_to_host(probabilities, out)
        self._ended(piece)
        self.facts["inferred_voxels"] += run.config.predict.tta * count * prod(size)
        self.facts["device_seconds"] += network.seconds

    def _ended(self, piece: slice) -> None:
        """All that there was to do in these sections is done."""
        self.done = piece.stop
        self._hand_over(self.done // SPAN)

    def _reader_of(self, todo: list[TileKey]) -> SlabReader:
        """What reads under these tiles: the same as before, unless that lacks some of them or reads far more."""
        need = bounds_of_tiles(self.grid, {tile for _, tile in todo})
        window = need if self.reader is None else _around(self.reader.window, need)
        if _area(window) > MOST_UNNEEDED * _area(need):
            window = need
        if self.reader is None or self.reader.window != window:
            self.reader = SlabReader(self.run_, self.share.plane, window, self.sections)
        return self.reader

    def _todo(self, piece: slice, mask: np.ndarray | None) -> list[TileKey]:
        """The tiles to infer here, by section and in raster order: own ones, and those that nobody handed over.

        One in which no voxel is wanted gives none of them anything, so leaving it out changes none.
        """
        own, reach = self.share.own, self.share.reach
        found = []
        for z in range(piece.start, piece.stop):
            here = sorted([*own, *(tile for span, tile in self.taken.missing if span == z // SPAN)])
            for tile in here:
                if mask is not None:
                    rows, columns = map(_part_inside, self.grid.place(tile), reach.slices[1:])
                    if not mask[z - piece.start, rows, columns].any():
                        continue
                found.append((z, tile))
        return found

    def _parts(self, piece: slice) -> Iterator[tuple[TileKey, Any]]:
        """What other blocks handed over, on the device."""
        for key, part in self.taken.parts(range(piece.start, piece.stop)):
            yield key, self.device.put(part)

    def _give(self, key: TileKey, probability: Any) -> None:
        """The parts of a tile that lie in other blocks are handed over."""
        z, tile = key
        for i, (part, window) in self.share.takers.items():
            if tile[0] in window.rows and tile[1] in window.columns:
                y, x = (
                    _part_of(window_, place)
                    for window_, place in zip(part.slices[1:], self.grid.place(tile), strict=True)
                )
                self.handed.add((z, tile), i, np.array(self.device.get(probability[:, y, x])))

    def _hand_over(self, before: int) -> None:
        """All spans of sections before that one are stored."""
        for span in range(self.begun, before):
            self.handed.store(span)
        self.begun = max(self.begun, before)


def _around(a: Plane, b: Plane) -> Plane:
    """The smallest part of a section that holds two others."""
    rows, columns = (slice(min(s.start, t.start), max(s.stop, t.stop)) for s, t in zip(a, b, strict=True))
    return rows, columns


def _area(plane: Plane) -> int:
    return prod(s.stop - s.start for s in plane)


def _sections(box: Box, piece: slice) -> Box:
    """The part of ``box`` in some sections."""
    return Box((piece.start, *box.start[1:]), (piece.stop, *box.stop[1:]))


def _part_of(window: slice, place: slice) -> slice:
    """The part of ``place`` that lies in ``window``, counted from its own start."""
    return slice(max(place.start, window.start) - place.start, min(place.stop, window.stop) - place.start)


def _part_inside(place: slice, window: slice) -> slice:
    """The part of ``window`` that lies in ``place``, counted from the window's start."""
    return slice(max(place.start, window.start) - window.start, min(place.stop, window.stop) - window.start)


@contextmanager
def in_pieces() -> Iterator[None]:
    """Inside, blocks are read and inferred in `PIECES` along the sections and tiles one by one: to the same bytes."""
    token = _IN_PIECES.set(True)
    try:
        yield
    finally:
        _IN_PIECES.reset(token)


@contextmanager
def _device_held(timings: Timings) -> Iterator[None]:
    """Inside, no other task of this process infers."""
    with timings.phase("wait"):
        DEVICE_LOCK.acquire()
    try:
        with DATA_WAIT.inferring():
            yield
    finally:
        DEVICE_LOCK.release()


@contextmanager
def _reading(timings: Timings) -> Iterator[None]:
    """Inside, a task reads what it is to infer."""
    with timings.phase("read"), DATA_WAIT.reading():
        yield


class SlabReader:
    """Reads the source under some tiles, section after section, whole chunks at a time: none is decoded twice.

    Of a store that answers late, the chunks that follow are read while those before them are inferred.
    """

    def __init__(self, run: Run, plane: str, window: Plane, sections: slice) -> None:
        self.run, self.axes, self.around, self.window = run, tiles.PLANES[plane], run.sections // 2, window
        self.depth = 1 if _IN_PIECES.get() else run.read_together(plane) or 1
        shape = transpose_axes(run.shape, self.axes)
        self.length = shape[0]
        self.stop = min(sections.stop + self.around, self.length)
        rows, columns = (slice(max(0, s.start), min(s.stop, n)) for s, n in zip(window, shape[1:], strict=True))
        self.rows, self.columns = rows, columns
        self.start = 0
        self.sections: list[np.ndarray] = []  # what was read last, from section `start` on
        self.pool = ThreadPoolExecutor(1) if run.reads_ahead and self.depth > 1 else None
        self.ahead: tuple[Box, Future[np.ndarray]] | None = None  # what is being read

    def read(self, start: int, stop: int) -> tiles.Slab:
        """The sections from ``start`` to ``stop`` and those around them; both grow from call to call."""
        start, stop = max(0, start - self.around), min(stop + self.around, self.stop)
        have = self.start + len(self.sections)
        if stop > have or start < self.start:
            kept = self.sections[max(0, start - self.start) :] if start < have else []
            self.sections = [section.copy() for section in kept]  # makes room for what is read
            del kept
            first = max(start, have) if self.sections else start
            last = max(stop, min(-(-stop // self.depth) * self.depth, self.stop))
            box = Box((first, self.rows.start, self.columns.start), (last, self.rows.stop, self.columns.stop))
            self.start = first - len(self.sections)
            self.sections.extend(np.ascontiguousarray(self._read(box)))
            self._read_ahead(last)
        corner = self.start, self.rows.start, self.columns.start
        across = self.axes[0] != 0
        return tiles.Slab(self.sections, corner, self.around, self.length, self.run.padding, across)

    def _read(self, box: Box) -> np.ndarray:
        """The voxels of ``box``, in the axes of the pass; those that are being read are waited for."""
        ahead, self.ahead = self.ahead, None
        voxels = ahead[1].result() if ahead and ahead[0] == box else self._source(box)
        return voxels.transpose(self.axes)

    def _source(self, box: Box) -> np.ndarray:
        return self.run.source.read(box.transpose(inverse_axes(self.axes)))

    def _read_ahead(self, start: int) -> None:
        """The chunks from section ``start`` on begin to be read."""
        stop = min(start - start % self.depth + self.depth, self.stop)
        if self.pool and start < stop:
            box = Box((start, self.rows.start, self.columns.start), (stop, self.rows.stop, self.columns.stop))
            self.ahead = box, self.pool.submit(copy_context().run, self._source, box)


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


def holds_network() -> bool:
    """Whether this process keeps a network."""
    return _loaded.cache_info().currsize > 0


def release_network() -> None:
    """This process keeps no network, nor memory that it does not use."""
    _loaded.cache_clear()
    trim_memory()


def _threads(run: Run) -> int:
    """Batches under way at once in this worker: on a GPU one is queued while the other is computed."""
    if _IN_PIECES.get():
        return 1
    return 2 if run.engine.device == "cuda" else cluster.threads_here()
