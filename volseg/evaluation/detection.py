"""Scores of a run's objects as detections: which of the points that people set have an object's center near them."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from volseg.box import Box
from volseg.engine.finished import FinishedRun, open_run
from volseg.errors import UserError
from volseg.evaluation.evaluate import format_scores, parse_box
from volseg.evaluation.metrics import assign, ratio
from volseg.io import files, points

LISTED = 10  # points that are named where the scores are printed
REACH = 2  # radii that a center may be away, where no distance is given


@dataclass(frozen=True)
class Place:
    """A point, or the center of an object: its row or its label, and where it is, in voxels and in nm."""

    number: int
    z: float
    y: float
    x: float
    z_nm: float
    y_nm: float
    x_nm: float


@dataclass(frozen=True)
class Match:
    """A point and the object that stands for it: row, label, and how far the object's center is away."""

    row: int
    id: int
    distance_nm: float


@dataclass(frozen=True)
class DetectionScores:
    """What `evaluate_points` found.

    Attributes
    ----------
    pred, truth
        The run, and the table of points.
    box
        The voxels in which points and centers count.
    distance_nm
        How far a center may lie from its point; the longest of these, where each point has its own.
    precision, recall, f1
        TP / (TP + FP), TP / (TP + FN) and TP / (TP + FP/2 + FN/2); 1.0 of nothing to nothing.
    mean_distance_nm
        Of matched pairs; 0 where there is none.
    matched
        TP, by row.
    missed
        FN: points without an object, by row, from 1 below the heading of the table.
    spurious
        FP: objects without a point, by label.
    """

    pred: str
    truth: str
    box: Box
    distance_nm: float
    precision: float
    recall: float
    f1: float
    mean_distance_nm: float
    matched: tuple[Match, ...]
    missed: tuple[Place, ...]
    spurious: tuple[Place, ...]

    def _scores(self) -> dict:
        counts = {
            "points": len(self.matched) + len(self.missed), "objects": len(self.matched) + len(self.spurious),
            "matched": len(self.matched), "missed": len(self.missed), "spurious": len(self.spurious),
        }  # fmt: skip
        names = ("distance_nm", "precision", "recall", "f1", "mean_distance_nm")
        scores = {name: getattr(self, name) for name in names}
        return {"pred": self.pred, "truth": self.truth, "box": str(self.box), "detection": {**scores, **counts}}

    def to_json(self) -> dict:
        """Plain values that ``json.dumps`` takes."""
        lists = {"matches": [asdict(one) for one in self.matched]}
        for name, number in (("missed", "row"), ("spurious", "id")):
            places = [asdict(one) for one in getattr(self, name)]
            lists[name] = [{number: place.pop("number"), **place} for place in places]
        return {**self._scores(), **lists}

    def __str__(self) -> str:
        missed = _listed("missed    row", self.missed)
        return "\n".join([format_scores(self._scores()), *missed, *_listed("spurious  object", self.spurious)])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def _listed(what: str, places: Sequence[Place]) -> Iterator[str]:
    for one in places[:LISTED]:
        yield f"{what} {one.number} at {points.place_text(np.round((one.z, one.y, one.x), 1))} (z, y, x)"
    if len(places) > LISTED:
        yield f"{what}s: {len(places) - LISTED} more with --json"


