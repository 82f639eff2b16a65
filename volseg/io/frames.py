"""How large a compressed chunk becomes, before it is decoded: 61 kB of zstd may stand for 4 GB.

Decoders make room for whatever a chunk's bytes say. Here that is held against the size of a chunk in the array's metadata.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO, overload

import numpy as np
import zarr
from zarr.codecs import (
    BloscCodec,
    BytesCodec,
    Crc32cCodec,
    Endian,
    GzipCodec,
    ShardingCodec,
    ShardingCodecIndexLocation,
    ZstdCodec,
)

BLOCK = 128 << 10  # bytes that a block of zstd decodes to, at most
DEFLATE_RATIO = 1032  # bytes that deflate makes of one, at most
SMALL = 1 << 30  # bytes that deflate may decode to without being looked through, which takes as long as decoding
STEP = 1 << 20  # bytes decoded at once to count them
MOST_STORED = 4  # times the most bytes that a chunk may decode to are what it may be stored in
WINDOW = 4096  # bytes of a file that are read where some of them are asked for
ABSENT = 2**64 - 1  # the offset of a chunk that a shard does not hold


class FilePart:
    """``length`` bytes of an open file from ``offset`` on, of which only those asked for are read, and some behind them."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self.file, self.offset, self.length = file, offset, length
        self.window, self.start = b"", 0  # what was read last, from byte `start` of the part on

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, key: int) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> bytes: ...
    def __getitem__(self, key: int | slice) -> int | bytes:
        if isinstance(key, int):
            return self[key : key + 1][0]
        start, stop, _ = key.indices(self.length)
        if start < self.start or stop > self.start + len(self.window):
            self.file.seek(self.offset + start)
            self.window, self.start = self.file.read(min(max(stop - start, WINDOW), self.length - start)), start
        return self.window[start - self.start : stop - self.start]


Data = bytes | memoryview | FilePart


@dataclass(frozen=True)
class Compression:
    """How the chunks of an array are compressed."""

    codec: str  # "zstd", "gzip", "zlib", "bz2", "lzma", "blosc" or "lz4"
    trailer: int  # bytes of a checksum behind the frame
    limit: int  # bytes that a chunk may decode to: filters, which run before the compressor, may have made it larger

    @property
    def header(self) -> int | None:
        """Bytes at the start of a chunk that tell its size; None where all of them must be seen."""
        return HEADERS.get(self.codec)

    def too_large(self, data: bytes | memoryview) -> bool:
        """Whether the chunk in ``data``, of which the header may be enough, decodes to more than it may."""
        frame = data[: len(data) - self.trailer] if self.header is None else data
        return SIZES[self.codec](frame, self.limit) > self.limit

    def too_large_in(self, file: BinaryIO, offset: int, length: int) -> bool:
        """The same for a chunk in an open file."""
        if self.codec == "zstd":  # the headers of its blocks are enough
            return _zstd_size(FilePart(file, offset, max(0, length - self.trailer)), self.limit) > self.limit
        file.seek(offset)
        return self.too_large(file.read(min(length, self.header or length)))


def compression(array: zarr.Array) -> Compression | None:
    """How the chunks of an array are compressed; None where that bounds their size, or is unknown."""
    codec, trailer = _codec(array.metadata)
    if codec not in SIZES:
        return None
    return Compression(codec, trailer, 8 * prod(array.chunks) * array.dtype.itemsize + (1 << 20))


def sharding(metadata: Any) -> ShardingCodec | None:
    """The codec that packs the chunks of a zarr 3 array into shards; None where each chunk is an object of its own."""
    codecs = metadata.codecs if metadata.zarr_format == 3 else ()
    return codecs[-1] if codecs and isinstance(codecs[-1], ShardingCodec) else None


def _codec(metadata: Any) -> tuple[str, int]:
    """Name of the last compressor, and bytes of the checksum behind it."""
    if metadata.zarr_format == 2:
        return getattr(metadata.compressor, "codec_id", ""), 0
    shards = sharding(metadata)
    codecs = list(shards.codecs if shards else metadata.codecs)
    trailer = 0
    while isinstance(codecs[-1], Crc32cCodec):
        codecs.pop()
        trailer += 4
    for kind, name in ((ZstdCodec, "zstd"), (GzipCodec, "gzip"), (BloscCodec, "blosc")):
        if isinstance(codecs[-1], kind):
            return name, trailer
    return getattr(codecs[-1], "codec_name", "").removeprefix("numcodecs."), trailer


