"""Volumes in multi-page TIFF files."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg.box import Blocks, Box
from volseg.errors import UserError, printable
from volseg.io import files, mapping, ome
from volseg.io.filling import filling, undecodable, zeroed
from volseg.io.header import (
    CACHE_BYTES,
    Header,
    TripleNm,
    decoding,
    decoding_room,
    shape_text,
    voxel_dtype,
)
from volseg.io.tiff_layout import layout, logged

if TYPE_CHECKING:
    from volseg.io.volume import Volume

SUFFIXES = (".tif", ".tiff", ".btf", ".tf8")
WHITE_IS_ZERO, PALETTE = 0, 3  # photometric interpretations
CHOOSE = "choose one with --channel (input.channel, counted from 0), or save the wanted one alone"
CONVERT = "convert it to gray values, or choose one with --channel (input.channel)"


def header(path: str, *, several: bool) -> Header:
    """What the headers of the file at ``path`` say; refuses several channels unless they may be read."""
    stack = open_stack(path)
    if stack.channels > 1 and not several:
        raise UserError(f"{path} {stack.channels_text()}")
    if stack.shape[0] == 1:
        raise UserError(f"{path} is 2-D ({shape_text(stack.shape[1:])}); give a multi-page TIFF or a folder of slices")
    return Header(
        "tiff",
        stack.shape,
        stack.dtype,
        stack.voxel_size_nm,
        (1, *stack.shape[1:]),
        channels=stack.channels,
        times=stack.layout.times,
        binary=stack.binary,
        notes=stack.notes,
        size_notes=stack.size_notes,
    )


class Stack:
    """The sections of one TIFF file: where their bytes lie and how to decode them. Keeps no file open; thread-safe."""

    def __init__(self, path: str) -> None:
        self.path = path
        with decoding(path), files.open_binary(path) as file, logged() as records, _parsed(file, path) as tif:
            _refuse_entities(tif, path)
            self.layout = layout(tif, path, records)
            key = self.layout.keyframe
            self.shape, self.channels = self.layout.shape, self.layout.channels
            self.dtype = voxel_dtype(key.dtype, path)
            self.binary = key.dtype.kind == "b"
            self.stored = key.dtype.newbyteorder(tif.byteorder)
            self.highest, self.notes = _highest_of_inverted(key, path)
            self.grays, palette = _grays_of_palette(key, path)
            self.notes += palette
            self.voxel_size_nm, self.size_notes = _voxel_size_nm(tif, path, self.shape[0])
            self.segment_bytes = _segment_bytes(key)
            self._check()
        if records:
            self.notes = (*self.notes, printable(f"{path} is odd: {records[0].getMessage()[:200]}"))
        self._cached = lru_cache(maxsize=max(1, CACHE_BYTES // self.segment_bytes))(self._decode)

    def _check(self) -> None:
        """Refuses what cannot be decoded, or lies beyond the end of the file."""
        size = files.size(self.path)
        if self.layout.offset is not None:
            if self.layout.offset + prod(self.shape) * self.channels * self.layout.times * self.stored.itemsize > size:
                raise UserError(
                    f"{self.path} is cut short: {size} bytes do not hold {shape_text(self.shape)} voxels; copy it again"
                )
            return
        for page in self.layout.pages:
            count = len(self._grid(page)) * (self.channels if self.layout.samples_are == "first" else 1)
            if min(len(page.dataoffsets), len(page.databytecounts)) < count:
                raise UserError(
                    f"{self.path} is damaged: page {page.index} lists {len(page.dataoffsets)} of its {count} pieces; "
                    "copy it again"
                )
            end = max((a + n for a, n in zip(page.dataoffsets, page.databytecounts, strict=False)), default=0)
            if end > size:
                raise UserError(
                    f"{self.path} is cut short: page {page.index} ends at byte {end} of {size}; copy it again"
                )
        if not self.layout.keyframe.is_final:
            self._refuse_unknown_codec()

    def _refuse_unknown_codec(self) -> None:
        try:
            self._decode(0, 0)
        except Exception as error:  # tifffile has several ways to say that a codec is missing
            if not isinstance(error, ImportError) and not re.search(r"imagecodecs|COMPRESSION\.", str(error)):
                return  # this strip is damaged: reading it will say so
            codec = self.layout.keyframe.compression
            raise UserError(
                f"{self.path} is compressed with {getattr(codec, 'name', codec)}, which cannot be decoded here: "
                "pip install imagecodecs, or save it with deflate or without compression"
            ) from None

    def channels_text(self) -> str:
        """Why a file of several channels is no volume, and what to do."""
        if self.layout.samples_are in ("last", "first"):
            rgb = "RGB, " if self.channels == 3 else ""
            return f"is a color image ({rgb}{self.channels} samples per voxel); {CONVERT}"
        return f"has {self.channels} channels; {CHOOSE}"

    def fill(
        self, plane: np.ndarray, z: int, window: tuple[slice, slice], channel: int = 0, time: int = 0,
        bad: list[Box] | None = None,
    ) -> None:  # fmt: skip
        """``plane`` holds the voxels of section ``z`` of a channel in ``window`` (y x), as gray values are meant.

        Where there is a list ``bad``, strips and tiles that cannot be decoded are added to it, and 0.
        """
        sample = channel if self.layout.samples > 1 else 0
        page, layer = self.layout.page(z, channel, time), channel if self.layout.samples_are == "first" else 0
        if self.layout.offset is not None:
            self._fill_from_map(plane, self.layout.offset, self.layout.plane(z, channel, time), window, sample)
        elif self.layout.samples_are == "rows":
            for row, y in zip(plane, range(window[0].start, window[0].stop), strict=True):
                self._fill_from_segments(row[None], page + y, (slice(0, 1), window[1]), sample, bad=bad, y=y)
        elif (first := _start_of_one_piece(self.layout.pages[page])) is not None:
            self._fill_from_map(plane, first, layer, window, sample)
        else:
            self._fill_from_segments(plane, page, window, sample, layer, bad=bad)
        if self.highest is not None:
            np.subtract(self.highest, plane, out=plane)
        if self.grays is not None:
            plane[...] = self.grays[plane]
        want = Box((0, window[0].start, window[1].start), (1, window[0].stop, window[1].stop))
        zeroed(plane[None], want, {("", box) for box in bad or ()})

    @property
    def in_one_piece(self) -> bool:
        """Whether all voxels lie one after the other in a local file."""
        return self.layout.offset is not None and not files.is_remote(self.path)

    def fill_box(self, out: np.ndarray, box: Box, channel: int, time: int) -> None:
        """``out`` holds the voxels of ``box``, where all lie in one piece, as gray values are meant."""
        first, second = (self.layout.plane(z, channel, time) for z in (box.start[0], box.start[0] + 1))
        stop = self.layout.plane(box.stop[0] - 1, channel, time) + 1
        mapped = mapping.mapping(self.path)
        planes = mapped.array((stop, *self.shape[1:], self.layout.samples), self.stored, self.layout.offset)
        sample = channel if self.layout.samples > 1 else 0
        mapped.copy(planes[(slice(first, stop, second - first), *box.slices[1:], sample)], out)
        if self.highest is not None:
            np.subtract(self.highest, out, out=out)
        if self.grays is not None:
            out[...] = self.grays[out]

    def _fill_from_map(
        self, plane: np.ndarray, offset: int, number: int, window: tuple[slice, slice], sample: int
    ) -> None:
        """From bytes as they lie in the file: plane ``number`` behind ``offset``."""
        shape = (*self.shape[1:], self.layout.samples)
        offset += number * prod(shape) * self.stored.itemsize
        if files.is_remote(self.path):
            rows, row = window[0], prod(shape[1:]) * self.stored.itemsize
            raw = files.read_range(self.path, offset + rows.start * row, (rows.stop - rows.start) * row)
            stored = np.frombuffer(raw, self.stored).reshape(-1, *shape[1:])
            plane[...] = stored[:, window[1], sample]
            return
        mapped = mapping.mapping(self.path)
        mapped.copy(mapped.array(shape, self.stored, offset)[window][..., sample], plane)

    def _fill_from_segments(
        self, plane: np.ndarray, page: int, window: tuple[slice, slice], sample: int, layer: int = 0,
        bad: list[Box] | None = None, y: int = 0,
    ) -> None:  # fmt: skip
        """From the strips or tiles of a page; ``layer`` counts the samples that follow each other in it.

        ``y`` is the row of the section at which the page begins: see `fill` for ``bad``.
        """
        grid = self._grid(self.layout.pages[page])
        whole = plane.shape == self.shape[1:] and self.layout.samples == 1
        decode = self._decode if whole else self._cached
        want = Box((0, window[0].start, window[1].start), (1, window[0].stop, window[1].stop))
        for i in grid.overlapping(want):
            have = grid[i]
            both = want.intersect(have)
            try:
                data = decode(page, layer * len(grid) + i)
            except Exception as error:  # decoders of damaged files raise anything
                if bad is None or not undecodable(error):
                    raise
                data, (_, top, left), (_, bottom, right) = None, have.start, have.stop
                bad.append(Box((0, top + y, left), (1, bottom + y, right)))
            plane[both.slices_within(want)[1:]] = 0 if data is None else data[both.slices_within(have)[1:]][..., sample]

    def _grid(self, page: Any) -> Blocks:
        """The strips or tiles of a page, y x; of a page that is a row of voxels, x alone."""
        key = page.keyframe
        size = (1, key.tilelength, key.tilewidth) if key.is_tiled else (1, key.rowsperstrip, key.imagewidth)
        if self.layout.samples_are == "rows":
            return Blocks((1, 1, self.shape[2]), (1, 1, size[1]))
        return Blocks((1, *self.shape[1:]), size)

    def _decode(self, page: int, i: int) -> np.ndarray | None:
        """Strip or tile ``i`` of a page, y x and samples; None where the file leaves it out (all zero)."""
        stored = self.layout.pages[page]
        offset, count = stored.dataoffsets[i], stored.databytecounts[i]
        if not count:
            return None
        raw = files.read_range(self.path, offset, count)
        if len(raw) != count:
            raise OSError(f"strip {i} holds {len(raw)} of {count} bytes")
        with decoding_room(self.segment_bytes, f"a strip of {self.path}"):
            data, _, _ = stored.keyframe.decode(raw, i, jpegtables=stored.jpegtables)
        if data is None:
            return None
        return data[0].transpose(2, 0, 1) if self.layout.samples_are == "rows" else data[0]


def _parsed(file: Any, path: str) -> Any:
    """The headers of an open TIFF file."""
    import tifffile

    return tifffile.TiffFile(file, name=os.path.basename(path)) if files.is_remote(path) else tifffile.TiffFile(path)


def _refuse_entities(tif: Any, path: str) -> None:
    """Refuses XML that declares entities, which OME never does: a few lines of them stand for gigabytes."""
    if "<!ENTITY" in str(tif.pages.first.description):
        raise UserError(
            f"{path} has metadata that declare entities, which OME-XML never does: they are damaged, or an attack"
        )


def _start_of_one_piece(page: Any) -> int | None:
    """Where the voxels of a page begin, if they lie there one after the other as they are."""
    ends = [a + n for a, n in zip(page.dataoffsets, page.databytecounts, strict=False)]
    joined = all(page.databytecounts) and ends[:-1] == list(page.dataoffsets[1:])
    return page.dataoffsets[0] if page.keyframe.is_final and joined else None


def _segment_bytes(key: Any) -> int:
    """Bytes that a strip or tile decodes to."""
    shape = (
        (key.tilelength, key.tilewidth) if key.is_tiled else (min(key.rowsperstrip, key.imagelength), key.imagewidth)
    )
    return max(1, prod(shape) * key.samplesperpixel * key.dtype.itemsize)


@lru_cache(maxsize=64)
def _cached_stack(path: str, stamp: Any) -> Stack:
    return Stack(path)


def open_stack(path: str) -> Stack:
    """The sections of the TIFF file at ``path``; its headers are read once, as long as the file does not change."""
    return _cached_stack(path, files.stamp(path))


# ------------------------------------------------------------------------------------------------------------ metadata


def _highest_of_inverted(key: Any, path: str) -> tuple[int | None, tuple[str, ...]]:
    """The value that becomes 0 in a file in which white is zero, and a note on it; None where black is zero.

    tifffile says so of every bool array, and means True where it stores 1.
    """
    if key.photometric != WHITE_IS_ZERO or (key.dtype.kind == "b" and key.software.startswith("tifffile")):
        return None, ()
    if key.dtype.kind not in "bu" or key.dtype.itemsize > 2:
        return None, (printable(f"{path} says that white is zero, which is not applied to {key.dtype} voxels"),)
    highest = 1 if key.dtype.kind == "b" else 2**key.bitspersample - 1
    return highest, (printable(f"{path} says that white is zero: its contrast was turned, so that black is"),)


def _grays_of_palette(key: Any, path: str) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Gray values of the entries of a file's palette, and a note on it; None where there is none, or it holds colors."""
    colors = key.colormap
    if key.photometric != PALETTE or colors is None or key.dtype.kind != "u" or key.dtype.itemsize > 2:
        return None, ()
    dtype, (red, green, blue) = key.dtype, colors
    eight = dtype.itemsize == 1 and colors.max() > 255  # a palette of TIFF has 16 bits; some programs write 8
    return grays_of_colors(np.stack([red, green, blue], 1) >> (8 if eight else 0), dtype, path)


