"""How many voxels each pair of a true and a predicted object shares: a sparse table that adds up over blocks.

It is a sum over voxels, so the table of a volume is the sum of its blocks' tables, in any order and any cutting.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SLAB_VOXELS = 1 << 18  # compared at once, so that the comparison stays in the processor's cache


@dataclass(frozen=True, eq=False)
class Contingency:
    """Voxels of each (truth id, pred id) pair that occurs, sorted by truth id, then pred id.

    Attributes
    ----------
    truth, pred
        Ids of each pair, uint64; 0 is background.
    counts
        Voxels of each pair, int64.

    Examples
    --------
    >>> table = Contingency.from_labels(np.array([0, 7, 7, 7]), np.array([0, 0, 9, 9]))
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
    def from_labels(cls, truth: np.ndarray, pred: np.ndarray) -> Contingency:
        """The table of two label arrays of one shape and any integer or bool dtypes.

        Runs of equal pairs along the last axis are counted before anything is sorted, so a background voxel costs two
        comparisons.

        Raises
        ------
        ValueError
            The shapes are unequal, a dtype is another, or an id is negative.
        """
        if truth.shape != pred.shape:
            raise ValueError(f"truth has shape {truth.shape} and pred {pred.shape}; a table needs equal shapes")
        truth, pred = check_labels(truth, "truth").reshape(-1), check_labels(pred, "pred").reshape(-1)
        slabs = (slice(i, i + SLAB_VOXELS) for i in range(0, truth.size, SLAB_VOXELS))
        return _total([cls.empty(), *(_total([_runs(truth[slab], pred[slab])]) for slab in slabs)])

    def relabeled(self, pred: np.ndarray) -> Contingency:
        """The table after each predicted id ``i`` has become ``pred[i]``: other decisions, counted without the voxels."""
        return _total([Contingency(self.truth, pred[self.pred].astype(np.uint64), self.counts)])

    def __add__(self, other: Contingency) -> Contingency:
        return _total([self, other])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Contingency):
            return NotImplemented
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in ("truth", "pred", "counts"))

    __hash__ = None  # type: ignore[assignment]  # not hashable


def check_labels(labels: np.ndarray, name: str) -> np.ndarray:
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
