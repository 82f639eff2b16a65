"""How a training run goes on: from kills, stops and Ctrl-C, to the same bits."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import config_of
from tests.training.conftest import read_curves
from volseg.errors import UserError
from volseg.inference import model
from volseg.training import checkpoint
from volseg.training.checkpoint import CHECKPOINT_NAME
from volseg.training.sources import load_sources
from volseg.training.steps import (
    initial_state,
    train_steps,
)
from volseg.training.train import train


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
    assert read_curves(tmp_path) == read_curves(whole_run[0])
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
