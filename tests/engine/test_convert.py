"""Conversion to an OME-Zarr pyramid: right voxels on every level, whatever stops it."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
import zarr

import volseg
from tests.helpers import ROOT, Quiet
from tests.io import formats as written
from tests.io.helpers import refused, voxels
from volseg.box import Box
from volseg.engine import convert
from volseg.engine.lock import Lock
from volseg.io import pyramid, volume

SHAPE = (37, 150, 170)
SMALL = {"chunk": (8, 16, 16), "shard": (16, 64, 64)}


def mean(data, factor):
    """The mean of each cell, as plainly as it can be said."""
    out = np.empty([-(-n // f) for n, f in zip(data.shape, factor, strict=True)], data.dtype)
    for place in np.ndindex(*out.shape):
        cell = data[tuple(slice(i * f, i * f + f) for i, f in zip(place, factor, strict=True))].astype(float)
        out[place] = np.floor(cell.mean() + 0.5) if data.dtype.kind in "iu" else cell.mean()
    return out


def levels(path):
    group = zarr.open_group(path, mode="r")
    listed = group.attrs["ome"]["multiscales"][0]["datasets"]
    return [group[entry["path"]][:] for entry in listed], [entry["coordinateTransformations"] for entry in listed]


def stop_before_the_end(monkeypatch, source, out):
    """What a conversion leaves that is stopped when every level is written."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, "_finish", stop)
        with pytest.raises(KeyboardInterrupt):
            volseg.convert(source, out, **SMALL)


def test_every_level_is_the_mean_of_the_one_above(tmp_path):
    np.save(tmp_path / "em.npy", data := voxels("uint8", SHAPE))
    made = volseg.convert(
        tmp_path / "em.npy", tmp_path / "em.zarr", **SMALL, settings=["input.voxel_size_nm=[50, 5, 4]"]
    )
    assert (made.shape, made.voxel_size_nm, made.dtype, made.chunk) == (SHAPE, (50, 5, 4), "uint8", (8, 16, 16))
    found, steps = levels(tmp_path / "em.zarr")
    np.testing.assert_array_equal(found[0], data)
    assert [level.shape for level in found] == [(37, 150, 170), (37, 75, 85), (37, 38, 43)]
    for above, level in pairwise(found):
        np.testing.assert_array_equal(level, mean(above, (1, 2, 2)))
    assert [step[0]["scale"] for step in steps] == [[50, 5, 4], [50, 10, 8], [50, 20, 16]]
    assert [step[1]["translation"] for step in steps] == [[0, 0, 0], [0, 2.5, 2], [0, 7.5, 6]]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["em.npy", "em.zarr"]


@pytest.mark.parametrize("dtype", ["float32", "bool", "int16"])
def test_each_type_has_its_mean(dtype, tmp_path):
    data = voxels(dtype, (9, 70, 65))
    volseg.convert(data, tmp_path / "em.zarr", **SMALL)
    found, _ = levels(tmp_path / "em.zarr")
    assert all(level.dtype == dtype for level in found)
    np.testing.assert_array_equal(found[0], data)
    shown = mean(data.astype(np.uint8) if dtype == "bool" else data, (2, 2, 2))
    np.testing.assert_allclose(found[1].astype(float), shown.astype(float), rtol=1e-6)
    unit = volseg.open_volume(tmp_path / "em.zarr")
    assert unit.voxel_size_nm is None  # an array has none, and none is invented


def test_labels_stay_labels(tmp_path):
    import h5py

    labels = voxels("uint64", (20, 80, 70)) % 3 * np.uint64(1 << 60)
    with h5py.File(tmp_path / "em.h5", "w") as file:
        file["labels"] = labels
    with refused("uint64 voxels, as labels do", "--labels"):
        volseg.convert(tmp_path / "em.h5", tmp_path / "em.zarr")
    made = volseg.convert(f"{tmp_path}/em.h5::/labels", tmp_path / "em.zarr", labels=True, **SMALL)
    found, _ = levels(tmp_path / "em.zarr")
    assert made.dtype == "uint64"
    np.testing.assert_array_equal(found[0], labels)
    np.testing.assert_array_equal(found[1], pyramid.downsample(labels, (2, 2, 2)))
    assert "image-label" in json.loads((tmp_path / "em.zarr" / "zarr.json").read_text())["attributes"]["ome"]


def test_a_volume_of_another_format_keeps_its_voxel_size(run, tmp_path):
    data = voxels("uint16", (12, 70, 66))
    path = written.nrrd(tmp_path, data)
    code, out, _ = run("convert", path, tmp_path / "em.zarr", "--workers", 1)
    assert code == 0
    assert "12 x 70 x 66 uint16, 50 x 5 x 4 nm" in out
    opened = volume.open(tmp_path / "em.zarr")
    assert opened.voxel_size_nm == (50, 5, 4)
    np.testing.assert_array_equal(opened.read(Box.from_shape(data.shape)), data)
    code, _, said = run("convert", path, tmp_path / "em.zarr")
    assert code == 2
    assert "exists; give another path, or --overwrite" in said
    code, out, _ = run("convert", path, tmp_path / "em.zarr", "--overwrite", "--voxel-nm", "40,4,4")
    assert code == 0
    assert volume.open(tmp_path / "em.zarr").voxel_size_nm == (40, 4, 4)


