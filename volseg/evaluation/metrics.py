"""Scores of a segmentation against the truth, all from one sparse table that adds up over blocks.

``Contingency`` counts the voxels of every (truth id, pred id) pair. It is a sum over voxels, so the table of a volume
is the sum of its blocks' tables in any order and any cutting, and every score below is the same to the last bit. Id 0
is background. A ratio of nothing to nothing is 1.0 (nothing was asked, nothing was wrong) unless a docstring says
otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from volseg.errors import UserError

SLAB = 1 << 18  # voxels compared at once, so that the comparison stays in the processor's cache
NEAR = 2  # voxels between the centers of two voxels whose objects touch, at most
TENTH = 10  # an overlap counts towards splits and mergers where it is more than one tenth of an object


@dataclass(frozen=True, eq=False)
class Contingency:
    """Voxels of each (truth id, pred id) pair that occurs, sorted by truth id, then pred id.

    ``truth`` and ``pred`` are uint64 ids, ``counts`` int64 voxels, all of one length.

    >>> table = Contingency.of(np.array([0, 7, 7, 7]), np.array([0, 0, 9, 9]))
    >>> table.truth.tolist(), table.pred.tolist(), table.counts.tolist()
    ([0, 7, 7], [0, 0, 9], [1, 1, 2])
    """

    truth: np.ndarray
    pred: np.ndarray
    counts: np.ndarray

    @classmethod
    def empty(cls) -> Contingency:
        """The table of no voxels; the start of a sum."""
        return cls(np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.int64))

    @classmethod
    def of(cls, truth: np.ndarray, pred: np.ndarray) -> Contingency:
        """The table of two label arrays of one shape and any integer or bool dtypes.

        Runs of equal pairs along the last axis are counted before anything is sorted, so a background voxel costs two
        comparisons. Raises ValueError for unequal shapes, other dtypes and negative ids.
        """
        if truth.shape != pred.shape:
            raise ValueError(f"truth has shape {truth.shape} and pred {pred.shape}; a table needs equal shapes")
        truth, pred = _ids(truth, "truth").reshape(-1), _ids(pred, "pred").reshape(-1)
        slabs = (slice(i, i + SLAB) for i in range(0, truth.size, SLAB))
        return _total([cls.empty(), *(_total([_runs(truth[slab], pred[slab])]) for slab in slabs)])

    def renamed(self, pred: np.ndarray) -> Contingency:
        """The table after each predicted id ``i`` has become ``pred[i]``: other decisions, counted without the voxels."""
        return _total([Contingency(self.truth, pred[self.pred].astype(np.uint64), self.counts)])

    def __add__(self, other: Contingency) -> Contingency:
        return _total([self, other])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Contingency):
            return NotImplemented
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in ("truth", "pred", "counts"))

    __hash__ = None


def _ids(labels: np.ndarray, name: str) -> np.ndarray:
    """``labels`` as they are, if they may be ids."""
    if labels.dtype.kind not in "bui":
        raise ValueError(f"{name} has dtype {labels.dtype}; labels are whole numbers")
    if labels.dtype.kind == "i" and labels.size and labels.min() < 0:
        raise ValueError(f"{name} holds the negative label {labels.min()}; background is 0 and ids are positive")
    return labels


def _runs(truth: np.ndarray, pred: np.ndarray) -> Contingency:
    """The runs of equal pairs in two flat arrays, in their order: a table whose rows may repeat."""
    changed = truth[1:] != truth[:-1]
    changed |= pred[1:] != pred[:-1]
    edges = np.concatenate(([0], np.flatnonzero(changed) + 1, [truth.size]))
    starts = edges[:-1]
    return Contingency(truth[starts].astype(np.uint64), pred[starts].astype(np.uint64), np.diff(edges))


def _total(tables: list[Contingency]) -> Contingency:
    """The sum of tables, whose rows may come in any order and repeat: each pair once, sorted."""
    truth, pred, counts = (np.concatenate([getattr(t, name) for t in tables]) for name in ("truth", "pred", "counts"))
    order = np.lexsort((pred, truth))
    truth, pred, counts = truth[order], pred[order], counts[order]
    first = np.ones(truth.size, bool)
    first[1:] = (truth[1:] != truth[:-1]) | (pred[1:] != pred[:-1])
    starts = np.flatnonzero(first)
    return Contingency(truth[starts], pred[starts], np.add.reduceat(counts, starts) if starts.size else counts)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 1.0


def foreground(table: Contingency) -> dict:
    """Voxel scores of "some object" against "no object": iou, dice, accuracy, precision, recall and the four counts.

    Where neither side has foreground every score is 1.0. Where only pred has some, iou, dice and precision are 0.0 and
    recall is 1.0; where only truth has some, iou, dice and recall are 0.0 and precision is 1.0.
    """
    true, claimed = table.truth > 0, table.pred > 0
    tp, fp, fn, tn = (
        int(table.counts[cell].sum()) for cell in (true & claimed, ~true & claimed, true & ~claimed, ~true & ~claimed)
    )
    return {
        "iou": _ratio(tp, tp + fp + fn),
        "dice": _ratio(2 * tp, 2 * tp + fp + fn),
        "accuracy": _ratio(tp + tn, tp + fp + fn + tn),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "true_positive_voxels": tp,
        "false_positive_voxels": fp,
        "false_negative_voxels": fn,
        "true_negative_voxels": tn,
    }


@dataclass(frozen=True)
class _Overlaps:
    """The objects of a table and the pairs of them that share voxels.

    ``truth_voxels``, ``pred_voxels``: size of each object. ``truth``, ``pred``, ``both``: per pair, the number of each
    object in those lists and the voxels shared.
    """

    truth_voxels: np.ndarray
    pred_voxels: np.ndarray
    truth: np.ndarray
    pred: np.ndarray
    both: np.ndarray

    @property
    def iou(self) -> np.ndarray:
        return self.both / (self.truth_voxels[self.truth] + self.pred_voxels[self.pred] - self.both)


def _sum_by(index: np.ndarray, values: np.ndarray, length: int) -> np.ndarray:
    """Sums of whole numbers per index, exact beyond 2**53."""
    sums = np.zeros(length, np.int64)
    np.add.at(sums, index, values)
    return sums


def _sizes(ids: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct ids and the voxels of each."""
    distinct, index = np.unique(ids, return_inverse=True)
    return distinct, _sum_by(index, counts, distinct.size)


