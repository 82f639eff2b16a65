"""TIFF files of every layout read back voxel for voxel; what is no volume, or damaged, is refused by name."""

import struct
import time
from functools import partial

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.io.helpers import WHOLE, assert_channels, assert_reads, cut_short, laid_out, read_or_refused, refused, voxels
from volseg.box import Box
from volseg.io import volume
from volseg.system import resident

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
    tifffile.imwrite(tmp_path / "times.tif", laid_out("zyxc"), photometric="minisblack", metadata={"axes": "TZYX"})
    tifffile.imwrite(tmp_path / "both.tif", np.zeros((3, 40, 33, 2), np.uint8), photometric="minisblack")
    with refused("both.tif", "4-D", "QQYX", "CZYX"):
        volume.open_channels(tmp_path / "both.tif")
    with refused("times.tif", "5 times", "--time"):
        volume.open_channels(tmp_path / "times.tif")


ROWS = {
    "named": {"metadata": {"axes": "ZYXC"}},
    "without names": {},
    "packed": {"metadata": {"axes": "ZYXC"}, "compression": "zlib"},
    "packed strips": {"metadata": {"axes": "ZYXC"}, "compression": "zlib", "rowsperstrip": 9},
    "tiles": {"metadata": {"axes": "ZYXC"}, "compression": "zlib", "tile": (16, 16)},
    "pages apart": {"metadata": {"axes": "ZYXC"}, "contiguous": False},
    "floats": {"dtype": "float32"},
}


@pytest.mark.parametrize("kind", ROWS)
def test_channels_behind_the_voxels_read_alone(tmp_path, kind):
    """As cellpose and others write z y x c: a page is then a row of voxels."""
    options = dict(ROWS[kind])
    data = laid_out("zyxc")[..., :2].astype(options.pop("dtype", "uint8"))
    tifffile.imwrite(tmp_path / "v.tif", data, photometric="minisblack", **options)
    assert_channels(tmp_path / "v.tif", np.moveaxis(data, -1, 0))
    with refused("v.tif", "2 channels"):
        volume.open(tmp_path / "v.tif")
    np.testing.assert_array_equal(volume.open(tmp_path / "v.tif", channel=1).read(WHOLE), data[..., 1])
    with refused("v.tif", "2 channels", "no channel 2"):
        volume.open(tmp_path / "v.tif", channel=2)


# ----------------------------------------------------------------------------------- files as other programs write them


def write_inverted(path, data, **options):
    """The voxels of ``data`` in a file that says that white is zero."""
    highest = 1 if data.dtype == bool else np.iinfo(data.dtype).max
    tifffile.imwrite(path, (highest - data).astype(data.dtype), photometric="miniswhite", **options)


INVERTED = {
    "plain": {"metadata": None},
    "shaped": {},
    "packed": {"compression": "zlib", "rowsperstrip": 9},
    "tiles": {"compression": "zlib", "tile": (16, 16)},
    "imagej": {"imagej": True, "metadata": {"axes": "ZYX"}},
    "ome": {"ome": True, "metadata": {"axes": "ZYX"}},
    "pages": {"contiguous": False},
}


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("kind", INVERTED)
def test_where_white_is_zero_gray_values_are_as_meant(tmp_path, kind, dtype):
    data = voxels(dtype)
    write_inverted(tmp_path / "v.tif", data, **INVERTED[kind])
    opened = volume.open(tmp_path / "v.tif")
    assert_reads(opened, data)
    (note,) = opened.notes
    assert "v.tif says that white is zero: its contrast was turned" in note
    tifffile.imwrite(tmp_path / "plain.tif", data, photometric="minisblack")
    assert opened.checksum() == volume.open(tmp_path / "plain.tif").checksum()


def test_bits_are_turned_where_white_is_zero_but_for_those_of_tifffile(tmp_path):
    """tifffile calls white zero in every file of bools, and means what it stores."""
    data = voxels("bool")
    tifffile.imwrite(tmp_path / "tifffile.tif", data)
    tifffile.imwrite(tmp_path / "scanner.tif", ~data, photometric="miniswhite", software="a scanner")
    for name, notes in (("tifffile.tif", 0), ("scanner.tif", 1)):
        opened = volume.open(tmp_path / name)
        assert_reads(opened, data.astype(np.uint8))
        assert (len(opened.notes), opened.binary) == (notes, True)


