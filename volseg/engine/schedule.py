"""The order of a run's stages: a block of one goes as soon as what it is made from is done, beside earlier stages.

    predict -> fragments -> faces        one loop, from the passes where several planes are averaged, and where holes are
                                         filled with voids -> rims too
    stitch                               looks at all blocks, or goes up and down a tree of them level by level
    relabel -> pyramid1 -> pyramid2 ...  one loop again

Which block may start is known from the markers when a run begins, and from the ends of others after that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, Protocol

import numpy as np

from volseg import system as machine
from volseg.box import Box
from volseg.engine import cluster, folder
from volseg.engine.pipeline import let_go, work
from volseg.engine.ready import Ready, Region
from volseg.engine.run import Run, level_of
from volseg.errors import OutOfMemoryError, UserError
from volseg.io import files, pyramid
from volseg.io import tables as store
from volseg.segmentation import hierarchy
from volseg.segmentation.heights import height_halo

FLAT_EDGES = 50_000_000  # edges that one process stitches unless it is told otherwise: about 4 GB
EDGE_BYTES = 80  # that stitching takes in memory for each of them, as benchmarks/README.md measures
TOLD_AS = {
    "tree": "stitch",
    "number": "stitch",
    "names": "stitch",
    "borders": "stitch",
}  # stages that count as another one's


class Show(Protocol):
    """How a run tells its user what it does."""

    def say(self, text: str) -> None: ...

    def stage(self, name: str, voxels: int, done: int) -> Callable[[int], None]:
        """Starts a stage of so many voxels, some done before; returns what to call with voxels as they are done.

        Several stages may be under way at once. Each ends when all its voxels are done.
        """


class Incomplete(UserError):
    """Some blocks could not be done; the rest is kept, and the same command goes on from there."""


@dataclass
class Ledger:
    """What the stages of one command took. Blocks that were done before it began are not in it.

    ``spans``: by stage, when its first block was handed out and its last one ended. ``busy``: by stage, the seconds of
    each phase, of all workers together. ``device``: seconds in which devices computed, of all together. ``inferred``:
    voxels that went through the network. ``sent``, ``fetched``: bytes that went to torch's device and came from it.
    """

    slots: int = 1
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    busy: dict[str, dict[str, float]] = field(default_factory=dict)
    device: float = 0.0
    devices: int = 1
    inferred: int = 0
    sent: int = 0
    fetched: int = 0
    peak_bytes: int = 0
    out: int = 0
    ends: int = 0
    queued: int = 0

    def begin(self, stage: str) -> None:
        """A block of that stage is handed out."""
        now = time.perf_counter()
        self.spans.setdefault(_told_as(stage), (now, now))
        self.out += 1

    def end(self, stage: str, receipt: dict) -> None:
        """A block of that stage has ended."""
        name = _told_as(stage)
        self.spans[name] = self.spans[name][0], time.perf_counter()
        cluster.add(self.busy.setdefault(name, {}), receipt["seconds"])
        self.device += receipt.get("device", 0.0)
        for name in ("inferred", "sent", "fetched"):
            setattr(self, name, getattr(self, name) + receipt.get(name, 0))
        self.peak_bytes = max(self.peak_bytes, receipt["peak_bytes"])
        self.queued += max(0, self.out - self.slots)
        self.ends += 1
        self.out -= 1

    @property
    def seconds(self) -> dict[str, float]:
        """By stage, the seconds from its first block to its last; stages overlap."""
        return {stage: end - begin for stage, (begin, end) in self.spans.items()}

    @property
    def device_share(self) -> float:
        """Share of the time of inference in which a device computed."""
        spans = [span for stage, span in self.spans.items() if "infer" in self.busy.get(stage, ())]
        took = max((end for _, end in spans), default=0.0) - min((begin for begin, _ in spans), default=0.0)
        return self.device / (took * self.devices) if took else 0.0

    @property
    def queue(self) -> float:
        """Blocks that were handed out and waited for a worker, on average over all ends."""
        return self.queued / max(1, self.ends)


def _told_as(stage: str) -> str:
    name = level_of(stage)[0]
    return TOLD_AS.get(name, name)


@dataclass(frozen=True)
class Step:
    """A stage, and the region of each earlier stage that its blocks are made from; with ``device``, it infers."""

    stage: str
    after: dict[str, Region] = field(default_factory=dict)
    device: bool = False


def stages(client: Any, run: Run, show: Show) -> Ledger:
    """Every stage is done over all blocks; what it took, over the blocks that no marker covered."""
    ledger = Ledger(slots=cluster.threads(client), devices=cluster.devices(client))
    _steps(client, run, to_faces(run), show, ledger)
    folder.drop_passes(run)
    _stitch(client, run, show, ledger)
    folder.create_labels(run)
    _steps(client, run, from_labels(run), show, ledger)
    return ledger


def predicted_share(run: Run) -> float:
    """Share of the blocks that have gone through the network, of all passes together."""
    inferring = list(run.passes) or [run.first]
    done = sum(len(cluster.marked(run.out, stage, run.keys[stage])) for stage in inferring)
    return done / sum(len(run.grid_of(stage)) for stage in inferring)


def to_faces(run: Run) -> list[Step]:
    """From the image, or what is taken for it, to tables that name neighbors."""
    halo = height_halo(run.config.fragments, run.voxel_size_nm)
    predicted = len(cluster.marked(run.out, run.first, run.keys[run.first])) == len(run.predict_grid)
    passes = [] if predicted else [Step(stage, device=True) for stage in run.passes]
    voids = Step("voids", {"fragments": partial(Box.grow, halo=0)})
    holes = [voids, Step("rims", {"voids": partial(Box.grow, halo=1)})] if run.fills else []
    return [
        *passes,
        Step(
            run.first, {step.stage: partial(Box.grow, halo=0) for step in passes}, device=not (run.passes or run.taken)
        ),
        Step("fragments", {run.first: partial(Box.grow, halo=halo)}),
        Step("faces", {"fragments": partial(Box.grow, halo=1)}),
        *holes,
    ]


def from_labels(run: Run) -> list[Step]:
    """From the labels of basins to those of voxels, and their coarser levels."""
    steps = [Step("relabel")]
    for level, (_, factor) in list(enumerate(run.levels))[1:]:
        region = partial(pyramid.parent_box, factor=factor, above=run.levels[level - 1][0])
        steps.append(Step(f"pyramid{level}", {steps[-1].stage: region}))
    return steps


def run_stage(client: Any, run: Run, stage: str, show: Show, ledger: Ledger) -> None:
    """One stage is done over all its blocks."""
    _steps(client, run, [Step(stage)], show, ledger)


def _steps(client: Any, run: Run, steps: list[Step], show: Show, ledger: Ledger) -> None:
    """Some stages are done over all their blocks, side by side; raises `Incomplete` that names the blocks given up, and
    `OutOfMemoryError` as soon as a batch of several tiles does not fit a worker's memory."""
    blocks: dict[str, Ready] = {}
    for step in steps:
        done = cluster.marked(run.out, step.stage, run.keys[step.stage])
        earlier = {stage: (blocks[stage], region) for stage, region in step.after.items()}
        blocks[step.stage] = Ready(run.grid_of(step.stage), done, earlier)
    advance = {stage: show.stage(stage, prod(of.grid.shape), of.voxels) for stage, of in blocks.items()}
    later = {stage: [step.stage for step in steps if stage in step.after] for stage in blocks}

    def ready(stages: list[str]) -> Iterator[tuple[str, int] | None]:
        while True:
            found = next(((stage, i) for stage in stages if (i := blocks[stage].take()) is not None), None)
            if found:
                ledger.begin(found[0])
            yield found

    def ended(item: tuple[str, int], receipt: dict) -> None:
        stage, i = item
        blocks[stage].end(i)
        for follower in later[stage]:
            blocks[follower].tell(stage, i)
        ledger.end(stage, receipt)
        advance[stage](receipt["voxels"])

    knobs = run.config.cluster
    infers = [step.stage for step in steps if step.device]
    failures = cluster.run(
        client, work, ready([step.stage for step in reversed(steps) if not step.device]), run.out, run.id,
        device=ready(infers) if infers else (), tries=knobs.tries, window=knobs.window, done=ended,
        final=OutOfMemoryError if run.batch > 1 else (),
    )  # fmt: skip
    _refuse(run, [step.stage for step in steps], failures)


