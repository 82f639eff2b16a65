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
    if not len(tif.series):
        raise UserError(f"{path} has no pages; copy it again")
    if tif.series[0].is_multifile:
        raise UserError(f"{path} is one of several files of an image; save the sections in one file, or as slices")
    if tif.pages[0].dtype is None:
        raise UserError(f"{path} holds {tif.pages[0].bitspersample}-bit voxels; save them as uint8 or uint16")
    stacks = _without_thumbnails(tif.series)
    first = stacks[0]
    key = first.keyframe
    if len(stacks) == 1:
        sizes = list(zip(first.get_axes(False), first.get_shape(False), strict=True))
        pages, offset = tuple(first.pages), first.dataoffset
    else:
        pages, offset = _joined(stacks, path), None
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


def _joined(series: Any, path: str) -> tuple[Any, ...]:
    """The pages of several series as those of one stack: so stacks are stored that were written page by page."""
    pages = tuple(page for one in series for page in one.pages)
    if all(page is not None and isinstance(page.index, int) for page in pages):
        pages = tuple(sorted(pages, key=lambda page: page.index))  # tifffile groups them by their compression
    kinds = {(page.shape, page.dtype, page.keyframe.photometric, page.keyframe.planarconfig) for page in pages if page}
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
