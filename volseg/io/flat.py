"""Volumes whose voxels lie one after the other in a file, as they are or as one gzip stream: MRC, NIfTI, NRRD, npy, DM.

Those formats differ in their headers alone. Each module parses one into a `Layout`; here boxes are read from it.
"""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg import system
from volseg.box import Box
from volseg.errors import UserError
from volseg.io import axes, files, mapping
from volseg.io.header import Header, TripleNm, check_shape, decoding, shape_text, voxel_dtype
from volseg.io.place import ORIGIN, Place

if TYPE_CHECKING:
    from volseg.io.volume import Volume

UNZIPPED_BYTES = 64 << 20  # of a gzip stream that are decoded at once
SEEK_POINTS_BYTES = 4 << 20  # between places at which decoding may start; each holds 32 KB of memory
GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class Layout:
    """Where the voxels of a volume lie in a file, and what they mean."""

    path: str  # of the file that holds the voxels
    offset: int  # of the first voxel; in the decoded stream where it is compressed
    shape: tuple[int, ...]  # as the file has it, the slowest axis first
    dtype: np.dtype  # as stored
    names: Sequence[str] = ()  # of the axes, such as "czyx"
    reversed: bool = False  # whether z is the fastest axis instead of x
    scale: tuple[float, float] | None = None  # slope and intercept from stored to real values
    gzip_at: int | None = None  # where the gzip stream begins in the file, if there is one
    voxel_size_nm: TripleNm | None = None
    place: Place = ORIGIN
    notes: tuple[str, ...] = ()
    size_notes: tuple[str, ...] = ()

    @property
    def zyx_shape(self) -> tuple[int, ...]:
        """The shape with x last."""
        return self.shape[::-1] if self.reversed else self.shape

    @property
    def dtype_read(self) -> np.dtype:
        """The type of real values."""
        return np.dtype(np.float32) if self.scale else self.dtype


def header(kind: str, layout: Layout, where: str, *, several: bool) -> Header:
    """What a layout says of its volume; refuses a file too short to hold it."""
    shape = layout.zyx_shape
    if any(n < 0 for n in shape):
        raise UserError(f"{where} has shape {shape_text(shape)}: its header is damaged")
    check_shape(shape, where)
    names = axes.axis_names(list(layout.names), len(shape))
    lead = axes.channel_axis(shape, names, where) if several or "c" in names else None
    time = axes.time_axis(names, lead)
    axes.check(shape, names, lead, where, time)
    dtype = voxel_dtype(layout.dtype_read, where)
    end = layout.offset + prod(shape) * layout.dtype.itemsize
    size = os.path.getsize(layout.path)
    if layout.gzip_at is None and end > size:
        raise UserError(
            f"{where} is cut short: it holds {size} bytes, and {shape_text(shape)} voxels of {layout.dtype} end at byte "
            f"{end}; copy it again"
        )
    zyx = tuple(shape[axis] for axis in axes.space(len(shape), lead, time))
    plane = (zyx[0], zyx[1], 1) if layout.reversed else (1, *zyx[1:])
    return Header(
        kind,
        zyx,
        dtype,
        layout.voxel_size_nm,
        plane,
        channels=1 if lead is None else shape[lead],
        channel_axis=lead,
        times=1 if time is None else shape[time],
        time_axis=time,
        binary=layout.dtype.kind == "b",
        place=layout.place,
        notes=layout.notes,
        size_notes=layout.size_notes,
    )


