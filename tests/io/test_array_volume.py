"""Volumes from Python: arrays become what files of the same voxels are, and are refused as those are."""

from itertools import product

import dask.array
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import MemoryStore, ZipStore

from tests.io.helpers import SHAPE, WHOLE, assert_reads, refused, voxels, write_ome, write_zarr
from volseg.box import Box
from volseg.io import array_volume, files, volume

SIZE = (50.0, 5.0, 4.0)


class Plain:
    """As little as an array may be: a shape, a type, and slices. Keeps what was asked for."""

    def __init__(self, data):
        self.shape, self.dtype, self.data, self.asked = data.shape, data.dtype, data, []

    def __getitem__(self, index):
        part = self.data[index]
        self.asked.append(part.size)
        return part


def in_zarr_memory(data):
    return zarr.create_array(MemoryStore(), data=data, chunks=(2, 16, 16))


KINDS = {
    "numpy": np.asarray,
    "not contiguous": lambda data: np.asfortranarray(data),
    "dask": lambda data: dask.array.from_array(data, chunks=(2, 16, 33)),
    "dask of uneven blocks": lambda data: dask.array.from_array(data, chunks=((1, 3, 1), (7, 33), (33,))),
    "zarr in memory": in_zarr_memory,
    "anything": Plain,
}


