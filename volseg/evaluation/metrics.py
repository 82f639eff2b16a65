"""Scores of a segmentation against the truth, all from one table of shared voxels (`Contingency`).

The table adds up over blocks, so every score is the same to the last bit however a volume is cut. Id 0 is background. A
ratio of nothing to nothing is 1.0 (nothing was asked, nothing was wrong) unless a docstring says otherwise.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from volseg.errors import UserError
from volseg.evaluation.contingency import Contingency, check_labels

TOUCHING_DISTANCE = 2  # voxels between the centers of two voxels whose objects touch, at most
INVERSE_SHARE = 10  # an overlap counts as a split or a merger where it is more than 1 / 10 of an object


def ratio(part: float, total: float) -> float:
    """``part / total``; 1.0 of nothing to nothing."""
    return float(part / total) if total else 1.0


# ---------------------------------------------------------------- foreground


@dataclass(frozen=True)
class ForegroundScores:
    """Voxel scores of "some object" against "no object", and the four counts that they are made of.

    Where neither side has foreground every score is 1.0. Where only the prediction has some, iou, dice and precision are
    0.0 and recall is 1.0; where only the truth has some, iou, dice and recall are 0.0 and precision is 1.0.
    """

    iou: float
    dice: float
    accuracy: float
    precision: float
    recall: float
    true_positive_voxels: int
    false_positive_voxels: int
    false_negative_voxels: int
    true_negative_voxels: int

    def to_json(self) -> dict:
        """Plain values that ``json.dumps`` takes."""
        return asdict(self)


def score_foreground(table: Contingency) -> ForegroundScores:
    """How well a prediction tells foreground from background.

    Examples
    --------
    >>> score_foreground(Contingency.from_labels(np.array([0, 1, 1, 2]), np.array([0, 0, 5, 5]))).iou
    0.6666666666666666
    """
    true, predicted = table.truth > 0, table.pred > 0
    cells = (true & predicted, ~true & predicted, true & ~predicted, ~true & ~predicted)
    tp, fp, fn, tn = (int(table.counts[cell].sum()) for cell in cells)
    return ForegroundScores(
        iou=ratio(tp, tp + fp + fn),
        dice=ratio(2 * tp, 2 * tp + fp + fn),
        accuracy=ratio(tp + tn, tp + fp + fn + tn),
        precision=ratio(tp, tp + fp),
        recall=ratio(tp, tp + fn),
        true_positive_voxels=tp,
        false_positive_voxels=fp,
        false_negative_voxels=fn,
        true_negative_voxels=tn,
    )


# ---------------------------------------------------------------- objects


@dataclass(frozen=True)
class InstanceScores:
    """Scores of the objects of a segmentation.

    **Detection.** A true and a predicted object match where their IoU over all voxels is greater than ``iou_threshold``.
    From 0.5 upwards that is unique; below it the matching has as many pairs as possible and of those the largest sum of
    IoU. Matched pairs are TP, other predicted objects FP, other true objects FN.

    **Partitions**, over the voxels that the truth labels. The prediction's background counts there as one more segment;
    what is predicted outside the truth is not seen: look at ``precision``, ``spurious`` and the foreground for that.

    Attributes
    ----------
    iou_threshold
        The least IoU of a match, exclusive.
    precision, recall, f1
        TP / (TP + FP), TP / (TP + FN) and TP / (TP + FP/2 + FN/2).
    pq, sq, rq
        Panoptic quality [1]_ is ``sq * rq``: the mean IoU of matched pairs (0.0 where there are objects but no match) and
        f1.
    matched
        TP.
    sa50, sa75
        Segmentation accuracy [2]_ TP / (TP + FP + FN) at an IoU [3]_ of 0.5 and of 0.75, whatever ``iou_threshold`` is.
    voi_split, voi_merge
        Variation of information [4]_ in bits, in its parts H(pred | truth) and H(truth | pred) [5]_, as
        `skimage.metrics.variation_of_information` gives it with ``ignore_labels=(0,)``; 0.0 where the truth is empty.
    rand_error
        1 - F-score of pairs of voxels [6]_, as `skimage.metrics.adapted_rand_error` gives it.
    rand_precision, rand_recall
        Of the pairs of voxels in one predicted segment, the share that the truth joins too, lowered by mergers; of those in
        one true object, the share that the prediction joins too, lowered by splits. skimage (0.26) returns these two the
        other way round from its own documentation (scikit-image issue 6485).
    truth_objects, pred_objects
        How many there are.
    split
        True objects of which at least two predicted objects each hold more than a tenth of the voxels.
    merged
        Predicted objects that each hold more than a tenth of the voxels of at least two true objects.
    missed
        True objects with less than a tenth of their voxels in any predicted objects, all together.
    spurious
        Predicted objects with less than a tenth of their voxels in any true objects, all together.

    References
    ----------
    .. [1] Kirillov et al., "Panoptic segmentation", CVPR 2019.
    .. [2] Caicedo et al., "Nucleus segmentation across imaging experiments: the 2018 Data Science Bowl", Nat. Methods 16
           (2019).
    .. [3] Everingham et al., "The Pascal Visual Object Classes (VOC) challenge", IJCV 88 (2010).
    .. [4] Meila, "Comparing clusterings: an information based distance", J. Multivariate Anal. 98 (2007).
    .. [5] Nunez-Iglesias et al., "Machine learning of hierarchical clustering to segment 2D and 3D images", PLoS ONE 8
           (2013).
    .. [6] Arganda-Carreras et al., "Crowdsourcing the creation of image segmentation algorithms for connectomics", Front.
           Neuroanat. 9 (2015).
    """

    iou_threshold: float
    precision: float
    recall: float
    f1: float
    pq: float
    sq: float
    rq: float
    matched: int
    sa50: float
    sa75: float
    voi_split: float
    voi_merge: float
    rand_error: float
    rand_precision: float
    rand_recall: float
    truth_objects: int
    pred_objects: int
    split: int
    merged: int
    missed: int
    spurious: int

    def to_json(self) -> dict:
        """Plain values that ``json.dumps`` takes."""
        return asdict(self)


def score_instances(table: Contingency, iou: float = 0.5) -> InstanceScores:
    """How well a prediction tells objects apart.

    Parameters
    ----------
    table
        Shared voxels of true and predicted objects.
    iou
        Objects match where their IoU is greater; 0 <= iou < 1.

    Raises
    ------
    UserError
        ``iou`` is outside its range.

    Examples
    --------
    >>> table = Contingency.from_labels(np.array([1, 1, 1, 2, 2, 2]), np.array([5, 5, 0, 6, 6, 6]))
    >>> scores = score_instances(table)
    >>> scores.matched, round(scores.pq, 3)
    (2, 0.833)
    """
    check_threshold(iou)
    overlaps = overlaps_of(table)
    return InstanceScores(
        iou_threshold=float(iou),
        **_detection(overlaps, iou),
        sa50=_segmentation_accuracy(overlaps, 0.5),
        sa75=_segmentation_accuracy(overlaps, 0.75),
        **_partitions(table),
        truth_objects=int(overlaps.truth_voxels.size),
        pred_objects=int(overlaps.pred_voxels.size),
        **_faults(overlaps),
    )


def check_threshold(iou: float) -> None:
    """Refuses an IoU threshold that no pair or every pair could pass."""
    if not 0 <= iou < 1:
        raise UserError(f"iou {iou} is no threshold: objects match where their IoU is greater, so give 0 <= iou < 1")


@dataclass(frozen=True)
class Overlaps:
    """The objects of a table and the pairs of them that share voxels.

    ``truth_ids``, ``pred_ids``: of each object, ascending. ``truth_voxels``, ``pred_voxels``: its size. ``truth``, ``pred``,
    ``shared``: of each pair, the number of each object in those lists and the voxels shared.
    """

    truth_ids: np.ndarray
    pred_ids: np.ndarray
    truth_voxels: np.ndarray
    pred_voxels: np.ndarray
    truth: np.ndarray
    pred: np.ndarray
    shared: np.ndarray

    @property
    def iou(self) -> np.ndarray:
        return self.shared / (self.truth_voxels[self.truth] + self.pred_voxels[self.pred] - self.shared)


def overlaps_of(table: Contingency) -> Overlaps:
    """The objects of a table, and which share voxels."""
    true, predicted = table.truth > 0, table.pred > 0
    both = true & predicted
    truth_ids, truth_voxels = _sizes(table.truth[true], table.counts[true])
    pred_ids, pred_voxels = _sizes(table.pred[predicted], table.counts[predicted])
    truth, pred = np.searchsorted(truth_ids, table.truth[both]), np.searchsorted(pred_ids, table.pred[both])
    return Overlaps(truth_ids, pred_ids, truth_voxels, pred_voxels, truth, pred, table.counts[both])


def _sum_by(index: np.ndarray, values: np.ndarray, length: int) -> np.ndarray:
    """Sums of whole numbers per index, exact beyond 2**53."""
    sums = np.zeros(length, np.int64)
    np.add.at(sums, index, values)
    return sums


def _sizes(ids: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct ids and the voxels of each."""
    distinct, index = np.unique(ids, return_inverse=True)
    return distinct, _sum_by(index, counts, distinct.size)


