"""Every kind of input reads back voxel for voxel; what is no volume, or damaged, is refused by name."""

import pickle
import re
import struct
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from zarr.codecs import BloscCodec, ZstdCodec

from volseg.box import Blocks, Box
from volseg.errors import UserError
from volseg.io import arrays, files, ome, volume

SHAPE = (5, 40, 33)
WHOLE = Box.whole(SHAPE)
CUTS = [WHOLE, Box((2, 0, 0), (3, 40, 33)), Box((1, 7, 5), (4, 31, 33)), Box((4, 39, 32), (5, 40, 33))]


def voxels(dtype="uint8", shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=shape).astype(dtype)
    if np.dtype(dtype).kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    return rng.integers(0, min(np.iinfo(dtype).max, 2**40), shape, endpoint=True).astype(dtype)


def assert_reads(opened, data):
    """``opened`` holds ``data``: whole, in cuts, from threads and after pickling."""
    assert opened.shape == data.shape
    cuts = [box for cut in (*CUTS, Box.whole(data.shape)) if (box := cut.clip(data.shape)).voxels]
    for box in cuts:
        got = opened.read(box)
        assert got.dtype == opened.dtype
        assert got.flags.writeable
        np.testing.assert_array_equal(got, data[box.slices])
    again = pickle.loads(pickle.dumps(opened))
    assert again == opened
    with ThreadPoolExecutor(4) as pool:
        for box, got in zip(cuts * 2, pool.map(again.read, cuts * 2), strict=True):
            np.testing.assert_array_equal(got, data[box.slices])


