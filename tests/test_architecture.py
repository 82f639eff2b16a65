"""The package's shape: who may import whom, and what stays out of a command's start."""

import re
import subprocess
import sys

import pytest
from importlinter.cli import lint_imports

from tests.helpers import ROOT


def test_each_layer_imports_only_from_those_below(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    assert lint_imports(no_cache=True, verbose=False) == 0


@pytest.mark.parametrize("command", [["-c", "import volseg"], ["-m", "volseg", "--help"]])
def test_starting_loads_neither_torch_nor_dask(command):
    run = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True)
    loaded = set(re.findall(r"\|\s+(torch|dask|distributed|zarr|numba|openvino)$", run.stderr, re.M))
    assert not loaded