@pytest.mark.parametrize("dtype", ["uint8", ">u2", "uint64", "float32", "bool"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_array_becomes_what_a_file_of_its_voxels_is(tmp_path, kind, dtype):
    data = voxels(dtype)
    write_zarr(tmp_path / "file.zarr", data)
    file = volume.open(tmp_path / "file.zarr")
    array = volume.open_volume(KINDS[kind](data), voxel_size_nm=SIZE)
    assert (array.shape, array.dtype, array.binary) == (file.shape, file.dtype, file.binary)
    np.testing.assert_array_equal(array.read(Box((1, 7, 5), (4, 31, 33))), data[1:4, 7:31, 5:33])
    assert array.checksum() == file.checksum()
    copy = volume.materialize(array, tmp_path / "copy.zarr")
    assert (copy.voxel_size_nm, copy.binary) == (SIZE, file.binary)
    assert copy.checksum() == file.checksum()
    assert_reads(copy, data.astype(file.dtype))


def test_a_copy_is_an_image_with_its_voxel_size(tmp_path):
    volume.materialize(volume.open_volume(voxels(), voxel_size_nm=SIZE), tmp_path / "copy.zarr")
    assert volume.open(tmp_path / "copy.zarr").voxel_size_nm == SIZE
    volume.materialize(volume.open_volume(voxels()), tmp_path / "bare.zarr")
    assert volume.open(tmp_path / "bare.zarr").voxel_size_nm is None


def test_each_block_of_dask_is_computed_once_and_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(array_volume, "REGION", (4, 16, 16))
    data, computed = voxels(shape=(9, 40, 33)), []

    def block(part):
        computed.append(part.shape)
        return part

    chunks = ((3, 1, 5), (10, 10, 10, 10), (16, 16, 1))
    source = dask.array.from_array(data, chunks=chunks).map_blocks(block, meta=np.empty((0, 0, 0), np.uint8))
    copy = volume.materialize(volume.open_volume(source), tmp_path / "copy.zarr")
    np.testing.assert_array_equal(copy.read(Box.from_shape(copy.shape)), data)
    assert sorted(computed) == sorted(product(*chunks))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 12), st.booleans(), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_regions_are_whole_blocks(blocks, most, even, block):
    length = sum(blocks)
    lengths = array_volume._grouped(block if even else tuple(blocks), length, most)
    assert sum(lengths) == length
    edges = set(range(0, length, block)) | {length} if even else {0, *np.cumsum(blocks).tolist()}
    assert {0, *np.cumsum(lengths).tolist()} <= edges
    assert max(lengths) <= max(most, block if even else max(blocks))


def test_no_read_is_larger_than_a_region(tmp_path, monkeypatch):
    monkeypatch.setattr(array_volume, "REGION", (2, 16, 16))
    source = Plain(voxels())
    volume.materialize(volume.open_volume(source), tmp_path / "copy.zarr")
    assert max(source.asked) == 2 * 16 * 16


def test_a_finished_copy_is_kept_and_any_other_made_anew(tmp_path):
    source = Plain(voxels())
    first = volume.materialize(volume.open_volume(source), tmp_path / "copy.zarr")
    chunk = next((tmp_path / "copy.zarr" / "0" / "c").rglob("0"))
    while chunk.is_dir():
        chunk = next(chunk.iterdir())
    before = chunk.stat().st_mtime_ns
    assert volume.materialize(volume.open_volume(source), tmp_path / "copy.zarr") == first
    assert chunk.stat().st_mtime_ns == before
    other = voxels(seed=1)
    again = volume.materialize(volume.open_volume(other), tmp_path / "copy.zarr")
    np.testing.assert_array_equal(again.read(WHOLE), other)
    files.remove(tmp_path / "copy.zarr" / "zarr.json")  # as a killed process leaves it
    again = volume.materialize(volume.open_volume(other), tmp_path / "copy.zarr")
    np.testing.assert_array_equal(again.read(WHOLE), other)


def test_a_stored_zarr_array_is_opened_by_its_path(tmp_path):
    data = voxels()
    write_zarr(tmp_path / "v.zarr", data)
    write_ome(tmp_path / "o.zarr", data, "0.5", scale=(0.05, 0.005, 0.004))
    assert volume.open_volume(zarr.open_array(tmp_path / "v.zarr")) == volume.open(tmp_path / "v.zarr")
    image = zarr.open_group(tmp_path / "o.zarr")
    whole = volume.open(tmp_path / "o.zarr")
    for source in (image["s0"], image, tmp_path / "o.zarr", str(tmp_path / "o.zarr"), whole):
        opened = volume.open_volume(source)
        assert opened.voxel_size_nm == SIZE
        assert_reads(opened, data)
        assert volume.materialize(opened, tmp_path / "unused") is opened
    assert not (tmp_path / "unused").exists()
    assert volume.open_volume(image, dataset="s1").shape == (5, 20, 17)


def test_a_zarr_array_on_an_object_store_is_opened_by_its_url(bucket):
    data = voxels()
    write_zarr(f"{bucket}/array.zarr", data)
    opened = volume.open_volume(zarr.open_array(f"{bucket}/array.zarr", mode="r"))
    assert opened == volume.open(f"{bucket}/array.zarr")
    copy = volume.materialize(volume.open_volume(data), f"{bucket}/copy.zarr")
    assert_reads(copy, data)


def test_what_lies_in_one_process_or_file_is_copied(tmp_path):
    data = voxels()
    with ZipStore(tmp_path / "v.zip", mode="w") as store:
        zipped = zarr.create_array(store, data=data)
        for source in (zipped, zarr.open_array("memory://array.zarr", mode="w", shape=SHAPE, dtype="uint8")):
            assert isinstance(volume.open_volume(source), volume.ArrayVolume)
        assert_reads(volume.materialize(volume.open_volume(zipped), tmp_path / "copy.zarr"), data)


def test_channels_are_chosen_as_in_files(tmp_path):
    data = np.stack([voxels(seed=0), voxels(seed=1)])
    write_zarr(tmp_path / "c.zarr", data)
    for source in (tmp_path / "c.zarr", data, zarr.open_array(tmp_path / "c.zarr"), dask.array.from_array(data)):
        with refused("4-D", "2 entries"):
            volume.open_volume(source)
        chosen = volume.open_volume(source, channel=1)
        np.testing.assert_array_equal(chosen.read(WHOLE), data[1])
        with refused("2 channels", "no channel 2"):
            volume.open_volume(source, channel=2)
    last = volume.open_volume(np.moveaxis(data, 0, -1), axes="zyxc", channel=1)
    np.testing.assert_array_equal(last.read(WHOLE), data[1])
    assert_reads(volume.materialize(last, tmp_path / "copy.zarr"), data[1])
    assert volume.open_volume(voxels()[None]).shape == SHAPE


def unknown_shape():
    return dask.array.from_array(voxels())[dask.array.from_array(np.arange(5) > 2)]


REFUSED = {
    "flat": (lambda: voxels()[0], {}, ("the numpy array is 2-D (40 x 33)", "z y x")),
    "empty": (lambda: voxels()[:0], {}, ("no voxels", "0 x 40 x 33")),
    "complex": (lambda: voxels().astype("complex64"), {}, ("complex64",)),
    "objects": (lambda: voxels().astype(object), {}, ("object",)),
    "masked": (lambda: np.ma.masked_equal(voxels(), 3), {}, ("masked", "filled")),
    "five axes": (lambda: np.zeros((2, 1, 5, 5, 5)), {}, ("2 times", "--time")),
    "axes turned": (voxels, {"axes": "xyz"}, ("has axes x y z", "transpose")),
    "axes of another array": (voxels, {"axes": "czyx"}, ("4 axes", "5 x 40 x 33")),
    "unknown shape": (unknown_shape, {}, ("the dask array", "no shape")),
    "huge": (lambda: dask.array.zeros((10**6, 10**6, 10**6), chunks=10**6), {}, ("voxels",)),
    "a list": (lambda: [[[1]]], {}, ("list", "path or an array")),
    "nothing": (lambda: None, {}, ("NoneType", "path or an array")),
    "no size": (voxels, {"voxel_size_nm": (1, 2)}, ("voxel_size_nm", "three numbers")),
    "negative size": (voxels, {"voxel_size_nm": (1, 2, -3)}, ("voxel_size_nm", "above 0")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_volume_is_refused(case):
    make, options, words = REFUSED[case]
    with refused(*words):
        volume.open_volume(make(), **options)


def test_what_cannot_be_read_is_refused_with_its_box(tmp_path):
    data = voxels("float32")
    data[3, 30, 20] = np.nan
    with refused("the numpy array", "NaN or infinity", "3:4,30:31,20:21"):
        volume.materialize(volume.open_volume(data), tmp_path / "copy.zarr")

    def broken(part):
        raise OSError("the disk is gone")

    source = dask.array.from_array(voxels()).map_blocks(broken, meta=np.empty((0, 0, 0), np.uint8))
    with refused("cannot read the dask array", "0:5,0:40,0:33", "the disk is gone"):
        volume.materialize(volume.open_volume(source), tmp_path / "copy.zarr")


def test_a_copy_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with refused("cannot write", "file/copy.zarr"):
        volume.materialize(volume.open_volume(voxels()), tmp_path / "file" / "copy.zarr")
