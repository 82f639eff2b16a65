"""What a worker holds at most in each stage, in bytes, from shapes alone: the arrays alive when most of them are.

The bytes for each voxel are counted in `pipeline`, `tiles`, `fragments` and `objects`; a test holds them against real
processes. What the network takes is measured by `plan`, or is the rough figure below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod

import numpy as np

from volseg.box import Blocks, Box, Triple, inverse_axes, transpose_axes
from volseg.engine.blocks import fit
from volseg.engine.run import Run
from volseg.inference import tiles
from volseg.segmentation.heights import height_halo

PROCESS = 190_000_000  # a worker that has read and written a little
CLIENT = 350_000_000  # the process where the command was given, with the scheduler
NETWORK = {"openvino": 110_000_000, "onnx": 130_000_000, "torch": 700_000_000}  # a network with its library, on a CPU
CUDA = 3_500_000_000  # torch with CUDA in host memory; not measured
PASS = {"openvino": 160, "onnx": 310, "torch": 660}  # inside a network on a CPU for each of its pixels, rough
ENDS = 8  # for each voxel of each channel that goes into a network or comes out
BASINS = 19  # for each voxel of a block with its halo: heights, regions and what makes them
DISTANCE = 7  # more where distances are measured
MEASURED = 22  # for each voxel of a block that is relabeled
THINNEST = 16  # voxels along each axis below which no block is cut to save memory


def network(run: Run, threads: int) -> int:
    """Host memory of the network and of ``threads`` forward passes side by side, roughly."""
    if run.channels:
        return 0
    if run.engine.device == "cuda":
        return CUDA
    tile = max(prod(run.tile_grid(plane).size) for plane in run.config.predict.planes)
    each = PASS[run.engine.backend] / run.binning**2 + ENDS * (run.sections + len(run.heads))
    return NETWORK[run.engine.backend] + threads * run.batch * round(tile * each)


def stages(run: Run, threads: int) -> dict[str, int]:
    """What the arrays of one block take in each stage, beside the process and the network."""
    found = {stage: _predict(run, plane, run.pass_grid(plane), threads) for stage, plane in run.passes.items()}
    if run.channels:
        found["import"] = _take(run, run.predict_block)
    elif run.passes:
        found["predict"] = (len(run.passes) + 4) * len(run.heads) * prod(run.predict_block)
    else:
        found["predict"] = _predict(run, "xy", run.predict_grid, threads)
    return {**found, "fragments": _fragments(run, run.block), "relabel": MEASURED * prod(run.block)}


def worker(run: Run, threads: int, tasks: int = 1, engine: int | None = None) -> int:
    """The most that a worker holds which does ``tasks`` blocks at once and whose network takes ``engine``."""
    engine = network(run, threads) if engine is None else engine
    return PROCESS + engine + tasks * max(stages(run, threads).values())


def _predict(run: Run, plane: str, grid: Blocks, threads: int) -> int:
    """The source under the tiles, what is inferred, blended, stored and compressed."""
    laid, heads = run.tile_grid(plane), len(run.heads)
    _, rows, columns = _core(run, plane, grid)
    slab = source_bytes(run, plane, grid) * (1 if plane == "xy" else 2)
    out = heads * prod(grid.block)
    masked = prod(grid.block) if run.roi and run.roi.mask else 0
    tile = run.batch * prod(laid.size)
    under_way = 4 * tile * ((threads + 2) * run.sections + (threads + 1) * heads)
    blend = rows * columns * (4 + 8 * heads)
    if run.engine.device == "cuda" and run.engine.backend == "torch":
        return masked + slab + out + _locked(slab) + _locked(out)  # the rest lies on the GPU
    return out + masked + max(slab + under_way + blend, slab + out)


def _locked(size: int) -> int:
    """What torch locks in memory for so many bytes: the next power of two."""
    return 1 << max(0, size - 1).bit_length()


def source_bytes(run: Run, plane: str, grid: Blocks) -> int:
    """Of the volume, what a block of a pass reads: with the sections around it, and all that its tiles cover."""
    axes, laid = tiles.PLANES[plane], run.tile_grid(plane)
    depth, rows, columns = _core(run, plane, grid)
    sections = min(depth + 2 * (run.sections // 2), run.shape[axes[0]])
    return np.dtype(run.source.dtype).itemsize * sections * laid.y.longest_cover(rows) * laid.x.longest_cover(columns)


def _core(run: Run, plane: str, grid: Blocks) -> Triple:
    """The shape of what a block of a pass infers at most, in the axes of the pass."""
    return transpose_axes(fit(grid.block, run.wanted_part(Box.from_shape(run.shape)).shape), tiles.PLANES[plane])


def _take(run: Run, block: Triple) -> int:
    """The channels as they are stored, as uint8 and compressed."""
    item = max(np.dtype(channel.source.dtype).itemsize for channel in run.channels if channel.source)
    return prod(block) * (2 * len(run.heads) + 2 * item + 1)


def _fragments(run: Run, block: Triple) -> int:
    halo = height_halo(run.config.fragments, run.voxel_size_nm)
    around = prod(min(n + 2 * h, most + 2) for n, h, most in zip(block, halo, run.shape, strict=True))
    return around * (BASINS + DISTANCE * bool(run.distance_unit.cap) + 2 * len(run.heads) - 4)


# ---------------------------------------------------------------- blocks that fit


def with_blocks_that_fit(run: Run, room: int, threads: int, tasks: int = 1, engine: int | None = None) -> Run:
    """The run in smaller blocks where a worker that has ``room`` bytes could not hold those it is cut into.

    Blocks that were asked for stay. Predict's are cut along the sections, then along the rows: other cuts would infer
    more voxels twice. Where nothing fits, the smallest blocks are what is left.
    """
    if run.config.blocks.shape:
        return run
    engine = network(run, threads) if engine is None else engine
    room = (room - PROCESS - engine) // tasks

    def fits(stage: str) -> Callable[[Run], bool]:
        return lambda changed: stages(changed, threads)[stage] <= room

    for stage, plane in run.passes.items():
        axes = tiles.PLANES[plane]
        for block in _smaller(transpose_axes(run.pass_grid(plane).block, axes)):
            run = replace(run, pass_blocks={**run.pass_blocks, plane: transpose_axes(block, inverse_axes(axes))})
            if fits(stage)(run):
                break
    for block in _smaller(run.predict_block):
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
        least = (THINNEST,) * 3 if even else (1, THINNEST, block[2])
        longer = [axis for axis in range(3) if block[axis] > least[axis]]
        if not longer:
            return
        axis = max(longer, key=lambda axis: block[axis]) if even else longer[0]
        z, y, x = (-(-n // 2) if k == axis else n for k, n in enumerate(block))
        block = z, y, x
        yield block
