"""Probabilities of other networks: every kind of file gives the bytes it should, and then a run like any other."""

import json
import os
import shutil
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas
import pytest
import tifffile
import zarr
from PIL import Image

from benchmarks import exact
from tests.helpers import (
    LIGHT,
    SHAPE,
    Quiet,
    begin_run,
    decide,
    digest,
    do_stages,
    segment_here,
    segment_probabilities,
    settings,
    wait_for_markers,
    with_sets,
)
from volseg import api
from volseg.box import Box
from volseg.config import Input, Probabilities, load
from volseg.errors import UserError
from volseg.evaluation.verify import verify
from volseg.io import arrays, files, pyramid, volume
from volseg.io.probabilities import named_channels, notes
from volseg.segmentation import objects
from volseg.segmentation.heights import to_uint8

BOTH = {"probabilities": {"mask_channel": 0, "contour_channel": 1}}


def stored(path, out, block=None, **options):
    """What a run stores of the probabilities at ``path``."""
    made = begin_run(path, out, load(base={"probabilities": options, "blocks": {"shape": block} if block else {}}))
    do_stages(made, "import")
    return arrays.open_array(str(out), "0")[:]


@pytest.fixture(scope="module")
def probabilities(reference):
    """The two channels that the shipped model made of the synthetic volume, uint8 c z y x."""
    return arrays.open_array(reference, "0")[:]


# ---------------------------------------------------------------- values


def test_sixteen_bits_become_the_nearest_of_eight():
    every = np.arange(65536, dtype=np.uint16).reshape(1, 256, 256)
    want = [int(Fraction(255 * int(v), 65535) + Fraction(1, 2)) for v in every.ravel()]
    np.testing.assert_array_equal(to_uint8(every).ravel(), want)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_become_the_nearest_byte_halves_up(dtype):
    values = np.r_[np.random.default_rng(0).random(500), 0, 1, 0.5, np.arange(256) / 255, (np.arange(255) + 0.5) / 255]
    values = values.astype(dtype)
    want = [int(255 * Fraction(float(v)) + Fraction(1, 2)) for v in values]
    got = to_uint8(values.reshape(1, 1, -1)).ravel()
    exact = slice(None) if dtype != "float64" else slice(500)  # in double the product itself is rounded
    np.testing.assert_array_equal(got[exact], np.array(want)[exact])
    assert np.abs(got.astype(int) - want).max() <= 1


@pytest.mark.parametrize("value", [-0.01, 1.01, 255.0, 1e30])
def test_a_value_that_is_no_probability_is_named(value):
    data = np.zeros((2, 3, 4), np.float32)
    data[1, 2, 3] = value
    with pytest.raises(ValueError, match=r"voxel 1, 2, 3 of it is .*0\.\.1"):
        to_uint8(data)


# ---------------------------------------------------------------- files


def write_tiff(path, data, **options):
    tifffile.imwrite(path, data, photometric="minisblack", **options)


def write_slices(path, data):
    path.mkdir()
    for z, plane in enumerate(data):
        Image.fromarray(plane).save(path / f"{z}.png")


def as_float(data):
    return data.astype(np.float32) / np.float32(255)


