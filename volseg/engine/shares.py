"""Who infers which tile, so that each goes through the network once: the block in which its first voxel lies.

A tile reaches into the blocks below it and to the right of it. What of its probabilities lies there is handed over: stored
beside the run, until the block that it belongs to has taken it. Blocks that hand over go first, but nothing hangs on it: a
block infers itself what it does not find, and comes to the same bytes, since a tile's probabilities depend on the volume alone.

      block 0        block 1
    +-------------+-------------+      tile 2 begins in block 0, which infers it and hands over the part marked =
    | tile 1   tile 2===|       |
    +-------------+-------------+
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from volseg.box import Blocks, Box, inverse_axes
from volseg.engine.block_tables import TileParts
from volseg.engine.blocks import SPAN
from volseg.engine.run import Run
from volseg.errors import DamagedFileError
from volseg.inference import tiles
from volseg.inference.sections import TileKey
from volseg.inference.tiles import TileWindow

Plane = tuple[slice, slice]  # part of a section: rows, columns


@dataclass(frozen=True)
class Share:
    """What block ``i`` of a pass infers, takes from others and hands to them. Axes are those of the pass.

    run, plane     the pass
    box            the block, in the axes of the volume
    grid, i        the blocks, and which one; None where a box stands alone
    """

    run: Run
    plane: str
    box: Box
    grid: Blocks | None = None
    i: int = 0

    @classmethod
    def of_block(cls, run: Run, plane: str, i: int) -> Share:
        grid = run.grid_of(plane)
        return cls(run, plane, grid[i], grid, i)

    @property
    def axes(self) -> tuple[int, int, int]:
        return tiles.PLANES[self.plane]

    @cached_property
    def tiles(self) -> tiles.Grid:
        return self.run.tile_grid(self.plane)

    @cached_property
    def part(self) -> Box:
        """The part of the block outside of which no voxel is wanted."""
        return self.run.wanted_part(self.box).transpose(self.axes)

    @cached_property
    def own(self) -> TileWindow:
        """The tiles that the block infers: those that begin in it, and reach where voxels are wanted."""
        if self.grid is None:
            return self.tiles.overlapping(*self.part.slices[1:])
        return self._reaching(self._begun, self.reach)

    @cached_property
    def _begun(self) -> TileWindow:
        """The tiles that begin in the block, and may reach where voxels are wanted."""
        _, y, x = self.box.transpose(self.axes).slices
        return self._reaching(self.tiles.starting(y, x), self._wanted)

    def _reaching(self, window: TileWindow, box: Box) -> TileWindow:
        """Those of some tiles that reach into a box."""
        if not box.voxels:
            return TileWindow(range(0), range(0))
        reached = self.tiles.overlapping(*box.slices[1:])
        return TileWindow(_common(window.rows, reached.rows), _common(window.columns, reached.columns))

    @cached_property
    def _wanted(self) -> Box:
        """What is wanted of the volume."""
        return self.run.wanted_part(Box.from_shape(self.run.shape)).transpose(self.axes)

    @cached_property
    def reach(self) -> Box:
        """The part that is wanted of the block and of what its own tiles cover, in its sections."""
        if self.grid is None:
            return self.part
        box = _bounds([self.box.transpose(self.axes), *self._covered(self._begun)])
        return self.run.wanted_part(self.of_volume(self._wanted.intersect(box))).transpose(self.axes)

    def _covered(self, window: TileWindow) -> list[Box]:
        """The box of some tiles in the block's sections; none where there are no tiles."""
        if not window:
            return []
        sections = self.box.transpose(self.axes).slices[0]
        first, last = self.tiles.place(window[0]), self.tiles.place(window[-1])
        return [Box((sections.start, first[0].start, first[1].start), (sections.stop, last[0].stop, last[1].stop))]

    def of_volume(self, box: Box) -> Box:
        """A box of the pass in the axes of the volume."""
        return box.transpose(inverse_axes(self.axes))

    # ---- what is handed over

    @cached_property
    def givers(self) -> dict[int, list[tuple[int, int]]]:
        """By earlier block, the tiles of it that reach into the wanted part of this one, in raster order."""
        if self.grid is None or not self.part.voxels:
            return {}
        found: dict[int, list[tuple[int, int]]] = {}
        own = self.own
        for tile in self.tiles.overlapping(*self.part.slices[1:]):
            if not (tile[0] in own.rows and tile[1] in own.columns):
                y, x = (place.start for place in self.tiles.place(tile))
                place = self.of_volume(Box((self.part.start[0], y, x), (self.part.start[0] + 1, y + 1, x + 1)))
                found.setdefault(self.grid.overlapping(place)[0], []).append(tile)
        return found

    @cached_property
    def takers(self) -> dict[int, tuple[Box, TileWindow]]:
        """By later block into which own tiles reach: its wanted part, and those tiles."""
        found: dict[int, tuple[Box, TileWindow]] = {}
        if self.grid is None:
            return found
        for box in self._covered(self.own):
            for i in self.grid.overlapping(self.of_volume(box)):
                part = self.run.wanted_part(self.grid[i]).transpose(self.axes)
                if i != self.i and part.voxels:
                    window = self._reaching(self.own, part)
                    if window:
                        found[i] = part, window
        return found


