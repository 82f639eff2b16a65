"""Zarr arrays and OME-Zarr groups read back voxel for voxel; what is no volume, or damaged, is refused by name."""

import numpy as np
import pytest
import zarr

from tests.io.helpers import (
    CHANNELS,
    ENCODINGS,
    SHAPE,
    WHOLE,
    assert_channels,
    assert_reads,
    cut_short,
    laid_out,
    make_run,
    refused,
    voxels,
    write_ome,
    write_zarr,
    zarr2_blosc,
)
from volseg.box import Box
from volseg.io import arrays, volume


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int16", "int64", "float32", "bool"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr_arrays_of_each_type_read_back(tmp_path, dtype, zarr_format):
    data = voxels(dtype)
    write_zarr(tmp_path / "v.zarr", data, zarr_format=zarr_format, chunks=(2, 16, 16))
    opened = volume.open(tmp_path / "v.zarr")
    assert (opened.kind, opened.dtype) == ("zarr", "uint8" if dtype == "bool" else dtype)
    assert opened.voxel_size_nm is None
    assert opened.chunk == (2, 16, 16)
    assert_reads(opened, data.astype(opened.dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": ">u2", "zarr_format": 2, "order": "C"},
        {"dtype": "<u2", "zarr_format": 2, "order": "F"},
        {"dtype": ">f4", "zarr_format": 2, "order": "C"},
    ],
)
def test_byte_order_and_memory_order_do_not_matter(tmp_path, options):
    data = voxels(options["dtype"])
    array = zarr.create_array(tmp_path / "v.zarr", shape=SHAPE, chunks=(2, 16, 16), **options)
    array[...] = data
    assert_reads(volume.open(tmp_path / "v.zarr"), data)


def test_a_sharded_array_names_its_inner_chunk(tmp_path):
    data = voxels()
    write_zarr(tmp_path / "v.zarr", data, chunks=(2, 10, 33), shards=(4, 20, 33))
    opened = volume.open(tmp_path / "v.zarr")
    assert opened.chunk == (2, 10, 33)
    assert_reads(opened, data)


def test_leading_axes_of_one_entry_are_dropped(tmp_path):
    data = voxels()
    write_zarr(tmp_path / "v.zarr", data[None, None], chunks=(1, 1, 2, 16, 16))
    assert_reads(volume.open(tmp_path / "v.zarr"), data)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr_opens_at_full_resolution_with_its_voxel_size(tmp_path, version):
    data = voxels()
    write_ome(tmp_path / "v.zarr", data, version)
    opened = volume.open(tmp_path / "v.zarr")
    assert opened.dataset == "s0"
    assert opened.voxel_size_nm == (50, 5, 5)
    assert_reads(opened, data)


def test_a_coarser_level_keeps_its_own_voxel_size(tmp_path):
    data = voxels()
    write_ome(tmp_path / "v.zarr", data, "0.5")
    for opened in (volume.open(tmp_path / "v.zarr", dataset="s1"), volume.open(tmp_path / "v.zarr" / "s1")):
        assert opened.voxel_size_nm == (50, 10, 10)
        np.testing.assert_array_equal(opened.read(Box.from_shape(opened.shape)), data[:, ::2, ::2])


@pytest.mark.parametrize(
    ("unit", "scale", "size"),
    [
        ("nanometer", (50, 4.6, 4.6), (50, 4.6, 4.6)),
        ("angstrom", (500, 46, 46), (50, 4.6, 4.6)),
        ("millimeter", (5e-5, 4e-6, 4e-6), (50, 4, 4)),
        ("parsec", (1, 1, 1), None),
        ("", (8, 8, 8), None),
    ],
)
def test_units_of_axes_become_nanometers(tmp_path, unit, scale, size):
    write_ome(tmp_path / "v.zarr", voxels(), "0.5", unit=unit, scale=scale)
    assert volume.open(tmp_path / "v.zarr").voxel_size_nm == (None if size is None else pytest.approx(size))


def test_scales_of_image_and_level_multiply(tmp_path):
    write_ome(tmp_path / "v.zarr", voxels(), "0.4", unit="nanometer", scale=(1, 1, 1), group_scale=(40, 8, 8))
    assert volume.open(tmp_path / "v.zarr").voxel_size_nm == (40, 8, 8)


