"""The promise, measured: one SHA-256 whatever the blocks and workers, and whether the run was killed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile
from scipy.ndimage import gaussian_filter

from benchmarks import report
from benchmarks.memory import find_basins
from volseg.box import Box, Triple, VoxelSize
from volseg.config import Config
from volseg.io import arrays, volume
from volseg.segmentation.rules import Rules, label_basins

VNC = ("input.voxel_size_nm=[50, 4.6, 4.6]", "fragments.smooth=[0, 2, 2]")  # settings of the runs on VNC


def digest(labels: np.ndarray) -> str:
    """SHA-256 of raw label bytes."""
    return hashlib.sha256(np.ascontiguousarray(labels).tobytes()).hexdigest()


def compare_commands(path: str, sections: int) -> None:
    """Whole runs of `volseg infer`: three block shapes, 1 and 2 workers, workers and whole run killed half-way."""
    source = volume.open(path)
    depth = sections or source.shape[0]
    box = Box((source.shape[0] - depth, 0, 0), source.shape)
    with tempfile.TemporaryDirectory() as folder:
        image = f"{folder}/image.tif"
        tifffile.imwrite(image, source.read(box), photometric="minisblack")
        _, ny, nx = source.shape
        cuts = [("auto", None, 1, None), (None, (4, ny, nx), 2, None), (None, (7, ny // 2 - 5, nx), 2, None),
                ("4 x plane, workers killed", (4, ny, nx), 2, "workers"),
                ("4 x plane, run killed", (4, ny, nx), 2, "run")]  # fmt: skip
        rows = []
        for i, (name, block, workers, kill) in enumerate(cuts):
            out = f"{folder}/{i}.volseg.zarr"
            _infer(image, out, block, workers, kill)
            facts = json.loads(Path(out, "run.json").read_text())
            labels = volume.open(out, dataset="labels/instances/0")
            rows.append({
                "blocks": name or " x ".join(map(str, block)),
                "workers": workers,
                "objects": facts["objects"],
                "sha256": digest(labels.read(Box.from_shape(labels.shape))),
            })  # fmt: skip
            shutil.rmtree(out)
    report.keep("exact", rows)
    _agree(rows)


def _infer(image: str, out: str, block: Triple | None, workers: int, kill: str | None) -> None:
    line = [sys.executable, "-m", "volseg", "infer", image, "--out", out, "--workers", str(workers)]
    line += [f"--set=blocks.shape={list(block)}"] if block else []
    if kill:
        _kill_half_way(line, out, kill)
    if kill != "workers":
        subprocess.run(line, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def _kill_half_way(line: list[str], out: str, kill: str) -> None:
    """Starts a run and, once it has done a block of each worker, kills its workers, or all of it, with SIGKILL."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(line, stderr=quiet, stdout=quiet, start_new_session=True)
    markers = Path(f"{out}.partial/work/markers/predict")
    while process.poll() is None and len(list(markers.glob("[0-9]*.json"))) < 2:
        time.sleep(0.05)
    if kill == "run":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        for pid in {json.loads(path.read_text())["pid"] for path in markers.glob("[0-9]*.json")}:
            os.kill(pid, signal.SIGKILL)
    if process.wait() != (0 if kill == "workers" else -signal.SIGKILL):
        raise SystemExit(f"the run ended with {process.returncode}: {' '.join(line)}")


def compare_blocks(run: str) -> None:
    """The stored probabilities of a finished run, cut in six ways in this process, against the labels it wrote."""
    facts = json.loads(Path(run, "run.json").read_text())
    config = Config(**facts["config"])
    probability = np.asarray(arrays.open_array(run, "0")[:])
    shape = probability.shape[1:]
    labels = volume.open(run, dataset="labels/instances/0")
    rows = [{"blocks": "as run", "seconds": round(facts["seconds"]["total"], 1),
             "sha256": digest(labels.read(Box.from_shape(shape)))}]  # fmt: skip
    for block in ((192, 192, 192), (64, 64, 64), (37, 50, 192), (16, 100, 31), (165, 768, 40), (5, 768, 1024)):
        start = time.perf_counter()
        again = label_in_memory(probability, config, block, tuple(facts["voxel_size_nm"])).astype(labels.dtype)
        rows.append({"blocks": " x ".join(map(str, block)), "seconds": round(time.perf_counter() - start, 1),
                     "sha256": digest(again)})  # fmt: skip
    report.keep("exact-run", rows)
    _agree(rows)


def compare_foreign(folder: str, sections: int) -> None:
    """Whole runs of `volseg segment` on probabilities of VNC that volseg did not make, in six blockings."""
    depth = sections or volume.open(f"{folder}/raw").shape[0]
    rows = []
    with tempfile.TemporaryDirectory() as place:
        _, ny, nx = volume.open(f"{folder}/raw").shape
        path = f"{place}/probabilities.tif"
        mask, contour = vnc_probabilities(folder, Box((0, 0, 0), (depth, ny, nx)))
        tifffile.imwrite(path, np.stack([mask, contour], axis=1), metadata={"axes": "ZCYX"}, photometric="minisblack")
        for i, block in enumerate(
            [(depth, ny, nx), (4, ny, nx), (7, 500, 301), (depth, 96, 96), (1, ny, nx), (5, 333, nx)]
        ):
            out = f"{place}/{i}.volseg.zarr"
            line = [sys.executable, "-m", "volseg", "segment", path, "--mask-channel=0", "--contour-channel=1", "--out", out,
                    f"--set=blocks.shape={list(block)}", *(f"--set={text}" for text in VNC)]  # fmt: skip
            done = subprocess.run(line, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(line)}: {done.stderr}")
            labels = volume.open(out)
            rows.append({
                "blocks": " x ".join(map(str, block)),
                "objects": json.loads(Path(out, "run.json").read_text())["objects"],
                "sha256": digest(labels.read(Box.from_shape(labels.shape))),
            })  # fmt: skip
            shutil.rmtree(out)
    report.keep("exact-vnc", rows)
    _agree(rows)


def vnc_probabilities(folder: str, box: Box) -> tuple[np.ndarray, np.ndarray]:
    """Mask and contour (float32, 0..1) as a network might give them: the truth with soft borders, surer where it is dark."""
    inside = (volume.open(f"{folder}/mitochondria").read(box) > 0).astype(np.float32)
    dark = 1 - gaussian_filter(volume.open(f"{folder}/raw").read(box).astype(np.float32), (0, 2, 2)) / 255
    soft = gaussian_filter(inside, (0.3, 3, 3))
    return np.clip(soft * (0.5 + dark), 0, 1), np.clip(2 * soft * (1 - soft) * (0.5 + dark), 0, 1)


def label_in_memory(probability: np.ndarray, config: Config, block: Triple, voxel_size_nm: VoxelSize) -> np.ndarray:
    """Labels (z, y, x) of probabilities (2, z, y, x), cut into blocks of that shape."""
    basins, number = find_basins(probability, config.fragments, voxel_size_nm, block)
    return np.r_[0, label_basins(basins, Rules.from_config(config, voxel_size_nm))][number]


def _agree(rows: list[dict]) -> None:
    answers = {row["sha256"] for row in rows}
    if len(answers) != 1:
        raise SystemExit(f"{len(answers)} different answers: the promise is broken")
    print(f"one answer: {answers.pop()}")
