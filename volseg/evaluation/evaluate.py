"""Scores of one volume on disk against another, read block by block."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from volseg.box import Blocks, Box, Triple
from volseg.errors import UserError
from volseg.evaluation.contingency import Contingency
from volseg.evaluation.metrics import (
    TOUCHING_DISTANCE,
    ForegroundScores,
    InstanceScores,
    TouchingScores,
    check_threshold,
    score_foreground,
    score_instances,
    score_touching,
    touching_pairs,
)
from volseg.evaluation.object_scores import ObjectScore, located, score_objects
from volseg.evaluation.score_report import write_page
from volseg.evaluation.voxel_scores import BorderScores, Reliability, score_borders, score_reliability
from volseg.io import files, volume
from volseg.io.array_volume import ArrayVolume
from volseg.io.pictures import pictured_volume

RUN_LABELS = "labels/instances/0"  # where a run keeps its labels
BLOCK_VOXELS = 1 << 24  # voxels of each volume in memory at once
MIN_MASK_SHARE = (
    0.99  # of the foreground, in the values 1 and 255: then 8-bit values are gray levels of a mask, not ids
)
MAX_ISOLATED_SHARE = (
    0.02  # of the foreground unlike all neighbors: labels have 0.00, probabilities 0.17 to 0.69, images 0.9
)
STORED = "labels as stored"
COMPONENTS = "26-connected components of a binary volume"

Read = Callable[[Box], np.ndarray]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes
    ----------
    pred, truth
        The two volumes.
    box
        The voxels that were compared.
    pred_instances, truth_instances
        Where the objects come from: `STORED` or `COMPONENTS`.
    foreground
        Voxel scores.
    instances
        Object scores.
    touching
        How objects that touch were told apart; None where the truth is a mask.
    objects
        What became of each object, with a report; else empty.
    borders
        Scores near the borders of the truth and beyond, with a report.
    reliability
        How often the run's probabilities are right, with a report of a run.
    report
        The page that was written; ``""`` without.
    """

    pred: str
    truth: str
    box: Box
    pred_instances: str
    truth_instances: str
    foreground: ForegroundScores
    instances: InstanceScores
    touching: TouchingScores | None
    objects: tuple[ObjectScore, ...] = ()
    borders: BorderScores | None = None
    reliability: Reliability | None = None
    report: str = ""

    def to_json(self) -> dict:
        """Plain values that ``json.dumps`` takes."""
        plain = {
            "pred": self.pred,
            "truth": self.truth,
            "box": str(self.box),
            "voxels": self.box.voxels,
            "pred_instances": self.pred_instances,
            "truth_instances": self.truth_instances,
            "foreground": self.foreground.to_json(),
            "instances": self.instances.to_json(),
        }
        plain |= {"touching": self.touching.to_json()} if self.touching else {}
        if not self.borders:
            return plain
        plain |= {"borders": self.borders.to_json(), "objects": [each.to_json() for each in self.objects]}
        return (
            plain | ({"reliability": self.reliability.to_json()} if self.reliability else {}) | {"report": self.report}
        )

    def __str__(self) -> str:
        plain = {name: value for name, value in self.to_json().items() if name not in ("objects", "reliability")}
        if self.reliability:
            plain["calibration_error"] = self.reliability.error
        return format_scores(plain)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def evaluate(
    pred: Any,
    truth: Any,
    *,
    box: Box | str | None = None,
    iou: float = 0.5,
    report: str | os.PathLike | None = None,
    image: Any = None,
) -> Evaluation:
    """Score labels against the truth.

    Both volumes are read in blocks of 16 million voxels, and memory holds a row per pair of ids that meet; only of a binary
    volume are the mask and the labels of the whole box held, 5 bytes per voxel.

    Parameters
    ----------
    pred, truth
        Anything that :func:`volseg.io.volume.open_volume` reads, arrays too, of whole numbers, 0 background; or what has
        its place as ``path``, such as a run. Of a run folder, and of any group that has it, ``labels/instances/0`` is
        taken. A volume with one value besides 0 in the box, or with values up to 255 of which 1 and 255 make 99 % of the
        foreground, is binary: its objects are the 26-connected components inside the box of all voxels above 0, so an
        object that leaves the box and comes back is two. What lies under ``labels`` in a zarr is never taken as binary.
    box
        The voxels to compare, as a `Box` or as ``z0:z1,y0:y1,x0:x1``; None takes all. Where both shapes are equal, it cuts
        both. Where they differ, one volume must have the shape of the box: it is taken as the cut-out of the other one
        at that place.
    iou
        Objects match where their IoU is greater; 0 <= iou < 1.
    report
        A local file for an HTML page: what became of each object, with pictures and places of those that are wrong, IoU near
        borders and beyond, and for a run how often its probabilities are right.
    image
        The volume that pictures of the report show; of a run its own if not given.

    Raises
    ------
    UserError
        Shapes do not fit, the box leaves the volume, a volume holds floats or negative labels or looks like an image, or a
        run has no labels yet.

    Examples
    --------
    >>> truth = np.repeat(np.repeat([[[1, 2], [3, 0]]], 8, axis=1), 8, axis=2)
    >>> scores = evaluate(np.where(truth == 2, 1, truth), truth)
    >>> scores.instances.merged, scores.instances.matched, scores.foreground.iou
    (1, 1, 1.0)
    """
    check_threshold(iou)
    box = parse_box(box)
    pred_labels, truth_labels, shape = _align(_open(pred), _open(truth), box)
    box = box or Box.from_shape(shape)
    if not box.voxels or box.clip(shape) != box:
        raise UserError(f"box {box} is empty or leaves the volume of shape {shape} (z y x); give one inside it")
    boxes = _boxes((pred_labels, truth_labels), shape, box)
    table = _count(truth_labels.read, pred_labels.read, boxes)
    pred_is_mask = not pred_labels.named and _is_binary(table.pred, table.counts)
    truth_is_mask = not truth_labels.named and _is_binary(table.truth, table.counts)
    if pred_is_mask or truth_is_mask:
        read_pred = _components(pred_labels.read, boxes, box) if pred_is_mask else pred_labels.read
        read_truth = _components(truth_labels.read, boxes, box) if truth_is_mask else truth_labels.read
        table = _count(read_truth, read_pred, boxes)
    else:
        read_pred, read_truth = pred_labels.read, truth_labels.read
    touching = None if truth_is_mask else score_touching(table, find_touching(truth_labels.read, boxes, box), iou)
    scores = Evaluation(
        pred=pred_labels.name,
        truth=truth_labels.name,
        box=box,
        pred_instances=COMPONENTS if pred_is_mask else STORED,
        truth_instances=COMPONENTS if truth_is_mask else STORED,
        foreground=score_foreground(table),
        instances=score_instances(table, iou),
        touching=touching,
    )
    if report is None:
        return scores
    borders = score_borders(read_truth, read_pred, boxes, box)
    looked = replace(
        scores,
        objects=tuple(located(score_objects(table, iou), read_truth, read_pred, boxes)),
        borders=borders,
        reliability=_reliability(pred_labels, read_truth, boxes),
        report=os.fspath(report),
    )
    read_image = _image(image, pred_labels, shape, box)
    reads = (read_image and _inside(read_image, box), _inside(read_truth, box), _inside(read_pred, box))
    write_page(
        looked.report, f"{looked.pred} against {looked.truth}", str(looked), looked.objects, borders,
        looked.reliability, reads, shape,
    )  # fmt: skip
    return looked


