"""Volumes of every kind, and what the tests of reading them share."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from numcodecs import Blosc
from PIL import Image
from zarr.codecs import BloscCodec, ZstdCodec

from volseg.box import Blocks, Box
from volseg.errors import UserError
from volseg.io import arrays, files, ome, volume

SHAPE = (5, 40, 33)
WHOLE = Box.from_shape(SHAPE)
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
    cuts = [box for cut in (*CUTS, Box.from_shape(data.shape)) if (box := cut.clip(data.shape)).voxels]
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


@contextmanager
def read_or_refused():
    """Inside, nothing is raised, or a :class:`UserError` of one line."""
    try:
        yield
    except UserError as error:
        message = str(error)
    else:
        return
    assert message.isprintable(), message


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


ENCODINGS = {
    "v3 zstd": {"compressors": ZstdCodec(level=1)},
    "v3 blosc": {"compressors": BloscCodec()},
    "v3 none": {"compressors": None},
    "v3 shards": {"shards": (4, 32, 32)},
    "v3 blosc shards": {"shards": (4, 32, 32), "compressors": BloscCodec()},
    "v2 default": {"zarr_format": 2},
}
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


def write_slices(folder, data, suffix="png", name="s{}"):
    folder.mkdir()
    for i, plane in enumerate(data):
        file = folder / f"{name.format(i)}.{suffix}"
        if suffix == "png":
            Image.fromarray(plane).save(file)
        else:
            tifffile.imwrite(file, plane)


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


def zarr2_blosc():
    """The compressor of most arrays of zarr 2."""
    return Blosc(cname="zstd")
