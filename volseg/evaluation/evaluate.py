"""Scores of one volume on disk against another, read block by block."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from skimage.measure import label

from volseg.box import Blocks, Box, Triple
from volseg.errors import UserError
from volseg.evaluation.metrics import NEAR, Contingency, check_threshold, foreground, instances, pairs, touching
from volseg.io import files, volume

INSTANCES = "labels/instances/0"  # where a run keeps its labels
BLOCK_VOXELS = 1 << 24  # voxels of each volume in memory at once
MASK_SHARE = 0.99  # of the foreground, in the values 1 and 255: then 8-bit values are gray levels of a mask, not ids
STORED = "labels as stored"
ALONE = 0.02  # of the foreground unlike all its neighbors, at most: labels have 0.00, probabilities 0.17 to 0.69, images 0.9
COMPONENTS = "26-connected components of a binary volume"

Read = Callable[[Box], np.ndarray]


@dataclass(frozen=True)
class _Side:
    """A volume of whole numbers whose first voxel lies at ``origin`` of the other one; ``named``: surely instances."""

    volume: volume.Volume
    named: bool
    origin: Triple = (0, 0, 0)

    def read(self, box: Box) -> np.ndarray:
        ids = self.volume.read(box.shift(tuple(-n for n in self.origin)))
        if ids.dtype.kind == "i" and ids.size and ids.min() < 0:
            raise UserError(
                f"{self.volume.path} holds the negative label {ids.min()} in box {box}; "
                "background is 0 and ids are positive: write the voxels to ignore as 0"
            )
        return ids


def _open(path: str) -> _Side:
    """The labels at ``path``; for a run folder, or any group with ``labels/instances/0``, those."""
    root = str(path).rstrip("/")
    is_run = files.exists(f"{root}/{INSTANCES}")
    if root.endswith(".volseg.zarr") and files.exists(root) and not is_run:
        raise UserError(f"run {path} has no {INSTANCES} yet; finish the run first, or give a volume of labels")
    opened = volume.open(str(path), dataset=INSTANCES if is_run else "")
    if np.dtype(opened.dtype).kind not in "bui":
        raise UserError(
            f"{path} holds {opened.dtype}; evaluate compares labels or masks, which are whole numbers: "
            "make labels of probabilities with volseg segment, or give the run folder that volseg made"
        )
    _refuse_image(opened)
    return _Side(opened, is_run or ".zarr/labels/" in root)


def _refuse_image(opened: volume.Volume) -> None:
    """Labels are the same from voxel to voxel nearly everywhere; images and probabilities hardly anywhere."""
    above = alone = 0
    for box in volume.patches(opened.shape):
        (plane,) = opened.read(box)
        above, alone = above + np.count_nonzero(plane), alone + _alone(plane)
    if alone > ALONE * above:
        raise UserError(
            f"{opened.path} is neither labels nor a mask: {100 * alone / above:.0f} % of its voxels above 0 differ from all "
            "their neighbors, as in an image or a probability map. Give labels (volseg synth puts them at labels/truth); "
            "volseg segment makes labels of probabilities"
        )


def _alone(plane: np.ndarray) -> int:
    """Inner voxels above 0 (2-D) that differ from all four neighbors, which are above 0 too: points are no noise."""
    inner = plane[1:-1, 1:-1]
    found = inner > 0
    for near in (plane[:-2, 1:-1], plane[2:, 1:-1], plane[1:-1, :-2], plane[1:-1, 2:]):
        found &= (near > 0) & (near != inner)
    return int(np.count_nonzero(found))


def _place(pred: _Side, truth: _Side, box: Box | None) -> tuple[_Side, _Side, Triple]:
    """Both sides with their origins, and the shape of the frame in which ``box`` counts."""
    shapes = pred.volume.shape, truth.volume.shape
    if shapes[0] == shapes[1]:
        return pred, truth, shapes[0]
    if box and box.shape == shapes[1]:
        return pred, replace(truth, origin=box.start), shapes[0]
    if box and box.shape == shapes[0]:
        return replace(pred, origin=box.start), truth, shapes[1]
    advice = f"box {box} of shape {box.shape} fits neither" if box else "give the place of a cut-out with --box"
    raise UserError(
        f"pred {pred.volume.path} has shape {shapes[0]} and truth {truth.volume.path} {shapes[1]}, z y x; "
        f"they must be equal, or one must be a cut-out of the other as large as the box: {advice}"
    )


def _block(shape: Triple, chunks: Iterable[Triple], voxels: int = BLOCK_VOXELS) -> Triple:
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
    return tuple(block)


def _boxes(sides: tuple[_Side, _Side], shape: Triple, box: Box) -> list[Box]:
    """The evaluated box cut along the blocks of the frame."""
    grid = Blocks(shape, _block(shape, [side.volume.chunk for side in sides]))
    return [grid[i].intersect(box) for i in grid.overlapping(box)]


def _count(read_truth: Read, read_pred: Read, boxes: list[Box]) -> Contingency:
    return sum((Contingency.of(read_truth(box), read_pred(box)) for box in boxes), Contingency.empty())


def touching_in(read: Read, boxes: list[Box], box: Box) -> np.ndarray:
    """The pairs of objects that touch in ``box`` (see `metrics.touching`), read in parts that make it up."""
    found = [touching(read(part.grow(NEAR).intersect(box))) for part in boxes]
    return np.unique(np.concatenate([np.empty((0, 2), np.uint64), *found]), axis=0)


def _is_binary(ids: np.ndarray, counts: np.ndarray) -> bool:
    """Whether rows of ids and voxels are those of a mask: one value besides 0, or 8 bits that are almost all 1 and 255.

    Published stacks mix 1-bit and 8-bit slices and hold a few gray voxels where somebody's brush was soft.
    """
    ids, counts = ids[ids > 0], counts[ids > 0]
    if not ids.size:
        return False
    full = counts[(ids == 1) | (ids == 255)].sum()
    return bool((ids == ids[0]).all() or (ids.max() == 255 and full >= MASK_SHARE * counts.sum()))


def _components(read: Read, boxes: list[Box], box: Box) -> Read:
    """Reads the 26-connected components of what ``read`` gives above 0 in ``box``; holds the whole box in memory."""
    mask = np.zeros(box.shape, bool)
    for part in boxes:
        mask[part.slices_within(box)] = read(part) > 0
    labels = label(mask, connectivity=3)
    return lambda part: labels[part.slices_within(box)]


def evaluate(pred: str, truth: str, *, box: Box | None = None, iou: float = 0.5) -> dict:
    """The scores of ``pred`` against ``truth``: a dict of plain Python values that ``json.dumps`` takes.

    Keys: ``pred``, ``truth`` (paths), ``box`` (evaluated voxels), ``voxels``, ``pred_instances``, ``truth_instances``
    (where the objects come from), ``foreground`` and ``instances`` (see :mod:`volseg.evaluation.metrics`; ``iou`` is
    the threshold of the object scores, 0 <= iou < 1). Where the truth holds instances, ``touching`` says how those
    that touch were told apart (`metrics.pairs`).

    **Volumes.** Anything :func:`volseg.io.volume.open` reads, of whole numbers, 0 background. Of a run folder, and of any
    group that has it, ``labels/instances/0`` is taken.

    **Box.** Where both shapes are equal, ``box`` cuts both; None takes all. Where they differ, one volume must have the
    shape of the box: it is taken as the cut-out of the other one at that place.

    **Masks.** A volume with one value besides 0 in the box, or with values up to 255 of which 1 and 255 make 99 % of
    the foreground, is binary: its objects are the 26-connected components inside the box of all voxels above 0, so an
    object that leaves the box and comes back is two. What lies under ``labels`` in a zarr is never taken as binary.

    **Memory.** Both volumes are read in blocks of 16 million voxels, and the table holds one row per pair of ids that
    meet; only of a binary volume are the mask and the labels of the whole box held, 5 bytes per voxel.

    Raises UserError for shapes that do not fit, a box outside the volume, float volumes, negative labels, and a run
    without labels.
    """
    check_threshold(iou)
    pred_side, truth_side, shape = _place(_open(pred), _open(truth), box)
    box = box or Box.from_shape(shape)
    if not box.voxels or box.clip(shape) != box:
        raise UserError(f"box {box} is empty or leaves the volume of shape {shape} (z y x); give one inside it")
    boxes = _boxes((pred_side, truth_side), shape, box)
    counts = _count(truth_side.read, pred_side.read, boxes)
    masks = {
        "pred": not pred_side.named and _is_binary(counts.pred, counts.counts),
        "truth": not truth_side.named and _is_binary(counts.truth, counts.counts),
    }
    if any(masks.values()):
        read_pred = _components(pred_side.read, boxes, box) if masks["pred"] else pred_side.read
        read_truth = _components(truth_side.read, boxes, box) if masks["truth"] else truth_side.read
        counts = _count(read_truth, read_pred, boxes)
    return {
        "pred": str(pred),
        "truth": str(truth),
        "box": str(box),
        "voxels": box.voxels,
        "pred_instances": COMPONENTS if masks["pred"] else STORED,
        "truth_instances": COMPONENTS if masks["truth"] else STORED,
        "foreground": foreground(counts),
        "instances": instances(counts, iou),
    } | ({} if masks["truth"] else {"touching": pairs(counts, touching_in(truth_side.read, boxes, box), iou)})


def roi_of(pred: str) -> str:
    """The part of the volume that a run was told to do alone; nothing for other runs, and for labels that are no run's."""
    try:
        return json.loads(files.read_bytes(pred, "run.json"))["config"]["input"]["roi"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def truth_in(path: str, shape: Triple, box: Box) -> Read:
    """Reads the true instances in parts of ``box`` of a volume of that shape; a mask's are its 26-connected components.

    Masks and boxes are understood as `evaluate` does, and refused alike.
    """
    side = _open(path)
    origin = (0, 0, 0)
    if side.volume.shape != shape:
        if side.volume.shape != box.shape:
            raise UserError(
                f"truth {path} has shape {side.volume.shape} and the run {shape}, z y x; they must be equal, "
                "or the truth a cut-out as large as --box"
            )
        origin = box.start
    side = replace(side, origin=origin)
    boxes = [
        part.intersect(box) for part in Blocks(shape, _block(shape, [side.volume.chunk])) if part.intersect(box).voxels
    ]
    counts = _count(side.read, side.read, boxes)
    masked = not side.named and _is_binary(counts.truth, counts.counts)
    return _components(side.read, boxes, box) if masked else side.read


def _rows(scores: dict, indent: str = "") -> Iterable[tuple[str, str]]:
    """Names and values of a nested dict, one row each; the name of an inner dict stands alone, above its rows."""
    for name, value in scores.items():
        if isinstance(value, dict):
            yield indent + name, ""
            yield from _rows(value, indent + "  ")
        else:
            yield indent + name, f"{value:.4f}" if isinstance(value, float) else str(value)


def table(scores: dict) -> str:
    """The scores as plain text in two columns, one line per score.

    >>> print(table({"truth": "a.tif", "foreground": {"iou": 0.5, "true_positive_voxels": 12}}))
    truth                   a.tif
    foreground
      iou                   0.5000
      true_positive_voxels  12
    """
    rows = list(_rows(scores))
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)
