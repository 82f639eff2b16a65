"""Training on a small volume: it learns, its file is right, and a killed run goes on to the same result."""

import csv
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import tifffile
import torch
from safetensors.torch import load_file

from volseg import model
from volseg.config import Config, UserError, resolve
from volseg.samples import batches, load_sources
from volseg.train import (
    FIRST_SETTLE,
    THRESHOLDS,
    calibrate,
    dice,
    focal,
    guess,
    ious,
    learning_rate,
    loss_of,
    settle,
    smooth,
    train,
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """One thread for torch: sums come in the same order every time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A run's settings as tables: bright balls on noise, 8 sections of 96 x 96, a network as small as it gets."""
    folder = tmp_path_factory.mktemp("data")
    z, y, x = np.ogrid[:8, :96, :96]
    label = np.zeros((8, 96, 96), np.uint8)
    for i, (cy, cx) in enumerate([(20, 20), (24, 70), (70, 30), (66, 74)], 1):
        label[(y - cy) ** 2 + (x - cx) ** 2 + 0 * z < 150] = i
    noise = np.random.default_rng(0).normal(100, 10, label.shape)
    tifffile.imwrite(folder / "image.tif", np.clip(noise + 60 * (label > 0), 1, 255).astype(np.uint8))
    tifffile.imwrite(folder / "label.tif", label, photometric="minisblack")
    data = {"image": str(folder / "image.tif"), "label": str(folder / "label.tif"), "validate_on": ["6:8"]}
    return {
        "data": [data], "decoder": [16, 16, 8, 8, 8], "pretrained": False, "patch": 64, "batch": 2, "every": 2,
        "steps": 6, "ema": 0.5, "device": "cpu",
    }  # fmt: skip


def _config(tables, out, **changes) -> Config:
    return resolve(("test", {"train": {**tables, "out": str(out), **changes}}))


@pytest.fixture(scope="module")
def whole_run(tables, tmp_path_factory):
    """Folder and report of a run that nothing stopped."""
    out, lines = tmp_path_factory.mktemp("whole"), []
    train(_config(tables, out), lines.append)
    return out, lines


def _rows(out):
    with (out / "curves.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_a_model_with_its_card(whole_run, tables):
    network, card = model.load(whole_run[0] / "model.safetensors")
    assert card["training"]["steps"] == 6
    assert card["training"]["data"] == [
        {"name": "image.tif", "learn": 6, "unlabelled": 0, "held": [6, 7], "share": 1.0}
    ]
    assert set(card["scores"]["validation"]) == {"all", "image.tif"}
    assert card["mean"] == pytest.approx(tifffile.imread(tables["data"][0]["image"]).mean())
    assert card["decode"]["fragments"]["threshold"] in THRESHOLDS
    assert "torch" in card["versions"]
    assert os.sep + "image.tif" not in json.dumps(card)
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 2, 64, 64)


def test_a_run_leaves_curves(whole_run):
    rows = _rows(whole_run[0])
    assert [int(row["step"]) for row in rows if row["split"] == "training"] == [1, 2, 3, 4, 5, 6]
    assert [int(row["step"]) for row in rows if row["split"] == "validation"] == [2, 4, 6]
    assert (whole_run[0] / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_tells_what_it_learns_from_and_how_far_it_is(whole_run):
    text = "\n".join(whole_run[1])
    assert "6 sections to learn from, 2 held out, 4 objects" in text
    assert "step 4/6" in text
    assert "held out, all" in text


def test_a_killed_run_goes_on_to_the_same_bits(whole_run, tables, tmp_path):
    code = (
        "import json, sys, torch; torch.set_num_threads(1); from volseg.config import resolve; "
        "from volseg.train import train; "
        "train(resolve(('test', json.loads(sys.argv[1]))), lambda line: print(line, flush=True))"
    )
    text = json.dumps({"train": {**tables, "out": str(tmp_path)}})
    with subprocess.Popen([sys.executable, "-c", code, text], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 4/6"):
                os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    lines = []
    train(_config(tables, tmp_path), lines.append)
    assert any(line.startswith(("going on from step 2", "going on from step 4")) for line in lines)
    assert _rows(tmp_path) == _rows(whole_run[0])
    wanted = load_file(whole_run[0] / "model.safetensors")
    for name, value in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(value, wanted[name]), name


class Stopped(Exception):
    pass


def _stop_at(text):
    def report(line):
        if line.startswith(text):
            raise Stopped

    return report


def test_a_stopped_run_with_self_training_goes_on_to_the_same_bits(tables, tmp_path):
    changes = {"data": [{**tables["data"][0], "train": [0, 4]}], "self_training": 0.5, "self_training_confidence": [0.5, 0.5]}
    whole = train(_config(tables, tmp_path / "whole", **changes), print)
    with pytest.raises(Stopped):
        train(_config(tables, tmp_path / "stopped", **changes), _stop_at("step 4/6"))
    again = load_file(train(_config(tables, tmp_path / "stopped", **changes), print))
    assert all(torch.equal(value, again[name]) for name, value in load_file(whole).items())
    assert model.load_card(whole)["training"]["data"][0]["unlabelled"] == 3
    never = load_file(train(_config(tables, tmp_path / "never", **{**changes, "self_training": 0}), print))
    assert any(not torch.equal(value, again[name]) for name, value in never.items())


def test_self_training_learns_where_the_averaged_network_is_sure(tables, tmp_path):
    class Teacher(torch.nn.Module):
        def forward(self, images):
            return images.repeat(1, 2, 1, 1)

    images = torch.tensor([-3.0, -1.0, 1.0, 3.0]).reshape(1, 1, 1, 4)
    aims, sure = guess(Teacher(), images, (0.9, 0.7))
    assert aims[0, :, 0].tolist() == [[0, 0, 1, 1]] * 2
    assert sure[0, :, 0].tolist() == [[1, 0, 0, 1], [1, 1, 1, 1]]


def test_a_finished_run_repeated_gives_its_model_again(whole_run, tables):
    before = load_file(whole_run[0] / "model.safetensors")
    lines = []
    path = train(_config(tables, whole_run[0]), lines.append)
    assert any("going on from step 6" in line for line in lines)
    assert all(torch.equal(value, before[name]) for name, value in load_file(path).items())


def test_a_checkpoint_of_other_settings_is_refused_by_name(whole_run, tables):
    with pytest.raises(UserError, match=r"another train\.lr; give another train\.out"):
        train(_config(tables, whole_run[0], lr=0.5), print)


def test_a_checkpoint_that_is_none_is_refused(tables, tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="is not a checkpoint"):
        train(_config(tables, tmp_path), print)


def test_training_learns(tables, tmp_path):
    train(_config(tables, tmp_path, steps=30, every=100, lr=3e-3, batch=3), print)
    losses = [float(row["loss"]) for row in _rows(tmp_path) if row["split"] == "training"]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert model.load_card(tmp_path / "model.safetensors")["scores"]["calibrated"]["iou"] > 0.5


def test_a_time_budget_ends_the_run_with_a_model(tables, tmp_path):
    path = train(_config(tables, tmp_path, steps=100_000, minutes=1e-4, every=50_000), print)
    assert 1 <= model.load_card(path)["training"]["steps"] < 100_000


def test_a_run_without_held_out_sections_has_a_plain_threshold(tables, tmp_path):
    data = [{**tables["data"][0], "validate_on": []}]
    card = model.load_card(train(_config(tables, tmp_path, data=data, steps=2), print))
    assert card["decode"]["fragments"]["threshold"] == 0.5
    assert card["scores"] == {"validation": {}, "calibrated": {"threshold": 0.5}}


def test_a_run_starts_from_an_earlier_model(whole_run, tables, tmp_path):
    start = str(whole_run[0] / "model.safetensors")
    train(_config(tables, tmp_path, start=start, steps=1, lr=1e-12), print)
    before, after = load_file(start), load_file(tmp_path / "model.safetensors")
    weights = [name for name in before if "running" not in name and before[name].is_floating_point()]
    assert all(torch.allclose(before[name].float(), after[name].float(), atol=1e-3) for name in weights)


def test_a_start_of_another_shape_is_refused(whole_run, tables, tmp_path):
    with pytest.raises(UserError, match="has sections = 3"):
        train(_config(tables, tmp_path, start=str(whole_run[0] / "model.safetensors"), sections=5), print)


def test_an_output_that_is_a_file_is_refused(tables, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"train\.out = .*file"):
        train(_config(tables, tmp_path / "file"), print)


def test_a_loss_that_blows_up_names_the_step_and_what_to_change(tables, tmp_path):
    with pytest.raises(UserError, match=r"at step \d+: set a lower train\.lr"):
        train(_config(tables, tmp_path, lr=1e30, steps=30, every=100), print)


def test_a_patch_that_the_network_cannot_halve_is_refused(tables, tmp_path):
    with pytest.raises(UserError, match="try 64"):
        train(_config(tables, tmp_path, patch=72), print)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_absent_is_refused(tables, tmp_path):
    with pytest.raises(UserError, match="no CUDA device"):
        train(_config(tables, tmp_path, device="cuda"), print)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_runs_on_cuda(tables, tmp_path):
    assert train(_config(tables, tmp_path, device="cuda"), print).exists()


def test_settled_statistics_are_those_of_the_training_batches(tables, tmp_path):
    knobs = _config(tables, tmp_path).train
    sources = load_sources(knobs)
    network = model.build(knobs.encoder, knobs.decoder, knobs.sections)
    settle(network, sources, knobs)
    stem = network.encoder.model
    with torch.no_grad():
        drawn = batches(sources, knobs, FIRST_SETTLE, FIRST_SETTLE + knobs.steps)
        means = [stem.conv_stem(torch.from_numpy(images)).mean((0, 2, 3)) for images, _ in drawn]
    torch.testing.assert_close(stem.bn1.running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)
    assert not network.training


def test_calibration_finds_the_threshold_of_a_network_that_knows_the_answer(tables, tmp_path):
    config = _config(tables, tmp_path)
    (source,) = load_sources(config.train)

    class Known(torch.nn.Module):
        """Half as sure of the right answer as it could be: 0.3 inside, almost 0 outside."""

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, images):
            inside = images[:, 1:2] * source.std + source.mean > 130
            return torch.where(inside, -0.85, -9.0).repeat(1, 2, 1, 1) * self.scale

    found = calibrate(Known(), [source], config)
    assert found["threshold"] <= 0.24
    assert found["iou"] > 0.9


def test_focal_loss_treats_both_classes_alike():
    logits, ones = torch.tensor([[[2.0, -2.0]]]), torch.ones(1, 1, 2)
    right, wrong = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    chance = torch.sigmoid(torch.tensor(2.0))
    assert focal(logits, right, ones) == pytest.approx(float(-((1 - chance) ** 2) * chance.log()), rel=1e-5)
    assert focal(logits, wrong, ones) == pytest.approx(float(-(chance**2) * (1 - chance).log()), rel=1e-5)


def test_dice_is_0_where_all_is_right_and_near_1_where_all_is_wrong():
    target = torch.zeros(1, 100, 100)
    target[:, :50] = 1
    sure, ones = 40 * target - 20, torch.ones_like(target)
    assert dice(sure, target, ones) == pytest.approx(0, abs=1e-4)
    assert dice(-sure, target, ones) == pytest.approx(1, abs=1e-3)
    assert dice(torch.full_like(target, -40.0), torch.zeros_like(target), ones) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("loss", ["focal", "bce"])
def test_unlabelled_voxels_do_not_enter_the_loss(tables, tmp_path, loss):
    knobs = _config(tables, tmp_path, loss=loss).train
    logits = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    aims, weights = (torch.rand(2, 1, 2, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    other = torch.where(weights > 0, logits, 9.0)
    torch.testing.assert_close(loss_of(logits, aims, weights, knobs), loss_of(other, aims, weights, knobs))


def test_the_learning_rate_makes_one_cycle():
    rates = [learning_rate(share / 100, 1.0) for share in range(101)]
    top = int(np.argmax(rates))
    assert rates[top] == 1.0
    assert np.all(np.diff(rates[: top + 1]) > 0)
    assert np.all(np.diff(rates[top:]) < 0)
    assert rates[-1] < 1e-4


def test_smoothing_keeps_constants_and_spreads_a_point():
    np.testing.assert_allclose(smooth(np.full((3, 4, 5), 0.25, np.float32), (2, 2, 2)), 0.25, rtol=1e-6)
    point = np.zeros((5, 5, 5))
    point[2, 2, 2] = 1
    np.testing.assert_allclose(smooth(point, (1, 0, 0))[:, 2, 2], [0, 0.25, 0.5, 0.25, 0])


def test_ious_are_those_of_each_threshold():
    found = ious(np.array([0.1, 0.5, 0.9, 0.9]), np.array([0, 1, 1, 0]))
    assert found[0] == pytest.approx(2 / 3)
    assert found[-1] == pytest.approx(1 / 3)
