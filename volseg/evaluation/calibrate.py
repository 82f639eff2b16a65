"""Decoding parameters chosen against annotated instances, from a finished run's tables.

The voxels are read once, to count how basins and true objects overlap. What a candidate decides is then a renaming of
basins in that count: thousands of voxels become a few rows, and a candidate costs milliseconds. Only rules of ``[stitch]``
can be searched so: ``[fragments]`` (threshold, contour, smooth, distance) makes the basins, and each of its values needs
``volseg segment`` and a calibration of its own.

A few dozen objects make a noisy score, so the candidate at the top is not always chosen: see `Calibration.chosen`. What the
choice is worth on voxels that it was not made on is told by slabs along z, each scored by the choice of the others.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from volseg.box import Box
from volseg.config import Stitch
from volseg.engine.corrections import region_constraints
from volseg.errors import UserError
from volseg.evaluation.contingency import Contingency
from volseg.evaluation.evaluate import parse_box, read_truth
from volseg.evaluation.metrics import score_foreground, score_instances
from volseg.evaluation.stored import StoredRun, open_stored
from volseg.inference import model
from volseg.progress import format_table
from volseg.segmentation import holes
from volseg.segmentation.rules import Rules, components, label_components
from volseg.segmentation.stitch import Basins

SEEDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975)
PERSISTENCES = (0.0, 0.02, 0.05, 0.1)
JOIN_MEANS = (0.0, 0.5, 0.6, 0.7, 0.8)  # below the seed level: no border's mean is higher than its lowest saddle
MIN_VOXELS = (0, 250, 1000, 2000, 4000, 8000, 16000, 32000)
SEARCHED = (
    "seed",
    "persistence",
    "join_mean",
    "min_voxels",
    "count_cut",
    "seed_low",
)  # the last as the run has it, or 0
SLABS = 4  # along z, of which each is scored by the choice of the others
MIN_GAIN_OBJECTS = 0.5  # a PQ that is worth less of the true objects tells candidates not apart
SCORES = ("pq", "sa50", "voi_split", "voi_merge", "split", "merged", "missed", "spurious")
SHOWN_CANDIDATES = 10


@dataclass(frozen=True)
class Candidate:
    """Settings of ``[stitch]`` and the scores of what they decide.

    ``own`` and ``default`` mark the run's own settings and volseg's defaults; ``iou`` is that of the foreground, the other
    scores are those of `InstanceScores`.
    """

    seed: float
    persistence: float
    join_mean: float
    min_voxels: int
    count_cut: bool
    seed_low: float
    own: bool
    default: bool
    iou: float
    pq: float
    sa50: float
    voi_split: float
    voi_merge: float
    split: int
    merged: int
    missed: int
    spurious: int

    @property
    def settings(self) -> list[str]:
        """The settings as ``--set`` takes them."""
        return [f"stitch.{name}={str(getattr(self, name)).lower()}" for name in SEARCHED]

    @property
    def scores(self) -> tuple[float, ...]:
        return (self.iou, *(getattr(self, name) for name in SCORES))

    def to_json(self) -> dict:
        """Plain values that ``json.dumps`` takes."""
        return asdict(self)


@dataclass(frozen=True)
class Joins:
    """The joins of a run held against truth, where each basin is part of the true object that it overlaps most, or of none.

    Attributes
    ----------
    borders
        Pairs of touching basins that are parts of true objects: what a rule on joins decides on.
    together
        Pairs of true objects that touch and were joined there.
    apart
        Pairs of objects of the run that touch where both are parts of one true object.
    """

    borders: int
    together: int
    apart: int

    def __str__(self) -> str:
        return (
            f"of {self.borders} borders between basins of true objects, joins bring {self.together} pairs of objects together "
            f"that are two, and leave {self.apart} pairs apart that are one"
        )


Row = tuple[Candidate, list]  # with its PQ in each slab, and in all others


@dataclass(frozen=True)
class Calibration:
    """All candidates, best first: by PQ, then by VOI, then the nearest to the run's own settings.

    Attributes
    ----------
    run
        Its path.
    candidates
        What was tried.
    chosen
        The run's own settings where the best candidate's PQ is less than `MIN_GAIN_OBJECTS` of an object above theirs. Else
        of all that are as near to the best candidate, which differ in sizes alone, the one in the middle of the sizes.
    other_slabs_pq
        The mean PQ over slabs along z, each decided as the others choose: what to expect of new voxels. None where the part
        with truth is not at least `SLABS` sections, or a slab has no object.
    ceiling_pq
        The PQ if each basin became part of the true object of which it holds the most voxels, or of none where that is the
        background: about what rules on joins and sizes can reach at most. What lacks beyond it is the network's, or that of
        the settings of ``[fragments]``.
    joins
        What the run's own joins, before sizes, got wrong of what they decide on.
    """

    run: str
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    other_slabs_pq: float | None = None
    ceiling_pq: float | None = None
    joins: Joins | None = None

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    @property
    def own(self) -> Candidate:
        """That of the run's own settings."""
        return next(candidate for candidate in self.candidates if candidate.own)

    @property
    def default(self) -> Candidate:
        """That of volseg's defaults."""
        return next(candidate for candidate in self.candidates if candidate.default)

    def to_json(self) -> dict:
        """Plain values that ``json.dumps`` takes."""
        return {
            "run": self.run, "other_slabs_pq": self.other_slabs_pq, "ceiling_pq": self.ceiling_pq,
            "joins": self.joins and asdict(self.joins),
            "candidates": [candidate.to_json() for candidate in self.candidates],
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [format_candidates(self.candidates)]
        if self.other_slabs_pq is not None:
            lines.append(f"PQ {self.other_slabs_pq:.3f} in slabs along z, each decided as the others choose")
        if self.ceiling_pq is not None:
            lines.append(f"PQ {self.ceiling_pq:.3f} if each basin joined the true object that it overlaps most")
        if self.joins:
            lines.append(str(self.joins))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def calibrate(run: str | PathLike | Any, truth: str | PathLike | Any, *, box: Box | str | None = None) -> Calibration:
    """Score many settings of ``[stitch]`` on a finished run, without deciding it again.

    Parameters
    ----------
    run
        A finished run with its work folder, or what has its place as ``path``.
    truth
        A volume of instance labels or a mask, as `evaluate` takes it.
    box
        The voxels to score, as a `Box` or as ``z0:z1,y0:y1,x0:x1``; None takes all.

    Raises
    ------
    UserError
        There is no finished run, its basins were cleaned or stitched by a tree, or the truth does not fit.
    """
    stored = open_stored(run)
    if stored.run.partition:
        raise UserError(
            f"objects of {stored.path} are those of a partition, not of rules: take it back with --partition none"
        )
    basins = _basins(stored)
    shape = stored.run.output_shape
    box = parse_box(box) or Box.from_shape(shape)
    if not box.voxels or box.clip(shape) != box:
        raise UserError(f"box {box} is empty or leaves the run of shape {shape} (z y x); give one inside it")
    own = stored.config.stitch
    read = read_truth(truth, stored.run.output_grid.shape, box)  # objects of a mask are those of the whole box
    slabs = [_overlap(stored, read, slab, basins.minimum.size) for slab in _slabs(box)]
    rows = list(_candidates(stored, basins, slabs, settings_to_try(own)))

    def order(row: Row) -> tuple:
        candidate = row[0]
        distances = (abs(getattr(candidate, name) - getattr(own, name)) for name in SEARCHED)
        return -candidate.pq, candidate.voi_split + candidate.voi_merge, *distances

    rows.sort(key=order)
    candidates = tuple(candidate for candidate, _ in rows)
    objects = np.unique(np.concatenate([table.truth[table.truth > 0] for table in slabs])).size
    overlap = sum(slabs, Contingency.empty())
    joins = _joins(stored, basins, _true_objects(overlap, basins.minimum.size))
    ceiling = score_instances(best_joins(overlap)).pq
    return Calibration(
        stored.path, candidates, _choose(candidates, objects), _other_slabs_pq(rows, slabs), ceiling, joins
    )


def basin_overlap(run: str | PathLike | Any, truth: str | PathLike | Any) -> Contingency:
    """How the basins of a finished run (from 1) overlap the objects of a truth, as `calibrate` takes both."""
    stored = open_stored(run)
    box, basins = Box.from_shape(stored.run.output_shape), _basins(stored)
    return _overlap(stored, read_truth(truth, stored.run.output_grid.shape, box), box, basins.minimum.size)


def _basins(run: StoredRun) -> Basins:
    basins = run.layout.load_basins()
    if basins is None:
        raise UserError(
            f"{run.path} has no basins to decide on: give a finished run with its work folder, not cleaned nor stitched "
            f"by a tree (volseg segment {run.path} --set stitch.reduce=flat makes them in one process)"
        )
    return basins


def _slabs(box: Box) -> list[Box]:
    """`SLABS` parts of ``box`` along z; itself where it has fewer sections."""
    edges = np.linspace(box.start[0], box.stop[0], SLABS + 1).astype(int).tolist()
    if box.shape[0] < SLABS:
        return [box]
    return [Box((a, *box.start[1:]), (b, *box.stop[1:])) for a, b in pairwise(edges)]


def _choose(candidates: tuple[Candidate, ...], objects: int) -> Candidate:
    """`Calibration.chosen` of candidates, best first; ``objects`` are true."""
    best, least = candidates[0], candidates[0].pq - MIN_GAIN_OBJECTS / max(1, objects)
    own = next(candidate for candidate in candidates if candidate.own)
    if own.pq > least or own.pq == best.pq:
        return own
    others = [name for name in SEARCHED if name != "min_voxels"]
    near = [c for c in candidates if c.pq > least and all(getattr(c, n) == getattr(best, n) for n in others)]
    near.sort(key=lambda candidate: candidate.min_voxels)
    return near[(len(near) - 1) // 2] if near else best


def _other_slabs_pq(rows: list[Row], slabs: list[Contingency]) -> float | None:
    """`Calibration.other_slabs_pq` of candidates with their PQ in each slab and in all others."""
    if len(slabs) < SLABS or not all((table.truth > 0).any() for table in slabs):
        return None
    scores = np.array([pq for _, pq in rows])  # candidates, slabs, itself or the others
    return float(np.mean([scores[scores[:, k, 1].argmax(), k, 0] for k in range(len(slabs))]))


def best_joins(overlap: Contingency) -> Contingency:
    """The same where each basin (from 1) is part of the true object of which it holds the most voxels, or of none.

    >>> overlap = Contingency.from_labels(np.array([1, 1, 1, 2, 2, 0]), np.array([1, 1, 2, 2, 2, 0]))
    >>> round(score_instances(best_joins(overlap)).pq, 2)  # basin 2 holds two voxels of object 2, and one of object 1
    0.67
    """
    return overlap.relabeled(_true_objects(overlap, int(overlap.pred.max(initial=0))))


def _true_objects(overlap: Contingency, basins: int) -> np.ndarray:
    """uint64 (basins + 1,): the object of which each basin, from 1, holds the most voxels; 0 where that is background."""
    order = np.lexsort([overlap.truth, -overlap.counts, overlap.pred])
    basin, first = np.unique(overlap.pred[order], return_index=True)
    found = np.zeros(max(basins, int(basin.max(initial=0))) + 1, np.uint64)
    found[basin] = np.where(basin > 0, overlap.truth[order][first], 0)
    return found


def _joins(run: StoredRun, basins: Basins, target: np.ndarray) -> Joins:
    """`Calibration.joins`, of the true object of each basin, from 1."""
    rules, regions = run.run.rules, region_constraints(run.run)
    own = Rules(rules.seed_height, rules.persistence, rules.join_height, low_height=rules.low_height)
    joined = components(basins, own, regions and regions.looked_up(lambda i: run.layout.block_labels.load(i).basin))
    ends = basins.edges["a"], basins.edges["b"]
    (a, b), (one, other) = ([values[end] for end in ends] for values in (target[1:], joined))
    objects = (a > 0) & (b > 0)
    together, apart = objects & (a != b) & (one == other), objects & (a == b) & (one != other)
    return Joins(
        int(objects.sum()), *(_pairs(x[found], y[found]) for x, y, found in ((a, b, together), (one, other, apart)))
    )


def _pairs(a: np.ndarray, b: np.ndarray) -> int:
    """How many different pairs there are, in either order."""
    return len(np.unique(np.sort(np.stack([a, b], axis=1), axis=1), axis=0))


def settings_to_try(own: Stitch) -> list[Stitch]:
    """What is tried, each once: the run's own settings, the defaults, and all combinations of the lists above."""
    low = own.seed_low
    grid = product(SEEDS, PERSISTENCES, JOIN_MEANS, MIN_VOXELS, (False, True))
    values = ((seed, share, mean, size, cut and size > 0, low * (low < seed)) for seed, share, mean, size, cut in grid
              if mean < seed)  # fmt: skip
    tried = (own.model_copy(update=dict(zip(SEARCHED, each, strict=True))) for each in values)
    return list(dict.fromkeys([own, _default(own), *tried]))


def _default(own: Stitch) -> Stitch:
    """The run's own settings, with volseg's defaults for those that are searched."""
    return own.model_copy(update={name: getattr(Stitch(), name) for name in SEARCHED})


def _overlap(run: StoredRun, read: Callable[[Box], np.ndarray], box: Box, basins: int) -> Contingency:
    """How basins and, where holes are filled, holes (from 1) overlap true objects in ``box``."""
    grid = run.run.output_grid
    table = Contingency.empty()
    for i in grid.overlapping(box):
        part = grid[i].intersect(box)
        table += Contingency.from_labels(read(part), _output_basins(run, i, part, basins))
    return table


def _output_basins(run: StoredRun, i: int, part: Box, basins: int) -> np.ndarray:
    """`_number_basins` of a part of block ``i`` of the labels' grid."""
    if not run.run.restored:
        return _number_basins(run, i, part, basins)
    inside = run.run.to_own.nearest_box(part)
    number = np.zeros(inside.shape, np.int64)
    for j in run.grid.overlapping(inside):
        own = run.grid[j].intersect(inside)
        number[own.slices_within(inside)] = _number_basins(run, j, own, basins)
    return run.run.to_own.take(number, inside, part)


def _number_basins(run: StoredRun, block: int, part: Box, basins: int) -> np.ndarray:
    """The basin (from 1) of each voxel of a part of a block, 0 outside the mask; where holes are filled, there its hole,
    numbered after the ``basins``."""
    labels = run.layout.block_labels.load(block)
    if not run.fills:
        return np.r_[0, 1 + labels.basin][run.regions(part)]
    place = holes.number_holes(run.regions(run.grid[block]))[part.slices_within(run.grid[block])]
    return np.r_[0, 1 + labels.basin, 1 + basins + labels.hole][place]


def _candidates(run: StoredRun, basins: Basins, slabs: list[Contingency], tried: list[Stitch]) -> Iterator[Row]:
    """A candidate for each settings, with its PQ in each slab and in all others.

    Those that differ in sizes alone share components; those that decide alike, scores.
    """
    overlap = sum(slabs, Contingency.empty())
    others = [sum(slabs[:k] + slabs[k + 1 :], Contingency.empty()) for k in range(len(slabs))]
    own, default = run.config.stitch, _default(run.config.stitch)
    volume_holes = run.layout.volume_holes.load() if run.fills else None
    regions = region_constraints(run.run)
    wanted = regions and regions.looked_up(lambda i: run.layout.block_labels.load(i).basin)
    joined: dict[Rules, np.ndarray] = {}
    scored: dict[bytes, tuple[dict, list]] = {}
    for settings in tried:
        rules = replace(run.run, config=run.config.model_copy(update={"stitch": settings})).rules
        joins = Rules(rules.seed_height, rules.persistence, rules.join_height, low_height=rules.low_height)
        if joins not in joined:
            joined = {joins: components(basins, joins, wanted)}
        label = label_components(basins, rules, joined[joins], volume_holes, wanted)
        key = label.tobytes()
        if key not in scored:
            name = np.r_[0, label]
            parts = [
                [_pq(slab.relabeled(name)), _pq(rest.relabeled(name))] for slab, rest in zip(slabs, others, strict=True)
            ]
            scored[key] = _score(overlap.relabeled(name)), parts
        values = {name: getattr(settings, name) for name in SEARCHED}
        scores, parts = scored[key]
        yield Candidate(**values, own=settings == own, default=settings == default, **scores), parts


def _pq(table: Contingency) -> float:
    return score_instances(table).pq


def _score(table: Contingency) -> dict:
    scores = score_instances(table)
    return {"iou": score_foreground(table).iou, **{name: getattr(scores, name) for name in SCORES}}


def save_to_model(path: Path, candidate: Candidate, run: StoredRun) -> None:
    """The model file's own settings are the candidate's, the rest as in the run; its weights are left as they are."""
    card = model.load_card(path)
    decode = dict(card.decode)
    decode["fragments"] = run.config.fragments.model_dump(mode="json")
    values = {name: getattr(candidate, name) for name in SEARCHED}
    decode["stitch"] = run.config.stitch.model_dump(mode="json", exclude={"reduce"}) | values
    model.write_card(path, card.changed(decode=decode))


def format_candidates(candidates: tuple[Candidate, ...]) -> str:
    """The best candidates as plain text, the first of those that score alike; the run's own settings and the defaults."""
    first: dict[tuple, Candidate] = {}
    for candidate in candidates:
        first.setdefault(candidate.scores, candidate)
    best = list(first.values())[:SHOWN_CANDIDATES]
    marked = [candidate for candidate in candidates if (candidate.own or candidate.default) and candidate not in best]
    names = (*SEARCHED, "iou", *SCORES)
    rows = [(*(getattr(candidate, name) for name in names), _mark(candidate)) for candidate in [*best, *marked]]
    return format_table((*names, ""), rows)


def _mark(candidate: Candidate) -> str:
    marks = {"the run's own": candidate.own, "the defaults": candidate.default}
    return "".join(f" <- {mark}" for mark, holds in marks.items() if holds)
