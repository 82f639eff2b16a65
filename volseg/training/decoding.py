"""The decoding that is best on held-out sections: smoothing and threshold first, then seeds and sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch

from volseg.box import Box, Triple
from volseg.config import Config, Fragments
from volseg.evaluation.contingency import Contingency
from volseg.evaluation.metrics import score_instances
from volseg.inference.sections import predict_sections_uint8
from volseg.segmentation import stitch
from volseg.segmentation.basins import watershed_block
from volseg.segmentation.edges import EDGE
from volseg.segmentation.heights import block_heights, mask_level, smooth_mask
from volseg.segmentation.rules import Rules, label_basins
from volseg.training.sources import Source
from volseg.training.targets import UNLABELED
from volseg.training.validate import numpy_forward, source_tiles

THRESHOLDS = np.arange(20, 81, 2) / 100  # of the mask
SMOOTHING_PASSES = (0, 1, 2)  # along z, and in the plane
SEEDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
MIN_VOXELS = (0, 100, 250, 500, 1000, 2000)
MIN_GAIN_IOU, MIN_GAIN_PQ = 0.001, 0.005  # a setting stays as it is unless another is better by this


@dataclass(frozen=True, eq=False)
class ValidationSlab:
    """Consecutive held-out sections of one volume.

    Attributes
    ----------
    probability
        uint8 (heads, z, y, x), as a run stores them.
    labels
        The truth, uint32 (z, y, x), see `targets.normalize_labels`.
    source
        Index of the volume among all sources.
    share
        How much the volume counts.
    voxel_size_nm
        Size of a voxel along z, y, x.
    scribbles
        Whether the truth tells of voxels alone, and not where objects end.
    """

    probability: np.ndarray
    labels: np.ndarray
    source: int
    share: float
    voxel_size_nm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    scribbles: bool = False


@dataclass(frozen=True)
class Decoding:
    """Decoding settings and, where they were chosen on held-out sections, their scores there.

    Attributes
    ----------
    threshold, smooth
        Settings of ``[fragments]``.
    seed, min_voxels
        Settings of ``[stitch]``.
    iou
        Intersection over union of the foreground; None where nothing is held out.
    pq
        Panoptic quality of the objects; None where nothing is held out, or scribbles alone.
    iou_curve
        ``iou`` at each of `THRESHOLDS`.
    candidates
        What was tried of ``seed`` and ``min_voxels``, with its ``pq``, best first.
    """

    threshold: float
    smooth: Triple
    seed: float
    min_voxels: int
    iou: float | None = None
    pq: float | None = None
    iou_curve: tuple[float, ...] = ()
    candidates: tuple[dict, ...] = ()

    def tables(self) -> dict:
        """Return the tables of a config, as a model's card stores them."""
        return {
            "fragments": {"threshold": self.threshold, "smooth": list(self.smooth)},
            "stitch": {"seed": self.seed, "min_voxels": self.min_voxels},
        }

    def scores(self) -> dict:
        """Return what a model's card says of how good it was: empty where nothing was held out."""
        if self.iou is None:
            return {}
        scores = {"threshold": self.threshold, "iou": self.iou}
        return scores if self.pq is None else {**scores, "pq": self.pq}


