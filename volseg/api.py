"""volseg from Python: each command of the command line as a function, from its start to its end.

Volumes are paths or arrays; settings are those of a config file under the same names; progress is optional everywhere.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

from volseg import system
from volseg.config import Config
from volseg.engine import cluster, finish, folder
from volseg.engine import update as updates
from volseg.engine.finished import FinishedRun, open_run
from volseg.engine.layout import Layout
from volseg.engine.lock import Lock
from volseg.engine.partition import by_hand
from volseg.engine.run import Run
from volseg.errors import UserError
from volseg.evaluation.run_report import report_if_quick, report_of_failure
from volseg.inference import hardware
from volseg.inference.settings import Settings, default_out, settings_of
from volseg.io import probabilities, volume
from volseg.planning import measure, prepare
from volseg.planning import plan as planning
from volseg.progress import Progress, displayed

VolumeLike = Any  # a path, or an array with shape, dtype and slices: NumPy, zarr, dask
LIGHT_VOXELS = 1 << 29  # up to which `segment` needs no worker processes


# ---------------------------------------------------------------- inference


def infer(
    path: VolumeLike,
    out: str | os.PathLike | None = None,
    *,
    model: str | os.PathLike | None = None,
    config: str | os.PathLike | Config | dict | None = None,
    settings: Settings = (),
    overwrite: bool = False,
    update: bool = False,
    retry_failed: bool = True,
    progress: Progress | None = None,
) -> FinishedRun:
    """Segment a volume: instance labels, object table, probabilities and a picture.

    A run that was stopped goes on where it was, if nothing that determines its output has changed. The output has its
    final name only once it is whole (on object stores, which cannot rename, once ``run.json`` is there).

    Parameters
    ----------
    path : path or array
        The volume (z, y, x): see `open_volume`.
    out : path, optional
        The output, an OME-Zarr group; the volume's name + ``.volseg.zarr`` if not given.
    model : path, optional
        A model file; the shipped one if not given.
    config : path, Config or dict, optional
        Settings; see ``volseg settings``.
    settings : iterable of str
        Single settings, such as ``"stitch.seed=0.7"``.
    overwrite : bool
        Whether to replace an existing run.
    update : bool
        Whether to bring an existing run up to date: nothing is done where volume, model and settings are those of the run,
        labels are decided anew where rules changed, everything is done again where the model or the volume did.
    retry_failed : bool
        Whether blocks that failed before (``work/failed.json``) are tried again; else they are left, and the rest is done.
    progress : Progress, optional
        How to tell what is done; bars in a terminal or notebook, silent elsewhere.

    Returns
    -------
    FinishedRun
        With ``labels``, ``objects``, ``seconds``, ``plan``.

    Raises
    ------
    UserError
        For a bad volume or model, an existing output, or a changed configuration.
    IncompleteRunError
        When blocks failed; the rest is kept, and the same call goes on from there.

    Examples
    --------
    >>> run = infer("em.zarr", settings=["stitch.seed=0.7"])  # doctest: +SKIP
    >>> run.labels.shape  # doctest: +SKIP
    """
    start, chosen = time.perf_counter(), settings_of(config, settings, model_path=model)
    out = _output_path(path, out, partial(folder.refuse_existing, overwrite=overwrite or update))
    updates.refuse_finished(out, overwrite or update)
    update = update and not overwrite and Layout(out).finished
    with displayed(progress) as shown:
        if isinstance(path, (str, os.PathLike)):
            folder.refuse_run(str(path))
        with volume.readable_by_workers(path, chosen.input, out) as source:
            folder.check_output([source], out, overwrite or update)
            run = prepare.from_image(source, chosen, folder.partial_path(out), like=out if update else "")
            shown.message(prepare.headline(run))
            for note in filter(None, (*prepare.notes(run), hardware.unused_gpu_reason())):
                shown.message(note)
            change = updates.compare(out, run) if update else None
            if change:
                shown.message(f"{out}: {change}")
            if change and change.what == "nothing":
                return open_run(out)
            anew = overwrite or (update and updates.is_to_begin(run))
            if not change or change.what == "everything":
                begin = partial(_begin, run, [source], out, anew, shown, replace_finished=overwrite or update)
                return _execute(run, out, begin, shown, start, retry_failed)
    made = _decide_anew(out, change.config, (), False, (None, None), retry_failed, progress, change.place)
    with displayed(progress) as shown:
        if change.what == "labels":
            shown.message(updates.rewritten(out))
    return made


def _output_path(
    path: VolumeLike, out: str | os.PathLike | None, refuse: Callable[[str], None] = lambda out: None
) -> str:
    """The absolute path of an output; that of an array, which is copied first, ``refuse`` has looked at."""
    if isinstance(path, (str, os.PathLike)):
        return folder.absolute(str(out or default_out(path)).rstrip("/"))
    if out is None:
        raise UserError('an array has no name to call its run by: give out="em.volseg.zarr"')
    out = folder.absolute(str(out).rstrip("/"))
    refuse(out)
    return out


def _begin(
    run: Run,
    sources: list[volume.Volume],
    out: str,
    overwrite: bool,
    progress: Progress,
    replace_finished: bool = False,
) -> None:
    """The run has begun; its output, now that no other command writes it, was looked at once more."""
    replaces = overwrite or replace_finished
    folder.check_output(sources, out, replaces)
    folder.begin(run, overwrite, progress.message, keeps=out if Layout(out).finished and not replaces else "")


def segment(
    path: VolumeLike | FinishedRun,
    out: str | os.PathLike | None = None,
    *,
    config: str | os.PathLike | Config | dict | None = None,
    settings: Settings = (),
    overwrite: bool = False,
    recompute: bool = False,
    corrections: str | os.PathLike | dict | None = None,
    partition: str | os.PathLike | dict | None = None,
    retry_failed: bool = True,
    progress: Progress | None = None,
) -> FinishedRun:
    """Segment probabilities without a network: a run's own, or those of any other network.

    Of a run, the labels are decided anew in place with other ``[fragments]`` or ``[stitch]`` settings, in seconds. While
    that lasts the run lies at its unfinished name, and a stopped call goes on when it is given again. Of a volume of
    probabilities, a run is made as `infer` makes it.

    Parameters
    ----------
    path : path, array or FinishedRun
        A run; or probabilities (z, y, x), or with channels first or last: float 0..1, uint8, uint16 or bool.
        ``probabilities.mask_channel`` and its neighbors among the settings say which channel is what.
    out : path, optional
        Where a new run goes.
    config, settings, overwrite, retry_failed, progress
        As in `infer`.
    recompute : bool
        Whether to make basins anew where the run's work folder was cleaned.
    corrections : path or dict, optional
        Which points of a run, or which labels, are one object and which are two, as `review` writes it; "none" for no
        corrections. The run keeps those that it has if this is not given.
    partition : path or dict, optional
        Which basins of a run are one object, in place of ``[stitch]``: Parquet, CSV or arrays ``basin`` and ``object`` (0 for
        none), of the basins that ``export(run, out, kind="graph")`` gives; "none" for the rules. Kept as corrections are.

    Returns
    -------
    FinishedRun

    Raises
    ------
    UserError
        For what is neither run nor probabilities, a change of what a run's probabilities depend on, or corrections or a
        partition that do not fit the run.
    IncompleteRunError
        When blocks failed.
    """
    if isinstance(path, FinishedRun) or (isinstance(path, (str, os.PathLike)) and folder.is_run(str(path).rstrip("/"))):
        run_path = path.path if isinstance(path, FinishedRun) else str(path)
        if out or overwrite:
            raise UserError(
                f"{run_path} is a run and is decided anew in place; leave out --out and --overwrite, or give {run_path}/0 to "
                "make another run of its probabilities"
            )
        made = corrections, partition
        return _decide_anew(run_path, config, settings, recompute, made, retry_failed, progress)
    if corrections is not None or partition is not None:
        raise UserError(f"{path} is not a volseg run: corrections and partitions are of what a run has")
    if recompute:
        raise UserError(f"{path} is not a volseg run: --recompute is for a run whose work folder was cleaned")
    return _segment_probabilities(path, out, settings_of(config, settings, base={}), overwrite, retry_failed, progress)


def _segment_probabilities(
    path: VolumeLike, out: str | os.PathLike | None, config: Config, overwrite: bool, retry_failed: bool,
    progress: Progress | None,
) -> FinishedRun:  # fmt: skip
    start, out = time.perf_counter(), _output_path(path, out, partial(folder.refuse_existing, overwrite=overwrite))
    readable_channels = probabilities.readable_by_workers(path, config.probabilities, config.input, out)
    with displayed(progress) as shown, readable_channels as readable:
        channels = probabilities.named_channels(readable, config.probabilities, config.input)
        sources = [channel.source for channel in channels if channel.source]
        folder.check_output(sources, out, overwrite)
        notes = probabilities.notes(channels)
        run = prepare.from_probabilities(channels, config, folder.partial_path(out))
        for line in (*notes, prepare.headline(run), *prepare.notes(run)):
            shown.message(line)
        return _execute(run, out, lambda: _begin(run, sources, out, overwrite, shown), shown, start, retry_failed)


def _decide_anew(
    path: str, config: Any, settings: Settings, recompute: bool, made_by_hand: tuple[Any, Any],
    retry_failed: bool, progress: Progress | None, place: tuple[float, float, float] | None = None,
) -> FinishedRun:  # fmt: skip
    start, out = time.perf_counter(), folder.absolute(path.rstrip("/"))
    with displayed(progress) as shown, Lock(out) as lock:  # from here on no other command changes what is read
        known = folder.described_run(out)
        anew = partial(prepare.decided_anew, out=out, config=config, settings=settings, place=place)
        given = by_hand(*made_by_hand, known, known and anew(known))  # before anything is written
        run = replace(
            anew(folder.load_run(out, recompute=recompute)), corrections=given.corrections, partition=given.partition
        )
        for line in filter(None, (*given.lines, prepare.rules_note(run))):
            shown.message(line)

        def reopen() -> None:
            folder.reopen(out)
            if given.table:
                run.layout.partition.save(given.table, given.partition)
            folder.apply_settings(run)

        light = prod(run.shape) <= LIGHT_VOXELS
        return _finished(run, lock, reopen, shown, start=start, light=light, retry_failed=retry_failed)


def _execute(
    run: Run, out: str, begin: Callable[[], None], progress: Progress, start: float, retry_failed: bool
) -> FinishedRun:
    """A new run is planned, as far as that needs no measuring, and done."""
    prepare.check_channels(run.config, run.heads, run.channels)
    workers = prepare.workers_of(run)
    made = planning.make_plan(run, workers, measure.known_rates(run, workers))
    _refuse(run, made, workers)
    with Lock(out) as lock:
        options = {"start": start, "plan": made.to_json(), "retry_failed": retry_failed}
        return _finished(run, lock, begin, progress, **options)


def _finished(run: Run, lock: Lock, begin: Callable[[], None], progress: Progress, **options: Any) -> FinishedRun:
    """The run, done; its page is written at its end, whatever that is."""
    with report_of_failure(run, progress.message):
        return report_if_quick(finish.execute(run, lock, begin, progress, **options))


# ---------------------------------------------------------------- before and after


def plan(
    path: VolumeLike,
    out: str | os.PathLike | None = None,
    *,
    model: str | os.PathLike | None = None,
    config: str | os.PathLike | Config | dict | None = None,
    settings: Settings = (),
    progress: Progress | None = None,
) -> planning.Plan:
    """Say what `infer` would take, measured on a few tiles; nothing is written.

    Parameters
    ----------
    path, out, model, config, settings, progress
        As in `infer`.

    Returns
    -------
    Plan
        Voxels inferred, bytes, memory and seconds; ``refusal`` says why `infer` would refuse, ``""`` where it would not.
    """
    chosen = settings_of(config, settings, model_path=model)
    if isinstance(path, (str, os.PathLike)):
        folder.refuse_run(str(path))
    out = _output_path(path, out)
    with displayed(progress) as shown, volume.readable_by_workers(path, chosen.input, out) as source:
        run = prepare.from_image(source, chosen, folder.partial_path(out))
        workers = prepare.workers_of(run)
        shown.message(f"{prepare.headline(run)}\nmeasuring some tiles")
        made = planning.make_plan(run, workers, measure.measure_rates(run, workers))
        try:
            _refuse(run, made, workers)
        except UserError as error:
            return replace(made, refusal=str(error))
        return made


def _refuse(run: Run, made: planning.Plan, workers: cluster.WorkerPool) -> None:
    """Refuses a run that does not fit the memory or the disk."""
    planning.refuse_limit(made, run, round(run.config.cluster.memory_limit * 1e9) or workers.limit)
    planning.refuse(made, run, system.free_memory(), planning.disk_room(run))


def repair(
    path: str | os.PathLike | FinishedRun, *, retry_failed: bool = True, progress: Progress | None = None
) -> FinishedRun:
    """Make again what of a finished run is missing or not as it was written, and just that; see `verify`.

    ``retry_failed`` is that of `infer`.

    Raises
    ------
    UserError
        Where there is no finished run, or its work folder was cleaned.
    """
    start = time.perf_counter()
    out = folder.absolute((path.path if isinstance(path, FinishedRun) else os.fspath(path)).rstrip("/"))
    if not folder.is_run(out):
        folder.load_run(out)  # which says what is wrong
    with displayed(progress) as shown, Lock(out) as lock:
        layout = Layout(out)
        if layout.finished and not folder.peek_run(out) and layout.begun:
            folder.describe(replace(Run.from_json(layout.load_summary()), out=out))
        run = replace(folder.load_run(out), out=folder.partial_path(out))

        light = prod(run.shape) <= LIGHT_VOXELS
        options = {"start": start, "light": light, "retry_failed": retry_failed}
        return _finished(run, lock, lambda: folder.reopen(out), shown, **options)


def open(path: str | os.PathLike) -> FinishedRun:
    """A finished run to read from.

    Raises
    ------
    UserError
        Where there is no finished run.
    """
    return open_run(os.fspath(path))


def clean(path: str | os.PathLike | FinishedRun) -> int | None:
    """Remove a finished run's work folder; labels, table and probabilities stay. Returns the bytes freed, if known."""
    run = path if isinstance(path, FinishedRun) else open(path)
    with Lock(run.path):
        return open(run.path).layout.remove_work()  # opened once more: another command may have taken it meanwhile


