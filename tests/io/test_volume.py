"""What volumes of every kind share: boxes, checksums, and refusals of what is none."""

import re
import warnings

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.io.helpers import make_run, refused, voxels, write_ome, write_slices, write_zarr
from volseg.box import Box
from volseg.io import volume


def test_a_given_voxel_size_overrides_the_file(tmp_path):
    write_ome(tmp_path / "v.zarr", voxels(), "0.5")
    assert volume.open(tmp_path / "v.zarr", voxel_size_nm=(1, 2, 3)).voxel_size_nm == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_refused_with_its_box(tmp_path, value):
    data = voxels("float32")
    data[3, 30, 20] = value
    write_zarr(tmp_path / "v.zarr", data, chunks=(2, 16, 16))
    opened = volume.open(tmp_path / "v.zarr")
    np.testing.assert_array_equal(opened.read(Box((0, 0, 0), (3, 40, 33))), data[:3])
    with refused("v.zarr", "NaN or infinity", "3:4,30:31,20:21"):
        opened.read(Box((2, 16, 0), (5, 40, 33)))


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
            np.testing.assert_array_equal(opened.read(Box.from_shape(data.shape)), data)


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
    for name, content in {"empty.tif": b"", "text.tif": b"hello", "v.h5": b"x", "bare": b"x", "v.vol": b"x"}.items():
        (tmp_path / name).write_bytes(content)
    for name, words in {
        "empty.tif": ("empty (0 bytes)",),
        "text.tif": ("not a TIFF",),
        "v.h5": ("cannot open", "as HDF5", "file signature not found"),
        "bare": ("unsupported extension (none)",),
        "v.vol": ("unsupported extension .vol", "OME-Zarr", "convert"),
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
