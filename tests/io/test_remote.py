"""Volumes and objects on an object store."""

import numpy as np
import pytest
import zarr

from tests.io.helpers import ENCODINGS, WHOLE, assert_reads, check_objects, make_run, refused, voxels, zarr2_blosc
from volseg.box import Box
from volseg.io import arrays, files, volume


def test_a_run_on_s3_reads_back(bucket):
    labels = voxels("uint32", (20, 30, 40))
    make_run(f"{bucket}/run.zarr", labels)
    opened = volume.open(f"{bucket}/run.zarr")
    assert (opened.dataset, opened.voxel_size_nm, opened.kind) == ("labels/instances/0", (50, 5, 5), "zarr")
    assert_reads(opened, labels)
    with refused("no zarr array or group", "s3://bucket/run.zarr/nothing"):
        volume.open(f"{bucket}/run.zarr", dataset="nothing")
    with refused("s3://bucket/run.zarr", "exists"):
        arrays.create_array(f"{bucket}/run.zarr", "0", shape=(1, 1, 1), dtype="u1", chunk=(1, 1, 1), shard=(1, 1, 1))


def test_objects_live_on_s3(bucket):
    check_objects(f"{bucket}/objects")


def test_what_is_not_on_s3_is_refused(bucket):
    for url in (f"{bucket}/nothing.zarr", "s3://no-such-bucket/v.zarr"):
        with refused("no zarr array or group", url):
            volume.open(url)


@pytest.mark.parametrize(
    ("encoding", "share"),
    [("v3 zstd", 0.5), ("v3 zstd", 0), ("v3 blosc", 0.99), ("v3 none", 0.9), ("v3 shards", 0), ("v2 default", 0.5)],
)
def test_a_chunk_cut_short_on_s3_is_refused(bucket, encoding, share):
    url = f"{bucket}/{encoding.replace(' ', '-')}-{share}.zarr"
    data = voxels("uint16")
    options = ENCODINGS[encoding] | ({"shards": (4, 40, 33)} if "shards" in encoding else {})
    zarr.create_array(url, data=data, chunks=(2, 40, 33), **options)
    opened = volume.open(url)
    np.testing.assert_array_equal(opened.read(WHOLE), data)
    key = "1.0.0" if "v2" in encoding else "c/1/0/0"
    whole = files.read_bytes(url, key)
    files.write_bytes(url, key, whole[: int(len(whole) * share)])
    with refused(url, f"box {WHOLE}", f"{key}:"):
        opened.read(WHOLE)


def test_a_shard_of_many_chunks_that_compress_well_is_read_whole_from_s3(bucket):
    data = np.tile(np.arange(64, dtype="uint8"), (32, 64, 1)) // 2
    zarr.create_array(f"{bucket}/many.zarr", data=data, chunks=(4, 16, 16), shards=(32, 64, 64))
    opened = volume.open(f"{bucket}/many.zarr")
    np.testing.assert_array_equal(opened.read(Box.from_shape(data.shape)), data)


def test_a_blosc_chunk_of_zarr_2_cut_short_on_s3_is_refused(bucket):
    url = f"{bucket}/v2-blosc.zarr"
    data = voxels("uint16")
    zarr.create_array(url, data=data, chunks=(3, 40, 33), zarr_format=2, compressors=zarr2_blosc())
    files.write_bytes(url, "1.0.0", files.read_bytes(url, "1.0.0")[:-7])
    with refused(url, "1.0.0 is cut short"):
        volume.open(url).read(WHOLE)


def test_an_unknown_protocol_is_refused():
    with refused("cannot reach", "nosuch://bucket/v.zarr"):
        volume.open("nosuch://bucket/v.zarr")
