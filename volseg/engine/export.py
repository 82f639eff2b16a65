"""What a finished run holds, in the formats of other programs: labels, probabilities, meshes, outlines and tables.

An export is written beside its output, into a folder, and takes its name once it is whole and the run is still the one that
was read. A command that was stopped begins anew. Folders hold ``export.json``, which says what they are: no other folder is
replaced.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from volseg import system
from volseg.box import Blocks, Box, Triple
from volseg.config import Cluster
from volseg.engine import cluster, loop, meshing
from volseg.engine.finished import FinishedRun
from volseg.engine.lock import Lock
from volseg.engine.partition import stored_basins, write_graph
from volseg.errors import UserError
from volseg.io import files, volume
from volseg.io.export import chunked, meshes, rois, single, skeletons
from volseg.io.export.frame import Frame
from volseg.io.export.objects import centers_table, write_anndata
from volseg.io.export.properties import segment_properties
from volseg.progress import Progress

NOTE = "export.json"
BLOCK = (128, 256, 256)  # voxels that a task holds, whole chunks of every format
LIGHT_VOXELS = 1 << 28  # up to which processes would start slower than threads are done
LABELS = "labels"


@dataclass(frozen=True)
class Form:
    """A kind of export: the endings that name it, what writes it and the extra that holds that, and whether it is a folder."""

    suffixes: tuple[str, ...]
    packages: tuple[str, ...] = ()
    folder: bool = False
    extra: str = "export"


FORMS = {
    "precomputed": Form((".precomputed",), ("tensorstore",), folder=True),
    "n5": Form((".n5",), ("tensorstore",), folder=True),
    "tiff": Form((".tif", ".tiff")),
    "hdf5": Form((".h5", ".hdf5"), ("h5py",)),
    "nrrd": Form((".nrrd",)),
    "mesh": Form((".mesh",), ("zmesh",), folder=True),
    "obj": Form((), ("zmesh", "trimesh"), folder=True),
    "ply": Form((), ("zmesh", "trimesh"), folder=True),
    "glb": Form((), ("zmesh", "trimesh"), folder=True),
    "skeletons": Form((".skeletons",), ("kimimaro",), folder=True, extra="skeletons"),
    "swc": Form((), ("kimimaro",), folder=True, extra="skeletons"),
    "rois": Form((".zip",), ("roifile",)),
    "points": Form((".points.csv",)),
    "csv": Form((".csv",)),
    "parquet": Form((".parquet",)),
    "anndata": Form((".h5ad",), ("h5py",)),
    "graph": Form((".graph",), folder=True),
}
CHUNKED, SINGLE, MESHES = ("precomputed", "n5"), ("tiff", "hdf5", "nrrd"), ("mesh", "obj", "ply", "glb")
LINES = ("skeletons", "swc")


@dataclass(frozen=True)
class Request:
    """What is wanted of a run.

    kind          one of `FORMS`
    what          labels, or the name of a head of its probabilities
    meshes        whether a precomputed volume holds meshes, too
    skeletons     whether it holds skeletons, too
    objects       labels of those that are wanted where single objects go out; none for all
    max_error_nm  how far a mesh may lie from the voxels' surface; None for half the shortest edge of a voxel
    """

    kind: str
    what: str = LABELS
    meshes: bool = False
    objects: tuple[int, ...] = ()
    max_error_nm: float | None = None
    skeletons: bool = False


def checked(run: FinishedRun, out: str, wanted: Request) -> Request:
    """The request with its kind and head named; refuses what there is not, in one line."""
    kind, heads = wanted.kind or _kind_of(out), run.run.heads
    if kind not in FORMS:
        raise UserError(f"there is no export {kind!r}; give one of {', '.join(FORMS)}")
    system.require(*FORMS[kind].packages, extra=FORMS[kind].extra)
    system.require(*(("zmesh",) if wanted.meshes else ()), extra="export")
    system.require(*(("kimimaro",) if wanted.skeletons else ()), extra="skeletons")
    what = heads[0] if wanted.what == "probabilities" else wanted.what
    if what not in (LABELS, *heads):
        raise UserError(f"the run holds no {what!r}; give {LABELS} or one of its probabilities: {', '.join(heads)}")
    if what != LABELS:
        run.run.require_probabilities(f"an export of {what}")
    if kind in CHUNKED or kind in SINGLE:
        for asked, name, own in ((wanted.meshes, "meshes", "mesh"), (wanted.skeletons, "skeletons", "skeletons")):
            if asked and (kind, what) != ("precomputed", LABELS):
                raise UserError(
                    f"{name} lie beside labels in precomputed volumes alone; leave out --{name}, or give --to {own}"
                )
        if wanted.objects and not (wanted.meshes or wanted.skeletons):
            raise UserError(f"{kind} holds the whole volume; leave out --object, or give one of {', '.join(MESHES)}")
    elif what != LABELS:
        raise UserError(f"{kind} holds objects, not {what}; leave out --what")
    elif kind == "graph":
        stored_basins(run.run, "a graph")
    unknown = sorted(set(wanted.objects) - set(columns_of(run)["id"].tolist())) if wanted.objects else []
    if unknown:
        raise UserError(f"the run has no object {unknown[0]}; its object table lists them: {run.layout.objects_path}")
    return replace(wanted, kind=kind, what=what)


def _kind_of(out: str) -> str:
    """The kind that the output's ending names."""
    for kind, form in FORMS.items():
        if out.lower().endswith(form.suffixes):
            return kind
    known = ", ".join(form.suffixes[0] for form in FORMS.values() if form.suffixes)
    raise UserError(f"the name {os.path.basename(out)} tells no format; give --to KIND, or an ending such as {known}")


