"""Read this first: the path of a voxel, one stage after the other.

    predict      tiles of one block -> blended uint8 probabilities; of several planes, the mean of what each pass stored
    import       instead of predict: one block of probabilities that another network made -> uint8
    fragments    probabilities -> the watershed basins of one block, and a table of how they touch
    link         a block's exits and crossing edges come to name its neighbors' basins
    tally        where probabilities are dropped: what the object table needs of them; then they go (`drop`)
    find_holes   where holes are filled: pieces of background of one block; `link_holes`: what they touch over its faces
    stitch       all tables -> the label of every basin; beyond one memory by `contract`, `rank` and `assign`
    relabel      basins -> labels of one block, and sums for the object table
    coarsen      probabilities -> the next coarser level of one block, for viewers
    pyramid      labels -> the next coarser level of one block

Their functions stand in `predict` and `instances`; `stages` says which blocks each has, what it waits for, and its key: the
hash of all that determines its results. Each reads what earlier ones stored in the run's folder (`layout`), writes whole
shards and returns a receipt, which becomes its marker once all is on the disk (`receipts`); a restart does only what no
marker of that key covers. All of this runs on workers, which are told no more than where the run lies. `schedule` says
which block goes when, `finish` makes a whole run of the parts.
"""

from __future__ import annotations

import platform
import time
from functools import lru_cache

import volseg
from volseg.engine import cluster
from volseg.engine.lock import writing
from volseg.engine.predict import holds_network, in_pieces, release_network
from volseg.engine.receipt import Receipt, Timings
from volseg.engine.run import Run, stored_run
from volseg.engine.stages import Stage, stages_of
from volseg.engine.stored import recording
from volseg.errors import OutOfMemoryError, UserError
from volseg.io import files
from volseg.io.filling import recording_filled


def process_block(path: str, run_id: str, stage_name: str, i: int) -> Receipt:
    """One block of one stage on a worker, start to finish."""
    run, stages = _load(path, run_id)
    stage, timings, start = stages[stage_name], Timings(), time.perf_counter()
    facts, out_of_memory = None, ""
    try:
        with writing(run.layout.begun_path), recording() as written, recording_filled() as filled:
            facts = stage.function(run, i, timings)
    except OutOfMemoryError as error:
        out_of_memory = str(error)
    if out_of_memory:  # beginning again with a smaller batch needs the room of all that the error refers to
        release_network()
        raise OutOfMemoryError(out_of_memory)
    seconds = {**timings.seconds, "other": time.perf_counter() - start - sum(timings.seconds.values())}
    if (
        run.config.cluster.durable and not run.config.cluster.is_local
    ):  # else the process that holds the markers does it
        files.sync_files(path, written)
    told = {**(facts or {}), "filled": tuple((where, str(box)) for where, box in sorted(filled))}
    receipt = Receipt(voxels=stage.grid[i].voxels, seconds=seconds, files=written, **told)
    cluster.count(stage_name, receipt)
    return receipt


def process_block_in_pieces(path: str, run_id: str, stage_name: str, i: int) -> Receipt:
    """The same in less memory and more time, to the same bytes: for a block that was too much for a worker."""
    release_network()
    try:
        with in_pieces():
            return process_block(path, run_id, stage_name, i)
    finally:
        release_network()


@lru_cache(maxsize=2)
def _load(path: str, run_id: str) -> tuple[Run, dict[str, Stage]]:
    """The run at ``path`` and its stages. The network of an earlier run makes room for its own."""
    if holds_network():
        release_network()
    run = stored_run(path, run_id)
    stages = stages_of(run)
    described = run.layout.load_description()["keys"]
    if any(described.get(name, stage.key) != stage.key for name, stage in stages.items()):
        raise UserError(
            f"the worker on {platform.node()} has another volseg than the command that began the run ({volseg.__file__}, "
            f"{volseg.__version__}): what it made would not fit; install the same one there"
        )
    return run, stages
