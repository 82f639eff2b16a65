"""How a volume is cut into blocks: functions of its shape, of the source's chunks, and of what was asked for."""

from __future__ import annotations

from dataclasses import replace
from math import gcd, prod
from typing import TYPE_CHECKING

from volseg.box import Triple, inverse_axes, transpose_axes
from volseg.errors import UserError
from volseg.inference import tiles

if TYPE_CHECKING:
    from volseg.engine.run import Run

BLOCK_VOXELS = 1 << 24  # of a block that volseg chooses itself
PREDICT_BLOCK_VOXELS = 1 << 27  # up to which predict's blocks grow to the source's chunks
BATCHES_PER_BLOCK = 8  # on a GPU: while the first is cut and the last is copied back, nothing is computed


def choose_blocks(shape: Triple, asked: Triple | None, chunk: int = 1) -> tuple[Triple, Triple]:
    """The blocks of `predict` and of the stages after it: those that suit the volume, or the shape asked for.

    Predict takes `plane_blocks`. The other stages take the same where these are deep, else blocks of about `BLOCK_VOXELS`.
    ``chunk`` is how many sections of the source are stored together.
    """
    if asked:
        block = fit(asked, shape)
        if prod(n + 2 for n in block) >= 1 << 31:
            raise UserError(
                f"blocks.shape = {list(block)} is too large to number its voxels; use less than 2**31 voxels"
            )
        return block, block
    slab = plane_blocks(shape, chunk)
    depth, (z, y, x), target = slab[0], shape, _target_voxels(shape)
    if depth >= min(z, 8) and (depth + 8) * y * x <= 1 << 26:  # the other stages read a halo too
        return slab, slab
    side = min(512, max(y, x))
    return slab, fit((max(16, target // side**2), side, side), shape)


def plane_blocks(shape: Triple, chunk: int = 1) -> Triple:
    """Blocks of whole planes, which need no tile twice; only planes of more than 2**28 voxels are cut into strips.

    A chunk of the source, ``chunk`` sections deep, is read by one block, or by few, where that leaves 16 blocks or more
    and no more than `PREDICT_BLOCK_VOXELS` in each.

    >>> plane_blocks((1024, 1024, 1024)), plane_blocks((1024, 1024, 1024), 64)
    ((16, 1024, 1024), (64, 1024, 1024))
    >>> plane_blocks((1024, 4096, 4096)), plane_blocks((1024, 4096, 4096), 32)
    ((4, 4096, 4096), (8, 4096, 4096))
    """
    z, y, x = shape
    depth = min(z, max(_target_voxels(shape) // (y * x), 4 if y * x <= 1 << 26 else 1))
    if chunk < depth < z:
        depth -= depth % chunk
    parts = (chunk // k for k in (1, 2, 4, 8, 16, 32, 64) if chunk % k == 0)
    depth = next((d for d in parts if d > depth and 16 * d <= z and d * y * x <= PREDICT_BLOCK_VOXELS), depth)
    strips = -(-depth * y * x // (1 << 28))
    return depth, -(-y // strips), x


def with_full_batches(run: Run, gpus: int) -> Run:
    """The run in predict's blocks that GPUs are busy with: of `BATCHES_PER_BLOCK` batches or more, all full.

    Each of ``gpus`` gets 4 of them. The rest of a batch is empty and costs as much, and a batch is of one block. Blocks
    that were asked for stay.
    """
    if run.config.blocks.shape or run.batch == 1:
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
