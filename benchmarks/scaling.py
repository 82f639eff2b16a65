"""What grows with what: workers, the volume, and the number of blocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from benchmarks import report
from volseg import cluster, config

BLOCK = (32, 128, 128)
SIZES = {1: (32, 256, 256), 8: (64, 512, 512), 64: (128, 1024, 1024)}  # of the volume, by how much larger
TOLD = 20  # memory is looked at that often


def volumes(out: str, most: int) -> None:
    """A row for each volume size: one worker, blocks of one shape; peak memory must not grow, nor the cost of a voxel."""
    rows = []
    for factor, shape in ((f, s) for f, s in SIZES.items() if f <= most):
        facts = _infer(Path(out, f"size{factor}"), shape, "--workers", "1")
        rows.append({"volume": " x ".join(map(str, shape)), "larger": factor, **_row(facts)})
    report.keep("scaling-volume", rows)


def workers(out: str, counts: tuple[int, ...]) -> None:
    """A row for each number of workers over one volume."""
    rows = []
    for count in counts:
        facts = _infer(Path(out, f"workers{count}"), SIZES[8], "--workers", str(count))
        rows.append({"workers": count, "cores": os.cpu_count(), **_row(facts)})
    report.keep("scaling-workers", rows)


def _infer(folder: Path, shape: tuple[int, ...], *flags: str) -> dict:
    """run.json of a run over a synthetic volume of that shape."""
    folder.mkdir(parents=True, exist_ok=True)
    image, out = str(folder / "em.zarr"), str(folder / "em.volseg.zarr")
    start = [sys.executable, "-m", "volseg"]
    if not Path(image).exists():
        subprocess.run([*start, "synth", image, "--shape", ",".join(map(str, shape)), "--seed", "1"], check=True)
    sets = ["--set", f"blocks.shape={list(BLOCK)}", "--set", "predict.tile=256", "--set", "predict.overlap=32"]
    subprocess.run([*start, "infer", image, "--out", out, "--overwrite", *sets, *flags], check=True)
    return json.loads(Path(out, "run.json").read_text())


def _row(facts: dict) -> dict:
    seconds, shape = facts["seconds"], facts["source"]["shape"]
    voxels = shape[0] * shape[1] * shape[2]
    spent = seconds["total"] - seconds["start"]
    return {
        "worker MB": round(facts["peak_bytes"]["worker"] / 1e6),
        "client MB": round(facts["peak_bytes"]["client"] / 1e6),
        "s without start": round(spent, 1),
        "µs per voxel": round(1e6 * spent / voxels, 3),
        "objects": facts["objects"],
    }


def nothing(item: int) -> int:
    """A block with nothing to do."""
    return item


def blocks(count: int) -> None:
    """Rows along one run of so many null blocks: how fast they go, and the memory of scheduler and client together."""
    rows = []
    with cluster.connect(config.Cluster(workers=2, dashboard="")) as client:
        start, state = time.perf_counter(), {"done": 0}

        def done(_item: int, _result: int) -> None:
            state["done"] += 1
            if state["done"] % max(1, count // TOLD) == 0:
                took = time.perf_counter() - start
                rows.append({"blocks": state["done"], "tasks/s": round(state["done"] / took),
                             "client + scheduler MB": round(psutil.Process().memory_info().rss / 1e6)})  # fmt: skip

        cluster.run(client, nothing, range(count), window=64, done=done)
    report.keep("scaling-blocks", rows)