def _overlaps(table: Contingency) -> _Overlaps:
    true, claimed = table.truth > 0, table.pred > 0
    both = true & claimed
    truth_ids, truth_voxels = _sizes(table.truth[true], table.counts[true])
    pred_ids, pred_voxels = _sizes(table.pred[claimed], table.counts[claimed])
    truth, pred = np.searchsorted(truth_ids, table.truth[both]), np.searchsorted(pred_ids, table.pred[both])
    return _Overlaps(truth_voxels, pred_voxels, truth, pred, table.counts[both])


def _assign(truth: np.ndarray, pred: np.ndarray, iou: np.ndarray) -> np.ndarray:
    """Which pairs to keep so that every object is in one at most: as many as possible, of those the largest sum of IoU.

    Every truth object may also take a partner of its own that nobody else can have, so a full matching of the sparse
    graph always exists; a true pair gains 1 over that, and its IoU only decides between matchings of one size.
    """
    if not truth.size:
        return np.zeros(0, bool)
    (rows, r), (columns, c) = np.unique(truth, return_inverse=True), np.unique(pred, return_inverse=True)
    alone = np.arange(rows.size)
    gain = np.concatenate([2 + iou / (rows.size + 1), np.ones(rows.size)])
    ends = np.concatenate([r, alone]), np.concatenate([c, columns.size + alone])
    graph = csr_array((gain, ends), shape=(rows.size, columns.size + rows.size))
    return min_weight_full_bipartite_matching(graph, maximize=True)[1][r] == c


def _matched(overlaps: _Overlaps, threshold: float) -> np.ndarray:
    """Which pairs are matched: those whose IoU is above the threshold, each object in one pair at most."""
    iou = overlaps.iou
    above = iou > threshold
    if threshold < 0.5:  # from one half upwards no object can be in two such pairs
        above[above] = _assign(overlaps.truth[above], overlaps.pred[above], iou[above])
    return above


def _detection(overlaps: _Overlaps, threshold: float) -> dict:
    """Object scores at one IoU threshold; see :func:`instances`."""
    truths, preds = overlaps.truth_voxels.size, overlaps.pred_voxels.size
    iou = overlaps.iou[_matched(overlaps, threshold)]
    hits, sum_iou = iou.size, float(iou.sum())
    return {
        "precision": _ratio(hits, preds),
        "recall": _ratio(hits, truths),
        "f1": _ratio(2 * hits, truths + preds),
        "pq": _ratio(2 * sum_iou, truths + preds),
        "sq": sum_iou / hits if hits else float(truths + preds == 0),
        "rq": _ratio(2 * hits, truths + preds),
        "matched": hits,
    }


