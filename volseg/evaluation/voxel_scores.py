"""Where voxels are wrong: near the borders of objects or far from them, and how sure the network was of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from scipy.ndimage import maximum_filter, minimum_filter

from volseg.box import Box

NEAR_VOXELS = 5  # along the axes, of a voxel of the other kind
BINS = 10  # of probability


@dataclass(frozen=True)
class BorderScores:
    """Foreground IoU near the borders of the truth and beyond, and the share of all wrong voxels that lie near.

    A voxel is near where one of the other kind, object or background, is at most `NEAR_VOXELS` away along each axis.
    """

    near_iou: float
    beyond_iou: float
    wrong_near: float

    def to_json(self) -> dict:
        """Plain values that ``json.dumps`` takes."""
        return asdict(self)


def score_borders(
    read_truth: Callable[[Box], np.ndarray], read_pred: Callable[[Box], np.ndarray], boxes: list[Box], whole: Box
) -> BorderScores:
    """`BorderScores` of ``whole``, read in ``boxes`` that make it up.

    Examples
    --------
    One voxel beside the object is wrong, and its object is everywhere near.

    >>> truth, pred = np.zeros((2, 1, 1, 20), int)
    >>> truth[..., 4:8], pred[..., 4:9] = 1, 1
    >>> whole = Box((0, 0, 0), (1, 1, 20))
    >>> score_borders(lambda box: truth[box.slices], lambda box: pred[box.slices], [whole], whole)
    BorderScores(near_iou=0.8, beyond_iou=1.0, wrong_near=1.0)
    """
    counts = np.zeros((2, 2, 2), np.int64)  # near, true, predicted
    for part in boxes:
        grown = part.grow(NEAR_VOXELS).intersect(whole)
        mask = (read_truth(grown) > 0).astype(np.uint8)
        size = 2 * NEAR_VOXELS + 1
        near = (maximum_filter(mask, size, mode="nearest") != minimum_filter(mask, size, mode="nearest")).astype(
            np.intp
        )
        inside = part.slices_within(grown)
        kinds = 4 * near[inside] + 2 * mask[inside] + (read_pred(part) > 0)
        counts += np.bincount(kinds.ravel(), minlength=8).reshape(2, 2, 2)
    wrong = counts[:, 0, 1] + counts[:, 1, 0]
    iou = [float(c[1, 1] / (c.sum() - c[0, 0])) if c.sum() > c[0, 0] else 1.0 for c in counts]
    return BorderScores(iou[1], iou[0], float(wrong[1] / wrong.sum()) if wrong.sum() else 0.0)


@dataclass(frozen=True)
class Reliability:
    """How often a probability is right: of the voxels to which the network gave about so much, the share that are true.

    Attributes
    ----------
    probability, true_share
        Of each of `BINS` bins that has voxels: the mean probability, and the share of voxels in a true object.
    voxels
        How many each bin has.
    """

    probability: tuple[float, ...]
    true_share: tuple[float, ...]
    voxels: tuple[int, ...]

    @property
    def error(self) -> float:
        """The expected calibration error (Naeini et al., AAAI 2015): the mean distance of the two, over voxels."""
        p, t, n = (np.array(column, float) for column in (self.probability, self.true_share, self.voxels))
        return float((n * np.abs(p - t)).sum() / n.sum()) if n.size else 0.0

    def to_json(self) -> dict:
        """Plain values that ``json.dumps`` takes."""
        return {**{name: list(column) for name, column in asdict(self).items()}, "error": self.error}


def score_reliability(
    read_truth: Callable[[Box], np.ndarray], read_probability: Callable[[Box], np.ndarray], boxes: list[Box]
) -> Reliability:
    """`Reliability` of uint8 probabilities (0..255) of the foreground, read in ``boxes``.

    Examples
    --------
    >>> truth, probability = np.array([[[0, 0, 1, 1]]]), np.array([[[0, 255, 255, 255]]], np.uint8)
    >>> whole = Box((0, 0, 0), (1, 1, 4))
    >>> found = score_reliability(lambda box: truth[box.slices], lambda box: probability[box.slices], [whole])
    >>> found.probability, [round(share, 2) for share in found.true_share], round(found.error, 2)
    ((0.0, 1.0), [0.0, 0.67], 0.25)
    """
    counts = np.zeros((2, 256), np.int64)
    for part in boxes:
        kinds = 256 * (read_truth(part) > 0).astype(np.intp) + read_probability(part)
        counts += np.bincount(kinds.ravel(), minlength=512).reshape(2, 256)
    value = np.arange(256)
    of_bin = np.minimum(value * BINS // 255, BINS - 1)
    voxels = np.bincount(of_bin, counts.sum(axis=0), BINS)
    some = voxels > 0
    mean = np.bincount(of_bin, counts.sum(axis=0) * value / 255, BINS)[some] / voxels[some]
    share = np.bincount(of_bin, counts[1], BINS)[some] / voxels[some]
    return Reliability(tuple(mean.tolist()), tuple(share.tolist()), tuple(voxels[some].astype(int).tolist()))
