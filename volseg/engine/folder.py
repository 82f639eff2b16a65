"""The folder of a run: begun, taken up again, given another description, and never made over what no run made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from volseg.engine import cluster
from volseg.engine.run import Run, fit, shard
from volseg.errors import UserError
from volseg.inference import export, model
from volseg.io import arrays, files, ome, pyramid, volume
from volseg.segmentation.rules import label_dtype

FREE = ("out", "config.cluster.", "config.output.keep_work", "config.stitch.reduce", "engine.why")  # decide no byte


def _remove_labels(run: Run) -> None:
    """No labels are left, nor what says that there are some."""
    stages = [stage for stage in run.keys if stage == "relabel" or stage.startswith("pyramid")]
    for name in (*(f"work/markers/{stage}" for stage in stages), "work/labels.json", "work/stamps", "labels"):
        files.remove(f"{run.out}/{name}")


def partial(out: str) -> str:
    """Where a run lies until it is whole."""
    return out if files.is_remote(out) else f"{out}.partial"


def absolute(path: str) -> str:
    return path if files.is_remote(path) else str(Path(path).resolve())


def is_run(path: str) -> bool:
    """Whether ``path`` is a run's, finished or not."""
    return any(files.exists(f"{p}/{name}") for p in {path, partial(path)} for name in ("run.json", "work/run.json"))


def refuse_run(path: str) -> None:
    """Refuses a run where an image is wanted: its labels are no gray values."""
    if is_run(path.rstrip("/")):
        raise UserError(f"{path} is a run, not an image: decide it anew with volseg segment {path}, or give the volume that it "
                        "was made from")  # fmt: skip


def make_room(sources: list[volume.Volume], out: str, overwrite: bool) -> None:
    """A run may be made at ``out``; on an object store, what `overwrite` is to replace is gone."""
    for source in sources:
        _refuse_existing(absolute(source.path), out, overwrite)
    if files.is_remote(out) and overwrite and files.exists(f"{out}/run.json"):
        files.remove(out)


def _refuse_existing(source: str, out: str, overwrite: bool) -> None:
    """Nothing that a run did not make is ever replaced, nor what it reads from."""
    if f"{source}/".startswith((f"{out}/", f"{partial(out)}/")):
        raise UserError(f"output {out} would replace the volume it is made from; give another --out")
    for path in {out, partial(out)}:
        if files.exists(path) and not any(files.exists(f"{path}/{name}") for name in ("run.json", "work/begun")):
            raise UserError(f"output {path} exists and is not a volseg run, so it is left alone; give another --out")
    if files.exists(f"{out}/run.json") and not overwrite:
        raise UserError(f"output {out} exists; give another --out, or --overwrite to replace it")


def begin(run: Run, overwrite: bool) -> None:
    """The run's folder holds its description, the model and empty arrays. A stopped run of this description is kept."""
    if files.exists(f"{run.out}/work/run.json"):
        difference = changed(run)
        if not difference:
            return
        if not overwrite:
            raise UserError(f"an unfinished run at {run.out} {difference}; finish it with its own settings, or start again "
                            "with --overwrite")  # fmt: skip
    _lay_out(run, None)


def begin_again(run: Run) -> None:
    """The run's folder holds nothing that was computed, and this description, with the network as it was."""
    _lay_out(run, files.read_bytes(run.out, "work/model.bin"))


def _lay_out(run: Run, network: bytes | None) -> None:
    """The run's folder holds its description, empty arrays, and the network: this one, or what its model file gives."""
    _clear(run.out)
    files.write_bytes(run.out, "work/begun", b"")
    arrays.create_group(run.out)
    lead = len(run.heads)
    arrays.create_array(
        run.out, "0", shape=(lead, *run.shape), dtype="uint8", chunk=(1, *run.config.output.chunk),
        shard=(lead, *shard(run.predict_block, run.shape, run.config.output.chunk)), axes="czyx",
    )  # fmt: skip
    for stage, plane in run.passes.items():
        block = run.pass_grid(plane).block
        chunk = fit(run.config.output.chunk, run.predict_block)
        arrays.create_array(
            run.out, f"work/{stage}", shape=(lead, *run.shape), dtype="uint8", chunk=(1, *chunk),
            shard=(lead, *shard(block, run.shape, chunk)), axes="czyx",
        )  # fmt: skip
    _create_fragments(run)
    if not run.taken:
        path = Path(run.config.predict.model) if run.config.predict.model else model.shipped()
        blob = network or export.export_model(path, run.engine.backend, run.engine.precision)
        files.write_bytes(run.out, "work/model.bin", blob)
    files.write_bytes(run.out, "work/run.json", json.dumps(run.to_json(), indent=1).encode())


def _clear(out: str) -> None:
    """Of what a run made at ``out`` only the mark is left that one was begun there.

    What describes it goes first, the mark never: if this is stopped, the rest counts for nothing and is a run's all the same.
    """
    files.remove(f"{out}/work/run.json")
    for name in files.names(f"{out}/work"):
        if name != "begun":
            files.remove(f"{out}/work/{name}")
    for name in files.names(out):
        if name != "work":
            files.remove(f"{out}/{name}")


