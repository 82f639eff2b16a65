"""Synthetic volumes that no model learnt from: how many of the objects that touch come apart, and how many are split."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks import report
from benchmarks.trial import volseg
from volseg.box import Box
from volseg.evaluation import calibrate
from volseg.evaluation.contingency import Contingency
from volseg.evaluation.metrics import score_instances, score_touching, touching_pairs
from volseg.io import volume

MIN_WHOLE_VOXELS = 2000  # voxels; an object of fewer is a sliver that the volume's border cuts off
SUMS = (
    "pairs",
    "separated",
    "whole pairs",
    "separated whole",
    "objects",
    "split",
    "merged",
    "missed",
    "spurious",
    "whole at best",
)


def measure(
    seeds: tuple[int, ...], shape: str, config: str, model: str, sets: tuple[str, ...], out: str, name: str
) -> None:
    """A row for each volume, and one for all: pairs of touching objects, those told apart, and objects in pieces."""
    rows = [_row(seed, shape, config, model, sets, Path(out)) for seed in seeds]
    total = {column: sum(row[column] for row in rows) for column in SUMS}
    report.keep(f"touching-{name}", [_shares(row) for row in [*rows, {"seed": "all", **total}]])


def _row(seed: int, shape: str, config: str, model: str, sets: tuple[str, ...], out: Path) -> dict:
    """The counts of one volume, made if need be and segmented anew."""
    image, run = out / f"{seed}-{shape.replace(',', '-')}.zarr", out / f"{seed}.volseg.zarr"
    out.mkdir(parents=True, exist_ok=True)
    if not image.exists():
        volseg("synth", str(image), "--shape", shape, "--seed", str(seed))
    options = [
        "--config",
        config,
        *(["--model", model] if model else []),
        *(part for text in sets for part in ("--set", text)),
    ]
    volseg("infer", str(image), "--out", str(run), "--overwrite", *options)
    truth, pred = (_labels(path, name) for path, name in ((image, "labels/truth"), (run, "labels/instances/0")))
    best = calibrate.best_joins(calibrate.basin_overlap(run, f"{image}/labels/truth"))
    return {"seed": seed, **_counts(truth, pred, best)}


def _labels(path: Path, name: str) -> np.ndarray:
    stored = volume.open(str(path), dataset=name)
    return stored.read(Box.from_shape(stored.shape))


def _counts(truth: np.ndarray, pred: np.ndarray, best: Contingency) -> dict:
    """What `SUMS` names, of one volume; a pair is whole where both objects have `MIN_WHOLE_VOXELS` voxels.

    ``best``: the overlap where each basin is part of the object that it overlaps most, as no rule on joins can beat.
    """
    table, touching = Contingency.from_labels(truth, pred), touching_pairs(truth)
    ids, sizes = np.unique(truth, return_counts=True)
    whole = touching[(sizes[np.searchsorted(ids, touching)] >= MIN_WHOLE_VOXELS).all(axis=1)]
    pairs, scores = [score_touching(table, chosen) for chosen in (touching, whole)], score_instances(table)
    values = [n for scored in pairs for n in (scored.pairs, scored.separated)]
    values += [getattr(scores, name) for name in ("truth_objects", "split", "merged", "missed", "spurious")]
    values.append(score_touching(best, whole).separated)
    return dict(zip(SUMS, values, strict=True))


def _shares(row: dict) -> dict:
    return {**row, "pair recall": round(row["separated"] / max(1, row["pairs"]), 3),
            "of whole": round(row["separated whole"] / max(1, row["whole pairs"]), 3),
            "of whole at best": round(row["whole at best"] / max(1, row["whole pairs"]), 3),
            "split share": round(row["split"] / max(1, row["objects"]), 4)}  # fmt: skip
