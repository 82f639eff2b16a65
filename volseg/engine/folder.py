"""The folder of a run: begun, taken up again, given another description, and never made over what no run made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from volseg.engine.blocks import fit, shard_shape
from volseg.engine.layout import Layout
from volseg.engine.receipt import Receipt
from volseg.engine.receipts import Markers
from volseg.engine.run import Run
from volseg.engine.stages import keys, stages_of
from volseg.engine.stored import StoredArray
from volseg.errors import DamagedFileError, UserError
from volseg.inference import export
from volseg.inference.model_file import model_file
from volseg.io import files, ome, pyramid, volume
from volseg.io.filling import LOST
from volseg.segmentation.rules import label_dtype

# Of a description: what decides no byte.
FREE_SETTINGS = (
    "out", "config.cluster.", "config.output.keep_work", "config.stitch.reduce", "engine.why", "engine.speed",
    "roi.occupied", "given_roi.occupied",
)  # fmt: skip


MAKING_BASINS = "making basins anew"


def partial_path(out: str) -> str:
    """Where a run lies until it is whole; on an object store, which cannot rename, at its final name."""
    return out if files.is_remote(out) else f"{out}.partial"


def absolute(path: str) -> str:
    """``~`` and ``file://`` are local paths."""
    return path if files.is_remote(path) else str(Path(files.absolute(path)).resolve())


def is_run(path: str) -> bool:
    """Whether ``path`` is a run's, finished or not."""
    layouts = [Layout(path), Layout(partial_path(path))]
    return any(layout.finished or layout.described for layout in layouts)


def refuse_run(path: str) -> None:
    """Refuses a run where an image is wanted: its labels are no gray values."""
    if is_run(path.rstrip("/")):
        raise UserError(
            f"{path} is a run, not an image: decide it anew with volseg segment {path}, or give the volume that it was "
            "made from"
        )


def check_output(sources: list[volume.Volume], out: str, overwrite: bool) -> None:
    """A run may be made at ``out``; on an object store, what ``overwrite`` is to replace is gone."""
    for source in sources:
        if f"{absolute(source.path)}/".startswith((f"{out}/", f"{partial_path(out)}/")):
            raise UserError(f"output {out} would replace the volume it is made from; give another --out")
    refuse_existing(out, overwrite)
    if files.is_remote(out) and overwrite and Layout(out).finished:
        files.remove(out)


def refuse_existing(out: str, overwrite: bool) -> None:
    """Nothing that a run did not make is ever replaced, and a run only where ``overwrite`` says so, or said so when a run that
    is not finished was begun beside it.
    """
    for path in {out, partial_path(out)}:
        if files.exists(path) and not (Layout(path).finished or Layout(path).begun or _bare(path, out)):
            raise UserError(f"output {path} exists and is not a volseg run, so it is left alone; give another --out")
    if Layout(out).finished and not (overwrite or is_being_replaced(out)):
        raise UserError(f"output {out} exists; give another --out, or --overwrite to replace it")


def is_being_replaced(out: str) -> bool:
    """Whether a run that is to replace the finished one at ``out`` was begun, and is not finished."""
    partial = partial_path(out)
    return partial != out and Layout(partial).described


def _bare(path: str, out: str) -> bool:
    """Whether there are only folders at an unfinished name: a command that was killed as it began left them."""
    return path != out and not files.holds_files(path)


# ---------------------------------------------------------------- a new run


def begin(run: Run, overwrite: bool, message: Callable[[str], None] = lambda text: None, *, keeps: str = "") -> None:
    """The run's folder holds its description, the model and empty arrays.

    A stopped run of this description is kept unless ``overwrite`` says to begin anew. One whose description or model
    nobody can read begins anew too, which ``message`` tells, but where that would replace the finished run ``keeps``.
    """
    if run.layout.described and not overwrite:
        try:
            difference = changed(run)
            _check_model(run)
        except DamagedFileError as error:
            if keeps:
                raise UserError(
                    f"{error.path}/{error.keys[0]} {error.state}, and {keeps} exists; give another --out, or --overwrite to "
                    "begin anew and replace it"
                ) from None
            message(f"{error.path}/{error.keys[0]} {error.state}: beginning anew")
            _create(run, None)
            return
        if not difference:
            create_missing_arrays(run)
            _describe_anew(run)
            return
        raise UserError(
            f"an unfinished run at {run.out} {difference}; finish it with its own settings, or start again with --overwrite"
        )
    _create(run, None)


