"""The order of a run's stages: which blocks are handed out when."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, Protocol

import numpy as np

from volseg import cluster, folder, store, tree, volume
from volseg.box import Blocks
from volseg.config import UserError
from volseg.pipeline import work
from volseg.run import Run

FLAT_EDGES = 50_000_000  # edges that one process stitches unless it is told otherwise: about 4 GB
EDGE_BYTES = 80  # that stitching takes in memory for each of them, as benchmarks/README.md measures


class Show(Protocol):
    """How a run tells its user what it does."""

    def say(self, text: str) -> None: ...

    def stage(self, name: str, voxels: int, done: int) -> Callable[[int], None]:
        """Starts a stage of so many voxels, some done before; returns what to call with voxels as they are done."""


class Incomplete(UserError):
    """Some blocks could not be done; the rest is kept, and the same command goes on from there."""


def stages(client: Any, run: Run, show: Show) -> dict[str, float]:
    """Runs every stage after another over the blocks that no marker covers; seconds of each."""
    seconds: dict[str, float] = {}
    predicted = len(cluster.marked(run.out, run.first, run.keys[run.first])) == len(run.predict_grid)
    for stage, plane in {} if predicted else run.passes.items():
        with cluster.timed(seconds, stage):
            run_stage(client, run, stage, run.pass_grid(plane), show)
    for stage in (run.first, "fragments", "faces"):
        with cluster.timed(seconds, stage):
            run_stage(client, run, stage, run.predict_grid if stage == run.first else run.grid, show)
        if stage == run.first:
            folder.drop_passes(run)
    with cluster.timed(seconds, "stitch"):
        _stitch(client, run, show)
    folder.create_labels(run)
    with cluster.timed(seconds, "relabel"):
        run_stage(client, run, "relabel", run.grid, show)
    for level in range(1, len(run.levels)):
        with cluster.timed(seconds, "pyramid"):
            run_stage(client, run, f"pyramid{level}", run.level_grid(level), show)
    return seconds


def _stitch(client: Any, run: Run, show: Show) -> None:
    """Every block has its id map: by one process, or in a tree where that would not hold all edges."""
    lacks = run.config.stitch.reduce == "flat" and not volume.exists(f"{run.out}/work/basins.npz")
    if lacks:  # a tree has made the labels, but not what is asked for
        volume.remove(f"{run.out}/work/markers/stitch")
    if cluster.marked(run.out, "stitch", run.keys["stitch"]):
        return
    if _fits_one_process(run):
        for stage in ("voids", "rims") if run.fills else ():
            run_stage(client, run, stage, run.grid, show)
        run_stage(client, run, "stitch", Blocks(run.shape, run.shape), show)
        return
    volume.remove(f"{run.out}/work/basins.npz")
    levels = range(tree.top(run.grid) + 1)
    for level in levels:
        run_stage(client, run, f"tree{level}", tree.parts(run.grid, level), show)
    run_stage(client, run, "number", run.layers, show)
    receipts = cluster.receipts(run.out, "number", run.keys["number"])
    counts = [receipt["objects"] for receipt in sorted(receipts, key=lambda receipt: receipt["layer"])]
    store.save(run.out, "work/tree/before.npz", before=np.cumsum([0, *counts]))
    for level in reversed(levels):
        run_stage(client, run, f"names{level}", tree.parts(run.grid, level), show)
    run_stage(client, run, "borders", run.grid, show)
    show.say("stitched as a tree: tables/merges lists borders only; joins need all edges in one process, stitch.reduce=flat")
    cluster.mark(run.out, "stitch", run.keys["stitch"], 0, {"seconds": {}, "objects": sum(counts)})
    volume.remove(f"{run.out}/work/tree")


def _fits_one_process(run: Run) -> bool:
    """Whether `stitched` is to be used: as told, else by the number of edges."""
    if run.config.stitch.reduce != "auto":
        return run.config.stitch.reduce == "flat"
    receipts = cluster.receipts(run.out, "faces", run.keys["faces"])
    edges = sum(receipt.get("edges", 0) for receipt in receipts)
    if edges > FLAT_EDGES and (needs := run.config.stitch.needs_all()):
        raise UserError(
            f"stitch.{needs[0]} needs all {edges} edges in one process, about {edges * EDGE_BYTES / 1e9:.0f} GB: set it to "
            "0, or stitch.reduce to 'flat' where a worker has as much"
        )
    return edges <= FLAT_EDGES


def run_stage(client: Any, run: Run, stage: str, grid: Blocks, show: Show) -> None:
    """One stage over the blocks of ``grid``; raises `Incomplete` that names the blocks given up."""
    done = cluster.marked(run.out, stage, run.keys[stage])
    advance = show.stage(stage, prod(grid.shape), sum(grid[i].voxels for i in done))
    knobs = run.config.cluster
    failures = cluster.run(
        client, work, (i for i in range(len(grid)) if i not in done), run.out, run.id, stage,
        tries=knobs.tries, window=knobs.window, done=lambda i, _: advance(grid[i].voxels),
    )  # fmt: skip
    if failures:
        first = failures[0]
        more = f" ({len(failures)} of {len(grid)} blocks)" if len(failures) > 1 else ""
        raise Incomplete(
            f"{stage} failed in block {grid[first.item]}{more} after {knobs.tries} tries: {first.reason}; "
            "what is done is kept: mend the cause and give the same command again"
        )
