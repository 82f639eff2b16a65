"""Decoding parameters chosen against annotated instances, from a finished run's tables.

The voxels are read once, to count how basins and true objects overlap. What a candidate decides is then a renaming of
basins in that count: thousands of voxels become a few rows, and a candidate costs milliseconds. Only rules of ``[stitch]``
can be searched so: ``[fragments]`` (threshold, contour, smooth, distance) makes the basins, and each of its values needs
``volseg segment`` and a calibration of its own.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np

from volseg.box import Box
from volseg.config import Stitch
from volseg.engine.run import Run
from volseg.errors import UserError
from volseg.evaluation import evaluate
from volseg.evaluation.metrics import Contingency, foreground, instances
from volseg.inference import model
from volseg.io import arrays, files
from volseg.segmentation import holes, stitch
from volseg.segmentation.edges import EDGE
from volseg.segmentation.rules import Rules, components, label_components

SEEDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975)
DEPTHS = (0.0, 0.02, 0.05, 0.1)
MEANS = (0.0, 0.5, 0.6, 0.7, 0.8)  # only those below the seed level: no border's mean is higher than its lowest saddle
SIZES = (0, 100, 250, 500, 1000, 2000, 4000, 8000)
KNOBS = ("seed", "persistence", "join_mean", "min_voxels", "seed_low")  # the last as the run has it, where it can be
SCORES = ("pq", "sa50", "voi_split", "voi_merge", "split", "merged", "missed", "spurious")


def calibrate(run: str, truth: str, *, box: Box | None = None) -> list[dict]:
    """Rows of candidates and their scores in ``box``, best first: by PQ, then by VOI, then the nearest to the run's own.

    Each row holds the `KNOBS`, ``iou`` of the foreground and the instance scores; the run's own settings and volseg's
    defaults are among them, marked by ``own`` and ``default``. Raises `UserError` for what is no run, a cleaned run, or a
    truth that does not fit.
    """
    old, basins, outside, overlap = _overlap(run, truth, box)
    own = old.config.stitch
    rows = list(_rows(old, basins, outside, overlap, candidates(own)))

    def order(row: dict) -> tuple:
        away = (abs(row[name] - getattr(own, name)) for name in KNOBS)
        return -row["pq"], row["voi_split"] + row["voi_merge"], *away

    return sorted(rows, key=order)


def candidates(own: Stitch) -> list[Stitch]:
    """What is tried, each once: the run's own settings, the defaults, and all combinations of the lists above."""
    low = own.seed_low
    steps = ((s, d, m, n, low * (low < s)) for s, d, m, n in product(SEEDS, DEPTHS, MEANS, SIZES) if m < s)
    tried = (own.model_copy(update=dict(zip(KNOBS, step, strict=True))) for step in steps)
    return list(dict.fromkeys([own, _default(own), *tried]))


def _default(own: Stitch) -> Stitch:
    """The run's own settings, with volseg's defaults for the `KNOBS`."""
    return own.model_copy(update={name: getattr(Stitch(), name) for name in KNOBS})


def _overlap(run: str, truth: str, box: Box | None) -> tuple[Run, stitch.Basins, holes.Holes | None, Contingency]:
    """The run, its basins, where holes are filled its voids, and how these (from 1) overlap true objects in ``box``."""
    if not files.exists(f"{run}/work/basins.npz"):
        raise UserError(
            f"{run} has no basins to decide on: give a finished run with its work folder, not cleaned nor stitched by a "
            f"tree (volseg segment {run} --set stitch.reduce=flat makes them in one process)"
        )
    old = stored_run(run)
    box = box or Box.from_shape(old.shape)
    if not box.voxels or box.clip(old.shape) != box:
        raise UserError(f"box {box} is empty or leaves the run of shape {old.shape} (z y x); give one inside it")
    read = evaluate.truth_in(truth, old.shape, box)
    stored = _stored(run, "work/basins.npz")
    if stored["edges"].dtype != EDGE or (old.fills and not files.exists(f"{run}/work/voids.npz")):
        raise UserError(f"the basins of {run} are of an earlier volseg: make them anew with volseg segment {run}")
    basins = stitch.Basins(**{name: stored[name] for name in stitch.Basins.__dataclass_fields__})
    total = Contingency.empty()
    for i in old.grid.overlapping(box):
        part = old.grid[i].intersect(box)
        total += Contingency.of(read(part), _numbered(run, old, i, part, basins.minimum.size))
    outside = holes.Holes(**_stored(run, "work/voids.npz")) if old.fills else None
    return old, basins, outside, total


