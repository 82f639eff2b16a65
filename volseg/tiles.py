"""The tile grid and its blend. Both belong to the volume: they are functions of its plane's shape alone.

A tile is one section of the volume (with its neighbouring sections as channels) cut to a size that the network takes.
Sections may lie along any axis: a pass over xz planes is a pass over the volume with y and z exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

MULTIPLE = 32  # the encoder halves a tile five times
PLANES = {"xy": (0, 1, 2), "xz": (1, 0, 2), "yz": (2, 0, 1)}  # axes of the volume that are sections, rows and columns


@dataclass(frozen=True)
class Axis:
    """Tiles along one axis: ``count`` origins, each tile ``size`` long; only a lone tile may reach past the end."""

    length: int
    size: int
    origins: tuple[int, ...]

    def meeting(self, start: int, stop: int) -> list[int]:
        """Numbers of the tiles that share a voxel with ``start:stop``."""
        return [i for i, o in enumerate(self.origins) if o < stop and o + self.size > start]

    def weights(self, i: int) -> np.ndarray:
        """Blending weight along tile ``i``, float32: a ramp where it shares voxels with a neighbour, else 1."""
        weight = np.ones(self.size, np.float32)
        if i > 0:
            shared = self.origins[i - 1] + self.size - self.origins[i]
            weight[:shared] = _ramp(shared)
        if i + 1 < len(self.origins):
            shared = self.origins[i] + self.size - self.origins[i + 1]
            weight[self.size - shared :] = np.minimum(weight[self.size - shared :], _ramp(shared)[::-1])
        return weight


def _ramp(n: int) -> np.ndarray:
    return ((np.arange(n, dtype=np.float32) + np.float32(1)) / np.float32(n + 1)).astype(np.float32)


def axis(length: int, tile: int, overlap: int) -> Axis:
    """Evenly spread tiles of at most ``tile`` voxels (a multiple of 32) that share at least ``overlap`` and cover ``length``.

    >>> axis(1024, 1280, 64)
    Axis(length=1024, size=1024, origins=(0,))
    >>> axis(100, 64, 16).origins
    (0, 36)
    """
    longest = max(MULTIPLE, tile // MULTIPLE * MULTIPLE)
    if length <= longest:
        return Axis(length, _up(length), (0,))
    if overlap >= longest:
        raise ValueError(f"overlap {overlap} leaves no room in tiles of {longest}; use overlap < tile")
    count = -(-(length - overlap) // (longest - overlap))
    size = min(longest, _up(-(-(length + (count - 1) * overlap) // count)))
    return Axis(length, size, tuple(round(i * (length - size) / (count - 1)) for i in range(count)))


def _up(n: int) -> int:
    return -(-n // MULTIPLE) * MULTIPLE


@dataclass(frozen=True)
class Grid:
    """Tiles of every section of a volume."""

    y: Axis
    x: Axis

    @property
    def size(self) -> tuple[int, int]:
        """Shape of a tile, y x."""
        return self.y.size, self.x.size

    def meeting(self, y: slice, x: slice) -> list[tuple[int, int]]:
        """The tiles, in raster order, that share a voxel with part of the plane."""
        return [(i, j) for i in self.y.meeting(y.start, y.stop) for j in self.x.meeting(x.start, x.stop)]

    def place(self, tile: tuple[int, int]) -> tuple[slice, slice]:
        """Where a tile lies in the plane; a lone tile may reach past the end."""
        y, x = self.y.origins[tile[0]], self.x.origins[tile[1]]
        return slice(y, y + self.y.size), slice(x, x + self.x.size)

    def weights(self, tile: tuple[int, int]) -> np.ndarray:
        """Blending weights of a tile, float32 y x."""
        return self.y.weights(tile[0])[:, None] * self.x.weights(tile[1])[None, :]


def grid(plane: tuple[int, int], tile: int, overlap: int) -> Grid:
    """The tile grid of a volume whose sections have the shape ``plane``."""
    return Grid(axis(plane[0], tile, overlap), axis(plane[1], tile, overlap))


def cut(plane: np.ndarray, y: slice, x: slice) -> np.ndarray:
    """``plane[..., y, x]``, mirrored past its end."""
    part = plane[..., y, x]
    past = [(0, 0)] * (part.ndim - 2) + [
        (0, s.stop - s.start - n) for s, n in zip((y, x), part.shape[-2:], strict=True)
    ]
    return np.pad(part, past, mode="symmetric") if any(p[1] for p in past) else part


def is_constant(tile: np.ndarray) -> bool:
    """Whether all voxels of a tile (sections, y, x) are equal; most that are not are told by a few of them."""
    first = tile[0, 0, 0]
    return bool((tile[:, ::61, ::61] == first).all() and (tile == first).all())


class Blend:
    """Adds up the tiles of one section over a window of the plane, in the order they come (it must be raster order).

    A voxel's sums see the same tiles in the same order whatever the window, so windows agree on the voxels they share.
    A tile that never comes counts as 0 everywhere.
    """

    def __init__(self, channels: int, grid: Grid, y: slice, x: slice) -> None:
        self.grid, self.y, self.x = grid, y, x
        shape = (y.stop - y.start, x.stop - x.start)
        self.total = np.zeros((channels, *shape), np.float32)
        self.weight = np.zeros(shape, np.float32)
        for tile in grid.meeting(y, x):
            source, target = self._common(tile)
            self.weight[target] += grid.weights(tile)[source]

    def add(self, tile: tuple[int, int], probability: np.ndarray) -> None:
        """Adds a tile's probabilities, float32 (channels, y, x)."""
        source, target = self._common(tile)
        self.total[(slice(None), *target)] += probability[(slice(None), *source)] * self.grid.weights(tile)[source]

    def _common(self, tile: tuple[int, int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """The voxels that a tile shares with the window, in the tile and in the window."""
        y, x = self.grid.place(tile)
        ty, tx = (slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in ((y, self.y), (x, self.x)))
        source = (slice(ty.start - y.start, ty.stop - y.start), slice(tx.start - x.start, tx.stop - x.start))
        target = (slice(ty.start - self.y.start, ty.stop - self.y.start),
                  slice(tx.start - self.x.start, tx.stop - self.x.start))  # fmt: skip
        return source, target

    def quantise(self) -> np.ndarray:
        """The blended probabilities as uint8, 255 for 1, halves round up; the next section begins at 0."""
        blended = np.divide(self.total, self.weight, out=self.total)
        np.clip(blended, 0, 1, out=blended)
        blended *= np.float32(255)
        blended += np.float32(0.5)
        out = blended.astype(np.uint8)
        self.total[:] = 0
        return out


# ---------------------------------------------------------------- several looks at one voxel


@dataclass(frozen=True)
class Turn:
    """One of the eight ways to lay a tile: transposed or not, then flipped along rows and columns or not."""

    transpose: bool = False
    flip_y: bool = False
    flip_x: bool = False

    def apply(self, tiles: np.ndarray) -> np.ndarray:
        """``tiles`` (..., y, x) laid this way, as a view."""
        return self._flip(tiles.swapaxes(-1, -2) if self.transpose else tiles)

    def undo(self, tiles: np.ndarray) -> np.ndarray:
        """What `apply` was given, as a view."""
        tiles = self._flip(tiles)
        return tiles.swapaxes(-1, -2) if self.transpose else tiles

    def _flip(self, tiles: np.ndarray) -> np.ndarray:
        return tiles[..., :: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]


def turns(count: int) -> list[Turn]:
    """``count`` ways to lay a tile, always in this order: 1 as it is, 4 with its flips, 8 with those of its transpose."""
    return [Turn(*way) for way in product((False, True), repeat=3)][:count]


def mean_of_turns(forward: Callable[[np.ndarray], np.ndarray], batch: np.ndarray, ways: Sequence[Turn]) -> np.ndarray:
    """The mean of ``forward`` over a batch (B, sections, y, x) laid in each of the ``ways``, each result laid back.

    Float32, added up in the order of ``ways``; their number is a power of two, so the division is exact.
    """
    total = np.float32(0)
    for way in ways:
        total = total + way.undo(forward(np.ascontiguousarray(way.apply(batch))))
    return total * np.float32(1 / len(ways))


def mean_of_passes(stored: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of uint8 arrays, rounded to the nearest; halves round up. Integers throughout.

    >>> mean_of_passes([np.uint8([0, 255]), np.uint8([0, 255]), np.uint8([1, 253])]).tolist()
    [0, 254]
    """
    total = sum(part.astype(np.uint16) for part in stored)
    return ((2 * total + len(stored)) // (2 * len(stored))).astype(np.uint8)