def restart(run: Run) -> None:
    """The run's folder holds nothing that was computed, and this description, with the network as it was."""
    _create(run, run.layout.load_model())


def _create(run: Run, network: bytes | None) -> None:
    """The run's folder holds its description, empty arrays, and the network: this one, or what its model file gives."""
    layout = run.layout
    layout.clear()
    layout.mark_begun()
    layout.set_group()
    layout.set_group("work")
    for array, form in _arrays(run).items():
        array.create(**form)
    if not run.channels:
        path = model_file(run.config.predict)
        layout.save_model(network or export.export_model(path, run.engine.backend, run.engine.precision))
    if run.config.cluster.durable:
        files.sync_filesystem(run.out)
    describe(run)


def _arrays(run: Run) -> dict[StoredArray, dict]:
    """The arrays that a run begins with, and how each is created."""
    layout, lead, chunk = run.layout, len(run.heads), run.config.output.chunk
    shard = shard_shape(run.predict_block if run.passes else run.stored_together("xy"), run.shape, chunk)
    probabilities = {"shape": (lead, *run.shape), "dtype": "uint8", "axes": "czyx"}
    arrays = {layout.probabilities: {**probabilities, "chunk": (1, *chunk), "shard": (lead, *shard)}}
    for stage, plane in run.passes.items():
        small_chunk = fit(chunk, run.predict_block)
        shard = shard_shape(run.stored_together(plane), run.shape, small_chunk)
        arrays[layout.plane_probabilities(stage)] = {
            **probabilities,
            "chunk": (1, *small_chunk),
            "shard": (lead, *shard),
        }
    shard = shard_shape(run.block, run.shape, chunk)
    arrays |= _coarser_arrays(run)
    return {**arrays, layout.regions: {"shape": run.shape, "dtype": "uint32", "chunk": chunk, "shard": shard}}


def _coarser_arrays(run: Run) -> dict[StoredArray, dict]:
    """The same of the coarser levels of the probabilities, and of a copy of the volume."""
    lead, chunk, arrays = len(run.heads), run.config.output.chunk, {}
    for level, (shape, _) in list(enumerate(run.probability_levels))[1:]:
        small_chunk, block = fit(chunk, shape), run.probability_grid(level).block
        form = {"shape": (lead, *shape), "dtype": "uint8", "axes": "czyx", "chunk": (1, *small_chunk)}
        shard = shard_shape(block, shape, small_chunk)
        arrays[run.layout.probability_level(level)] = {**form, "shard": (lead, *shard)}
    for level, (shape, _) in enumerate(run.image_levels):
        small_chunk, shard = fit(chunk, shape), shard_shape(run.level_grid(level).block, shape, fit(chunk, shape))
        form = {"shape": shape, "dtype": run.output_source.dtype, "axes": "zyx", "chunk": small_chunk, "shard": shard}
        arrays[run.layout.image(level)] = form
    return arrays


def create_missing_arrays(run: Run) -> None:
    """Every array that a run begins with is described as it was then; the shards that there are stay."""
    run.layout.set_group()
    run.layout.set_group("work")
    passes = {run.layout.plane_probabilities(stage) for stage in run.passes}
    for array, form in _arrays(run).items():
        if array not in passes or array.exists():  # where the mean of all passes is in place, they are gone
            array.restore(**form)


def create_passes(run: Run) -> None:
    """The arrays that passes store into are there: also once they went, and a block of their mean is to be made again."""
    for array in (run.layout.plane_probabilities(stage) for stage in run.passes):
        if not array.exists():
            array.create(**_arrays(run)[array])


def _check_model(run: Run) -> None:
    """Raises `DamagedFileError` where the network that the run began with is not what was stored."""
    mark = run.layout.load_description().get("model_mark")
    if mark and not run.layout.fits(run.layout.MODEL, mark):
        raise DamagedFileError(run.out, run.layout.MODEL, "is damaged")


def describe(run: Run) -> None:
    """The folder's description is that of ``run``: the last thing that is written when a run begins."""
    run.layout.save_description(_description(run))


def _describe_anew(run: Run) -> None:
    """The stored description has the settings that decide no byte as ``run`` has them, too."""
    stored = run.layout.load_description()
    if {**stored, **_description(run)} != stored:
        describe(run)


def _description(run: Run) -> dict:
    plain = {**run.to_json(), "keys": keys(run), "model_mark": run.layout.model_mark()}
    return json.loads(json.dumps(plain))


def _create_regions(run: Run) -> None:
    run.layout.regions.create(**_arrays(run)[run.layout.regions])


