"""Each malformed input ends a command with one line that names file and fix, at once, and leaves nothing behind."""

import importlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

from tests.corpus import labels, others, runs, volumes
from tests.helpers import LIGHT, digest, segment_here, settings
from volseg.system import resident

SECONDS, BYTES = 120, 300 << 20  # a command that takes longer hangs; memory beyond what is imported
PROCESSES = ("chunk that is a bomb", "toml nested without end")


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Addresses outside this machine that something called or looked up: none, or the test fails."""
    found, connect, look_up = [], socket.socket.connect, socket.getaddrinfo
    local = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "", None, socket.gethostname())

    def noted_connect(self, address):
        datagram = self.type & socket.SOCK_DGRAM  # Dask asks so for its own address: nothing is sent
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in local and not datagram:
            found.append(address)
        return connect(self, address)

    def noted_look_up(host, *rest, **more):
        name = host.decode() if isinstance(host, bytes) else host
        if name not in local and not str(name).replace(".", "").isdigit():
            found.append(name)
        return look_up(host, *rest, **more)

    monkeypatch.setattr(socket.socket, "connect", noted_connect)
    monkeypatch.setattr(socket, "getaddrinfo", noted_look_up)
    yield found
    assert found == []


@pytest.fixture(scope="module")
def _imports():
    """What commands import is imported, so that it does not count as theirs."""
    for name in ("segmentation_models_pytorch", "volseg.training.train", "volseg.training.tune", "openvino", "pandas"):
        importlib.import_module(name)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A finished run of 4 x 40 x 48 voxels that has labels and joins, and those labels. Tests must not change it."""
    folder = tmp_path_factory.mktemp("corpus")
    labels = np.zeros((4, 40, 48), np.uint16)
    labels[:, 4:18, 4:20], labels[:, 22:36, 4:40] = 1, 2
    rng = np.random.default_rng(0)
    probability = np.clip((labels > 0) * 0.8 + rng.random(labels.shape) * 0.2, 0, 1).astype(np.float32)
    zarr.create_array(str(folder / "p.zarr"), data=probability, chunks=(4, 20, 48))
    tifffile.imwrite(folder / "labels.tif", labels, photometric="minisblack")
    config = settings(**LIGHT, stitch={"min_voxels": 5}, blocks={"shape": [4, 20, 24]})
    segment_here(str(folder / "p.zarr"), str(folder / "run.zarr"), config)
    return folder


def assert_one_line(code, err, said):
    last = err.rstrip("\n").splitlines()[-1:]
    assert code == 2, err
    assert [line for line in err.splitlines() if line.startswith("volseg: ")] == last, err
    assert "Traceback" not in err, err
    assert err.replace("\n", "").isprintable()
    assert len(last[0]) < 1200
    assert said in last[0], last[0]


def hold(call, folder):
    """``call`` ends in time, holds little memory, and leaves nothing under the output's final name."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = resident("RSS"), time.monotonic()
    result = call()
    assert time.monotonic() - start < SECONDS
    assert resident("HWM") - before < BYTES
    assert not (folder / "out.volseg.zarr").exists()
    return result


@pytest.mark.parametrize("name", volumes.CASES)
def test_a_malformed_volume_is_refused_in_one_line(run, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    line = volumes.CASES[name](tmp_path)
    code, _, err = hold(lambda: run(*line), tmp_path)
    assert_one_line(code, err, volumes.SAID.get(name, ""))
    assert os.path.basename(line[1]) in err or not line[1].isprintable()


@pytest.mark.parametrize("name", labels.CASES)
@pytest.mark.usefixtures("_imports")
def test_malformed_labels_are_refused_in_one_line(run, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    line = labels.CASES[name](tmp_path)
    code, _, err = hold(lambda: run(*line), tmp_path)
    assert_one_line(code, err, labels.SAID[name])
    assert not list(tmp_path.glob("*.toml"))


@pytest.mark.parametrize("name", others.CASES)
@pytest.mark.usefixtures("_imports")
def test_a_malformed_setting_model_or_line_is_refused_in_one_line(run, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    line = others.CASES[name](tmp_path)
    code, _, err = hold(lambda: run(*line), tmp_path)
    assert_one_line(code, err, others.SAID[name])


@pytest.mark.parametrize("name", runs.CASES)
def test_a_malformed_run_is_refused_in_one_line_told_or_made_whole(run, tmp_path, monkeypatch, tiny_run, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, tmp_path, dirs_exist_ok=True)
    line = runs.CASES[name](tmp_path)
    code, out, err = hold(lambda: run(*line), tmp_path)
    assert "Traceback" not in err
    if line[0] == "verify" and code == 1:  # it says what is damaged, all of it
        assert runs.SAID[name] in out
    elif name in runs.MADE_WHOLE:
        assert code == 0, err
        assert run("verify", "run.zarr")[0] == 0
        assert digest("run.zarr") == digest(tiny_run / "run.zarr")
    else:
        assert_one_line(code, err, runs.SAID[name])


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_of_its_own_says_the_same(tmp_path, name):
    line = {**volumes.CASES, **others.CASES}[name](tmp_path)
    ended = subprocess.run(
        [sys.executable, "-m", "volseg", *line], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert_one_line(ended.returncode, ended.stderr, {**volumes.SAID, **others.SAID}.get(name, ""))


def test_there_are_more_than_a_hundred():
    cases = [*volumes.CASES, *labels.CASES, *others.CASES, *runs.CASES]
    assert len(set(cases)) == len(cases) >= 200