@pytest.mark.parametrize("dtype", ["uint32", "int16", "float32"])
def test_labels_and_floats_are_not_turned_and_it_is_told(tmp_path, dtype):
    data = voxels(dtype)
    tifffile.imwrite(tmp_path / "v.tif", data, photometric="miniswhite")
    opened = volume.open(tmp_path / "v.tif")
    assert_reads(opened, data)
    assert "white is zero, which is not applied" in opened.notes[0]


def write_pages(path, data, **options):
    with tifffile.TiffWriter(path) as writer:
        for plane in data:
            writer.write(plane, photometric="minisblack", **options)


def append(path, parts):
    for part in parts:
        tifffile.imwrite(path, part, append=True, photometric="minisblack")


def write_each_packed_otherwise(path, data, **options):
    with tifffile.TiffWriter(path) as writer:
        for i, plane in enumerate(data):
            writer.write(plane, photometric="minisblack", compression=(None, "zlib", "lzw")[i % 3], **options)


def write_thumbnails(path, data, *, first):
    with tifffile.TiffWriter(path) as writer:
        for plane in data:
            for step in (4, 1) if first else (1, 4):
                writer.write(plane[::step, ::step], photometric="minisblack", subfiletype=int(step > 1))


PAGE_BY_PAGE = {
    "loop": write_pages,
    "packed": lambda path, data: write_pages(path, data, compression="zlib"),
    "packed strips": lambda path, data: write_pages(path, data, compression="zlib", rowsperstrip=9),
    "packed otherwise": write_each_packed_otherwise,
    "packed otherwise, without metadata": partial(write_each_packed_otherwise, metadata=None),
    "with thumbnails": lambda path, data: write_thumbnails(path, data, first=False),
    "with thumbnails in front": lambda path, data: write_thumbnails(path, data, first=True),
    "without metadata": lambda path, data: write_pages(path, data, metadata=None, compression="zlib"),
    "appended": append,
    "appended halves": lambda path, data: append(path, (data[:2], data[2:])),
}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("kind", PAGE_BY_PAGE)
def test_a_stack_written_page_by_page_is_one_stack(tmp_path, kind, dtype):
    data = voxels(dtype)
    PAGE_BY_PAGE[kind](tmp_path / "v.tif", data)
    assert_reads(volume.open(tmp_path / "v.tif"), data)


def test_pages_of_different_kinds_are_no_stack(tmp_path):
    for name, other in {"type": voxels("uint16")[0], "shape": voxels()[0, 1:], "white": None}.items():
        with tifffile.TiffWriter(tmp_path / f"{name}.tif") as writer:
            writer.write(voxels()[0], photometric="minisblack")
            writer.write(
                voxels()[0] if other is None else other, photometric="miniswhite" if other is None else "minisblack"
            )
        with refused(f"{name}.tif", "2 kinds of pages"):
            volume.open(tmp_path / f"{name}.tif")


MIXED = {
    "packing": lambda i: {"compression": "zlib" if i == 5 else None},
    "packing of strips": lambda i: {"compression": "zlib", "rowsperstrip": 9 if i == 5 else 16},
    "predictor": lambda i: {"compression": "zlib", "predictor": i == 5},
    "type": lambda i: {"dtype": "uint16" if i == 5 else "uint8"},
    "shape": lambda i: {"rows": 39 if i == 5 else 40},
    "white": lambda i: {"photometric": "miniswhite" if i == 5 else "minisblack"},
    "palette": lambda i: {
        "photometric": "palette",
        "colormap": np.stack([np.arange(256, dtype="u2") * (1 + (i == 5))] * 3),
    },
}


@pytest.mark.parametrize("options", [{}, {"metadata": None}])
@pytest.mark.parametrize("kind", MIXED)
def test_one_page_of_many_that_is_stored_otherwise_is_read_as_it_says_or_refused(tmp_path, kind, options):
    """tifffile looks at pages 0, 1, 7 and the last, and takes the others to be like them."""
    data = voxels(shape=(12, 40, 33))
    with tifffile.TiffWriter(tmp_path / "v.tif") as writer:
        for i, plane in enumerate(data):
            own = {"photometric": "minisblack", **MIXED[kind](i)}
            plane = plane[: own.pop("rows", 40)].astype(own.pop("dtype", "uint8"))
            writer.write(plane, **own, **options)
    if kind in ("type", "shape", "white", "palette"):
        with refused("v.tif", "kinds of pages"):
            volume.open(tmp_path / "v.tif")
    else:
        assert_reads(volume.open(tmp_path / "v.tif"), data)