def calibrate(network: torch.nn.Module, sources: list[Source], config: Config) -> Decoding:
    """Return the decoding that is best on the held-out sections.

    First smoothing and threshold, by the IoU of the foreground; then seed level and smallest object, by the PQ of the
    objects that basins and decisions make of each slab of consecutive sections. Sources count by their ``share``. A
    setting of ``config`` stays where no other gains at least `MIN_GAIN_IOU` or `MIN_GAIN_PQ`: a dozen sections do not tell
    more. Without held-out sections, all settings stay; with scribbles alone, those of objects.
    """
    default = Decoding(
        config.fragments.threshold, config.fragments.smooth, config.stitch.seed, config.stitch.min_voxels
    )
    slabs = [slab for i, source in enumerate(sources) for slab in validation_slabs(network, source, i, config)]
    if not slabs:
        return default
    smooth, threshold, curve = best_mask(slabs, config.fragments)
    if not curve.any():
        return default
    chosen = config.fragments.model_copy(update={"smooth": smooth, "threshold": threshold})
    whole = [slab for slab in slabs if not slab.scribbles]
    if not whole:
        return replace(
            default, threshold=threshold, smooth=smooth, iou=float(curve.max()), iou_curve=tuple(curve.tolist())
        )
    candidates = score_objects(whole, config.model_copy(update={"fragments": chosen}))
    best = candidates[0]
    return Decoding(
        threshold, smooth, best["seed"], best["min_voxels"], iou=float(curve.max()), pq=best["pq"],
        iou_curve=tuple(curve.tolist()), candidates=tuple(candidates),
    )  # fmt: skip


def validation_slabs(network: torch.nn.Module, source: Source, number: int, config: Config) -> Iterator[ValidationSlab]:
    """Yield the held-out sections of a source in runs of consecutive ones; ``number`` is its index among all sources."""
    sections = np.array(source.validation_sections, int)
    size = source.voxel_size_nm or (1.0, 1.0, 1.0)
    with numpy_forward(network, config.train.precision) as forward:
        for run in np.split(sections, np.flatnonzero(np.diff(sections) > 1) + 1) if sections.size else []:
            probability = predict_sections_uint8(forward, sections=run.tolist(), **source_tiles(source, config))
            yield ValidationSlab(probability, source.labels[run], number, source.share, size, source.scribbles)


def foreground(probability: np.ndarray, settings: Fragments) -> np.ndarray:
    """Return the voxels that a run takes for foreground before it decides on objects.

    Parameters
    ----------
    probability
        uint8 (heads, z, y, x), as a run stores them.
    settings
        Their ``smooth`` and ``threshold`` count.

    Returns
    -------
    numpy.ndarray
        bool (z, y, x).
    """
    return smooth_mask(probability[0], settings.smooth) >= mask_level(settings.threshold)


def best_mask(slabs: list[ValidationSlab], base: Fragments) -> tuple[Triple, float, np.ndarray]:
    """Return smoothing passes, threshold, and the mean IoU over sources at each of `THRESHOLDS` with that smoothing.

    The smoothing of ``base`` stays unless another gains at least `MIN_GAIN_IOU`.
    """
    deep = any(len(slab.labels) > 1 for slab in slabs)
    along_z = SMOOTHING_PASSES if deep else (base.smooth[0],)
    candidates = dict.fromkeys((z, n, n) for z, n in product(along_z, SMOOTHING_PASSES))
    best, curve = base.smooth, _iou_curve(slabs, base.smooth)
    least = curve.max() + MIN_GAIN_IOU
    for passes in candidates:
        other = _iou_curve(slabs, passes)
        if other.max() >= max(least, curve.max()):
            best, curve = passes, other
    return best, float(THRESHOLDS[int(curve.argmax())]), curve


def _iou_curve(slabs: list[ValidationSlab], passes: Triple) -> np.ndarray:
    """The IoU at each of `THRESHOLDS`: pooled over the slabs of a source, then the mean over sources by their share."""
    total, weight = np.zeros(len(THRESHOLDS)), 0.0
    for number in sorted({slab.source for slab in slabs}):
        own = [slab for slab in slabs if slab.source == number]
        levels = (smooth_mask(slab.probability[0], passes) for slab in own)
        overlaps = (threshold_overlaps(level, slab.labels) for level, slab in zip(levels, own, strict=True))
        both, either = np.sum(list(overlaps), axis=0)
        total, weight = total + own[0].share * both / np.maximum(1, either), weight + own[0].share
    return total / weight