# ---------------------------------------------------------------- other formats


def convert(
    path: VolumeLike,
    out: str | os.PathLike,
    *,
    labels: bool = False,
    chunk: tuple[int, int, int] | None = None,
    shard: tuple[int, int, int] | None = None,
    config: str | os.PathLike | Config | dict | None = None,
    settings: Settings = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> volume.Volume:
    """Copy any volume to a sharded OME-Zarr 0.5 pyramid, block by block.

    A conversion that was stopped goes on where it was. The output has its final name only once it is whole and patches of
    it were compared with the source.

    Parameters
    ----------
    path : path or array
        The volume (z, y, x): see `open_volume`.
    out : path
        The output, an OME-Zarr group.
    labels : bool
        Whether coarser levels take the most frequent label; else they take the mean.
    chunk, shard : tuple of int, optional
        Voxels that are compressed together, and stored in one object: z, y, x. If not given, 64 x 128 x 128, and
        256 x 512 x 512 or, of a source stored section by section, 64 x 1024 x 1024.
    config, settings, overwrite, progress
        As in `infer`; of the settings, ``[input]`` and ``[cluster]`` count.

    Returns
    -------
    Volume
        The finest level of the output.

    Raises
    ------
    UserError
        For a bad volume, an existing output, or one begun with other settings.
    IncompleteRunError
        When blocks failed; the rest is kept, and the same call goes on from there.

    Examples
    --------
    >>> convert("em.h5::/volumes/raw", "em.zarr", settings=["input.voxel_size_nm=[50, 5, 5]"])  # doctest: +SKIP
    """
    from volseg.engine import convert

    chosen = settings_of(config, settings, base={})
    out = _output_path(path, out, partial(convert.refuse_existing, overwrite=overwrite))
    with displayed(progress) as shown, volume.readable_by_workers(path, chosen.input, out) as source:
        for note in getattr(source, "notes", ()):
            shown.message(note)
        workers = cluster.worker_pool(chosen.cluster).workers
        job = convert.plan(source, out, labels=labels, chunk=chunk, shard=shard, workers=workers)
        return convert.execute(job, out, chosen.cluster, shown, overwrite=overwrite)


def export(
    run: str | os.PathLike | FinishedRun,
    out: str | os.PathLike,
    *,
    kind: str = "",
    what: str = "labels",
    meshes: bool = False,
    skeletons: bool = False,
    objects: Sequence[int] = (),
    max_error_nm: float | None = None,
    config: str | os.PathLike | Config | dict | None = None,
    settings: Settings = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> str:
    """Write a finished run in a format of other programs.

    The output has its name once it is whole; a call that was stopped begins anew.

    Parameters
    ----------
    run : path or FinishedRun
        A finished run.
    out : path
        The output: a local file or folder.
    kind : str
        ``"precomputed"``, ``"n5"``, ``"tiff"``, ``"hdf5"`` or ``"nrrd"``; meshes, in nm: ``"mesh"`` (Neuroglancer's),
        ``"obj"``, ``"ply"`` or ``"glb"``, a file for each object; center lines, ``"skeletons"`` (Neuroglancer's, nm) or
        ``"swc"`` (µm), with a table of their lengths; ``"rois"``, outlines in each section for ImageJ; and the
        object table, ``"csv"``, ``"parquet"`` or ``"anndata"``, or its centers alone, ``"points"``; the basins, ``"graph"``.
        By default what ``out`` ends in.
    what : str
        ``"labels"``; or one of the run's heads, such as ``"mask"``, for its probabilities (uint8, 255 is certain).
        ``"probabilities"`` is the first head.
    meshes : bool
        Whether a precomputed volume holds meshes, too.
    skeletons : bool
        Whether a precomputed volume holds skeletons, too.
    objects : sequence of int
        Labels of the objects that are wanted, where single objects are written; all by default.
    max_error_nm : float, optional
        How far a mesh may lie from the surface of the voxels; half the shortest edge of a voxel by default, 0 keeps every
        triangle. Objects that are meshed from coarser voxels have as much more.
    config, settings, overwrite, progress
        As in `infer`; of the settings, ``[cluster]`` counts.

    Returns
    -------
    str
        The path of the output.

    Raises
    ------
    UserError
        Where there is no such run or format, a package is missing, or the output exists.

    Examples
    --------
    >>> export("em.volseg.zarr", "labels.tif")  # doctest: +SKIP
    """
    from volseg.engine import export

    opened = run if isinstance(run, FinishedRun) else open_run(os.fspath(run))
    out = folder.absolute(os.fspath(out).rstrip("/"))
    wanted = export.checked(opened, out, export.Request(kind, what, meshes, tuple(objects), max_error_nm, skeletons))
    with displayed(progress) as shown:
        return export.execute(
            opened, out, wanted, settings_of(config, settings, base={}).cluster, shown, overwrite=overwrite
        )