def test_channels_whose_pages_are_stored_in_different_ways_are_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "v.ome.tif") as writer:
        writer.write(voxels(shape=(6, 2, 40, 33)), photometric="minisblack", metadata={"axes": "ZCYX"})
    for tag, value, said in (
        ("RowsPerStrip", 41, "in different ways"),
        ("PhotometricInterpretation", 0, "page 5 is not"),
    ):
        with tifffile.TiffFile(tmp_path / "v.ome.tif", mode="r+b") as tif:
            tif.pages.get(5).tags[tag].overwrite(value)
        with refused("v.ome.tif", said):
            volume.open(tmp_path / "v.ome.tif", channel=1)


def test_an_ome_tiff_without_all_its_pages_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "v.ome.tif", voxels(), photometric="minisblack", metadata={"axes": "ZYX"})
    with tifffile.TiffFile(tmp_path / "v.ome.tif", mode="r+b") as tif:
        tag = tif.pages[0].tags["ImageDescription"]
        tag.overwrite(tag.value.replace('SizeZ="5"', 'SizeZ="8"'))
    with refused("v.ome.tif", "lacks 3 of the pages"):
        volume.open(tmp_path / "v.ome.tif")


IMAGEJ_DEPTHS = {
    "none": ({"unit": "micron"}, (1000.0, 4.0, 4.0), "1 micron, as ImageJ takes it"),
    "given": ({"unit": "micron", "spacing": 0.03}, (30.0, 4.0, 4.0), None),
    "negative": (
        {"unit": "micron", "spacing": -0.03},
        (30.0, 4.0, 4.0),
        "-0.03 x 0.004 x 0.004 micron: taken",
    ),
    "unit of its own": ({"unit": "micron", "spacing": 30, "zunit": "nm"}, (30.0, 4.0, 4.0), None),
    "zero": ({"unit": "micron", "spacing": 0.0}, None, "0 x 0.004 x 0.004 micron, which no voxel has"),
    "words": ({"unit": "micron", "spacing": "thick"}, None, "not complete"),
    "unknown unit": ({"unit": "furlong", "spacing": 1}, None, "in furlong: not used"),
    "no unit": (
        {"spacing": 8},
        None,
        "without a unit: not used; if these are nanometers, give input.voxel_size_nm=[8,",
    ),
}


@pytest.mark.parametrize("kind", IMAGEJ_DEPTHS)
def test_the_depth_of_imagej_voxels(tmp_path, kind):
    facts, size, said = IMAGEJ_DEPTHS[kind]
    tifffile.imwrite(
        tmp_path / "v.tif", voxels(), imagej=True, resolution=(250.0, 250.0), metadata={"axes": "ZYX", **facts}
    )
    opened = volume.open(tmp_path / "v.tif")
    assert opened.voxel_size_nm == size
    assert [said in note for note in opened.notes] == ([True] if said else [])
    given = volume.open(tmp_path / "v.tif", voxel_size_nm=(9, 9, 9))
    assert (given.voxel_size_nm, given.notes) == ((9.0, 9.0, 9.0), ())


OME_DEPTHS = {
    -30.0: ((30.0, 4.0, 4.0), "-30 x 4 x 4 nm: taken without its sign"),
    0.0: (None, "0 x 4 x 4 nm, which no voxel has"),
    1e300: (None, "which no voxel has"),
    "nan": (None, "not complete"),
    "thick": (None, "not complete"),
    "9" * 5000: (None, "not complete"),
}