def read(layout: Layout, volume: Volume, box: Box) -> np.ndarray:
    """The voxels of ``box`` in the file that ``layout`` describes."""
    index = axes.index(len(layout.shape), box.slices, volume.chosen)
    spans = [i if isinstance(i, slice) else slice(i, i + 1) for i in index]
    with decoding(volume.path, box):
        dtype = np.float64 if layout.scale else volume.dtype
        if layout.gzip_at is None:
            mapped = mapping.mapping(layout.path)
            whole = mapped.array(layout.zyx_shape, layout.dtype, layout.offset, reversed_axes=layout.reversed)
            view = whole[tuple(spans)]
            data = np.empty(view.shape, dtype)
            mapped.copy(view, data)
        else:
            data = _unzipped(layout, spans).astype(dtype)
    data = data.reshape(box.shape)
    if layout.scale:
        slope, intercept = layout.scale
        data = data * slope + intercept
    return data.astype(volume.dtype, copy=False)


def _unzipped(layout: Layout, spans: list[slice]) -> np.ndarray:
    """Part of an array in a gzip stream, x last."""
    out = np.empty([span.stop - span.start for span in spans], layout.dtype)
    for place, piece in _gzip_pieces(layout, spans):
        out[place] = piece
    return out


def _gzip_pieces(layout: Layout, spans: list[slice]) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Parts of a compressed file, decoded in pieces from the last seek point before each."""
    stream = _gzip_stream(layout.path, layout.gzip_at, files.stamp(layout.path))
    itemsize = layout.dtype.itemsize
    depth = next(
        (n for n in range(len(spans) - 1) if prod(layout.shape[n:]) * itemsize <= UNZIPPED_BYTES), len(spans) - 1
    )
    for place, offset, shape, inner in _items(layout, spans, depth):
        step = prod(shape[1:]) * itemsize
        first = inner[0].start
        rows = inner[0].stop - first
        data = stream.pread(rows * step, offset + first * step)
        if len(data) != rows * step:
            raise OSError(f"the stream ends before byte {offset + (first + rows) * step}")
        piece = np.frombuffer(data, layout.dtype).reshape(rows, *shape[1:])
        yield place, piece[(slice(None), *inner[1:])]


def _items(
    layout: Layout, spans: list[slice], depth: int
) -> Iterator[tuple[tuple[int, ...], int, tuple[int, ...], tuple[slice, ...]]]:
    """The parts that one index along each of the first ``depth`` axes leads to.

    Of each: its place in the result, its offset in the file, its whole shape, and what of it is wanted.
    """
    shape, inner = layout.shape[depth:], tuple(spans[depth:])
    for index in product(*(range(span.start, span.stop) for span in spans[:depth])):
        number = 0
        for i, n in zip(index, layout.shape, strict=False):
            number = number * n + i
        place = tuple(i - span.start for i, span in zip(index, spans, strict=False))
        yield place, layout.offset + number * prod(shape) * layout.dtype.itemsize, shape, inner


@lru_cache(maxsize=8)
def _gzip_stream(path: str, start: int, stamp: Any) -> Any:
    """A gzip stream that can be read from anywhere; it learns seek points as it is read, and closes when it is let go of."""
    system.require("indexed_gzip", extra="formats")
    from indexed_gzip import IndexedGzipFile

    source = {"fileobj": _Tail(path, start)} if start else {"filename": path}
    return IndexedGzipFile(**source, spacing=SEEK_POINTS_BYTES)


class _Tail(io.RawIOBase):
    """A file from some byte on."""

    def __init__(self, path: str, start: int) -> None:
        self.file, self.start = files.open_binary(path), start
        self.file.seek(start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self.file.readinto(buffer)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset + self.start if whence == io.SEEK_SET else offset, whence) - self.start

    def tell(self) -> int:
        return self.file.tell() - self.start

    def close(self) -> None:
        self.file.close()
        super().close()


def head(path: str, nbytes: int) -> tuple[bytes, int | None]:
    """The first bytes of a file, decoded where it is compressed, and where its gzip stream begins if it is."""
    with decoding(path), files.open_binary(path) as file:
        start = file.read(nbytes)
        if not start.startswith(GZIP_MAGIC):
            return start, None
        file.seek(0)
        with gzip.open(file) as stream:
            return stream.read(nbytes), 0
