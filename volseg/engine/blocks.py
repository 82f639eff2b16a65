"""How a volume is cut into blocks: functions of its shape, of the source's chunks, and of what was asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import TYPE_CHECKING

import numpy as np

from volseg.box import Blocks, Box, Triple, inverse_axes, transpose_axes
from volseg.errors import UserError
from volseg.inference import tiles

if TYPE_CHECKING:
    from volseg.engine.run import Run

BLOCK_VOXELS = 1 << 24  # of a block that volseg chooses itself
CUT_BYTES = 1_100_000_000  # of a block of predict that follows chunks and tiles, where a GPU infers
CUT_VOXELS = 1 << 26  # of a volume that is cut into whole planes however it is stored
CUT_PLANE = 1 << 24  # voxels of a plane that is not cut where planes are stored one by one
LEAST_DEPTH = 16  # sections that are read at once
BLOCKS_PER_WORKER = 4  # of a pass, at least: fewer would leave workers idle at its end
MOST_LAYERS = 16  # of chunks in a block
MOST_VOXELS = 5_000_000_000  # of such a block
BLEND_BYTES = 4  # for each voxel of a section, beside those of each channel
SPAN = 16  # sections whose parts of tiles, handed from block to block, lie in one file
BATCHES_PER_BLOCK = 8  # on a GPU: while the first is cut and the last is copied back, nothing is computed


def choose_blocks(shape: Triple, asked: Triple | None) -> tuple[Triple, Triple]:
    """The blocks of `predict` and of the stages after it: those that suit the volume, or the shape asked for.

    Predict takes `plane_blocks`. The other stages take the same where these are deep, else blocks of about `BLOCK_VOXELS`.
    """
    if asked:
        block = fit(asked, shape)
        if prod(n + 2 for n in block) >= 1 << 31:
            raise UserError(
                f"blocks.shape = {list(block)} is too large to number its voxels; use less than 2**31 voxels"
            )
        return block, block
    slab = plane_blocks(shape)
    depth, (z, y, x), target = slab[0], shape, _target_voxels(shape)
    if depth >= min(z, 8) and (depth + 8) * y * x <= 1 << 26:  # the other stages read a halo too
        return slab, slab
    side = min(512, max(y, x))
    return slab, fit((max(16, target // side**2), side, side), shape)


def plane_blocks(shape: Triple) -> Triple:
    """Blocks of whole planes, which need no tile twice; only planes of more than 2**28 voxels are cut into strips.

    >>> plane_blocks((1024, 1024, 1024)), plane_blocks((1024, 4096, 4096))
    ((16, 1024, 1024), (4, 4096, 4096))
    """
    z, y, x = shape
    depth = min(z, max(_target_voxels(shape) // (y * x), 4 if y * x <= 1 << 26 else 1))
    strips = -(-depth * y * x // (1 << 28))
    return depth, -(-y // strips), x


def blocks_of_chunks(shape: Triple, chunks: Iterable[Triple], slab: Triple) -> Triple:
    """Blocks in which volumes of such ``chunks`` are read, each chunk once: ``slab``, or where chunks are deeper a box of some.

    >>> blocks_of_chunks((128, 8192, 8192), [(1, 8192, 8192)], (4, 8192, 8192))
    (4, 8192, 8192)
    >>> blocks_of_chunks((128, 8192, 8192), [(64, 64, 64), (32, 64, 64)], (4, 8192, 8192))
    (64, 512, 8192)
    """
    z, y, x = (max(sizes) for sizes in zip(*chunks, strict=True))
    if z <= slab[0]:
        return slab
    block = list(fit((z, y, x), shape))
    for axis in (2, 1, 0):
        block[axis] = min(shape[axis], block[axis] * max(1, prod(slab) // prod(block)))
    return block[0], block[1], block[2]


# ---------------------------------------------------------------- blocks that follow chunks and tiles


@dataclass(frozen=True)
class Cut:
    """How a pass is cut where whole planes would read a chunk of the source many times, or not fit a worker.

    block, shift, tail  see `volseg.box.Blocks`: some tiles wide, so that what they hand over is small, and some chunks deep
    shard               what is written at once
    depth               sections that are read at once, with those around them
    """

    block: Triple
    shift: Triple
    tail: Triple
    shard: Triple
    depth: int

    @classmethod
    def from_json(cls, plain: dict) -> Cut:
        block, shift, tail, shard = (tuple(plain[name]) for name in ("block", "shift", "tail", "shard"))
        return cls(block, shift, tail, shard, int(plain["depth"]))

    def grid(self, shape: Triple) -> Blocks:
        return Blocks(shape, self.block, self.shift, self.tail)


@dataclass(frozen=True)
class _Along:
    """Blocks along one axis of a section: each holds so many tiles; with the voxels under these."""

    block: int
    tail: int
    covered: int
    redundancy: float  # voxels decoded for each one of the block


def with_cuts(run: Run, room: int, workers: int = 2) -> Run:
    """The run in blocks that follow chunks and tiles, of up to ``room`` bytes, in the passes for which that pays.

    Whole planes stay where they are small, and stored one by one; and blocks that were asked for.
    """
    if run.config.blocks.shape or run.channels or prod(run.shape) <= CUT_VOXELS:
        return run
    cuts = {plane: cut for plane in run.config.predict.planes if (cut := _cut(run, plane, room, workers))}
    run = replace(run, cuts=cuts)
    return replace(run, predict_block=cuts["xy"].block) if "xy" in cuts and not run.passes else run


def _cut(run: Run, plane: str, room: int, workers: int) -> Cut | None:
    axes = tiles.PLANES[plane]
    (z, y, x), chunk, grid = (
        transpose_axes(run.shape, axes),
        transpose_axes(run.source.chunk, axes),
        run.tile_grid(plane),
    )
    if chunk[0] == 1 and y * x <= CUT_PLANE:
        return None
    wanted = (run.roi.roi if run.roi else Box.from_shape(run.shape)).transpose(axes)
    depth = min(z, chunk[0] * -(-LEAST_DEPTH // chunk[0]))
    while depth > LEAST_DEPTH and _layers(wanted, depth) < workers:  # chunks are read twice, but no worker is idle
        depth = -(-depth // 2)
    heads, itemsize = len(run.heads), np.dtype(run.source.dtype).itemsize
    shard = _divisor(depth, LEAST_DEPTH) if depth < z else min(z, LEAST_DEPTH)

    def size(rows: _Along, columns: _Along) -> int:
        slab = itemsize * (depth + 2 * run.sections) * rows.covered * columns.covered
        out = rows.block * columns.block * (heads * shard + BLEND_BYTES + 8 * heads)
        return slab * (1 + run.reads_ahead) + out + handed_bytes(heads, grid, rows.block, columns.block)

    while True:
        ways = [
            (size(rows, columns), rows, columns)
            for rows in _ways(grid.y, y, chunk[1]) for columns in _ways(grid.x, x, chunk[2])
        ]  # fmt: skip
        fitting = [way for way in ways if way[0] <= room]
        if fitting or depth <= LEAST_DEPTH:
            break
        depth = depth // 2 if depth % 2 == 0 else depth // 2 + 1
        shard = min(shard, depth)
    layers = -(-z // depth)

    def blocks(rows: _Along, columns: _Along, thick: int) -> int:
        """How many blocks hold what is wanted."""
        lengths = (thick, z), (rows.block, y - rows.tail), (columns.block, x - columns.tail)
        spans = zip(wanted.slices, lengths, strict=True)
        return prod(1 + (min(s.stop, end) - 1) // block - min(s.start, end - 1) // block for s, (block, end) in spans)

    def deep(rows: _Along, columns: _Along) -> int:
        """Layers of a block."""
        most = min(MOST_LAYERS, layers, MOST_VOXELS // (depth * rows.block * columns.block))
        return max(1, min(most, blocks(rows, columns, depth) // (BLOCKS_PER_WORKER * workers)))

    def order(way: tuple[int, _Along, _Along]) -> tuple[int, float, int]:
        """Workers that a region leaves idle; voxels decoded for each one of a block, which sees sections of one more layer of
        chunks; its bytes."""
        bytes_, rows, columns = way
        along_z = deep(rows, columns) * depth
        idle = max(0, 2 * workers - blocks(rows, columns, along_z)) if run.roi else 0
        return idle, rows.redundancy * columns.redundancy * (1 + chunk[0] / along_z * (along_z < z)), bytes_

    _, rows, columns = min(fitting or [min(ways, key=lambda way: way[0])], key=order)
    thick = deep(rows, columns) * depth
    fits = thick >= z or depth % shard == 0
    layered = z > chunk[0] and shard >= run.sections // 2  # with one layer of chunks there is no other to read of
    shift = shard if fits and layered and thick < z else 0
    whole = (min(z, thick), rows.block, columns.block)
    pieces = (min(shard, z) if fits else whole[0], rows.block, columns.block)
    block, turned_shift, tail, turned_shard = (
        transpose_axes(triple, inverse_axes(axes))
        for triple in (whole, (shift, 0, 0), (0, rows.tail, columns.tail), pieces)
    )
    return Cut(block, turned_shift, tail, turned_shard, depth)


def _layers(box: Box, depth: int) -> int:
    """How many layers of so many sections hold a part of ``box``."""
    return -(-box.stop[0] // depth) - box.start[0] // depth


def handed_bytes(heads: int, grid: tiles.Grid, rows: int, columns: int) -> int:
    """Of the parts of tiles that a block of so many rows and columns takes and gives, float32: about a quarter of a tile's
    length beyond each edge that is not the plane's."""
    below = grid.size[0] * columns if rows < grid.y.length else 0
    beside = grid.size[1] * rows if columns < grid.x.length else 0
    return heads * SPAN * (below + beside)


