"""How the pages of a TIFF file make up the sections and channels of a volume."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

from volseg.box import Triple
from volseg.errors import UserError
from volseg.io import ome
from volseg.io.axes import MAX_UNNAMED_CHANNELS
from volseg.io.header import check_shape, shape_text

# Tags of width, length, bits, compression, photometric, order of bits, samples, rows, planes, predictor, tiles, extra, format
STORAGE_TAGS = {256, 257, 258, 259, 262, 266, 277, 278, 284, 317, 322, 323, 338, 339}
COLOR_MAP = 320


@dataclass(frozen=True)
class Layout:
    """Where the pages of a stack are, and what each holds."""

    shape: Triple
    channels: int
    times: int
    stack: (
        str  # what changes from page to page, slowest first, such as "tzc"; channels may be samples of a page instead
    )
    samples_are: (
        str  # "": one value a voxel; "last": side by side; "first": one plane after the other; "rows": see below
    )
    pages: tuple[Any, ...]  # of tifffile, in the order stored; empty where all voxels lie in one piece
    offset: int | None  # of that piece
    keyframe: Any

    # "rows": a page is a row of voxels, x and their channels

    @property
    def samples(self) -> int:
        """Values of a voxel that a page holds side by side."""
        return self.channels if self.samples_are in ("last", "rows") else 1

    @property
    def page_count(self) -> int:
        """Pages of the whole stack."""
        rows = self.shape[1] if self.samples_are == "rows" else 1
        return prod(self._sizes[letter] for letter in self.stack) * rows

    @property
    def _sizes(self) -> dict[str, int]:
        return {"t": self.times, "z": self.shape[0], "c": self.channels}

    def _section(self, z: int, channel: int, time: int) -> int:
        """The place of a section in the order of the stack."""
        place, at = 0, {"t": time, "z": z, "c": channel}
        for letter in self.stack:
            place = place * self._sizes[letter] + at[letter]
        return place

    def page(self, z: int, channel: int, time: int) -> int:
        """The number of the page that holds section ``z`` of a channel; of its first row where a page is one row."""
        return self._section(z, channel, time) * (self.shape[1] if self.samples_are == "rows" else 1)

    def plane(self, z: int, channel: int, time: int) -> int:
        """The number of the plane, y x and its samples, where planes follow each other in one piece."""
        section = self._section(z, channel, time)
        return section * self.channels + channel if self.samples_are == "first" else section


def layout(tif: Any, path: str, records: list[logging.LogRecord]) -> Layout:
    """The one stack of equal pages in an open TIFF file; refuses any other content.

    ``records`` are those of :func:`logged`. Where the list of pages ends in the void, tifffile only logs it, and the volume
    would be short: refused.
    """
    before = len(records)
    len(tif.pages)
    broken = next((record.getMessage() for record in records[before:] if record.levelno >= logging.ERROR), "")
    if broken:
        raise UserError(f"{path} is cut short or corrupt: {broken}; copy it again")
    series = _series(tif)
    if series is not None and not len(series):
        raise UserError(f"{path} has no pages; copy it again")
    if series and series[0].is_multifile:
        raise UserError(f"{path} is one of several files of an image; save the sections in one file, or as slices")
    if tif.pages[0].dtype is None:
        raise UserError(f"{path} holds {tif.pages[0].bitspersample}-bit voxels; save them as uint8 or uint16")
    stacks = _without_thumbnails(series or ())
    if stacks and (lost := sum(page is None for one in stacks for page in one.pages)):
        raise UserError(
            f"{path} lacks {lost} of the pages that its OME metadata list; copy it again, or export it anew"
        )
    if len(stacks) == 1 and _alike(tif, stacks[0]):
        (first,) = stacks
        key, pages, offset = first.keyframe, tuple(first.pages), first.dataoffset
        sizes = list(zip(first.get_axes(False), first.get_shape(False), strict=True))
    else:
        alike = len(stacks) > 1 and all(_alike(tif, one) for one in stacks)
        pages, offset = _joined(stacks, path) if alike else _reread(tif, stacks, path), None
        key = stacks[0].keyframe if alike else pages[0]
        sizes = [("I", len(pages)), *zip(key.axes, key.shape, strict=True)]
    shape, (channels, times), stack, samples_are = _order(sizes, key, f"{path} is")
    check_shape((*shape, channels, times), path)
    found = Layout(shape, channels, times, stack, samples_are, () if offset is not None else pages, offset, key)
    if offset is None and len(pages) != found.page_count:
        raise UserError(f"{path} is laid out in a way volseg does not read; save it as one page per section")
    _check_promise(tif, found, path)
    return found


def _without_thumbnails(series: Any) -> list[Any]:
    """The series of an image's own pages: others may hold smaller pictures of them, and say so."""
    return [one for one in series if not one.keyframe.is_reduced] or list(series)


