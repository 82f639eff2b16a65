"""A run as plain data: all that determines its bytes, and the blocks it is cut into."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import numpy as np

from volseg.box import Blocks, Box, Triple, inverse_axes, transpose_axes
from volseg.config import Config, Stitch
from volseg.engine.blocks import Cut, fit, plane_blocks
from volseg.engine.layout import Layout
from volseg.engine.parts import Parts
from volseg.errors import DamagedFileError, UserError
from volseg.inference import tiles, voxel_size
from volseg.inference.backends import Engine
from volseg.io import files, probabilities, pyramid, volume
from volseg.io import place as places
from volseg.io.corrections import Corrections
from volseg.io.header import check_shape
from volseg.io.occupancy import Occupancy
from volseg.io.resample import Grid
from volseg.io.roi import RegionOfInterest
from volseg.segmentation.distances import DistanceUnit, distance_unit
from volseg.segmentation.rules import Rules

COUNTED_LAYERS = 256  # of sections, in each of which it is looked up which tiles reach where something is wanted
SAMPLED_TILES = 128  # that are looked up in a mask, to count those that are needed


@dataclass(frozen=True)
class Run:
    """All that determines a run's output; stored in its folder, from where workers read it.

    Its probabilities come from a network, or from ``channels`` of other volumes: then ``source`` is the mask's, and what
    describes a network is left as it is here.

    out                  the folder
    heads                what the channels of the probabilities are
    checksum             of the source
    predict_block, block of the stage that stores probabilities, and of those after it
    sections             neighboring sections that the network sees
    multiple             voxels a side that its tiles are multiples of; 0: as its binning has it
    mean, std            of the gray values, by which they are standardized
    padding              gray values of what shows nothing
    engine               what computes; None where its probabilities come from elsewhere
    roi                  the voxels to do; None for all
    given                the source before it was resampled to the model's voxel size; None where it was not
    given_roi            the same voxels in that grid
    restored             whether labels are brought back to that grid
    pass_blocks          by plane, of passes whose own blocks would not fit the memory
    cuts                 by plane, where blocks follow the source's chunks and the tiles
    corrections          of the objects that the rules make; None for none
    partition            the name of the one that makes objects in place of the rules; None for none
    rule_voxel_nm        size of the voxels that [stitch] counts, the model's; None where those are this run's own
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
    multiple: int = 0
    mean: float = 0.0
    std: float = 1.0
    padding: tuple[float, ...] = ()
    engine: Engine | None = None
    channels: tuple[probabilities.Channel, ...] = ()
    roi: RegionOfInterest | None = None
    given: volume.Volume | None = None
    given_roi: RegionOfInterest | None = None
    restored: bool = False
    pass_blocks: dict[str, Triple] = field(default_factory=dict)
    cuts: dict[str, Cut] = field(default_factory=dict)
    corrections: Corrections | None = None
    partition: str | None = None
    rule_voxel_nm: tuple[float, float, float] | None = None

    @property
    def shape(self) -> Triple:
        return self.source.shape

    @property
    def layout(self) -> Layout:
        return Layout(self.out, self.parts.nothing)

    @cached_property
    def parts(self) -> Parts:
        """The blocks in which something is to be done."""
        return Parts(self)

    @property
    def probability_stage(self) -> str:
        """The stage that stores probabilities."""
        return "import" if self.channels else "predict"

    @property
    def drops(self) -> bool:
        """Whether probabilities are removed once nothing is made from them any more."""
        return self.config.output.probabilities == "drop"

    def require_probabilities(self, what: str) -> None:
        """Refuses ``what``, which reads the stored probabilities, where the run does not keep them."""
        if self.drops:
            raise UserError(
                f"{what} needs the probabilities of {self.out}, which were dropped (output.probabilities = 'drop'); make the "
                "run anew with --set output.probabilities=keep --overwrite"
            )

    @property
    def batch(self) -> int:
        """Tiles in one forward pass; the last are padded, so that each pass has the same bits."""
        return self.engine.batch if self.engine else 1

    # ---- blocks

    @property
    def predict_grid(self) -> Blocks:
        if "xy" in self.cuts and not self.passes:
            return self.cuts["xy"].grid(self.shape)
        return Blocks(self.shape, self.predict_block)

    @property
    def grid(self) -> Blocks:
        return Blocks(self.shape, self.block)

    @property
    def passes(self) -> dict[str, str]:
        """The plane that each stage before `predict` looks at; none where `predict` itself looks at the one there is."""
        planes = self.config.predict.planes
        return {} if planes == ("xy",) or self.channels else {f"predict-{plane}": plane for plane in planes}

    def pass_grid(self, plane: str) -> Blocks:
        """The blocks of a pass over several planes: deep across its planes, as those of xy planes are along z."""
        if plane in self.cuts:
            return self.cuts[plane].grid(self.shape)
        if plane in self.pass_blocks:
            return Blocks(self.shape, self.pass_blocks[plane])
        axes = tiles.PLANES[plane]
        block = transpose_axes(plane_blocks(transpose_axes(self.shape, axes)), inverse_axes(axes))
        return Blocks(self.shape, fit(self.config.blocks.shape or block, self.shape))

    def grid_of(self, plane: str) -> Blocks:
        """The blocks in which sections of one orientation go through the network."""
        return self.pass_grid(plane) if self.passes else self.predict_grid

    def stored_together(self, plane: str) -> Triple:
        """The shape of what such a block writes at once: a shard of probabilities."""
        cut = self.cuts.get(plane)
        return cut.shard if cut else self.grid_of(plane).block

    def read_together(self, plane: str) -> int:
        """How many sections such a block reads at once, with those around them; 0 for all."""
        cut = self.cuts.get(plane)
        return cut.depth if cut else 0

    @property
    def reads_ahead(self) -> bool:
        """Whether a block reads what follows while it infers: a store is waited for. Of local files, decoding takes the same
        cores that infer, or a GPU has another task meanwhile."""
        return files.is_remote(self.source.path)

    @property
    def layers(self) -> Blocks:
        """The volume cut into layers one block thick: objects are numbered by the raster order of their first voxels."""
        return Blocks(self.shape, (self.block[0], *self.shape[1:]))

    # ---- the grid of the labels

    @property
    def output_shape(self) -> Triple:
        """Voxels of the labels along z, y, x."""
        return self.given.shape if self.restored else self.shape

    @property
    def output_voxel_size_nm(self) -> tuple[float, float, float]:
        return self.given.voxel_size_nm if self.restored else self.voxel_size_nm

    @property
    def origin_nm(self) -> tuple[float, float, float]:
        """Where the center of the first voxel lies in the volume's world, z y x."""
        return self.center_nm(self.voxel_size_nm)

    @property
    def output_origin_nm(self) -> tuple[float, float, float]:
        """The same on the grid of the labels."""
        return self.center_nm(self.output_voxel_size_nm)

    def center_nm(self, size_nm: tuple[float, ...]) -> tuple[float, float, float]:
        """The same on a grid of voxels of ``size_nm`` in that space, such as a coarser level."""
        own = self._begin.voxel_size_nm or self.voxel_size_nm
        return places.nm(places.regridded(self.place, own, size_nm), size_nm)

    def corner(self, size_nm: tuple[float, ...]) -> tuple[float, float, float]:
        """Where the outer corner of the first voxel lies for formats that count whole voxels from corner to corner.

        It is in voxels of ``size_nm``. A volume that says nothing of its place, or begins with a center at 0, has it at 0.
        """
        first, own = places.whole(self.place)[0], self._begin.voxel_size_nm or self.voxel_size_nm
        z, y, x = (round(n * a / b, 6) for n, a, b in zip(first, own, size_nm, strict=True))
        return z, y, x

    @property
    def in_whole_voxels(self) -> bool:
        """Whether `corner` is where the volume's first voxel is."""
        return places.whole(self.place)[1]

    @property
    def _begin(self) -> volume.Volume:
        """The volume as it was given: it alone knows its place."""
        return self.given or self.source

    @property
    def place(self) -> places.Place:
        """Where that volume lies, in its own voxels: see `volseg.io.place`."""
        return self._begin.place

    def moved(self, place: places.Place) -> Run:
        """The run of the same volume at another place."""
        if self.given is None:
            return replace(self, source=replace(self.source, place=place))
        own = places.regridded(place, self.given.voxel_size_nm, self.voxel_size_nm)
        return replace(self, given=replace(self.given, place=place), source=replace(self.source, place=own))

    @property
    def output_source(self) -> volume.Volume:
        """The volume on the grid of the labels."""
        return self.given if self.restored else self.source

    @property
    def to_own(self) -> Grid:
        """From the grid of the labels to the run's own, where labels are brought back."""
        return Grid.between(self.given.shape, self.given.voxel_size_nm, self.shape, self.voxel_size_nm)

    @property
    def output_grid(self) -> Blocks:
        """The blocks in which labels are written: the run's own or, where labels are brought back, those that neither hold more
        voxels nor cover more space."""
        if not self.restored:
            return self.grid
        pairs = zip(self.block, self.output_shape, self.shape, strict=True)
        scaled = (min(b, -(-b * n // m)) for b, n, m in pairs)
        return Blocks(self.output_shape, fit(tuple(scaled), self.output_shape))

    @property
    def levels(self) -> list[tuple[Triple, Triple]]:
        """Shape and factor of each level of the label pyramid."""
        return pyramid.levels(self.output_shape, self.output_voxel_size_nm, self.config.output.levels)

    @property
    def image_levels(self) -> list[tuple[Triple, Triple]]:
        """The same of the copy of the volume; none where no copy was asked for."""
        return self.levels if self.config.output.copy_image else []

    @property
    def probability_levels(self) -> list[tuple[Triple, Triple]]:
        """The same of the probabilities: as many, as OME-Zarr wants it of an image and its labels; one where they go."""
        return pyramid.levels(self.shape, self.voxel_size_nm, 1 if self.drops else len(self.levels), smallest=1)

    def probability_grid(self, level: int) -> Blocks:
        """The blocks of one level of the probabilities."""
        shape = self.probability_levels[level][0]
        return Blocks(shape, fit(self.block, shape)) if level else self.predict_grid

    def level_grid(self, level: int) -> Blocks:
        """The blocks of one level of the label pyramid."""
        shape = self.levels[level][0]
        return Blocks(shape, fit(self.output_grid.block, shape))

    # ---- tiles

    @property
    def tile_multiple(self) -> int:
        """Voxels a side that tiles are multiples of."""
        return self.multiple or tiles.MULTIPLE * self.binning

    def tile_grid(self, plane: str) -> tiles.Grid:
        """The tiles of every section of a pass: a function of the volume's shape."""
        section, predict = transpose_axes(self.shape, tiles.PLANES[plane])[1:], self.config.predict
        return tiles.grid(section, predict.tile, predict.overlap, self.tile_multiple)

    def tiles_reaching(self, plane: str, box: Box) -> Box:
        """The part of a pass's volume in which tiles begin that reach into ``box``."""
        rows, columns = self.tile_grid(plane).size
        axes = tiles.PLANES[plane]
        z, y, x = box.transpose(axes).start
        start = transpose_axes((z, max(0, y - rows + 1), max(0, x - columns + 1)), inverse_axes(axes))
        return Box(start, box.stop)

    @cached_property
    def inferred_voxels(self) -> int:
        """Voxels that go through the network: those of every tile that reaches a voxel that is wanted, in all passes and flips.

        Constant tiles are among them: only reading tells. Where there is a mask, an estimate for more than `SAMPLED_TILES`.
        """
        planes = tuple(self.passes.values()) or ("xy",)
        counts = ((prod(self.tile_grid(plane).size), _count_tiles(self, plane)) for plane in planes)
        return 0 if self.channels else self.config.predict.tta * sum(size * count for size, count in counts)

    # ---- what is wanted

    @property
    def wanted_voxels(self) -> int:
        return self.roi.voxels if self.roi else prod(self.shape)

    def wanted_part(self, box: Box) -> Box:
        """The part of ``box`` outside of which no voxel is wanted."""
        return self.roi.part(box) if self.roi else box

    def wants_any(self, box: Box) -> bool:
        """Whether any voxel of ``box`` is wanted."""
        return self.roi is None or self.roi.meets(box)

    def read_mask(self, box: Box, plane: str = "xy") -> np.ndarray | None:
        """Which voxels of ``box``, part of the box that is wanted, the mask wants, in the axes of a pass; None: all."""
        masked = self.roi and self.roi.mask
        return self.roi.read(box).transpose(tiles.PLANES[plane]) if masked else None

    # ---- rules

    @property
    def fills_holes(self) -> bool:
        """Whether holes are filled, so that background has to be looked at."""
        return self.config.stitch.fill_holes_voxels > 0 and not self.partition

    @property
    def distance_unit(self) -> DistanceUnit:
        return distance_unit(self.config.fragments, self.voxel_size_nm)

    @property
    def stitch(self) -> Stitch:
        """``[stitch]`` in voxels of this run."""
        return voxel_size.scaled_rules(self.config.stitch, self.rule_voxel_nm, self.voxel_size_nm)

    @property
    def rules(self) -> Rules:
        """What decides about basins."""
        return Rules.from_config(self.config.model_copy(update={"stitch": self.stitch}), self.voxel_size_nm)

    # ---- as JSON

    @cached_property
    def id(self) -> str:
        """The hash of the whole description: what workers remember a run by."""
        return digest(self.to_json())

    def to_json(self) -> dict:
        plain = asdict(replace(self, config=None))
        config = self.config.model_dump(mode="json", exclude={"train"})
        return {**plain, "engine": plain["engine"] or {}, "config": config}

    @classmethod
    def from_json(cls, plain: dict, key: str = "run.json") -> Run:
        """The run that ``plain`` describes, as the file ``key`` in its folder holds it; `DamagedFileError` for none."""
        try:
            run = cls._parsed(plain)
            run._check()
            if key == Layout.DESCRIPTION and not isinstance(plain["keys"], dict):
                raise TypeError("its keys are none")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            state = f"is damaged ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            raise DamagedFileError(str(plain.get("out", "the run")), key, state) from None
        return run

    def _check(self) -> None:
        """Raises `ValueError` for sizes that no run has."""
        shape, cuts = self.source.shape, self.cuts.values()
        blocks = (self.predict_block, self.block, *self.pass_blocks.values(), *(cut.block for cut in cuts))
        for triple in (shape, *blocks):
            if len(triple) != 3 or not all(type(n) is int and n > 0 for n in triple):
                raise ValueError(f"{triple!r} is no shape")
        check_shape(shape, "the volume")
        for region in (self.roi, self.given_roi):
            if region and region.occupied:
                region.occupied.check(region.mask.shape)
        if len(self.voxel_size_nm) != 3 or not all(0 < n < float("inf") for n in self.voxel_size_nm):
            raise ValueError(f"{self.voxel_size_nm!r} is no size of a voxel")
        if places.placed(self.place) != self.place:
            raise ValueError(f"{self.place!r} is no place")

    @classmethod
    def _parsed(cls, plain: dict) -> Run:
        known = {name: _tuples(plain[name]) for name in cls.__dataclass_fields__ if name in plain}
        channels = tuple(
            replace(probabilities.Channel(**c), source=_volume(c["source"])) for c in plain.get("channels", ())
        )
        blocks = {plane: _tuples(block) for plane, block in plain.get("pass_blocks", {}).items()}
        nested = {
            "engine": Engine.from_json(plain["engine"]) if plain["engine"] else None,
            "channels": channels,
            "config": Config(**plain["config"]),
            "pass_blocks": blocks,
            "cuts": {plane: Cut.from_json(cut) for plane, cut in plain.get("cuts", {}).items()},
            "source": _volume(plain["source"]),
            "roi": _roi(plain.get("roi")),
            "given": _volume(plain.get("given")),
            "given_roi": _roi(plain.get("given_roi")),
            "corrections": Corrections.from_json(plain.get("corrections")),
        }
        return cls(**{**known, **nested})


@lru_cache(maxsize=2)
def stored_run(path: str, run_id: str) -> Run:
    """The run whose folder is ``path``, as its workers read it; ``run_id`` has a new run at the same place read anew."""
    return replace(Run.from_json(Layout(path).load_description(), Layout.DESCRIPTION), out=path)


def _volume(plain: dict | None) -> volume.Volume | None:
    return None if plain is None else volume.Volume(**{key: _tuples(value) for key, value in plain.items()})


def _roi(plain: dict | None) -> RegionOfInterest | None:
    if plain is None:
        return None
    box = Box(**{name: _tuples(value) for name, value in plain["roi"].items()})
    grid = Grid(**{name: _tuples(value) for name, value in plain["grid"].items()}) if plain.get("grid") else None
    nested = {"roi": box, "mask": _volume(plain["mask"]), "factor": _tuples(plain["factor"]), "grid": grid}
    if occupied := plain.get("occupied"):
        nested["occupied"] = Occupancy(**{name: _tuples(value) for name, value in occupied.items()})
    return RegionOfInterest(**{**plain, **nested})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def digest(*parts: Any) -> str:
    """A short hash of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- tiles


def _count_tiles(run: Run, plane: str) -> int:
    """Tiles of a pass that reach where voxels are wanted; where a mask decides, an estimate from `SAMPLED_TILES` of them."""
    axes, tile_grid = tiles.PLANES[plane], run.tile_grid(plane)
    wanted = run.wanted_part(Box.from_shape(run.shape)).transpose(axes)
    sections, y, x = wanted.slices
    window, depth = tile_grid.overlapping(y, x), wanted.shape[0]
    count = depth * len(window) if wanted.voxels else 0
    if not count or not (run.roi and run.roi.mask):
        return count
    if run.roi.occupied:
        return _count_occupied(run, run.roi, plane, wanted)
    sample = range(count) if count <= SAMPLED_TILES else [k * count // SAMPLED_TILES for k in range(SAMPLED_TILES)]
    needed = 0
    for k in sample:
        place = tile_grid.place(window[k % len(window)])
        z = sections.start + k // len(window)
        tile = Box((z, place[0].start, place[1].start), (z + 1, place[0].stop, place[1].stop)).intersect(wanted)
        needed += run.wants_any(tile.transpose(inverse_axes(axes)))
    return needed * count // max(1, len(sample))


def _count_occupied(run: Run, region: RegionOfInterest, plane: str, wanted: Box) -> int:
    """The tiles of the sections of ``wanted`` that reach an occupied cell of the mask; sections are looked at some at once."""
    axes, tile_grid = tiles.PLANES[plane], run.tile_grid(plane)
    sections, y, x = wanted.slices
    places = [[(axis.origin(i), axis.origin(i) + axis.size) for i in axis.overlapping(along.start, along.stop)]
              for axis, along in ((tile_grid.y, y), (tile_grid.x, x))]  # fmt: skip
    depth = -(-(sections.stop - sections.start) // COUNTED_LAYERS)
    layers = [(z, min(z + depth, sections.stop)) for z in range(sections.start, sections.stop, depth)]
    spans = [np.array(ends, np.int64).reshape(-1, 2).T for ends in (layers, *places)]
    turned = [spans[k] for k in inverse_axes(axes)]
    reached = np.moveaxis(region.count([(start, stop) for start, stop in turned]) > 0, axes, (0, 1, 2))
    return int(reached.sum(axis=(1, 2)) @ (spans[0][1] - spans[0][0]))


def redundancy(run: Run, voxels: int | None = None) -> float:
    """Voxels that go through the network, ``voxels`` or as many as planned, for each one wanted; 0 where none is.

    Tiles share voxels, blocks share tiles, and planes and flips come on top.
    """
    inferred = run.inferred_voxels if voxels is None else voxels
    return inferred / run.wanted_voxels if run.wanted_voxels else 0.0
