"""Volumes in multi-page TIFF files."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from volseg.box import Blocks, Box, Triple
from volseg.errors import UserError
from volseg.io import files, ome
from volseg.io.axes import MAX_UNNAMED_CHANNELS
from volseg.io.header import (
    CACHE_BYTES,
    Header,
    TripleNm,
    decoding,
    shape_text,
    voxel_dtype,
)

if TYPE_CHECKING:
    from volseg.io.volume import Volume


SUFFIXES = (".tif", ".tiff", ".btf", ".tf8")


def header(path: str, *, several: bool) -> Header:
    """What the headers of the file at ``path`` say; refuses several channels unless they may be read."""
    stack = pages(path)
    if stack.channels > 1 and not several:
        raise UserError(f"{path} {stack.channels_text()}")
    if stack.shape[0] == 1:
        raise UserError(f"{path} is 2-D ({shape_text(stack.shape[1:])}); give a multi-page TIFF or a folder of slices")
    return Header(
        "tiff",
        stack.shape,
        stack.dtype,
        stack.voxel_size_nm,
        stack.chunk,
        channels=stack.channels,
        binary=stack.binary,
    )


class Pages:
    """The sections of one TIFF file: where their bytes lie and how to decode them. Keeps no file open; thread-safe."""

    def __init__(self, path: str) -> None:
        import tifffile

        self.path = path
        with decoding(path), tifffile.TiffFile(path) as tif:
            with _LOGGING, _refusing_broken_chain(path):
                len(tif.pages)
            series = _only_series(tif, path)
            key = series.keyframe
            self.shape, self.channels, self.layout = _tiff_shape(series, tif, path)
            self.dtype = voxel_dtype(key.dtype, path)
            self.binary = key.dtype.kind == "b"
            self.stored = key.dtype.newbyteorder(tif.byteorder)
            self.voxel_size_nm = _tiff_nm(tif)
            self.offset = series.dataoffset  # of all sections when they lie in one piece
            self.pages = [] if self.offset is not None else list(series.pages)
            self.final = key.is_final
            self._check(key, series)
        segment = max(1, key.nbytes // max(1, len(key.dataoffsets)))
        self._cached = lru_cache(maxsize=max(1, CACHE_BYTES // segment))(self._decode)

    @property
    def chunk(self) -> Triple:
        return (1, *self.shape[1:])

    def _check(self, key: Any, series: Any) -> None:
        """Refuses what cannot be decoded, or lies beyond the end of the file."""
        size = os.path.getsize(self.path)
        if self.offset is not None:
            if self.offset + int(np.prod(series.shape, dtype=np.int64)) * self.stored.itemsize > size:
                raise UserError(
                    f"{self.path} is cut short: {size} bytes do not hold {shape_text(series.shape)} voxels; copy it again"
                )
            return
        count = self.shape[0] * (1 if self.layout == "zs" else self.channels)
        if len(self.pages) != count or len(key.shape) != 2 + (self.layout == "zs") or None in self.pages:
            raise UserError(f"{self.path} is laid out in a way volseg does not read; save it as one page per section")
        for page in self.pages:
            end = max((a + n for a, n in zip(page.dataoffsets, page.databytecounts, strict=True)), default=0)
            if end > size:
                raise UserError(
                    f"{self.path} is cut short: page {page.index} ends at byte {end} of {size}; copy it again"
                )
        if not self.final:
            self._refuse_unknown_codec(key)

    def _refuse_unknown_codec(self, key: Any) -> None:
        try:
            self._decode(0, 0)
        except Exception as error:  # tifffile has several ways to say that a codec is missing
            if not isinstance(error, ImportError) and not re.search(r"imagecodecs|COMPRESSION\.", str(error)):
                raise
            raise UserError(
                f"{self.path} is compressed with {getattr(key.compression, 'name', key.compression)}, which cannot be "
                "decoded here: pip install imagecodecs, or save it with deflate or without compression"
            ) from None

    def channels_text(self) -> str:
        """Why a file of several channels is no volume, and what to do."""
        if self.layout == "zs":
            return f"is a color image (RGB, {self.channels} samples per voxel); convert it to gray values"
        return f"has {self.channels} channels; save the wanted one alone"

    def fill(self, plane: np.ndarray, z: int, window: tuple[slice, slice], channel: int = 0) -> None:
        """``plane`` holds the voxels of section ``z`` of a channel in ``window`` (y x)."""
        page = {"zs": z, "zc": z * self.channels + channel, "cz": channel * self.shape[0] + z}[self.layout]
        sample = channel if self.layout == "zs" else 0
        if self.offset is not None:
            step = int(np.prod(self._plane, dtype=np.int64)) * self.stored.itemsize
            plane[...] = self._map(self.offset + page * step)[window][..., sample]
        elif self.final and _in_one_piece(self.pages[page]):
            plane[...] = self._map(self.pages[page].dataoffsets[0])[window][..., sample]
        else:
            self._fill_from_segments(plane, page, window, sample)

    @property
    def _plane(self) -> Triple:
        """Shape of one page, y x and samples."""
        return *self.shape[1:], self.channels if self.layout == "zs" else 1

    def _map(self, offset: int) -> np.ndarray:
        return np.memmap(self.path, self.stored, mode="r", offset=offset, shape=self._plane)

    def _fill_from_segments(self, plane: np.ndarray, z: int, window: tuple[slice, slice], sample: int) -> None:
        whole = plane.shape == self.shape[1:] and self.layout != "zs"
        decode = self._decode if whole else self._cached
        want = Box((0, window[0].start, window[1].start), (1, window[0].stop, window[1].stop))
        for i, have in self._segments(z):
            both = want.intersect(have)
            if both.voxels:
                data = decode(z, i)
                plane[both.slices_within(want)[1:]] = (
                    0 if data is None else data[both.slices_within(have)[1:]][..., sample]
                )

    def _segments(self, z: int) -> Iterator[tuple[int, Box]]:
        """Number and box of each strip or tile of page ``z``."""
        key = self.pages[z].keyframe
        size = (1, key.tilelength, key.tilewidth) if key.is_tiled else (1, key.rowsperstrip, key.imagewidth)
        return enumerate(Blocks((1, *self.shape[1:]), size))

    def _decode(self, z: int, i: int) -> np.ndarray | None:
        """Strip or tile ``i`` of page ``z``, y x and samples; None where the file leaves it out (all zero)."""
        page = self.pages[z]
        offset, count = page.dataoffsets[i], page.databytecounts[i]
        if not count:
            return None
        with files.open_binary(self.path) as file:
            file.seek(offset)
            raw = file.read(count)
        if len(raw) != count:
            raise OSError(f"strip {i} holds {len(raw)} of {count} bytes")
        data, _, _ = page.keyframe.decode(raw, i, jpegtables=page.jpegtables)
        return None if data is None else data[0]


def _in_one_piece(page: Any) -> bool:
    ends = [a + n for a, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
    return all(page.databytecounts) and ends[:-1] == list(page.dataoffsets[1:])


@lru_cache(maxsize=64)
def _cached_pages(path: str, stamp: Any) -> Pages:
    return Pages(path)


def pages(path: str) -> Pages:
    """The pages of the TIFF file at ``path``; their headers are read once, as long as the file does not change."""
    return _cached_pages(path, files.stamp(path))


_LOGGING = threading.Lock()  # tifffile's log belongs to the whole process


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def _refusing_broken_chain(path: str) -> Iterator[None]:
    """Refuses a file whose list of pages ends in the void: tifffile only logs it, and the volume would be short."""
    log, errors = logging.getLogger("tifffile"), _Errors()
    log.addHandler(errors)
    try:
        yield
    finally:
        log.removeHandler(errors)
    if errors.messages:
        raise UserError(f"{path} is cut short or corrupt: {errors.messages[0]}; copy it again")


def _only_series(tif: Any, path: str) -> Any:
    """The one stack of equal pages in a file."""
    if not len(tif.series):
        raise UserError(f"{path} has no pages; copy it again")
    if tif.series[0].is_multifile:
        raise UserError(f"{path} is one of several files of an image; save the sections in one file, or as slices")
    if tif.pages[0].dtype is None:
        raise UserError(f"{path} holds {tif.pages[0].bitspersample}-bit voxels; save them as uint8 or uint16")
    if len(tif.series) > 1:
        kinds = ", ".join(f"{shape_text(s.shape)} {s.dtype}" for s in tif.series[:3])
        raise UserError(f"{path} holds {len(tif.series)} kinds of pages ({kinds}); save the sections alone")
    return tif.series[0]


def _tiff_shape(series: Any, tif: Any, path: str) -> tuple[Triple, int, str]:
    """z y x of a stack of pages, whatever its stack axis is called; its number of channels; and how pages follow each
    other: "zc" (channels change first), "cz", or "zs" (a page holds all channels of a section)."""
    sizes = list(zip(series.get_axes(False), series.get_shape(False), strict=True))
    stack = [(axis, n) for axis, n in sizes if axis not in "YX" and n > 1]
    names = "".join(axis for axis, n in sizes if axis in "YX" or n > 1)
    lead = _tiff_channels(stack)
    depth = [n for i, (_, n) in enumerate(stack) if i != lead]
    if len(depth) > 1 or not names.endswith("YXS" if "S" in names else "YX"):
        raise UserError(
            f"{path} is {len(stack) + 2}-D ({shape_text(series.shape)}, axes {series.axes}); save one z stack of gray pages, "
            "or several channels with their axes named, such as CZYX"
        )
    sections, channels = (depth or [1])[0], 1 if lead is None else stack[lead][1]
    promised = int((tif.imagej_metadata or {}).get("images", 1)) if tif.is_imagej else 1
    if promised > max(sections * channels, len(tif.pages)):
        raise UserError(f"{path} is cut short: it promises {promised} pages and holds {len(tif.pages)}; copy it again")
    layout = "zs" if "S" in names else "cz" if lead == 0 else "zc"
    return (sections, dict(sizes)["Y"], dict(sizes)["X"]), channels, layout


def _tiff_channels(stack: list[tuple[str, int]]) -> int | None:
    """Which of the stack axes holds channels: that called C or S, else of two the only one that is short, if not T or Z."""
    named = [i for i, (axis, _) in enumerate(stack) if axis in "CS"]
    short = [i for i, (axis, n) in enumerate(stack) if axis not in "TZ" and n <= MAX_UNNAMED_CHANNELS]
    found = named or (short if len(stack) == 2 else [])
    return found[0] if len(found) == 1 else None


def _tiff_nm(tif: Any) -> TripleNm | None:
    """Voxel size z y x from OME or ImageJ metadata where all three lengths and their unit are given."""
    if tif.is_ome and tif.ome_metadata:
        return ome.tiff_voxel_size_nm(ElementTree.fromstring(tif.ome_metadata).find(".//{*}Pixels"))
    meta = (tif.imagej_metadata or {}) if tif.is_imagej else {}
    unit = ome.NM_PER_UNIT.get(str(meta.get("unit", "")).lower())
    per = [tif.pages[0].tags.valueof(name) for name in ("YResolution", "XResolution")]
    if not unit or not meta.get("spacing") or not all(per) or not all(n and d for n, d in per):
        return None
    return tuple(round(float(n), 6) for n in (meta["spacing"] * unit, *(d / n * unit for n, d in per)))


def read(volume: Volume, box: Box) -> np.ndarray:
    """The voxels of ``box``."""
    out = np.empty(box.shape, volume.dtype)
    stack = pages(volume.path)
    for z, plane in zip(range(box.start[0], box.stop[0]), out, strict=True):
        with decoding(f"page {z} of {volume.path}", box):
            stack.fill(plane, z, box.slices[1:], volume.channel)
    return out
