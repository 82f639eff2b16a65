"""What ``auto`` takes: candidates are held against float32, the fastest is kept, and a run stays with its choice."""

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch

from tests.helpers import CARD, settings
from volseg.config import Predict
from volseg.engine import folder
from volseg.engine.stages import keys
from volseg.errors import UserError
from volseg.inference import autoselect as probe
from volseg.inference import backends, export, hardware, model, sampling
from volseg.inference.autoselect import Measurement
from volseg.inference.device import TorchDevice
from volseg.io import volume
from volseg.planning import prepare as describe

BOTH = [("openvino", "fp32"), ("onnx", "fp32")]


@pytest.fixture(scope="module")
def tiles(image):
    return sampling.spread_tiles(volume.open(image), CARD, settings().predict, (128.0, 40.0))[:2, :, :64, :96]


def test_the_fastest_that_is_close_is_taken():
    slow, fast = Measurement("torch", "fp32", speed=1), Measurement("openvino", "fp32", speed=2)
    far = Measurement("onnx", "fp32", speed=9, refused="far")
    assert probe.fastest([slow, fast, far]) == fast
    with pytest.raises(UserError, match="no backend runs here: onnx fp32: far"):
        probe.fastest([far])


def test_candidates_are_those_that_settings_and_machine_allow():
    assert probe.candidates(Predict(backend="onnx"), True) == [("onnx", "fp32")]
    assert ("openvino", "int8") in probe.candidates(Predict(), True)
    assert ("openvino", "int8") not in probe.candidates(Predict(), False)
    assert probe.candidates(Predict(precision="int8"), False) == [("openvino", "int8")]
    assert set(probe.candidates(Predict(precision="fp32"), True)) >= set(BOTH)


@pytest.mark.skipif(hardware.gpu_count() > 0, reason="there is a GPU")
def test_what_the_machine_lacks_is_refused():
    with pytest.raises(UserError, match="needs a CUDA device"):
        probe.candidates(Predict(precision="fp16", backend="torch"), False)


def test_a_small_volume_is_not_kept_waiting():
    def sample():
        raise AssertionError("no tile is needed")

    for int8 in (False, True):
        choice = probe.choose(Predict(), model.shipped(), int8, probe.MIN_PROBED_VOXELS - 1, sample)
        assert (choice.backend, choice.precision) == backends.choose(int8=int8)
        assert choice.batch == (probe.DEFAULT_GPU_BATCH if hardware.gpu_count() else 1)
    assert probe.choose(Predict(backend="onnx", batch=3), model.shipped(), True, 1 << 40, sample) == probe.Choice(
        "onnx", "fp32", 3, "as set"
    )


def test_a_large_volume_is_probed_once_for_each_machine_and_model(tiles, monkeypatch, tmp_path):
    monkeypatch.setenv("VOLSEG_CACHE", str(tmp_path))
    first, kept = probe._cached_measurements(model.shipped(), BOTH, 0, tiles)
    assert [(row.backend, row.precision, row.batch, row.refused) for row in first] == [(*pair, 1, "") for pair in BOTH]
    assert all(row.speed > 0 and row.apart < 0.2 / 255 for row in first)
    assert not kept
    assert probe._cached_measurements(model.shipped(), BOTH, 0, tiles) == (first, True)
    assert f"{probe.fastest(first).speed:.2f} Mvoxel/s; " in probe._comparison(first, probe.fastest(first))
    assert probe.cache_file(model.shipped(), BOTH, 0, (9,)) != probe.cache_file(model.shipped(), BOTH, 2, (9,))


def test_a_candidate_far_from_float32_is_refused(tiles):
    blob = export.export_model(model.shipped(), "openvino")
    exact = probe._run(backends.load(blob, "openvino", "fp32", (1, *tiles.shape[1:])), tiles, 1)
    assert not probe._measure_batch(blob, "openvino", "fp32", 1, tiles, exact, 1).refused
    assert "255 apart" in probe._measure_batch(blob, "openvino", "fp32", 1, tiles, exact + np.float32(0.01), 1).refused


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException("Failed to allocate memory for requested buffer"),
    ],
)
def test_where_memory_is_out_the_batch_before_is_taken(error):
    def call(batch):
        if len(batch) > most:
            raise error
        return batch

    def timed(count):
        TorchDevice("cpu").synchronized(call)(torch.zeros(count, 3, 32, 32))
        return Measurement("torch", "fp16", count, speed=count)

    most = 4
    assert probe._largest_useful_batch(probe._doubling_batches(), timed).batch == 4
    most = 0
    with pytest.raises(type(error)):
        probe._largest_useful_batch(probe._doubling_batches(), timed)


def test_a_probe_that_breaks_says_so(tiles, tmp_path):
    (row,) = probe.measure(tmp_path / "absent.safetensors", [("onnx", "fp32")], 1, tiles)
    assert row.refused.startswith("ended the probe with code 1: ")
    assert "absent.safetensors" in row.refused
    assert "absent.safetensors" in probe.format_measurements([row])


def test_a_candidate_that_ends_its_process_costs_no_other_and_is_tried_again_next_time(tiles, monkeypatch, tmp_path):
    monkeypatch.setenv("VOLSEG_CACHE", str(tmp_path))
    wanted = [("torch", "no precision"), ("openvino", "fp32")]
    for _ in range(2):
        (broken, fine), kept = probe._cached_measurements(model.shipped(), wanted, 1, tiles)
        assert not kept
        assert "KeyError: 'no precision'" in broken.refused
        assert not fine.refused


def test_what_is_not_measured_in_time_is_not_taken(tiles, monkeypatch):
    monkeypatch.setattr(probe, "TIME_LIMIT_S", 0.01)
    late = probe.measure(model.shipped(), BOTH, 1, tiles)
    assert [row.name for row in late] == ["openvino fp32", "onnx fp32"]
    with pytest.raises(UserError, match=r"not measured within .* name one with --backend"):
        probe.fastest(late)


def test_a_run_that_was_begun_stays_with_its_choice(image, tmp_path):
    out = str(tmp_path / "run.partial")
    begun = describe.from_image(volume.open(image), settings(predict={"backend": "onnx"}), out)
    begun = replace(begun, engine=replace(begun.engine, why="of that day"))
    folder.begin(begun, overwrite=False)
    again = describe.from_image(volume.open(image), settings(predict={"backend": "onnx"}), out)
    assert again.engine.why == "of that day"
    assert not folder.changed(again)
    assert describe.from_image(volume.open(image), settings(), out).engine.backend != "onnx"


def test_a_batch_that_is_chosen_is_part_of_what_decides_the_bits(image, tmp_path):
    runs = [
        describe.from_image(
            volume.open(image), settings(predict={"batch": n, "backend": "onnx"}), str(tmp_path / "run")
        )
        for n in (0, 1, 2)
    ]
    assert [run.batch for run in runs] == [1, 1, 2]
    assert keys(runs[1])["predict"] != keys(runs[2])["predict"]
