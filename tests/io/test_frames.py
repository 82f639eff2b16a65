"""Chunks that decode to far more than a chunk are refused before they are decoded; all others are read."""

import bz2
import gzip
import lzma
import os
import time
import zlib

import google_crc32c
import imagecodecs
import numpy as np
import pytest
import zarr
from numcodecs import BZ2, LZ4, LZMA, Blosc, GZip, Zlib, Zstd
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

from tests.io.helpers import SHAPE, WHOLE, assert_reads, refused, voxels, write_zarr
from volseg.box import Box
from volseg.io import files, frames, volume
from volseg.system import resident

BOMB = bytes(1 << 28)
SKIPPED = b"\x50\x2a\x4d\x18\x03\0\0\0abc"  # a frame that zstd skips


def streamed(data):
    """A zstd frame that does not say how long it is: its header holds a window of 16 MiB instead."""
    frame = imagecodecs.zstd_encode(data, level=1)
    descriptor = frame[4]
    single = descriptor >> 5 & 1
    length = (single, 2, 4, 8)[descriptor >> 6]
    return frame[:4] + bytes([descriptor & 0b111, 14 << 3]) + frame[5 + (1 - single) + length :]


BOMBS = {
    "zstd": (ZstdCodec(), lambda: imagecodecs.zstd_encode(BOMB, level=1)),
    "zstd without its length": (ZstdCodec(), lambda: streamed(BOMB)),
    "zstd behind a small frame": (
        ZstdCodec(),
        lambda: imagecodecs.zstd_encode(bytes(9)) + SKIPPED + imagecodecs.zstd_encode(BOMB, level=1),
    ),
    "blosc": (BloscCodec(), lambda: imagecodecs.blosc_encode(BOMB, level=1)),
}
BOMBS_2 = {
    "zstd": (Zstd(), lambda: imagecodecs.zstd_encode(BOMB, level=1)),
    "blosc": (Blosc(), lambda: imagecodecs.blosc_encode(BOMB, level=1)),
    "lz4": (LZ4(), lambda: LZ4().encode(BOMB)),
    "bz2": (BZ2(), lambda: bz2.compress(BOMB)),
    "lzma": (LZMA(), lambda: lzma.compress(BOMB, preset=0)),
}


def assert_refused_without_room(opened, key):
    before, start = resident("HWM"), time.monotonic()
    with refused(key, "far more bytes than a chunk"):
        opened.read(WHOLE)
    assert resident("HWM") - before < 1 << 27
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_without_room_for_it(tmp_path, kind):
    codec, bomb = BOMBS[kind]
    write_zarr(tmp_path / "v.zarr", voxels(), chunks=(2, 16, 16), compressors=codec)
    (tmp_path / "v.zarr" / "c/1/0/0").write_bytes(bomb())
    assert_refused_without_room(volume.open(tmp_path / "v.zarr"), "c/1/0/0")


@pytest.mark.parametrize("dtype", ["uint8", ">u2"])  # read by zarrs, and by zarr
@pytest.mark.parametrize("kind", BOMBS_2)
def test_a_bomb_in_zarr_2_is_refused_without_room_for_it(tmp_path, kind, dtype):
    codec, bomb = BOMBS_2[kind]
    array = zarr.create_array(
        tmp_path / "v.zarr", shape=SHAPE, chunks=(2, 16, 16), dtype=dtype, zarr_format=2, compressors=codec
    )
    array[...] = voxels(dtype)
    (tmp_path / "v.zarr" / "1.0.0").write_bytes(bomb())
    assert_refused_without_room(volume.open(tmp_path / "v.zarr"), "1.0.0")


def deflated(stream, size):
    """Zeros, packed in pieces: there is no room for all."""
    piece = bytes(1 << 24)
    return b"".join(stream.compress(piece) for _ in range(size >> 24)) + stream.flush()


@pytest.mark.parametrize(
    ("codec", "wbits", "size"), [(GZip(), 31, 1 << 28), (Zlib(), 15, 9 << 27)], ids=["gzip", "zlib"]
)
def test_a_bomb_of_deflate_is_refused(tmp_path, codec, wbits, size):
    """Deflate makes a thousand bytes of one at most, so without the size that gzip tells only large chunks are looked at."""
    write_zarr(tmp_path / "v.zarr", voxels(), zarr_format=2, chunks=(2, 16, 16), compressors=codec)
    (tmp_path / "v.zarr" / "1.0.0").write_bytes(deflated(zlib.compressobj(1, wbits=wbits), size))
    assert_refused_without_room(volume.open(tmp_path / "v.zarr"), "1.0.0")