def test_time_and_channel_of_one_entry_are_dropped_and_longer_ones_refused(tmp_path):
    data = voxels()
    write_ome(tmp_path / "one.zarr", data[None, None], "0.4", axes="tczyx")
    assert_reads(volume.open(tmp_path / "one.zarr"), data)
    write_ome(tmp_path / "two.zarr", np.stack([data, data]), "0.4", axes="czyx")
    with refused("two.zarr", "2 channels", "--channel", "save the wanted one"):
        volume.open(tmp_path / "two.zarr")


def test_the_arrays_of_a_plain_group_are_listed(tmp_path):
    data = voxels()
    write_zarr(tmp_path / "v.zarr", data, "volumes/raw")
    write_zarr(tmp_path / "v.zarr", data, "volumes/labels")
    (tmp_path / "v.zarr" / "notes.txt").write_text("a stray file")
    with refused("v.zarr", "no OME-Zarr multiscales", "volumes/labels, volumes/raw", "--set input.dataset="):
        volume.open(tmp_path / "v.zarr")
    with refused("no zarr array or group", "volumes/rwa", "volumes/raw"):
        volume.open(tmp_path / "v.zarr", dataset="volumes/rwa")
    assert_reads(volume.open(tmp_path / "v.zarr", dataset="volumes/raw"), data)
    assert_reads(volume.open(tmp_path / "v.zarr" / "volumes" / "raw"), data)


def test_a_group_without_arrays_is_refused(tmp_path):
    arrays.create_group(tmp_path / "v.zarr")
    with refused("v.zarr", "it has no arrays"):
        volume.open(tmp_path / "v.zarr")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((40, 33), ("2-D", "axes z y x")),
        ((3, 4, 5, 6), ("4-D", "axis c has 3")),
        ((0, 4, 4), ("no voxels", "0 x 4 x 4")),
    ],
)
def test_zarr_arrays_that_are_no_volume_are_refused(tmp_path, shape, words):
    zarr.create_array(tmp_path / "v.zarr", shape=shape, chunks=tuple(max(1, n) for n in shape), dtype="uint8")
    with refused("v.zarr", *words):
        volume.open(tmp_path / "v.zarr")


def test_axes_in_another_order_are_refused(tmp_path):
    write_zarr(tmp_path / "v.zarr", voxels(), dimension_names=("x", "y", "z"))
    with refused("v.zarr", "axes x y z", "transpose"):
        volume.open(tmp_path / "v.zarr")


def test_complex_voxels_are_refused(tmp_path):
    write_zarr(tmp_path / "v.zarr", voxels().astype("complex64"))
    with refused("v.zarr", "complex64", "convert"):
        volume.open(tmp_path / "v.zarr")


def test_a_folder_named_zarr_without_metadata_is_refused(tmp_path):
    (tmp_path / "v.zarr").mkdir()
    with refused("no zarr array or group", "v.zarr"):
        volume.open(tmp_path / "v.zarr")


def test_broken_zarr_metadata_is_refused(tmp_path):
    write_zarr(tmp_path / "v.zarr", voxels())
    cut_short(tmp_path / "v.zarr" / "zarr.json")
    with refused("cannot open zarr", "v.zarr"):
        volume.open(tmp_path / "v.zarr")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_chunk_cut_short_is_refused_with_its_box_and_key(tmp_path, encoding, share):
    data = voxels("uint16")
    write_zarr(tmp_path / "v.zarr", data, chunks=(2, 16, 16), **ENCODINGS[encoding])
    opened = volume.open(tmp_path / "v.zarr")
    key = "c/0/0/0" if "shards" in encoding else "1.0.0" if "v2" in encoding else "c/1/0/0"
    cut_short(tmp_path / "v.zarr" / key, share)
    box = Box((1, 7, 2), (4, 40, 33))
    with refused("v.zarr", f"box {box}", f"{key}:", "damaged"):
        opened.read(box)
    np.testing.assert_array_equal(opened.read(Box((4, 0, 0), (5, 40, 33))), data[4:])