def _series(tif: Any) -> list[Any] | None:
    """What tifffile takes for the stacks of a file; None where it finds pages that are not stored as it took them to be."""
    try:
        return list(tif.series)
    except RuntimeError:
        return None


def _alike(tif: Any, series: Any) -> bool:
    """Whether all pages are stored like the one that tifffile, which looks at a few of many, holds for their pattern."""
    offsets = {page.offset for page in series.pages if page.offset and isinstance(page.index, int)}
    pattern = _storage(tif, series.keyframe.offset)
    return all(_storage(tif, offset) == pattern for offset in sorted(offsets))


def _storage(tif: Any, offset: int) -> set[bytes]:
    """The entries of the directory at ``offset`` that tell how the voxels of a page are stored."""
    file, tiff, order = tif.filehandle, tif.tiff, "little" if tif.byteorder == "<" else "big"
    file.seek(offset)
    listed = file.read(tiff.tagsize * int.from_bytes(file.read(tiff.tagnosize), order))
    entries = [listed[at : at + tiff.tagsize] for at in range(0, len(listed), tiff.tagsize)]
    found = {entry for entry in entries if int.from_bytes(entry[:2], order) in STORAGE_TAGS}
    for entry in entries:
        if int.from_bytes(entry[:2], order) == COLOR_MAP:
            file.seek(int.from_bytes(entry[4 + tiff.offsetsize :], order))
            found.add(file.read(2 * min(int.from_bytes(entry[4 : 4 + tiff.offsetsize], order), 3 << 16)))
    return found


def _reread(tif: Any, series: list[Any], path: str) -> tuple[Any, ...]:
    """The pages of a stack, each of which says itself how it is stored."""
    pages = tuple(page for page in map(tif.pages.get, range(len(tif.pages))) if not page.is_reduced)
    kinds = [(page.bitspersample, *_kind(page)) for page in pages]
    odd = next((page.index for page, kind in zip(pages, kinds, strict=True) if kind != kinds[0]), None)
    if odd is not None:
        raise UserError(
            f"{path} holds several kinds of pages: page {odd} is not like page {pages[0].index}; save the sections alone"
        )
    if any(len(one.get_axes(True).replace(one.keyframe.axes, "")) > 1 for one in series):
        raise UserError(f"{path} has pages that are stored in different ways; save it anew, all pages alike")
    return pages


def _kind(page: Any) -> tuple:
    """What pages of one stack have in common."""
    key = page.keyframe
    colors = b"" if key.colormap is None else key.colormap.tobytes()
    return page.shape, page.dtype, key.photometric, key.planarconfig, colors


