"""The tile grid and its blend. Both belong to the volume: they are functions of its plane's shape alone.

A tile is one section of the volume (with its neighboring sections as channels) cut to a size that the network takes.
Sections may lie along any axis: a pass over xz planes is a pass over the volume with y and z exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from volseg.inference.device import NUMPY, Device, is_plain
from volseg.inference.model_card import MULTIPLE
from volseg.inference.pixel_shuffle import standardized_squares

SAMPLED = 256  # blocks along an axis that are looked at where there are more
LEAST_LENGTH = 1024  # of tiles of which there are several, voxels, or half of the longest that is allowed
COSTLY_LENGTH = 30_000  # of a tile, voxels, at which a voxel of it would count twice
MOST_TWICE = (
    0.072  # of the voxels of an axis, so that less than 15 % of a plane are inferred twice, where tiles allow it
)
PLANES = {"xy": (0, 1, 2), "xz": (1, 0, 2), "yz": (2, 0, 1)}  # axes of the volume that are sections, rows and columns


@dataclass(frozen=True)
class Axis:
    """Tiles along one axis, evenly spread: each begins at the next multiple of ``step``, the last of several ends with it.

    Only a lone tile may reach past it. So tiles begin where chunks of usual sizes do, and end where boxes that people ask for
    do. Nothing grows with ``count``, so the axis of an absurdly large volume costs no more than that of a small one.

    Attributes
    ----------
    length : int
        Voxels along the axis.
    size : int
        Voxels of each tile.
    count : int
        Tiles.
    step : int
        Of which the first voxels of all tiles but the last are multiples.
    """

    length: int
    size: int
    count: int
    step: int = 1

    def origin(self, i: int) -> int:
        """The first voxel of tile ``i``."""
        last = self.length - self.size
        return min(_up(-(-i * last // (self.count - 1)), self.step), last) if i else 0

    @property
    def is_even(self) -> bool:
        """Whether each tile begins as far from the one before."""
        return self.count < 3 or (self.length - self.size) % ((self.count - 1) * self.step) == 0

    def overlapping(self, start: int, stop: int) -> range:
        """Numbers of the tiles that share a voxel with ``start:stop``.

        >>> axis(100, 64, 16).overlapping(0, 36), axis(100, 64, 16).overlapping(0, 37)
        (range(0, 1), range(0, 2))
        """
        first = self._first_from(start - self.size + 1)
        return range(first, max(first, self._first_from(stop)))

    def starting(self, start: int, stop: int) -> range:
        """Numbers of the tiles whose first voxel lies in ``start:stop``.

        >>> axis(100, 64, 16).starting(0, 36), axis(100, 64, 16).starting(1, 37)
        (range(0, 1), range(1, 2))
        """
        first = self._first_from(start)
        return range(first, max(first, self._first_from(stop)))

    def _first_from(self, voxel: int) -> int:
        """The first tile whose origin is ``voxel`` or later; ``count`` where there is none."""
        i = 0
        if self.count > 1:  # origins lie on a line but for a step
            i = min(max(0, voxel * (self.count - 1) // (self.length - self.size)), self.count)
        while i > 0 and self.origin(i - 1) >= voxel:
            i -= 1
        while i < self.count and self.origin(i) < voxel:
            i += 1
        return i

    def longest_reach(self, step: int) -> int:
        """Voxels under the tiles that begin in a block ``step`` long: the most of `SAMPLED` blocks.

        >>> axis(100, 64, 16).longest_reach(30), axis(1000, 64, 16).longest_reach(50)
        (64, 112)
        """
        count = -(-self.length // step)
        blocks = range(count) if count <= SAMPLED else [k * count // SAMPLED for k in range(SAMPLED)]
        return max(self._reach(self.starting(k * step, min((k + 1) * step, self.length))) for k in blocks)

    def _reach(self, tiles: range) -> int:
        return min(self.origin(tiles[-1]) + self.size, self.length) - self.origin(tiles[0]) if tiles else 0

    def weights(self, i: int) -> np.ndarray:
        """Blending weight along tile ``i``, float32: a ramp where it shares voxels with a neighbor, else 1."""
        weight = np.ones(self.size, np.float32)
        if i > 0:
            shared = self.origin(i - 1) + self.size - self.origin(i)
            weight[:shared] = _ramp(shared)
        if i + 1 < self.count:
            shared = self.origin(i) + self.size - self.origin(i + 1)
            weight[self.size - shared :] = np.minimum(weight[self.size - shared :], _ramp(shared)[::-1])
        return weight


def _ramp(n: int) -> np.ndarray:
    return ((np.arange(n, dtype=np.float32) + np.float32(1)) / np.float32(n + 1)).astype(np.float32)


def axis(length: int, tile: int, overlap: int, multiple: int = MULTIPLE) -> Axis:
    """Tiles of at most ``tile`` voxels that share at least ``overlap`` and cover ``length``.

    Their size is a ``multiple``, at least one, so one or two tiles more than needed are often fewer voxels together. Of the
    numbers of tiles that keep to `MOST_TWICE`, or of all where none does, the one for which these hold the fewest voxels. A
    voxel counts for more in longer tiles, since these take more memory and, on a CPU, more time.

    >>> axis(1024, 1280, 64)
    Axis(length=1024, size=1024, count=1, step=1)
    >>> [axis(20000, 1600, 64, multiple=64).origin(i) for i in (1, 2, 11, 12)]
    [1536, 3072, 16896, 18400]
    """
    longest = max(multiple, tile // multiple * multiple)
    if length <= longest:
        return Axis(length, _up(length, multiple), 1)
    if overlap >= longest:
        raise ValueError(f"overlap {overlap} leaves no room in tiles of {longest}; use overlap < tile")
    least = min(LEAST_LENGTH, longest // 2)

    def fewest(longest: int) -> int:
        return -(-(length - overlap) // (longest - overlap))

    def least_size(count: int) -> int:
        return min(longest, _up(-(-(length + (count - 1) * overlap) // count), multiple))

    def cost(count: int) -> tuple[bool, bool, float]:
        size = least_size(count)
        twice = count * size > (1 + MOST_TWICE) * length
        return size <= least, twice, count * size * (COSTLY_LENGTH + size)

    count = min({fewest(n) for n in range(longest, max(least, overlap), -multiple)}, key=cost)
    size = least_size(count)
    least_apart, most_apart = (length - size) // (count - 1), -(-(length - size) // (count - 1))
    step = next(n for n in _halves(multiple) if n <= least_apart and _up(most_apart, n) <= size - overlap)
    return Axis(length, size, count, step)


def _halves(n: int) -> Iterator[int]:
    """``n``, its half and so on as long as these are whole numbers, and 1."""
    while n > 1:
        yield n
        n = n // 2 if n % 2 == 0 else 1
    yield 1


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class TileWindow(Sequence):
    """Some rows and columns of a `Grid`: its tiles (row, column) in raster order, none of which is stored.

    >>> list(TileWindow(range(1, 3), range(2)))
    [(1, 0), (1, 1), (2, 0), (2, 1)]
    """

    rows: range
    columns: range

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        row, column = divmod(i % len(self), len(self.columns))
        return self.rows[row], self.columns[column]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return product(self.rows, self.columns)


@dataclass(frozen=True)
class Grid:
    """Tiles of every section of a volume."""

    y: Axis
    x: Axis

    @property
    def size(self) -> tuple[int, int]:
        """Shape of a tile, y x."""
        return self.y.size, self.x.size

    def overlapping(self, y: slice, x: slice) -> TileWindow:
        """The tiles, in raster order, that share a voxel with part of the plane."""
        return TileWindow(self.y.overlapping(y.start, y.stop), self.x.overlapping(x.start, x.stop))

    def starting(self, y: slice, x: slice) -> TileWindow:
        """The tiles, in raster order, whose first voxel lies in part of the plane."""
        return TileWindow(self.y.starting(y.start, y.stop), self.x.starting(x.start, x.stop))

    def place(self, tile: tuple[int, int]) -> tuple[slice, slice]:
        """Where a tile lies in the plane; a lone tile may reach past the end."""
        y, x = self.y.origin(tile[0]), self.x.origin(tile[1])
        return slice(y, y + self.y.size), slice(x, x + self.x.size)


def grid(plane: tuple[int, int], tile: int, overlap: int, multiple: int = MULTIPLE) -> Grid:
    """The tile grid of a volume whose sections have the shape ``plane``, for a network that takes multiples of so many voxels.

    >>> grid((100, 96), 1280, 64).size, grid((100, 96), 1280, 64, multiple=64).size
    ((128, 96), (128, 128))
    """
    y, x = (axis(length, tile, overlap, multiple) for length in plane)
    return Grid(y, x)


def cut(plane: np.ndarray, y: slice, x: slice) -> np.ndarray:
    """``plane[..., y, x]``, mirrored past its end."""
    part = plane[..., y, x]
    out = np.empty((*part.shape[:-2], y.stop - y.start, x.stop - x.start), part.dtype)
    rows, columns = part.shape[-2:]
    out[..., :rows, :columns] = part
    _mirror(out, rows, columns)
    return out


def _mirror(out: Any, rows: int, columns: int) -> None:
    """``out`` (..., y, x), whose first ``rows`` and ``columns`` are there, is mirrored past them as often as it takes."""
    while columns < out.shape[-1]:
        step = min(columns, out.shape[-1] - columns)
        out[..., :rows, columns : columns + step] = _flipped(out[..., :rows, columns - step : columns], (-1,))
        columns += step
    while rows < out.shape[-2]:
        step = min(rows, out.shape[-2] - rows)
        out[..., rows : rows + step, :] = _flipped(out[..., rows - step : rows, :], (-2,))
        rows += step


def _flipped(array: Any, axes: tuple[int, ...]) -> Any:
    """An array, as a view, or a tensor, which has no views that go backwards, flipped along ``axes``."""
    return np.flip(array, axes) if isinstance(array, np.ndarray) else array.flip(axes)


@dataclass(frozen=True)
class Slab:
    """The voxels under some tiles, sections (y, x) in a list, array or tensor, whose first voxel lies at ``start``.

    ``around``: sections that a tile sees on each side of its own; ``depth``: sections that there are; ``nothing``: gray values
    of what shows nothing, see `padding`; ``across``: the volume is stored in other sections, of which each is a row here.
    """

    voxels: Any
    start: tuple[int, int, int]
    around: int
    depth: int
    nothing: tuple[float, ...] = ()
    across: bool = False

    def sections(self, z: int, place: tuple[slice, slice]) -> list:
        """What a tile of section ``z`` sees, as views that end where the plane does; beyond all sections, the last."""
        y, x = (slice(s.start - o, s.stop - o) for s, o in zip(place, self.start[1:], strict=True))
        return [self.voxels[n - self.start[0]][y, x] for n in self.near(z)]

    def near(self, z: int) -> list[int]:
        """The sections that a tile of section ``z`` sees."""
        return [min(max(n, 0), self.depth - 1) for n in range(z - self.around, z + self.around + 1)]

    def cut(
        self, z: int, place: tuple[slice, slice], out: Any, scale: tuple[float, float], device: Device = NUMPY
    ) -> None:
        """``out`` (sections, y, x) holds that tile, standardized by ``scale`` and mirrored past the plane's end."""
        for channel, section in zip(out, self.sections(z, place), strict=True):
            rows, columns = section.shape
            device.standardize_into(section, channel[:rows, :columns], *scale)
            _mirror(channel, rows, columns)

    def cut_squares(self, z: int, place: tuple[slice, slice], scale: tuple[float, float]) -> np.ndarray | None:
        """That tile as `pixel_shuffle` makes it, bfloat16; None where it reaches past the plane's end."""
        near = [self.voxels[n - self.start[0]] for n in self.near(z)]
        rows, columns = (stop - start for start, stop in ((s.start, s.stop) for s in place))
        corner = place[0].start - self.start[1], place[1].start - self.start[2]
        if corner[0] + rows > near[0].shape[0] or corner[1] + columns > near[0].shape[1] or not is_plain(near[0]):
            return None
        out = np.empty((rows // 2, columns // 2, 4 * len(near)), np.uint16)
        standardized_squares(near, corner, scale, out)
        return out


def is_constant(sections: Sequence[np.ndarray]) -> bool:
    """Whether all voxels of some sections (y, x) are equal; most that are not are told by a few of them."""
    first = sections[0][0, 0]
    return all((s[::61, ::61] == first).all() for s in sections) and all((s == first).all() for s in sections)


class Blend:
    """Adds up the tiles of one section over a window of the plane, in the order they come (it must be raster order).

    A voxel's sums see the same tiles in the same order whatever the window, so windows agree on the voxels they share.
    A tile that never comes counts as 0 everywhere, one that lies outside the window for nothing.
    """

    def __init__(self, channels: int, grid: Grid, y: slice, x: slice, device: Device = NUMPY) -> None:
        self.grid, self.y, self.x, self.device = grid, y, x, device
        shape = (y.stop - y.start, x.stop - x.start)
        lone = grid.y.count * grid.x.count == 1
        self.takes_uint8 = lone and shape == (grid.y.length, grid.x.length)  # nothing is blended then
        self.alone = lone and shape == grid.size  # a tile's probabilities are the sums then
        self.total = device.zeros((channels, *shape))
        self.weight = device.zeros(shape)
        self.rows, self.columns = (
            {i: device.put(axis.weights(i)) for i in axis.overlapping(s.start, s.stop)}
            for axis, s in ((grid.y, y), (grid.x, x))
        )
        for tile in grid.overlapping(y, x):
            source, target = self._common(tile)
            rows, columns = self._weights(tile, source)
            self.weight[target] += rows[:, None] * columns[None, :]

    def add(self, tile: tuple[int, int], probability: Any) -> None:
        """Adds a tile's probabilities, float32 (channels, y, x); uint8, as `quantize` makes them, if ``takes_uint8``."""
        if self.takes_uint8 and probability.dtype == np.uint8:
            self.total = self.part(tile, probability)
        elif tile[0] in self.rows and tile[1] in self.columns:
            y, x = self._common(tile)[0]
            self._add(tile, probability, (y.start, x.start))

    def part(self, tile: tuple[int, int], probability: Any) -> Any:
        """What of a tile's probabilities lies in the window, as `add_part` takes it."""
        return probability[(slice(None), *self._common(tile)[0])]

    def add_part(self, tile: tuple[int, int], part: Any) -> None:
        """The same for a tile of which only the `part` in the window is at hand."""
        self._add(tile, part, (0, 0))

    def _add(self, tile: tuple[int, int], probability: Any, start: tuple[int, int]) -> None:
        """Adds what lies in the window of a tile's probabilities, where that begins at ``start``."""
        if self.alone:
            self.total = probability
            return
        source, (y, x) = self._common(tile)
        self.device.add(self.total, (y.start, x.start), probability, start, *self._weights(tile, source))

    def _weights(self, tile: tuple[int, int], source: tuple[slice, slice]) -> tuple[Any, Any]:
        """Blending weights of a part of a tile, float32: of its rows and of its columns, to be multiplied."""
        return self.rows[tile[0]][source[0]], self.columns[tile[1]][source[1]]

    def _common(self, tile: tuple[int, int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """The voxels that a tile shares with the window, in the tile and in the window."""
        y, x = self.grid.place(tile)
        ty, tx = (slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in ((y, self.y), (x, self.x)))
        source = (slice(ty.start - y.start, ty.stop - y.start), slice(tx.start - x.start, tx.stop - x.start))
        target = (slice(ty.start - self.y.start, ty.stop - self.y.start),
                  slice(tx.start - self.x.start, tx.stop - self.x.start))  # fmt: skip
        return source, target

    def quantize(self, out: Any) -> None:
        """``out``, uint8, holds the blended probabilities, 255 for 1, halves round up. The next section begins anew."""
        if self.total.dtype == np.uint8:
            out[...] = self.total
            return
        self.device.quantize(self.total, self.weight, out)

    def mean(self) -> Any:
        """The blended probabilities, float32 (channels, y, x); the next section begins at 0."""
        blended = self.total / self.weight
        self.total[...] = 0
        return blended


# ---------------------------------------------------------------- several looks at one voxel


@dataclass(frozen=True)
class Dihedral:
    """One of the eight ways to lay a tile: transposed or not, then flipped along rows and columns or not."""

    transpose: bool = False
    flip_y: bool = False
    flip_x: bool = False

    def apply(self, tiles: Any) -> Any:
        """``tiles`` (..., y, x) laid this way."""
        return self._flip(tiles.swapaxes(-1, -2) if self.transpose else tiles)

    def undo(self, tiles: Any) -> Any:
        """What `apply` was given."""
        tiles = self._flip(tiles)
        return tiles.swapaxes(-1, -2) if self.transpose else tiles

    def _flip(self, tiles: Any) -> Any:
        return _flipped(tiles, tuple(axis for axis, flip in ((-2, self.flip_y), (-1, self.flip_x)) if flip))


def dihedrals(count: int) -> list[Dihedral]:
    """``count`` ways to lay a tile, always in this order: 1 as it is, 4 with its flips, 8 with those of its transpose."""
    return [Dihedral(*way) for way in product((False, True), repeat=3)][:count]


def mean_over_dihedrals(forward: Callable[[Any], Any], batch: Any, ways: Sequence[Dihedral]) -> Any:
    """The mean of ``forward`` over a batch (B, sections, y, x) laid in each of the ``ways``, each result laid back.

    Float32, added up in the order of ``ways``; their number is a power of two, so the division is exact.
    """
    return sum(way.undo(forward(way.apply(batch))) for way in ways) * (1 / len(ways))


def mean_over_passes(stored: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of uint8 arrays, rounded to the nearest; halves round up. Integers throughout.

    >>> mean_over_passes([np.uint8([0, 255]), np.uint8([0, 255]), np.uint8([1, 253])]).tolist()
    [0, 254]
    """
    total = sum(part.astype(np.uint16) for part in stored)
    return ((2 * total + len(stored)) // (2 * len(stored))).astype(np.uint8)
