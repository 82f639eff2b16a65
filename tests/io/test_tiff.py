"""TIFF files of every layout read back voxel for voxel; what is no volume, or damaged, is refused by name."""

import struct

import numpy as np
import pytest
import tifffile

from tests.io.helpers import WHOLE, assert_channels, assert_reads, cut_short, laid_out, refused, voxels
from volseg.box import Box
from volseg.io import volume

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
