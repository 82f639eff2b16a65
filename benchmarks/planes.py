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
from volseg.box import Blocks, Box, VoxelSize
from volseg.config import Config, Fragments, load
from volseg.engine import folder, pipeline
from volseg.engine.layout import Layout
from volseg.engine.stages import stages_of
from volseg.evaluation import evaluate
from volseg.evaluation.calibrate import MIN_VOXELS, SEEDS
from volseg.evaluation.contingency import Contingency
from volseg.evaluation.metrics import score_foreground, score_instances
from volseg.inference import model
from volseg.io import arrays, files, volume
from volseg.planning import prepare as describe
from volseg.segmentation.basins import watershed_block
from volseg.segmentation.heights import block_heights, seed_height
from volseg.segmentation.rules import Rules, label_basins
from volseg.segmentation.stitch import Basins, gather, link

THREE = 'predict.planes=["xy","xz","yz"]'
WAYS = {"plain": (), "tta 4": ("predict.tta=4",), "planes 3": (THREE,), "tta 8": ("predict.tta=8",),
        "planes 3, tta 4": (THREE, "predict.tta=4")}  # fmt: skip
Sections = tuple[int, int]
THRESHOLDS = tuple(round(0.3 + 0.02 * k, 2) for k in range(21))


def measure(image: str, truth: str, crop: str, choose: Sections, test: Sections, out: str, sets: list[str]) -> None:
    """One row for each of `WAYS`; what is chosen and tested are sections of ``image``. Kept after each run."""
    box = Box.parse(crop)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in (("image", image), ("truth", truth)):
        tifffile.imwrite(folder / f"{name}.tif", volume.open(path).read(box), photometric="minisblack")
    chosen, tested = (Box((a - box.start[0], 0, 0), (b - box.start[0], *box.shape[1:])) for a, b in (choose, test))
    rows = []
    for way, changes in WAYS.items():
        run = str(folder / f"{way.replace(', ', '-').replace(' ', '')}.volseg.zarr")
        seconds = _predict(str(folder / "image.tif"), run, (*changes, *sets))
        plain = rows[0]["CPU s"] if rows else seconds
        rows.append({"way": way, "CPU s": seconds, "cost": round(seconds / plain, 1), "crop": crop,
                     **scores(run, str(folder / "truth.tif"), chosen, tested)})  # fmt: skip
        report.keep("planes", rows)


def _predict(image: str, run: str, sets: tuple[str, ...]) -> float:
    """The probabilities of ``image`` are those of a new run; processor seconds, which other work does not change much.

    The stages of `volseg infer` up to the probabilities, block after block in this process: the rest is the same for all.
    """
    files.remove(run)
    config = load(sets=sets, base=model.load_card(model.shipped()).decode)
    told = describe.from_image(volume.open(image), config, run)
    folder.begin(told, overwrite=True)
    start = time.process_time()
    for name in [*told.passes, "predict"]:
        for i in range(len(stages_of(told)[name].grid)):
            pipeline.process_block(run, told.id, name, i)
    return round(time.process_time() - start, 1)


def scores(run: str, truth: str, chosen: Box, tested: Box) -> dict:
    """Scores on ``tested`` with the threshold of the best IoU and the decision of the best PQ on ``chosen``."""
    facts = Layout(run).load_description()
    config, nm = Config(**facts["config"]), tuple(facts["voxel_size_nm"])
    probability = np.asarray(arrays.open_array(run, "0")[:])
    true = {part: evaluate.read_truth(truth, probability.shape[1:], part)(part) for part in (chosen, tested)}
    knobs = config.fragments.model_copy(
        update={"threshold": threshold(probability, config.fragments, chosen, true[chosen])}
    )
    basins, basin = cut(probability, knobs, nm)
    tables = {part: Contingency.from_labels(labels, basin[part.slices]) for part, labels in true.items()}

    def labeled(seed: float, least: int, part: Box) -> Contingency:
        stitch = config.stitch.model_copy(update={"seed": seed, "min_voxels": least})
        both = config.model_copy(update={"fragments": knobs, "stitch": stitch})
        return tables[part].relabeled(np.r_[0, label_basins(basins, Rules.from_config(both, nm))])

    own = config.stitch
    ways = [(own.seed, own.min_voxels), *product((seed for seed in SEEDS if seed > own.seed_low), MIN_VOXELS)]
    seed, least = max(ways, key=lambda way: score_instances(labeled(*way, chosen)).pq)
    found = score_instances(table := labeled(seed, least, tested))
    return {
        "IoU": round(score_foreground(table).iou, 4),
        **{name: round(getattr(found, name), 4) for name in ("pq", "sa50", "voi_split", "voi_merge")},
        "threshold": knobs.threshold, "seed": seed, "min_voxels": least,
        "PQ where chosen": round(score_instances(labeled(seed, least, chosen)).pq, 4),
    }  # fmt: skip


def threshold(probability: np.ndarray, knobs: Fragments, part: Box, truth: np.ndarray) -> float:
    """The threshold of smoothed mask probability with the best foreground IoU in ``part``."""
    only_mask = knobs.model_copy(update={
        "height": "probability", "contour": 0.0, "distance": 0, "distance_nm": 0.0, "threshold": THRESHOLDS[0],
    })  # fmt: skip
    shape = probability.shape[1:]
    height = block_heights(probability, Box.from_shape(shape), shape, only_mask)[1:-1, 1:-1, 1:-1][part.slices]

    def iou(share: float) -> float:
        mask = height <= seed_height(share, only_mask)
        return np.count_nonzero(mask & (truth > 0)) / max(1, np.count_nonzero(mask | (truth > 0)))

    return max(THRESHOLDS, key=iou)


def cut(probability: np.ndarray, knobs: Fragments, voxel_size_nm: VoxelSize) -> tuple[Basins, np.ndarray]:
    """Basins of a volume in memory, and for each voxel 1 + the number of its basin (0: none)."""
    shape = probability.shape[1:]
    box = Box.from_shape(shape)
    height = block_heights(probability, box, shape, knobs, voxel_size_nm)
    region, table = watershed_block(height, probability[0], box, shape, knobs.connectivity)
    basins, (number,) = gather([table], [link(0, lambda _: table, Blocks(shape, shape))])
    return basins, (np.r_[-1, number] + 1)[region]
