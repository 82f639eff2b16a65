"""What runs where a command was given: a run from its description to its final name."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import import_module, metadata
from math import prod
from typing import Any

import numpy as np

from volseg import system as machine
from volseg.box import Blocks, Box, Triple
from volseg.config import Config
from volseg.engine import cluster, folder
from volseg.engine import schedule as flow
from volseg.engine.run import Run, blocks, fit, redundancy
from volseg.engine.schedule import Show
from volseg.errors import OutOfMemoryError, UserError
from volseg.inference import hardware
from volseg.io import arrays, files, ome, probabilities, volume
from volseg.io import tables as store
from volseg.planning import plan
from volseg.planning import prepare as describe
from volseg.segmentation import objects, saddles
from volseg.segmentation.heights import height_to_probability, seed_height
from volseg.segmentation.rules import Rules

LITTLE = 0.1  # share of predict's blocks that may be lost where a batch turns out to be too large
LIGHT = 1 << 29  # voxels up to which `segment` needs no worker processes


@dataclass(frozen=True)
class Summary:
    """What a finished run has to say of the command that finished it; bytes are the most one process held.

    ``seconds`` are wall-clock: of a stage from its first block handed out to its last one's end. Stages run side by side,
    so they add up to more than the total. ``busy``: by stage, the seconds of each phase, of all workers together.
    """

    out: str
    objects: int
    voxels: int
    seconds: dict[str, float]
    busy: dict[str, dict[str, float]]
    device_share: float
    queue: float
    worker_peak_bytes: int
    client_peak_bytes: int
    labels: str
    table: str
    picture: str
    compared: str = ""  # plan against actual, in words
    lacks: str = ""  # why there is no object, where there is none


def planned(path: str, out: str, config: Config) -> tuple[plan.Plan, UserError | None]:
    """What `infer` would take, measured on a few tiles, and why it would be refused; nothing is made at ``out``."""
    folder.refuse_run(path)
    source = volume.open(path, dataset=config.input.dataset, voxel_size_nm=config.input.voxel_size_nm)
    run = describe.from_image(source, config, folder.partial(folder.absolute(out)))
    crew = describe.crew_of(run)
    made = plan.make(run, crew, plan.probe(run, crew))
    try:
        _refuse(run, made, crew)
    except UserError as error:
        return made, error
    return made, None


def _plan(run: Run) -> plan.Plan:
    """The plan of a run as far as it is known without measuring; refuses one that does not fit."""
    crew = describe.crew_of(run)
    made = plan.make(run, crew, plan.known(run, crew))
    _refuse(run, made, crew)
    return made


def _refuse(run: Run, made: plan.Plan, crew: cluster.Crew) -> None:
    plan.refuse_limit(made, run, round(run.config.cluster.memory_limit * 1e9) or crew.limit)
    plan.refuse(made, run, machine.free_memory(), plan.room_on_disk(run))


def infer(path: str, out: str, config: Config, *, overwrite: bool, show: Show) -> Summary:
    """Labels, object table, pyramid and picture of the volume at ``path`` are in the OME-Zarr group ``out``.

    A run that was stopped goes on where it was, if nothing that determines its output has changed. The group has its
    final name only once it is whole (on object stores, which cannot rename, once ``run.json`` is there). Raises
    `UserError` for a bad volume or model, an existing output, or a changed configuration; `Incomplete` when blocks failed.
    """
    start = time.perf_counter()
    folder.refuse_run(path)
    source = volume.open(path, dataset=config.input.dataset, voxel_size_nm=config.input.voxel_size_nm)
    out = folder.absolute(out)
    folder.make_room([source], out, overwrite)
    run = describe.from_image(source, config, folder.partial(out))
    show.say(describe.headline(run))
    if idle := hardware.unused_gpu_reason():
        show.say(idle)
    return _go(run, out, start, show, lambda: folder.begin(run, overwrite), made=_plan(run))


def segment_probabilities(path: str, out: str, config: Config, *, overwrite: bool, show: Show) -> Summary:
    """The OME-Zarr group ``out`` is what `infer` makes, from probabilities that another network stored at ``path``.

    ``config.probabilities`` says which of its channels is the mask, and what else there is. In all else, a run like any
    other. Raises as `infer` does, and for values that are no probabilities: in patches before anything is made, in each
    block as it is read.
    """
    start = time.perf_counter()
    of = config.input
    taken = probabilities.named_channels(path, config.probabilities, dataset=of.dataset, voxel_size_nm=of.voxel_size_nm)
    out = folder.absolute(out)
    folder.make_room([channel.source for channel in taken if channel.source], out, overwrite)
    for note in probabilities.notes(taken):
        show.say(note)
    run = describe.from_probabilities(taken, config, folder.partial(out))
    show.say(describe.headline(run))
    return _go(run, out, start, show, lambda: folder.begin(run, overwrite), made=_plan(run))


def segment(path: str, change: Callable[[Config], Config], *, recompute: bool = False, show: Show) -> Summary:
    """The labels of the finished run at ``path`` are those of its changed settings, from its stored probabilities.

    Only what depends on the change is done again: with another ``stitch``, no basin. While that lasts the run lies at its
    unfinished name, and a stopped `segment` goes on when it is given again. ``recompute`` allows to make basins anew where
    the work folder was cleaned. Raises `UserError` for what is no run, or a change of what `predict` depends on.
    """
    start = time.perf_counter()
    out = folder.absolute(path)
    old = folder.stored(out, recompute)
    config = change(old.config)
    block = old.block if config.blocks == old.config.blocks else blocks(old.shape, config.blocks.shape)[1]
    run = replace(old, out=folder.partial(out), config=config, block=block)
    fixed = ("input", "predict", "probabilities")
    if run.keys[run.first] != old.keys[run.first] or any(getattr(config, s) != getattr(old.config, s) for s in fixed):
        raise UserError(f"volseg segment cannot change {', '.join(fixed)} or output.chunk of a run; make it anew for that, "
                        "with --overwrite")  # fmt: skip

    def prepare() -> None:
        folder.demote(out)
        folder.adopt(run)

    return _go(run, out, start, show, prepare, light=prod(run.shape) <= LIGHT)


def _go(
    run: Run,
    out: str,
    start: float,
    show: Show,
    prepare: Callable[[], None],
    *,
    light: bool = False,
    made: plan.Plan | None = None,
) -> Summary:
    """Once there are workers: the run's folder, everything in it that is not done yet, and its final name."""
    describe.check_channels(run.config, run.heads, run.taken)
    gpus = 0 if light else describe.gpus(run)
    with cluster.connect(run.config.cluster, gpus, light=light) as client:
        prepare()
        if (link := cluster.dashboard(client)) and not light:
            show.say(f"dashboard {link}")
        threading.Thread(target=_load_ahead, daemon=True).start()
        run, ledger, started = _stages(client, run, show)
    return finish(run, out, ledger, start, started, made)


