"""Whether a change of the code changes the bytes of a result: a fixed set of small runs, hashed, and those of another revision.

All runs go through the command line, so that any revision that understands these commands can be compared. Hashed are the
probabilities, the labels of every level, the tables, and, in folders of ``work`` that both revisions have, the arrays of
each block, whatever they are called.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import zarr

from volseg.box import Triple
from volseg.progress import format_table

SETTINGS = ("cluster.dashboard=''", "predict.backend=openvino", "predict.precision=fp32", "stitch.min_voxels=100")
BLOCKS = "blocks.shape=[16, 64, 80]"
RUNS = {
    "probability": (),
    "blocks": (BLOCKS, "predict.tile=96", "predict.overlap=32"),
    "contour": (BLOCKS, "fragments.height=contour"),
    "distance": (BLOCKS, "fragments.height=distance", "fragments.distance=8"),
    "tree": (BLOCKS, "stitch.reduce=tree"),
    "planes": ("predict.planes=['xy','xz','yz']",),
    "tta": ("predict.tta=4",),
    "masked": (BLOCKS,),
    "holes": (BLOCKS, "stitch.fill_holes_voxels=500", "stitch.persistence=0.1", "fragments.connectivity=26"),
    "foreign": (BLOCKS,),
}
KINDS = ("probabilities", "labels", "tables", "work")
GIVEN = "blocks"  # the run whose probabilities `foreign` segments
ROOT = Path(__file__).resolve().parents[1]

Hashes = dict[str, str]  # of each part of a run's result, by its name


def measure(against: str, only: tuple[str, ...], shape: Triple, workers: int) -> None:
    """A row for each run: a hash of each of its parts, or which parts differ from those of the revision ``against``.

    Exits with 1 where any differs.
    """
    if not against:
        with TemporaryDirectory() as place:
            found = hash_runs(ROOT, Path(place, "own"), only, shape, workers)
        print(format_table(("run", *KINDS), [(name, *_by_kind(hashes)) for name, hashes in found.items()]))
        return
    with checked_out(against) as tree:
        different, rows = compare(ROOT, tree, only, shape, workers)
    print(format_table(("run", "parts compared", f"differ from {against}"), rows))
    if different:
        raise SystemExit(1)


def compare(
    tree: Path, other: Path, only: tuple[str, ...], shape: Triple, workers: int
) -> tuple[bool, list[tuple[str, int, str]]]:
    """Whether any part of any run differs between the code of two trees; for each run how many parts were compared, and
    which of them differ."""
    with TemporaryDirectory() as place:
        found = hash_runs(tree, Path(place, "own"), only, shape, workers)
        expected = hash_runs(other, Path(place, "other"), only, shape, workers)
    different = {name: differences(hashes, expected[name]) for name, hashes in found.items()}
    rows = [
        (name, len(found[name].keys() & expected[name].keys()), ", ".join(parts) or "-")
        for name, parts in different.items()
    ]
    return any(different.values()), rows


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """Inside, a folder with a revision's files."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with TemporaryDirectory() as folder:
        place = Path(folder, "tree")
        done = subprocess.run([*git, "add", "--detach", str(place), revision], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"cannot check out {revision}: {done.stderr.strip()}")
        try:
            yield place
        finally:
            subprocess.run([*git, "remove", "--force", str(place)], check=True, capture_output=True)


def hash_runs(tree: Path, place: Path, only: tuple[str, ...], shape: Triple, workers: int) -> dict[str, Hashes]:
    """The runs named in ``only``, or all, are made with the code of ``tree``, in ``place``; what they give, hashed."""
    runs = [name for name in RUNS if not only or name in only or (name == GIVEN and "foreign" in only)]
    place.mkdir()
    _volseg(tree, place, "synth", "em.zarr", "--shape", ",".join(map(str, shape)), "--seed", "12")
    mask = np.zeros(shape, np.uint8)
    z, y, x = (n // 8 for n in shape)
    mask[z:-z, y:-y, x:-x] = 1
    mask[:, 3 * y : 4 * y] = 0
    zarr.create_array(place / "mask.zarr", data=mask)
    roi = ",".join(f"{n // 16}:{n - n // 16}" for n in shape)
    found = {}
    for name in runs:
        source = ("segment", f"{GIVEN}.volseg.zarr/0", "--mask-channel", "0", "--contour-channel", "1")
        line = source if name == "foreign" else ("infer", "em.zarr", "--workers", str(workers))
        line = (*line, "--mask", "mask.zarr", "--roi", roi) if name == "masked" else line
        sets = (part for text in (*SETTINGS, *RUNS[name]) for part in ("--set", text))
        _volseg(tree, place, *line, "--out", f"{name}.volseg.zarr", *sets)
        found[name] = hash_run(place / f"{name}.volseg.zarr")
    return found


def _volseg(tree: Path, place: Path, *line: str) -> None:
    """A command with the code of ``tree``; where it fails, what it said ends the benchmark."""
    env = {**os.environ, "PYTHONPATH": str(tree), "VOLSEG_CACHE": str(place / "cache")}
    command = [sys.executable, "-m", "volseg", *line]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tree}: volseg {' '.join(line)}\n{done.stderr[-2000:]}")


def hash_run(run: Path) -> Hashes:
    """What a run gave, by part: hashes of arrays with their type and shape, of tables as text, of a folder's NPZ files."""
    hashes = {"probabilities": _hash(zarr.open_array(run / "0", mode="r")[:])}
    for level in sorted((run / "labels/instances").glob("[0-9]*")):
        hashes[f"labels/{level.name}"] = _hash(zarr.open_array(level, mode="r")[:])
    for table in sorted((run / "tables").glob("*.csv")):
        hashes[f"tables/{table.name}"] = hashlib.sha256(table.read_bytes()).hexdigest()
    for folder in sorted((run / "work").iterdir()):
        blocks = sorted((path for path in folder.glob("*.npz") if path.stem.isdigit()), key=lambda path: int(path.stem))
        if blocks:
            hashes[f"work/{folder.name}"] = _joint(*(_hash_file(block) for block in blocks))
    return hashes


def _hash_file(path: Path) -> str:
    """Of the arrays in an NPZ file, whatever they are called and in whatever order they come."""
    with np.load(path) as stored:
        return _joint(*sorted(_hash(stored[name]) for name in stored.files))


def _hash(array: np.ndarray) -> str:
    """Of type, shape and bytes; the columns of a table may have any names."""
    kinds = [array.dtype[i].str for i in range(len(array.dtype))] or array.dtype.str
    about = json.dumps([kinds, array.shape]).encode()
    return hashlib.sha256(about + np.ascontiguousarray(array).tobytes()).hexdigest()


def _joint(*hashes: str) -> str:
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def _by_kind(hashes: Hashes) -> list[str]:
    return [_joint(*(text for part, text in hashes.items() if part.startswith(kind)))[:12] for kind in KINDS]


def differences(own: Hashes, other: Hashes) -> list[str]:
    """Parts that both have and that differ; of what is no work folder, also those that one alone has."""
    shared = own.keys() & other.keys()
    lone = (part for part in own.keys() ^ other.keys() if not part.startswith("work/"))
    return sorted([*(part for part in shared if own[part] != other[part]), *lone])
