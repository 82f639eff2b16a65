"""Sections through a network: tiles are cut from a slab, predicted, and blended section by section.

Runs, validation in training and the comparison of a quantized form all predict with this, so that they see the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from heapq import merge
from itertools import islice
from operator import itemgetter
from typing import Any

import numpy as np

from volseg.inference.backends import Forward, imap, takes_squares, uint8
from volseg.inference.device import Call
from volseg.inference.padding import Padding
from volseg.inference.tiles import Blend, Grid, Slab, is_constant

TileKey = tuple[int, tuple[int, int]]  # section, and the tile's row and column in the grid
Timer = Callable[[str], AbstractContextManager]


def varying_tiles(slab: Slab, grid: Grid, tiles: Iterable[TileKey]) -> Iterator[TileKey]:
    """Yield the tiles that are not constant in all sections that they see; ``slab`` holds an array.

    A constant tile shows nothing, and counts as 0: whether it is constant depends on the volume alone.
    """
    return ((z, tile) for z, tile in tiles if not is_constant(slab.sections(z, grid.place(tile))))


def blend_sections(
    network: Call, slab: Slab, tiles: Iterable[TileKey], blend: Blend, *, scale: tuple[float, float], batch: int = 1,
    threads: int = 1, timed: Timer = nullcontext, parts: Iterable[tuple[TileKey, Any]] = (),
    give: Callable[[TileKey, Any], None] = lambda key, probability: None, as_uint8: bool = False,
    source: Slab | None = None, lost: Callable[[int], None] = lambda z: None,
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """Yield the number of each section, and how many tiles it had here, once ``blend`` holds them all.

    The caller takes the sums of a section from ``blend`` before it asks for the next. A section without tiles is left out.

    Parameters
    ----------
    network
        Takes standardized tiles (batch, sections, y, x) float32 and gives probabilities (batch, heads, y, x) float32,
        where the arrays of ``blend.device`` lie.
    slab
        The voxels under the tiles, on ``blend.device``.
    tiles
        By section and in raster order.
    blend
        Its grid says where tiles lie.
    scale
        What is taken from a voxel, and what it is multiplied by then, see `normalization.scale`.
    batch
        Tiles in one call; the last call is filled up with zeros.
    threads
        Calls under way at once.
    timed
        Gives the context in which work counts as "cut" or "blend".
    parts
        Of tiles that were predicted elsewhere: what of them lies in the window of ``blend``, by section and in raster order.
    give
        Is told of each tile that was predicted here.
    as_uint8
        Whether the caller only takes `Blend.quantize`: a tile of which nothing is blended is made as uint8 then.
    source
        The same voxels in arrays, where ``slab`` lies elsewhere: of a tile that shows nothing in a part, see `padding`.
    lost
        Is told of sections of which something was lost.
    """
    grid, device = blend.grid, blend.device
    forward = (blend.takes_uint8 and as_uint8 and uint8(network)) or network
    arrays = source or slab
    padding = Padding(arrays.nothing, arrays.across)
    something: dict[TileKey, Any] = {}  # of tiles under way, the voxels that show something where not all do

    def batches() -> Iterator[tuple[list[TileKey], Any]]:
        remaining = iter(tiles)
        while True:
            with timed("cut"):
                keys = list(islice(remaining, batch))
                rows = cut(keys) if keys else None
            if rows is None:
                return
            yield keys, rows

    def shown(z: int, tile: tuple[int, int]) -> Slab:
        place = grid.place(tile)
        found = (
            padding.shown(arrays.sections(z, place), [(n, tile) for n in arrays.near(z)]) if arrays.nothing else None
        )
        if found is None:
            return slab
        sections, shows = found
        if padding.lost:
            lost(z)
        whole = np.ones(grid.size, bool)
        whole[: shows.shape[0], : shows.shape[1]] = shows
        something[z, tile] = device.put(whole)
        start = z - slab.around, place[0].start, place[1].start
        sections = [np.ascontiguousarray(section) for section in sections]
        return Slab(device.put_sections(sections), start, slab.around, z + slab.around + 1)

    def cut(keys: list[TileKey]) -> Any:
        seen = [(shown(z, tile), z, grid.place(tile)) for z, tile in keys]
        if batch == 1 and takes_squares(network):
            ((one, z, place),) = seen
            squares = one.cut_squares(z, place, scale)
            if squares is not None:
                return squares[None]
        make = device.empty if len(keys) == batch else device.zeros
        rows = make((batch, 2 * slab.around + 1, *grid.size))
        for row, (one, z, place) in zip(rows, seen, strict=False):
            one.cut(z, place, row, scale, device)
        return rows

    def predicted() -> Iterator[tuple[TileKey, Any, bool]]:
        for keys, probability in imap(forward, batches(), threads):
            for key, one in zip(keys, probability, strict=False):
                inside = something.pop(key, None)
                yield key, one if inside is None else one * inside, True

    section, count = None, 0
    elsewhere = ((key, part, False) for key, part in parts)
    for (z, tile), one, here in merge(predicted(), elsewhere, key=itemgetter(0)):
        if section is not None and section != z:
            yield section, count
            count = 0
        with timed("blend"):
            if here:
                blend.add(tile, one)
                give((z, tile), one)
            else:
                blend.add_part(tile, one)
        section, count = z, count + here
    if section is not None:
        yield section, count


def predict_sections(
    forward: Forward, slab: Slab, sections: Sequence[int], *, grid: Grid, heads: int, scale: tuple[float, float]
) -> np.ndarray:
    """Return the probabilities of whole sections.

    Parameters
    ----------
    forward
        Takes standardized tiles (1, sections, y, x) float32 and gives probabilities (1, heads, y, x) float32.
    slab
        Whole planes of the volume, in an array.
    sections
        Numbers of the sections, ascending.
    grid
        The tiles of a plane.
    heads
        Channels of the network.
    scale
        See `blend_sections`.

    Returns
    -------
    numpy.ndarray
        float32 (heads, sections, y, x).
    """
    out = np.zeros((heads, len(sections), *slab.voxels.shape[1:]), np.float32)
    for i, blend in _blended(forward, slab, sections, grid, heads, scale):
        out[:, i] = blend.mean()
    return out


def predict_sections_uint8(
    forward: Forward, slab: Slab, sections: Sequence[int], *, grid: Grid, heads: int, scale: tuple[float, float]
) -> np.ndarray:
    """Return the probabilities of whole sections as a run stores them: as `predict_sections`, but uint8, 255 for 1."""
    out = np.zeros((heads, len(sections), *slab.voxels.shape[1:]), np.uint8)
    for i, blend in _blended(forward, slab, sections, grid, heads, scale, as_uint8=True):
        blend.quantize(out[:, i])
    return out


def _blended(
    forward: Forward, slab: Slab, sections: Sequence[int], grid: Grid, heads: int, scale: tuple[float, float],
    as_uint8: bool = False,
) -> Iterator[tuple[int, Blend]]:  # fmt: skip
    """The index of each section that shows something, and the blend that holds its tiles."""
    index = {z: i for i, z in enumerate(sections)}
    plane = tuple(slice(0, n) for n in slab.voxels.shape[1:])
    blend = Blend(heads, grid, *plane)
    tiles = varying_tiles(slab, grid, ((z, tile) for z in sections for tile in grid.overlapping(*plane)))
    for z, _ in blend_sections(forward, slab, tiles, blend, scale=scale, as_uint8=as_uint8):
        yield index[z], blend
