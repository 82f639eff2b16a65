"""A run as plain data: what determines its bytes, the blocks it is cut into, and the key of each stage."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

from volseg import foreign, pyramid, tiles, tree, volume
from volseg import fragments as basins
from volseg.box import Blocks, Triple, back, turned
from volseg.config import Config, UserError

BLOCK_VOXELS = 1 << 24  # voxels of a block that volseg chooses itself
SLAB_VOXELS = 1 << 27  # voxels up to which predict's blocks grow to the source's chunks


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
    mean: float = 0.0
    std: float = 1.0
    engine: dict = field(default_factory=dict)
    taken: tuple[foreign.Channel, ...] = ()

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
        return self.engine.get("batch") or self.config.predict.batch or 1

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
        axes = tiles.PLANES[plane]
        slab = turned(slabs(turned(self.shape, axes), self.source.chunk[axes[0]]), back(axes))
        return Blocks(self.shape, fit(self.config.blocks.shape or slab, self.shape))

    def tile_grid(self, plane: str) -> tiles.Grid:
        """The tiles of every section of a pass: a function of the volume's shape."""
        return tiles.grid(turned(self.shape, tiles.PLANES[plane])[1:], self.config.predict.tile, self.config.predict.overlap)

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
            return tree.parts(self.grid, level)
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
    def metric(self) -> basins.Metric:
        return basins.metric(self.config.fragments, self.voxel_size_nm)

    @property
    def levels(self) -> list[tuple[Triple, Triple]]:
        return pyramid.levels(self.shape, self.voxel_size_nm, self.config.output.levels)

    @cached_property
    def keys(self) -> dict[str, str]:
        """Each stage's hash of all that determines its output."""
        c = self.config
        first = _hash(
            self.checksum, self.shape, self.model_sha256, self.mean, self.std, bits(self.engine), self.predict_block,
            c.predict.tile, c.predict.overlap, c.predict.batch, c.predict.tta, sorted(c.predict.planes), c.output.chunk,
        )  # fmt: skip
        if self.taken:
            roles = [(channel.name, channel.source is not None, channel.inverted) for channel in self.taken]
            first = _hash(self.checksum, self.shape, roles, self.predict_block, c.output.chunk)
        passes = {stage: _hash(first, stage, self.pass_grid(plane).block) for stage, plane in self.passes.items()}
        fragments = _hash(first, c.fragments.model_dump(), asdict(self.metric), self.block, basins.EDGE.names)
        voids = _hash(fragments, "voids")
        stitched = _hash(fragments, c.stitch.model_dump(exclude={"reduce"}))
        levels = {f"pyramid{k}": _hash(stitched, k, *self.levels) for k in range(1, len(self.levels))}
        steps = [f"{stage}{k}" for stage in ("tree", "names") for k in range(tree.top(self.grid) + 1)]
        deciding = dict.fromkeys(["stitch", *steps, "number", "borders", "relabel"], stitched)
        return {**passes, self.first: first, "fragments": fragments, "faces": fragments, "voids": voids, "rims": voids,
                **deciding, **levels}  # fmt: skip

    @cached_property
    def id(self) -> str:
        """The hash of the whole description: what workers remember a run by."""
        return _hash(self.to_json())

    def to_json(self) -> dict:
        plain = asdict(replace(self, config=None))
        return {**plain, "config": self.config.model_dump(mode="json", exclude={"train"}), "keys": self.keys}

    @classmethod
    def from_json(cls, plain: dict) -> Run:
        known = {name: _tuples(plain[name]) for name in cls.__dataclass_fields__ if name in plain}
        taken = tuple(replace(foreign.Channel(**c), source=_volume(c["source"])) for c in plain.get("taken", ()))
        whole = {"engine": plain["engine"], "taken": taken, "config": Config(**plain["config"])}
        return cls(**{**known, **whole, "source": _volume(plain["source"])})


def _volume(plain: dict | None) -> volume.Volume | None:
    return None if plain is None else volume.Volume(**{key: _tuples(value) for key, value in plain.items()})


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


def bits(engine: dict) -> dict:
    """What of an engine's description decides the bits it computes."""
    return {name: value for name, value in engine.items() if name != "why"}


# ---------------------------------------------------------------- blocks


def blocks(shape: Triple, wanted: Triple | None, chunk: int = 1) -> tuple[Triple, Triple]:
    """The blocks of `predict` and of the stages after it: those that suit the volume, or the shape asked for.

    Predict takes `slabs`. The other stages take the same where these are deep, else blocks of about `BLOCK_VOXELS`.
    ``chunk`` is how many sections of the source are stored together.
    """
    if wanted:
        block = fit(wanted, shape)
        if prod(n + 2 for n in block) >= 1 << 31:
            raise UserError(f"blocks.shape = {list(block)} is too large to number its voxels; use less than 2**31 voxels")
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


def _target(shape: Triple) -> int:
    """Voxels of a block: there shall be 16 blocks or more."""
    return min(BLOCK_VOXELS, max(1 << 20, prod(shape) // 16))


def fit(block: Triple, shape: Triple) -> Triple:
    return tuple(min(b, n) for b, n in zip(block, shape, strict=True))


def shard(block: Triple, shape: Triple, chunk: Triple) -> Triple:
    """The shard that holds one block: the block, made a multiple of the chunk on axes that it spans."""
    return tuple(
        b if b < n else -(-n // min(c, n)) * min(c, n) for b, n, c in zip(block, shape, chunk, strict=True)
    )


def redundancy(run: Run) -> float:
    """Voxels inferred for each voxel wanted: tiles share voxels, blocks share tiles, and planes and turns come on top."""
    passes = {plane: run.pass_grid(plane) for plane in run.passes.values()} or {"xy": run.predict_grid}
    return run.config.predict.tta * sum(_redundancy(run, plane, grid) for plane, grid in passes.items())


def _redundancy(run: Run, plane: str, grid: Blocks) -> float:
    """Voxels inferred for each voxel in one pass over the volume."""
    axes, laid = tiles.PLANES[plane][1:], run.tile_grid(plane)
    inferred = 1.0
    for k, axis in zip(axes, (laid.y, laid.x), strict=True):
        length, block = run.shape[k], grid.block[k]
        starts = range(0, length, block)
        inferred *= axis.size * sum(len(axis.meeting(a, min(a + block, length))) for a in starts) / length
    return inferred