def _stages(client: Any, run: Run, show: Show) -> tuple[Run, flow.Ledger, float]:
    """Every stage is done, in batches that the workers' memory holds; the run as it was done, and when it began.

    A run whose batch is too large begins again with half of it, as long as little is done: too large a batch shows in the
    first blocks, and later ones most likely lack what something else has taken for a while.
    """
    while True:
        started = time.perf_counter()
        try:
            return run, flow.stages(client, run, show), started
        except OutOfMemoryError as error:
            smaller = describe.with_half_batch(run)
            if flow.predicted_share(run) > LITTLE:
                raise flow.Incomplete(
                    f"{error}; what is done is kept: make room and give the same command again, or begin again with --set "
                    f"predict.batch={smaller.batch} --overwrite"
                ) from None
            show.say(f"{error}: beginning again, {smaller.batch} at once")
            folder.begin_again(smaller)
            run = smaller


def _load_ahead() -> None:
    """What `finish` needs is imported, while the workers are busy."""
    for name in ("volseg.io.pictures", "pyarrow.csv", "pyarrow.parquet"):
        import_module(name)


def finish(
    run: Run, out: str, ledger: flow.Ledger, start: float, started: float, made: plan.Plan | None = None
) -> Summary:
    """Table, picture and description are written, and the run takes its final name.

    The command was given at ``start``, its first stage began at ``started``.
    """
    from volseg.io import pictures

    ending = time.perf_counter()
    sums = store.load_each(run.out, [f"work/objects/{i}.npz" for i in range(len(run.grid))])
    parts = [objects.ObjectSums(**part) for part in sums]
    for stale in ("review", "tables/merges.parquet", "tables/merges.csv"):
        files.remove(f"{run.out}/{stale}")
    told = _told(run)
    columns = objects.objects_table(objects.merge(parts), run.shape, run.voxel_size_nm, told["confidence"])
    _write_table(run.out, "objects", columns)
    _write_table(
        run.out, "merges", saddles.saddles_table(told["rows"], run.config.fragments, run.shape, run.voxel_size_nm)
    )
    labels = volume.open(run.out, dataset="labels/instances/0")
    with ThreadPoolExecutor(1) as beside:
        histogram = beside.submit(pictures.volume_histogram, columns)
        files.write_bytes(
            run.out, "overlay.png", pictures.overlay(pictures.pictured_volume(run.source, run.out), labels, columns)
        )
        files.write_bytes(run.out, "tables/volumes.png", histogram.result())
    arrays.set_group_attributes(run.out, "", ome.multiscales("probability", "czyx", [("0", run.voxel_size_nm)]))
    now = time.perf_counter()
    seconds = {"start": started - start, **ledger.seconds, "finish": now - ending, "total": now - start}
    facts = {
        **run.to_json(),
        "out": out,
        "objects": int(columns["id"].size),
        "seconds": seconds,
        "worker_seconds": ledger.busy,
        "device_share": ledger.device_share,
        "queue": ledger.queue,
        "workers": ledger.devices,
        "bus_bytes": {"sent": ledger.sent, "fetched": ledger.fetched},
        "peak_bytes": {"worker": ledger.peak_bytes, "client": cluster.peak_bytes()},
        "versions": {name: metadata.version(name) for name in ("volseg", "zarr", "zarrs", "dask", "numba", "numpy")},
    }
    compared, lacks = "", "" if facts["objects"] else _lacks(run)
    if made:
        facts |= {"plan": {**asdict(made), "total_seconds": made.total_seconds}, "actual": _actual(run, ledger, facts)}
        compared = plan.compared(
            made, seconds["total"], facts["peak_bytes"]["worker"], facts["actual"]["written_bytes"]
        )
    files.write_bytes(run.out, "run.json", json.dumps(facts, indent=1).encode())
    if run.out != out:
        files.remove(out)
        files.move(run.out, out)
    if not run.config.output.keep_work:
        files.remove(f"{out}/work")
    return Summary(
        out=out,
        objects=facts["objects"],
        voxels=prod(run.shape),
        seconds=seconds,
        busy=ledger.busy,
        device_share=ledger.device_share,
        queue=ledger.queue,
        worker_peak_bytes=facts["peak_bytes"]["worker"],
        client_peak_bytes=facts["peak_bytes"]["client"],
        labels=f"{out}/labels/instances",
        table=f"{out}/tables/objects.parquet",
        picture=f"{out}/overlay.png",
        compared=compared,
        lacks=lacks,
    )