def execute(
    run: FinishedRun, out: str, wanted: Request, config: Cluster, progress: Progress, *, overwrite: bool = False
) -> str:
    """The export is at ``out``; returns that path.

    Raises
    ------
    UserError
        Where something lies at ``out`` that may not be replaced, or the run has changed meanwhile.
    """
    form, partial = FORMS[wanted.kind], f"{out}.partial"
    _refuse(run, out, form, overwrite)
    with Lock(out):
        _refuse(run, out, form, overwrite)
        files.remove(partial)
        facts = {"run": run.path, "kind": wanted.kind, "what": wanted.what}
        files.write_bytes(partial, NOTE, json.dumps(facts).encode())
        made = partial if form.folder else f"{partial}/{os.path.basename(out)}"
        _tell_place(run, wanted, progress)
        try:
            WRITERS[wanted.kind](run, made, wanted, config, progress)
            if run.layout.load_summary() != run.summary:
                raise UserError(f"the run at {run.path} was decided anew while it was exported; export it again")
        except BaseException:
            files.remove(partial)
            raise
        files.remove(out)
        files.move(made, out)
        files.remove(partial)
    return out


def _refuse(run: FinishedRun, out: str, form: Form, overwrite: bool) -> None:
    """Only files, and folders that an export made, are ever replaced, and no part of the run."""
    if files.is_remote(out):
        raise UserError(f"exports are written to a local path, and {out} is none; copy the export there afterwards")
    if f"{out}/".startswith(f"{run.path}/") or f"{run.path}/".startswith(f"{out}/"):
        raise UserError(f"output {out} would lie in the run {run.path}, or replace it; give another path")
    partial = f"{out}.partial"
    for path, folder in ((out, form.folder), (partial, True)):
        foreign = os.path.isdir(path) and not files.exists(f"{path}/{NOTE}")
        begun = path == partial and not files.holds_files(path)  # of an export that was killed as it began
        if (foreign and not begun) or (folder and os.path.isfile(path)):
            raise UserError(f"output {path} exists and volseg export did not make it; give another path")
    if files.exists(out) and not overwrite:
        raise UserError(f"output {out} exists; give another path, or --overwrite to replace it")


def run_tasks(
    task: Callable[..., Any], job: Any, items: list, weights: list[int], name: str, config: Cluster, progress: Progress,
    *, light: bool,
) -> list:  # fmt: skip
    """What ``task(job, item)`` returns for each item, in any order; raises `UserError` for the first that failed."""
    weight, results = dict(zip(items, weights, strict=True)), []
    advance = progress.stage(name, sum(weights), 0)

    def done(item: Any, result: Any) -> None:
        results.append(result)
        advance(weight[item])

    def handed_out() -> Iterator[Any]:
        yield from items

    with cluster.connect(config, light=light, tell=progress.message) as client:
        failures = loop.run(
            client, task, handed_out(), job, tries=config.tries, window=cluster.window(client, config),
            done=done, stop=lambda error: isinstance(error, UserError),
        )  # fmt: skip
    if failures:
        raise UserError(f"{len(failures)} of {len(items)} parts of {name} failed, the first with: {failures[0].reason}")
    return results


# ---------------------------------------------------------------- volumes


@dataclass(frozen=True)
class VolumeJob:
    """Voxels to be written: every level of them, or the finest into one file; small enough to go to workers."""

    kind: str
    path: str
    levels: tuple[volume.Volume, ...]
    place: single.Place | None
    block: Triple

    def grid(self, level: int) -> Blocks:
        """The blocks of a level."""
        return Blocks(self.levels[level].shape, self.block)


