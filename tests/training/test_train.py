"""Whole training runs on a small volume: they learn, and their files are right."""

import os

import numpy as np
import pytest
import tifffile
import torch
import zarr
from safetensors.torch import load_file

from tests.helpers import Quiet, config_of, digest
from tests.training.conftest import read_curves
from volseg import api
from volseg.config import Config, Fragments, resolve
from volseg.errors import UserError
from volseg.inference import model
from volseg.training.card import decoding_tables
from volseg.training.decoding import THRESHOLDS, Decoding
from volseg.training.train import check_settings, train
from volseg.training.tune import tune


def test_a_run_leaves_a_model_with_its_card(whole_run, tables):
    network, card = model.load(whole_run[0] / "model.safetensors")
    assert card.training.steps == 6
    assert card.to_json()["training"]["data"] == [
        {
            "name": "image.tif",
            "learn": 6,
            "learned": ["0:6"],
            "depth": 8,
            "unlabeled": 0,
            "held": [6, 7],
            "share": 1.0,
            "planes": ["xy"],
        }
    ]
    assert set(card.scores["validation"]) == {"all", "image.tif"}
    assert card.mean == pytest.approx(tifffile.imread(tables["data"][0]["image"]).mean(), abs=1)
    assert card.decode["fragments"]["threshold"] in THRESHOLDS
    assert "torch" in card.versions
    assert os.sep + "image.tif" not in card.text
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 2, 64, 64)


