"""Folders of slices read back voxel for voxel; what is no volume, or damaged, is refused by name."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.io.helpers import CUTS, WHOLE, assert_reads, cut_short, refused, voxels, write_slices
from volseg.box import Box
from volseg.io import volume


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
