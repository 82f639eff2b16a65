"""The bare model: a network alone over tiles in memory, in the layouts of processes and threads that the cores allow."""

from __future__ import annotations

import multiprocessing
import time
from itertools import cycle, islice
from math import prod
from pathlib import Path

import numpy as np

from volseg.config import Config
from volseg.inference import backends, export, model, tiles
from volseg.inference.normalization import standardized
from volseg.system import tune_malloc

SECTIONS = 32  # of the tile that the bare model gets, one after the other
WARM_BATCHES = 3

Layout = tuple[int, int]  # processes, and threads of each


def speeds(part: np.ndarray, facts: dict, seconds: float) -> dict[Layout, float]:
    """Million voxels/s of a run's network in each layout, watched for so long.

    ``part``: `SECTIONS` of the volume and one more on each side; ``facts``: of the run, as ``run.json`` has them.
    """
    cores = facts["workers"] * facts.get("threads", 1)
    return {layout: _speed(part, facts, *layout, seconds) for layout in {(cores, 1), (1, cores)}}


def _speed(part: np.ndarray, facts: dict, processes: int, threads: int, seconds: float) -> float:
    """Million voxels/s of the model alone over tiles in memory, warmed up: so many processes at once, and threads in each."""
    context = multiprocessing.get_context("spawn")
    barrier, speeds = context.Barrier(processes), context.Queue()
    given = part, facts, threads, seconds, barrier, speeds
    workers = [context.Process(target=_run, args=given) for _ in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise RuntimeError("the bare model failed")
    return sum(speeds.get() for _ in workers)


def _run(part: np.ndarray, facts: dict, threads: int, seconds: float, barrier: object, speeds: object) -> None:
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
