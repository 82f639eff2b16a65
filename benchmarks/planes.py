"""What several looks at a voxel are worth: flips of a tile, and passes over xy, xz and yz planes.

Each way predicts one crop as `volseg infer` does. Its threshold, seed level and least size are chosen on some sections, its
scores taken on others.
"""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path

import numpy as np
import tifffile

from benchmarks import report
from benchmarks.memory import find_basins
from volseg.box import Box
from volseg.config import Fragments, load
from volseg.engine import folder, pipeline
from volseg.engine.layout import Layout
from volseg.engine.run import Run
from volseg.engine.stages import stages_of
from volseg.evaluation.calibrate import MIN_VOXELS, SEEDS
from volseg.evaluation.contingency import Contingency
from volseg.evaluation.evaluate import read_truth
from volseg.evaluation.metrics import score_foreground, score_instances
from volseg.inference import model
from volseg.io import arrays, files, volume
from volseg.planning import prepare
from volseg.segmentation.heights import block_heights, seed_height
from volseg.segmentation.rules import Rules, label_basins

ALL_PLANES = 'predict.planes=["xy","xz","yz"]'
WAYS = {
    "plain": (),
    "tta 4": ("predict.tta=4",),
    "planes 3": (ALL_PLANES,),
    "tta 8": ("predict.tta=8",),
    "planes 3, tta 4": (ALL_PLANES, "predict.tta=4"),
}
THRESHOLDS = tuple(round(0.3 + 0.02 * k, 2) for k in range(21))

Sections = tuple[int, int]


def measure(image: str, truth: str, crop: str, choose: Sections, test: Sections, out: str, sets: list[str]) -> None:
    """One row for each of `WAYS`; what is chosen and tested are sections of ``image``. Kept after each run."""
    box = Box.parse(crop)
    place = Path(out)
    place.mkdir(parents=True, exist_ok=True)
    for name, path in (("image", image), ("truth", truth)):
        tifffile.imwrite(place / f"{name}.tif", volume.open(path).read(box), photometric="minisblack")
    chosen, tested = (Box((a - box.start[0], 0, 0), (b - box.start[0], *box.shape[1:])) for a, b in (choose, test))
    rows: list[dict] = []
    for way, changes in WAYS.items():
        run = str(place / f"{way.replace(', ', '-').replace(' ', '')}.volseg.zarr")
        seconds = _predict(str(place / "image.tif"), run, (*changes, *sets))
        plain = rows[0]["CPU s"] if rows else seconds
        rows.append({"way": way, "CPU s": seconds, "cost": round(seconds / plain, 1), "crop": crop,
                     **scores(run, str(place / "truth.tif"), chosen, tested)})  # fmt: skip
        report.keep("planes", rows)


def _predict(image: str, out: str, sets: tuple[str, ...]) -> float:
    """The probabilities of ``image`` are those of a new run; processor seconds, which other work does not change much.

    The stages of `volseg infer` up to the probabilities, block after block in this process: the rest is the same for all.
    """
    files.remove(out)
    config = load(sets=sets, base=model.load_card(model.shipped()).decode)
    run = prepare.from_image(volume.open(image), config, out)
    folder.begin(run, overwrite=True)
    start = time.process_time()
    for name in [*run.passes, "predict"]:
        for i in range(len(stages_of(run)[name].grid)):
            pipeline.process_block(out, run.id, name, i)
    return round(time.process_time() - start, 1)


def scores(path: str, truth: str, chosen: Box, tested: Box) -> dict:
    """Scores on ``tested`` with the threshold of the best IoU and the decision of the best PQ on ``chosen``."""
    run = Run.from_json(Layout(path).load_description())
    config, voxel_size_nm = run.config, run.voxel_size_nm
    probability = np.asarray(arrays.open_array(path, "0")[:])
    labels = {part: read_truth(truth, run.shape, part)(part) for part in (chosen, tested)}
    threshold = best_threshold(probability, config.fragments, chosen, labels[chosen])
    fragments = config.fragments.model_copy(update={"threshold": threshold})
    basins, number = find_basins(probability, fragments, voxel_size_nm)
    tables = {part: Contingency.from_labels(true, number[part.slices]) for part, true in labels.items()}

    def decided(seed: float, min_voxels: int, part: Box) -> Contingency:
        stitch = config.stitch.model_copy(update={"seed": seed, "min_voxels": min_voxels})
        rules = Rules.from_config(config.model_copy(update={"fragments": fragments, "stitch": stitch}), voxel_size_nm)
        return tables[part].relabeled(np.r_[0, label_basins(basins, rules)])

    own = config.stitch
    tried = [(own.seed, own.min_voxels), *product((seed for seed in SEEDS if seed > own.seed_low), MIN_VOXELS)]
    seed, min_voxels = max(tried, key=lambda each: score_instances(decided(*each, chosen)).pq)
    table = decided(seed, min_voxels, tested)
    instances = score_instances(table)
    return {
        "IoU": round(score_foreground(table).iou, 4),
        **{name: round(getattr(instances, name), 4) for name in ("pq", "sa50", "voi_split", "voi_merge")},
        "threshold": threshold,
        "seed": seed,
        "min_voxels": min_voxels,
        "PQ where chosen": round(score_instances(decided(seed, min_voxels, chosen)).pq, 4),
    }


def best_threshold(probability: np.ndarray, settings: Fragments, part: Box, truth: np.ndarray) -> float:
    """The threshold of smoothed mask probability with the best foreground IoU in ``part``."""
    only_mask = settings.model_copy(update={
        "height": "probability", "contour": 0.0, "distance": 0, "distance_nm": 0.0, "threshold": THRESHOLDS[0],
    })  # fmt: skip
    shape = probability.shape[1:]
    height = block_heights(probability, Box.from_shape(shape), shape, only_mask)[1:-1, 1:-1, 1:-1][part.slices]

    def iou(threshold: float) -> float:
        mask = height <= seed_height(threshold, only_mask)
        return np.count_nonzero(mask & (truth > 0)) / max(1, np.count_nonzero(mask | (truth > 0)))

    return max(THRESHOLDS, key=iou)
