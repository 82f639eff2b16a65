"""Decoding parameters chosen against annotated instances, from a finished run's tables.

The voxels are read once, to count how basins and true objects overlap. What a candidate decides is then a renaming of
basins in that count: thousands of voxels become a few rows, and a candidate costs milliseconds.
"""

from __future__ import annotations

import io
import json
from itertools import product
from pathlib import Path

import numpy as np

from volseg import evaluate, model, pipeline, stitch, volume
from volseg.box import Box
from volseg.config import Stitch, UserError
from volseg.decide import decide, rules
from volseg.fragments import EDGE
from volseg.metrics import Contingency, foreground, instances

SEEDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975)
SIZES = (0, 100, 250, 500, 1000, 2000, 4000, 8000)
SCORES = ("pq", "sa50", "voi_split", "voi_merge", "split", "merged", "missed", "spurious")


def calibrate(run: str, truth: str, *, box: Box | None = None) -> list[dict]:
    """Rows of candidates and their scores in ``box``, best first: by PQ, then by VOI, then the nearest to the run's own.

    Each row holds ``seed``, ``min_voxels``, ``iou`` of the foreground and the instance scores; the run's own settings are
    among them, marked by ``own``. Raises `UserError` for what is no run, a cleaned run, or a truth that does not fit.
    """
    old, basins, overlap = _overlap(run, truth, box)
    own = old.config.stitch
    knobs = [own, *(own.model_copy(update={"seed": s, "min_voxels": n}) for s, n in product(SEEDS, SIZES))]
    rows = [_row(old, basins, overlap, candidate, own) for candidate in dict.fromkeys(knobs)]

    def order(row: dict) -> tuple:
        away = abs(row["seed"] - own.seed), abs(row["min_voxels"] - own.min_voxels)
        return -row["pq"], row["voi_split"] + row["voi_merge"], *away

    return sorted(rows, key=order)


def _overlap(run: str, truth: str, box: Box | None) -> tuple[pipeline.Run, stitch.Basins, Contingency]:
    """The run, its basins, and how basins (numbered from 1) overlap true objects in ``box``."""
    if not volume.exists(f"{run}/work/basins.npz"):
        raise UserError(f"{run} has no basins to decide on: give a finished run with its work folder, not a cleaned one")
    old = stored_run(run)
    box = box or Box.whole(old.shape)
    if not box.voxels or box.clip(old.shape) != box:
        raise UserError(f"box {box} is empty or leaves the run of shape {old.shape} (z y x); give one inside it")
    read = evaluate.truth_in(truth, old.shape, box)
    total = Contingency.empty()
    for i in old.grid.meeting(box):
        part = old.grid[i].intersect(box)
        basin = np.r_[-1, _stored(run, f"work/labels/{i}.npz")["basin"]] + 1
        region = np.asarray(volume.open_array(run, "work/fragments")[part.slices])
        total += Contingency.of(read(part), basin[region])
    stored = _stored(run, "work/basins.npz")
    if stored["edges"].dtype != EDGE:
        raise UserError(f"the basins of {run} are of an earlier volseg: make them anew with volseg segment {run}")
    return old, stitch.Basins(**{name: stored[name] for name in stitch.Basins.__dataclass_fields__}), total


def stored_run(run: str) -> pipeline.Run:
    """The description of a run that has its work folder."""
    return pipeline.Run.from_json(json.loads(volume.read_bytes(run, "work/run.json")))


def _stored(run: str, key: str) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(volume.read_bytes(run, key))) as file:
        return {name: file[name] for name in file.files}


def _row(run: pipeline.Run, basins: stitch.Basins, overlap: Contingency, knobs: Stitch, own: Stitch) -> dict:
    config = run.config.model_copy(update={"stitch": knobs})
    label = decide(basins, rules(config, run.voxel_size_nm))
    table = overlap.renamed(np.r_[0, label])
    found = instances(table)
    return {"seed": knobs.seed, "min_voxels": knobs.min_voxels, "own": knobs == own, "iou": foreground(table)["iou"],
            **{name: found[name] for name in SCORES}}  # fmt: skip


def into_model(path: Path, row: dict, run: pipeline.Run) -> None:
    """The model file's own settings are those of ``row``, with the run's fragments; its weights are left as they are."""
    from safetensors.numpy import load_file, save_file

    card = model.load_card(path)
    decode = dict(card["decode"])
    decode["fragments"] = run.config.fragments.model_dump(mode="json")
    decode["stitch"] = {**decode.get("stitch", {}), "seed": row["seed"], "min_voxels": row["min_voxels"]}
    partial = path.with_name(path.name + ".partial")
    save_file(load_file(path), partial, metadata={model.KEY: json.dumps({**card, "decode": decode})})
    partial.replace(path)


def table(rows: list[dict], most: int = 10) -> str:
    """The best candidates as plain text, and the run's own settings if they are not among them."""
    shown = rows[:most] + [row for row in rows[most:] if row["own"]]
    names = [name for name in rows[0] if name != "own"]
    lines = ["  ".join(f"{name:>10}" for name in names)]
    for row in shown:
        cells = (f"{row[name]:.4f}" if isinstance(row[name], float) else str(row[name]) for name in names)
        lines.append("  ".join(f"{cell:>10}" for cell in cells) + ("   <- the run's own" if row["own"] else ""))
    return "\n".join(lines)
