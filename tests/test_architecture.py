"""The package's shape: who may import whom, and what stays out of a command's start."""

import ast
import re
import subprocess
import sys

import pytest
from importlinter.cli import lint_imports

import volseg
from tests.helpers import ROOT


def test_each_layer_imports_only_from_those_below(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    assert lint_imports(no_cache=True, verbose=False) == 0


@pytest.mark.parametrize("command", [["-c", "import volseg"], ["-m", "volseg", "--help"]])
def test_starting_loads_neither_torch_nor_dask(command):
    run = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True)
    loaded = set(
        re.findall(
            r"\|\s+(torch|dask|distributed|zarr|numba|openvino|pandas|pyarrow|scipy|matplotlib)$", run.stderr, re.M
        )
    )
    assert not loaded


def strings(path):
    """The string literals of a module."""
    return [
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_paths_in_a_runs_folder_are_known_to_its_layout_alone():
    folder = re.compile(r"(.*/)?work/\S*")
    modules = [path for path in (ROOT / "volseg").rglob("*.py") if not path.name.startswith("layout")]
    assert [(path.name, text) for path in modules for text in strings(path) if folder.fullmatch(text)] == []


def test_the_package_shows_its_structure_at_first_sight():
    names = [path for path in (ROOT / "volseg").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    assert len(names) <= 16


def test_no_module_is_too_long_to_read():
    modules = [path for path in (ROOT / "volseg").rglob("*.py") if not path.name.startswith("synthetic")]
    assert [path.name for path in modules if len(path.read_text().splitlines()) > 500] == []


def test_every_public_name_is_there_and_described():
    for name in volseg.__all__:
        assert getattr(volseg, name).__doc__, name
