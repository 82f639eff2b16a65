"""Which block goes when: one as soon as what it is made from is done, beside those of earlier stages.

Which may start is known from the markers when a run begins, and from the ends of others after that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from volseg import system
from volseg.box import Blocks
from volseg.engine import cluster, compiled, drop, folder, loop, monitor
from volseg.engine.block_tables import Values
from volseg.engine.elastic import call_on_workers
from volseg.engine.pipeline import process_block, process_block_in_pieces
from volseg.engine.predict import release_network
from volseg.engine.ready import Ready
from volseg.engine.receipt import Receipt
from volseg.engine.receipts import Markers, RunStatistics
from volseg.engine.run import Run
from volseg.engine.stages import Group, Stage, group_of, stages_of
from volseg.errors import DamagedFileError, IncompleteRunError, OutOfMemoryError, UserError
from volseg.progress import Progress

FLAT_EDGES = 50_000_000  # that one process stitches unless it is told otherwise: about 6 GB
EDGE_BYTES = 120  # that a process which stitches holds for each of them: measured on 0.5 to 10 million


def run_stages(client: Any, run: Run, markers: Markers, progress: Progress, plan: dict | None = None) -> RunStatistics:
    """Every stage is done over all blocks; what it took, over the blocks that no marker covered.

    The dashboard, where there is one, shows it, beside the ``plan``. A file that turns out to be damaged is made again, by
    doing the blocks again that wrote it.
    """
    statistics = RunStatistics(slots=cluster.threads(client), devices=cluster.devices(client))
    with monitor.shown(client, run, statistics, plan, progress.message):
        _run_and_mend(client, run, markers, progress, statistics)
    compiled.remember()
    return statistics


def _run_and_mend(client: Any, run: Run, markers: Markers, progress: Progress, statistics: RunStatistics) -> None:
    mended: Counter[str] = Counter()
    while True:
        try:
            return _run_groups(client, run, markers, progress, statistics)
        except DamagedFileError as error:
            mended.update(error.keys)
            if max(mended.values()) >= run.config.cluster.tries or not mend(run, markers, error.keys):
                raise IncompleteRunError(
                    f"{error}; what else is done is kept, but this cannot be made again: begin again with --overwrite"
                ) from None
            progress.message(f"{run.out}/{error.keys[0]} {error.state}: making it again")


def mend(run: Run, markers: Markers, keys: Iterable[str]) -> bool:
    """The blocks that wrote these files count as not done, arrays can be opened again; whether there was such a block."""
    folder.create_missing_arrays(run)
    makers = markers.makers(keys)
    for stage, blocks in makers.items():
        markers.remove(stage, blocks)
    return bool(makers) or all(key.endswith("zarr.json") for key in keys)


def _run_groups(client: Any, run: Run, markers: Markers, progress: Progress, statistics: RunStatistics) -> None:
    basins = group_of(run, "basins")
    with drop.dropping(run, markers):
        if _is_done(markers, stages_of(run)[run.probability_stage]):
            basins = [stage for stage in basins if stage.name not in run.passes]  # what they stored may be gone
        else:
            folder.create_passes(run)
        _run_together(client, run, basins, markers, progress, statistics)
    folder.drop_passes(run, markers)
    run.layout.remove_tile_parts()
    _stitch(client, run, markers, progress, statistics)
    folder.create_labels(run, markers)
    _run_together(client, run, group_of(run, "labels"), markers, progress, statistics)


def predicted_share(run: Run, markers: Markers) -> float:
    """Share of the blocks that have their probabilities, of all passes together; 0 where no block wants any."""
    stages = stages_of(run)
    last = stages[run.probability_stage]
    if _is_done(markers, last):
        return float(last.part.count > 0)  # passes may be gone
    making = [stages[name] for name in (run.passes or [last.name])]
    return sum(len(markers.done(stage.name)) for stage in making) / max(1, sum(stage.part.count for stage in making))


def _is_done(markers: Markers, stage: Stage) -> bool:
    done = markers.done(stage.name)
    return len(done) >= stage.part.count and done.issuperset(stage.part.numbers)


def _run_together(
    client: Any, run: Run, stages: list[Stage], markers: Markers, progress: Progress, statistics: RunStatistics
) -> None:
    """Some stages are done over all their blocks, side by side.

    Raises `IncompleteRunError` that names the blocks given up, `OutOfMemoryError` as soon as a batch of several tiles does
    not fit a worker's memory, and `DamagedFileError` for a file that is not what its block wrote.
    """
    by_name = {stage.name: stage for stage in stages}
    blocks: dict[str, Ready] = {}
    for stage in stages:
        earlier = {name: (blocks[name], region) for name, region in stage.after.items() if name in blocks}
        own = (stage.name, stage.after[stage.name]) if stage.name in stage.after else None
        part = stage.part
        blocks[stage.name] = Ready(stage.grid, markers.done(stage.name), earlier, own, part.box, part.each)
    given_up = [_failed_before(*item) for item in markers.given_up.items() if item[0][0] in by_name]
    for name, i in (failure.item for failure in given_up):
        blocks[name].give_up(i)
    if statistics.blocks is not None:
        statistics.blocks.update(blocks)
    advance = {name: progress.stage(name, by_name[name].part.voxels, state.voxels) for name, state in blocks.items()}
    followers = {name: [stage.name for stage in stages if name in stage.after] for name in blocks}
    first = (
        {stage.name for stage in stages if not stage.on_device}
        if run.config.cluster.is_local and not compiled.known()
        else set()
    )
    alone: set[str] = set()  # stages whose first block is under way, and no other

    def ready(names: list[str]) -> Iterator[tuple[str, int] | None]:
        while True:
            free = (name for name in names if name not in alone)
            item = next(((name, i) for name in free if (i := blocks[name].take()) is not None), None)
            if item:
                statistics.begin(by_name[item[0]].title)
                alone.update(first & {item[0]})
            yield item

    def done(item: tuple[str, int], receipt: Receipt) -> None:
        name, i = item
        first.discard(name)
        alone.discard(name)
        blocks[name].end(i, empty=receipt.nothing_wanted)
        for follower in followers[name]:
            blocks[follower].tell(name, i)
        statistics.end(by_name[name].title, receipt)
        advance[name](by_name[name].part.voxels_of(i))
        markers.add(name, i, receipt)

    def stop(error: UserError) -> bool:
        if isinstance(error, DamagedFileError):  # a store that fails for a moment has damaged nothing
            marks = markers.marks(error.keys)
            return not marks or not all(markers.layout.fits(*item) for item in marks.items())
        return isinstance(error, OutOfMemoryError) and run.batch > 1

    def tell(failure: loop.Failure) -> None:
        name, i = failure.item
        progress.message(f"{name} of block {by_name[name].grid[i]}: {failure.reason}: trying it alone, in less memory")

    def give_up(failure: loop.Failure) -> None:
        name, i = failure.item
        alone.discard(name)
        blocks[name].give_up(i)

    settings = run.config.cluster
    inferring = [stage.name for stage in stages if stage.on_device]
    failures = loop.run(
        client, process_block, ready([stage.name for stage in reversed(stages) if not stage.on_device]), run.out, run.id,
        device=ready(inferring) if inferring else (), tries=settings.tries, window=cluster.window(client, settings),
        done=done, stop=stop, careful=process_block_in_pieces, tell=tell,
        give_up=give_up,
    )  # fmt: skip
    markers.flush()
    _refuse(run, stages, [*failures, *given_up])


def _refuse(run: Run, stages: list[Stage], failures: list[loop.Failure]) -> None:
    """Raises what names the first block given up, if any was."""
    if not failures:
        return
    order = [stage.name for stage in stages]
    first = min(failures, key=lambda failure: (order.index(failure.item[0]), failure.item[1]))
    name, i = first.item
    grids = {stage.name: stage.grid for stage in stages}
    run.layout.save_failures([{**_failure(f, grids), "key": stages[order.index(f.item[0])].key} for f in failures])
    count, grid = sum(failure.item[0] == name for failure in failures), stages[order.index(name)].grid
    more = f" ({count} of {len(grid)} blocks)" if count > 1 else ""
    raise IncompleteRunError(
        f"{name} failed in block {grid[i]}{more} after {run.config.cluster.tries} tries: {first.reason}; "
        f"what is done is kept: mend the cause ({run.layout.failures_path} has more) and give the same command again"
    )


def _failure(failure: loop.Failure, grids: dict[str, Blocks]) -> dict:
    """What ``failed.json`` says of a block."""
    stage, i = failure.item
    facts = {"worker": failure.worker, "reason": failure.reason, "traceback": failure.traceback}
    return {"stage": stage, "block": i, "box": str(grids[stage][i]), **facts}


def _failed_before(item: tuple[str, int], entry: dict) -> loop.Failure:
    """The failure that an entry of ``failed.json`` tells of."""
    return loop.Failure(item, *(str(entry.get(name, "")) for name in ("reason", "traceback", "worker")))


# ---------------------------------------------------------------- the decision


def _stitch(client: Any, run: Run, markers: Markers, progress: Progress, statistics: RunStatistics) -> None:
    """Every block has its id map: by one process, or in a tree where that would not hold all edges."""
    stitch = stages_of(run)["stitch"]
    if run.config.stitch.reduce == "flat" and not run.layout.has_basins():
        markers.remove("stitch")  # a tree has made the labels, but not what is asked for
    kept = "renumber" if run.corrections else "assign0", "borders"  # stages of a tree whose tables are read later on
    if _is_done(markers, stitch) and (
        run.layout.has_basins() or all(_is_done(markers, stages_of(run)[name]) for name in kept)
    ):
        return
    call_on_workers(client, release_network)  # nothing is inferred from here on: the graph takes the room that it had
    group: Group = "flat" if _fits_one_process(run, markers) else "tree"
    if group == "tree":
        run.layout.remove_basins()
    for stage in group_of(run, group):
        _run_together(client, run, [stage], markers, progress, statistics)
        if stage.name == "rank":
            _number_objects(run, markers.receipts(stage.name).values())
    if group == "tree":
        progress.message(
            "stitched as a tree: tables/merges lists borders only; joins need all edges in one process, stitch.reduce=flat"
        )
        objects = int(run.layout.layer_offsets.load().values[-1])
        if run.corrections:
            objects = int(run.layout.corrected_objects.load().objects[0])
        markers.add(stitch.name, 0, Receipt(objects=objects))
        markers.flush()
        for stage in group_of(run, group):
            if stage.name not in kept:
                markers.remove(stage.name)
        run.layout.remove_tree()


def _number_objects(run: Run, receipts: Iterable[Receipt]) -> None:
    """How many objects begin in all layers before each is stored, from the receipts of their ranks."""
    ranked = sorted(receipts, key=lambda receipt: receipt.layer)
    run.layout.layer_offsets.save(Values(np.cumsum([0, *(receipt.objects for receipt in ranked)])))


def _fits_one_process(run: Run, markers: Markers) -> bool:
    """Whether one process decides: as told, else by the number of edges."""
    if run.partition:
        return True  # of basins that one process has gathered
    if run.config.stitch.reduce != "auto":
        return run.config.stitch.reduce == "flat"
    edges = sum(receipt.edges for receipt in markers.receipts("link").values())
    most = most_edges(run)
    if edges > most and (needs := run.config.stitch.needs_all()):
        raise UserError(
            f"stitch.{needs[0]} needs all {edges} edges in one process, about {edges * EDGE_BYTES / 1e9:.0f} GB: set it to "
            "0, or stitch.reduce to 'flat' where a worker has as much"
        )
    return edges <= most


def most_edges(run: Run) -> int:
    """How many edges one process may hold: `FLAT_EDGES`, or as many as fit the memory it may take."""
    settings = run.config.cluster
    given = system.free_memory() if settings.is_local else FLAT_EDGES * EDGE_BYTES
    return min(FLAT_EDGES, (round(settings.memory_limit * 1e9) or given) // EDGE_BYTES)
