"""What a worker holds at most in each stage, in bytes, from shapes alone: the arrays alive when most of them are.

The bytes for each voxel are counted in `predict`, `tiles`, `basins` and `objects`, those of tables and edges were measured; a
test holds all against real processes. What the network takes is measured by `measure`, or is the rough figure below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from volseg.box import Blocks, Box, Triple, inverse_axes, transpose_axes
from volseg.engine.blocks import CUT_BYTES, fit, handed_bytes, with_cuts
from volseg.engine.run import Run
from volseg.engine.schedule import EDGE_BYTES, most_edges
from volseg.inference import tiles
from volseg.io.tables import READ_AHEAD_BYTES
from volseg.segmentation.heights import height_halo

if TYPE_CHECKING:
    from volseg.planning.measure import Rates

PROCESS_BYTES = 190_000_000  # a worker that has read and written a little
WORKER_BYTES = 1_950_000_000  # that a worker on a CPU keeps within where memory allows it
CLIENT_BYTES = 350_000_000  # the process where the command was given, with the scheduler
NETWORK_BYTES = {"openvino": 110_000_000, "onnx": 130_000_000, "torch": 700_000_000}  # with its library, on a CPU
CUDA_BYTES = 3_500_000_000  # torch with CUDA in host memory; not measured
PIXEL_BYTES = {"openvino": 160, "onnx": 310, "torch": 660}  # inside a network on a CPU for each of its pixels, rough
CHANNEL_BYTES = 8  # for each voxel of each channel that goes into a network or comes out
BASIN_BYTES = 19  # for each voxel of a block with its halo: heights, regions and what makes them
DISTANCE_BYTES = 7  # more where distances are measured
USUAL_TABLE_BYTES = 1  # of a block's table for each voxel: in `BASIN_BYTES` already
FRAGMENT_TABLES = 3  # as many bytes as its table has, beyond the usual, does a block's watershed take more
TABLES_PER_BLOCK_TABLE = 1.33  # bytes of all tables for each one of the blocks' own
LINK_TABLES = 3.5  # as many does its link take
RELABEL_BYTES = 22  # for each voxel of a block that is relabeled
RESTORE_BYTES = 14  # more where labels are brought back to the source's grid
MIN_SIDE = 16  # voxels along each axis below which no block is cut to save memory


def network_bytes(run: Run, threads: int) -> int:
    """Host memory of the network and of ``threads`` forward passes side by side, roughly."""
    if run.channels:
        return 0
    if run.engine.device == "cuda":
        return CUDA_BYTES
    tile = max(prod(run.tile_grid(plane).size) for plane in run.config.predict.planes)
    pixel = PIXEL_BYTES[run.engine.backend] / run.binning**2 + CHANNEL_BYTES * (run.sections + len(run.heads))
    return NETWORK_BYTES[run.engine.backend] + threads * run.batch * round(tile * pixel)


def stage_bytes(run: Run, threads: int, rates: Rates | None = None) -> dict[str, int]:
    """What the arrays of one block take in each stage, beside the process and the network.

    Without ``rates`` its table is as large as those of most images.
    """
    stages = {stage: _predict(run, plane, run.pass_grid(plane), threads) for stage, plane in run.passes.items()}
    if run.channels:
        stages["import"] = _import(run, run.predict_block)
    elif run.passes:
        stages["predict"] = (len(run.passes) + 4) * len(run.heads) * prod(run.predict_block)
    else:
        stages["predict"] = _predict(run, "xy", run.predict_grid, threads)
    table = table_bytes(run, rates) if rates else 0.0
    extra = max(0.0, table - USUAL_TABLE_BYTES * prod(run.block))
    return {
        **stages,
        "fragments": _fragments(run, run.block) + round(FRAGMENT_TABLES * extra),
        "link": round(LINK_TABLES * table),
        "relabel": (RELABEL_BYTES + RESTORE_BYTES * run.restored) * prod(run.block),
    }


def table_bytes(run: Run, rates: Rates) -> float:
    """Of the table of one block, all of whose voxels are wanted."""
    faces = sum(prod(run.block) / n for n in run.block)
    return (rates.packed["tables"] * prod(run.block) + rates.packed["cut"] * faces) / TABLES_PER_BLOCK_TABLE


def stitch_bytes(run: Run, rates: Rates) -> int:
    """What the process takes that decides on all basins: every edge, and tables that are read ahead.

    No more edges than one process may hold, since a tree of blocks decides on more.
    """
    edges = rates.edges * run.wanted_voxels
    if run.config.stitch.reduce == "tree":
        return round(LINK_TABLES * table_bytes(run, rates))
    if run.config.stitch.reduce == "auto":
        edges = min(edges, most_edges(run))
    table = min(table_bytes(run, rates), rates.packed["tables"] * run.wanted_voxels)
    ahead = min(max(READ_AHEAD_BYTES, 2 * table), len(run.grid) * table)
    return round(EDGE_BYTES * edges + ahead)


def worker_bytes(run: Run, threads: int, tasks: int = 1, network: int | None = None, rates: Rates | None = None) -> int:
    """The most that a worker holds which does ``tasks`` blocks at once and whose network takes ``network`` bytes."""
    network = network_bytes(run, threads) if network is None else network
    return PROCESS_BYTES + network + tasks * max(stage_bytes(run, threads, rates).values())


def _predict(run: Run, plane: str, grid: Blocks, threads: int) -> int:
    """The source under the tiles, what is inferred, blended, stored and compressed."""
    grid_of_tiles, heads = run.tile_grid(plane), len(run.heads)
    _, rows, columns = _core(run, plane, grid)
    slab = source_bytes(run, plane, grid, run.read_together(plane)) * (1 if plane == "xy" else 2)
    out = heads * prod(run.stored_together(plane))
    if run.read_together(plane):  # what is read ahead, and the parts of tiles that come and go
        slab += slab * run.reads_ahead + handed_bytes(heads, grid_of_tiles, rows, columns)
    masked = prod(run.stored_together(plane)) if run.roi and run.roi.mask else 0
    tile = run.batch * prod(grid_of_tiles.size)
    under_way = _under_way(run, tile, threads)
    blend = rows * columns * (4 + 8 * heads)
    if run.engine.device == "cuda" and run.engine.backend == "torch":
        return masked + slab + out + _locked(slab) + _locked(out)  # the rest lies on the GPU
    return out + masked + max(slab + under_way + blend, slab + out)


def _under_way(run: Run, tile: int, threads: int) -> int:
    """Of batches of ``tile`` voxels that wait, are inferred, or are to be blended."""
    return 4 * tile * ((threads + 2) * run.sections + (threads + 1) * len(run.heads))


def _locked(size: int) -> int:
    """What torch locks in memory for so many bytes: the next power of two."""
    return 1 << max(0, size - 1).bit_length()


def source_bytes(run: Run, plane: str, grid: Blocks, at_once: int = 0) -> int:
    """Of the volume, what a block of a pass reads: with the sections around it, and all that its tiles cover.

    ``at_once``: what it holds of that, where it reads no more than so many sections at once.
    """
    axes, grid_of_tiles = tiles.PLANES[plane], run.tile_grid(plane)
    depth, rows, columns = _core(run, plane, grid)
    sections = min(min(depth, at_once or depth) + 2 * (run.sections // 2), run.shape[axes[0]])
    covered = grid_of_tiles.y.longest_reach(rows) * grid_of_tiles.x.longest_reach(columns)
    return np.dtype(run.source.dtype).itemsize * sections * covered


def _core(run: Run, plane: str, grid: Blocks) -> Triple:
    """The shape of what a block of a pass infers at most, in the axes of the pass."""
    wanted = tuple(max(1, n) for n in run.wanted_part(Box.from_shape(run.shape)).shape)
    return transpose_axes(fit(grid.block, wanted), tiles.PLANES[plane])


def _import(run: Run, block: Triple) -> int:
    """The channels as they are stored, as uint8 and compressed."""
    item = max(np.dtype(channel.source.dtype).itemsize for channel in run.channels if channel.source)
    return prod(block) * (2 * len(run.heads) + 2 * item + 1)


def _fragments(run: Run, block: Triple) -> int:
    halo = height_halo(run.config.fragments, run.voxel_size_nm)
    around = prod(min(n + 2 * h, most + 2) for n, h, most in zip(block, halo, run.shape, strict=True))
    return around * (BASIN_BYTES + DISTANCE_BYTES * bool(run.distance_unit.cap) + 2 * len(run.heads) - 4)


# ---------------------------------------------------------------- blocks that fit


def cut_room(run: Run) -> int:
    """Bytes for a block of predict that follows chunks and tiles, beside what a worker of one thread needs for the tiles."""
    if run.channels or run.engine.device == "cuda":
        return CUT_BYTES
    tile = run.batch * max(prod(run.tile_grid(plane).size) for plane in run.config.predict.planes)
    needed = PROCESS_BYTES + network_bytes(run, 1) + _under_way(run, tile, 1)
    return max(CUT_BYTES // 2, WORKER_BYTES - needed)


def with_blocks_that_fit(run: Run, room: int, threads: int, tasks: int = 1, workers: int = 2) -> Run:
    """The run in smaller blocks where a worker that has ``room`` bytes could not hold those it is cut into.

    Blocks that were asked for stay. Predict's are cut along the sections, then along the rows: other cuts would infer
    more voxels twice. Where nothing fits, the smallest blocks are what is left.
    """
    if run.config.blocks.shape:
        return run
    room = (room - PROCESS_BYTES - network_bytes(run, threads)) // tasks

    def fits(stage: str) -> Callable[[Run], bool]:
        return lambda changed: stage_bytes(changed, threads)[stage] <= room

    inferring = [*run.passes, *([] if run.passes or run.channels else ["predict"])]
    for smaller in (1, 2, 4, 8):
        if not run.cuts or all(fits(stage)(run) for stage in inferring):
            break
        run = with_cuts(run, cut_room(run) // smaller, workers)
    for stage, plane in ((stage, plane) for stage, plane in run.passes.items() if plane not in run.cuts):
        axes = tiles.PLANES[plane]
        for block in _smaller(transpose_axes(run.pass_grid(plane).block, axes)):
            run = replace(run, pass_blocks={**run.pass_blocks, plane: transpose_axes(block, inverse_axes(axes))})
            if fits(stage)(run):
                break
    for block in _smaller(run.predict_block) if "xy" not in run.cuts or run.passes else ():
        run = replace(run, predict_block=block)
        if fits(run.probability_stage)(run):
            break
    for block in _smaller(run.block, even=True):
        run = replace(run, block=block)
        if fits("fragments")(run) and fits("relabel")(run):
            break
    return run


def _smaller(block: Triple, *, even: bool = False) -> Iterator[Triple]:
    """``block`` and ever smaller ones: halved along z, then y; or, ``even``, along the longest axis each time."""
    yield block
    while True:
        least = (MIN_SIDE,) * 3 if even else (1, MIN_SIDE, block[2])
        longer = [axis for axis in range(3) if block[axis] > least[axis]]
        if not longer:
            return
        axis = max(longer, key=lambda axis: block[axis]) if even else longer[0]
        z, y, x = (-(-n // 2) if k == axis else n for k, n in enumerate(block))
        block = z, y, x
        yield block


# ---------------------------------------------------------------- tiles


def longest_tile(run: Run) -> int:
    """The longer side of the largest tile, in voxels."""
    return max(max(run.tile_grid(plane).size) for plane in run.config.predict.planes)


def smaller_tile(run: Run) -> int:
    """The next ``predict.tile`` worth trying where tiles are too large: half of it."""
    multiple = run.tile_multiple
    return max(multiple, min(longest_tile(run), run.config.predict.tile) // 2 // multiple * multiple)