def _joined(series: Any, path: str) -> tuple[Any, ...]:
    """The pages of several series as those of one stack: so stacks are stored that were written page by page."""
    pages = tuple(page for one in series for page in one.pages)
    if all(page is not None and isinstance(page.index, int) for page in pages):
        pages = tuple(sorted(pages, key=lambda page: page.index))  # tifffile groups them by their compression
    kinds = {_kind(page) for page in pages if page}
    named = any(axis in "CS" for one in series for axis in one.get_axes(True).replace(one.keyframe.axes, ""))
    whole = all(len(one.pages) == prod(one.shape) // prod(one.keyframe.shape) for one in series)
    if len(kinds) > 1 or named or not whole or None in pages:
        shapes = ", ".join(f"{shape_text(one.shape)} {one.dtype}" for one in series[:3])
        raise UserError(f"{path} holds {len(series)} kinds of pages ({shapes}); save the sections alone")
    return pages


def _order(sizes: list[tuple[str, int]], key: Any, is_: str) -> tuple[Triple, tuple[int, int], str, str]:
    """z y x of a stack, whatever its stack axis is called; channels and times; and how pages follow each other."""
    stored = [(axis, n) for axis, n in sizes if axis in "YX" or n > 1]
    names = "".join(axis for axis, _ in stored)
    if _has_rows_as_pages(stored, key):
        *stack, (_, y), (_, x), (_, channels) = stored
        if len(stack) <= 1:
            return (stack[0][1] if stack else 1, y, x), (channels, 1), "z", "rows"
    if names.endswith(("YX", "YXS", "SYX")) and not _ambiguous(stored):
        samples = "last" if names.endswith("YXS") else "first" if names.endswith("SYX") else ""
        stack = [(axis, n) for axis, n in stored if axis not in "YX"]
        lead = _channel_axis(stack)
        depth = [i for i in range(len(stack)) if i != lead]
        instants = [i for i in depth if stack[i][0] == "T"] if len(depth) == 2 else []
        depth = [i for i in depth if i not in instants]
        if len(depth) <= 1:
            leads = [] if lead is None else [lead]
            letters = [(leads, "" if samples else "c"), (instants, "t"), (depth, "z")]
            channels, times, z = (stack[places[0]][1] if places else 1 for places, _ in letters)
            named = {place: letter for places, letter in letters for place in places}
            order = "".join(named[i] for i in range(len(stack)))
            return (z, dict(stored)["Y"], dict(stored)["X"]), (channels, times), order, samples
    raise UserError(
        f"{is_} {len(stored)}-D ({shape_text([n for _, n in stored])}, axes {names}); save one z stack of gray pages, "
        "or several channels with their axes named, such as CZYX"
    )


def _has_rows_as_pages(stored: list[tuple[str, int]], key: Any) -> bool:
    """Whether the last axis holds channels: it is called C or, of four axes without names, it is short and the first is not."""
    if len(stored) < 4 or tuple(n for _, n in stored[-2:]) != tuple(key.shape):
        return False
    names = "".join(axis for axis, _ in stored)
    if names.endswith("YXC"):
        return True
    short = [n <= MAX_UNNAMED_CHANNELS for _, n in stored]
    return len(stored) == 4 and not set(names) & set("TZCS") and short[-1] and not short[0]


def _ambiguous(stored: list[tuple[str, int]]) -> bool:
    """Whether the first or the last of four axes without names may hold channels."""
    names, lengths = zip(*stored, strict=True)
    return len(stored) == 4 and not set(names) & set("TZCS") and max(lengths[0], lengths[-1]) <= MAX_UNNAMED_CHANNELS


def _channel_axis(stack: list[tuple[str, int]]) -> int | None:
    """Which of the stack axes holds channels: that called C or S, else of two the only one that is short, if not T or Z."""
    named = [i for i, (axis, _) in enumerate(stack) if axis in "CS"]
    short = [i for i, (axis, n) in enumerate(stack) if axis not in "TZ" and n <= MAX_UNNAMED_CHANNELS]
    candidates = named or (short if len(stack) == 2 else [])
    return candidates[0] if len(candidates) == 1 else None


def _check_promise(tif: Any, found: Layout, path: str) -> None:
    """Refuses a file of ImageJ that holds fewer pages than it says."""
    promised = ome.number((tif.imagej_metadata or {}).get("images", 1)) if tif.is_imagej else 1
    if (promised or 1) > max(found.shape[0] * found.channels * found.times, len(tif.pages)):
        raise UserError(
            f"{path} is cut short: it promises {promised:g} pages and holds {len(tif.pages)}; copy it again"
        )


_LOGGING = threading.Lock()  # tifffile's log belongs to the whole process


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def logged(library: str = "tifffile") -> Iterator[list[logging.LogRecord]]:
    """What a library logs inside, which then does not reach the terminal."""
    log, handler = logging.getLogger(library), _Records()
    with _LOGGING:
        propagate, log.propagate = log.propagate, False
        log.addHandler(handler)
        try:
            yield handler.records
        finally:
            log.removeHandler(handler)
            log.propagate = propagate