def parse_box(box: Box | str | None) -> Box | None:
    """The box itself, or that of a text such as ``z0:z1,y0:y1,x0:x1``; `UserError` where it is none."""
    if not isinstance(box, str):
        return box
    try:
        return Box.parse(box)
    except ValueError as error:
        raise UserError(str(error)) from None


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Labels:
    """A volume of whole numbers whose first voxel lies at ``origin`` of the other one.

    ``named``: surely instances; ``of_run``: those of a finished run, whose folder is ``name``.
    """

    volume: volume.Volume | ArrayVolume
    name: str
    named: bool
    origin: Triple = (0, 0, 0)
    of_run: bool = False

    @property
    def chunk(self) -> Triple:
        return self.volume.chunk if isinstance(self.volume, volume.Volume) else (1, 1, 1)

    def read(self, box: Box) -> np.ndarray:
        z, y, x = self.origin
        ids = self.volume.read(box.shift((-z, -y, -x)))
        if ids.dtype.kind == "i" and ids.size and ids.min() < 0:
            raise UserError(
                f"{self.name} holds the negative label {ids.min()} in box {box}; "
                "background is 0 and ids are positive: write the voxels to ignore as 0"
            )
        return ids


def _open(source: Any) -> _Labels:
    """The labels in ``source``; for a run folder, or any group with `RUN_LABELS`, those."""
    if hasattr(source, "dtype"):
        opened = volume.open_volume(source)
        name = opened.path if isinstance(opened, volume.Volume) else opened.name
        _check(opened, name)
        return _Labels(opened, name, named=False)
    path = files.path_of(source)
    is_run = files.exists(f"{path}/{RUN_LABELS}")
    if path.endswith(".volseg.zarr") and files.exists(path) and not is_run:
        raise UserError(f"run {path} has no {RUN_LABELS} yet; finish the run first, or give a volume of labels")
    opened = volume.open(path, dataset=RUN_LABELS if is_run else "")
    _check(opened, path)
    of_run = is_run and files.exists(f"{path}/run.json")
    return _Labels(opened, path, named=is_run or ".zarr/labels/" in path, of_run=of_run)