def create_labels(run: Run, markers: Markers) -> None:
    """The label arrays exist, wide enough for the number of objects; those that are so already are kept as they are."""
    layout = run.layout
    dtype = label_dtype(max((receipt.objects for receipt in markers.receipts("stitch").values()), default=0))
    if layout.labels_dtype() != dtype:
        _remove_labels(run, markers)
    chunk = run.config.output.chunk
    for level, (shape, _) in enumerate(run.levels):
        shard = shard_shape(run.output_grid.block, shape, chunk)
        layout.labels(level).restore(shape=shape, dtype=dtype, chunk=chunk, shard=shard, axes="zyx")
    # after the arrays: making one makes the groups above it, without attributes, where a store does not show them yet
    layout.set_group("labels", {"ome": {"version": "0.5", "labels": ["instances"]}})
    describe_labels(run)
    layout.mark_labels(dtype)


def describe_labels(run: Run, columns: dict[str, np.ndarray] | None = None) -> None:
    """The labels' OME metadata are there, with colors and sizes of the objects in the table ``columns``, if these are few."""
    levels = [(str(k), size) for k, size in enumerate(pyramid.sizes(run.levels, run.output_voxel_size_nm))]
    attributes = ome.multiscales("instances", "zyx", levels, source="../../", begin=run.output_origin_nm)
    if run.drops:  # then the copy of the volume is the image, if there is one
        attributes["ome"]["image-label"] = {"source": {"image": "../../image"}} if run.image_levels else {}
    if columns is not None and columns["id"].size <= ome.MAX_LISTED_LABELS:
        listed = {name: columns[name] for name in ("voxels", "volume_um3", "confidence")}
        attributes["ome"]["image-label"] |= ome.label_properties(columns["id"], listed)
    run.layout.set_group("labels/instances", attributes)


def describe_image(run: Run) -> None:
    """The OME metadata of the probabilities, where they are kept, and of a copy of the volume are there."""
    levels = [(str(k), size) for k, size in enumerate(pyramid.sizes(run.probability_levels, run.voxel_size_nm))]
    attributes = {}
    if not run.drops:
        attributes = ome.multiscales("probability", "czyx", levels, begin=run.origin_nm)
        attributes["ome"]["omero"] = ome.channels(run.heads)
    if run.image_levels:
        sizes = [(str(k), size) for k, size in enumerate(pyramid.sizes(run.levels, run.output_voxel_size_nm))]
        run.layout.set_group("image", ome.multiscales("image", "zyx", sizes, begin=run.output_origin_nm))
    run.layout.set_group("", {**attributes, "volseg": {"source": run.output_source.path}})


def _remove_labels(run: Run, markers: Markers) -> None:
    """No labels are left, nor what says that there are some."""
    for stage in stages_of(run).values():
        if stage.group == "labels":
            markers.remove(stage.name)
    run.layout.remove_labels()


def drop_passes(run: Run, markers: Markers) -> None:
    """What the passes stored is gone: its mean is in place."""
    for stage in run.passes:
        markers.remove(stage)
        run.layout.plane_probabilities(stage).remove()


def changed(run: Run) -> str:
    """In which setting the run stored at ``run.out`` differs from ``run``; ``""`` where it would write the same bytes.

    A run that could not decode a chunk may go on with 0 in its place: what is done did not need it. Where a volume lies, and
    what is told of it, decides no byte of an array.
    """
    stored, given = run.layout.load_description(), json.loads(json.dumps({**run.to_json(), "keys": keys(run)}))
    for name in ("place", "notes"):
        stored, given = _without(name, stored), _without(name, given)
    if stored.get("config", {}).get("input", {}).get("on_bad_chunk") == "fail":
        stored, given = _without("on_bad_chunk", stored), _without("on_bad_chunk", given)
    old, new = _flat(stored), _flat(given)
    differ = [name for name in new if not name.startswith(FREE_SETTINGS) and old.get(name) != new[name]]
    if not differ:
        return ""
    name = min(differ, key=lambda name: (not name.startswith(("engine.", "config.")), name.startswith("keys."), name))
    return f"has {name} = {old.get(name)!r}, this one {new[name]!r}"


def _without(name: str, plain: Any) -> Any:
    """``plain`` without the entries of that name, however deep they lie."""
    if isinstance(plain, dict):
        return {key: _without(name, value) for key, value in plain.items() if key != name}
    return [_without(name, value) for value in plain] if isinstance(plain, list) else plain


