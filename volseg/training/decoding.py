"""The decoding that is best on held-out sections: smoothing and threshold first, then seeds and sizes.

A few sections cut every object, and then no size is too small. So the volume that counts most is predicted beyond them, as
far as it is in memory, and its objects are decided there: their sizes are those of a run, and only voxels of held-out
sections are scored. A dozen objects say little about the smallest one, so `usual_size` has a say too: it knows how large
objects are that annotated sections confirm, learned from or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, product
from math import prod

import numpy as np
import torch

from volseg.box import Box, Triple, VoxelSize
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
SEEDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
MIN_VOXELS = (0, 100, 250, 500, 1000, 2000, 4000, 8000, 16000, 32000)
MIN_GAIN_IOU = 0.001  # a setting stays as it is unless another is better by this
MIN_GAIN_OBJECTS = 0.5  # or by a PQ that is worth so many of the true objects
MIN_GAIN_TAUGHT = 0.05  # or, on sections that were learned from, by this IoU or PQ
CONTEXT_VOXELS = 1 << 26  # of a volume, at most, that are predicted around what is scored
MIN_OBJECTS = 5  # of which sizes are told
SMALL_PERCENTILE, SMALL_SHARE = 25, 0.125  # of their sizes, and the share of it below which nothing is an object


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
    first
        Index of the first of them in its volume.
    """

    probability: np.ndarray
    labels: np.ndarray
    source: int
    share: float
    voxel_size_nm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    scribbles: bool = False
    first: int = 0


@dataclass(frozen=True)
class Decoding:
    """Decoding settings and, where they were chosen on held-out sections, their scores there.

    Attributes
    ----------
    threshold, smooth
        Settings of ``[fragments]``.
    seed, min_voxels, count_cut
        Settings of ``[stitch]``.
    iou
        Intersection over union of the foreground; None where nothing is held out.
    pq
        Panoptic quality of the objects; None where nothing is held out, or scribbles alone.
    iou_curve
        ``iou`` at each of `THRESHOLDS`.
    candidates
        What was tried of ``seed`` and ``min_voxels``, with its ``pq``, best first.
    taught
        Whether ``threshold`` or ``seed`` were chosen on what was learned from.
    """

    threshold: float
    smooth: Triple
    seed: float
    min_voxels: int
    count_cut: bool = False
    iou: float | None = None
    pq: float | None = None
    iou_curve: tuple[float, ...] = ()
    candidates: tuple[dict, ...] = ()
    taught: bool = False

    def tables(self) -> dict:
        """Return the tables of a config, as a model's card stores them."""
        return {
            "fragments": {"threshold": self.threshold, "smooth": list(self.smooth)},
            "stitch": {"seed": self.seed, "min_voxels": self.min_voxels, "count_cut": self.count_cut},
        }

    def scores(self) -> dict:
        """Return what a model's card says of how good it was: empty where nothing was held out."""
        if self.iou is None:
            return {}
        scores = {"threshold": self.threshold, "iou": self.iou}
        return scores if self.pq is None else {**scores, "pq": self.pq}


def calibrate(network: torch.nn.Module, sources: list[Source], config: Config) -> Decoding:
    """Return the decoding that is best on the held-out sections.

    First smoothing and threshold, by the IoU of the foreground; then the smallest object from `usual_size` of the volume
    with the largest ``share``, which also says that objects cut by the volume's faces count by their cut; last, seed level
    and smallest object by the PQ of what is decided. Sources count by their ``share``. A setting stays where no other gains
    at least `MIN_GAIN_IOU` or `MIN_GAIN_OBJECTS`: a dozen sections do not tell more. Without held-out sections,
    what was learned from chooses sizes, and threshold and seed where a gain of `MIN_GAIN_TAUGHT` says that those set find
    next to nothing, as after a few steps. With scribbles alone, the settings of objects stay.
    """
    stitching, config_threshold = config.stitch, config.fragments.threshold
    result = Decoding(
        config.fragments.threshold, config.fragments.smooth, stitching.seed, stitching.min_voxels, stitching.count_cut
    )
    main = max(range(len(sources)), key=lambda i: sources[i].share)
    slabs = [slab for i, s in enumerate(sources) if i != main for slab in validation_slabs(network, s, i, config)]
    tells = bool(sources[main].validation_sections) or not sources[main].scribbles
    around = annotated_slab(network, sources[main], main, config) if tells else None
    held_out = around and only_sections(around, sources[main].validation_sections)
    slabs += [held_out] if held_out else list(validation_slabs(network, sources[main], main, config))
    taught = [around] if around and not slabs else []
    if taught:
        result = replace(result, threshold=_mended_threshold(taught, config.fragments))
    if slabs:
        smooth, threshold, curve = best_mask([_trimmed(slab) for slab in slabs], config.fragments)
        if not curve.any():
            return result
        result = replace(
            result, threshold=threshold, smooth=smooth, iou=float(curve.max()), iou_curve=tuple(curve.tolist())
        )
    chosen = config.fragments.model_copy(update={"smooth": result.smooth, "threshold": result.threshold})
    config = config.model_copy(update={"fragments": chosen})
    if taught and not around.scribbles:
        seed = score_objects(taught, config, MIN_GAIN_TAUGHT)[0]["seed"]
        config = config.model_copy(update={"stitch": stitching.model_copy(update={"seed": seed})})
        kept = (seed, result.threshold) == (stitching.seed, config_threshold)
        result = replace(result, seed=seed, taught=not kept)
    basins = around and not around.scribbles and cut_basins(around, chosen)
    if basins and (size := usual_size(basins, config, around.voxel_size_nm)):
        result = replace(result, min_voxels=size, count_cut=True)
        sizes = {"min_voxels": size, "count_cut": True}
        config = config.model_copy(update={"stitch": config.stitch.model_copy(update=sizes)})
    whole = [slab for slab in slabs if not slab.scribbles]
    if not whole:
        return result
    candidates = score_objects(whole, config)
    best = candidates[0]
    return replace(
        result, seed=best["seed"], min_voxels=best["min_voxels"], pq=best["pq"], candidates=tuple(candidates)
    )


