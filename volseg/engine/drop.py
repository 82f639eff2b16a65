"""Probabilities that a run does not keep: removed block by block, once what is made from them is on the disk.

A block of them is needed until every block of basins whose heights reach into it, and every tally under it, has its marker.
That follows from the markers alone, so nothing else is written down: a restart knows which blocks it still needs, and has
those predicted again that it lacks. What was dropped is an empty file until the run is finished, so a worker that was
suspended and comes back cannot take it for 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

from volseg.box import Box
from volseg.engine.file_check import FileCheck
from volseg.engine.parts import Part
from volseg.engine.ready import Ready, Region
from volseg.engine.receipts import Markers
from volseg.engine.run import Run
from volseg.engine.stages import stages_of
from volseg.io import tables
from volseg.io.resample import Grid
from volseg.segmentation.heights import height_halo


class Dropper:
    """Which blocks of the probabilities are needed, as far as the markers tell; ``unneeded`` are the others."""

    def __init__(self, run: Run, markers: Markers) -> None:
        self.run, stages = run, stages_of(run)
        part = stages[run.probability_stage].part
        self.grid = part.grid
        self.readers = readers(run)
        earlier = {
            name: (_ready(stages[name].part, markers.done(name)), region) for name, region in self.readers.items()
        }
        self.ready = _ready(part, earlier=earlier)
        self.unneeded = set(iter(self.ready.take, None))

    def tell(self, items: Iterable[tuple[str, int]]) -> None:
        """The markers of these blocks, stage and number, have been written: what nothing needs any more is dropped."""
        for stage, i in items:
            if stage in self.readers:
                self.ready.tell(stage, i)
        free = list(iter(self.ready.take, None))
        with ThreadPoolExecutor(tables.IO_THREADS) as pool:
            list(pool.map(lambda i: self.run.layout.probabilities.drop(self.grid[i]), free))


def _ready(part: Part, done: Iterable[int] = (), earlier: dict[str, tuple[Ready, Region]] | None = None) -> Ready:
    return Ready(part.grid, done, earlier, only=part.box, voxels_of=part.each)


def readers(run: Run) -> dict[str, Region]:
    """The stages that read probabilities; of each, the voxels whose blocks may read those of a box."""
    halo = height_halo(run.config.fragments, run.voxel_size_nm)
    return {"fragments": partial(Box.grow, halo=halo), "tally": partial(_on_output_grid, run)}


def _on_output_grid(run: Run, box: Box) -> Box:
    """The voxels of the labels that share space with a box of the run's own grid, or lie behind its last voxels."""
    own = run.shape, run.voxel_size_nm
    covered = Grid.between(*own, run.output_shape, run.output_voxel_size_nm).covered(box)
    ends = zip(box.stop, run.shape, covered.stop, run.output_shape, strict=True)
    z, y, x = (last if b == n else stop for b, n, stop, last in ends)
    return Box(covered.start, (z, y, x))


@contextmanager
def dropping(run: Run, markers: Markers) -> Iterator[None]:
    """Inside, blocks of probabilities go once nothing needs them, where the run drops them.

    Before that, those that are needed once more, as what was made from them was damaged, count as not done.
    """
    if not run.drops:
        yield
        return
    dropper = Dropper(run, markers)
    stage = run.probability_stage
    needed = markers.done(stage) - dropper.unneeded
    marks = {i: receipt.files for i, receipt in markers.stored(stage, needed)}
    written = {key: mark for files in marks.values() for key, mark in files.items()}
    with FileCheck(run.out, dates=markers.durable) as check:
        lacking = set(check.damaged(written))
    markers.remove(stage, [i for i, files in marks.items() if not lacking.isdisjoint(files)])
    markers.on_stored = dropper.tell
    yield
    markers.flush()
    markers.on_stored = lambda items: None
