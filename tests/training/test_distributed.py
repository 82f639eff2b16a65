"""Several processes that train one network."""

import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import config_of
from volseg.errors import UserError
from volseg.training import distributed
from volseg.training.checkpoint import CHECKPOINT_NAME
from volseg.training.train import train


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