def grays_of_colors(colors: np.ndarray, dtype: np.dtype, path: str) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The gray value of each entry of a palette, entries x red green blue, and a note on it; None: entries are values."""
    if (colors != colors[:, :1]).any():
        return None, (
            printable(f"{path} says that its values are entries of a palette of colors: the entries are read"),
        )
    if (colors[:, 0] == np.arange(len(colors))).all():
        return None, ()
    grays = np.zeros(2 ** (8 * np.dtype(dtype).itemsize), dtype)  # entries beyond the palette's end are black
    grays[: len(colors)] = colors[:, 0]
    return grays, (printable(f"{path} says that its values are entries of a palette of grays: the grays are read"),)


def _voxel_size_nm(tif: Any, path: str, sections: int) -> tuple[TripleNm | None, tuple[str, ...]]:
    """Voxel size z y x from OME or ImageJ metadata, and notes on it."""
    if tif.is_ome and tif.ome_metadata:
        return ome.tiff_voxel_size_nm(tif.ome_metadata, path)
    facts = (tif.imagej_metadata or {}) if tif.is_imagej else {}
    if not facts:
        return None, ()
    unit = str(facts.get("unit", ""))
    planar = [_length(tif.pages[0].tags.valueof(name)) for name in ("YResolution", "XResolution")]
    depth = ome.number(facts["spacing"]) if "spacing" in facts else 1.0 if sections > 1 else None
    units = [str(facts.get(f"{axis}unit", unit)) for axis in "zyx"]  # ImageJ names those that differ
    size, notes = ome.voxel_size_nm((depth, *planar), units, path)
    if size and "spacing" not in facts:
        notes = (*notes, printable(f"{path} gives no distance between sections: 1 {units[0]}, as ImageJ takes it"))
    return size, notes


def _length(resolution: Any) -> float | None:
    """Units for each voxel, from voxels for each unit as TIFF has it: numerator and denominator."""
    try:
        voxels, units = resolution
        return units / voxels if voxels and units else None
    except (TypeError, ValueError):
        return None


def read(volume: Volume, box: Box) -> np.ndarray:
    """The voxels of ``box``."""
    out = np.empty(box.shape, volume.dtype)
    stack = open_stack(volume.path)
    if stack.in_one_piece:
        with decoding(volume.path, box):
            stack.fill_box(out, box, volume.channel, volume.time)
        return out
    for z, plane in zip(range(box.start[0], box.stop[0]), out, strict=True):
        with decoding(f"page {z} of {volume.path}", box), filling(volume, z) as bad:
            stack.fill(plane, z, box.slices[1:], volume.channel, volume.time, bad)
    return out
