"""A run from its description to its final name: workers, all stages, then table, pictures and ``run.json``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np

from volseg.box import Box
from volseg.engine import cluster, corrections, folder, schedule
from volseg.engine.block_tables import Joins
from volseg.engine.finished import FinishedRun
from volseg.engine.guard import MemoryLimits
from volseg.engine.integrity import write_manifest
from volseg.engine.keys import decision_key
from volseg.engine.layout import Layout
from volseg.engine.lock import Lock, wait_for_writers
from volseg.engine.partition import mend_partition
from volseg.engine.receipt import peak_bytes
from volseg.engine.receipts import Markers, RunStatistics
from volseg.engine.run import Run, redundancy
from volseg.engine.run_log import RunProgress
from volseg.engine.stages import keys
from volseg.errors import IncompleteRunError, OutOfMemoryError, UserError
from volseg.inference import hardware
from volseg.io import files, volume
from volseg.io.corrections import format_file
from volseg.io.filling import LOST
from volseg.io.resample import Grid
from volseg.progress import Progress
from volseg.segmentation import objects, saddles
from volseg.segmentation.heights import height_to_probability, seed_height

RESTART_SHARE = 0.1  # of predict's blocks that may be lost where a batch turns out to be too large
BATCH_LIMITED = "; memory holds no more tiles at once"  # of why a run computes as it does


def execute(
    run: Run, lock: Lock, prepare: Callable[[], None], progress: Progress, *, start: float, light: bool = False,
    plan: dict | None = None, retry_failed: bool = True,
) -> FinishedRun:  # fmt: skip
    """Once there are workers: the run's folder, everything in it that is not done yet, and its final name.

    ``lock`` is held for that name. The command was given at ``start``; ``light`` work needs no processes; ``plan`` is
    stored beside what the run took. Blocks that failed before are tried again unless ``retry_failed`` is off.
    """
    told = RunProgress(progress, start)
    try:
        finished = _execute(run, lock, prepare, told, start, light, plan, retry_failed)
        told.end(finished)
        return finished
    except BaseException as error:
        told.fail(error)
        raise


def _execute(
    run: Run, lock: Lock, prepare: Callable[[], None], progress: RunProgress, start: float, light: bool, plan: dict | None,
    retry_failed: bool,
) -> FinishedRun:  # fmt: skip
    gpus = 0 if light else gpus_of(run)
    workers = cluster.connect(run.config.cluster, gpus, light=light, tell=progress.message)
    with workers as client:
        wait_for_writers(run.layout.begun_path)
        prepare()
        progress.begin(run, plan)
        folder.create_missing_arrays(run)
        if warning := cluster.exposure(client.scheduler.address):
            progress.message(warning)
        if (link := cluster.dashboard(client)) and not light:
            progress.message(f"dashboard {link}")
        threading.Thread(target=_import_ahead, daemon=True).start()
        if not light:
            allowed = round(run.config.cluster.memory_limit * 1e9)
            cluster.watch_memory(client, MemoryLimits(planned=(plan or {}).get("worker_bytes", 0), allowed=allowed))
        markers = _checked_markers(run, lock, progress)
        _consider_failures(markers, retry_failed, progress)
        before = schedule.predicted_share(run, markers) if plan else 0.0
        if before:
            progress.message(
                f"going on from an earlier command: {100 * before:.0f} % of {run.probability_stage} is done"
            )
        done, statistics, stages_start = _run_stages(client, run, markers, lock, progress, plan)
        return finish(done, lock.out, statistics, start, stages_start, plan, before if done is run else 0.0)


def _markers(run: Run, lock: Lock) -> Markers:
    return Markers(run.out, keys(run), durable=run.config.cluster.durable, check=lock.check)


def _checked_markers(run: Run, lock: Lock, progress: Progress) -> Markers:
    """The markers of what is done and still as it was written: a restart does not build on damaged files."""
    markers = _markers(run, lock)
    apart = run.probability_stage if run.drops else ""  # of these, `drop` looks at what is needed
    done = markers.count(apart=apart)
    if not done:
        return markers
    damaged = markers.damaged(apart=apart, advance=progress.stage("check", done, 0))
    if damaged:
        makers = markers.makers(damaged)
        for stage, blocks in makers.items():
            markers.remove(stage, blocks)
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        progress.message(
            f"{run.out}/{damaged[0]}{more} not as it was written: doing {sum(map(len, makers.values()))} block(s) again"
        )
    return markers


def _consider_failures(markers: Markers, retry: bool, progress: Progress) -> None:
    """Blocks that failed before are told, and given up again unless they are to be tried."""
    failed = markers.failed_before()
    if failed:
        what = "trying them again (--skip-failed leaves them)" if retry else "leaving them, doing the rest"
        progress.message(f"{len(failed)} block(s) failed before ({markers.layout.failures_path}): {what}")
    if not retry:
        markers.given_up = failed


def gpus_of(run: Run) -> int:
    """How many GPUs of this machine a run computes on."""
    return hardware.gpu_count() if run.engine and run.engine.device == "cuda" else 0


def _run_stages(
    client: Any, run: Run, markers: Markers, lock: Lock, progress: Progress, plan: dict | None
) -> tuple[Run, RunStatistics, float]:
    """Every stage is done, in batches that the workers' memory holds; the run as it was done, and when it began.

    A run whose batch is too large begins again with half of it, as long as little is done: too large a batch shows in the
    first blocks, and later ones most likely lack what something else has taken for a while.
    """
    while True:
        start = time.perf_counter()
        try:
            return run, schedule.run_stages(client, run, markers, progress, plan), start
        except OutOfMemoryError as error:
            smaller = with_half_batch(run)
            if schedule.predicted_share(run, markers) > RESTART_SHARE:
                raise IncompleteRunError(
                    f"{error}; what is done is kept: make room and give the same command again, or begin again with --set "
                    f"predict.batch={smaller.batch} --overwrite"
                ) from None
            progress.message(f"{error}: beginning again, {smaller.batch} at once")
            folder.restart(smaller)
            run, markers = smaller, _markers(smaller, lock)


def with_half_batch(run: Run) -> Run:
    """The run with half as many tiles in a forward pass: other bits, so nothing that was predicted can be kept."""
    why = run.engine.why.removesuffix(BATCH_LIMITED) + BATCH_LIMITED
    return replace(run, engine=replace(run.engine, batch=run.batch // 2, why=why))  # type: ignore[type-var]


def _import_ahead() -> None:
    """What `finish` needs is imported, while the workers are busy."""
    for name in ("volseg.io.pictures", "pyarrow.csv", "pyarrow.parquet"):
        import_module(name)


# ---------------------------------------------------------------- the end


def finish(
    run: Run, out: str, statistics: RunStatistics, start: float, stages_start: float, plan: dict | None = None,
    before: float = 0.0,
) -> FinishedRun:  # fmt: skip
    """Table, pictures and description are written, and the run takes its final name.

    ``before`` is the share of its probabilities that an earlier command had made.
    """
    begin = time.perf_counter()
    layout = run.layout
    layout.remove_failures()
    layout.remove_derived()
    joins = _joins(run)
    sums = objects.merge(list(layout.object_sums.load_each(run.parts.labels(0).numbers)))
    columns = objects.objects_table(sums, run.output_shape, run.output_voxel_size_nm, joins.confidence)
    _write_table(layout, "objects", columns)
    merges = saddles.saddles_table(joins.rows, run.config.fragments, run.shape, run.voxel_size_nm)
    _write_table(layout, "merges", _on_output_grid(run, merges))
    folder.describe_image(run)
    if run.drops:
        layout.probabilities.remove()
    _write_pictures(run, columns)
    folder.describe_labels(run, columns)
    mend_partition(run)
    layout.remove_partitions(run.partition)
    layout.save_corrections(format_file(corrections.correction_file(run)) if run.corrections else "")
    now = time.perf_counter()
    seconds = {"start": stages_start - start, **statistics.seconds, "finish": now - begin, "total": now - start}
    files.remove_temporary(run.out)
    facts = _facts(run, statistics, seconds, start, int(columns["id"].size), plan, before)
    markers = Markers(run.out, keys(run))
    facts["manifest_mark"] = write_manifest(layout, markers.marks())
    facts["filled_boxes"] = _filled_boxes(markers)  # after `marks`, which has read every receipt
    facts["lost_sections"] = [Box.parse(text).start[0] for text in facts["filled_boxes"].pop(LOST, ())]
    layout.save_summary({**run.to_json(), "out": out, "keys": keys(run), **facts})
    durable = run.config.cluster.durable
    if durable:
        files.sync_filesystem(run.out)
    if run.out != out:
        _take_final_name(run.out, out)
        if durable:
            files.sync_files(str(Path(out).parent), [Path(out).name])
    if not run.config.output.keep_work:
        Layout(out).remove_work()
    return FinishedRun(out)


def _filled_boxes(markers: Markers) -> dict[str, list[str]]:
    """What of each source could not be decoded and was taken for 0: whole chunks, strips or slices."""
    receipts = (receipt for stage in markers.keys for receipt in markers.receipts(stage).values())
    boxes: dict[str, set[Box]] = {}
    for where, text in {(where, text) for receipt in receipts for where, text in receipt.filled}:
        boxes.setdefault(where, set()).add(Box.parse(text))
    return {where: [str(box) for box in sorted(boxes[where])] for where in sorted(boxes)}


def _take_final_name(partial: str, out: str) -> None:
    """The run lies at its final name; what it replaces is gone only after that."""
    replaced = f"{out}.replaced"
    if not files.exists(out):
        files.move(partial, out)
        files.remove(replaced)
        return
    if not (Layout(out).finished or Layout(out).begun):
        raise UserError(
            f"output {out} appeared meanwhile and is not a volseg run, so it is left alone; the result is {partial}"
        )
    files.remove(replaced)
    files.move(out, replaced)
    files.move(partial, out)
    files.remove(replaced)


def _facts(
    run: Run, statistics: RunStatistics, seconds: dict[str, float], start: float, objects: int, plan: dict | None,
    before: float,
) -> dict:  # fmt: skip
    """What ``run.json`` says beside the description."""
    facts: dict[str, Any] = {
        "objects": objects,
        "why_no_object": "" if objects else _why_no_object(run),
        "share_before": before,
        "seconds": seconds,
        "spans": {stage: [begin - start, end - start] for stage, (begin, end) in statistics.stage_spans.items()},
        "worker_seconds": statistics.worker_seconds,
        "device_share": statistics.device_share,
        "data_wait_share": statistics.data_wait_share,
        "queue": statistics.queue,
        "workers": statistics.devices,
        "bus_bytes": {"sent": statistics.bytes_sent, "fetched": statistics.bytes_fetched},
        "peak_bytes": {"worker": statistics.peak_bytes, "client": peak_bytes()},
        "versions": {name: metadata.version(name) for name in ("volseg", "zarr", "zarrs", "dask", "numba", "numpy")},
    }
    if plan:
        facts["plan"] = plan
        facts["actual"] = {
            "inferred_voxels": statistics.inferred_voxels,
            "redundancy": redundancy(run, statistics.inferred_voxels),
            "written_bytes": files.stored_bytes(run.out),
            "worker_bytes": statistics.peak_bytes,
            "client_bytes": peak_bytes(),
            "total_seconds": seconds["total"],
        }
    return facts


def _write_pictures(run: Run, columns: dict[str, np.ndarray]) -> None:
    from volseg.io import pictures

    labels = volume.open(run.out, dataset="labels/instances/0")
    with ThreadPoolExecutor(1) as beside:
        histogram = beside.submit(pictures.volume_histogram, columns)
        try:
            shown = pictures.pictured_volume(run.output_source, run.out)
        except UserError:
            if not run.drops:
                raise
            shown = labels  # neither the source nor probabilities are there
        run.layout.write_picture("overlay", pictures.overlay(shown, labels, columns))
        run.layout.write_picture("tables/volumes", histogram.result())


def _on_output_grid(run: Run, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The table with its places z y x as voxels of the labels."""
    if not run.restored:
        return columns
    back = Grid.between(run.shape, run.voxel_size_nm, run.output_shape, run.output_voxel_size_nm)
    moved = {name: back.nearest(axis, 0, run.shape[axis])[columns[name]] for axis, name in enumerate("zyx")}
    return {**columns, **moved}


