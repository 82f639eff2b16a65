"""What of a tile shows nothing: padding around an image, and sections that were lost.

A network sees black padding beside tissue, or a black section between two others, as something dark, and says so with
certainty. So a tile is shown to it as if these were not there, and what it says of padding is 0. Which voxels they are depends
on the tile's own voxels alone, so on the volume and its tile grid, and not on blocks.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from operator import is_

import numpy as np
from numba import njit

SQUARE = 32  # voxels a side: of one value throughout, no square of tissue is
LINE = 128  # voxels: neither is a line of so many
MOST_KEPT = 64  # sections of tiles of which it is remembered what shows nothing
FARTHEST = np.iinfo(np.int32).max


def values_of_nothing(dtype: str | np.dtype, padding: Sequence[float]) -> tuple[float, ...]:
    """The gray values that padding and lost sections may have: ``padding``, and the ends of a type of whole numbers.

    >>> values_of_nothing("uint8", (0.0,)), values_of_nothing("float32", (0.0, 7.5)), values_of_nothing("uint8", ())
    ((0.0, 255.0), (0.0, 7.5), ())
    """
    kind = np.dtype(dtype)
    ends = (np.iinfo(kind).min, np.iinfo(kind).max) if kind.kind in "ui" and padding else ()
    return tuple(sorted({*map(float, padding), *map(float, ends)}))


def empty_voxels(section: np.ndarray, values: Sequence[float]) -> np.ndarray | None:
    """The voxels of a section (y, x) that lie in a square of `SQUARE` voxels a side that all have one of ``values``.

    What is not seen, beyond its ends, counts as having them, too. Of a section of one value throughout, whichever it is, these
    are all voxels.

    Returns
    -------
    bool (y, x), or None where there are none.

    Examples
    --------
    >>> section = np.ones((100, 100), np.uint8)
    >>> section[:, 90:] = section[10, 10] = 0
    >>> int(empty_voxels(section, (0.0, 255.0)).sum())
    1000
    """
    first = section[0, 0]
    if (section[:: SQUARE // 2, :: SQUARE // 2] == first).all() and (section == first).all():
        return np.ones(section.shape, bool)
    found = None
    for value in values:
        if _may_hold_square(section, value):
            same = np.pad(section == value, SQUARE, constant_values=True)
            squares = _in_squares(same, SQUARE)[SQUARE:-SQUARE, SQUARE:-SQUARE]
            found = squares if found is None else np.logical_or(found, squares)
    return found if found is not None and found.any() else None


def lost_voxels(sections: Sequence[np.ndarray], values: Sequence[float]) -> list[np.ndarray | None]:
    """Of sections (y, x) one after the other, the squares that show nothing in one, but something in one of those beside it.

    Returns
    -------
    For each, bool (y, x), or None where there are none.
    """
    empty = [empty_voxels(section, values) for section in sections]
    beside = [empty[:1] + empty[:-1], empty[1:] + empty[-1:]]
    return [_lost(*three) for three in zip(empty, *beside, strict=True)]


def _lost(own: np.ndarray | None, before: np.ndarray | None, behind: np.ndarray | None) -> np.ndarray | None:
    """What `lost_voxels` gives of a section, from what shows nothing in it and in those beside it."""
    if own is None:
        return None
    lost = whole_squares(own if before is None or behind is None else own & ~(before & behind))
    return lost if lost.any() else None


def whole_squares(marked: np.ndarray) -> np.ndarray:
    """What of ``marked`` (bool, y x) lies in whole squares: not lone voxels in corners, nor what an edge that moves leaves."""
    return _in_squares(np.ascontiguousarray(marked), min(SQUARE, *marked.shape))


def _may_hold_square(section: np.ndarray, value: float) -> bool:
    """Whether some voxels of a section, so many that each square holds four beside each other, allow that there is one."""
    rows, columns = (np.append(np.arange(0, n - 1, SQUARE // 2), n - 1) for n in section.shape)
    some = np.pad(section[np.ix_(rows, columns)] == value, 1, constant_values=True)
    return bool((some[:-1, :-1] & some[1:, :-1] & some[:-1, 1:] & some[1:, 1:]).any())


@njit(cache=True, nogil=True)
def _in_squares(same, side):
    """The opening of ``same`` (bool y x) by a square, in four passes whatever its side."""
    height, width = same.shape
    out = np.zeros((height, width), np.bool_)
    above = np.zeros(width, np.int32)  # rows that end here and hold ``side`` voxels in a line that ends here
    for y in range(height):
        before = 0
        for x in range(width):
            before = before + 1 if same[y, x] else 0
            above[x] = above[x] + 1 if before >= side else 0
            out[y, x] = above[x] >= side
    below = np.zeros(width, np.int32)
    for y in range(height - 1, -1, -1):
        behind = 0
        for x in range(width - 1, -1, -1):
            below[x] = side if out[y, x] else max(below[x] - 1, 0)
            behind = side if below[x] > 0 else max(behind - 1, 0)
            out[y, x] = behind > 0
    return out


def mirrored(section: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """The section (y, x) with its ``empty`` voxels filled by what lies as far behind the nearest end of the others.

    The nearest end in its row or its column; of voxels that have none in either, one that was filled before.

    >>> mirrored(np.array([[0, 0, 5, 6, 7, 0]]), np.array([[True, True, False, False, False, True]])).tolist()
    [[6, 5, 5, 6, 7, 7]]
    """
    if section.dtype == np.float16 or not section.dtype.isnative:  # which numba does not know
        plain = section.astype(np.float32 if section.dtype == np.float16 else section.dtype.newbyteorder("="))
        return mirrored(plain, empty).astype(section.dtype)
    out, known = section.copy(), ~empty
    far = np.multiply(empty, FARTHEST, dtype=np.int32)
    _mirror_rows(out, known, far)
    _mirror_rows(out.T, known.T, far.T)
    filled = far < FARTHEST
    if not filled.all():
        _mirror_rows(out.T, filled.T, far.T)
    return out


@njit(cache=True, nogil=True)
def _mirror_rows(values, known, far):
    """Each voxel that is not ``known`` takes what is mirrored at the nearest end of a known part of its row, if that is nearer
    than what it took before, ``far`` away."""
    height, width = values.shape
    for y in range(height):
        x = 0
        first = stop = 0  # of the known part before
        while x < width:
            if known[y, x]:
                first = x
                while x < width and known[y, x]:
                    x += 1
                stop = x
                continue
            begin = x
            while x < width and not known[y, x]:
                x += 1
            end = x  # of the gap
            behind = end
            while behind < width and known[y, behind]:
                behind += 1
            before_length, behind_length = stop - first, behind - end
            for k in range(begin, end):
                left = k - begin + 1 if before_length else width + 1
                right = end - k if behind_length else width + 1
                away = min(left, right)
                if away > width or away >= far[y, k]:
                    continue
                far[y, k] = away
                if left <= right:
                    step = (away - 1) % (2 * before_length)
                    values[y, k] = values[y, stop - 1 - min(step, 2 * before_length - 1 - step)]
                else:
                    step = (away - 1) % (2 * behind_length)
                    values[y, k] = values[y, end + min(step, 2 * behind_length - 1 - step)]


def without_lost_rows(section: np.ndarray, values: Sequence[float]) -> tuple[np.ndarray, np.ndarray | None]:
    """A section (y, x) across those that the volume is stored in, of which each is one row here.

    Returns
    -------
    The section, in which lines of at least `LINE` voxels (or a whole row) of one of ``values`` are replaced by the row before,
    where they lie between rows that are none; and the voxels of other such lines (bool, y x), None where there are none. What
    is not seen, beyond its ends, counts as such lines.

    Examples
    --------
    >>> section = np.full((7, 200), 9, np.uint8)
    >>> section[[1, 4, 5]] = section[-1] = 0
    >>> seen, empty = without_lost_rows(section, (0.0,))
    >>> seen[:, 0].tolist(), empty.all(axis=1).tolist()
    ([9, 9, 9, 9, 0, 0, 0], [False, False, False, False, True, True, True])
    """
    length = min(LINE, section.shape[1])
    lines = np.zeros(section.shape, bool)
    for value in values:
        some = section[:, :: max(1, length // 2)] == value
        if some.shape[1] > 1 and (some[:, 1:] & some[:, :-1]).any():
            _mark_lines(section == value, length, lines)
    if not lines.any():
        return section, None
    beyond = np.pad(lines, ((1, 1), (0, 0)), constant_values=True)
    lost = lines & ~beyond[:-2] & ~beyond[2:]
    if lost.any():
        section = np.where(lost, np.roll(section, 1, axis=0), section)
        lines &= ~lost
    return section, lines if lines.any() else None


@njit(cache=True, nogil=True)
def _mark_lines(same, length, out):
    """``out`` is True where ``same`` is in ``length`` voxels or more beside each other in a row."""
    for y in range(same.shape[0]):
        run = 0
        for x in range(same.shape[1] + 1):
            if x < same.shape[1] and same[y, x]:
                run += 1
                continue
            if run >= length:
                for k in range(x - run, x):
                    out[y, k] = True
            run = 0


class Padding:
    """What of tiles shows nothing, of whose sections some are remembered: each is seen by several tiles.

    >>> black, gray = np.zeros((64, 64), np.uint8), np.arange(100, 164, dtype=np.uint8) + np.zeros((64, 1), np.uint8)
    >>> sections, something = Padding((0.0,)).shown([gray, black, gray], [(0,), (1,), (2,)])
    >>> [int(section[0, 0]) for section in sections], bool(something.all())  # a section that was lost
    ([100, 100, 100], True)
    >>> bool(Padding((0.0,)).shown([gray, black, black], [(0,), (1,), (2,)])[1].any())  # the end of the tissue
    False
    """

    def __init__(self, values: Sequence[float], across: bool = False) -> None:
        self.values = values
        self.across = across  # the tiles lie across the sections that the volume is stored in
        self.lost = False  # whether of the last tile's own section something was lost
        self.kept: dict[Hashable, np.ndarray | None] = {}  # packed

    def shown(
        self, sections: Sequence[np.ndarray], keys: Sequence[Hashable]
    ) -> tuple[list[np.ndarray], np.ndarray] | None:
        """What the sections (y, x) of a tile, its own in the middle, are to be seen as, and which voxels show something.

        Padding is seen as the tissue beside it, mirrored. Where a section beside its own shows nothing, its own is seen again,
        as beyond the end of a volume. Where its own does, but not those on both sides, it was lost: the one before is seen.
        ``keys`` name the sections of this and of other tiles. None: all are to be seen as they are.
        """
        self.lost = False
        lines: list[np.ndarray | None] = [None] * len(sections)
        stored = sections
        if self.across:
            sections, lines = zip(*(without_lost_rows(section, self.values) for section in stored), strict=True)
        empty = [self._empty(*one) for one in zip(keys, sections, lines, strict=True)]
        if all(one is None for one in empty) and all(map(is_, sections, stored)):
            return None
        middle = len(sections) // 2
        seen, own = sections[middle], empty[middle]
        something = np.ones(seen.shape, bool)
        if own is not None:
            before, behind = (empty[min(max(n, 0), 2 * middle)] for n in (middle - 1, middle + 1))
            none = [one for one in (before, behind) if one is not None]
            something = ~np.logical_and(own, np.logical_or.reduce(none)) if none else something
            lost = own & something
            if middle and lost.any():
                seen = np.where(lost, sections[middle - 1], seen)
                self.lost = bool(whole_squares(lost).any())
            if something.any():
                seen = mirrored(seen, ~something)
        return [
            seen if n == middle else section if one is None else np.where(one, seen, section)
            for n, (section, one) in enumerate(zip(sections, empty, strict=True))
        ], something

    def _empty(self, key: Hashable, section: np.ndarray, lines: np.ndarray | None) -> np.ndarray | None:
        """The voxels of a section that show nothing, those of ``lines`` among them."""
        if key in self.kept:
            packed = self.kept[key]
            return None if packed is None else np.unpackbits(packed, axis=1, count=section.shape[1]).view(bool)
        found = empty_voxels(section, self.values)
        if lines is not None:
            found = lines if found is None else found | lines
        if len(self.kept) == MOST_KEPT:
            del self.kept[next(iter(self.kept))]
        self.kept[key] = None if found is None else np.packbits(found, axis=1)
        return found