def test_a_bomb_in_front_of_a_small_member_of_gzip_is_refused(tmp_path):
    write_zarr(tmp_path / "v.zarr", voxels(), zarr_format=2, chunks=(2, 16, 16), compressors=GZip())
    bomb = deflated(zlib.compressobj(1, wbits=31), 9 << 27) + gzip.compress(bytes(9))
    (tmp_path / "v.zarr" / "1.0.0").write_bytes(bomb)
    assert_refused_without_room(volume.open(tmp_path / "v.zarr"), "1.0.0")


@pytest.mark.parametrize("checked", [False, True])
def test_a_bomb_in_a_shard_is_refused_where_it_is_read(tmp_path, checked):
    data, codecs = voxels(), [ZstdCodec(), Crc32cCodec()] if checked else [ZstdCodec()]
    write_zarr(tmp_path / "v.zarr", data, chunks=(2, 16, 16), shards=(4, 32, 32), compressors=codecs)
    file = tmp_path / "v.zarr" / "c/0/0/0"
    raw, bomb = file.read_bytes(), imagecodecs.zstd_encode(BOMB, level=1)
    bomb += crc32c(bomb) if checked else b""
    body, index = raw[: -(16 * 8 + 4)], np.frombuffer(raw[-(16 * 8 + 4) : -4], "<u8").copy()
    index[2:4] = len(body), len(bomb)  # of the second of the shard's eight chunks
    file.write_bytes(body + bomb + index.tobytes() + crc32c(index.tobytes()))
    opened = volume.open(tmp_path / "v.zarr")
    assert_refused_without_room(opened, "c/0/0/0")
    np.testing.assert_array_equal(opened.read(Box((0, 0, 0), (2, 16, 16))), data[:2, :16, :16])


def crc32c(data):
    return google_crc32c.value(data).to_bytes(4, "little")


def test_a_bomb_on_an_object_store_is_refused(bucket):
    write_zarr(f"{bucket}/bomb.zarr", voxels(), chunks=(2, 16, 16), compressors=ZstdCodec())
    files.write_bytes(f"{bucket}/bomb.zarr", "c/1/0/0", imagecodecs.zstd_encode(BOMB, level=1))
    assert_refused_without_room(volume.open(f"{bucket}/bomb.zarr"), "c/1/0/0")


COMPRESSORS = {
    "zstd": ZstdCodec(level=19),
    "zstd with a checksum": ZstdCodec(checksum=True),
    "zstd and crc": [ZstdCodec(), Crc32cCodec()],
    "gzip": GzipCodec(),
    "blosc": BloscCodec(shuffle="bitshuffle"),
}


@pytest.mark.parametrize("shards", [None, (40, 256, 256)])
@pytest.mark.parametrize("kind", COMPRESSORS)
def test_large_chunks_of_any_content_are_read(tmp_path, kind, shards):
    noise = voxels(shape=(40, 256, 256))
    for name, data in {"noise": noise, "zeros": noise * 0 + 1, "half": noise // 128}.items():
        path = tmp_path / f"{name}.zarr"
        write_zarr(path, data, chunks=(20, 256, 256), shards=shards, compressors=COMPRESSORS[kind])
        opened = volume.open(path)
        np.testing.assert_array_equal(opened.read(Box.from_shape(data.shape)), data)


def test_a_stream_of_small_blocks_is_read(tmp_path):
    """Flushed after every few bytes, a frame has more blocks than its length tells."""
    data = voxels()
    write_zarr(tmp_path / "v.zarr", data, chunks=SHAPE, compressors=ZstdCodec())
    frame = b"".join(imagecodecs.zstd_encode(data.tobytes()[i : i + 20]) for i in range(0, data.size, 20))
    (tmp_path / "v.zarr" / "c/0/0/0").write_bytes(frame)
    assert frames.compression(zarr.open_array(tmp_path / "v.zarr")).too_large(frame) is False
    assert_reads(volume.open(tmp_path / "v.zarr"), data)


def test_a_chunk_that_goes_on_for_ever_is_refused(tmp_path):
    """Zeros are blocks of nothing, as many as the file is long, and a file may be long without filling a disk."""
    write_zarr(tmp_path / "v.zarr", voxels(), chunks=(2, 16, 16), compressors=ZstdCodec())
    chunk = tmp_path / "v.zarr" / "c/1/0/0"
    chunk.write_bytes(bytes.fromhex("28b52ffd2004"))
    os.truncate(chunk, 1 << 42)
    assert_refused_without_room(volume.open(tmp_path / "v.zarr"), "c/1/0/0")