def annotated_slab(network: torch.nn.Module, source: Source, number: int, config: Config) -> ValidationSlab | None:
    """Return a source around its held-out sections, or else its sections to learn from, up to `CONTEXT_VOXELS`.

    All annotated sections are labeled, learned from or not. None where those held out are more than that.
    """
    depth, most = len(source.image), CONTEXT_VOXELS // source.image[0].size
    middle = source.validation_sections or source.train_sections
    start, stop = min(middle), max(middle) + 1
    if stop - start > most and source.validation_sections:
        return None
    start = max(0, min((start + stop - most) // 2, depth - most))
    stop = min(depth, start + most)
    sections = range(start, stop)
    with numpy_forward(network, config.train.precision) as forward:
        probability = predict_sections_uint8(forward, sections=sections, **source_tiles(source, config))
    size = source.voxel_size_nm or (1.0, 1.0, 1.0)
    slab = ValidationSlab(
        probability, source.labels[start:stop], number, source.share, size, source.scribbles, first=start
    )
    return only_sections(slab, (*source.train_sections, *source.validation_sections))


def only_sections(slab: ValidationSlab, sections: Sequence[int]) -> ValidationSlab | None:
    """Return ``slab`` with the truth of these sections of its source alone; None where it has none of them."""
    chosen = np.isin(np.arange(len(slab.labels)) + slab.first, sections)
    labels = np.where(chosen[:, None, None], slab.labels, np.uint32(UNLABELED))
    return replace(slab, labels=labels) if chosen.any() else None


def _trimmed(slab: ValidationSlab) -> ValidationSlab:
    """``slab`` without the sections that change nothing about the mask where there is truth."""
    known = np.flatnonzero((slab.labels != UNLABELED).any(axis=(1, 2)))
    if not known.size:
        return slab
    around = slice(max(0, known[0] - max(SMOOTHING_PASSES)), known[-1] + 1 + max(SMOOTHING_PASSES))
    return replace(slab, probability=slab.probability[:, around], labels=slab.labels[around])


def usual_size(basins: tuple[stitch.Basins, list[Contingency]], config: Config, voxel_size_nm: VoxelSize) -> int | None:
    """Return the size below which nothing is an object, in voxels: an eighth of what one in four objects does not reach.

    Of objects that the truth confirms: those that hold most of what is known of a true one, and little else. So pieces of an
    object count as little as false ones, however weak the network is. What a face cuts counts with the cube on its cut.

    Parameters
    ----------
    basins
        What `cut_basins` gave.
    config
        Its ``[stitch]`` decides, without sizes.
    voxel_size_nm
        Size of a voxel along z, y, x.

    Returns
    -------
    int or None
        None where fewer than `MIN_OBJECTS` are confirmed.
    """
    table, overlaps = basins
    every = config.stitch.model_copy(update={"min_voxels": 0, "min_volume_nm3": 0.0, "max_voxels": 0})
    label = label_basins(table, Rules.from_config(config.model_copy(update={"stitch": every}), voxel_size_nm))
    parts = [(_with_own_ids(overlap, k), overlap.pred) for k, overlap in enumerate(overlaps)]
    objects = sum((replace(part, pred=pred) for part, pred in parts), Contingency.empty()).relabeled(np.r_[0, label])
    groups, pred, held = int(label.max(initial=0)) + 1, objects.pred.astype(np.int64), objects.counts
    known, true = (np.bincount(pred, held * used, groups) for used in (1, objects.truth > 0))
    confirmed = (2 * true > known) & (np.arange(groups) > 0)
    of_truth = np.unique(objects.truth, return_inverse=True)[1]
    most = 2 * held > np.bincount(of_truth, held)[of_truth]
    main = np.unique(pred[most & (objects.truth > 0) & confirmed[pred]])
    if main.size < MIN_OBJECTS:
        return None
    cut, voxels = (stitch.sum_by_group(column, label, groups) for column in (table.cut, table.voxels))
    areas = prod(voxel_size_nm) / np.array(voxel_size_nm)
    size = voxels + (cut @ areas) ** 1.5 / prod(voxel_size_nm)
    return int(SMALL_SHARE * np.percentile(size[main], SMALL_PERCENTILE))


def validation_slabs(network: torch.nn.Module, source: Source, number: int, config: Config) -> Iterator[ValidationSlab]:
    """Yield the held-out sections of a source in runs of consecutive ones; ``number`` is its index among all sources."""
    sections = np.array(source.validation_sections, int)
    size = source.voxel_size_nm or (1.0, 1.0, 1.0)
    with numpy_forward(network, config.train.precision) as forward:
        for run in np.split(sections, np.flatnonzero(np.diff(sections) > 1) + 1) if sections.size else []:
            probability = predict_sections_uint8(forward, sections=run.tolist(), **source_tiles(source, config))
            labels, first = source.labels[run], int(run[0])
            yield ValidationSlab(probability, labels, number, source.share, size, source.scribbles, first)


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


def _mended_threshold(slabs: list[ValidationSlab], base: Fragments) -> float:
    """The threshold of ``base``, unless another gains at least `MIN_GAIN_TAUGHT`."""
    curve = _iou_curve(slabs, base.smooth)
    own = curve[np.abs(THRESHOLDS - base.threshold).argmin()]
    return float(THRESHOLDS[curve.argmax()]) if curve.max() >= own + MIN_GAIN_TAUGHT else base.threshold


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


def score_objects(slabs: list[ValidationSlab], config: Config, least: float = 0.0) -> list[dict]:
    """Return candidates of ``seed`` and ``min_voxels`` with the ``pq`` of the objects that they give, best first.

    The settings of ``config`` stand first unless another gains at least `MIN_GAIN_OBJECTS`, and a PQ of ``least``.
    """
    own = (config.stitch.seed, config.stitch.min_voxels)
    cut = [cut_basins(slab, config.fragments) for slab in slabs]
    rows = []
    for seed, size in dict.fromkeys([own, *product((s for s in SEEDS if s > config.stitch.seed_low), MIN_VOXELS)]):
        changed = config.stitch.model_copy(update={"seed": seed, "min_voxels": size})
        pq = panoptic_quality(slabs, cut, config.model_copy(update={"stitch": changed}))
        rows.append({"seed": seed, "min_voxels": size, "pq": pq})
    best = sorted(rows, key=lambda row: (-row["pq"], abs(row["seed"] - own[0]), abs(row["min_voxels"] - own[1])))
    true_objects = sum(np.unique(part.truth[part.truth > 0]).size for _, overlaps in cut for part in overlaps)
    stays = best[0]["pq"] < rows[0]["pq"] + max(least, MIN_GAIN_OBJECTS / max(1, true_objects))
    return [rows[0], *(row for row in best if row is not rows[0])] if stays else best


def cut_basins(slab: ValidationSlab, settings: Fragments) -> tuple[stitch.Basins, list[Contingency]]:
    """Return the basins of a slab, as a run of one block would cut them, and how they (from 1) overlap true objects.

    There is a table for each run of consecutive sections with truth, since nobody knows which objects are one across a gap.
    """
    shape = slab.labels.shape
    box = Box.from_shape(shape)
    height = block_heights(slab.probability, box, shape, settings, slab.voxel_size_nm)
    mask = np.ascontiguousarray(slab.probability[0])
    region, table = watershed_block(height, mask, box, shape, settings.connectivity)
    no_links = stitch.Links(np.empty((0, 2), np.int64), np.empty(0, EDGE))
    gathered, (basin,) = stitch.gather([table], [no_links])
    valid, name = slab.labels != UNLABELED, np.r_[0, basin + 1]
    known = np.flatnonzero(valid.any(axis=(1, 2)))
    runs = np.split(known, np.flatnonzero(np.diff(known) > 1) + 1) if known.size else []
    parts = ((slab.labels[run][valid[run]], name[region[run][valid[run]]]) for run in runs)
    return gathered, [Contingency.from_labels(*part) for part in parts]


def panoptic_quality(slabs: list[ValidationSlab], cut: list, config: Config) -> float:
    """Return the PQ of what ``config`` decides of basins that `cut_basins` gave for each slab.

    The slabs of a source are taken together; it is the mean over sources by their share.
    """
    tables: dict[int, Contingency] = {}
    number = count()
    for slab, (basin_table, overlaps) in zip(slabs, cut, strict=True):
        label = label_basins(basin_table, Rules.from_config(config, slab.voxel_size_nm))
        each = (_with_own_ids(overlap.relabeled(np.r_[0, label]), next(number)) for overlap in overlaps)
        tables[slab.source] = sum(each, tables.get(slab.source, Contingency.empty()))
    shares = {slab.source: slab.share for slab in slabs}
    quality = {number: score_instances(table).pq for number, table in tables.items()}
    return sum(shares[number] * pq for number, pq in quality.items()) / sum(shares.values())


def _with_own_ids(table: Contingency, number: int) -> Contingency:
    """``table`` with ids that no other number gives."""
    truth, pred = (np.where(ids > 0, ids + np.uint64(number << 40), ids) for ids in (table.truth, table.pred))
    return Contingency(truth, pred, table.counts)