def _common(a: range, b: range) -> range:
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))


def _bounds(boxes: list[Box]) -> Box:
    """The smallest box that holds all of some boxes."""
    z, y, x = (min(axis) for axis in zip(*(box.start for box in boxes), strict=True))
    dz, dy, dx = (max(axis) for axis in zip(*(box.stop for box in boxes), strict=True))
    return Box((z, y, x), (dz, dy, dx))


def bounds_of_tiles(grid: tiles.Grid, keys: Iterable[tuple[int, int]]) -> Plane:
    """The rows and columns under some tiles."""
    places = [grid.place(tile) for tile in keys]
    rows, columns = zip(*places, strict=True)
    return (
        slice(min(place.start for place in rows), max(place.stop for place in rows)),
        slice(min(place.start for place in columns), max(place.stop for place in columns)),
    )


# ---------------------------------------------------------------- parts on their way


class HandedOver:
    """The parts that a block hands to others, kept until all of some sections are there."""

    def __init__(self, share: Share, key: str) -> None:
        self.share, self.key = share, key
        self.parts: dict[int, list[tuple[TileKey, np.ndarray]]] = {i: [] for i in share.takers}

    def add(self, key: TileKey, i: int, part: np.ndarray) -> None:
        """A part for block ``i``."""
        self.parts[i].append((key, part))

    def store(self, span: int) -> None:
        """All parts of a span of sections were added."""
        for i, parts in self.parts.items():
            own = [part for part in parts if part[0][0] // SPAN == span]
            self.share.run.layout.tile_parts.keep(TileParts.packed(own), self.key, self.share.i, i, span)
            parts[: len(own)] = []


class Taken:
    """The parts that others handed to a block; what is ``missing`` it must infer itself."""

    def __init__(self, share: Share, key: str, spans: range) -> None:
        self.share, self.key, self.spans = share, key, spans
        self.loaded: tuple[int, list[tuple[TileKey, np.ndarray]]] = (-1, [])
        tables = share.run.layout.tile_parts
        self.missing = {
            (span, tile)
            for giver, own in share.givers.items()
            for span in spans
            if not tables.exists(key, giver, share.i, span)
            for tile in own
        }

    def parts(self, sections: range) -> Iterator[tuple[TileKey, np.ndarray]]:
        """The parts of some sections, by section and in raster order."""
        for span in range(sections.start // SPAN, -(-sections.stop // SPAN)):
            if self.loaded[0] != span:
                self.loaded = span, self._load_all(span)
            yield from (item for item in self.loaded[1] if item[0][0] in sections)

    def _load_all(self, span: int) -> list[tuple[TileKey, np.ndarray]]:
        givers = [giver for giver, own in self.share.givers.items() if (span, own[0]) not in self.missing]
        found = [item for giver in givers for item in self._load(giver, span).unpacked()]
        return sorted(found, key=lambda item: item[0])

    def _load(self, giver: int, span: int) -> TileParts:
        tables, index = self.share.run.layout.tile_parts, (self.key, giver, self.share.i, span)
        try:
            return tables.load(*index)
        except DamagedFileError as error:
            tables.remove(*index)  # the next try infers these tiles itself
            raise OSError(f"{self.share.run.out}/{error.keys[0]} {error.state}") from None

    def remove(self) -> None:
        """The block has all that it took in its own probabilities."""
        tables = self.share.run.layout.tile_parts
        for giver in self.share.givers:
            for span in self.spans:
                if (span, self.share.givers[giver][0]) not in self.missing:
                    tables.remove(self.key, giver, self.share.i, span)
