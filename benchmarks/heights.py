"""What the watershed should follow: each height on stored probabilities, calibrated on one part, scored on another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks import report
from volseg.box import Box, VoxelSize
from volseg.config import Fragments
from volseg.evaluation import evaluate
from volseg.evaluation.calibrate import SCORES
from volseg.evaluation.contingency import Contingency
from volseg.evaluation.metrics import score_foreground, score_instances, score_touching
from volseg.io import arrays
from volseg.segmentation import stitch
from volseg.segmentation.basins import watershed_block
from volseg.segmentation.heights import block_heights, height_difference, seed_height
from volseg.segmentation.rules import Rules, label_basins

SEEDS = (0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9)
PERSISTENCE = (0.0, 0.1)
SIZES = (250, 1000, 4000, 8000)
FAR_NM = 100  # up to where distances count
HEIGHTS = {
    "probability": {"height": "probability"},
    "contour": {"height": "contour"},
    "distance": {"height": "distance", "distance": 0, "distance_nm": FAR_NM},
    "head": {"height": "head"},
}


@dataclass(frozen=True)
class Part:
    """A box of a run's probabilities, cut as if it were a whole volume, and its true labels."""

    probability: np.ndarray
    truth: np.ndarray
    near: np.ndarray
    knobs: dict
    voxel_size_nm: VoxelSize


@dataclass(frozen=True)
class Decision:
    """A row of the grid that is searched, and the label of basins 0 (none), 1, 2, .. that follows from it."""

    seed: float
    persistence: float
    keep_unseeded: bool
    min_voxels: int
    label: np.ndarray


def measure(run: str, truth: str, box: str, calibrate: tuple[str, str, str], name: str) -> None:
    """One row for each height that the run's channels allow: what calibration chose, and its scores on ``box``."""
    scored, chosen = part(run, truth, box), part(*calibrate)
    rows = []
    for label, change in HEIGHTS.items():
        if change["height"] == "head" and scored.probability.shape[0] < 3:
            continue
        tried = [(_order(table), decision) for decision, table in decisions(chosen, change)]
        best = min(tried, key=lambda one: one[0])[1]
        table = next(table for decision, table in decisions(scored, change, best))
        rows.append({"height": label, "seed": best.seed, "persistence": best.persistence, "keep unseeded": best.keep_unseeded,
                     "min voxels": best.min_voxels, **scores(table, scored.near)})  # fmt: skip
    report.keep(f"heights-{name}", rows)


def part(run: str, truth: str, box: str) -> Part:
    """The voxels of a box."""
    facts = json.loads(Path(run, "run.json").read_text())
    stored, at = arrays.open_array(run, "0"), Box.parse(box)
    known = {key: value for key, value in facts["config"]["fragments"].items() if key in Fragments.model_fields}
    labels = evaluate.read_truth(truth, stored.shape[1:], at)(at)
    near = evaluate.find_touching(lambda _: labels, [at], at)
    return Part(np.asarray(stored[(slice(None), *at.slices)]), labels, near, known, tuple(facts["voxel_size_nm"]))


def decisions(of: Part, change: dict, only: Decision | None = None) -> Iterator[tuple[Decision, Contingency]]:
    """Each row of the grid, or that of ``only``, and how truth and decided labels overlap in a part."""
    knobs = Fragments(**{**of.knobs, **change})
    region, basins = cut(of, knobs)
    table = Contingency.from_labels(of.truth, region)
    grid = product(SEEDS, PERSISTENCE, (False, True))
    for seed, share, keep in [(only.seed, only.persistence, only.keep_unseeded)] if only else grid:
        level = seed_height(seed, knobs, of.voxel_size_nm)
        depth = height_difference(share, knobs, of.voxel_size_nm)
        label = label_basins(basins, Rules(level, depth, keep_unseeded=keep))
        voxels = np.bincount(label, weights=basins.voxels, minlength=1)
        for size in [only.min_voxels] if only else SIZES:
            kept = np.r_[0, np.where(voxels[label] >= size, label, 0)].astype(np.uint64)
            yield Decision(seed, share, keep, size, kept), table.relabeled(kept)


def cut(of: Part, knobs: Fragments) -> tuple[np.ndarray, stitch.Basins]:
    """The basin (from 1) of each voxel, and the tables."""
    whole, shape = Box.from_shape(of.truth.shape), of.truth.shape
    height = block_heights(of.probability, whole, shape, knobs, of.voxel_size_nm)
    mass = np.ascontiguousarray(of.probability[0])
    region, table = watershed_block(height, mass, whole, shape, knobs.connectivity)
    basins, (basin_of,) = stitch.gather([table], [stitch.Links(np.empty((0, 2), np.int64), table.crossing_edges)])
    return np.r_[0, basin_of + 1][region], basins


def _order(table: Contingency) -> tuple[float, float]:
    found = score_instances(table)
    return -found.pq, found.voi_split + found.voi_merge


def scores(table: Contingency, near: np.ndarray) -> dict:
    """The columns of a row."""
    found, told = score_instances(table), score_touching(table, near)
    row = {"IoU": score_foreground(table).iou, **{name: getattr(found, name) for name in SCORES},
           "objects": found.truth_objects, "pairs": told.pairs, "pair recall": told.pair_recall,
           "pairs merged": told.pairs_merged, "split share": told.split_share}  # fmt: skip
    return {name: round(value, 4) for name, value in row.items()}