def test_a_conversion_killed_half_way_goes_on_to_the_same_voxels(tmp_path):
    np.save(tmp_path / "em.npy", data := voxels("uint16", (64, 256, 256)))
    out, partial = tmp_path / "em.zarr", tmp_path / "em.zarr.partial"
    options = ["--chunk", "8,16,16", "--shard", "16,32,32", "--workers", "2"]
    words = [sys.executable, "-m", "volseg", "convert", str(tmp_path / "em.npy"), str(out), *options]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True)
    while len(list(partial.glob("0/c/**/*"))) < 40:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    done = [file for file in partial.glob("0/c/**/*") if file.is_file()]
    assert 0 < len(done) < 256
    done[0].write_bytes(done[0].read_bytes()[:-9])
    done[-1].write_bytes(b"")

    volseg.convert(tmp_path / "em.npy", out, chunk=(8, 16, 16), shard=(16, 32, 32))
    found, _ = levels(out)
    np.testing.assert_array_equal(found[0], data)
    for above, level in pairwise(found):
        np.testing.assert_array_equal(level, pyramid.downsample_mean(above, (2, 2, 2)))
    assert not partial.exists()


def test_what_is_damaged_between_two_commands_is_written_again(tmp_path, monkeypatch):
    np.save(tmp_path / "em.npy", data := voxels("uint8", SHAPE))
    out = tmp_path / "em.zarr"

    stop_before_the_end(monkeypatch, tmp_path / "em.npy", out)
    shards = sorted(file for file in (tmp_path / "em.zarr.partial").glob("[01]/c/**/*") if file.is_file())
    kept = {file: file.stat().st_mtime_ns for file in shards if file.parts[-3] != "0"}  # one block reads whole planes
    shards[0].write_bytes(shards[0].read_bytes()[:-5])
    shards[1].unlink()

    with refused("begun with other voxel_size_nm"):
        volseg.convert(tmp_path / "em.npy", out, **SMALL, settings=["input.voxel_size_nm=[5, 5, 5]"])
    lines = []
    progress = Quiet()
    progress.message = lines.append
    made = volseg.convert(tmp_path / "em.npy", out, **SMALL, progress=progress)
    np.testing.assert_array_equal(made.read(Box.from_shape(SHAPE)), data)
    assert any("written again" in line for line in lines)
    for file, changed in kept.items():
        assert (out / file.relative_to(tmp_path / "em.zarr.partial")).stat().st_mtime_ns == changed


def test_nothing_else_is_ever_replaced(tmp_path):
    data = voxels("uint8", (9, 40, 40))
    np.save(tmp_path / "em.npy", data)
    zarr.create_array(tmp_path / "mine.zarr", data=data)
    with refused("mine.zarr", "did not make it"):
        volseg.convert(tmp_path / "em.npy", tmp_path / "mine.zarr", overwrite=True)
    with refused("would replace the volume it is made from"):
        volseg.convert(tmp_path / "mine.zarr", tmp_path / "mine.zarr", overwrite=True)
    with refused("no whole number of chunks"):
        volseg.convert(tmp_path / "em.npy", tmp_path / "em.zarr", chunk=(4, 16, 16), shard=(6, 32, 32))
    with Lock(str(tmp_path / "em.zarr")), refused("is being written by another volseg"):
        volseg.convert(tmp_path / "em.npy", tmp_path / "em.zarr")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["em.npy", "mine.zarr"]


def test_a_source_that_cannot_be_read_ends_with_one_line_and_no_output(run, tmp_path):
    path = written.hdf5(tmp_path, voxels("uint16"))
    import h5py

    with h5py.File(path) as file:
        chunk = file["volumes/raw"].id.get_chunk_info(3)
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(b"\xff" * (chunk.size // 2))
    code, _, said = run("convert", path, tmp_path / "out.zarr", "--workers", 1)
    assert code == 2
    assert said.splitlines()[-1].startswith("volseg: cannot read")
    assert not (tmp_path / "out.zarr").exists()


def test_a_conversion_on_an_object_store_is_no_image_before_it_is_whole(bucket, tmp_path, monkeypatch):
    data = voxels("uint8", (9, 70, 40))
    np.save(tmp_path / "em.npy", data)
    out = f"{bucket}/converted.zarr"

    stop_before_the_end(monkeypatch, tmp_path / "em.npy", out)
    with refused("no OME-Zarr multiscales"):
        volume.open(out)
    made = volseg.convert(tmp_path / "em.npy", out, **SMALL)
    np.testing.assert_array_equal(made.read(Box.from_shape(data.shape)), data)
    with refused("exists"):
        volseg.convert(tmp_path / "em.npy", out, **SMALL)


def test_blocks_hold_whole_chunks_of_the_source_where_memory_allows(tmp_path):
    np.save(tmp_path / "em.npy", np.zeros((4, 40, 40), np.uint8))
    source = volume.open(tmp_path / "em.npy")
    from dataclasses import replace

    plane = replace(source, shape=(300, 5000, 6000), chunk=(1, 5000, 6000), dtype="uint8")
    assert convert.block_shape(plane, (64, 512, 512), 1 << 40) == (64, 5120, 6144)
    assert convert.block_shape(plane, (64, 512, 512), 1 << 28) == (64, 512, 6144)
    assert convert.block_shape(plane, (64, 512, 512), 1) == (64, 512, 512)
    assert convert.default_shard(plane, (64, 128, 128)) == (64, 1024, 1024)
    assert convert.default_shard(plane, (100, 100, 3000)) == (100, 1000, 3000)
    deep = replace(plane, chunk=(300, 64, 64))
    assert convert.default_shard(deep, (64, 128, 128)) == (256, 512, 512)
    assert convert.block_shape(deep, (64, 512, 512), 1 << 40) == (320, 512, 512)
