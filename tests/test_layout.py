"""The package's shape: who may import whom, and what stays out of a command's start."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "volseg"
RANKS = [
    {"box", "cache", "config", "device", "machine", "prefork"},
    {"warm", "grey", "losses", "parallel", "tiles", "targets", "fragments", "stitch", "voids", "decide", "tree", "merges",
     "objects", "metrics", "ready", "synth"},
    {"volume", "model"},
    {"pyramid", "samples", "forward", "foreign", "store", "wanted"},
    {"run", "cluster"},
    {"memory", "probe", "pipeline", "folder", "evaluate", "view", "heldout", "checkpoint"},
    {"describe", "flow"},
    {"plan"},
    {"launch", "calibrate", "verify", "quantise", "report", "review", "card"},
    {"train"},
    {"tune"},
    {"cli", "__init__", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
MAY = {
    "torch": {"model", "samples", "train", "tune", "forward", "losses", "parallel", "heldout", "checkpoint", "report",
              "device"},
    "dask": {"cluster"},
    "distributed": {"cluster"},
    "zarr": {"volume"},
}
# Inside one rank: stitch reads the tables that fragments writes, decide what stitch and voids gather, merges tells what was
# decided, tree decides likewise.
SAME_RANK = {("config", "box"), ("device", "config"), ("device", "machine"), ("stitch", "fragments"),
             ("voids", "stitch"), ("decide", "stitch"), ("decide", "fragments"), ("decide", "voids"),
             ("merges", "decide"), ("merges", "fragments"), ("merges", "stitch"),
             ("tree", "decide"), ("tree", "fragments"), ("tree", "stitch"),
             ("__main__", "cli")}  # fmt: skip


def imports(path):
    """Names of modules that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_a_file_imports_only_from_lower_ranks(path):
    assert path.stem in RANK, f"{path.name} has no rank: add it to DESIGN.md's table and here"
    for name in imports(path):
        found = re.fullmatch(r"volseg\.(\w+)(\..*)?", name)
        if found and found[1] in RANK and (path.stem, found[1]) not in SAME_RANK:
            assert RANK[found[1]] < RANK[path.stem], f"{path.stem} imports {found[1]}"
        root = name.partition(".")[0]
        assert root not in MAY or path.stem in MAY[root], f"{path.stem} imports {root}"


@pytest.mark.parametrize("command", [["-c", "import volseg"], ["-m", "volseg", "--help"]])
def test_starting_loads_neither_torch_nor_dask(command):
    run = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True)
    loaded = set(re.findall(r"\|\s+(torch|dask|distributed|zarr|numba|openvino)$", run.stderr, re.M))
    assert not loaded
