"""What became of each object: matched, split, merged, missed or spurious, and where it lies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
from scipy.ndimage import find_objects

from volseg.box import Box, Triple
from volseg.evaluation.contingency import Contingency
from volseg.evaluation.metrics import INVERSE_SHARE, overlaps_of

Verdict = Literal["missed", "spurious", "split", "merged", "inexact", "matched"]
VERDICTS: tuple[Verdict, ...] = ("missed", "spurious", "split", "merged", "inexact", "matched")  # the worst first


@dataclass(frozen=True)
class ObjectScore:
    """What became of a true object, or of a predicted one that no true object stands for.

    Attributes
    ----------
    verdict
        The first that holds of: ``missed`` and ``split``, as `InstanceScores` has them; ``merged``, where a predicted object
        holds more than a tenth of it and of another one; ``matched``, where its IoU is above the threshold; ``inexact``. A
        predicted object is ``spurious``, as there.
    truth
        Its id in the truth; 0 for a spurious one.
    pred
        The id of the predicted object with the greatest IoU; 0 where none meets it.
    others
        Ids of the other pieces of a split object, or of the other true objects in a merged one.
    voxels
        How many it has.
    iou
        With ``pred``.
    box
        The voxels in which it lies; None where nobody looked.
    """

    verdict: Verdict
    truth: int
    pred: int
    others: tuple[int, ...]
    voxels: int
    iou: float
    box: Box | None = None

    def to_json(self) -> dict:
        """Plain values that ``json.dumps`` takes."""
        return {**asdict(self), "others": list(self.others), "box": str(self.box) if self.box else None}


def score_objects(table: Contingency, iou: float = 0.5) -> list[ObjectScore]:
    """Each true object, and the spurious ones: the worst verdicts first, of one verdict the largest object first.

    Parameters
    ----------
    table
        Shared voxels of true and predicted objects.
    iou
        A true object is matched where its IoU with a predicted one is greater.

    Examples
    --------
    >>> truth, pred = np.array([1, 1, 2, 2, 3, 3, 0]), np.array([5, 5, 6, 7, 0, 0, 8])
    >>> [(each.verdict, each.truth, each.pred, each.others) for each in score_objects(Contingency.from_labels(truth, pred))]
    [('missed', 3, 0, ()), ('spurious', 0, 8, ()), ('split', 2, 6, (7,)), ('matched', 1, 5, ())]
    """
    found = overlaps_of(table)
    of_truth, of_pred = _by_object(found.truth, found.truth_ids.size), _by_object(found.pred, found.pred_ids.size)
    holds, shares = INVERSE_SHARE * found.shared > found.truth_voxels[found.truth], found.iou
    scores = []
    for i, pairs in enumerate(of_truth):
        voxels, covered = int(found.truth_voxels[i]), int(found.shared[pairs].sum())
        best = int(pairs[np.argmax(shares[pairs])]) if pairs.size else -1
        pieces = pairs[holds[pairs]]
        partners = [int(k) for pair in pieces for k in of_pred[found.pred[pair]] if holds[k] and found.truth[k] != i]
        share = float(shares[best]) if best >= 0 else 0.0
        others: Iterable[int] = ()
        verdict: Verdict
        if INVERSE_SHARE * covered < voxels:
            verdict = "missed"
        elif pieces.size > 1:
            verdict, others = "split", (int(found.pred_ids[found.pred[k]]) for k in pieces if k != best)
        elif partners:
            verdict, others = "merged", {int(found.truth_ids[found.truth[k]]) for k in partners}
        else:
            verdict = "matched" if share > iou else "inexact"
        pred = int(found.pred_ids[found.pred[best]]) if best >= 0 else 0
        scores.append(ObjectScore(verdict, int(found.truth_ids[i]), pred, tuple(sorted(others)), voxels, share))
    for i, pairs in enumerate(of_pred):
        voxels = int(found.pred_voxels[i])
        if INVERSE_SHARE * int(found.shared[pairs].sum()) < voxels:
            share = float(shares[pairs].max(initial=0))
            scores.append(ObjectScore("spurious", 0, int(found.pred_ids[i]), (), voxels, share))
    return sorted(scores, key=lambda each: (VERDICTS.index(each.verdict), -each.voxels, each.truth, each.pred))


def _by_object(index: np.ndarray, count: int) -> list[np.ndarray]:
    """The pairs in which each of ``count`` objects is."""
    order = np.argsort(index, kind="stable")
    return np.split(order, np.searchsorted(index[order], np.arange(1, count))) if count else []


def located(
    scores: list[ObjectScore],
    read_truth: Callable[[Box], np.ndarray],
    read_pred: Callable[[Box], np.ndarray],
    boxes: list[Box],
) -> list[ObjectScore]:
    """The scores with the box of each object, read in parts that make up what was compared."""
    truth, pred = _bounds(read_truth, boxes), _bounds(read_pred, boxes)
    return [replace(each, box=truth[each.truth] if each.truth else pred[each.pred]) for each in scores]


def _bounds(read: Callable[[Box], np.ndarray], boxes: list[Box]) -> dict[int, Box]:
    """The box in which each id lies."""
    bounds: dict[int, Box] = {}
    for part in boxes:
        ids, index = np.unique(read(part), return_inverse=True)
        places = find_objects(index.reshape(part.shape) + 1)  # of 1, 2 .. ids.size
        for name, slices in zip(ids.tolist(), places, strict=True):
            if name:
                start = _sum(part.start, tuple(s.start for s in slices))
                box = Box(start, _sum(part.start, tuple(s.stop for s in slices)))
                bounds[name] = _around(bounds[name], box) if name in bounds else box
    return bounds


def _sum(a: Triple, b: tuple[int, ...]) -> Triple:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _around(a: Box, b: Box) -> Box:
    """The smallest box that holds both."""
    (z0, y0, x0), (z1, y1, x1) = np.minimum(a.start, b.start).tolist(), np.maximum(a.stop, b.stop).tolist()
    return Box((z0, y0, x0), (z1, y1, x1))