def evaluate_points(
    pred: str | os.PathLike | FinishedRun,
    truth: str | os.PathLike,
    *,
    box: Box | str | None = None,
    distance_nm: float | None = None,
) -> DetectionScores:
    """Score the objects of a finished run as detections of points.

    A point and an object may be a pair if the object's center, its centroid, is no further from the point than
    ``distance_nm``. Of all ways to pair them, each once at most, the one with the most pairs counts, and of those the one
    whose distances add up to the least.

    Parameters
    ----------
    pred : path or FinishedRun
        A finished run.
    truth : path
        A table of points, see `volseg.io.points.read`; voxels are those of the run's labels.
    box : Box or str, optional
        Points and centers outside of it are left out, as a `Box` or as ``z0:z1,y0:y1,x0:x1``; all count if not given.
    distance_nm : float, optional
        If not given, twice the radius of each point: its ``radius_nm``, or five voxels of the plane.

    Returns
    -------
    DetectionScores
        With precision, recall, F1 and which points and objects have no partner.

    Raises
    ------
    UserError
        There is no finished run, the table is bad, or the box leaves the volume.
    """
    if distance_nm is not None and not distance_nm > 0:
        raise UserError(f"a distance of {distance_nm:g} nm finds nothing; give one above 0")
    run, where = open_run(files.path_of(pred)), parse_box(box)
    whole = Box.from_shape(run.shape)
    where = where or whole
    if not where.voxels or where.clip(run.shape) != where:
        raise UserError(f"box {where} is empty or leaves the volume of shape {run.shape} (z y x); give one inside it")
    size = np.array(run.voxel_size_nm)
    found = points.read(files.absolute(os.fspath(truth)), run.shape, run.voxel_size_nm)
    table = run.objects_arrow()
    centers = np.stack([table[f"centroid_{axis}_nm"].to_numpy() for axis in "zyx"], axis=1) / size
    limits = np.full(len(found), distance_nm) if distance_nm else REACH * found.radius_nm
    rows, objects = _inside(found.zyx, where), _inside(centers, where)
    ids, true_nm, pred_nm = table["id"].to_numpy()[objects], found.zyx[rows] * size, centers[objects] * size
    pairs = [
        Match(int(rows[i]) + 1, int(ids[j]), distance) for i, j, distance in _pairs(true_nm, pred_nm, limits[rows])
    ]
    own, hit = {one.row for one in pairs}, {one.id for one in pairs}
    return DetectionScores(
        pred=run.path, truth=found.path, box=where, distance_nm=float(limits.max()),
        precision=ratio(len(pairs), len(ids)), recall=ratio(len(pairs), len(rows)),
        f1=ratio(2 * len(pairs), len(ids) + len(rows)),
        mean_distance_nm=sum(one.distance_nm for one in pairs) / max(1, len(pairs)), matched=tuple(pairs),
        missed=_places(zip(rows + 1, found.zyx[rows], strict=True), size, own),
        spurious=_places(zip(ids, centers[objects], strict=True), size, hit),
    )  # fmt: skip


def _inside(zyx: np.ndarray, box: Box) -> np.ndarray:
    """Which places lie in the voxels of a box."""
    return np.flatnonzero(((zyx >= np.array(box.start) - 0.5) & (zyx < np.array(box.stop) - 0.5)).all(axis=1))


def _pairs(true_nm: np.ndarray, pred_nm: np.ndarray, limits: np.ndarray) -> list[tuple[int, int, float]]:
    """Pairs (index, index, distance), as many as there can be, of those the nearest; by the first index."""
    if not len(true_nm) or not len(pred_nm):
        return []
    from scipy.spatial import cKDTree

    near = cKDTree(pred_nm).query_ball_point(true_nm, limits)
    i = np.repeat(np.arange(len(near)), [len(some) for some in near])
    j = np.array([k for some in near for k in sorted(some)], np.int64)
    distance = np.linalg.norm(true_nm[i] - pred_nm[j], axis=1)
    kept = assign(i, j, 1 - distance / limits.max())
    return list(zip(i[kept].tolist(), j[kept].tolist(), distance[kept].tolist(), strict=True))


def _places(numbered: Any, size: np.ndarray, left_out: set[int]) -> tuple[Place, ...]:
    """Each number and its place in voxels, but for those that have a partner."""
    return tuple(
        Place(int(number), *np.round(zyx, 3).tolist(), *np.round(zyx * size, 3).tolist())
        for number, zyx in numbered
        if int(number) not in left_out
    )