def _lacks(run: Run) -> str:
    """Why a run in which one process stitched has no object."""
    knobs, rule = run.config.fragments, run.config.stitch
    if not files.exists(f"{run.out}/work/basins.npz"):
        return "no voxel reaches fragments.threshold, none of those that do reaches stitch.seed, or all objects are too small"
    depth = store.load(run.out, "work/basins.npz")["minimum"]
    if not depth.size:
        return f"no voxel, smoothed, reaches fragments.threshold = {knobs.threshold:g}"
    most = float(height_to_probability(depth.min(), knobs, run.voxel_size_nm))
    what = {"probability": "mask less contour"}.get(knobs.height, knobs.height)
    if depth.min() > seed_height(rule.seed, knobs, run.voxel_size_nm) and not rule.keep_unseeded:
        return f"none of {depth.size} basins holds a seed: {what}, smoothed, is at most {most:.2f}, stitch.seed = {rule.seed:g}"
    return f"all are of another size than stitch.min_voxels = {rule.min_voxels} and the like want them"


def _actual(run: Run, ledger: flow.Ledger, facts: dict) -> dict:
    """What the command took of all that its plan tells, under the same names."""
    return {
        "inferred_voxels": ledger.inferred,
        "redundancy": redundancy(run, ledger.inferred),
        "written_bytes": files.stored_bytes(run.out),
        "worker_bytes": facts["peak_bytes"]["worker"],
        "client_bytes": facts["peak_bytes"]["client"],
        "total_seconds": facts["seconds"]["total"],
    }


