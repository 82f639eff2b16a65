"""Benchmarks that time, on volumes so small that their figures say nothing."""

import json
import os
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import tifffile
import torch
from typer.testing import CliRunner

from benchmarks import (
    backends,
    end_to_end,
    epfl,
    formats,
    gpu,
    instances,
    io,
    repeat,
    report,
    throughput,
)
from benchmarks.__main__ import app
from volseg.box import Box
from volseg.engine import cluster
from volseg.inference import hardware
from volseg.io import volume


def test_peers_have_torch_as_it_comes_whatever_volseg_sets():
    before = torch.get_num_threads()
    deterministic = torch.backends.cudnn.deterministic
    try:
        torch.set_num_threads(1)
        torch.backends.cudnn.deterministic = True
        with throughput.as_it_comes():
            assert torch.get_num_threads() == cluster.CPU_COUNT
            assert not torch.backends.cudnn.deterministic
        assert torch.get_num_threads() == 1
        assert torch.backends.cudnn.deterministic
    finally:
        torch.set_num_threads(before)
        torch.backends.cudnn.deterministic = deterministic


def test_candidates_are_called_in_turn_each_in_a_process_of_its_own():
    makers = {"here": partial(partial, pow, 2), "there": partial(partial, pow, 3)}
    timed, counted = repeat.time_isolated(makers, 3, 2, {"here": (5,), "there": ()})
    assert [done.result for done in timed["here"] + timed["there"]] == [8, 8, 27, 27]
    assert all(done.seconds >= 0 and done.peak_bytes >= 0 for done in timed["here"])
    assert counted == {"here": {5: 32}, "there": {}}


def test_a_candidate_whose_process_ends_is_told():
    with pytest.raises(RuntimeError, match="ended without a result"):
        repeat.time_isolated({"gone": partial(os._exit, 3)}, 1, 1, {"gone": ()})


def test_each_method_is_timed_in_a_process_of_its_own(reference, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    instances.measure(reference, 22, 1)
    rows = json.loads((tmp_path / "instances-run.json").read_text())["rows"]
    assert len(rows) == 5 + sum(find_spec(package) is not None for package in instances.PACKAGES.values())
    assert all(row["Mvoxel/s"] > 0 and row["peak MB"] > 0 for row in rows)
    assert len({row[f"objects at {side}"] for side in instances.SIDES for row in rows[:2]}) == 1


def test_the_table_of_a_gpu_is_made_on_a_processor_when_asked(image, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    gpu.measure(image, 2, 1, str(tmp_path / "out"), ("predict.tile=96", "predict.overlap=32", "predict.batch=2"), "cpu")
    rows = {row["way"]: row for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]}
    ours = rows["volseg predict, fp32, end to end"]
    assert ours["bytes fetched / voxel"] == 2
    assert 1 < ours["bytes sent / voxel"] < 1.2
    assert ours["TFLOP/s"] > 0
    assert ours["mean diff /255"] == 0
    peers = [row for way, row in rows.items() if way.startswith("MONAI sliding_window_inference, fp32, channels_last")]
    assert len(peers) == 2
    assert all(row["Mvoxel/s"] > 0 for row in peers)


@pytest.mark.skipif(hardware.gpu_count() > 0, reason="a CUDA device is here")
def test_the_table_of_a_gpu_is_refused_without_one():
    done = CliRunner().invoke(app, ["gpu"])
    assert done.exit_code == 1
    assert "no CUDA device" in str(done.exception)


def test_stores_are_compared(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(io, "SHAPE", (32, 64, 96))
    io.measure(1)
    rows = json.loads((tmp_path / "io.json").read_text())["rows"]
    assert len(rows) == 12
    assert all(row["MB/s"] > 0 for row in rows)


def test_every_format_is_written_and_read_by_both(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "PLANE", (70, 60))
    shape = (9, 70, 60)
    expected = np.stack(list(formats._planes(shape)))
    whole = tuple(slice(0, n) for n in shape)
    for name, (write, alone) in formats.FORMATS.items():
        (tmp_path / name).mkdir()
        path = write(tmp_path / name, shape)
        np.testing.assert_array_equal(alone(path)(whole).view(np.uint8), expected)
        assert formats._volseg(path)(shape) == formats._library(alone, path)(shape)


def test_predict_is_timed_beside_what_one_would_write_without_volseg(image, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    source = volume.open(image)
    tifffile.imwrite(tmp_path / "em.tif", source.read(Box((0, 0, 0), (6, 128, 128))), photometric="minisblack")
    sets = ("cluster.workers=1", "cluster.dashboard=''")
    throughput.measure(str(tmp_path / "em.tif"), 6, 2, 1, "", str(tmp_path / "out"), sets, 0.5)
    rows = {row["way"]: row for row in json.loads((tmp_path / "throughput.json").read_text())["rows"]}
    assert sum("MONAI" in way for way in rows) == 3
    assert "dask map_overlap + torch fp32" in rows
    assert all(row["volseg fp32 is x"] > 0 for row in rows.values())
    alike = [way for way in rows if "MONAI" in way and "its defaults" not in way] + ["volseg predict, end to end, fp32"]
    assert all(rows[way]["mean diff /255"] < 1 and rows[way]["other side %"] < 1 for way in alike)


def test_a_peer_whose_blending_rounds_to_more_than_1_is_not_taken_for_one_that_counts_to_255():
    exact = np.linspace(0, 1, 256, dtype=np.float32).reshape(1, 1, 16, 16)
    above = throughput.difference(exact * np.float32(1.004), exact)
    assert 0 < above["mean diff /255"] < 1
    assert above["other side %"] < 1
    stored = throughput.difference(np.arange(256, dtype=np.uint8).reshape(exact.shape), exact)
    assert stored == {"mean diff /255": 0, "other side %": 0}


def test_every_backend_of_this_machine_is_timed(image, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    backends.measure(image, "", (1,), 1)
    rows = {row["engine"]: row for row in json.loads((tmp_path / "backends.json").read_text())["rows"]}
    assert rows["openvino fp32"]["changed_percent"] == 0
    assert all(row["mvoxel_per_s"] > 0 and row["changed_percent"] < 1 for row in rows.values())


def test_a_whole_command_is_timed_and_scored(image, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    epfl.measure(image, f"{image}/labels/truth", "14:22,0:150,0:170", ("",), 1, str(tmp_path / "em.volseg.zarr"), 1)
    (row,) = json.loads((tmp_path / "epfl.json").read_text())["rows"]
    assert row["model"] == "shipped"
    assert row["seconds"] > 0
    assert 0 < row["IoU"] <= 1


def test_a_mirrored_volume_is_inferred_beside_the_bare_model(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    em = np.random.default_rng(0).integers(0, 255, (36, 64, 80), np.uint8)
    tifffile.imwrite(tmp_path / "em.tif", em)
    end_to_end.measure(str(tmp_path / "em.tif"), str(tmp_path / "out"), (1, 2, 1), 0.5)
    (row,) = json.loads((tmp_path / "end-to-end.json").read_text())["rows"]
    assert row["voxels"] == 2 * em.size
    assert row["wanted / bare"] > 0
    laid = volume.open(str(tmp_path / "out/em.zarr/0"), voxel_size_nm=(5, 5, 5)).read(Box.from_shape((36, 128, 80)))
    assert (laid[:, 64:] == em[:, ::-1]).all()