def _match(overlaps: Overlaps, threshold: float) -> np.ndarray:
    """Which pairs are matched: those whose IoU is above the threshold, each object in one pair at most."""
    iou = overlaps.iou
    above = iou > threshold
    if threshold < 0.5:  # from one half upwards no object can be in two such pairs
        above[above] = assign(overlaps.truth[above], overlaps.pred[above], iou[above])
    return above


def assign(truth: np.ndarray, pred: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Which pairs to keep so that every object is in one at most: as many as possible, of those the largest sum of scores.

    Every true object may also take a partner of its own that nobody else can have, so a full matching of the sparse
    graph always exists; a true pair gains 1 over that, and its score (0 to 1) only decides between matchings of one size.
    """
    if not truth.size:
        return np.zeros(0, bool)
    (rows, r), (columns, c) = np.unique(truth, return_inverse=True), np.unique(pred, return_inverse=True)
    alone = np.arange(rows.size)
    gain = np.concatenate([2 + score / (rows.size + 1), np.ones(rows.size)])
    ends = np.concatenate([r, alone]), np.concatenate([c, columns.size + alone])
    graph = csr_array((gain, ends), shape=(rows.size, columns.size + rows.size))
    return min_weight_full_bipartite_matching(graph, maximize=True)[1][r] == c


def _detection(overlaps: Overlaps, threshold: float) -> dict:
    """Precision, recall and panoptic quality at one IoU threshold."""
    truths, preds = overlaps.truth_voxels.size, overlaps.pred_voxels.size
    iou = overlaps.iou[_match(overlaps, threshold)]
    hits, sum_iou = iou.size, float(iou.sum())
    return {
        "precision": ratio(hits, preds),
        "recall": ratio(hits, truths),
        "f1": ratio(2 * hits, truths + preds),
        "pq": ratio(2 * sum_iou, truths + preds),
        "sq": sum_iou / hits if hits else float(truths + preds == 0),
        "rq": ratio(2 * hits, truths + preds),
        "matched": hits,
    }


def _segmentation_accuracy(overlaps: Overlaps, threshold: float) -> float:
    """TP / (TP + FP + FN) at one IoU threshold."""
    hits = int(np.count_nonzero(_match(overlaps, threshold)))
    return ratio(hits, overlaps.truth_voxels.size + overlaps.pred_voxels.size - hits)


def _partitions(table: Contingency) -> dict:
    """Variation of information and adapted Rand scores over the voxels that the truth labels."""
    true = table.truth > 0
    truth, pred, counts = table.truth[true], table.pred[true], table.counts[true]
    (truth_ids, truth_voxels), (pred_ids, pred_voxels) = _sizes(truth, counts), _sizes(pred, counts)
    together = _pairs_of_voxels(counts)
    in_truth, in_pred = _pairs_of_voxels(truth_voxels), _pairs_of_voxels(pred_voxels)
    return {
        "voi_split": _conditional_entropy(counts, truth_voxels[np.searchsorted(truth_ids, truth)]),
        "voi_merge": _conditional_entropy(counts, pred_voxels[np.searchsorted(pred_ids, pred)]),
        "rand_error": 1.0 - ratio(2 * together, in_truth + in_pred),
        "rand_precision": ratio(together, in_pred),
        "rand_recall": ratio(together, in_truth),
    }


def _conditional_entropy(counts: np.ndarray, given: np.ndarray) -> float:
    """Bits left in a voxel's pair once the part in which it lies is known; ``given`` is the part's size, per pair."""
    return float(np.sum(counts * np.log2(given / counts)) / counts.sum()) if counts.size else 0.0


def _pairs_of_voxels(sizes: np.ndarray) -> float:
    """Ordered pairs of distinct voxels that lie in one part; float, since squares of sizes pass 2**63."""
    sizes = sizes.astype(np.float64)
    return float(np.sum(sizes * (sizes - 1)))


def _faults(overlaps: Overlaps) -> dict:
    """Numbers of split, merged, missed and spurious objects."""
    truths, preds = overlaps.truth_voxels.size, overlaps.pred_voxels.size
    holds = _holds(overlaps)
    covered = _sum_by(overlaps.truth, overlaps.shared, truths)
    right = _sum_by(overlaps.pred, overlaps.shared, preds)
    return {
        "split": int(np.count_nonzero(np.bincount(overlaps.truth[holds], minlength=truths) > 1)),
        "merged": int(np.count_nonzero(np.bincount(overlaps.pred[holds], minlength=preds) > 1)),
        "missed": int(np.count_nonzero(INVERSE_SHARE * covered < overlaps.truth_voxels)),
        "spurious": int(np.count_nonzero(INVERSE_SHARE * right < overlaps.pred_voxels)),
    }


def _holds(overlaps: Overlaps) -> np.ndarray:
    """In which pairs the predicted object holds more than a tenth of the true one."""
    return INVERSE_SHARE * overlaps.shared > overlaps.truth_voxels[overlaps.truth]


# ---------------------------------------------------------------- objects that touch


@dataclass(frozen=True)
class TouchingScores:
    """How true objects that touch were told apart.

    Attributes
    ----------
    pairs
        Pairs of true objects that touch.
    separated
        Those of which both objects are matched, as in `InstanceScores`, and so by different predicted objects.
    pair_recall
        Their share.
    pairs_merged
        Those of which one predicted object holds more than a tenth of the voxels of both.
    split_share
        Of all true objects, touching or not, the share that counts as split.
    """

    pairs: int
    separated: int
    pair_recall: float
    pairs_merged: int
    split_share: float

    def to_json(self) -> dict:
        """Plain values that ``json.dumps`` takes."""
        return asdict(self)


def touching_pairs(labels: np.ndarray) -> np.ndarray:
    """Pairs ``a < b`` of labels (uint64, n x 2, sorted) with voxels at most `TOUCHING_DISTANCE` apart, between centers.

    So two objects touch when they share a voxel face, edge or corner, or one voxel lies between them. The pairs of a
    volume are those of its blocks, each grown by `TOUCHING_DISTANCE`, in any cutting.

    Examples
    --------
    >>> touching_pairs(np.array([[[5, 5, 0, 3, 0, 0, 9]]])).tolist()
    [[3, 5]]
    """
    padded = np.pad(check_labels(labels, "labels").astype(np.uint64), TOUCHING_DISTANCE)
    flat, index = padded.ravel(), np.flatnonzero(padded)
    own, pairs = flat[index], [np.empty((0, 2), np.uint64)]
    for step in _steps(padded.shape):
        other = flat[index + step]
        differ = (other != own) & (other > 0)
        pairs.append(np.unique(np.sort(np.stack([own[differ], other[differ]], axis=1), axis=1), axis=0))
    return np.unique(np.concatenate(pairs), axis=0)


def _steps(shape: tuple[int, ...]) -> list[int]:
    """Steps, in the linear index of an array of that shape, from a voxel to those ahead of it within the distance."""
    reach = range(-TOUCHING_DISTANCE, TOUCHING_DISTANCE + 1)
    strides = (shape[1] * shape[2], shape[2], 1)
    return [
        int(np.dot(offset, strides))
        for offset in product(reach, repeat=3)
        if offset > (0, 0, 0) and np.dot(offset, offset) <= TOUCHING_DISTANCE**2
    ]


def score_touching(table: Contingency, touching: np.ndarray, iou: float = 0.5) -> TouchingScores:
    """How well a prediction separates true objects that touch.

    Parameters
    ----------
    table
        Shared voxels of true and predicted objects.
    touching
        Pairs of true ids, as `touching_pairs` gives them; those that the table does not hold are left out.
    iou
        Objects match where their IoU is greater; 0 <= iou < 1.

    Raises
    ------
    UserError
        ``iou`` is outside its range.
    """
    check_threshold(iou)
    overlaps = overlaps_of(table)
    truth_ids = np.unique(table.truth[table.truth > 0])
    number = np.searchsorted(truth_ids, touching[np.isin(touching, truth_ids).all(axis=1)])
    matched = np.zeros(truth_ids.size, bool)
    matched[overlaps.truth[_match(overlaps, iou)]] = True
    separated = int(matched[number].all(axis=1).sum())
    return TouchingScores(
        pairs=len(number),
        separated=separated,
        pair_recall=ratio(separated, len(number)),
        pairs_merged=sum(_share_a_holder(overlaps, a, b) for a, b in number.tolist()),
        split_share=_faults(overlaps)["split"] / truth_ids.size if truth_ids.size else 0.0,
    )


def _share_a_holder(overlaps: Overlaps, a: int, b: int) -> bool:
    """Whether one predicted object holds more than a tenth of both true objects (numbers in the lists)."""
    holds = _holds(overlaps)
    holders = (overlaps.pred[holds & (overlaps.truth == n)] for n in (a, b))
    return bool(np.isin(*holders).any())