def test_a_run_leaves_curves(whole_run):
    rows = read_curves(whole_run[0])
    assert [int(row["step"]) for row in rows if row["split"] == "training"] == [1, 2, 3, 4, 5, 6]
    assert [int(row["step"]) for row in rows if row["split"] == "validation"] == [2, 4, 6]
    assert (whole_run[0] / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_tells_what_it_learns_from_and_how_far_it_is(whole_run):
    text = "\n".join(whole_run[1])
    assert [*text.splitlines()[1].split()[1:6], "instances"] == ["6", "2", "0", "4", "20.88", "instances"]
    assert "step 4/6" in text
    assert text.count("held-out sections:") == 1
    assert "the loader kept the network waiting for" in text


def test_a_distance_head_is_learnt_on_top_of_a_model_and_cuts_alike_in_any_blocks(whole_run, tables, tmp_path):
    data = [{**tables["data"][0], "voxel_size_nm": [5, 5, 5], "train": [0, 4]}]
    changes = {"data": data, "distance_nm": 50, "start": str(whole_run[0] / "model.safetensors")}
    path = train(config_of(tables, tmp_path / "run", **changes, self_training=0.5, self_training_after=0.5), print)
    assert model.load_card(path).heads == ("mask", "contour", "distance")
    found = []
    for block in ([8, 96, 96], [3, 40, 96]):
        out = str(tmp_path / f"{block[0]}.volseg.zarr")
        told = {"predict": {"model": str(path), "tile": 64, "overlap": 32}, "cluster": {"workers": 1, "dashboard": ""}}
        cut = {"fragments": {"height": "head", "threshold": 0.1}, "stitch": {"seed": 0.1, "min_voxels": 0}}
        config = resolve(("test", {**told, **cut, "blocks": {"shape": block}}))
        api.infer(data[0]["image"], out, config=config, progress=Quiet())
        found.append(digest(out))
        assert zarr.open_array(f"{out}/0", mode="r").shape[0] == 3
    assert found[0] == found[1]


def test_a_height_that_nothing_learns_is_refused_at_once(tables, tmp_path):
    config = config_of(tables, tmp_path / "run")
    asked = config.model_copy(update={"fragments": Fragments(height="head")})
    for work in (train, tune):
        with pytest.raises(UserError, match=r"set train\.distance_nm"):
            work(asked, print)
    check_settings(asked.model_copy(update={"train": config.train.model_copy(update={"distance_nm": 100.0})}))


def test_a_card_keeps_what_its_seed_was_chosen_with():
    given = {"fragments": {"height": "contour", "threshold": 0.4}, "stitch": {"keep_unseeded": True, "reduce": "tree"}}
    chosen = Decoding(0.3, (0, 1, 1), 0.7, 250, True)
    assert decoding_tables(resolve(("test", given)), chosen) == {
        "fragments": {"height": "contour", "threshold": 0.3, "smooth": [0, 1, 1]},
        "stitch": {"keep_unseeded": True, "seed": 0.7, "min_voxels": 250, "count_cut": True},
    }
    assert decoding_tables(Config(), chosen) == chosen.tables()
    assert decoding_tables(Config(), None) == {}


def test_training_learns(tables, tmp_path):
    train(config_of(tables, tmp_path, steps=30, every=100, lr=3e-3, batch=3), print)
    losses = [float(row["loss"]) for row in read_curves(tmp_path) if row["split"] == "training"]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert model.load_card(tmp_path / "model.safetensors").scores["calibrated"]["iou"] > 0.5


def test_a_time_budget_ends_the_run_with_a_model(tables, tmp_path):
    path = train(config_of(tables, tmp_path, steps=100_000, minutes=1e-4, every=50_000), print)
    assert 1 <= model.load_card(path).training.steps < 100_000


def test_a_run_of_two_steps_without_held_out_sections_is_decoded_by_those_it_saw(tables, tmp_path):
    data = [{**tables["data"][0], "validate_on": []}]
    lines = []
    card = model.load_card(train(config_of(tables, tmp_path, data=data, steps=2), lines.append))
    assert card.decode["fragments"]["threshold"] in THRESHOLDS
    assert card.scores == {"validation": {}, "calibrated": {}}
    assert any("no section was held out, and what was set finds next to nothing" in line for line in lines)


def test_a_run_starts_from_an_earlier_model(whole_run, tables, tmp_path):
    start = str(whole_run[0] / "model.safetensors")
    train(config_of(tables, tmp_path, start=start, steps=1, lr=1e-12), (said := []).append)
    assert any("before the first step: IoU" in line for line in said)
    before, after = load_file(start), load_file(tmp_path / "model.safetensors")
    weights = [name for name in before if "running" not in name and before[name].is_floating_point()]
    assert all(torch.allclose(before[name].float(), after[name].float(), atol=1e-3) for name in weights)


def test_batchnorm_statistics_that_score_worse_are_not_kept(whole_run, tables, tmp_path, monkeypatch):
    def wreck(network, *_):
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.running_mean.fill_(50.0)

    monkeypatch.setattr("volseg.training.train.update_batchnorm", wreck)
    start = str(whole_run[0] / "model.safetensors")
    train(config_of(tables, tmp_path, start=start, steps=1, lr=1e-12), (said := []).append)
    kept = load_file(tmp_path / "model.safetensors")
    means = [value.float() for name, value in kept.items() if name.endswith("running_mean")]
    assert means
    assert all(value.min() < 50 for value in means)
    start_loss, end_loss = (
        next(line for line in said if line.startswith(what)) for what in ("held-out sections, b", "held-out sections: ")
    )
    assert "IoU" in start_loss
    assert "IoU" in end_loss


def test_a_model_that_ended_worse_than_it_started_is_told(whole_run, tables, tmp_path, monkeypatch):
    scores = iter([0.9, 0.5, 0.4])  # before, and at the end with either statistics
    monkeypatch.setattr(
        "volseg.training.train.validate",
        lambda *_: {"all": {"iou": next(scores, 0.5), "loss": 1.0, "accuracy": 0.9}},
    )
    start = str(whole_run[0] / "model.safetensors")
    train(config_of(tables, tmp_path, start=start, steps=1, lr=1e-12), (said := []).append)
    assert any("it started better than it ended, at IoU 0.900" in line for line in said)


def test_a_start_of_another_shape_is_refused(whole_run, tables, tmp_path):
    start = str(whole_run[0] / "model.safetensors")
    with pytest.raises(UserError, match=r"sees 3 sections; set train\.sections to that, or to more"):
        train(config_of(tables, tmp_path, start=start, sections=1), print)
    with pytest.raises(UserError, match="has decoder = "):
        train(config_of(tables, tmp_path, start=start, decoder=[16, 16, 8, 8, 16]), print)


def test_an_output_that_is_a_file_is_refused(tables, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"train\.out = .*file"):
        train(config_of(tables, tmp_path / "file"), print)


def test_a_loss_that_blows_up_names_the_step_and_what_to_change(tables, tmp_path):
    with pytest.raises(UserError, match=r"at step \d+: set a lower train\.lr"):
        train(config_of(tables, tmp_path, lr=1e30, steps=30, every=100), print)


def test_a_patch_that_the_network_cannot_halve_is_refused(tables, tmp_path):
    with pytest.raises(UserError, match="try 64"):
        train(config_of(tables, tmp_path, patch=72), print)
    with pytest.raises(UserError, match=r"not a multiple of 64; try 64"):
        train(config_of(tables, tmp_path, patch=96, binning=2), print)


def test_a_model_becomes_one_that_bins_and_not_back(whole_run, tables, tmp_path):
    start = str(whole_run[0] / "model.safetensors")
    train(config_of(tables, tmp_path / "binned", start=start, binning=2, batch=4), print)
    card = model.load_card(tmp_path / "binned" / "model.safetensors")
    assert (card.binning, card.heads) == (2, ("mask", "contour"))
    assert set(card.scores["validation"])
    with pytest.raises(UserError, match=r"bins its input already; set train\.binning = 2"):
        train(config_of(tables, tmp_path / "back", start=str(tmp_path / "binned" / "model.safetensors")), print)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_absent_is_refused(tables, tmp_path):
    with pytest.raises(UserError, match="no CUDA device"):
        train(config_of(tables, tmp_path, device="cuda"), print)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_runs_on_cuda(tables, tmp_path):
    assert train(config_of(tables, tmp_path, device="cuda"), print).exists()
