"""Volumes from Python: opened, converted, and made readable for workers. `volseg.api` has all else."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from volseg.config import Config
from volseg.engine import cluster, folder
from volseg.engine.finished import FinishedRun, open_run
from volseg.errors import UserError
from volseg.inference.settings import Settings, default_out, settings_of
from volseg.io import files, volume
from volseg.progress import Progress, default_progress

VolumeLike = Any  # a path, or an array with shape, dtype and slices: NumPy, zarr, dask


@contextmanager
def displayed(progress: Progress | None) -> Iterator[Progress]:
    """Progress as asked for, else as suits where this runs; ended afterwards."""
    progress = progress or default_progress()
    try:
        yield progress
    finally:
        progress.stop()


def open_volume(
    source: VolumeLike,
    *,
    dataset: str = "",
    voxel_size_nm: tuple[float, float, float] | None = None,
    axes: str = "",
    channel: int | None = None,
    time: int | None = None,
    invert: bool = False,
) -> volume.Volume | volume.ArrayVolume:
    """A volume to read from, whatever its format; only headers are read.

    Parameters
    ----------
    source : path or array
        Whatever ``docs/formats.md`` lists, such as ``"em.zarr"``, ``"em.tif"`` or ``"em.h5::/volumes/raw"``; or an array of
        NumPy, zarr or dask.
    dataset : str
        The array inside a zarr group, an N5 container or an HDF5 file; by default the full-resolution level, or the only one.
    voxel_size_nm : tuple of float, optional
        Size of a voxel along z, y, x in nm; overrides what the file says.
    axes : str
        Names of an array's axes, such as ``"czyx"``.
    channel : int, optional
        Which channel to take where there are several.
    time : int, optional
        Which time to take where there are several.
    invert : bool
        Whether to turn gray values around.

    Returns
    -------
    Volume or ArrayVolume
        With ``shape`` (z, y, x), ``dtype``, ``voxel_size_nm`` and ``read(box)``.

    Raises
    ------
    UserError
        Where there is no such volume, or nothing can read it.

    Examples
    --------
    >>> import numpy as np
    >>> open_volume(np.zeros((8, 64, 64), np.uint8), voxel_size_nm=(50, 5, 5)).shape
    (8, 64, 64)
    """
    return volume.open_volume(
        source, dataset=dataset, voxel_size_nm=voxel_size_nm, axes=axes, channel=channel, time=time, invert=invert
    )


@contextmanager
def worker_readable(source: VolumeLike, config: Config, out: str) -> Iterator[volume.Volume]:
    """The volume as workers can read it: an array in memory is copied beside the output, and the copy removed at the end.

    It stays where a run does not end, which goes on from it.
    """
    opened = volume.open_input(source, config.input)
    if isinstance(opened, volume.Volume):
        yield opened
        return
    copy = f"{out}.input.zarr"
    yield volume.materialize(opened, copy)
    files.remove(copy)


def output_path(path: VolumeLike, out: str | os.PathLike | None) -> str:
    """The absolute path of an output."""
    if out is None and not isinstance(path, (str, os.PathLike)):
        raise UserError('an array has no name to call its run by: give out="em.volseg.zarr"')
    return folder.absolute(str(out or default_out(path)).rstrip("/"))


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

    chosen, out = settings_of(config, settings, base={}), output_path(path, out)
    with displayed(progress) as shown, worker_readable(path, chosen, out) as source:
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
        ``"obj"``, ``"ply"`` or ``"glb"``, a file for each object; ``"rois"``, outlines in each section for ImageJ; and the
        object table, ``"csv"``, ``"parquet"`` or ``"anndata"``. By default what the ending of ``out`` names.
    what : str
        ``"labels"``; or one of the run's heads, such as ``"mask"``, for its probabilities (uint8, 255 is certain).
        ``"probabilities"`` is the first head.
    meshes : bool
        Whether a precomputed volume holds meshes, too.
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
    wanted = export.checked(opened, out, export.Request(kind, what, meshes, tuple(objects), max_error_nm))
    with displayed(progress) as shown:
        return export.execute(
            opened, out, wanted, settings_of(config, settings, base={}).cluster, shown, overwrite=overwrite
        )