def write_block(job: VolumeJob, level: int, i: int) -> None:
    """Block ``i`` of a level is stored."""
    box = job.grid(level)[i]
    data = job.levels[level].read(box)
    if job.place:
        single.write(job.place, box, data)
    else:
        chunked.write(job.kind, job.path, level, box, data)


def levels_of(run: FinishedRun, what: str) -> tuple[volume.Volume, ...]:
    """Labels or a channel of probabilities, at every level that is stored, finest first."""
    if what == LABELS:
        return volume.levels(volume.open(run.path, dataset="labels/instances/0"))
    return volume.levels(volume.open(run.path, dataset="0", channel=run.run.heads.index(what)))


def frame_of(run: FinishedRun, level: volume.Volume) -> Frame:
    """Where a level of the run's labels or probabilities lies."""
    size = level.voxel_size_nm or run.voxel_size_nm
    return Frame(level.shape, size, run.run.center_nm(size), run.run.corner(size))


def _tell_place(run: FinishedRun, wanted: Request, progress: Progress) -> None:
    """What is lost of a volume's place where it is told in whole voxels."""
    if wanted.kind not in ("precomputed", *MESHES, *LINES):
        return
    levels = levels_of(run, wanted.what)
    frames = [frame_of(run, level) for level in (levels if wanted.kind == "precomputed" else levels[:1])]
    exact = run.run.in_whole_voxels and frames[0].corner == tuple(map(float, frames[0].first))
    coarser = [number for number, each in enumerate(frames) if each.corner != tuple(map(float, each.first))]
    if not exact:
        begin, at = (" x ".join(f"{n:g}" for n in place) for place in (run.origin_nm, frames[0].first))
        progress.message(
            f"the volume begins at {begin} nm, no whole number of voxels: voxel {at} is taken, less than a voxel away"
        )
    elif coarser:
        progress.message(
            f"the volume's first voxel, {' x '.join(map(str, frames[0].first))}, is no whole one of scale {coarser[0]} and "
            "coarser ones: these lie up to half of their own voxel aside"
        )


def _write_volume(run: FinishedRun, path: str, wanted: Request, config: Cluster, progress: Progress) -> None:
    levels, place = levels_of(run, wanted.what), None
    dtype = np.dtype(levels[0].dtype)
    frames = [frame_of(run, level) for level in levels]
    if wanted.kind in CHUNKED:
        chunked.create(wanted.kind, path, frames, dtype, labels=wanted.what == LABELS)
    else:
        levels = levels[:1]
        dtype = single.fitting(wanted.kind, dtype, run.object_count if wanted.what == LABELS else 0)
        place = single.create(wanted.kind, path, frames[0], dtype, wanted.what)
    job = VolumeJob(wanted.kind, path, levels, place, BLOCK)
    light = place is not None or prod(levels[0].shape) <= LIGHT_VOXELS
    for level in range(len(levels)):
        grid = job.grid(level)
        items = [(level, i) for i in range(len(grid))]
        run_tasks(
            write_block, job, items, [box.voxels for box in grid], f"level {level}", config, progress, light=light
        )


def _write_precomputed(run: FinishedRun, path: str, wanted: Request, config: Cluster, progress: Progress) -> None:
    _write_volume(run, path, wanted, config, progress)
    if wanted.what == LABELS:
        files.write_bytes(path, "properties/info", segment_properties(columns_of(run)))
        chunked.link(path, segment_properties="properties")
    if wanted.meshes:
        _write_meshes(run, f"{path}/mesh", replace(wanted, kind="mesh"), config, progress)
        chunked.link(path, mesh="mesh")
    if wanted.skeletons:
        _write_skeletons(run, f"{path}/skeletons", replace(wanted, kind="skeletons"), config, progress)
        chunked.link(path, skeletons="skeletons")


def _write_meshes(run: FinishedRun, path: str, wanted: Request, config: Cluster, progress: Progress) -> None:
    levels = levels_of(run, LABELS)
    error = min(run.voxel_size_nm) / 2 if wanted.max_error_nm is None else wanted.max_error_nm
    frame = frame_of(run, levels[0])
    job = meshing.MeshJob(path, wanted.kind, levels, error, frame.begin_nm)
    found = meshing.objects_of(columns_of(run), wanted.objects)
    items = [(group,) for group in meshing.groups(found, levels[0].shape)]
    weights = [sum(each.box.voxels for each in group) for (group,) in items]
    if wanted.kind == "mesh":
        meshes.describe(path)
    light = sum(weights) <= LIGHT_VOXELS // 4  # zmesh takes longer than a copy
    missing = run_tasks(meshing.write_meshes, job, items, weights, "meshes", config, progress, light=light)
    if any(missing):
        progress.message(
            f"{sum(missing)} objects are too thin for a surface at the coarser level that their size asks for"
        )