@contextmanager
def refused(*words):
    """Inside, a one-line :class:`UserError` holding each of ``words`` is raised."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


def cut_short(file, share=0.5):
    data = Path(file).read_bytes()
    Path(file).write_bytes(data[: int(len(data) * share)])


def write_zarr(path, data, name="", **options):
    array = zarr.create_array(path, name=name or None, data=data, **options)
    return array.store_path


def write_ome(path, data, version, axes="zyx", unit="micrometer", scale=(0.05, 0.005, 0.005), group_scale=None):
    """An OME-Zarr image of two levels."""
    group = zarr.open_group(path, mode="w", zarr_format=3 if version == "0.5" else 2)
    for i, level in enumerate((data, data[..., ::2, ::2])):
        group.create_array(f"s{i}", data=level, chunks=(*(1 for _ in data.shape[:-3]), 2, 16, min(16, level.shape[-1])))
    lead = [1.0] * (len(axes) - 3)
    sets = []
    for i, f in enumerate((1, 2)):
        size = {"z": scale[0], "y": scale[1] * f, "x": scale[2] * f}
        step = {"type": "scale", "scale": [size.get(axis, 1.0) for axis in axes]}
        sets.append({"path": f"s{i}", "coordinateTransformations": [step]})
    kinds = {"t": "time", "c": "channel"}
    named = [
        {"name": a, "type": kinds.get(a, "space"), **({"unit": unit} if unit and a in "zyx" else {})} for a in axes
    ]
    image = {"version": version, "axes": named, "datasets": sets}
    if group_scale:
        image["coordinateTransformations"] = [{"type": "scale", "scale": [*lead, *group_scale]}]
    meta = {"multiscales": [image]}
    group.attrs.update({"ome": {"version": "0.5", **meta}} if version == "0.5" else meta)


# -------------------------------------------------------------------------------------------------------------- zarr


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
        np.testing.assert_array_equal(opened.read(Box.whole(opened.shape)), data[:, ::2, ::2])


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


def test_a_given_voxel_size_overrides_the_file(tmp_path):
    write_ome(tmp_path / "v.zarr", voxels(), "0.5")
    assert volume.open(tmp_path / "v.zarr", voxel_size_nm=(1, 2, 3)).voxel_size_nm == (1.0, 2.0, 3.0)


def test_time_and_channel_of_one_entry_are_dropped_and_longer_ones_refused(tmp_path):
    data = voxels()
    write_ome(tmp_path / "one.zarr", data[None, None], "0.4", axes="tczyx")
    assert_reads(volume.open(tmp_path / "one.zarr"), data)
    write_ome(tmp_path / "two.zarr", np.stack([data, data]), "0.4", axes="czyx")
    with refused("two.zarr", "axis c has 2 entries", "save the wanted one"):
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


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_refused_with_its_box(tmp_path, value):
    data = voxels("float32")
    data[3, 30, 20] = value
    write_zarr(tmp_path / "v.zarr", data, chunks=(2, 16, 16))
    opened = volume.open(tmp_path / "v.zarr")
    np.testing.assert_array_equal(opened.read(Box((0, 0, 0), (3, 40, 33))), data[:3])
    with refused("v.zarr", "NaN or infinity", "3:4,30:31,20:21"):
        opened.read(Box((2, 16, 0), (5, 40, 33)))


ENCODINGS = {
    "v3 zstd": {"compressors": ZstdCodec(level=1)},
    "v3 blosc": {"compressors": BloscCodec()},
    "v3 none": {"compressors": None},
    "v3 shards": {"shards": (4, 32, 32)},
    "v3 blosc shards": {"shards": (4, 32, 32), "compressors": BloscCodec()},
    "v2 default": {"zarr_format": 2},
}


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
        tmp_path / "v.zarr", shape=SHAPE, chunks=(2, 16, 16), dtype=dtype, zarr_format=2, compressors=_v2_blosc()
    )
    array[...] = voxels(dtype)
    opened = volume.open(tmp_path / "v.zarr")
    opened.read(WHOLE)
    cut_short(tmp_path / "v.zarr" / "1.0.0", share)
    with refused("v.zarr", f"box {WHOLE}", "1.0.0", "cut short"):
        opened.read(WHOLE)


def _v2_blosc():
    from numcodecs import Blosc

    return Blosc(cname="zstd")


def test_a_missing_chunk_is_fill_value(tmp_path):
    data = voxels()
    write_zarr(tmp_path / "v.zarr", data, chunks=(2, 16, 16), fill_value=7)
    opened = volume.open(tmp_path / "v.zarr")
    (tmp_path / "v.zarr" / "c" / "0" / "0" / "0").unlink()
    data[:2, :16, :16] = 7
    np.testing.assert_array_equal(opened.read(WHOLE), data)


def test_a_box_outside_is_refused(tmp_path):
    write_zarr(tmp_path / "v.zarr", voxels())
    opened = volume.open(tmp_path / "v.zarr")
    for box in (Box((0, 0, 0), (6, 40, 33)), Box((-1, 0, 0), (3, 40, 33)), Box((2, 0, 0), (2, 40, 33))):
        with refused(str(box), "5 x 40 x 33"):
            opened.read(box)


def test_a_file_replaced_by_another_is_read_anew(tmp_path):
    for seed in (0, 1):
        data = voxels(seed=seed, shape=(5, 40, 33 + seed))
        write_zarr(tmp_path / "v.zarr", data, overwrite=True)
        tifffile.imwrite(tmp_path / "v.tif", data)
        for name in ("v.zarr", "v.tif"):
            opened = volume.open(tmp_path / name)
            np.testing.assert_array_equal(opened.read(Box.whole(data.shape)), data)


# -------------------------------------------------------------------------------------------------------------- TIFF

TIFFS = {
    "shaped": {},
    "pages apart": {"contiguous": False},
    "strips": {"rowsperstrip": 7},
    "deflate": {"compression": "zlib"},
    "deflate strips": {"compression": "zlib", "rowsperstrip": 7},
    "tiles": {"tile": (16, 16)},
    "deflate tiles": {"compression": "zlib", "tile": (16, 32)},
    "bigtiff": {"bigtiff": True},
    "big endian": {"byteorder": ">"},
    "plain": {"metadata": None},
}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("kind", TIFFS)
def test_tiff_layouts_read_back(tmp_path, kind, dtype):
    data = voxels(dtype)
    options = dict(TIFFS[kind])
    if options.pop("contiguous", True):
        tifffile.imwrite(tmp_path / "v.tif", data, photometric="minisblack", **options)
    else:
        with tifffile.TiffWriter(tmp_path / "v.tif") as writer:
            for plane in data:
                writer.write(plane, contiguous=False, metadata=None)
    opened = volume.open(tmp_path / "v.tif")
    assert (opened.kind, opened.dtype, opened.chunk) == ("tiff", dtype, (1, 40, 33))
    assert opened.voxel_size_nm is None
    assert_reads(opened, data)


def test_label_tiffs_of_32_bits_and_of_one_bit_read_back(tmp_path):
    labels = voxels("uint32")
    tifffile.imwrite(tmp_path / "labels.tif", labels, compression="zlib")
    assert_reads(volume.open(tmp_path / "labels.tif"), labels)
    mask = voxels("bool")
    tifffile.imwrite(tmp_path / "mask.tif", mask, photometric="minisblack")
    assert_reads(volume.open(tmp_path / "mask.tif"), mask.astype(np.uint8))


def test_imagej_hyperstacks_read_back_with_their_voxel_size(tmp_path):
    data = voxels("uint16")
    tifffile.imwrite(
        tmp_path / "v.tif",
        data[None, :, None],
        imagej=True,
        resolution=(1 / 0.0046, 1 / 0.005),
        metadata={"axes": "TZCYX", "spacing": 0.05, "unit": "um"},
    )
    opened = volume.open(tmp_path / "v.tif")
    assert opened.voxel_size_nm == pytest.approx((50, 5, 4.6), rel=1e-5)
    assert_reads(opened, data)


def test_a_virtual_imagej_stack_has_one_page_and_all_sections(tmp_path):
    data = voxels("uint8")
    file = tmp_path / "v.tif"
    tifffile.imwrite(
        file, data, imagej=True, metadata={"axes": "ZYX", "spacing": 8.0, "unit": "nm"}, resolution=(0.25, 0.125)
    )
    with tifffile.TiffFile(file) as tif:
        tag = tif.pages[0].offset + 2 + 12 * len(tif.pages[0].tags)
    raw = bytearray(file.read_bytes())
    raw[tag : tag + 4] = bytes(
        4
    )  # no second page: the description alone tells the sections, as ImageJ does beyond 4 GB
    file.write_bytes(raw)
    with tifffile.TiffFile(file) as tif:
        assert len(tif.pages) == 1
    opened = volume.open(file)
    assert opened.voxel_size_nm == (8, 8, 4)
    assert_reads(opened, data)
    cut_short(file, 0.7)
    with refused("v.tif", "cut short"):
        volume.open(file)


def test_ome_tiff_reads_back_with_its_voxel_size(tmp_path):
    data = voxels()
    meta = {
        "axes": "ZYX",
        "PhysicalSizeX": 5.0,
        "PhysicalSizeXUnit": "nm",
        "PhysicalSizeY": 5.0,
        "PhysicalSizeYUnit": "nm",
    }
    meta |= {"PhysicalSizeZ": 0.05, "PhysicalSizeZUnit": "µm"}
    tifffile.imwrite(tmp_path / "v.ome.tif", data, metadata=meta)
    opened = volume.open(tmp_path / "v.ome.tif")
    assert opened.voxel_size_nm == (50, 5, 5)
    assert_reads(opened, data)


def test_resolution_without_a_unit_is_no_voxel_size(tmp_path):
    tifffile.imwrite(
        tmp_path / "v.tif", voxels(), imagej=True, resolution=(0.2, 0.2), metadata={"axes": "ZYX", "spacing": 5}
    )
    assert volume.open(tmp_path / "v.tif").voxel_size_nm is None


@pytest.mark.parametrize("share", [0.15, 0.5, 0.9, 0.995])
@pytest.mark.parametrize("kind", ["shaped", "pages apart", "deflate", "bigtiff", "plain"])
def test_a_tiff_cut_short_is_refused_and_never_just_shorter(tmp_path, kind, share):
    test_tiff_layouts_read_back(tmp_path, kind, "uint8")
    cut_short(tmp_path / "v.tif", share)
    with refused("v.tif", "copy it again"):
        volume.open(tmp_path / "v.tif").read(WHOLE)


def test_a_damaged_page_is_refused_with_its_number_and_box(tmp_path):
    data = voxels()
    tifffile.imwrite(tmp_path / "v.tif", data, compression="zlib", rowsperstrip=40, photometric="minisblack")
    with tifffile.TiffFile(tmp_path / "v.tif") as tif:
        at, count = tif.pages[3].dataoffsets[0], tif.pages[3].databytecounts[0]
    raw = bytearray((tmp_path / "v.tif").read_bytes())
    raw[at : at + count] = bytes(count)
    (tmp_path / "v.tif").write_bytes(raw)
    opened = volume.open(tmp_path / "v.tif")
    np.testing.assert_array_equal(opened.read(Box((0, 0, 0), (3, 40, 33))), data[:3])
    box = Box((2, 3, 0), (5, 40, 33))
    with refused("page 3", "v.tif", f"box {box}"):
        opened.read(box)


def test_a_tiff_that_shrinks_after_opening_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "v.tif", voxels())
    opened = volume.open(tmp_path / "v.tif")
    cut_short(tmp_path / "v.tif")
    with refused("v.tif", "copy it again"):
        opened.read(WHOLE)


def test_a_tiff_with_a_missing_codec_is_refused_with_advice(tmp_path):
    file = tmp_path / "v.tif"
    tifffile.imwrite(file, voxels(), compression="zlib", photometric="minisblack")
    with tifffile.TiffFile(file) as tif:
        at = tif.pages[0].tags["Compression"].valueoffset
    raw = bytearray(file.read_bytes())
    raw[at : at + 2] = struct.pack("<H", 32809)  # ThunderScan, which no package decodes
    file.write_bytes(raw)
    with refused("v.tif", "THUNDERSCAN", "pip install imagecodecs"):
        volume.open(file)


@pytest.fixture(scope="module")
def many_formats(tmp_path_factory):
    """One volume in formats that decode in pieces."""
    folder, data = tmp_path_factory.mktemp("formats"), voxels("uint16", (6, 50, 70))
    tifffile.imwrite(folder / "tiles.tif", data, tile=(16, 32), compression="zlib", photometric="minisblack")
    tifffile.imwrite(folder / "strips.tif", data, rowsperstrip=9, compression="zlib", photometric="minisblack")
    write_zarr(folder / "shards.zarr", data, chunks=(2, 10, 14), shards=(4, 20, 28))
    write_slices(folder / "slices", data)
    return data, [volume.open(folder / name) for name in ("tiles.tif", "strips.tif", "shards.zarr", "slices")]


@given(st.tuples(*[st.tuples(st.integers(0, n - 1), st.integers(1, n)) for n in (6, 50, 70)]))
@settings(max_examples=50, deadline=None)
def test_any_box_reads_as_the_whole_does(many_formats, spans):
    data, opened = many_formats
    box = Box(tuple(a for a, _ in spans), tuple(a + n for a, n in spans)).clip(data.shape)
    for one in opened:
        np.testing.assert_array_equal(one.read(box), data[box.slices], err_msg=one.path)


def test_tiffs_that_are_no_gray_volume_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "rgb.tif", voxels(shape=(5, 40, 33, 3)), photometric="rgb")
    tifffile.imwrite(tmp_path / "flat.tif", voxels(shape=(40, 33)))
    tifffile.imwrite(tmp_path / "four.tif", voxels(shape=(2, 3, 40, 33)), photometric="minisblack")
    tifffile.imwrite(tmp_path / "channels.tif", voxels(shape=(5, 2, 40, 33)), imagej=True, metadata={"axes": "ZCYX"})
    tifffile.imwrite(tmp_path / "complex.tif", voxels().astype("complex64"), photometric="minisblack")
    with tifffile.TiffWriter(tmp_path / "mixed.tif") as writer:
        writer.write(voxels(), photometric="minisblack")
        writer.write(voxels(shape=(9, 9)))
    for name, words in {
        "rgb.tif": ("color", "3 samples"),
        "flat.tif": ("2-D", "40 x 33", "folder of slices"),
        "four.tif": ("4-D",),
        "channels.tif": ("2 channels",),
        "complex.tif": ("complex64",),
        "mixed.tif": ("2 kinds of pages", "5 x 40 x 33", "9 x 9"),
    }.items():
        with refused(name, *words):
            volume.open(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------- channels


CHANNELS = np.stack([voxels(seed=seed) for seed in range(3)])
AXIS = {"czyx": 0, "zyxc": 3, "tczyx": 1, "ctzyx": 0}


def laid_out(axes):
    """`CHANNELS` with its axes in that order."""
    data = np.moveaxis(CHANNELS, 0, axes.replace("t", "").index("c"))
    return np.expand_dims(data, axes.index("t")) if "t" in axes else data


def assert_channels(path, data=CHANNELS, **options):
    found = volume.open_channels(path, **options)
    assert len(found) == len(data)
    for one, channel in zip(found, data, strict=True):
        assert_reads(one, channel)


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


TIFF_CHANNELS = {
    "plain": ("czyx", {}),
    "named": ("zcyx", {"metadata": {"axes": "ZCYX"}}),
    "packed": ("czyx", {"metadata": {"axes": "CZYX"}, "compression": "zlib", "rowsperstrip": 9}),
    "tiled": ("zcyx", {"metadata": {"axes": "ZCYX"}, "compression": "zlib", "tile": (16, 32)}),
    "imagej": ("zcyx", {"imagej": True, "metadata": {"axes": "ZCYX"}}),
    "ome": ("czyx", {"ome": True, "metadata": {"axes": "CZYX"}}),
    "samples": ("zyxc", {"planarconfig": "contig"}),
    "packed samples": ("zyxc", {"planarconfig": "contig", "compression": "zlib", "rowsperstrip": 9}),
}


@pytest.mark.parametrize("kind", TIFF_CHANNELS)
def test_channels_of_tiffs_read_alone(tmp_path, kind):
    axes, options = TIFF_CHANNELS[kind]
    tifffile.imwrite(tmp_path / "v.tif", laid_out(axes), photometric="minisblack", **options)
    assert_channels(tmp_path / "v.tif")
    with refused("v.tif", "3 "):
        volume.open(tmp_path / "v.tif")


def test_tiff_channels_that_cannot_be_told_are_refused(tmp_path):
    for name, axes in (("last", "ZYXC"), ("times", "TZYX")):
        tifffile.imwrite(tmp_path / f"{name}.tif", laid_out("zyxc"), photometric="minisblack", metadata={"axes": axes})
        with refused(f"{name}.tif", "4-D", axes, "CZYX"):
            volume.open_channels(tmp_path / f"{name}.tif")


# ------------------------------------------------------------------------------------------------------------ slices


def write_slices(folder, data, suffix="png", name="s{}"):
    folder.mkdir()
    for i, plane in enumerate(data):
        file = folder / f"{name.format(i)}.{suffix}"
        if suffix == "png":
            Image.fromarray(plane).save(file)
        else:
            tifffile.imwrite(file, plane)


@pytest.mark.parametrize(
    ("suffix", "dtype"), [("png", "uint8"), ("png", "uint16"), ("tif", "uint8"), ("TIFF", "float32")]
)
def test_folders_of_slices_read_back_in_natural_order(tmp_path, suffix, dtype):
    data = voxels(dtype, (12, 40, 33))
    write_slices(tmp_path / "v", data, suffix)
    (tmp_path / "v" / "notes.txt").write_text("not a slice")
    (tmp_path / "v" / f"._s1.{suffix}").write_bytes(b"left by a Mac")
    opened = volume.open(tmp_path / "v")
    assert (opened.kind, opened.dtype, opened.chunk) == ("slices", dtype, (1, 40, 33))
    assert_reads(opened, data)


def test_one_bit_and_eight_bit_slices_may_be_mixed(tmp_path):
    mask = voxels("bool", (3, 40, 33))
    write_slices(tmp_path / "v", mask)  # 1-bit PNG
    Image.fromarray(mask[1].astype(np.uint8) * 255).save(tmp_path / "v" / "s1.png")
    expected = mask.astype(np.uint8)
    expected[1] *= 255
    opened = volume.open(tmp_path / "v")
    assert opened.dtype == "uint8"
    assert_reads(opened, expected)


def test_palette_slices_give_their_indices(tmp_path):
    data = voxels("uint8", (2, 40, 33)) % 5
    (tmp_path / "v").mkdir()
    for i, plane in enumerate(data):
        image = Image.fromarray(plane, "L").convert("L")
        image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9, 4, 4, 4])
        image.save(tmp_path / "v" / f"{i}.png")
    assert_reads(volume.open(tmp_path / "v"), data)


def test_a_slice_of_any_size_is_read(tmp_path):
    (tmp_path / "v").mkdir()
    Image.new("1", (20_000, 10_000)).save(tmp_path / "v" / "0.png")  # Pillow alone warns of a bomb
    opened = volume.open(tmp_path / "v")
    assert opened.shape == (1, 10_000, 20_000)
    assert not opened.read(Box((0, 9_990, 19_990), (1, 10_000, 20_000))).any()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_slice_that_differs_is_named(tmp_path, suffix):
    write_slices(tmp_path / "v", voxels(), suffix)
    write_slices(tmp_path / "w", voxels(), suffix)
    for folder, odd in (("v", voxels(shape=(40, 34))), ("w", voxels("uint16", (40, 33)))):
        file = tmp_path / folder / f"s3.{suffix}"
        Image.fromarray(odd).save(file) if suffix == "png" else tifffile.imwrite(file, odd)
        with refused(file, "40 x 33 uint8", "must agree"):
            volume.open(tmp_path / folder)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.6])
def test_a_slice_cut_short_is_named(tmp_path, suffix, share):
    data = voxels()
    write_slices(tmp_path / "v", data, suffix)
    cut_short(tmp_path / "v" / f"s3.{suffix}", share)
    with refused(tmp_path / "v" / f"s3.{suffix}", "copy it again"):
        volume.open(tmp_path / "v").read(WHOLE)


def test_a_slice_damaged_after_opening_is_named_with_the_box(tmp_path):
    write_slices(tmp_path / "v", voxels())
    opened = volume.open(tmp_path / "v")
    cut_short(tmp_path / "v" / "s3.png")
    with refused(tmp_path / "v" / "s3.png", f"box {CUTS[2]}"):
        opened.read(CUTS[2])


def test_a_folder_that_changes_after_opening_is_refused(tmp_path):
    write_slices(tmp_path / "v", voxels())
    opened = volume.open(tmp_path / "v")
    (tmp_path / "v" / "s3.png").unlink()
    with refused("held 5 slices and now holds 4"):
        opened.read(WHOLE)


def test_folders_that_are_no_volume_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    write_slices(tmp_path / "mixed", voxels())
    tifffile.imwrite(tmp_path / "mixed" / "s9.tif", voxels()[0])
    write_slices(tmp_path / "rgb", voxels(shape=(2, 40, 33, 3)))
    write_slices(tmp_path / "stacks", [voxels()], "tif")
    write_slices(tmp_path / "fake", voxels())
    (tmp_path / "fake" / "s2.png").write_bytes(b"GIF89a, not a PNG at all")
    for name, words in {
        "empty": ("neither a zarr nor holds",),
        "mixed": (".png and .tif",),
        "rgb": ("s0.png", "color", "RGB"),
        "stacks": ("s0.tif", "5 pages"),
        "fake": ("s2.png", "not a PNG"),
    }.items():
        with refused(name, *words):
            volume.open(tmp_path / name)


# ------------------------------------------------------------------------------------------------------ other files


def test_a_path_that_does_not_exist_names_its_neighbors(tmp_path):
    tifffile.imwrite(tmp_path / "training.tif", voxels())
    with refused("trainnig.tif", "did you mean training.tif?"):
        volume.open(tmp_path / "trainnig.tif")
    with refused("there is no folder", "nowhere"):
        volume.open(tmp_path / "nowhere" / "v.tif")
    with refused("holds nothing of that name"):
        volume.open(tmp_path / "qqq")


def test_files_that_are_no_volume_are_refused(tmp_path):
    Image.fromarray(voxels()[0]).save(tmp_path / "one.png")
    for name, content in {"empty.tif": b"", "text.tif": b"hello", "v.h5": b"x", "bare": b"x", "v.mrc": b"x"}.items():
        (tmp_path / name).write_bytes(content)
    for name, words in {
        "empty.tif": ("empty (0 bytes)",),
        "text.tif": ("not a TIFF",),
        "v.h5": ("unsupported extension .h5", "OME-Zarr", "convert"),
        "bare": ("unsupported extension (none)",),
        "v.mrc": ("unsupported extension .mrc",),
        "one.png": ("single 2-D slice", "folder"),
    }.items():
        with refused(name, *words):
            volume.open(tmp_path / name)


def test_the_checksum_tells_voxels_and_not_formats(tmp_path):
    data = voxels()
    tifffile.imwrite(tmp_path / "v.tif", data, compression="zlib")
    write_zarr(tmp_path / "v.zarr", data, chunks=(2, 16, 16))
    write_slices(tmp_path / "v", data)
    sums = {volume.open(tmp_path / name).checksum() for name in ("v.tif", "v.zarr", "v")}
    assert len(sums) == 1
    assert re.fullmatch("[0-9a-f]{64}", sums.pop())
    data[2, 20, 20] ^= 1
    write_zarr(tmp_path / "w.zarr", data)
    assert volume.open(tmp_path / "w.zarr").checksum() != volume.open(tmp_path / "v.zarr").checksum()


# -------------------------------------------------------------------------------------------------- arrays of a run


shapes = st.tuples(st.integers(1, 20), st.integers(1, 60), st.integers(1, 60))


@given(shapes, shapes, shapes, st.sampled_from(["uint8", "uint32", "uint64"]), st.integers(1, 2))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_written_alone_read_back_whole(tmp_path, shape, shard, chunk, dtype, channels):
    run = tmp_path / "run.zarr"
    files.remove(run)
    lead, name = ((channels,), "0") if channels > 1 else ((), "labels/instances/0")
    arrays.create_array(
        run,
        name,
        shape=lead + shape,
        dtype=dtype,
        chunk=(1,) * len(lead) + chunk,
        shard=lead + shard,
        axes="czyx"[1 - len(lead) :],
    )
    data = voxels(dtype, lead + shape)
    array = arrays.open_array(run, name)
    for box in Blocks(shape, shard):
        arrays.write(array, box, data[(..., *box.slices)])
    np.testing.assert_array_equal(arrays.open_array(run, name)[...], data)
    assert array.shards == lead + shard
    assert array.metadata.dimension_names == tuple("czyx"[1 - len(lead) :])


@given(shapes, shapes)
@settings(deadline=None)
def test_fitted_chunks_divide_their_shard(chunk, shard):
    assert all(s % c == 0 for c, s in zip(arrays.fit_chunk(chunk, shard), shard, strict=True))


def test_chunks_fit_awkward_shards():
    assert arrays.fit_chunk((32, 256, 256), (37, 50, 192)) == (37, 50, 192)
    assert arrays.fit_chunk((32, 256, 256), (1, 1024, 1000)) == (1, 256, 250)
    assert arrays.fit_chunk((32, 256, 256), (64, 1009, 768)) == (32, 1009, 256)


def make_labels(path, shape=(20, 30, 40), shard=(8, 16, 40)):
    arrays.create_array(path, "labels/instances/0", shape=shape, dtype="uint32", chunk=(4, 16, 16), shard=shard)
    return arrays.open_array(path, "labels/instances/0")


def test_a_write_that_cuts_a_shard_is_refused(tmp_path):
    array = make_labels(tmp_path / "run.zarr")
    for box in (
        Box((0, 0, 0), (4, 16, 40)),
        Box((4, 0, 0), (8, 16, 40)),
        Box((0, 0, 0), (8, 16, 39)),
        Box((16, 16, 0), (24, 30, 40)),
    ):
        with pytest.raises(ValueError, match=r"cuts shards of 8 x 16 x 40.*one task writes whole shards"):
            arrays.write(array, box, np.zeros(box.shape, np.uint32))
    with pytest.raises(ValueError, match="does not fill box"):
        arrays.write(array, Box((0, 0, 0), (8, 16, 40)), np.zeros((8, 16, 39), np.uint32))
    arrays.write(array, Box((16, 16, 0), (20, 30, 40)), np.ones((4, 14, 40), np.uint32))
    arrays.write(array, Box((0, 0, 0), (16, 16, 40)), np.ones((16, 16, 40), np.uint32))


def test_a_write_of_some_channels_is_refused(tmp_path):
    arrays.create_array(
        tmp_path / "r.zarr", "0", shape=(2, 4, 8, 8), dtype="uint8", chunk=(1, 4, 8, 8), shard=(1, 4, 8, 8)
    )
    with pytest.raises(ValueError, match="whole shards"):
        arrays.write(
            arrays.open_array(tmp_path / "r.zarr", "0"), Box.whole((4, 8, 8)), np.zeros((1, 4, 8, 8), np.uint8)
        )


@pytest.mark.parametrize("box", [Box((0, 0, 0), (8, 16, 40)), Box((16, 16, 0), (20, 30, 40))])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_torn_shard_can_be_written_again(tmp_path, box, share):
    array = make_labels(tmp_path / "run.zarr")
    data = voxels("uint32", box.shape)
    arrays.write(array, box, data)
    shards = files.list_keys(tmp_path / "run.zarr", "labels/instances/0/c")
    assert len(shards) == 1
    cut_short(tmp_path / "run.zarr" / shards[0], share)
    with refused("labels/instances/0", shards[0].removeprefix("labels/instances/0/")):
        volume.open(tmp_path / "run.zarr", dataset="labels/instances/0").read(box)
    arrays.write(array, box, data)
    np.testing.assert_array_equal(array[box.slices], data)


def test_a_flipped_bit_in_a_run_is_found(tmp_path):
    array = make_labels(tmp_path / "run.zarr")
    arrays.write(array, Box((0, 0, 0), (8, 16, 40)), voxels("uint32", (8, 16, 40)))
    file = tmp_path / "run.zarr" / files.list_keys(tmp_path / "run.zarr", "labels/instances/0/c")[0]
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 3] ^= 1
    file.write_bytes(raw)
    with refused("box 0:20,0:30,0:40", "c/0/0/0"):
        volume.open(tmp_path / "run.zarr", dataset="labels/instances/0").read(Box.whole((20, 30, 40)))


def test_blocks_written_again_as_background_are_background(tmp_path):
    array = make_labels(tmp_path / "run.zarr")
    box = Box((0, 0, 0), (8, 16, 40))
    arrays.write(array, box, np.full(box.shape, 7, np.uint32))
    arrays.write(array, box, np.zeros(box.shape, np.uint32))
    assert not array[box.slices].any()


def test_an_array_is_never_replaced_and_is_opened_anew_after_removal(tmp_path):
    first = make_labels(tmp_path / "run.zarr")
    with refused("exists", "remove it"):
        make_labels(tmp_path / "run.zarr")
    assert arrays.open_array(tmp_path / "run.zarr", "labels/instances/0") is first
    files.remove(tmp_path / "run.zarr")
    assert make_labels(tmp_path / "run.zarr", shape=(9, 9, 9)).shape == (9, 9, 9)


def test_threads_may_open_and_write_at_once(tmp_path):
    make_labels(tmp_path / "run.zarr")
    data = voxels("uint32", (20, 30, 40))

    def task(box):
        arrays.write(arrays.open_array(tmp_path / "run.zarr", "labels/instances/0"), box, data[box.slices])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(task, Blocks((20, 30, 40), (8, 16, 40))))
    np.testing.assert_array_equal(arrays.open_array(tmp_path / "run.zarr", "labels/instances/0")[...], data)


def make_run(path, labels):
    """A small run: probabilities with two channels, labels with two levels."""
    arrays.create_group(path)
    arrays.create_array(path, "0", shape=(2, *labels.shape), dtype="uint8", chunk=(1, 4, 16, 16), shard=(2, 8, 30, 40))
    arrays.set_group_attributes(path, "", ome.multiscales("probabilities", "czyx", [("0", (50, 5, 5))]))
    levels = [("0", (50, 5, 5)), ("1", (50, 10, 10))]
    for (name, _), data in zip(levels, (labels, labels[:, ::2, ::2]), strict=True):
        arrays.create_array(
            path, f"labels/instances/{name}", shape=data.shape, dtype="uint32", chunk=(4, 16, 16), shard=(8, 30, 40)
        )
        array = arrays.open_array(path, f"labels/instances/{name}")
        for box in Blocks(data.shape, (8, 30, 40)):
            arrays.write(array, box, data[box.slices])
    arrays.set_group_attributes(path, "labels", {"ome": {"version": "0.5", "labels": ["instances"]}})
    attributes = ome.multiscales("instances", "zyx", levels, source="../../")
    arrays.set_group_attributes(path, "labels/instances", attributes)
    files.write_bytes(path, "run.json", b"{}")


def test_a_run_opens_as_its_labels(tmp_path):
    labels = voxels("uint32", (20, 30, 40))
    make_run(tmp_path / "run.zarr", labels)
    for dataset in ("", "labels/instances", "labels/instances/0"):
        opened = volume.open(tmp_path / "run.zarr", dataset=dataset)
        assert (opened.dataset, opened.voxel_size_nm) == ("labels/instances/0", (50, 5, 5))
        assert_reads(opened, labels)
    assert volume.open(tmp_path / "run.zarr", dataset="labels/instances/1").voxel_size_nm == (50, 10, 10)
    with refused("axis c has 2 entries"):
        volume.open(tmp_path / "run.zarr", dataset="0")


def test_ome_attributes_are_those_of_the_standard(tmp_path):
    make_run(tmp_path / "run.zarr", voxels("uint32", (20, 30, 40)))
    ome = arrays.group_attributes(tmp_path / "run.zarr", "labels/instances")["ome"]
    assert ome["version"] == "0.5"
    assert ome["image-label"] == {"source": {"image": "../../"}}
    (image,) = ome["multiscales"]
    assert image["axes"][0] == {"name": "z", "type": "space", "unit": "nanometer"}
    assert image["datasets"][1] == {
        "path": "1",
        "coordinateTransformations": [
            {"type": "scale", "scale": [50.0, 10.0, 10.0]},
            {"type": "translation", "translation": [0.0, 2.5, 2.5]},
        ],
    }
    (image,) = arrays.group_attributes(tmp_path / "run.zarr")["ome"]["multiscales"]
    assert image["axes"][0] == {"name": "c", "type": "channel"}
    assert image["datasets"][0]["coordinateTransformations"][0]["scale"] == [1.0, 50.0, 5.0, 5.0]
    assert "image-label" not in arrays.group_attributes(tmp_path / "run.zarr")["ome"]


def test_attributes_are_added_to_those_that_exist(tmp_path):
    arrays.create_group(tmp_path / "run.zarr" / "labels")
    arrays.set_group_attributes(tmp_path / "run.zarr", "labels", {"a": 1, "b": 2})
    arrays.set_group_attributes(tmp_path / "run.zarr", "labels", {"b": 3})
    arrays.create_group(tmp_path / "run.zarr" / "labels")
    assert arrays.group_attributes(tmp_path / "run.zarr", "labels") == {"a": 1, "b": 3}


# ------------------------------------------------------------------------------------------------------ plain objects


def check_objects(path):
    """Keys written under ``path`` are listed, read, moved and removed."""
    assert files.list_keys(path, "work") == []
    assert not files.exists(path)
    with pytest.raises(FileNotFoundError):
        files.read_bytes(path, "work/markers/1")
    for key, data in (("work/markers/10", b"a"), ("work/markers/9", b""), ("work/marks", b"no"), ("run.json", b"{}")):
        files.write_bytes(path, key, data)
    assert files.list_keys(path, "work/markers") == ["work/markers/10", "work/markers/9"]
    assert files.list_keys(path, "run.json") == ["run.json"]
    assert files.list_keys(path) == ["run.json", "work/markers/10", "work/markers/9", "work/marks"]
    files.write_bytes(path, "work/markers/10", b"other")
    assert files.read_bytes(path, "work/markers/10") == b"other"
    files.move(f"{path}/work", f"{path}/done")
    assert files.list_keys(path, "done/markers") == ["done/markers/10", "done/markers/9"]
    assert not files.exists(f"{path}/work")
    files.move(f"{path}/run.json", f"{path}/done/run.json")
    assert files.exists(f"{path}/done/run.json")
    files.remove(f"{path}/done/run.json")
    files.remove(path)
    files.remove(path)
    assert not files.exists(path)


def test_objects_live_in_local_folders(tmp_path):
    check_objects(str(tmp_path / "run.zarr"))
    check_objects(f"file://{tmp_path}/run.zarr")


def test_objects_live_in_memory():
    check_objects("memory://objects/run.zarr")


def test_readers_never_see_a_part_of_an_object(tmp_path):
    path, seen, stop = str(tmp_path), set(), threading.Event()
    contents = [bytes([i]) * 200_000 for i in range(2)]
    files.write_bytes(path, "key", contents[0])

    def watch():
        while not stop.is_set():
            seen.add(files.read_bytes(path, "key"))
            assert set(files.list_keys(path)) == {"key"}

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        for i in range(100):
            files.write_bytes(path, "key", contents[i % 2])
        stop.set()
        watching.result()
    assert seen <= set(contents)


def test_local_and_remote_paths_are_told_apart():
    assert [files.is_remote(path) for path in ("s3://b/k", "memory://k", "/a/b", "a", "file:///a")] == [True] * 2 + [
        False
    ] * 3


# ---------------------------------------------------------------------------------------------------- remote stores


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


def test_a_blosc_chunk_of_zarr_2_cut_short_on_s3_is_refused(bucket):
    url = f"{bucket}/v2-blosc.zarr"
    data = voxels("uint16")
    zarr.create_array(url, data=data, chunks=(3, 40, 33), zarr_format=2, compressors=_v2_blosc())
    files.write_bytes(url, "1.0.0", files.read_bytes(url, "1.0.0")[:-7])
    with refused(url, "1.0.0 is cut short"):
        volume.open(url).read(WHOLE)


def test_an_unknown_protocol_is_refused():
    with refused("cannot reach", "nosuch://bucket/v.zarr"):
        volume.open("nosuch://bucket/v.zarr")


# --------------------------------------------------------------------------------------------------------- real data


def test_the_epfl_volume_opens_and_its_pages_read(shared_data):
    opened = volume.open(shared_data / "epfl" / "training.tif")
    assert (opened.shape, opened.dtype) == ((165, 768, 1024), "uint8")
    box = Box((80, 300, 500), (82, 400, 600))
    with tifffile.TiffFile(opened.path) as tif:
        expected = np.stack([tif.pages[z].asarray() for z in (80, 81)])[:, 300:400, 500:600]
    np.testing.assert_array_equal(opened.read(box), expected)


def test_the_vnc_slices_open_with_their_mixed_depths(shared_data):
    raw, labels = (volume.open(shared_data / "vnc" / name) for name in ("raw", "mitochondria"))
    assert raw.shape == labels.shape == (20, 1024, 1024)
    tops = [labels.read(Box((z, 0, 0), (z + 1, 1024, 1024))).max() for z in range(3)]
    assert tops == [255, 1, 255]  # section 1 is a 1-bit file
    np.testing.assert_array_equal(
        raw.read(Box((3, 10, 20), (4, 50, 60)))[0], tifffile.imread(f"{raw.path}/03.tif")[10:50, 20:60]
    )


def test_no_warning_escapes(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_run(tmp_path / "run.zarr", voxels("uint32", (20, 30, 40)))
        volume.open(tmp_path / "run.zarr").checksum()