def threshold_overlaps(level: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return how the foreground overlaps the truth at each of `THRESHOLDS`.

    Parameters
    ----------
    level
        uint16, what `heights.smooth_mask` gives.
    labels
        The truth uint32 of the same shape; voxels that nobody annotated do not count.

    Returns
    -------
    numpy.ndarray
        int64 (2, thresholds): voxels in both, and in either.
    """
    valid = labels != UNLABELED
    levels = [mask_level(threshold) for threshold in THRESHOLDS]
    truth, reached = labels[valid] != 0, np.searchsorted(levels, level[valid], side="right")
    true, false = (np.bincount(reached[side], minlength=len(levels) + 1) for side in (truth, ~truth))
    true_positives, false_positives = (n[::-1].cumsum()[::-1][1:] for n in (true, false))
    return np.stack([true_positives, truth.sum() + false_positives])


def score_objects(slabs: list[ValidationSlab], config: Config) -> list[dict]:
    """Return candidates of ``seed`` and ``min_voxels`` with the ``pq`` of the objects that they give, best first.

    The settings of ``config`` stand first unless another gains at least `MIN_GAIN_PQ`.
    """
    own = (config.stitch.seed, config.stitch.min_voxels)
    cut = [_cut_basins(slab, config.fragments) for slab in slabs]
    rows = []
    for seed, size in dict.fromkeys([own, *product((s for s in SEEDS if s > config.stitch.seed_low), MIN_VOXELS)]):
        changed = config.stitch.model_copy(update={"seed": seed, "min_voxels": size})
        pq = _panoptic_quality(slabs, cut, config.model_copy(update={"stitch": changed}))
        rows.append({"seed": seed, "min_voxels": size, "pq": pq})
    best = sorted(rows, key=lambda row: (-row["pq"], abs(row["seed"] - own[0]), abs(row["min_voxels"] - own[1])))
    stays = best[0]["pq"] < rows[0]["pq"] + MIN_GAIN_PQ
    return [rows[0], *(row for row in best if row is not rows[0])] if stays else best


def _cut_basins(slab: ValidationSlab, settings: Fragments) -> tuple[stitch.Basins, Contingency]:
    """The basins of a slab, as a run of one block would cut them, and how they (from 1) overlap true objects."""
    shape = slab.labels.shape
    box = Box.from_shape(shape)
    height = block_heights(slab.probability, box, shape, settings, slab.voxel_size_nm)
    mask = np.ascontiguousarray(slab.probability[0])
    region, table = watershed_block(height, mask, box, shape, settings.connectivity)
    no_links = stitch.Links(np.empty((0, 2), np.int64), np.empty(0, EDGE))
    gathered, (basin,) = stitch.gather([table], [no_links])
    valid = slab.labels != UNLABELED
    return gathered, Contingency.from_labels(slab.labels[valid], np.r_[0, basin + 1][region[valid]])


def _panoptic_quality(slabs: list[ValidationSlab], cut: list, config: Config) -> float:
    """PQ of what ``config`` decides, the slabs of a source taken together, the mean over sources by their share."""
    tables: dict[int, Contingency] = {}
    for i, (slab, (basin_table, overlap)) in enumerate(zip(slabs, cut, strict=True)):
        label = label_basins(basin_table, Rules.from_config(config, slab.voxel_size_nm))
        table = _with_own_ids(overlap.relabeled(np.r_[0, label]), i)
        tables[slab.source] = tables.get(slab.source, Contingency.empty()) + table
    shares = {slab.source: slab.share for slab in slabs}
    quality = {number: score_instances(table).pq for number, table in tables.items()}
    return sum(shares[number] * pq for number, pq in quality.items()) / sum(shares.values())


def _with_own_ids(table: Contingency, number: int) -> Contingency:
    """``table`` with ids that no other number gives."""
    truth, pred = (np.where(ids > 0, ids + np.uint64(number << 40), ids) for ids in (table.truth, table.pred))
    return Contingency(truth, pred, table.counts)