def _write_skeletons(run: FinishedRun, path: str, wanted: Request, config: Cluster, progress: Progress) -> None:
    """With a table of what they measure, beside what else the folder holds."""
    levels = levels_of(run, LABELS)
    frame = frame_of(run, levels[0])
    job = meshing.MeshJob(path, wanted.kind, levels, 0.0, frame.begin_nm)
    found = meshing.objects_of(columns_of(run), wanted.objects)
    items = [(group,) for group in meshing.groups(found, levels[0].shape)]
    weights = [sum(each.box.voxels for each in group) for (group,) in items]
    if wanted.kind == "skeletons":
        skeletons.describe(path)
    light = sum(weights) <= LIGHT_VOXELS // 16
    made = run_tasks(meshing.write_skeletons, job, items, weights, "skeletons", config, progress, light=light)
    rows = sorted(row for some in made for row in some)
    lines = [
        ",".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in row) for row in rows if row[1:]
    ]
    files.write_bytes(path, "skeletons.csv", "\n".join([",".join(skeletons.COLUMNS), *lines, ""]).encode())
    if missing := sum(not row[1:] for row in rows):
        progress.message(f"{missing} objects are too thin for a line at the coarser level that their size asks for")


# ---------------------------------------------------------------- outlines and tables


def _write_rois(run: FinishedRun, path: str, wanted: Request, config: Cluster, progress: Progress) -> None:
    """A region for each object in each section, object by object; what is held is a slab of one object's box."""
    labels = levels_of(run, LABELS)[0]
    found = meshing.objects_of(columns_of(run), wanted.objects)
    advance = progress.stage("outlines", sum(each.box.voxels for each in found), 0)
    digits = len(str(max((each.label for each in found), default=0))), len(str(labels.shape[0]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for each in found:
            (z0, y0, x0), (z1, y1, x1) = each.box.start, each.box.stop
            depth = max(1, meshes.SLAB_VOXELS // ((y1 - y0) * (x1 - x0)))
            for z in range(z0, z1, depth):
                slab = Box((z, y0, x0), (min(z + depth, z1), y1, x1))
                for section, mask in enumerate(labels.read(slab) == each.label, z):
                    outer = [outline + np.array((x0, y0)) for outline in rois.outlines(mask)]
                    if outer:
                        name = f"{each.label:0{digits[0]}}-z{section:0{digits[1]}}"
                        file.writestr(f"{name}.roi", rois.encode(name, section, outer))
                advance(slab.voxels)


def _write_table(run: FinishedRun, path: str, wanted: Request, config: Cluster, progress: Progress) -> None:
    """The object table, as the run has it."""
    if wanted.kind == "anndata":
        write_anndata(path, columns_of(run))
    else:
        files.write_atomic(path, run.layout.read_table("objects", wanted.kind))


def _write_points(run: FinishedRun, path: str, wanted: Request, config: Cluster, progress: Progress) -> None:
    """The center of each object, as napari reads points."""
    columns = columns_of(run)
    if wanted.objects:
        chosen = np.isin(columns["id"], wanted.objects)
        columns = {name: values[chosen] for name, values in columns.items()}
    files.write_atomic(path, centers_table(columns, run.voxel_size_nm).encode())


def _write_graph(run: FinishedRun, path: str, wanted: Request, config: Cluster, progress: Progress) -> None:
    write_graph(run.run, path)


def columns_of(run: FinishedRun) -> dict[str, np.ndarray]:
    """Columns of the object table, by name."""
    table = run.objects_arrow()
    return {name: table[name].to_numpy() for name in table.column_names}


WRITERS: dict[str, Callable[[FinishedRun, str, Request, Cluster, Progress], None]] = {
    "precomputed": _write_precomputed,
    "n5": _write_volume,
    "tiff": _write_volume,
    "hdf5": _write_volume,
    "nrrd": _write_volume,
    **dict.fromkeys(MESHES, _write_meshes),
    **dict.fromkeys(LINES, _write_skeletons),
    "rois": _write_rois,
    **dict.fromkeys(("csv", "parquet", "anndata"), _write_table),
    "points": _write_points,
    "graph": _write_graph,
}
