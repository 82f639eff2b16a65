"""The decoding that is best on held-out sections: smoothing and threshold, then seeds and sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from scipy import ndimage

from volseg.box import Box, Triple
from volseg.config import Config, Fragments, Train
from volseg.evaluation import metrics
from volseg.segmentation import stitch
from volseg.segmentation.basins import watershed_block
from volseg.segmentation.edges import EDGE
from volseg.segmentation.heights import block_heights
from volseg.segmentation.rules import Rules, label_basins
from volseg.training.samples import Source
from volseg.training.targets import UNLABELED
from volseg.training.validate import plane_logits

THRESHOLDS = np.arange(20, 81, 2) / 100
PASSES = (0, 1, 2)  # of the smoothing filter, along z and in the plane
SEEDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
SIZES = (0, 100, 250, 500, 1000, 2000)
GAIN_IOU, GAIN_PQ = 0.001, 0.005  # a setting stays as it is unless another is better by this


@dataclass(frozen=True, eq=False)
class Slab:
    """Consecutive held-out sections: probabilities uint8 (heads; z y x) as a run stores them, and the truth."""

    chance: np.ndarray
    labels: np.ndarray
    source: int  # the number of the volume that it is of
    share: float
    voxel_size_nm: Triple = (1, 1, 1)


@dataclass(frozen=True)
class Decoding:
    """Decoding settings and, where they were chosen on held-out sections, their scores there.

    ``curve`` is the IoU at each of `THRESHOLDS`; ``rows`` the candidates of seed and size with their ``pq``, best first.
    """

    threshold: float
    smooth: Triple
    seed: float
    min_voxels: int
    iou: float | None = None
    pq: float | None = None
    curve: tuple[float, ...] = ()
    rows: tuple[dict, ...] = ()

    def settings(self) -> dict:
        """The tables of a config, as a model's card stores them."""
        return {
            "fragments": {"threshold": self.threshold, "smooth": list(self.smooth)},
            "stitch": {"seed": self.seed, "min_voxels": self.min_voxels},
        }

    def scores(self) -> dict:
        """What a model's card says of how good it was: empty where nothing was held out."""
        if self.iou is None:
            return {}
        return {"threshold": self.threshold, "iou": self.iou, "pq": self.pq}


def calibrate(network: torch.nn.Module, sources: list[Source], config: Config) -> Decoding:
    """The decoding that is best on the held-out sections.

    First smoothing and threshold, by the IoU of the foreground; then seed level and smallest object, by the PQ of the
    objects that basins and decisions make of each slab of consecutive sections. Sources count by their ``share``. A
    setting of ``config`` stays where no other gains at least `GAIN_IOU` or `GAIN_PQ`: a dozen sections do not tell more.
    Without held-out sections, all stays; the threshold is then that of ``config``, 0.5 by default.
    """
    own = Decoding(config.fragments.threshold, config.fragments.smooth, config.stitch.seed, config.stitch.min_voxels)
    found = [slab for i, source in enumerate(sources) for slab in slabs(network, source, i, config.train)]
    if not found:
        return own
    smooth_, threshold, curve = best_mask(found, config.fragments)
    if not curve.any():
        return own
    chosen = config.fragments.model_copy(update={"smooth": smooth_, "threshold": threshold})
    rows = objects(found, config.model_copy(update={"fragments": chosen}))
    return Decoding(
        threshold, smooth_, rows[0]["seed"], rows[0]["min_voxels"], iou=float(curve.max()), pq=rows[0]["pq"],
        curve=tuple(curve.tolist()), rows=tuple(rows),
    )  # fmt: skip


def slabs(network: torch.nn.Module, source: Source, number: int, knobs: Train) -> Iterator[Slab]:
    """The held-out sections of a source in runs of consecutive ones."""
    held = np.array(source.held, int)
    for run in np.split(held, np.flatnonzero(np.diff(held) > 1) + 1) if held.size else []:
        logits = torch.stack([plane_logits(network, source, z, knobs) for z in run.tolist()], dim=1)
        chance = np.floor(logits.sigmoid().numpy() * np.float32(255) + np.float32(0.5)).astype(np.uint8)
        yield Slab(chance, source.labels[run], number, source.share, source.voxel_size_nm or (1, 1, 1))


def best_mask(slabs: list[Slab], own: Fragments) -> tuple[Triple, float, np.ndarray]:
    """Smoothing passes, threshold, and the mean IoU over sources at each of `THRESHOLDS` with that smoothing."""
    deep = any(len(slab.labels) > 1 for slab in slabs)
    candidates = [own.smooth, *((z, n, n) for z, n in product(PASSES if deep else (own.smooth[0],), PASSES))]
    best, curve = own.smooth, _curve(slabs, own.smooth)
    least = curve.max() + GAIN_IOU
    for passes in dict.fromkeys(candidates[1:]):
        other = _curve(slabs, passes)
        if other.max() >= max(least, curve.max()):
            best, curve = passes, other
    return best, float(THRESHOLDS[int(curve.argmax())]), curve