def _segmentation_accuracy(overlaps: _Overlaps, threshold: float) -> float:
    """TP / (TP + FP + FN) at one IoU threshold."""
    hits = int(np.count_nonzero(_matched(overlaps, threshold)))
    return _ratio(hits, overlaps.truth_voxels.size + overlaps.pred_voxels.size - hits)


def _conditional_entropy(counts: np.ndarray, given: np.ndarray) -> float:
    """Bits left in a voxel's pair once the part in which it lies is known; ``given`` is the part's size, per pair."""
    return float(np.sum(counts * np.log2(given / counts)) / counts.sum()) if counts.size else 0.0


def _pairs_of_voxels(sizes: np.ndarray) -> float:
    """Ordered pairs of distinct voxels that lie in one part; float, since squares of sizes pass 2**63."""
    sizes = sizes.astype(np.float64)
    return float(np.sum(sizes * (sizes - 1)))


def _partitions(table: Contingency) -> dict:
    """Variation of information and adapted Rand scores over the voxels that the truth labels; see :func:`instances`."""
    true = table.truth > 0
    truth, pred, counts = table.truth[true], table.pred[true], table.counts[true]
    (truth_ids, truth_voxels), (pred_ids, pred_voxels) = _sizes(truth, counts), _sizes(pred, counts)
    together = _pairs_of_voxels(counts)
    in_truth, in_pred = _pairs_of_voxels(truth_voxels), _pairs_of_voxels(pred_voxels)
    return {
        "voi_split": _conditional_entropy(counts, truth_voxels[np.searchsorted(truth_ids, truth)]),
        "voi_merge": _conditional_entropy(counts, pred_voxels[np.searchsorted(pred_ids, pred)]),
        "rand_error": 1.0 - _ratio(2 * together, in_truth + in_pred),
        "rand_precision": _ratio(together, in_pred),
        "rand_recall": _ratio(together, in_truth),
    }


def _faults(overlaps: _Overlaps) -> dict:
    """Numbers of split, merged, missed and spurious objects; see :func:`instances`."""
    truths, preds = overlaps.truth_voxels.size, overlaps.pred_voxels.size
    holds = TENTH * overlaps.both > overlaps.truth_voxels[overlaps.truth]  # the pred object holds a share of the truth
    found = _sum_by(overlaps.truth, overlaps.both, truths)
    true = _sum_by(overlaps.pred, overlaps.both, preds)
    return {
        "split": int(np.count_nonzero(np.bincount(overlaps.truth[holds], minlength=truths) > 1)),
        "merged": int(np.count_nonzero(np.bincount(overlaps.pred[holds], minlength=preds) > 1)),
        "missed": int(np.count_nonzero(TENTH * found < overlaps.truth_voxels)),
        "spurious": int(np.count_nonzero(TENTH * true < overlaps.pred_voxels)),
    }


def check_threshold(iou: float) -> None:
    """Refuses an IoU threshold that no pair or every pair could pass."""
    if not 0 <= iou < 1:
        raise UserError(f"iou {iou} is no threshold: objects match where their IoU is greater, so give 0 <= iou < 1")


def instances(table: Contingency, iou: float = 0.5) -> dict:
    """Scores of the objects, plain floats and ints.

    **Partitions**, over the voxels whose truth id is not 0 (pred's background counts there as one more segment; what
    pred claims outside the truth is not seen: look at precision, spurious and the foreground scores for that):

    - ``voi_split`` = H(pred | truth), ``voi_merge`` = H(truth | pred), in bits (Meila 2007), as
      ``skimage.metrics.variation_of_information(truth, pred, ignore_labels=(0,))``; 0.0 where the truth is empty.
    - ``rand_error`` = 1 - F-score of voxel pairs, as ``skimage.metrics.adapted_rand_error`` (Arganda-Carreras 2015).
      ``rand_precision``: share of the pairs in one pred segment that truth joins too, lowered by mergers;
      ``rand_recall``: share of the pairs in one truth object that pred joins too, lowered by splits. skimage (0.26)
      returns these two the other way round from its own documentation (scikit-image issue 6485).

    **Detection**. A truth and a pred object match where their IoU over all voxels is greater than ``iou``,
    0 <= iou < 1; from 0.5 upwards that is unique, below it the matching has as many pairs as possible and of those the
    largest sum of IoU. ``matched`` pairs are TP, other pred objects FP, other truth objects FN:

    - ``precision`` = TP / (TP + FP), ``recall`` = TP / (TP + FN), ``f1`` = TP / (TP + FP/2 + FN/2).
    - ``pq`` = ``sq`` x ``rq`` (Kirillov 2019): ``sq`` the mean IoU of matched pairs, 0.0 where there are objects but no
      match; ``rq`` is f1.
    - ``sa50``, ``sa75``: TP / (TP + FP + FN) at IoU 0.5 and 0.75, whatever ``iou`` is.

    **Counts** of objects: ``truth_objects``, ``pred_objects``, and

    - ``split``: truth objects of which at least two pred objects each hold more than a tenth of the voxels;
    - ``merged``: pred objects that each hold more than a tenth of the voxels of at least two truth objects;
    - ``missed``: truth objects with less than a tenth of their voxels in any pred objects, all together;
    - ``spurious``: pred objects with less than a tenth of their voxels in any truth objects, all together.

    Raises UserError for ``iou`` outside its range.
    """
    check_threshold(iou)
    overlaps = _overlaps(table)
    return {
        "iou_threshold": float(iou),
        **_detection(overlaps, iou),
        "sa50": _segmentation_accuracy(overlaps, 0.5),
        "sa75": _segmentation_accuracy(overlaps, 0.75),
        **_partitions(table),
        "truth_objects": int(overlaps.truth_voxels.size),
        "pred_objects": int(overlaps.pred_voxels.size),
        **_faults(overlaps),
    }


