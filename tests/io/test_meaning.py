"""Gray values mean what a file says: palettes, channels, times, and contrast that is turned by choice."""

import h5py
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from tests.io.helpers import assert_reads, refused, voxels
from volseg.io import volume

STACKS = np.stack([np.stack([voxels(seed=10 * t + c) for c in range(2)]) for t in range(3)])  # t c z y x


def ordered(axes):
    return STACKS.transpose(["tczyx".index(axis) for axis in axes])


def write_tiff(path, axes, **options):
    data = ordered(axes)
    tifffile.imwrite(path, data, photometric="minisblack", metadata={"axes": axes.upper()}, **options)


def write_zarr(path, axes, version=3):
    data = ordered(axes)
    names = {"dimension_names": list(axes)} if version == 3 else {}
    zarr.create_array(str(path), data=data, chunks=tuple(min(n, 16) for n in data.shape), zarr_format=version, **names)


HYPERSTACKS = {
    "imagej": ("v.tif", lambda path: write_tiff(path, "tzcyx", imagej=True)),
    "shaped": ("v.tif", lambda path: write_tiff(path, "tczyx")),
    "channels first": ("v.tif", lambda path: write_tiff(path, "ctzyx")),
    "packed": ("v.tif", lambda path: write_tiff(path, "tzcyx", compression="zlib", rowsperstrip=9)),
    "ome": ("v.ome.tif", lambda path: write_tiff(path, "tczyx")),
    "ome times inside": ("v.ome.tif", lambda path: write_tiff(path, "ztcyx", compression="zlib")),
    "zarr": ("v.zarr", lambda path: write_zarr(path, "tczyx")),
    "zarr times last": ("v.zarr", lambda path: write_zarr(path, "zyxct")),
    "zarr 2": ("v.zarr", lambda path: write_zarr(path, "tczyx", version=2)),
}


@pytest.mark.parametrize("kind", HYPERSTACKS)
def test_a_channel_and_a_time_are_chosen_and_told_or_refused(tmp_path, kind):
    name, write = HYPERSTACKS[kind]
    write(tmp_path / name)
    for time, channel in ((0, 0), (2, 0), (1, 1)):
        opened = volume.open(tmp_path / name, time=time, channel=channel)
        assert_reads(opened, STACKS[time, channel])
        notes = " ".join(opened.notes)
        assert f"channel {channel} of 2 is read" in notes
        assert f"time {time} of 3 is read" in notes
    with refused(name, "3 times", "--time"):
        volume.open(tmp_path / name, channel=0)
    with refused(name, "2 ", "--channel"):
        volume.open(tmp_path / name, time=0)
    with refused(name, "3 times", "no time 3"):
        volume.open(tmp_path / name, time=3, channel=0)
    with refused(name, "2 channels", "no channel 5"):
        volume.open(tmp_path / name, time=0, channel=5)


def test_times_of_an_array_are_chosen():
    opened = volume.open_volume(STACKS, axes="tczyx", channel=1, time=2)
    assert_reads_here(opened, STACKS[2, 1])
    with refused("numpy", "3 times"):
        volume.open_volume(STACKS, axes="tczyx", channel=1)


def assert_reads_here(opened, data):
    box = volume.Box.from_shape(data.shape)
    np.testing.assert_array_equal(opened.read(box), data)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "int16", "float32"])
def test_turned_contrast_is_that_of_the_turned_voxels(tmp_path, dtype):
    data = voxels(dtype)
    turned = ~data if data.dtype.kind in "bui" else -data
    for write, name in ((zarr.create_array, "v.zarr"), (tifffile.imwrite, "v.tif")):
        if name == "v.zarr":
            write(str(tmp_path / name), data=turned, chunks=(2, 16, 16))
        else:
            write(tmp_path / name, turned, photometric="minisblack")
        opened = volume.open(tmp_path / name, invert=True)
        assert_reads(opened, data.astype(opened.dtype))
        assert ["contrast is turned" in note for note in opened.notes] == [True]
    assert_reads_here(volume.open_volume(turned, invert=True), data.astype(opened.dtype))
    copied = volume.materialize(volume.open_volume(turned, invert=True), tmp_path / "copy.zarr")
    assert_reads(copied, data.astype(opened.dtype))
    assert "contrast is turned" in copied.notes[0]
    assert volume.materialize(volume.open_volume(turned, invert=True), tmp_path / "copy.zarr") == copied