def test_voxels_before_the_cut_of_a_raw_chunk_are_still_right(tmp_path):
    data = voxels("uint16")
    write_zarr(tmp_path / "v.zarr", data, chunks=(2, 40, 33), compressors=None)
    cut_short(tmp_path / "v.zarr" / "c/1/0/0", 0.6)
    opened = volume.open(tmp_path / "v.zarr")
    np.testing.assert_array_equal(opened.read(Box((2, 0, 0), (3, 40, 33))), data[2:3])
    with refused("c/1/0/0", "box 3:4,0:40,0:33"):
        opened.read(Box((3, 0, 0), (4, 40, 33)))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("dtype", [">u2", ">f4"])
def test_a_chunk_cut_short_is_refused_by_the_slower_codecs_too(tmp_path, dtype, share):
    array = zarr.create_array(
        tmp_path / "v.zarr", shape=SHAPE, chunks=(2, 16, 16), dtype=dtype, zarr_format=2, compressors=zarr2_blosc()
    )
    array[...] = voxels(dtype)
    opened = volume.open(tmp_path / "v.zarr")
    opened.read(WHOLE)
    cut_short(tmp_path / "v.zarr" / "1.0.0", share)
    with refused("v.zarr", f"box {WHOLE}", "1.0.0", "cut short"):
        opened.read(WHOLE)


def test_a_missing_chunk_is_fill_value(tmp_path):
    data = voxels()
    write_zarr(tmp_path / "v.zarr", data, chunks=(2, 16, 16), fill_value=7)
    opened = volume.open(tmp_path / "v.zarr")
    (tmp_path / "v.zarr" / "c" / "0" / "0" / "0").unlink()
    data[:2, :16, :16] = 7
    np.testing.assert_array_equal(opened.read(WHOLE), data)


@pytest.mark.parametrize("axes", ["czyx", "zyxc", "tczyx", "ctzyx"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_channels_of_zarr_arrays_read_alone(tmp_path, axes, zarr_format):
    data = laid_out(axes)
    named = {"dimension_names": tuple(axes)} if zarr_format == 3 else {}
    if named or axes != "ctzyx":
        write_zarr(tmp_path / "v.zarr", data, zarr_format=zarr_format, **named)
        assert_channels(tmp_path / "v.zarr")
    write_ome(tmp_path / "o.zarr", data, "0.5" if zarr_format == 3 else "0.4", axes=axes, scale=(0.05, 0.005, 0.004))
    assert_channels(tmp_path / "o.zarr")
    assert volume.open_channels(tmp_path / "o.zarr")[2].voxel_size_nm == (50, 5, 4)


def test_a_volume_without_channels_is_its_only_channel(tmp_path):
    write_zarr(tmp_path / "v.zarr", voxels())
    assert volume.open_channels(tmp_path / "v.zarr") == (volume.open(tmp_path / "v.zarr"),)


def test_a_damaged_chunk_of_a_channel_is_named(tmp_path):
    write_zarr(tmp_path / "v.zarr", laid_out("zyxc"), chunks=(5, 40, 33, 1))
    cut_short(tmp_path / "v.zarr/c/0/0/0/1")
    good, bad, _ = volume.open_channels(tmp_path / "v.zarr")
    np.testing.assert_array_equal(good.read(WHOLE), CHANNELS[0])
    with refused("c/0/0/0/1", "0:5,0:40,0:33"):
        bad.read(WHOLE)


def test_axes_that_may_be_channels_or_not_are_refused(tmp_path):
    write_zarr(tmp_path / "both.zarr", np.zeros((2, 9, 9, 3), np.uint8))
    write_zarr(tmp_path / "none.zarr", np.zeros((5, 9, 9, 9), np.uint8))
    for name in ("both.zarr", "none.zarr"):
        with refused(name, "4-D", "cannot tell", "c z y x"):
            volume.open_channels(tmp_path / name)


def test_a_run_opens_as_its_labels(tmp_path):
    labels = voxels("uint32", (20, 30, 40))
    make_run(tmp_path / "run.zarr", labels)
    for dataset in ("", "labels/instances", "labels/instances/0"):
        opened = volume.open(tmp_path / "run.zarr", dataset=dataset)
        assert (opened.dataset, opened.voxel_size_nm) == ("labels/instances/0", (50, 5, 5))
        assert_reads(opened, labels)
    assert volume.open(tmp_path / "run.zarr", dataset="labels/instances/1").voxel_size_nm == (50, 10, 10)
    with refused("2 channels", "--channel"):
        volume.open(tmp_path / "run.zarr", dataset="0")
