"""Which block goes when: one as soon as what it is made from is done, beside those of earlier stages.

Which may start is known from the markers when a run begins, and from the ends of others after that.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

from volseg import system
from volseg.engine import cluster, folder
from volseg.engine.layout import Values
from volseg.engine.pipeline import process_block
from volseg.engine.predict import release_network
from volseg.engine.ready import Ready
from volseg.engine.receipts import Receipt, RunStatistics, mark, marked, receipts
from volseg.engine.run import Run
from volseg.engine.stages import Group, Stage, group_of, stages_of
from volseg.errors import IncompleteRunError, OutOfMemoryError, UserError
from volseg.progress import Progress

FLAT_EDGES = 50_000_000  # that one process stitches unless it is told otherwise: about 4 GB
EDGE_BYTES = 80  # that stitching takes in memory for each of them, as benchmarks/README.md measures


def run_stages(client: Any, run: Run, progress: Progress) -> RunStatistics:
    """Every stage is done over all blocks; what it took, over the blocks that no marker covered."""
    statistics = RunStatistics(slots=cluster.threads(client), devices=cluster.devices(client))
    basins = group_of(run, "basins")
    if _is_done(run, stages_of(run)[run.probability_stage]):
        basins = [stage for stage in basins if stage.name not in run.passes]  # what they stored may be gone
    _run_together(client, run, basins, progress, statistics)
    folder.drop_passes(run)
    _stitch(client, run, progress, statistics)
    folder.create_labels(run)
    _run_together(client, run, group_of(run, "labels"), progress, statistics)
    return statistics


def predicted_share(run: Run) -> float:
    """Share of the blocks that have gone through the network, of all passes together."""
    stages = stages_of(run)
    inferring = [stages[name] for name in (run.passes or [run.probability_stage])]
    done = sum(len(marked(run.out, stage.name, stage.key)) for stage in inferring)
    return done / sum(len(stage.grid) for stage in inferring)


def _is_done(run: Run, stage: Stage) -> bool:
    return len(marked(run.out, stage.name, stage.key)) == len(stage.grid)


def _run_together(client: Any, run: Run, stages: list[Stage], progress: Progress, statistics: RunStatistics) -> None:
    """Some stages are done over all their blocks, side by side.

    Raises `IncompleteRunError` that names the blocks given up, and `OutOfMemoryError` as soon as a batch of several tiles
    does not fit a worker's memory.
    """
    by_name = {stage.name: stage for stage in stages}
    blocks: dict[str, Ready] = {}
    for stage in stages:
        marked_blocks = marked(run.out, stage.name, stage.key)
        earlier = {name: (blocks[name], region) for name, region in stage.after.items() if name in blocks}
        blocks[stage.name] = Ready(stage.grid, marked_blocks, earlier)
    advance = {name: progress.stage(name, prod(state.grid.shape), state.voxels) for name, state in blocks.items()}
    followers = {name: [stage.name for stage in stages if name in stage.after] for name in blocks}

    def ready(names: list[str]) -> Iterator[tuple[str, int] | None]:
        while True:
            item = next(((name, i) for name in names if (i := blocks[name].take()) is not None), None)
            if item:
                statistics.begin(by_name[item[0]].title)
            yield item

    def done(item: tuple[str, int], receipt: Receipt) -> None:
        name, i = item
        blocks[name].end(i)
        for follower in followers[name]:
            blocks[follower].tell(name, i)
        statistics.end(by_name[name].title, receipt)
        advance[name](receipt.voxels)

    settings = run.config.cluster
    inferring = [stage.name for stage in stages if stage.on_device]
    failures = cluster.run(
        client, process_block, ready([stage.name for stage in reversed(stages) if not stage.on_device]), run.out, run.id,
        device=ready(inferring) if inferring else (), tries=settings.tries, window=settings.window, done=done,
        final=OutOfMemoryError if run.batch > 1 else (),
    )  # fmt: skip
    _refuse(run, stages, failures)


def _refuse(run: Run, stages: list[Stage], failures: list[cluster.Failure]) -> None:
    """Raises what names the first block given up, if any was."""
    if not failures:
        return
    order = [stage.name for stage in stages]
    first = min(failures, key=lambda failure: (order.index(failure.item[0]), failure.item[1]))
    name, i = first.item
    count, grid = sum(failure.item[0] == name for failure in failures), stages[order.index(name)].grid
    more = f" ({count} of {len(grid)} blocks)" if count > 1 else ""
    raise IncompleteRunError(
        f"{name} failed in block {grid[i]}{more} after {run.config.cluster.tries} tries: {first.reason}; "
        "what is done is kept: mend the cause and give the same command again"
    )


# ---------------------------------------------------------------- the decision


def _stitch(client: Any, run: Run, progress: Progress, statistics: RunStatistics) -> None:
    """Every block has its id map: by one process, or in a tree where that would not hold all edges."""
    stitch = stages_of(run)["stitch"]
    if run.config.stitch.reduce == "flat" and not run.layout.has_basins():
        run.layout.remove_markers("stitch")  # a tree has made the labels, but not what is asked for
    if _is_done(run, stitch):
        return
    client.run(release_network)  # nothing is inferred from here on: the graph takes the room that the network had
    group: Group = "flat" if _fits_one_process(run) else "tree"
    if group == "tree":
        run.layout.remove_basins()
    for stage in group_of(run, group):
        _run_together(client, run, [stage], progress, statistics)
        if stage.name == "rank":
            _number_objects(run, stage)
    if group == "tree":
        progress.message(
            "stitched as a tree: tables/merges lists borders only; joins need all edges in one process, stitch.reduce=flat"
        )
        objects = int(run.layout.layer_offsets.load().values[-1])
        mark(run.out, stitch.name, stitch.key, 0, Receipt(objects=objects))
        run.layout.remove_tree()


def _number_objects(run: Run, rank: Stage) -> None:
    """How many objects begin in all layers before each is stored."""
    ranked = sorted(receipts(run.out, rank.name, rank.key), key=lambda receipt: receipt.layer)
    run.layout.layer_offsets.save(Values(np.cumsum([0, *(receipt.objects for receipt in ranked)])))


def _fits_one_process(run: Run) -> bool:
    """Whether one process decides: as told, else by the number of edges."""
    if run.config.stitch.reduce != "auto":
        return run.config.stitch.reduce == "flat"
    link = stages_of(run)["link"]
    edges = sum(receipt.edges for receipt in receipts(run.out, link.name, link.key))
    most = _most_edges(run)
    if edges > most and (needs := run.config.stitch.needs_all()):
        raise UserError(
            f"stitch.{needs[0]} needs all {edges} edges in one process, about {edges * EDGE_BYTES / 1e9:.0f} GB: set it to "
            "0, or stitch.reduce to 'flat' where a worker has as much"
        )
    return edges <= most


def _most_edges(run: Run) -> int:
    """How many edges one process may hold: `FLAT_EDGES`, or as many as fit the memory it may take."""
    settings = run.config.cluster
    given = FLAT_EDGES * EDGE_BYTES if settings.scheduler else system.free_memory()
    return min(FLAT_EDGES, (round(settings.memory_limit * 1e9) or given) // EDGE_BYTES)