@pytest.mark.parametrize("factor", [-2.0, 0.5])
@pytest.mark.parametrize("kind", ["nc", "zarr"])
def test_a_factor_below_0_turns_contrast_and_any_is_told(tmp_path, kind, factor):
    packed = {"scale_factor": factor, "add_offset": 510.0}
    if kind == "nc":
        with h5py.File(tmp_path / "v.nc", "w") as file:
            file.create_dataset("em", data=voxels()).attrs.update(packed)
    else:
        zarr.create_array(str(tmp_path / "v.zarr"), data=voxels(), chunks=(2, 16, 16), attributes=packed)
    opened = volume.open(tmp_path / f"v.{kind}")
    assert_reads(opened, 255 - voxels() if factor < 0 else voxels())
    assert [f"values times {factor:g} plus 510 are meant" in note for note in opened.notes] == [True]
    assert_reads(volume.open(tmp_path / f"v.{kind}", invert=True), voxels() if factor < 0 else 255 - voxels())


@pytest.mark.parametrize("names", ["xyz", "zyx", "tzyx", "zyxc"])
def test_names_of_axes_are_found_where_xarray_writes_them(tmp_path, names):
    long = {"t": "time", "c": "channel"}
    data = np.stack([voxels(seed=i) for i in range(2)])[..., None]  # t or c, z y x, 1
    stored = {
        "xyz": data[0, ..., 0].T,
        "zyx": data[0, ..., 0],
        "tzyx": data[..., 0],
        "zyxc": np.moveaxis(data[..., 0], 0, 3),
    }
    attributes = {"_ARRAY_DIMENSIONS": [long.get(name, name) for name in names]}
    path, chunks = str(tmp_path / "v.zarr"), (2,) * len(names)
    zarr.create_array(path, data=stored[names], chunks=chunks, zarr_format=2, attributes=attributes)
    if names == "xyz":
        with refused("has axes x y z", "transpose it"):
            volume.open(path)
        return
    chosen = {"t": {"time": 1}, "z": {}}[names[0]] if "c" not in names else {"channel": 1}
    assert_reads(volume.open(path, **chosen), data[len(chosen), ..., 0])


# ------------------------------------------------------------------------------------------------------------ palettes

GRAYS = np.repeat(255 - np.arange(256), 3).reshape(256, 3).astype(np.uint8)
COLORS = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
LINEAR = np.repeat(np.arange(256), 3).reshape(256, 3).astype(np.uint8)
TIMES = (1, 256, 257)  # what programs multiply 8 bits with where a palette has 16
PALETTES = {"grays": GRAYS, "linear": LINEAR, "colors": COLORS}
SAID = {"grays": "palette of grays: the grays", "linear": None, "colors": "palette of colors: the entries"}


def write_palette_png(folder, data, colors):
    folder.mkdir()
    for i, plane in enumerate(data):
        image = Image.fromarray(plane).convert("P")
        image.putdata(plane.ravel())
        image.putpalette(colors.tobytes())
        image.save(folder / f"s{i}.png")


def write_palette_tiff(path, data, colors, times=257):
    tifffile.imwrite(path, data, photometric="palette", colormap=colors.T.astype(np.uint16) * times, metadata=None)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("palette", ["grays", "linear"])
def test_a_palette_of_a_tiff_has_the_grays_that_were_meant_whatever_made_16_bits_of_8(tmp_path, times, palette):
    write_palette_tiff(tmp_path / "v.tif", voxels(), PALETTES[palette], times)
    opened = volume.open(tmp_path / "v.tif")
    assert_reads(opened, PALETTES[palette][:, 0][voxels()])
    assert len(opened.notes) == (palette == "grays")


@pytest.mark.parametrize("palette", PALETTES)
@pytest.mark.parametrize("kind", ["png", "tiff", "tiff slices"])
def test_a_palette_of_grays_is_applied_and_one_of_colors_is_told(tmp_path, kind, palette):
    data, colors = voxels(), PALETTES[palette]
    if kind == "png":
        write_palette_png(tmp_path / "v", data, colors)
    elif kind == "tiff":
        write_palette_tiff(tmp_path / "v", data, colors)
        (tmp_path / "v").rename(tmp_path / "v.tif")
    else:
        (tmp_path / "v").mkdir()
        for i, plane in enumerate(data):
            write_palette_tiff(tmp_path / "v" / f"s{i}.tif", plane, colors)
    opened = volume.open(tmp_path / ("v.tif" if kind == "tiff" else "v"))
    assert_reads(opened, colors[:, 0][data] if palette == "grays" else data)
    assert [SAID[palette] in note for note in opened.notes] == ([True] if SAID[palette] else [])


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_bits_below_8_read_as_the_values_stored(tmp_path, photometric):
    data = voxels(shape=(5, 40, 32)) % 16
    stored = 15 - data if photometric == "miniswhite" else data
    with tifffile.TiffWriter(tmp_path / "v.tif") as writer:
        for plane in stored[..., ::2] << 4 | stored[..., 1::2]:
            writer.write(plane, photometric=photometric, metadata=None)
    with tifffile.TiffFile(tmp_path / "v.tif", mode="r+") as tif:
        for page in tif.pages:
            page.tags["ImageWidth"].overwrite(32)
            page.tags["BitsPerSample"].overwrite(4)
    assert_reads(volume.open(tmp_path / "v.tif"), data)