def _write_table(layout: Layout, name: str, columns: dict[str, np.ndarray]) -> None:
    """``tables/<name>`` of the run holds the columns as Parquet and as CSV."""
    import pyarrow
    from pyarrow import csv, parquet

    file, rows, table = pyarrow.BufferOutputStream(), pyarrow.BufferOutputStream(), pyarrow.table(columns)
    parquet.write_table(table, file)
    layout.write_table(name, "parquet", file.getvalue().to_pybytes())
    rows.write(f"{','.join(columns)}\n".encode())
    csv.write_csv(table, rows, csv.WriteOptions(include_header=False, quoting_style="none"))
    layout.write_table(name, "csv", rows.getvalue().to_pybytes())


def _joins(run: Run) -> Joins:
    """What the decision told of itself; where a tree decided, what all blocks tell of the objects' borders."""
    key = decision_key(run)
    if run.layout.joins.exists(key):
        return run.layout.joins.load(key)
    graph = saddles.object_graph(run.layout.borders.load_each(range(len(run.grid))))
    label = np.arange(1, 1 + graph.minimum.size)
    confidence = saddles.confidence(graph, label, run.config.fragments, run.voxel_size_nm)
    rules, wanted = run.rules, corrections.label_constraints(run)
    wanted = wanted and wanted.renamed(lambda labels: labels - 1)
    return Joins(saddles.rank_saddles(graph, rules, label, wanted), confidence)


def _why_no_object(run: Run) -> str:
    """Why a run has no object."""
    settings, stitch = run.config.fragments, run.config.stitch
    if run.partition:
        return "the partition that was given puts no basin into an object"
    basins = run.layout.load_basins()
    if basins is None:
        return "no voxel reaches fragments.threshold, none of those that do reaches stitch.seed, or all objects are too small"
    minimum = basins.minimum
    if not minimum.size:
        return f"no voxel, smoothed, reaches fragments.threshold = {settings.threshold:g}"
    most = float(height_to_probability(minimum.min(), settings, run.voxel_size_nm))
    what = {"probability": "mask less contour"}.get(settings.height, settings.height)
    if minimum.min() > seed_height(stitch.seed, settings, run.voxel_size_nm) and not stitch.keep_unseeded:
        return (
            f"none of {minimum.size} basins holds a seed: {what}, smoothed, is at most {most:.2f}, "
            f"stitch.seed = {stitch.seed:g}"
        )
    return f"all are of another size than stitch.min_voxels = {stitch.min_voxels} and the like want them"