def _told(run: Run) -> dict[str, np.ndarray]:
    """What `stitched` told of its decisions; where a tree stitched, what all blocks tell of the objects' borders."""
    key = f"work/merges/{run.keys['stitch']}.npz"
    if files.exists(f"{run.out}/{key}"):
        return store.load(run.out, key)
    parts = store.load_each(run.out, [f"work/borders/{i}.npz" for i in range(len(run.grid))])
    graph = saddles.object_graph(saddles.BlockBorders(**part) for part in parts)
    label = np.arange(1, 1 + graph.minimum.size)
    sure = saddles.confidence(graph, label, run.config.fragments, run.voxel_size_nm)
    return {
        "rows": saddles.rank_saddles(graph, Rules.from_config(run.config, run.voxel_size_nm), label),
        "confidence": sure,
    }


def _write_table(out: str, name: str, columns: dict[str, np.ndarray]) -> None:
    """``tables/<name>`` of the run holds the columns as Parquet and as CSV."""
    import pyarrow
    from pyarrow import csv, parquet

    file, rows, whole = io.BytesIO(), io.BytesIO(), pyarrow.table(columns)
    parquet.write_table(whole, file)
    files.write_bytes(out, f"tables/{name}.parquet", file.getvalue())
    rows.write(f"{','.join(columns)}\n".encode())
    csv.write_csv(whole, rows, csv.WriteOptions(include_header=False, quoting_style="none"))
    files.write_bytes(out, f"tables/{name}.csv", rows.getvalue())


# ---------------------------------------------------------------- synthetic volumes


def synthesize(out: str, shape: Triple, block: Triple, *, seed: int, overwrite: bool, show: Show) -> None:
    """A synthetic EM volume with its exact labels is at ``out`` (OME-Zarr: array ``0``, and ``labels/truth/0``).

    Any block shape gives the same voxels. Voxels are 5 nm along each axis.
    """
    from volseg.evaluation.synthetic import VOXEL_SIZE_NM, synth

    if files.exists(out) and not overwrite:
        raise UserError(f"output {out} exists; give another path, or --overwrite to replace it")
    if files.exists(out) and not files.exists(f"{out}/labels/truth/zarr.json"):
        raise UserError(f"output {out} exists and volseg synth did not make it, so it is left alone; give another path")
    partial = folder.partial(out)
    files.remove(partial)
    grid = Blocks(shape, fit(block, shape))
    dtype = synth(Box((0, 0, 0), (1, 1, 1)), seed=seed)[1].dtype
    for group in ("", "/labels", "/labels/truth"):
        arrays.create_group(f"{partial}{group}")
    for name, kind in (("0", "uint8"), ("labels/truth/0", dtype)):
        arrays.create_array(partial, name, shape=shape, dtype=kind, chunk=(32, 256, 256), shard=grid.block, axes="zyx")
    arrays.set_group_attributes(partial, "", ome.multiscales("synthetic EM", "zyx", [("0", VOXEL_SIZE_NM)]))
    arrays.set_group_attributes(partial, "labels", {"ome": {"version": "0.5", "labels": ["truth"]}})
    truth = ome.multiscales("truth", "zyx", [("0", VOXEL_SIZE_NM)], source="../../")
    arrays.set_group_attributes(partial, "labels/truth", truth)
    advance = show.stage("synth", prod(shape), 0)
    for box in grid:
        image, labels = synth(box, seed=seed)
        arrays.write(arrays.open_array(partial, "0"), box, image)
        arrays.write(arrays.open_array(partial, "labels/truth/0"), box, labels)
        advance(box.voxels)
    if partial != out:
        files.remove(out)
        files.move(partial, out)
