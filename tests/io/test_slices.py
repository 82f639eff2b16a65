"""Folders of slices read back voxel for voxel; what is no volume, or damaged, is refused by name."""

import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.io.helpers import CUTS, WHOLE, assert_channels, assert_reads, cut_short, refused, voxels, write_slices
from volseg.box import Box
from volseg.io import slices, volume


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


# ----------------------------------------------------------------------------------- folders as other programs write them


def write_each(folder, planes, **options):
    folder.mkdir()
    for i, plane in enumerate(planes):
        tifffile.imwrite(folder / f"s{i:03}.tif", plane, **options)


def test_where_white_is_zero_gray_values_are_as_meant(tmp_path):
    data = voxels()
    write_each(tmp_path / "v", 255 - data, photometric="miniswhite")
    opened = volume.open(tmp_path / "v")
    assert_reads(opened, data)
    (note,) = opened.notes
    assert "s000.tif says that white is zero: its contrast was turned" in note
    assert "and so do 4 other slices" in note


def colors():
    """Sections with three samples a voxel, the second of them the volume."""
    return np.stack([voxels(seed=1), voxels(), voxels(seed=2)], axis=-1)


def write_png_colors(folder, data):
    folder.mkdir()
    for i, plane in enumerate(data):
        Image.fromarray(plane).save(folder / f"s{i:03}.png")


COLORS = {
    "rgb": lambda folder, data: write_each(folder, data, photometric="rgb"),
    "packed rgb": lambda folder, data: write_each(folder, data, photometric="rgb", compression="zlib", rowsperstrip=9),
    "planar rgb": lambda folder, data: write_each(
        folder, np.moveaxis(data, -1, 1), photometric="rgb", planarconfig="separate"
    ),
    "packed planar rgb": lambda folder, data: write_each(
        folder, np.moveaxis(data, -1, 1), photometric="rgb", planarconfig="separate", compression="zlib", rowsperstrip=9
    ),
    "channels": lambda folder, data: write_each(
        folder, np.moveaxis(data, -1, 1), photometric="minisblack", metadata={"axes": "CYX"}
    ),
    "imagej": lambda folder, data: write_each(folder, np.moveaxis(data, -1, 1), imagej=True, metadata={"axes": "CYX"}),
    "png": write_png_colors,
}


@pytest.mark.parametrize("kind", COLORS)
def test_colors_and_channels_of_slices_are_refused_unless_one_is_chosen(tmp_path, kind):
    COLORS[kind](tmp_path / "v", colors())
    with refused("s000", "convert it to gray" if kind not in ("channels", "imagej") else "3 channels"):
        volume.open(tmp_path / "v")
    assert_channels(tmp_path / "v", np.moveaxis(colors(), -1, 0))
    assert_reads(volume.open(tmp_path / "v", channel=1), voxels())


@pytest.mark.parametrize(
    ("facts", "size", "said"),
    [
        ({"unit": "micron", "spacing": 0.03}, (30.0, 4.0, 4.0), None),
        ({"unit": "micron"}, None, "? x 0.004 x 0.004 micron, which is not complete"),
        ({"spacing": 8}, None, "without a unit"),
    ],
)
def test_the_voxel_size_of_slices_that_fiji_saved_is_used_or_told(tmp_path, facts, size, said):
    (tmp_path / "v").mkdir()
    for i, plane in enumerate(voxels()):
        path = tmp_path / "v" / f"s{i}.tif"
        tifffile.imwrite(path, plane, imagej=True, resolution=(250.0, 250.0), metadata=facts)
    opened = volume.open(tmp_path / "v")
    assert_reads(opened, voxels())
    assert opened.voxel_size_nm == size
    assert [said in note for note in opened.notes] == ([True] if said else [])
    assert volume.open(tmp_path / "v", voxel_size_nm=(1, 2, 3)).notes == ()