def _zstd_size(data: Data, limit: int) -> int:
    """An upper bound of what all frames in ``data`` decode to, from the headers of their blocks (RFC 8878)."""
    total, at = 0, 0
    while at + 6 <= len(data) and total <= limit:
        magic = int.from_bytes(data[at : at + 4], "little")
        if magic & 0xFFFFFFF0 == 0x184D2A50:  # a skippable frame
            at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
            continue
        if magic != 0xFD2FB528:
            break  # the decoder refuses it
        descriptor = data[at + 4]
        single = descriptor >> 5 & 1
        fields = (1 - single) + (0, 1, 2, 4)[descriptor & 3] + ((1 if single else 0), 2, 4, 8)[descriptor >> 6]
        at += 5 + fields
        last = False
        while not last and at + 3 <= len(data) and total <= limit:
            header = int.from_bytes(data[at : at + 3], "little")
            last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
            total += BLOCK if kind == 2 else max(size, 1)  # blocks of nothing have an end, too
            at += 3 + (1 if kind == 1 else size)
        at += 4 * (descriptor >> 2 & 1)
    return total if total <= limit else _zstd_size_counted(data, limit)


def _zstd_size_counted(data: Data, limit: int) -> int:
    """The same for blocks that may be smaller than they could be: decoded, into as much room as they may fill."""
    import imagecodecs

    if len(data) > MOST_STORED * limit:
        return limit + 1
    try:
        return len(imagecodecs.zstd_decode(data[: len(data)], out=limit))
    except imagecodecs.ZstdError:
        return limit + 1


def _gzip_size(data: bytes | memoryview, limit: int) -> int:
    """What the trailer says, modulo 4 GiB, or what comes out where a small trailer may hide more."""
    return max(int.from_bytes(data[-4:], "little"), _deflate_size(data, limit))


def _deflate_size(data: bytes | memoryview, limit: int) -> int:
    if len(data) * DEFLATE_RATIO <= max(limit, SMALL):
        return 0
    total, rest = 0, data
    while rest and total <= limit:
        stream = zlib.decompressobj(47)  # gzip or zlib, whichever the header says
        while not stream.eof and total <= limit:
            try:
                step = len(stream.decompress(rest, STEP))
            except zlib.error:
                return total  # the decoder refuses it
            total, rest = total + step, stream.unconsumed_tail
            if not step and not rest:
                return total
        rest = stream.unused_data
    return total


def _stream_size(stream: Any, data: bytes | memoryview, limit: int) -> int:
    total = len(stream.decompress(data, STEP))
    while not stream.eof and not stream.needs_input and total <= limit:
        total += len(stream.decompress(b"", STEP))
    return total


def _bz2_size(data: bytes | memoryview, limit: int) -> int:
    try:
        return _stream_size(bz2.BZ2Decompressor(), data, limit)
    except (OSError, EOFError):
        return 0  # the decoder refuses it


def _lzma_size(data: bytes | memoryview, limit: int) -> int:
    try:
        return _stream_size(lzma.LZMADecompressor(), data, limit)
    except lzma.LZMAError:
        return 0  # the decoder refuses it, or its stream has no header


HEADERS = {"blosc": 8, "lz4": 4}
SIZES = {
    "zstd": _zstd_size,
    "gzip": _gzip_size,
    "zlib": _deflate_size,
    "bz2": _bz2_size,
    "lzma": _lzma_size,
    "blosc": lambda data, limit: int.from_bytes(data[4:8], "little"),
    "lz4": lambda data, limit: int.from_bytes(data[:4], "little"),
}


def shard_ranges(
    shards: ShardingCodec, shard_shape: tuple[int, ...], size: int, read: Callable[[int, int], bytes | memoryview]
) -> dict[tuple[int, ...], tuple[int, int]]:
    """Offset and length of each chunk that a shard of ``size`` bytes holds, by its place in the shard.

    ``read(offset, length)`` gives bytes of the shard.
    """
    grid = tuple(n // c for n, c in zip(shard_shape, shards.chunk_shape, strict=True))
    length = 16 * prod(grid) + 4 * sum(isinstance(codec, Crc32cCodec) for codec in shards.index_codecs)
    at_end = shards.index_location == ShardingCodecIndexLocation.end
    index = read(size - length if at_end else 0, length) if length <= size else b""
    if len(index) != length:
        return {}  # cut short: the decoder refuses it
    big = any(isinstance(codec, BytesCodec) and codec.endian == Endian.big for codec in shards.index_codecs)
    numbers = np.frombuffer(index, ">u8" if big else "<u8", 2 * prod(grid)).reshape(*grid, 2)
    ranges = {place: (int(numbers[place][0]), int(numbers[place][1])) for place in np.ndindex(*grid)}
    return {place: span for place, span in ranges.items() if span[0] != ABSENT}