@pytest.mark.parametrize("depth", OME_DEPTHS)
def test_the_depth_of_ome_voxels(tmp_path, depth):
    facts = {"PhysicalSizeX": 4.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 4.0, "PhysicalSizeYUnit": "nm"}
    facts |= {"PhysicalSizeZ": 12345.0, "PhysicalSizeZUnit": "nm"}
    tifffile.imwrite(tmp_path / "v.ome.tif", voxels(), photometric="minisblack", metadata={"axes": "ZYX", **facts})
    xml = tifffile.tiffcomment(tmp_path / "v.ome.tif").replace("12345.0", str(depth))
    tifffile.tiffcomment(tmp_path / "v.ome.tif", xml.encode())
    opened = volume.open(tmp_path / "v.ome.tif")
    size, said = OME_DEPTHS[depth]
    assert opened.voxel_size_nm == size
    assert [said in note for note in opened.notes] == [True]
    assert_reads(opened, voxels())


LAUGHS = '<!DOCTYPE OME [<!ENTITY a0 "ha">' + "".join(f'<!ENTITY a{i + 1} "{f"&a{i};" * 10}">' for i in range(9))
ENTITIES = {
    "laughs": (LAUGHS + "]>", "&a9;"),
    "a file": ('<!DOCTYPE OME [<!ENTITY a SYSTEM "file:///etc/hostname">]>', "&a;"),
    "a server": ('<!DOCTYPE OME [<!ENTITY a SYSTEM "http://127.0.0.1:9/a">]>', "&a;"),
    "deep": ("", "<a>" * 100_000),
}


@pytest.mark.parametrize("kind", ENTITIES)
def test_entities_of_ome_xml_are_not_expanded(tmp_path, kind):
    head, inside = ENTITIES[kind]
    tifffile.imwrite(tmp_path / "v.ome.tif", voxels(), photometric="minisblack", metadata={"axes": "ZYX"})
    xml = tifffile.tiffcomment(tmp_path / "v.ome.tif")
    odd = xml.replace("<OME ", f"{head}<OME ", 1).replace("</OME>", f"<Note>{inside}</Note></OME>")
    tifffile.tiffcomment(tmp_path / "v.ome.tif", odd.encode())
    before, start = resident("HWM"), time.monotonic()
    with read_or_refused():
        opened = volume.open(tmp_path / "v.ome.tif")
        assert_reads(opened, voxels())
        assert not any("ha" * 20 in note for note in opened.notes)
    assert time.monotonic() - start < 30
    assert resident("HWM") - before < 1 << 27


def test_ome_xml_that_is_none_is_left_out(tmp_path):
    tifffile.imwrite(tmp_path / "v.ome.tif", voxels(), photometric="minisblack", metadata={"axes": "ZYX"})
    xml = tifffile.tiffcomment(tmp_path / "v.ome.tif")
    tifffile.tiffcomment(tmp_path / "v.ome.tif", xml.replace("</OME>", "<OME>").encode())
    with read_or_refused():  # a stack of pages, or refused by name
        assert_reads(volume.open(tmp_path / "v.ome.tif"), voxels())


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_a_strip_that_decodes_to_far_more_than_a_strip_is_refused(tmp_path, compression):
    encode = {"zlib": imagecodecs.zlib_encode, "zstd": imagecodecs.zstd_encode}
    bomb = encode[compression](bytes(1 << 26))
    tifffile.imwrite(tmp_path / "v.tif", voxels(), photometric="minisblack", compression=compression)
    opened = volume.open(tmp_path / "v.tif")
    with tifffile.TiffFile(tmp_path / "v.tif", mode="r+") as tif:
        offset = tif.filehandle.size
        tif.filehandle.seek(offset)
        tif.filehandle.write(bomb)
        tif.pages[3].tags["StripOffsets"].overwrite([offset])
        tif.pages[3].tags["StripByteCounts"].overwrite([len(bomb)])
    before = resident("HWM")
    with refused("page 3", "v.tif"):
        opened.read(WHOLE)
    assert resident("HWM") - before < 1 << 25


@given(st.lists(st.tuples(st.integers(0, 699), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_bytes_never_end_in_a_traceback(tmp_path, changes):
    tifffile.imwrite(tmp_path / "v.tif", voxels(), photometric="minisblack", compression="zlib")
    raw = bytearray((tmp_path / "v.tif").read_bytes())
    for place, value in changes:
        raw[place] = value
    (tmp_path / "v.tif").write_bytes(raw)
    with read_or_refused():
        opened = volume.open(tmp_path / "v.tif")
        if np.prod(opened.shape) < 1e7:
            opened.read(Box.from_shape(opened.shape))