def _flat(plain: dict, prefix: str = "") -> dict:
    out: dict = {}
    for key, value in plain.items():
        out.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return out


# ---------------------------------------------------------------- a finished run, decided anew


def peek_run(path: str) -> Run | None:
    """The run begun at ``path``; None where there is none that this volseg can read."""
    plain = Layout(path).peek_description()
    try:
        return Run.from_json({**plain, "out": path}, Layout.DESCRIPTION) if plain else None
    except UserError:
        return None


def described_run(out: str) -> Run | None:
    """What `load_run` gives, without a word written; None where it would refuse."""
    run = peek_run(partial_path(out)) or peek_run(out)
    layout = Layout(out)
    return run or (replace(Run.from_json(layout.load_summary()), out=out) if layout.finished else None)


def load_run(out: str, *, recompute: bool = False) -> Run:
    """The run at ``out``, or the one of that name which `segment` left unfinished; its work folder is there.

    Raises `UserError` for what is no run, one without a work folder unless ``recompute`` allows to make basins anew, and
    one that another version of volseg predicted.
    """
    path = partial_path(out) if Layout(partial_path(out)).described else out
    if not Layout(path).described:
        if not Layout(out).finished:
            raise UserError(f"{out} is not a volseg run (no run.json in it); give a folder that volseg made")
        Run.from_json({**Layout(out).load_summary(), "out": out}).require_probabilities(MAKING_BASINS)
        if not recompute:
            raise UserError(
                f"the work folder of {out} was cleaned: its basins must be made anew: volseg segment {out} --recompute"
            )
        _rebuild_work(out)
    plain = Layout(path).load_description()
    run = Run.from_json({**plain, "out": path}, Layout.DESCRIPTION)
    if plain["keys"].get(run.probability_stage) != keys(run)[run.probability_stage]:
        if not recompute or path != out:
            raise UserError(
                f"{path} was made by another version of volseg, which may have predicted otherwise: make it anew with "
                "volseg infer --overwrite, or keep a finished run's probabilities as they are with --recompute"
            )
        run.require_probabilities(MAKING_BASINS)
        Layout(out).remove_work()
        _rebuild_work(out)
    return run


def reopen(out: str) -> None:
    """The finished run at ``out`` lies at its unfinished name."""
    if partial_path(out) != out and files.exists(out) and not files.exists(partial_path(out)):
        files.move(out, partial_path(out))
    Layout(partial_path(out)).remove_summary()


def _rebuild_work(out: str) -> None:
    """A cleaned run has a work folder again in which its probabilities, and a copy of the volume, count as done."""
    summary = Layout(out).load_summary()
    run = replace(Run.from_json(summary), out=out)
    _create_regions(run)
    stages, markers = stages_of(run), Markers(out, keys(run))
    kept = {run.probability_stage: run.layout.probabilities, "image0": run.layout.image()}
    filled = tuple((where, box) for where, boxes in summary.get("filled_boxes", {}).items() for box in boxes)
    filled += tuple((LOST, f"{z}:{z + 1},0:1,0:1") for z in summary.get("lost_sections", ()))
    for name, array in ((name, array) for name, array in kept.items() if name in stages):
        for i in stages[name].part.numbers:
            box = stages[name].grid[i]
            markers.add(name, i, Receipt(voxels=box.voxels, files=array.fingerprints(box), filled=filled))
            filled = ()  # one block tells of all
    markers.flush()
    run.layout.mark_begun()
    describe(run)


def apply_settings(run: Run) -> None:
    """The run's folder takes another description; what that makes stale is gone."""
    plain = run.layout.load_description()
    old, old_keys, new_keys = Run.from_json(plain, Layout.DESCRIPTION), plain["keys"], keys(run)
    for stage in {*old_keys, *new_keys}:
        if old_keys.get(stage) != new_keys.get(stage):
            run.layout.remove_markers(stage)
    if (old_keys["fragments"], old.block, old.output_shape, old.levels) != (
        new_keys["fragments"], run.block, run.output_shape, run.levels,
    ):  # fmt: skip
        _remove_labels(run, Markers(run.out, new_keys))
    if old.block != run.block:
        run.layout.regions.remove()
        _create_regions(run)
    forms, old_forms = _coarser_arrays(run), _coarser_arrays(replace(old, out=run.out))
    for array, form in old_forms.items():
        if forms.get(array) != form:
            array.remove()
    for array, form in forms.items():
        if old_forms.get(array) != form:
            array.create(**form)
    if not run.image_levels:
        files.remove(f"{run.out}/image")
    describe(run)