def test_links_to_nowhere_are_refused_by_name(tmp_path):
    write_slices(tmp_path / "v", voxels(), suffix="tif")
    (tmp_path / "v" / "s3.tif").unlink()
    (tmp_path / "v" / "s3.tif").symlink_to("../annex/3")
    (tmp_path / "stack.tif").symlink_to("nowhere/stack.tif")
    (tmp_path / "image.zarr").symlink_to("nowhere/image.zarr")
    with refused("s3.tif is a link to ../annex/3", "git annex get"):
        volume.open(tmp_path / "v")
    for name in ("stack.tif", "image.zarr"):
        with refused(f"link to nowhere/{name}", "git annex get"):
            volume.open(tmp_path / name)


@pytest.mark.parametrize(
    "pointer", ["/annex/objects/SHA256E-s1--0.tif\n", "version https://git-lfs.github.com/spec/v1\n"]
)
def test_pointers_to_files_not_fetched_are_refused_by_name(tmp_path, pointer):
    write_slices(tmp_path / "v", voxels(), suffix="tif")
    (tmp_path / "v" / "s3.tif").write_text(pointer)
    (tmp_path / "stack.tif").write_text(pointer)
    for path, name in ((tmp_path / "v", "s3.tif"), (tmp_path / "stack.tif", "stack.tif")):
        with refused(f"{name} is a pointer", "git lfs pull"):
            volume.open(path)


def test_a_gap_in_the_numbers_is_refused_unless_allowed_and_told(tmp_path):
    data = voxels(shape=(12, 40, 33))
    write_each(tmp_path / "v", data)
    for i in (4, 5, 9):
        (tmp_path / "v" / f"s{i:03}.tif").unlink()
    with refused("no slice between s003.tif and s006.tif and 1 more gap", "input.allow_gaps=true"):
        volume.open(tmp_path / "v")
    opened = volume.open(tmp_path / "v", allow_gaps=True)
    assert_reads(opened, np.delete(data, (4, 5, 9), axis=0))
    assert "no slice between s003.tif and s006.tif" in opened.notes[0]


@pytest.mark.parametrize(
    ("names", "gap"),
    [
        (["s1", "s2", "s3", "s5"], "has no slice between s3.tif and s5.tif"),
        (["x2_s1", "x2_s2", "x2_s3", "x2_s5"], "has no slice between x2_s3.tif and x2_s5.tif"),
        (["s1_c0", "s2_c0", "s4_c0", "s5_c0"], "has no slice between s2_c0.tif and s4_c0.tif"),
        (["s0", "s10", "s20", "s40"], "has no slice between s20.tif and s40.tif"),
        (["s1", "s2", "s02", "s3"], "has two slices of one number, s02.tif and s2.tif"),
        (["s1", "s2", "s3", "s2 (1)"], "has a slice whose name is not like the others, s2 (1).tif"),
        (
            [f"g{i}_s{j}" for i in range(3) for j in range(4) if (i, j) != (1, 2)],
            "has no slice between g1_s1.tif and g1_s3.tif",
        ),
        ([f"g{i}_s{j}" for i in range(3) for j in range(4)], ""),
        (["s0", "s10", "s20", "s30"], ""),
        (["s8", "s9", "s10", "s11"], ""),
        (["s3", "s17", "s20", "s41"], ""),  # chosen sections, no count
        (["s1_a2", "s2_a5", "s3_a9", "s5_a1"], "has no slice between s3_a9.tif and s5_a1.tif"),
        (["t0900_s1", "t0907_s2", "t0921_s3", "t1003_s5"], "has no slice between t0921_s3.tif and t1003_s5.tif"),
        (["t0950_s1", "t0955_s2", "t1000_s3", "t1005_s4"], ""),  # times
        ([f"g{i}_s{10 * i + j}" for i in range(3) for j in range(4)], ""),
        (["2024-01-30", "2024-01-31", "2024-02-01", "2024-02-02"], ""),
        (["left", "right"], ""),
        (["s1"], ""),
        (["s1", "s9"], ""),
        (["s" + "9" * 5000, "s1", "s2", "s3"], ""),
    ],
)
def test_gaps_are_told_from_other_numbers(names, gap):
    assert slices.missing(sorted((f"{name}.tif" for name in names), key=slices._natural)) == gap


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["s1", "s2", "s4"], "uneven numbers, such as from s2.tif to s4.tif"),
        (["s1", "s2", "s4", "s7", "s9"], "uneven numbers, such as from s2.tif to s4.tif"),
        (["t1_s3", "t2_s17", "t9_s20", "t11_s41"], "uneven numbers, such as from t1_s3.tif to t2_s17.tif"),
        (["s2", "s4", "s6"], ""),
        (["t1_s1", "t4_s2", "t9_s3"], ""),
        (["left", "right"], ""),
    ],
)
def test_numbers_that_are_uneven_and_no_count_are_told(tmp_path, names, said):
    (tmp_path / "v").mkdir()
    for name, plane in zip(names, voxels(shape=(len(names), 40, 33)), strict=True):
        tifffile.imwrite(tmp_path / "v" / f"{name}.tif", plane)
    notes = volume.open(tmp_path / "v").notes
    assert [said in note and "read as neighbors" in note for note in notes] == ([True] if said else [])


