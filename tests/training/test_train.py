"""Training on a small volume: it learns, its file is right, and a killed run goes on to the same result."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tifffile
import torch
import zarr
from safetensors.torch import load_file

from tests.helpers import Quiet, config_of, digest
from volseg import api
from volseg.config import Config, Fragments, Train, resolve
from volseg.errors import UserError
from volseg.inference import model
from volseg.training import checkpoint, distributed
from volseg.training.card import decoding_tables
from volseg.training.checkpoint import CHECKPOINT_NAME, State
from volseg.training.decoding import THRESHOLDS, Decoding
from volseg.training.losses import segmentation_loss
from volseg.training.samples import annotated_batch, prefetch_batches
from volseg.training.sources import load_sources
from volseg.training.steps import (
    BATCHNORM_FIRST_STEP,
    _gradients_within_memory,
    initial_state,
    moving_average,
    one_cycle_rate,
    pseudo_labels,
    train_steps,
    update_batchnorm,
)
from volseg.training.train import check_settings, train
from volseg.training.tune import tune


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """One thread for torch: sums come in the same order every time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _rows(out):
    with (out / "curves.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_a_model_with_its_card(whole_run, tables):
    network, card = model.load(whole_run[0] / "model.safetensors")
    assert card.training.steps == 6
    assert card.to_json()["training"]["data"] == [
        {"name": "image.tif", "learn": 6, "unlabeled": 0, "held": [6, 7], "share": 1.0, "planes": ["xy"]}
    ]
    assert set(card.scores["validation"]) == {"all", "image.tif"}
    assert card.mean == pytest.approx(tifffile.imread(tables["data"][0]["image"]).mean(), abs=1)
    assert card.decode["fragments"]["threshold"] in THRESHOLDS
    assert "torch" in card.versions
    assert os.sep + "image.tif" not in card.text
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 2, 64, 64)