# ---------------------------------------------------------------- objects that touch


def touching(labels: np.ndarray) -> np.ndarray:
    """Pairs ``a < b`` of labels (uint64, n x 2, sorted) with voxels at most `NEAR` apart, between centers.

    So two objects touch when they share a voxel face, edge or corner, or one voxel lies between them. The pairs of a
    volume are those of its blocks, each grown by `NEAR`, in any cutting.

    >>> touching(np.array([[[5, 5, 0, 3, 0, 0, 9]]])).tolist()
    [[3, 5]]
    """
    padded = np.pad(_ids(labels, "labels").astype(np.uint64), NEAR)
    flat, at = padded.ravel(), np.flatnonzero(padded)
    here, found = flat[at], [np.empty((0, 2), np.uint64)]
    for step in _steps(padded.shape):
        there = flat[at + step]
        apart = (there != here) & (there > 0)
        found.append(np.unique(np.sort(np.stack([here[apart], there[apart]], axis=1), axis=1), axis=0))
    return np.unique(np.concatenate(found), axis=0)


def _steps(shape: tuple[int, int, int]) -> list[int]:
    """The ways, in the linear index of an array of that shape, from a voxel to those ahead of it that are `NEAR`."""
    ways = product(range(-NEAR, NEAR + 1), repeat=3)
    return [int(np.dot(way, (shape[1] * shape[2], shape[2], 1)))
            for way in ways if way > (0, 0, 0) and np.dot(way, way) <= NEAR**2]  # fmt: skip


def pairs(table: Contingency, near: np.ndarray, iou: float = 0.5) -> dict:
    """How true objects that touch were told apart. ``near`` are their ids, as `touching` gives them.

    - ``pairs``: how many of ``near`` the table holds; ``separated``: those of which both objects are matched, as in
      `instances`, and so by different pred objects; ``pair_recall``: their share.
    - ``pairs_merged``: those of which one pred object holds more than a tenth of the voxels of both.
    - ``split_share``: of all true objects, touching or not, the share that `instances` counts as ``split``.

    Raises UserError for ``iou`` outside its range.
    """
    check_threshold(iou)
    overlaps = _overlaps(table)
    truth_ids = np.unique(table.truth[table.truth > 0])
    number = np.searchsorted(truth_ids, near[np.isin(near, truth_ids).all(axis=1)])
    matched = np.zeros(truth_ids.size, bool)
    matched[overlaps.truth[_matched(overlaps, iou)]] = True
    separated = int(matched[number].all(axis=1).sum())
    return {
        "pairs": len(number),
        "separated": separated,
        "pair_recall": _ratio(separated, len(number)),
        "pairs_merged": sum(_share_a_holder(overlaps, a, b) for a, b in number.tolist()),
        "split_share": _faults(overlaps)["split"] / truth_ids.size if truth_ids.size else 0.0,
    }


def _share_a_holder(overlaps: _Overlaps, a: int, b: int) -> bool:
    """Whether one pred object holds more than a tenth of both true objects (numbers in the lists)."""
    holds = TENTH * overlaps.both > overlaps.truth_voxels[overlaps.truth]
    of_a, of_b = (overlaps.pred[holds & (overlaps.truth == n)] for n in (a, b))
    return bool(np.isin(of_a, of_b).any())