def _curve(slabs: list[Slab], passes: Triple) -> np.ndarray:
    """The IoU at each of `THRESHOLDS`: pooled over the slabs of a source, then the mean over sources by their share."""
    total, weight = np.zeros(len(THRESHOLDS)), 0.0
    for number in sorted({slab.source for slab in slabs}):
        here = [slab for slab in slabs if slab.source == number]
        chances = (smooth(slab.chance[0].astype(np.float32) / 255, passes) for slab in here)
        pooled = sum(overlaps(chance, slab.labels) for chance, slab in zip(chances, here, strict=True))
        total, weight = total + here[0].share * pooled[0] / np.maximum(1, pooled[1]), weight + here[0].share
    return total / weight


def smooth(chance: np.ndarray, passes: Triple) -> np.ndarray:
    """``chance`` (z, y, x) after that many passes of the [1 2 1] / 4 filter along each axis."""
    for axis, count in enumerate(passes):
        for _ in range(count):
            chance = ndimage.convolve1d(chance, [0.25, 0.5, 0.25], axis=axis, mode="nearest")
    return chance


def overlaps(chance: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Voxels in both and in either of truth and ``chance >= t``, for each t of `THRESHOLDS`: (2, n); unlabeled ones not."""
    valid = labels != UNLABELED
    truth, level = labels[valid] != 0, np.searchsorted(THRESHOLDS, chance[valid] + 1e-6, side="right")
    true, false = (np.bincount(level[side], minlength=len(THRESHOLDS) + 1) for side in (truth, ~truth))
    reached_true, reached_false = (n[::-1].cumsum()[::-1][1:] for n in (true, false))
    return np.stack([reached_true, truth.sum() + reached_false])


def objects(slabs: list[Slab], config: Config) -> list[dict]:
    """Rows of ``seed``, ``min_voxels`` and the ``pq`` of the objects that they give, best first.

    The settings of ``config`` stand first unless another gains at least `GAIN_PQ`.
    """
    own = (config.stitch.seed, config.stitch.min_voxels)
    cut = [_cut(slab, config.fragments) for slab in slabs]
    rows = []
    for seed, size in dict.fromkeys([own, *product((s for s in SEEDS if s > config.stitch.seed_low), SIZES)]):
        knobs = config.stitch.model_copy(update={"seed": seed, "min_voxels": size})
        rows.append(
            {"seed": seed, "min_voxels": size, "pq": _quality(slabs, cut, config.model_copy(update={"stitch": knobs}))}
        )
    best = sorted(rows, key=lambda row: (-row["pq"], abs(row["seed"] - own[0]), abs(row["min_voxels"] - own[1])))
    stays = best[0]["pq"] < rows[0]["pq"] + GAIN_PQ
    return [rows[0], *(row for row in best if row is not rows[0])] if stays else best


def _cut(slab: Slab, knobs: Fragments) -> tuple[stitch.Basins, metrics.Contingency]:
    """The basins of a slab, as a run of one block would cut them, and how they (from 1) overlap true objects."""
    shape = slab.labels.shape
    box = Box.from_shape(shape)
    height = block_heights(slab.chance, box, shape, knobs, slab.voxel_size_nm)
    region, table = watershed_block(height, np.ascontiguousarray(slab.chance[0]), box, shape, knobs.connectivity)
    nothing = stitch.Links(np.empty((0, 2), np.int64), np.empty(0, EDGE))
    whole, (basin,) = stitch.gather([table], [nothing])
    valid = slab.labels != UNLABELED
    return whole, metrics.Contingency.of(slab.labels[valid], np.r_[0, basin + 1][region[valid]])


def _quality(slabs: list[Slab], cut: list, config: Config) -> float:
    """PQ of what ``config`` decides, the slabs of a source taken together, the mean over sources by their share."""
    tables: dict[int, metrics.Contingency] = {}
    for i, (slab, (whole, overlap)) in enumerate(zip(slabs, cut, strict=True)):
        label = label_basins(whole, Rules.from_config(config, slab.voxel_size_nm))
        table = _apart(overlap.renamed(np.r_[0, label]), i)
        tables[slab.source] = tables.get(slab.source, metrics.Contingency.empty()) + table
    shares = {slab.source: slab.share for slab in slabs}
    found = {number: metrics.instances(table)["pq"] for number, table in tables.items()}
    return sum(shares[n] * pq for n, pq in found.items()) / sum(shares.values())


def _apart(table: metrics.Contingency, number: int) -> metrics.Contingency:
    """``table`` with ids that no other number gives."""
    truth, pred = (np.where(ids > 0, ids + np.uint64(number << 40), ids) for ids in (table.truth, table.pred))
    return metrics.Contingency(truth, pred, table.counts)
