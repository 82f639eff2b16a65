"""What the watershed should follow: each height on stored probabilities, calibrated on one part, scored on another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from benchmarks import report
from benchmarks.memory import find_basins
from volseg.box import Box, VoxelSize
from volseg.config import Fragments
from volseg.engine.finished import open_run
from volseg.evaluation.calibrate import SCORES
from volseg.evaluation.contingency import Contingency
from volseg.evaluation.evaluate import read_truth
from volseg.evaluation.metrics import score_foreground, score_instances, score_touching, touching_pairs
from volseg.segmentation.heights import height_difference, seed_height
from volseg.segmentation.rules import Rules, label_basins

SEEDS = (0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9)
PERSISTENCES = (0.0, 0.1)
MIN_VOXELS = (250, 1000, 4000, 8000)
MAX_DISTANCE_NM = 100  # up to where distances count
HEIGHTS = {
    "probability": {"height": "probability"},
    "contour": {"height": "contour"},
    "distance": {"height": "distance", "distance": 0, "distance_nm": MAX_DISTANCE_NM},
    "head": {"height": "head"},
}


@dataclass(frozen=True)
class Part:
    """A box of a run's probabilities, cut as if it were a whole volume, its true labels, and which of them touch."""

    probability: np.ndarray
    truth: np.ndarray
    touching: np.ndarray
    settings: dict
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
    scored, calibrated = read_part(run, truth, box), read_part(*calibrate)
    rows = []
    for label, change in HEIGHTS.items():
        if change["height"] == "head" and scored.probability.shape[0] < 3:
            continue
        tried = [(_rank(table), decision) for decision, table in decisions(calibrated, change)]
        best = min(tried, key=lambda pair: pair[0])[1]
        table = next(table for _, table in decisions(scored, change, best))
        rows.append({"height": label, "seed": best.seed, "persistence": best.persistence, "keep unseeded": best.keep_unseeded,
                     "min voxels": best.min_voxels, **scores(table, scored.touching)})  # fmt: skip
    report.keep(f"heights-{name}", rows)


def read_part(run: str, truth: str, box: str) -> Part:
    """The voxels of a box."""
    finished, region = open_run(run), Box.parse(box)
    probability = np.asarray(finished.probabilities[(slice(None), *region.slices)])
    labels = read_truth(truth, finished.shape, region)(region)
    settings = finished.config.fragments.model_dump()
    return Part(probability, labels, touching_pairs(labels), settings, finished.voxel_size_nm)


def decisions(part: Part, change: dict, only: Decision | None = None) -> Iterator[tuple[Decision, Contingency]]:
    """Each row of the grid, or that of ``only``, and how truth and decided labels overlap in a part."""
    settings = Fragments(**{**part.settings, **change})
    basins, number = find_basins(part.probability, settings, part.voxel_size_nm)
    table = Contingency.from_labels(part.truth, number)
    grid = product(SEEDS, PERSISTENCES, (False, True))
    for seed, share, keep in [(only.seed, only.persistence, only.keep_unseeded)] if only else grid:
        level = seed_height(seed, settings, part.voxel_size_nm)
        persistence = height_difference(share, settings, part.voxel_size_nm)
        label = label_basins(basins, Rules(level, persistence, keep_unseeded=keep))
        voxels = np.bincount(label, weights=basins.voxels, minlength=1)
        for size in [only.min_voxels] if only else MIN_VOXELS:
            kept = np.r_[0, np.where(voxels[label] >= size, label, 0)].astype(np.uint64)
            yield Decision(seed, share, keep, size, kept), table.relabeled(kept)


def _rank(table: Contingency) -> tuple[float, float]:
    instances = score_instances(table)
    return -instances.pq, instances.voi_split + instances.voi_merge


def scores(table: Contingency, touching: np.ndarray) -> dict:
    """The columns of a row."""
    instances, pairs = score_instances(table), score_touching(table, touching)
    row = {"IoU": score_foreground(table).iou, **{name: getattr(instances, name) for name in SCORES},
           "objects": instances.truth_objects, "pairs": pairs.pairs, "pair recall": pairs.pair_recall,
           "pairs merged": pairs.pairs_merged, "split share": pairs.split_share}  # fmt: skip
    return {name: round(value, 4) for name, value in row.items()}