def png(rows, width=33, height=40, *, level=6, cut=0, flip=None):
    """A gray PNG of ``rows`` (each behind a zero), whose header says ``width`` x ``height``."""
    packed = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows), level)
    packed = packed[: len(packed) - cut]

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    raw = bytearray(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)))
    raw += chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    if flip:
        raw[flip] ^= 1
    return bytes(raw)


EARLY = {
    "half of the rows": lambda plane: png(plane[:20]),
    "all but the last row": lambda plane: png(plane[:-1]),
    "half of the stream": lambda plane: png(plane, cut=600),
    "no checksum": lambda plane: png(plane, cut=4),
    "a flipped bit": lambda plane: png(plane, level=0, flip=700),
    "no row": lambda plane: png([]),
}


@pytest.mark.parametrize("kind", EARLY)
def test_a_png_that_ends_early_is_refused_by_name(tmp_path, kind):
    data = voxels()
    write_slices(tmp_path / "v", data)
    (tmp_path / "v" / "s2.png").write_bytes(png(data[2]))
    assert_reads(volume.open(tmp_path / "v"), data)
    (tmp_path / "v" / "s2.png").write_bytes(EARLY[kind](data[2]))
    with refused("s2.png", "damaged"):
        volume.open(tmp_path / "v").read(WHOLE)


def test_a_plane_that_decodes_to_far_more_than_its_file_is_refused_before_it_is_decoded(tmp_path):
    (tmp_path / "v").mkdir()
    for i in range(2):
        (tmp_path / "v" / f"s{i}.png").write_bytes(png([[0]], width=10**6, height=10**6))
    with refused("s0.png of 67 bytes decodes to 1e+03 GB", "damaged", "zarr"):
        volume.open(tmp_path / "v")


@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16"])
@pytest.mark.parametrize("options", [{}, {"interlace": 1}, {"bits": 4}])
def test_png_of_each_kind_read_as_pillow_has_them(tmp_path, mode, options):
    data = voxels("uint16" if mode == "I;16" else "bool" if mode == "1" else "uint8", (2, 40, 33))
    (tmp_path / "v").mkdir()
    for i, plane in enumerate(data):
        image = Image.fromarray(plane % 9 if mode == "P" else plane)
        if mode == "P":
            image = image.convert("P")
        image.save(tmp_path / "v" / f"s{i}.png", **options)
    for i, plane in enumerate(volume.open(tmp_path / "v").read(Box.from_shape((2, 40, 33)))):
        with Image.open(tmp_path / "v" / f"s{i}.png") as image:
            np.testing.assert_array_equal(plane, np.asarray(image))