def _check(opened: volume.Volume | ArrayVolume, name: str) -> None:
    """Refuses what cannot be labels: floats, and images.

    Labels are the same from voxel to voxel nearly everywhere; images and probabilities hardly anywhere.
    """
    if np.dtype(opened.dtype).kind not in "bui":
        raise UserError(
            f"{name} holds {opened.dtype}; evaluate compares labels or masks, which are whole numbers: "
            "make labels of probabilities with volseg segment, or give the run folder that volseg made"
        )
    above = isolated = 0
    for box in volume.patches(opened.shape):
        (plane,) = opened.read(box)
        above, isolated = above + int(np.count_nonzero(plane)), isolated + count_isolated(plane)
    if isolated > MAX_ISOLATED_SHARE * above:
        raise UserError(
            f"{name} is neither labels nor a mask: {100 * isolated / above:.0f} % of its voxels above 0 differ from "
            "all their neighbors, as in an image or a probability map. Give labels (volseg synth puts them at "
            "labels/truth); volseg segment makes labels of probabilities"
        )


def count_isolated(plane: np.ndarray) -> int:
    """Inner voxels above 0 (2-D) that differ from all four neighbors, which are above 0 too: points are no noise."""
    inner = plane[1:-1, 1:-1]
    isolated = inner > 0
    for near in (plane[:-2, 1:-1], plane[2:, 1:-1], plane[1:-1, :-2], plane[1:-1, 2:]):
        isolated &= (near > 0) & (near != inner)
    return int(np.count_nonzero(isolated))


def _align(pred: _Labels, truth: _Labels, box: Box | None) -> tuple[_Labels, _Labels, Triple]:
    """Both volumes with their origins, and the shape of the frame in which ``box`` counts."""
    shapes = pred.volume.shape, truth.volume.shape
    if shapes[0] == shapes[1]:
        return pred, truth, shapes[0]
    if box and box.shape == shapes[1]:
        return pred, replace(truth, origin=box.start), shapes[0]
    if box and box.shape == shapes[0]:
        return replace(pred, origin=box.start), truth, shapes[1]
    advice = f"box {box} of shape {box.shape} fits neither" if box else "give the place of a cut-out with --box"
    raise UserError(
        f"pred {pred.name} has shape {shapes[0]} and truth {truth.name} {shapes[1]}, z y x; "
        f"they must be equal, or one must be a cut-out of the other as large as the box: {advice}"
    )


