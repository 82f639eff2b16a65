"""A run as plain data: what determines its bytes, the blocks it is cut into, and the key of each stage."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import gcd, prod
from typing import Any

import numpy as np

from volseg.box import Blocks, Box, Triple, inverse_axes, transpose_axes
from volseg.config import Config
from volseg.errors import UserError
from volseg.inference import tiles
from volseg.inference.backends import Engine
from volseg.io import probabilities, pyramid, volume
from volseg.io.roi import RegionOfInterest
from volseg.segmentation import hierarchy
from volseg.segmentation.edges import EDGE
from volseg.segmentation.heights import DistanceUnit, distance_unit

BLOCK_VOXELS = 1 << 24  # voxels of a block that volseg chooses itself
BATCHES = 8  # of a block on a GPU: while the first is cut and the last is fetched, nothing is computed
SLAB_VOXELS = 1 << 27  # voxels up to which predict's blocks grow to the source's chunks
SAMPLED = 64  # blocks whose tiles are counted where a mask decides
CONSTANT = "constant tiles are 0"  # of a key: what predict does with them


@dataclass(frozen=True)
class Run:
    """All that determines a run's output; stored in its folder, from where workers read it.

    Its probabilities come from a network, or are ``taken`` from other volumes: then ``source`` is the mask's, and what
    describes a network is left as it is here.
    """

    out: str
    source: volume.Volume
    config: Config
    heads: tuple[str, ...]
    voxel_size_nm: tuple[float, float, float]
    checksum: str
    predict_block: Triple
    block: Triple
    model_sha256: str = ""
    sections: int = 1
    binning: int = 1
    mean: float = 0.0
    std: float = 1.0
    engine: Engine | None = None  # None: its probabilities are taken
    taken: tuple[probabilities.Channel, ...] = ()
    wanted: RegionOfInterest | None = None  # None: every voxel
    pass_blocks: dict[str, Triple] = field(default_factory=dict)  # of passes whose own blocks would not fit the memory

    @property
    def shape(self) -> Triple:
        return self.source.shape

    @property
    def first(self) -> str:
        """The stage that stores probabilities."""
        return "take" if self.taken else "predict"

    @property
    def batch(self) -> int:
        """Tiles in one forward pass; the last are padded, so that each pass has the same bits."""
        return self.engine.batch if self.engine else 1

    @property
    def predict_grid(self) -> Blocks:
        return Blocks(self.shape, self.predict_block)

    @property
    def grid(self) -> Blocks:
        return Blocks(self.shape, self.block)

    @property
    def passes(self) -> dict[str, str]:
        """The plane that each stage before `predict` looks at; none where `predict` itself looks at the one there is."""
        planes = self.config.predict.planes
        return {} if planes == ("xy",) or self.taken else {f"predict-{plane}": plane for plane in planes}

    def pass_grid(self, plane: str) -> Blocks:
        """The blocks of a pass over several planes: deep across its planes, as `blocks` chooses those of xy planes."""
        if plane in self.pass_blocks:
            return Blocks(self.shape, self.pass_blocks[plane])
        axes = tiles.PLANES[plane]
        slab = transpose_axes(slabs(transpose_axes(self.shape, axes), self.source.chunk[axes[0]]), inverse_axes(axes))
        return Blocks(self.shape, fit(self.config.blocks.shape or slab, self.shape))

    def tile_grid(self, plane: str) -> tiles.Grid:
        """The tiles of every section of a pass: a function of the volume's shape."""
        section, knobs = transpose_axes(self.shape, tiles.PLANES[plane])[1:], self.config.predict
        return tiles.grid(section, knobs.tile, knobs.overlap, self.binning)

    def core(self, box: Box) -> Box:
        """The part of ``box`` outside of which no voxel is wanted."""
        return self.wanted.roi.intersect(box) if self.wanted else box

    def any_wanted(self, box: Box) -> bool:
        """Whether any voxel of ``box`` is wanted."""
        return self.wanted is None or self.wanted.meets(box)

    def wanted_in(self, box: Box, plane: str = "xy") -> np.ndarray | None:
        """Which voxels of ``box``, part of the box that is wanted, the mask wants, in the axes of a pass; None: all."""
        masked = self.wanted and self.wanted.mask
        return self.wanted.read(box).transpose(tiles.PLANES[plane]) if masked else None

    @cached_property
    def inferred(self) -> int:
        """Voxels that go through the network: those of every tile in each block that needs it, in all passes and turns.

        Constant tiles are among them: only reading tells. Where there is a mask and more than `SAMPLED` blocks, an estimate.
        """
        passes = {plane: self.pass_grid(plane) for plane in self.passes.values()} or {"xy": self.predict_grid}
        counted = ((prod(self.tile_grid(plane).size), _tiles(self, plane, grid)) for plane, grid in passes.items())
        return 0 if self.taken else self.config.predict.tta * sum(size * count for size, count in counted)

    @property
    def layers(self) -> Blocks:
        """The volume cut into layers one block thick: objects are numbered by the raster order of their first voxels."""
        return Blocks(self.shape, (self.block[0], *self.shape[1:]))

    def level_grid(self, level: int) -> Blocks:
        """The blocks of one level of the label pyramid."""
        shape = self.levels[level][0]
        return Blocks(shape, fit(self.block, shape))

    def grid_of(self, stage: str) -> Blocks:
        """The blocks that a stage goes through."""
        name, level = level_of(stage)
        if stage in self.passes:
            return self.pass_grid(self.passes[stage])
        if name in ("tree", "names"):
            return hierarchy.parts(self.grid, level)
        if name == "pyramid":
            return self.level_grid(level)
        return {self.first: self.predict_grid, "stitch": Blocks(self.shape, self.shape), "number": self.layers}.get(
            stage, self.grid
        )

    @property
    def fills(self) -> bool:
        """Whether holes are filled, so that background has to be looked at."""
        return self.config.stitch.fill_holes_voxels > 0

    @property
    def distance_unit(self) -> DistanceUnit:
        return distance_unit(self.config.fragments, self.voxel_size_nm)

    @property
    def levels(self) -> list[tuple[Triple, Triple]]:
        return pyramid.levels(self.shape, self.voxel_size_nm, self.config.output.levels)

    @cached_property
    def keys(self) -> dict[str, str]:
        """Each stage's hash of all that determines its output."""
        c = self.config
        first = _hash(
            self.checksum, self.shape, self.model_sha256, self.mean, self.std, self.engine and self.engine.arithmetic,
            self.predict_block,
            c.predict.tile, c.predict.overlap, c.predict.batch, c.predict.tta, sorted(c.predict.planes), c.output.chunk,
            CONSTANT,
        )  # fmt: skip
        if self.taken:
            roles = [(channel.name, channel.source is not None, channel.inverted) for channel in self.taken]
            first = _hash(self.checksum, self.shape, roles, self.predict_block, c.output.chunk)
        if self.wanted:
            first = _hash(first, self.wanted.key)
        passes = {stage: _hash(first, stage, self.pass_grid(plane).block) for stage, plane in self.passes.items()}
        fragments = _hash(first, c.fragments.model_dump(), asdict(self.distance_unit), self.block, EDGE.names)
        voids = _hash(fragments, "voids")
        stitched = _hash(fragments, c.stitch.model_dump(exclude={"reduce"}))
        levels = {f"pyramid{k}": _hash(stitched, k, *self.levels) for k in range(1, len(self.levels))}
        steps = [f"{stage}{k}" for stage in ("tree", "names") for k in range(hierarchy.top_level(self.grid) + 1)]
        deciding = dict.fromkeys(["stitch", *steps, "number", "borders", "relabel"], stitched)
        return {**passes, self.first: first, "fragments": fragments, "faces": fragments, "voids": voids, "rims": voids,
                **deciding, **levels}  # fmt: skip

    @cached_property
    def id(self) -> str:
        """The hash of the whole description: what workers remember a run by."""
        return _hash(self.to_json())

    def to_json(self) -> dict:
        plain = asdict(replace(self, config=None))
        return {
            **plain,
            "engine": plain["engine"] or {},
            "config": self.config.model_dump(mode="json", exclude={"train"}),
            "keys": self.keys,
        }

    @classmethod
    def from_json(cls, plain: dict) -> Run:
        known = {name: _tuples(plain[name]) for name in cls.__dataclass_fields__ if name in plain}
        taken = tuple(replace(probabilities.Channel(**c), source=_volume(c["source"])) for c in plain.get("taken", ()))
        blocks = {plane: _tuples(block) for plane, block in plain.get("pass_blocks", {}).items()}
        whole = {
            "engine": Engine(**plain["engine"]) if plain["engine"] else None,
            "taken": taken,
            "config": Config(**plain["config"]),
            "pass_blocks": blocks,
        }
        return cls(**{**known, **whole, "source": _volume(plain["source"]), "wanted": _wanted(plain.get("wanted"))})


