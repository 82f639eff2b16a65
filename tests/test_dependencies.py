"""What installs with volseg: inference alone needs no extra, and nothing is installed that nothing uses."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib import metadata

import pytest

from tests.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
TOOLS = {  # run, not imported
    "import-linter", "ipykernel", "mkdocs-material", "mkdocstrings", "mypy", "nbclient", "pytest", "pytest-timeout",
    "pytest-xdist", "ruff",
}  # fmt: skip
BEHIND = {
    "cryptography": "distributed makes the certificates of local clusters with it",  # imported by a package that volseg imports
    "asyncssh": "distributed's SSHCluster",
    "gcsfs": "fsspec's gs:// URLs",
    "imagecodecs": "tifffile's compressed pages",
    "onnx": "torch.onnx",
    "onnxruntime": "onnxruntime-gpu, where that is not made for the platform",
    "s3fs": "fsspec's s3:// URLs",
    "timm": "segmentation-models-pytorch's encoder",
    "torchvision": "timm",
    "zarrs": "zarr's codec pipeline",
}
HIDE = """
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {names!r} else super().find_spec(name, path, target)

sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""


def canonical(name: str) -> str:
    """A distribution's name as PEP 503 spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    """The distributions that these lines name, without those of volseg's own extras."""
    return {canonical(re.split(r"[^\w.-]", line)[0]) for line in requirements} - {"volseg"}


@cache
def makers() -> dict[str, set[str]]:
    """Of each module that can be imported here, the distributions that hold it."""
    return {top: set(map(canonical, held)) for top, held in metadata.packages_distributions().items()}


def extra_modules() -> set[str]:
    """What can be imported only because of an extra that users install; not what dask and distributed bring as well."""
    given = (names(lines) for name, lines in EXTRAS.items() if name not in ("docs", "test"))
    extras = set.union(*given) - {"fsspec", "tornado"}
    modules = {top for top, held in makers().items() if extras & held}
    assert {"torch", "segmentation_models_pytorch", "onnxruntime", "matplotlib", "optuna"} <= modules
    return modules


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Runs Python as where only the base is installed: modules of extras are hidden, in child processes too."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "sitecustomize.py").write_text(HIDE.format(names=extra_modules()))
    env = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "VOLSEG_CACHE": str(folder)}

    def run(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *command], env=env, cwd=folder, capture_output=True, text=True, timeout=240
        )

    return run


def imported(*folders: str) -> set[str]:
    """Top-level modules that any file in these folders imports."""
    trees = [ast.parse(path.read_text()) for folder in folders for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    members = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    skipped = {  # pytest.importorskip("name")
        node.args[0].value
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "importorskip"
    }
    return {name.partition(".")[0] for name in plain | members | skipped}


def test_every_package_that_is_imported_is_asked_for():
    asked = names(PROJECT["dependencies"]).union(*(names(lines) for extra, lines in EXTRAS.items() if extra != "test"))
    held = makers()
    unnamed = {module for module in imported("volseg", "benchmarks") if module in held and not held[module] & asked}
    assert unnamed - {"volseg"} == set()


def test_no_package_is_asked_for_that_nothing_uses():
    asked = names(PROJECT["dependencies"]).union(*map(names, EXTRAS.values()))
    modules = imported("volseg", "benchmarks", "tests")
    here = makers()
    used = set().union(
        *(here.get(module, {canonical(module)}) for module in modules)
    )  # what is not here has its own name
    assert asked - used - TOOLS - BEHIND.keys() == set()


def test_all_holds_every_extra_that_users_install():
    everything = set(re.search(r"\[(.*)\]", EXTRAS["all"][0])[1].split(","))
    assert everything == EXTRAS.keys() - {"all", "docs", "test"}


def test_every_module_but_training_is_imported_without_an_extra(base):
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "volseg").rglob("*.py")]
    without = re.compile(r"volseg\.training\.(init|suggest|napari_editor|package|start)$")  # and what these need
    training = [m for m in modules if m.startswith("volseg.training") and not without.match(m)]
    modules = [m for m in modules if m not in training and not m.endswith(("__main__", "__init__"))]
    run = base("-c", f"for name in {modules}: __import__(name)")
    assert run.returncode == 0, run.stderr


def test_inference_needs_no_extra_and_what_does_is_named_with_the_line_that_installs_it(base):
    said = ""
    for command in (
        ["synth", "em.zarr", "--shape", "16,192,192", "--seed", "12"],
        ["infer", "em.zarr", "--workers", "1", "--set", "stitch.min_voxels=0"],
        ["init", "em.zarr", "em.zarr/labels/truth"],
        ["suggest", "em.volseg.zarr", "--count", "1"],
    ):
        run = base("-m", "volseg", *command)
        assert run.returncode == 0, run.stderr
        said = said + run.stderr
    assert "openvino int8 on cpu (all that runs without torch)" in said

    for command, extra in (
        (["train", str(ROOT / "configs" / "few.toml")], "train"),
        (["infer", "em.zarr", "--out", "other.zarr", "--precision", "fp32"], "torch"),
    ):
        run = base("-m", "volseg", *command)
        assert run.returncode != 0
        assert re.search(rf"^volseg: torch\b.* not installed.*pip install 'volseg\[{extra}\]'$", run.stderr, re.M)
