"""A volume of billions of voxels in chunks 64 deep, from file to stored probabilities, against the bare model."""

from __future__ import annotations

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
import tifffile
import zarr

from benchmarks import bare, report
from benchmarks.bare import SECTIONS

CHUNK = 64


def measure(image: str, out: str, times: tuple[int, int, int], seconds: float) -> None:
    """A row: million voxels/s of the predict stage of one run over an image laid so many times along z, y and x, each copy
    mirrored, and of the model alone in the better of its layouts, which is watched for so long."""
    folder = Path(out)
    source = write_mirrored(tifffile.imread(image), folder / "em.zarr", times)
    facts = _infer(source, folder / "em.volseg.zarr")
    spent = facts["worker_seconds"]["predict"]
    predict_s = (sum(spent.values()) - spent["load"]) / facts["workers"]
    wanted, inferred = prod(facts["source"]["shape"]), facts["actual"]["inferred_voxels"]
    part = zarr.open_array(source / "0", mode="r")[: SECTIONS + 2]
    speeds = bare.speeds(part, facts, seconds)
    best = max(speeds, key=lambda layout: speeds[layout])
    report.keep("end-to-end", [{
        "voxels": wanted,
        "engine": f"{facts['engine']['backend']} {facts['engine']['precision']}",
        "whole run, s": round(facts["seconds"]["total"]),
        "predict, Mvoxel/s": round(wanted / predict_s / 1e6, 2),
        **{f"bare, {p} x {t} threads": round(speed, 2) for (p, t), speed in speeds.items()},
        "wanted / bare": round(wanted / predict_s / 1e6 / speeds[best], 3),
        "inferred / wanted": round(inferred / wanted, 3),
        "inferred / bare": round(inferred / predict_s / 1e6 / speeds[best], 3),
        "waiting for data": round(facts["data_wait_share"], 4),
    }])  # fmt: skip


def write_mirrored(image: np.ndarray, path: Path, times: tuple[int, int, int]) -> Path:
    """``path`` is a zarr group, its array 0 the image (z y x) laid so many times, in chunks of `CHUNK`, each copy mirrored."""
    shape = tuple(n * k for n, k in zip(image.shape, times, strict=True))
    if path.exists():
        return path
    partial = path.with_suffix(".part")
    array = zarr.create_array(
        partial / "0", shape=shape, chunks=(CHUNK,) * 3, dtype=image.dtype, overwrite=True, fill_value=0
    )
    z, y, x = (
        np.pad(np.arange(n), (0, n * (k - 1)), mode="symmetric") for n, k in zip(image.shape, times, strict=True)
    )
    for start in range(0, shape[0], CHUNK):
        array[start : start + CHUNK] = image[np.ix_(z[start : start + CHUNK], y, x)]
    return partial.rename(path)


def _infer(source: Path, out: Path) -> dict:
    line = [
        sys.executable,
        "-m",
        "volseg",
        "infer",
        str(source / "0"),
        "--voxel-nm",
        "5,5,5",
        "--out",
        str(out),
        "--overwrite",
    ]
    subprocess.run([*line, "--set", "cluster.dashboard=''", "--set", "output.keep_work=false"], check=True)
    return json.loads((out / "run.json").read_text())