def _create_fragments(run: Run) -> None:
    chunk = run.config.output.chunk
    arrays.create_array(
        run.out,
        "work/fragments",
        shape=run.shape,
        dtype="uint32",
        chunk=chunk,
        shard=shard(run.block, run.shape, chunk),
    )


def create_labels(run: Run) -> None:
    """The label arrays exist, wide enough for the number of objects; those that are so already are kept as they are."""
    found = max((receipt["objects"] for receipt in cluster.receipts(run.out, "stitch", run.keys["stitch"])), default=0)
    made = f"{run.out}/work/labels.json"  # written last
    if files.exists(made) and json.loads(files.read_bytes(run.out, "work/labels.json")).get("dtype") == label_dtype(
        found
    ):
        return
    _remove_labels(run)
    for level, (shape, _) in enumerate(run.levels):
        arrays.create_array(
            run.out, f"labels/instances/{level}", shape=shape, dtype=label_dtype(found),
            chunk=run.config.output.chunk, shard=shard(run.block, shape, run.config.output.chunk), axes="zyx",
        )  # fmt: skip
    sizes = pyramid.sizes(run.levels, run.voxel_size_nm)
    arrays.create_group(f"{run.out}/labels/instances")
    arrays.set_group_attributes(run.out, "labels", {"ome": {"version": "0.5", "labels": ["instances"]}})
    arrays.set_group_attributes(
        run.out,
        "labels/instances",
        ome.multiscales("instances", "zyx", [(str(k), s) for k, s in enumerate(sizes)], source="../../"),
    )
    files.write_bytes(run.out, "work/labels.json", json.dumps({"dtype": label_dtype(found)}).encode())


def drop_passes(run: Run) -> None:
    """What the passes stored is gone: its mean is in place."""
    for stage in run.passes:
        files.remove(f"{run.out}/work/{stage}")


def changed(run: Run) -> str:
    """In which setting the run stored at ``run.out`` differs from ``run``; ``""`` where it would write the same bytes."""
    old = _flat(json.loads(files.read_bytes(run.out, "work/run.json")))
    new = _flat(json.loads(json.dumps(run.to_json())))
    differ = [name for name in new if not name.startswith(FREE) and old.get(name) != new[name]]
    if not differ:
        return ""
    name = min(differ, key=lambda name: (not name.startswith(("engine.", "config.")), name.startswith("keys."), name))
    return f"has {name} = {old.get(name)!r}, this one {new[name]!r}"


def _flat(plain: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in plain.items():
        out.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return out


def stored(out: str, recompute: bool) -> Run:
    """The run at ``out``, or the one of that name which `segment` left unfinished; its work folder is there."""
    where = partial(out) if files.exists(f"{partial(out)}/work/run.json") else out
    if not files.exists(f"{where}/work/run.json"):
        if not files.exists(f"{out}/run.json"):
            raise UserError(f"{out} is not a volseg run (no run.json in it); give a folder that volseg made")
        if not recompute:
            raise UserError(f"the work folder of {out} was cleaned: its basins must be made anew; add --recompute")
        _rebuild_work(out)
    plain = json.loads(files.read_bytes(where, "work/run.json"))
    run = Run.from_json(plain)
    if plain["keys"].get(run.first) != run.keys[run.first]:
        if not recompute or where != out:
            raise UserError(
                f"{where} was made by another version of volseg, which may have predicted otherwise: make it anew with "
                "volseg infer --overwrite, or keep a finished run's probabilities as they are with --recompute"
            )
        files.remove(f"{out}/work")
        _rebuild_work(out)
    return run


def demote(out: str) -> None:
    """The finished run at ``out`` lies at its unfinished name."""
    if partial(out) != out and files.exists(out) and not files.exists(partial(out)):
        files.move(out, partial(out))
    files.remove(f"{partial(out)}/run.json")


def _rebuild_work(out: str) -> None:
    """A cleaned run has a work folder again in which its probabilities count as done."""
    facts = json.loads(files.read_bytes(out, "run.json"))
    run = replace(Run.from_json(facts), out=out)
    _create_fragments(run)
    for i in range(len(run.predict_grid)):
        cluster.mark(out, run.first, run.keys[run.first], i, {"seconds": {}})
    files.write_bytes(out, "work/begun", b"")
    files.write_bytes(out, "work/run.json", json.dumps(run.to_json(), indent=1).encode())


def adopt(run: Run) -> None:
    """The run's folder takes another description; what that makes stale is gone."""
    old = Run.from_json(json.loads(files.read_bytes(run.out, "work/run.json")))
    for stage in {*old.keys, *run.keys}:
        if old.keys.get(stage) != run.keys.get(stage):
            files.remove(f"{run.out}/work/markers/{stage}")
    if (old.keys["fragments"], old.block, old.levels) != (run.keys["fragments"], run.block, run.levels):
        _remove_labels(run)
    if old.block != run.block:
        files.remove(f"{run.out}/work/fragments")
        _create_fragments(run)
    files.write_bytes(run.out, "work/run.json", json.dumps(run.to_json(), indent=1).encode())