def test_a_run_leaves_curves(whole_run):
    rows = _rows(whole_run[0])
    assert [int(row["step"]) for row in rows if row["split"] == "training"] == [1, 2, 3, 4, 5, 6]
    assert [int(row["step"]) for row in rows if row["split"] == "validation"] == [2, 4, 6]
    assert (whole_run[0] / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_tells_what_it_learns_from_and_how_far_it_is(whole_run):
    text = "\n".join(whole_run[1])
    assert [*text.splitlines()[1].split()[1:6], "instances"] == ["6", "2", "0", "4", "20.88", "instances"]
    assert "step 4/6" in text
    assert text.count("held-out sections:") == 1
    assert "the loader kept the network waiting for" in text


def test_a_killed_run_goes_on_to_the_same_bits(whole_run, tables, tmp_path):
    code = (
        "import json, sys, torch; torch.set_num_threads(1); from volseg.config import resolve; "
        "from volseg.training.train import train; "
        "train(resolve(('test', json.loads(sys.argv[1]))), lambda line: print(line, flush=True))"
    )
    text = json.dumps({"train": {**tables, "out": str(tmp_path)}})
    with subprocess.Popen([sys.executable, "-c", code, text], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 4/6"):
                os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    lines = []
    train(config_of(tables, tmp_path), lines.append)
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
    changes = {
        "data": [{**tables["data"][0], "train": [0, 4]}],
        "self_training": 0.5,
        "self_training_confidence": [0.5, 0.5],
    }
    whole = train(config_of(tables, tmp_path / "whole", **changes), print)
    with pytest.raises(Stopped):
        train(config_of(tables, tmp_path / "stopped", **changes), _stop_at("step 4/6"))
    again = load_file(train(config_of(tables, tmp_path / "stopped", **changes), print))
    assert all(torch.equal(value, again[name]) for name, value in load_file(whole).items())
    assert model.load_card(whole).training.data[0].unlabeled == 3
    never = load_file(train(config_of(tables, tmp_path / "never", **{**changes, "self_training": 0}), print))
    assert any(not torch.equal(value, again[name]) for name, value in never.items())


def test_self_training_learns_where_the_averaged_network_is_sure(tables, tmp_path):
    class Teacher(torch.nn.Module):
        def forward(self, images):
            return images.repeat(1, 2, 1, 1)

    images = torch.tensor([-3.0, -1.0, 1.0, 3.0]).reshape(1, 1, 1, 4)
    targets, sure = pseudo_labels(Teacher(), images, Train(precision="fp32"))
    assert targets[0, :, 0].tolist() == [[0, 0, 1, 1]] * 2
    assert sure[0, :, 0].tolist() == [[1, 0, 0, 1], [1, 1, 1, 1]]


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
    chosen = Decoding(0.3, (0, 1, 1), 0.7, 250)
    assert decoding_tables(resolve(("test", given)), chosen) == {
        "fragments": {"height": "contour", "threshold": 0.3, "smooth": [0, 1, 1]},
        "stitch": {"keep_unseeded": True, "seed": 0.7, "min_voxels": 250},
    }
    assert decoding_tables(Config(), chosen) == chosen.tables()
    assert decoding_tables(Config(), None) == {}


def interrupted(settings, tmp_path, line, telling="pass"):
    """Has `volseg train` in a process of its own, to which Ctrl-C comes as it says that ``line``; ``telling`` is done first."""
    data = settings.pop("data")[0]
    text = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    text = ["[train]", *text, "[[train.data]]", *(f"{key} = {json.dumps(value)}" for key, value in data.items())]
    (tmp_path / "train.toml").write_text("\n".join(text))
    hearing = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's background may be deaf
    )
    code = f"{hearing}; {telling}; from volseg.__main__ import main; main()"
    command = [sys.executable, "-u", "-c", code, "train", str(tmp_path / "train.toml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for told in process.stdout:
            if told.startswith(line):
                process.send_signal(signal.SIGINT)
                break
        _, said = process.communicate()
    assert process.returncode == 130, said
    assert said == "volseg: stopped; the same command goes on from the last checkpoint\n"


def test_ctrl_c_ends_a_run_in_one_line(tables, tmp_path):
    interrupted({**tables, "steps": 100_000, "out": str(tmp_path / "run")}, tmp_path, "step 4/")
    assert (tmp_path / "run" / CHECKPOINT_NAME).exists()


def test_ctrl_c_keeps_the_step_that_a_run_was_at(tables, tmp_path):
    """No validation and no interval of checkpoints comes in between: what is kept was kept for the interrupt."""
    settings = {**tables, "steps": 100_000, "every": 100_000, "out": str(tmp_path / "run")}
    telling = "import volseg.training.train; volseg.training.train.LOG_INTERVAL_S = 0"  # a line for each step
    interrupted(settings, tmp_path, "step 3/", telling)
    config = config_of(tables, tmp_path / "run", steps=100_000, every=100_000)
    state = initial_state(config.train, torch.device("cpu"))
    assert checkpoint.resume(state, tmp_path / "run" / CHECKPOINT_NAME, config.train)
    assert state.step >= 3


def test_a_finished_run_repeated_gives_its_model_again(whole_run, tables):
    before = load_file(whole_run[0] / "model.safetensors")
    lines = []
    path = train(config_of(tables, whole_run[0]), lines.append)
    assert any("going on from step 6" in line for line in lines)
    assert all(torch.equal(value, before[name]) for name, value in load_file(path).items())


def test_a_checkpoint_of_other_settings_is_refused_by_name(whole_run, tables):
    with pytest.raises(UserError, match=r"another train\.lr; give another train\.out"):
        train(config_of(tables, whole_run[0], lr=0.5), print)


def test_a_checkpoint_that_is_none_is_refused(tables, tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="is not a checkpoint"):
        train(config_of(tables, tmp_path), print)


def test_training_learns(tables, tmp_path):
    train(config_of(tables, tmp_path, steps=30, every=100, lr=3e-3, batch=3), print)
    losses = [float(row["loss"]) for row in _rows(tmp_path) if row["split"] == "training"]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert model.load_card(tmp_path / "model.safetensors").scores["calibrated"]["iou"] > 0.5


def test_a_time_budget_ends_the_run_with_a_model(tables, tmp_path):
    path = train(config_of(tables, tmp_path, steps=100_000, minutes=1e-4, every=50_000), print)
    assert 1 <= model.load_card(path).training.steps < 100_000


def test_a_run_without_held_out_sections_has_a_plain_threshold(tables, tmp_path):
    data = [{**tables["data"][0], "validate_on": []}]
    lines = []
    card = model.load_card(train(config_of(tables, tmp_path, data=data, steps=2), lines.append))
    assert card.decode["fragments"]["threshold"] == 0.5
    assert card.scores == {"validation": {}, "calibrated": {}}
    assert any("no section was held out, so decoding is left as set" in line for line in lines)


def test_a_run_starts_from_an_earlier_model(whole_run, tables, tmp_path):
    start = str(whole_run[0] / "model.safetensors")
    train(config_of(tables, tmp_path, start=start, steps=1, lr=1e-12), print)
    before, after = load_file(start), load_file(tmp_path / "model.safetensors")
    weights = [name for name in before if "running" not in name and before[name].is_floating_point()]
    assert all(torch.allclose(before[name].float(), after[name].float(), atol=1e-3) for name in weights)


def test_a_start_of_another_shape_is_refused(whole_run, tables, tmp_path):
    with pytest.raises(UserError, match="has sections = 3"):
        train(config_of(tables, tmp_path, start=str(whole_run[0] / "model.safetensors"), sections=5), print)


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


def test_settled_statistics_are_those_of_the_training_batches(tables, tmp_path):
    settings = config_of(tables, tmp_path).train
    sources = load_sources(settings)
    network = model.build(settings.encoder, settings.decoder, settings.sections)
    update_batchnorm(network, sources, settings)
    stem = network.encoder.model
    with torch.no_grad():
        drawn = prefetch_batches(sources, settings, BATCHNORM_FIRST_STEP, BATCHNORM_FIRST_STEP + settings.steps)
        means = [stem.conv_stem(torch.from_numpy(images)).mean((0, 2, 3)) for images, _ in drawn]
    torch.testing.assert_close(stem.bn1.running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)
    assert not network.training


def test_the_learning_rate_is_torchs_one_cycle():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=101, pct_start=11 / 101, div_factor=25, final_div_factor=4000,
        cycle_momentum=False,
    )  # fmt: skip
    rates = []
    for _ in range(101):
        rates.append(cycle.get_last_lr()[0])
        optimizer.step()
        if len(rates) < 101:
            cycle.step()
    np.testing.assert_allclose([one_cycle_rate(share / 100, 1.0) for share in range(101)], rates, atol=1e-5)


def test_the_average_forgets_early_weights_sooner_and_holds_batch_norm_statistics_too():
    network = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.BatchNorm1d(1))
    torch.nn.init.zeros_(network[0].weight)
    averaged, weight, mean = moving_average(network, 0.25), 0.0, 0.0
    for step in range(1, 6):
        torch.nn.init.constant_(network[0].weight, step)
        network[1].running_mean.fill_(-step)
        averaged.update_parameters(network)
        decay = min(0.25, (1 + step) / (10 + step))
        weight, mean = decay * weight + (1 - decay) * step, decay * mean - (1 - decay) * step
    assert averaged.module[0].weight.item() == pytest.approx(weight)
    assert averaged.module[1].running_mean.item() == pytest.approx(mean)
    assert not averaged.training


def test_a_full_disk_leaves_the_old_checkpoint_whole(whole_run, tables, tmp_path):
    resource = pytest.importorskip("resource")
    settings = config_of(tables, whole_run[0]).train
    state = initial_state(settings, torch.device("cpu"))
    path = tmp_path / CHECKPOINT_NAME
    checkpoint.save(state, path, settings)
    before = path.read_bytes()
    state.step = 5
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*the one there before is whole; make room"):
            checkpoint.save(state, path, settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [CHECKPOINT_NAME]


class Small(torch.nn.Conv2d):
    """A network in a memory that holds two patches."""

    def __init__(self):
        super().__init__(3, 2, 1)

    def forward(self, images):
        if len(images) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
        return super().forward(images)


def test_a_batch_that_does_not_fit_is_cut_and_steps_the_same(tables, tmp_path):
    settings = config_of(tables, tmp_path, batch=7, loss="bce", contour_weight=0, precision="fp32").train
    patches = annotated_batch(load_sources(settings), settings, 0)
    torch.manual_seed(0)
    network, lines = Small(), []
    state = State(
        network, network, torch.optim.SGD(network.parameters(), 1), torch.amp.GradScaler("cpu", enabled=False)
    )
    loss, voxels = _gradients_within_memory(state, patches, settings, lines.append)
    gradient, images, targets = (
        network.weight.grad.clone(),
        torch.from_numpy(patches[0]),
        torch.from_numpy(patches[1][:, :2]),
    )
    assert state.micro_batches == 4
    assert len(lines) == 2
    assert "at most 2 at a time" in lines[-1]
    network.zero_grad()
    pieces = [(i, i + 2) for i in (0, 2, 4, 6)]
    parts = [(torch.nn.Conv2d.forward(network, images[a:b]), targets[a:b].float()) for a, b in pieces]
    whole = sum(segmentation_loss(p, t, torch.ones_like(t), settings) * len(p) for p, t in parts) / 7
    whole.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(gradient, network.weight.grad)
    assert int(voxels.sum()) == patches[1][:, 2].sum()


def test_a_patch_that_does_not_fit_is_refused(tables, tmp_path):
    settings = config_of(tables, tmp_path, batch=1).train
    network = Small()
    network.forward = lambda images: np.empty((1 << 50,))
    state = State(
        network, network, torch.optim.SGD(network.parameters(), 1), torch.amp.GradScaler("cpu", enabled=False)
    )
    with pytest.raises(UserError, match=r"not even one patch fits the memory: set a smaller train\.patch than 64"):
        _gradients_within_memory(state, annotated_batch(load_sources(settings), settings, 0), settings, print)


def test_other_failures_are_not_taken_for_a_full_memory(tables, tmp_path):
    settings = config_of(tables, tmp_path).train
    network = Small()
    network.forward = lambda images: torch.zeros(2, 3) @ torch.zeros(2, 3)
    state = State(
        network, network, torch.optim.SGD(network.parameters(), 1), torch.amp.GradScaler("cpu", enabled=False)
    )
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        _gradients_within_memory(state, annotated_batch(load_sources(settings), settings, 0), settings, print)


def test_float16_scales_its_losses(tables, tmp_path):
    settings = config_of(tables, tmp_path, precision="fp16").train
    state, sources = initial_state(settings, torch.device("cpu")), load_sources(settings)
    before = next(state.network.parameters()).detach().clone()
    rows = list(train_steps(state, sources, settings, print))
    assert state.scaler.state_dict()["scale"] > 1
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert not torch.equal(before, next(state.network.parameters()))


def test_a_run_begun_without_a_loss_scale_goes_on_with_one(tables, tmp_path):
    """As one that was begun on a CPU goes on in float16 on a GPU; moments lie in memory as their weights do."""
    settings = config_of(tables, tmp_path).train
    state, sources = initial_state(settings, torch.device("cpu")), load_sources(settings)
    state.network.to(memory_format=torch.channels_last)
    list(train_steps(state, sources, settings, print))
    checkpoint.save(state, tmp_path / CHECKPOINT_NAME, settings)
    again = initial_state(settings, torch.device("cpu"))
    again.network.to(memory_format=torch.channels_last)
    again.scaler = torch.amp.GradScaler("cpu", enabled=True)
    assert checkpoint.resume(again, tmp_path / CHECKPOINT_NAME, settings)
    assert again.scaler.state_dict()["scale"] > 1
    pairs = list(zip(again.network.parameters(), state.network.parameters(), strict=True))
    known = [(a, b) for a, b in pairs if b in state.optimizer.state]
    assert len(known) > 100
    for a, b in known:
        for name in ("exp_avg", "exp_avg_sq"):
            assert again.optimizer.state[a][name].stride() == a.stride()
            assert torch.equal(again.optimizer.state[a][name], state.optimizer.state[b][name])


def test_two_processes_go_on_after_a_stop_to_the_same_bits(tables, tmp_path):
    changes = {"processes": 2, "batch": 3, "steps": 4, "data": [{**tables["data"][0], "train": [0, 4]}],
               "self_training": 0.4, "self_training_confidence": [0.5, 0.5]}  # fmt: skip
    (tmp_path / "half").mkdir()

    def keep_the_last_checkpoint(line):
        if line.startswith("step 4/4"):
            shutil.copy(tmp_path / "whole" / CHECKPOINT_NAME, tmp_path / "half")

    whole = load_file(train(config_of(tables, tmp_path / "whole", **changes), keep_the_last_checkpoint))
    lines = []
    again = load_file(train(config_of(tables, tmp_path / "half", **changes), lines.append))
    assert any(line.startswith("going on from step 2") for line in lines)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_the_mean_over_processes_is_that_of_the_whole_batch(tmp_path):
    with distributed.process_group(2, _add, tmp_path / "other.pt"):
        mine = _add(None)
        assert distributed.size() == 2
        assert distributed.broadcast(7.0 + distributed.rank(), torch.device("cpu")) == 7.0
    assert [tensor.tolist() for tensor in mine] == [[3.0, 3.0], [[9.0]]]
    assert all(torch.equal(a, b) for a, b in zip(mine, torch.load(tmp_path / "other.pt"), strict=True))
    assert distributed.size() == 1


def _add(path):
    """Sums over processes of what depends on the process; stored at ``path``."""
    r = distributed.rank()
    tensors = [torch.full((2,), 1.0 + r), torch.full((1, 1), 4.0 + r)]
    distributed.all_reduce_sum(tensors)
    if path:
        distributed.broadcast(0.0, torch.device("cpu"))
        torch.save(tensors, path)
    return tensors


def test_a_process_that_fails_ends_the_others_with_a_line_and_no_traceback(tmp_path, capfd):
    with pytest.raises(UserError, match="training process 1 of 2 ended"), distributed.process_group(2, _fail):
        distributed.broadcast(0.0, torch.device("cpu"))
    assert capfd.readouterr().err == "volseg: process 1: the memory of process 1 is full\n"
    assert distributed.size() == 1


def test_with_nccl_the_first_process_ends_with_one_that_fails_but_not_with_one_that_it_ends():
    """What watches over the others is no part of nccl, which is not here."""
    told = """
import multiprocessing, sys, threading, time
from volseg.training import distributed
other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=sys.argv[2:])  # without a number, it fails
ending = threading.Event()
if __name__ == "__main__":
    other.start()
    threading.Thread(target=distributed._exit_with_failed, args=([other], ending, 1)).start()
    if sys.argv[1] == "ends":
        ending.set()
        other.terminate()
"""
    for words, code, said in (
        (["ends", "60"], 0, ""),
        (["waits"], 2, "volseg: a training process ended, as it says above"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", told, *words], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == code
        assert said in done.stderr


def _fail():
    raise UserError(f"the memory of process {distributed.rank()} is full")


def test_more_processes_than_patches_are_refused(tables, tmp_path):
    with pytest.raises(UserError, match=r"train\.batch = 2 has no patch for each of 3 processes"):
        train(config_of(tables, tmp_path, processes=3), print)
