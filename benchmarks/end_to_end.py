"""A volume of billions of voxels in chunks 64 deep, from file to stored probabilities, against the bare model."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from itertools import cycle, islice
from math import prod
from pathlib import Path

import numpy as np
import tifffile
import zarr

from benchmarks import report
from volseg.config import Config
from volseg.inference import backends, export, model, tiles
from volseg.inference.normalization import standardized
from volseg.system import tune_malloc

CHUNK = 64
SECTIONS = 32  # of the tile that the bare model gets, one after the other
WARM_BATCHES = 3


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
    bare = {layout: bare_speed(part, facts, *layout, seconds) for layout in _layouts(facts)}
    best = max(bare, key=lambda layout: bare[layout])
    report.keep("end-to-end", [{
        "voxels": wanted,
        "engine": f"{facts['engine']['backend']} {facts['engine']['precision']}",
        "whole run, s": round(facts["seconds"]["total"]),
        "predict, Mvoxel/s": round(wanted / predict_s / 1e6, 2),
        **{f"bare, {p} x {t} threads": round(speed, 2) for (p, t), speed in bare.items()},
        "wanted / bare": round(wanted / predict_s / 1e6 / bare[best], 3),
        "inferred / wanted": round(inferred / wanted, 3),
        "inferred / bare": round(inferred / predict_s / 1e6 / bare[best], 3),
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


def _layouts(facts: dict) -> set[tuple[int, int]]:
    """Processes and threads of each by which the run's cores can be used."""
    cores = facts["workers"] * facts.get("threads", 1)
    return {(cores, 1), (1, cores)}


def bare_speed(part: np.ndarray, facts: dict, processes: int, threads: int, seconds: float) -> float:
    """Million voxels/s of the model alone over tiles in memory, warmed up: so many processes at once, and threads in each."""
    context = multiprocessing.get_context("spawn")
    barrier, speeds = context.Barrier(processes), context.Queue()
    given = part, facts, threads, seconds, barrier, speeds
    workers = [context.Process(target=_run_bare, args=given) for _ in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise RuntimeError("the bare model failed")
    return sum(speeds.get() for _ in workers)


def _run_bare(part: np.ndarray, facts: dict, threads: int, seconds: float, barrier: object, speeds: object) -> None:
    tune_malloc()
    backend, precision = facts["engine"]["backend"], facts["engine"]["precision"]
    path = Path(facts["config"]["predict"]["model"] or model.shipped())
    card = model.load_card(path)
    grid = tiles.grid(part.shape[1:], Config().predict.tile, Config().predict.overlap, card.multiple)
    shape = (1, card.sections, *grid.size)
    network = backends.load(export.export_model(path, backend, precision), backend, precision, shape, threads)
    some = part[:, : grid.size[0], : grid.size[1]]
    lacking = [(0, 0), *((0, size - n) for size, n in zip(grid.size, some.shape[1:], strict=True))]
    slab = standardized(np.pad(some, lacking, mode="symmetric"), facts["mean"], facts["std"])
    windows = np.lib.stride_tricks.sliding_window_view(slab, card.sections, axis=0).transpose(0, 3, 1, 2)
    batches = cycle([(z, np.ascontiguousarray(window)[None]) for z, window in enumerate(windows)])
    list(backends.imap(network, islice(batches, WARM_BATCHES), threads))
    barrier.wait()
    start, done = time.perf_counter(), 0
    running = backends.imap(network, batches, threads)
    while (took := time.perf_counter() - start) < seconds:
        next(running)
        done += 1
    speeds.put(done * prod(grid.size) / took / 1e6)