def _numbered(path: str, run: Run, i: int, part: Box, basins: int) -> np.ndarray:
    """The basin (from 1) of each voxel of a part of block ``i``, 0 outside the mask; where holes are filled, there its void,
    numbered after the ``basins``."""
    regions, of = arrays.open_array(path, "work/fragments"), _stored(path, f"work/labels/{i}.npz")
    if not run.fills:
        return np.r_[0, 1 + of["basin"]][np.asarray(regions[part.slices])]
    place = holes.number_holes(np.asarray(regions[run.grid[i].slices]))[part.slices_within(run.grid[i])]
    return np.r_[0, 1 + of["basin"], 1 + basins + of["void"]][place]


def stored_run(run: str) -> Run:
    """The description of a run that has its work folder."""
    return Run.from_json(json.loads(files.read_bytes(run, "work/run.json")))


def _stored(run: str, key: str) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(files.read_bytes(run, key))) as file:
        return {name: file[name] for name in file.files}


def _rows(
    run: Run, basins: stitch.Basins, outside: holes.Holes | None, overlap: Contingency, tried: list[Stitch]
) -> Iterator[dict]:
    """A row for each candidate. Those that differ in sizes alone share components; those that decide alike, a score."""
    joined: dict[Rules, np.ndarray] = {}
    scored: dict[bytes, dict] = {}
    for knobs in tried:
        rule = Rules.from_config(run.config.model_copy(update={"stitch": knobs}), run.voxel_size_nm)
        joins = Rules(rule.seed_height, rule.persistence, rule.join_height, low_height=rule.low_height)
        if joins not in joined:
            joined = {joins: components(basins, joins)}
        label = label_components(basins, rule, joined[joins], outside)
        key = label.tobytes()
        if key not in scored:
            scored[key] = _scores(overlap.renamed(np.r_[0, label]))
        marks = {"own": knobs == run.config.stitch, "default": knobs == _default(run.config.stitch)}
        yield {name: getattr(knobs, name) for name in KNOBS} | marks | scored[key]


def _scores(table: Contingency) -> dict:
    found = instances(table)
    return {"iou": foreground(table)["iou"], **{name: found[name] for name in SCORES}}


def into_model(path: Path, row: dict, run: Run) -> None:
    """The model file's own settings are those of ``row``, the rest as in the run; its weights are left as they are."""
    card = model.load_card(path)
    decode = dict(card.decode)
    decode["fragments"] = run.config.fragments.model_dump(mode="json")
    decode["stitch"] = run.config.stitch.model_dump(mode="json", exclude={"reduce"}) | {
        name: row[name] for name in KNOBS
    }
    model.write_card(path, card.changed(decode=decode))


def table(rows: list[dict], most: int = 10) -> str:
    """The best candidates as plain text, the first of those that score alike; the run's own settings and the defaults."""
    first: dict[tuple, dict] = {}
    for row in rows:
        first.setdefault(tuple(row[name] for name in ("iou", *SCORES)), row)
    best = list(first.values())[:most]
    shown = best + [row for row in rows if (row["own"] or row["default"]) and row not in best]
    marks = {"own": "the run's own", "default": "the defaults"}
    names = [name for name in rows[0] if name not in marks]
    lines = ["  ".join(f"{name:>11}" for name in names)]
    for row in shown:
        cells = (f"{row[name]:.4f}" if isinstance(row[name], float) else str(row[name]) for name in names)
        is_ = [f"   <- {says}" for mark, says in marks.items() if row[mark]]
        lines.append("  ".join(f"{cell:>11}" for cell in cells) + "".join(is_))
    return "\n".join(lines)