def _refuse(run: Run, stages: list[str], failures: list[cluster.Failure]) -> None:
    """Raises what names the first block given up, if any was."""
    if not failures:
        return
    stage, i = min((failure.item for failure in failures), key=lambda item: (stages.index(item[0]), item[1]))
    reason = next(failure.reason for failure in failures if failure.item == (stage, i))
    count, grid = sum(failure.item[0] == stage for failure in failures), run.grid_of(stage)
    more = f" ({count} of {len(grid)} blocks)" if count > 1 else ""
    raise Incomplete(
        f"{stage} failed in block {grid[i]}{more} after {run.config.cluster.tries} tries: {reason}; "
        "what is done is kept: mend the cause and give the same command again"
    )


def _stitch(client: Any, run: Run, show: Show, ledger: Ledger) -> None:
    """Every block has its id map: by one process, or in a tree where that would not hold all edges."""
    lacks = run.config.stitch.reduce == "flat" and not files.exists(f"{run.out}/work/basins.npz")
    if lacks:  # a tree has made the labels, but not what is asked for
        files.remove(f"{run.out}/work/markers/stitch")
    if cluster.marked(run.out, "stitch", run.keys["stitch"]):
        return
    client.run(let_go)  # nothing is inferred from here on: the graph takes the room that the network had
    if _fits_one_process(run):
        run_stage(client, run, "stitch", show, ledger)
        return
    files.remove(f"{run.out}/work/basins.npz")
    levels = range(hierarchy.top_level(run.grid) + 1)
    for level in levels:
        run_stage(client, run, f"tree{level}", show, ledger)
    run_stage(client, run, "number", show, ledger)
    receipts = cluster.receipts(run.out, "number", run.keys["number"])
    counts = [receipt["objects"] for receipt in sorted(receipts, key=lambda receipt: receipt["layer"])]
    store.save(run.out, "work/tree/before.npz", before=np.cumsum([0, *counts]))
    for level in reversed(levels):
        run_stage(client, run, f"names{level}", show, ledger)
    run_stage(client, run, "borders", show, ledger)
    show.say(
        "stitched as a tree: tables/merges lists borders only; joins need all edges in one process, stitch.reduce=flat"
    )
    cluster.mark(run.out, "stitch", run.keys["stitch"], 0, {"seconds": {}, "objects": sum(counts)})
    files.remove(f"{run.out}/work/tree")


def _fits_one_process(run: Run) -> bool:
    """Whether `stitched` is to be used: as told, else by the number of edges."""
    if run.config.stitch.reduce != "auto":
        return run.config.stitch.reduce == "flat"
    receipts = cluster.receipts(run.out, "faces", run.keys["faces"])
    edges = sum(receipt.get("edges", 0) for receipt in receipts)
    most = _most_edges(run)
    if edges > most and (needs := run.config.stitch.needs_all()):
        raise UserError(
            f"stitch.{needs[0]} needs all {edges} edges in one process, about {edges * EDGE_BYTES / 1e9:.0f} GB: set it to "
            "0, or stitch.reduce to 'flat' where a worker has as much"
        )
    return edges <= most


def _most_edges(run: Run) -> int:
    """How many edges one process may hold: `FLAT_EDGES`, or as many as fit the memory it may take."""
    knobs = run.config.cluster
    room = round(knobs.memory_limit * 1e9) or (FLAT_EDGES * EDGE_BYTES if knobs.scheduler else machine.free_memory())
    return min(FLAT_EDGES, room // EDGE_BYTES)