KINDS = {
    "zarr 3, float32, c z y x": lambda p, d: zarr.create_array(p, data=as_float(d), dimension_names=tuple("czyx")),
    "zarr 2, uint16, z y x c": lambda p, d: zarr.create_array(
        p, data=np.moveaxis(d, 0, -1).astype(np.uint16) * 257, zarr_format=2
    ),
    "zarr 3, float64": lambda p, d: zarr.create_array(p, data=d / 255),
    "TIFF, uint8": lambda p, d: write_tiff(p, d, metadata={"axes": "CZYX"}),
    "TIFF, float32, samples": lambda p, d: write_tiff(p, np.moveaxis(as_float(d), 0, -1), planarconfig="contig"),
    "ImageJ": lambda p, d: write_tiff(p, np.moveaxis(as_float(d), 0, 1), imagej=True, metadata={"axes": "ZCYX"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_bytes_in_any_blocks(probabilities, tmp_path, kind):
    path = tmp_path / ("p.tif" if "zarr" not in kind else "p.zarr")
    KINDS[kind](path, probabilities)
    for name, block in (("whole", None), ("cut", (9, 50, 71))):
        got = stored(path, tmp_path / name, block, mask_channel=0, contour_channel=1)
        np.testing.assert_array_equal(got, probabilities)


def test_channels_may_be_volumes_of_their_own_and_turned_over(probabilities, tmp_path):
    mask, contour = probabilities
    write_slices(tmp_path / "mask", mask)
    zarr.create_array(tmp_path / "contour.zarr", data=as_float(255 - contour))
    found = stored(tmp_path / "mask", tmp_path / "a", contour=str(tmp_path / "contour.zarr"), inverted=["contour"])
    np.testing.assert_array_equal(found, probabilities)
    found = stored(tmp_path / "mask", tmp_path / "b", inverted=["mask"])
    np.testing.assert_array_equal(found, [255 - mask, 0 * mask])


def test_a_distance_is_stored_behind_mask_and_contour(probabilities, tmp_path):
    zarr.create_array(tmp_path / "p.zarr", data=probabilities)
    found = stored(tmp_path / "p.zarr", tmp_path / "a", mask_channel=1, distance_channel=0)
    np.testing.assert_array_equal(found, [probabilities[1], 0 * probabilities[0], probabilities[0]])


def test_bools_are_certain(tmp_path):
    data = np.random.default_rng(0).random((5, 20, 30)) < 0.5
    zarr.create_array(tmp_path / "p.zarr", data=data)
    np.testing.assert_array_equal(stored(tmp_path / "p.zarr", tmp_path / "a")[0], np.uint8(255) * data)


# ---------------------------------------------------------------- refusals


def refusals(tmp_path):
    """Name -> (data, what options say, what the line must say)."""
    ramp = np.linspace(0, 1, 6 * 40 * 50, dtype=np.float32).reshape(6, 40, 50)
    two = np.stack([ramp, ramp])
    return {
        "logits": (ramp * 8 - 4, {}, r"channel 0 \(mask\), in box .* is -4, and float .* 0\.\.1; apply the sigmoid"),
        "255ths": (ramp * 255, {}, r"0\.\.1.*divide"),
        "NaN": (ramp * np.float32("nan"), {}, "NaN"),
        "labels": ((ramp * 9).astype(np.uint32), {}, "holds uint32, as labels do"),
        "no number": (two, {}, "has 2 channels, 0 to 1: say which is the mask with --mask-channel"),
        "absent channel": (two, {"mask_channel": 2}, "0 to 1: there is no channel 2 for --mask-channel"),
        "absent contour": (ramp, {"contour_channel": 1}, "one channel, 0: there is no channel 1 for --contour-channel"),
        "nothing to invert": (ramp, {"inverted": ["contour"]}, "no contour to invert"),
        "unequal": (
            ramp,
            {"contour": str(tmp_path / "other.zarr")},
            r"other.zarr has shape \(6, 40, 51\).* must be equal",
        ),
    }


@pytest.mark.parametrize("case", [*refusals(Path())])
def test_what_is_no_probability_is_refused_before_anything_is_made(tmp_path, case):
    zarr.create_array(tmp_path / "other.zarr", data=np.zeros((6, 40, 51), np.uint8))
    data, options, said = refusals(tmp_path)[case]
    zarr.create_array(tmp_path / "p.zarr", data=data)
    with pytest.raises(UserError, match=said):
        segment_probabilities(tmp_path / "p.zarr", tmp_path / "out", probabilities=options)
    assert not list(tmp_path.glob("out*"))


def test_a_mask_of_0_and_1_is_remarked_upon(tmp_path):
    zarr.create_array(tmp_path / "p.zarr", data=np.ones((3, 20, 20), np.uint8))
    (note,) = notes(named_channels(str(tmp_path / "p.zarr"), Probabilities(), Input()))
    assert "nothing above 1" in note
    assert "255 stands for probability 1" in note


def test_a_bad_voxel_that_no_sample_saw_is_named(probabilities, tmp_path):
    data = as_float(probabilities)
    data[1, 20, 149, 100] = 7.5
    zarr.create_array(tmp_path / "p.zarr", data=data)
    made = begin_run(tmp_path / "p.zarr", tmp_path / "out", settings(**BOTH, blocks={"shape": (11, 75, 170)}))
    notes(made.channels)
    with pytest.raises(
        UserError, match=r"channel 1 \(contour\), in box 11:22,75:150,0:170: voxel 9, 74, 100 of it is 7.5"
    ):
        do_stages(made, "import")


# ---------------------------------------------------------------- whole runs


def test_a_runs_probabilities_taken_alone_give_its_labels(reference, tmp_path):
    """The oracle: the same probabilities, once inferred and once taken, in blocks and by two workers."""
    out = tmp_path / "run.volseg.zarr"
    two = {**LIGHT["cluster"], "workers": 2}
    segment_probabilities(f"{reference}/0", out, **BOTH, blocks={"shape": (7, 64, 64)}, cluster=two)
    assert digest(out) == digest(reference)
    pandas.testing.assert_frame_equal(
        pandas.read_parquet(f"{out}/tables/objects.parquet"),
        pandas.read_parquet(f"{reference}/tables/objects.parquet"),
        check_exact=True,
    )
    assert Path(out, "overlay.png").exists()


def test_probabilities_in_memory_give_the_same_labels(probabilities, reference, tmp_path):
    """With channels first or last; the copy that workers read is gone at the end."""
    size = {"input": {"voxel_size_nm": (5.0, 5.0, 5.0)}}
    for name, array in (("first", probabilities), ("last", np.moveaxis(probabilities, 0, -1))):
        run = api.segment(array, tmp_path / name, config=settings(**LIGHT, **BOTH, **size), progress=Quiet())
        assert digest(run.path) == digest(reference)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "last"]
    with pytest.raises(UserError, match=r"has 2 channels, 0 to 1: say which is the mask"):
        api.segment(probabilities, tmp_path / "none", config=settings(**LIGHT), progress=Quiet())


def test_without_a_contour_the_height_is_the_masks(probabilities, reference, tmp_path):
    zarr.create_array(tmp_path / "p.zarr", data=probabilities[0])
    segment_here(tmp_path / "p.zarr", tmp_path / "alone", settings())
    segment_here(f"{reference}/0", tmp_path / "weightless", settings(**BOTH, fragments={"contour": 0.0}))
    assert digest(tmp_path / "alone") == digest(tmp_path / "weightless") != digest(reference)


def test_a_taken_run_is_decided_anew_and_recomputed_like_any_other(reference, tmp_path):
    out = str(tmp_path / "run.volseg.zarr")
    segment_here(f"{reference}/0", out, settings(**LIGHT, **BOTH, stitch={"seed": 0.95, "min_voxels": 3000}))
    assert digest(out) != digest(reference)
    shutil.rmtree(f"{out}/work")
    back = with_sets(f"stitch.seed={settings().stitch.seed}", "stitch.min_voxels=100", "blocks.shape=[9, 50, 71]")
    with pytest.raises(UserError, match="--recompute"):
        decide(out, back, progress=Quiet())
    show = Quiet()
    decide(out, back, recompute=True, progress=show)
    assert digest(out) == digest(reference)
    assert show.stages["import"] == [np.prod(SHAPE)]
    with pytest.raises(UserError, match=r"cannot change .*probabilities"):
        decide(out, with_sets("probabilities.mask_channel=1"), progress=Quiet())


def test_a_distance_that_was_taken_can_be_the_height(reference, tmp_path):
    """The mask given as the distance cuts objects as the mask alone does, in any blocks."""
    roles = {"probabilities": {**BOTH["probabilities"], "distance_channel": 0}}
    for name, block in (("whole", SHAPE), ("cut", (9, 75, 170))):
        head = settings(**roles, fragments={"height": "head"}, blocks={"shape": block})
        segment_here(f"{reference}/0", tmp_path / name, head)
    segment_here(f"{reference}/0", tmp_path / "mask", settings(**BOTH, fragments={"contour": 0.0}))
    assert digest(tmp_path / "whole") == digest(tmp_path / "cut") == digest(tmp_path / "mask")
    with pytest.raises(UserError, match="head"):
        segment_probabilities(f"{reference}/0", tmp_path / "none", **BOTH, fragments={"height": "head"})


def test_a_killed_take_goes_on(reference, tmp_path):
    out = tmp_path / "run.volseg.zarr"
    own = settings(**LIGHT)
    sets = [
        f"--set={s}.{k}={json.dumps(v)}"
        for s in ("fragments", "stitch")
        for k, v in getattr(own, s).model_dump().items()
    ]
    line = [sys.executable, "-m", "volseg", "segment", f"{reference}/0", "--mask-channel=0", "--contour-channel=1",
            "--out", str(out), "--set=blocks.shape=[1, 150, 170]", "--workers=1", *sets]  # fmt: skip
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for_markers(out, 2, process, "import")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not out.exists()
    before = {p.name: p.stat().st_mtime_ns for p in Path(f"{out}.partial/work/markers/take").glob("[0-9]*.json")}
    done = subprocess.run(line, capture_output=True, timeout=250, text=True)
    assert done.returncode == 0, done.stderr
    after = {p.name: p.stat().st_mtime_ns for p in (out / "work/markers/take").glob("[0-9]*.json")}
    assert all(after[name] == stamp for name, stamp in before.items())
    assert digest(out) == digest(reference)


def test_probabilities_on_an_object_store(bucket, probabilities, reference, tmp_path):
    zarr.create_array(tmp_path / "p.zarr", data=as_float(probabilities), dimension_names=tuple("czyx"))
    source, out = f"{bucket}/foreign/p.zarr", f"{bucket}/foreign/run.volseg.zarr"
    for path in (tmp_path / "p.zarr").rglob("*"):
        if path.is_file():
            files.write_bytes(source, str(path.relative_to(tmp_path / "p.zarr")), path.read_bytes())
    segment_probabilities(source, out, **BOTH)
    assert digest(out) == digest(reference)


def test_an_empty_mask_has_no_objects(run, tmp_path):
    zarr.create_array(tmp_path / "p.zarr", data=np.zeros((4, 40, 50), np.float32))
    code, said, err = run("segment", tmp_path / "p.zarr", "--workers", 1, "--set", "cluster.dashboard=")
    assert code == 0, err
    assert "0 objects in" in said
    assert run("verify", tmp_path / "p.volseg.zarr")[0] == 0
    code, _, err = run("segment", tmp_path / "p.volseg.zarr", "--out", tmp_path / "q.zarr")
    assert code == 2
    assert "decided anew in place" in err


def test_other_options_on_an_unfinished_run_are_refused(probabilities, tmp_path):
    zarr.create_array(tmp_path / "p.zarr", data=probabilities)
    stored(tmp_path / "p.zarr", tmp_path / "out.partial", mask_channel=0)
    config = load(base={"probabilities": {"mask_channel": 1}})
    with pytest.raises(UserError, match=r"probabilities.mask_channel = 0, this one 1"):
        api.segment(str(tmp_path / "p.zarr"), str(tmp_path / "out"), config=config)


def test_labels_of_64_bits_go_all_the_way(monkeypatch, reference, tmp_path):
    """As if there were more than 2**32 objects."""
    for module in ("engine.instances", "engine.folder", "evaluation.recompute"):
        monkeypatch.setattr(f"volseg.{module}.label_dtype", lambda objects: "uint64")
    config = settings(**BOTH, blocks={"shape": (11, 75, 170)})
    labels = segment_here(f"{reference}/0", tmp_path / "run.volseg.zarr", config).labels
    assert labels.dtype == "uint64"
    np.testing.assert_array_equal(labels[:], volume.open(reference).read(Box.from_shape(SHAPE)))
    assert zarr.open_array(f"{tmp_path}/run.volseg.zarr/labels/instances/1", mode="r").dtype == np.uint64
    assert verify(f"{tmp_path}/run.volseg.zarr", boxes=1).ok


def test_ids_beyond_32_bits_are_counted_and_made_coarser(tmp_path):
    label = np.array([0, 2**32 + 7, 2**53 + 1, 2**53 + 2], np.uint64)
    region = np.random.default_rng(0).integers(0, 4, (4, 6, 8)).astype(np.uint32)
    sums = objects.measure(
        region, label, np.full(region.shape, 200, np.uint8), Box.from_shape(region.shape), [None] * 3
    )
    table = objects.objects_table(objects.merge([sums]), region.shape, (1.0, 1.0, 1.0))
    assert table["id"].tolist() == label[1:].tolist()
    assert table["voxels"].tolist() == [np.count_nonzero(region == i) for i in (1, 2, 3)]
    assert table["neighbors"].tolist() == [2, 2, 2]
    coarse = pyramid.downsample(label[region], (2, 2, 2))
    assert coarse.dtype == np.uint64
    assert set(coarse.ravel().tolist()) <= set(label.tolist())


BLOCKINGS = [(16, 100, 31), (3, 250, 300), (20, 64, 64), (7, 37, 300), (1, 250, 100), (5, 83, 77)]


def test_probabilities_of_vnc_have_one_answer_in_six_blockings(shared_data, tmp_path):
    box = Box((0, 500, 300), (20, 750, 600))
    mask, contour = exact.vnc_probabilities(str(shared_data / "vnc"), box)
    write_tiff(tmp_path / "p.tif", np.stack([mask, contour], axis=1), metadata={"axes": "ZCYX"})
    out = str(tmp_path / "run.volseg.zarr")
    config = load(sets=[*exact.VNC, "blocks.shape=[20, 64, 64]", "probabilities.mask_channel=0",
                        "probabilities.contour_channel=1"])  # fmt: skip
    summary = segment_here(tmp_path / "p.tif", out, config)
    assert summary.object_count > 3
    assert json.loads(Path(out, "run.json").read_text())["voxel_size_nm"] == [50, 4.6, 4.6]
    stored = arrays.open_array(out, "0")[:]
    for block in BLOCKINGS:
        found = exact.label_in_memory(stored, config, block, (50, 4.6, 4.6)).astype(np.uint32)
        assert exact.digest(found) == digest(out)