def _ways(axis: tiles.Axis, length: int, chunk: int) -> list[_Along]:
    """Some ways to lay blocks of whole tiles along an axis."""
    stride = (length - axis.size) / (axis.count - 1) if axis.count > 1 else length
    found = [_Along(length, 0, length, 1.0)]
    for count in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        if count < axis.count:
            block = _round(int(count * stride))
            covered = min(length, int((count - 1) * stride) + axis.size + axis.step)
            decoded = min(length, covered + chunk - gcd(chunk, axis.step))
            found.append(_Along(block, axis.size - int(stride) + block // 8, covered, decoded / block))
    return found


def _round(length: int) -> int:
    """The largest number up to ``length`` that chunks of a usual size divide."""
    usual = range(96, 385)
    return next((n for n in range(length, max(0, length - 16), -1) if any(n % d == 0 for d in usual)), length)


def _divisor(n: int, near: int) -> int:
    """The divisor of ``n`` that is nearest to ``near`` in ratio."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: max(d / near, near / d))


def with_full_batches(run: Run, gpus: int) -> Run:
    """The run in predict's blocks that GPUs are busy with: of `BATCHES_PER_BLOCK` batches or more, all full.

    Each of ``gpus`` gets 4 of them. The rest of a batch is empty and costs as much, and a batch is of one block. Blocks
    that were asked for stay.
    """
    if run.config.blocks.shape or run.batch == 1 or run.cuts:
        return run
    deeper = {plane: _full_batches(run, plane, gpus) for plane in run.config.predict.planes}
    return replace(run, pass_blocks=deeper) if run.passes else replace(run, predict_block=deeper["xy"])


def _full_batches(run: Run, plane: str, gpus: int) -> Triple:
    axes = tiles.PLANES[plane]
    sections = run.shape[axes[0]]
    depth, rows, columns = transpose_axes(run.pass_grid(plane).block if run.passes else run.predict_block, axes)
    each = len(run.tile_grid(plane).overlapping(slice(0, rows), slice(0, columns)))
    whole = run.batch // gcd(run.batch, each)  # sections whose tiles fill batches
    depth = max(depth, min(-(-BATCHES_PER_BLOCK * run.batch // each), -(-sections // (4 * gpus))))
    return transpose_axes((min(-(-depth // whole) * whole, sections), rows, columns), inverse_axes(axes))


def _target_voxels(shape: Triple) -> int:
    """Voxels of a block: there shall be 16 blocks or more."""
    return min(BLOCK_VOXELS, max(1 << 20, prod(shape) // 16))


def fit(block: Triple, shape: Triple) -> Triple:
    return tuple(min(b, n) for b, n in zip(block, shape, strict=True))


def shard_shape(block: Triple, shape: Triple, chunk: Triple) -> Triple:
    """The shard that holds one block: the block, made a multiple of the chunk on axes that it spans."""
    return tuple(b if b < n else -(-n // min(c, n)) * min(c, n) for b, n, c in zip(block, shape, chunk, strict=True))