def _volume(plain: dict | None) -> volume.Volume | None:
    return None if plain is None else volume.Volume(**{key: _tuples(value) for key, value in plain.items()})


def _wanted(plain: dict | None) -> RegionOfInterest | None:
    if plain is None:
        return None
    roi = Box(**{name: _tuples(value) for name, value in plain["roi"].items()})
    return RegionOfInterest(**{**plain, "roi": roi, "mask": _volume(plain["mask"]), "factor": _tuples(plain["factor"])})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def level_of(stage: str) -> tuple[str, int]:
    """A stage's name without its level, and the level.

    >>> level_of("pyramid2"), level_of("relabel")
    (('pyramid', 2), ('relabel', 0))
    """
    name = stage.rstrip("0123456789")
    return name, int(stage.removeprefix(name) or 0)


# ---------------------------------------------------------------- blocks


def blocks(shape: Triple, wanted: Triple | None, chunk: int = 1) -> tuple[Triple, Triple]:
    """The blocks of `predict` and of the stages after it: those that suit the volume, or the shape asked for.

    Predict takes `slabs`. The other stages take the same where these are deep, else blocks of about `BLOCK_VOXELS`.
    ``chunk`` is how many sections of the source are stored together.
    """
    if wanted:
        block = fit(wanted, shape)
        if prod(n + 2 for n in block) >= 1 << 31:
            raise UserError(
                f"blocks.shape = {list(block)} is too large to number its voxels; use less than 2**31 voxels"
            )
        return block, block
    slab = slabs(shape, chunk)
    depth, (z, y, x), target = slab[0], shape, _target(shape)
    if depth >= min(z, 8) and (depth + 8) * y * x <= 1 << 26:  # the other stages read a halo too
        return slab, slab
    side = min(512, max(y, x))
    return slab, fit((max(16, target // side**2), side, side), shape)


def slabs(shape: Triple, chunk: int = 1) -> Triple:
    """Blocks of whole planes, which need no tile twice; only planes of more than 2**28 voxels are cut into strips.

    A chunk of the source, ``chunk`` sections deep, is read by one block, or by few, where that leaves 16 blocks or more
    and no more than `SLAB_VOXELS` in each.

    >>> slabs((1024, 1024, 1024)), slabs((1024, 1024, 1024), 64), slabs((1024, 4096, 4096)), slabs((1024, 4096, 4096), 32)
    ((16, 1024, 1024), (64, 1024, 1024), (4, 4096, 4096), (8, 4096, 4096))
    """
    z, y, x = shape
    depth = min(z, max(_target(shape) // (y * x), 4 if y * x <= 1 << 26 else 1))
    if chunk < depth < z:
        depth -= depth % chunk
    parts = (chunk // k for k in (1, 2, 4, 8, 16, 32, 64) if chunk % k == 0)
    depth = next((d for d in parts if d > depth and 16 * d <= z and d * y * x <= SLAB_VOXELS), depth)
    strips = -(-depth * y * x // (1 << 28))
    return depth, -(-y // strips), x


def with_full_batches(run: Run, gpus: int) -> Run:
    """The run in predict's blocks that GPUs are busy with: of `BATCHES` batches or more, all full, where ``gpus`` get 4 each.

    The rest of a batch is empty and costs as much, and a batch is of one block. Blocks that were asked for stay.
    """
    if run.config.blocks.shape or run.batch == 1:
        return run
    deeper = {plane: _filling(run, plane, gpus) for plane in run.config.predict.planes}
    return replace(run, pass_blocks=deeper) if run.passes else replace(run, predict_block=deeper["xy"])


def _filling(run: Run, plane: str, gpus: int) -> Triple:
    axes = tiles.PLANES[plane]
    sections = run.shape[axes[0]]
    depth, rows, columns = transpose_axes(run.pass_grid(plane).block if run.passes else run.predict_block, axes)
    each = len(run.tile_grid(plane).meeting(slice(0, rows), slice(0, columns)))
    whole = run.batch // gcd(run.batch, each)  # sections whose tiles fill batches
    depth = max(depth, min(-(-BATCHES * run.batch // each), -(-sections // (4 * gpus))))
    return transpose_axes((min(-(-depth // whole) * whole, sections), rows, columns), inverse_axes(axes))


def _target(shape: Triple) -> int:
    """Voxels of a block: there shall be 16 blocks or more."""
    return min(BLOCK_VOXELS, max(1 << 20, prod(shape) // 16))


def fit(block: Triple, shape: Triple) -> Triple:
    return tuple(min(b, n) for b, n in zip(block, shape, strict=True))


def shard(block: Triple, shape: Triple, chunk: Triple) -> Triple:
    """The shard that holds one block: the block, made a multiple of the chunk on axes that it spans."""
    return tuple(b if b < n else -(-n // min(c, n)) * min(c, n) for b, n, c in zip(block, shape, chunk, strict=True))


# ---------------------------------------------------------------- tiles


def tiles_of(run: Run, plane: str, box: Box, wanted: np.ndarray | None) -> list[tuple[int, tuple[int, int]]]:
    """The tiles that ``box`` needs in a pass, as (section, tile), by section and in raster order.

    ``wanted`` says which of its voxels are wanted, in the axes of the pass (None: all). A tile that holds none of them
    in the box gives none of them anything, so leaving it out changes none.
    """
    first, y, x = box.transpose(tiles.PLANES[plane]).slices
    grid = run.tile_grid(plane)
    meeting = grid.meeting(y, x)
    every = [(z, tile) for z in range(first.start, first.stop) for tile in meeting]
    if wanted is None:
        return every
    parts = {tile: tuple(map(_inside, grid.place(tile), (y, x))) for tile in meeting}
    return [(z, tile) for z, tile in every if wanted[(z - first.start, *parts[tile])].any()]


def _inside(place: slice, window: slice) -> slice:
    """The part of ``window`` that lies in ``place``, counted from the window's start."""
    return slice(max(place.start, window.start) - window.start, min(place.stop, window.stop) - window.start)


def _tiles(run: Run, plane: str, grid: Blocks) -> int:
    """Tiles that all blocks of a pass need together."""
    if run.wanted and run.wanted.mask:
        count = len(grid)
        some = range(count) if count <= SAMPLED else [k * count // SAMPLED for k in range(SAMPLED)]
        boxes = (box for box in map(run.core, map(grid.__getitem__, some)) if box.voxels)
        found = sum(len(tiles_of(run, plane, box, run.wanted_in(box, plane))) for box in boxes)
        return found * count // len(some)
    axes, laid = tiles.PLANES[plane], run.tile_grid(plane)
    want = run.core(Box.from_shape(run.shape))
    found = want.shape[axes[0]]
    for k, axis in zip(axes[1:], (laid.y, laid.x), strict=True):
        a, b, step = want.start[k], want.stop[k], grid.block[k]
        found *= sum(len(axis.meeting(max(a, at), min(b, at + step))) for at in range(a // step * step, b, step))
    return found


def redundancy(run: Run, voxels: int | None = None) -> float:
    """Voxels that go through the network, ``voxels`` or as many as planned, for each one wanted; 0 where none is.

    Tiles share voxels, blocks share tiles, and planes and turns come on top.
    """
    wanted = run.wanted.voxels if run.wanted else prod(run.shape)
    return (run.inferred if voxels is None else voxels) / wanted if wanted else 0.0