def _block(shape: Triple, chunks: Iterable[Triple], voxels: int) -> Triple:
    """A block of at most ``voxels`` voxels that holds whole chunks of both volumes, or as much of one as it may.

    >>> _block((500, 4000, 4000), [(1, 4000, 4000), (32, 256, 256)], 64_000_000)
    (4, 4000, 4000)
    >>> _block((500, 1000, 1000), [(32, 256, 256)], 70_000_000)
    (64, 1000, 1000)
    """
    block = [min(n, max(sizes)) for n, *sizes in zip(shape, *chunks, strict=True)]
    for axis in (0, 1, 2):
        while block[axis] > 1 and prod(block) > voxels:
            block[axis] = -(-block[axis] // 2)
    for axis in (2, 1, 0):
        while block[axis] < shape[axis] and prod(block) // block[axis] * min(shape[axis], 2 * block[axis]) <= voxels:
            block[axis] = min(shape[axis], 2 * block[axis])
    z, y, x = block
    return z, y, x


def _boxes(labels: Iterable[_Labels], shape: Triple, box: Box) -> list[Box]:
    """The evaluated box cut along the blocks of the frame."""
    grid = Blocks(shape, _block(shape, [one.chunk for one in labels], BLOCK_VOXELS))
    return [grid[i].intersect(box) for i in grid.overlapping(box)]


def _count(read_truth: Read, read_pred: Read, boxes: list[Box]) -> Contingency:
    return sum((Contingency.from_labels(read_truth(box), read_pred(box)) for box in boxes), Contingency.empty())


def find_touching(read: Read, boxes: list[Box], box: Box) -> np.ndarray:
    """The pairs of objects that touch in ``box`` (see `touching_pairs`), read in parts that make it up."""
    pairs = [touching_pairs(read(part.grow(TOUCHING_DISTANCE).intersect(box))) for part in boxes]
    return np.unique(np.concatenate([np.empty((0, 2), np.uint64), *pairs]), axis=0)


def _is_binary(ids: np.ndarray, counts: np.ndarray) -> bool:
    """Whether rows of ids and voxels are those of a mask: one value besides 0, or 8 bits that are almost all 1 and 255.

    Published stacks mix 1-bit and 8-bit slices and hold a few gray voxels where somebody's brush was soft.
    """
    ids, counts = ids[ids > 0], counts[ids > 0]
    if not ids.size:
        return False
    full = counts[(ids == 1) | (ids == 255)].sum()
    return bool((ids == ids[0]).all() or (ids.max() == 255 and full >= MIN_MASK_SHARE * counts.sum()))


def _components(read: Read, boxes: list[Box], box: Box) -> Read:
    """Reads the 26-connected components of what ``read`` gives above 0 in ``box``; holds the whole box in memory."""
    from skimage.measure import label

    mask = np.zeros(box.shape, bool)
    for part in boxes:
        mask[part.slices_within(box)] = read(part) > 0
    labels = label(mask, connectivity=3)
    return lambda part: labels[part.slices_within(box)]


def read_truth(truth: Any, shape: Triple, box: Box) -> Read:
    """Reads the true instances in parts of ``box`` of a volume of that shape; a mask's are its 26-connected components.

    Masks and boxes are understood as `evaluate` does, and refused alike.
    """
    labels = _open(truth)
    if labels.volume.shape != shape:
        if labels.volume.shape != box.shape:
            raise UserError(
                f"truth {labels.name} has shape {labels.volume.shape} and the run {shape}, z y x; they must be equal, "
                "or the truth a cut-out as large as --box"
            )
        labels = replace(labels, origin=box.start)
    boxes = _boxes([labels], shape, box)
    table = _count(labels.read, labels.read, boxes)
    masked = not labels.named and _is_binary(table.truth, table.counts)
    return _components(labels.read, boxes, box) if masked else labels.read


def read_roi(pred: str) -> str:
    """The part of the volume that a run was told to do alone; nothing for other runs, and for labels that are no run's."""
    try:
        return json.loads(files.read_bytes(pred, "run.json"))["config"]["input"]["roi"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""


# ---------------------------------------------------------------- for a report


def _inside(read: Read, box: Box) -> Read:
    """Reads what ``read`` gives in ``box``, and 0 around it."""

    def reads(wanted: Box) -> np.ndarray:
        part = wanted.intersect(box)
        inner = read(part)
        out = np.zeros(wanted.shape, inner.dtype)
        out[part.slices_within(wanted)] = inner
        return out

    return reads


def _image(image: Any, pred: _Labels, shape: Triple, box: Box) -> Read | None:
    """How to read the image in the frame of ``shape``: the one given, or the run's own; None where there is none."""
    if image is None and not pred.of_run:
        return None
    if image is None:
        from volseg.engine.finished import open_run

        shown: volume.Volume | ArrayVolume = pictured_volume(open_run(pred.name).run.output_source, pred.name)
        origin = pred.origin
    else:
        shown = volume.open_volume(image)
        origin = (0, 0, 0) if shown.shape == shape else box.start
        if shown.shape not in (shape, box.shape):
            raise UserError(
                f"the image has shape {shown.shape} and the labels {shape}, z y x; they must be equal, or the image as large "
                "as --box"
            )
    z, y, x = origin
    return lambda wanted: shown.read(wanted.shift((-z, -y, -x)))


def _reliability(pred: _Labels, read_truth: Read, boxes: list[Box]) -> Reliability | None:
    """How often the probabilities of a run are right; None of other labels, and of a run that computed on another grid or kept
    none."""
    if not pred.of_run:
        return None
    from volseg.engine.finished import open_run

    run = open_run(pred.name)
    if run.run.restored or run.run.drops:
        return None
    z, y, x = pred.origin
    stored = run.layout.probabilities
    return score_reliability(read_truth, lambda part: stored.read(part.shift((-z, -y, -x)))[0], boxes)


# ---------------------------------------------------------------- as text


def format_scores(scores: dict) -> str:
    """Scores as plain text in two columns, one line per score.

    >>> print(format_scores({"truth": "a.tif", "foreground": {"iou": 0.5, "true_positive_voxels": 12}}))
    truth                   a.tif
    foreground
      iou                   0.5000
      true_positive_voxels  12
    """
    rows = list(_rows(scores))
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def _rows(scores: dict, indent: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of a nested dict, one row each; the name of an inner dict stands alone, above its rows."""
    for name, value in scores.items():
        if isinstance(value, dict):
            yield indent + name, ""
            yield from _rows(value, indent + "  ")
        else:
            yield indent + name, f"{value:.4f}" if isinstance(value, float) else str(value)
