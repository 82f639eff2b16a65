"""Labels to training targets: one encoding, the mask and contour to learn, and what the annotation holds."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy import ndimage

from volseg.errors import UserError

FEW_SECTIONS = 30  # up to here it pays to spread them
FEW_OBJECTS = 150  # annotated objects below which more annotation pays more than longer training
UNLABELED = np.uint32(0xFFFFFFFF)  # stands in normalized labels for voxels that nobody annotated
WANTED = "give whole numbers: 0 for background, then one per object"
STRAYS = 0.005  # share of a mask's voxels that may lie between 0 and the value that means inside
BINARY_VALUES = {1, 255, 65535}  # how one bit is written by the common tools


def normalize_labels(array: np.ndarray, *, unlabeled: int | None = None) -> tuple[np.ndarray, dict]:
    """``array`` (z, y, x) as instance labels uint32, and a note of how it was read.

    Sections that each hold one value besides 0, all of them out of 1, 255 and 65535, are one mask, however the sections
    mix these; a few voxels in between (:data:`STRAYS`), which resampling left, count from half of that value on. Any
    array with a single value besides 0 is a mask, too. A mask becomes its 26-connected components. Everything else
    holds instances already, and is renumbered 1..N in the order of its values. Voxels equal to ``unlabeled`` become
    :data:`UNLABELED`. The note: ``kind`` ("mask" or "instances"), ``values`` (value -> sections that hold it, for a
    mask), ``objects``.

    >>> mixed = np.array([[[0, 1, 0, 0]], [[0, 0, 255, 0]], [[0, 0, 0, 0]], [[255, 0, 0, 0]]], np.uint8)
    >>> labels, note = normalize_labels(mixed)
    >>> labels[:, 0].tolist()
    [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [2, 0, 0, 0]]
    >>> note
    {'kind': 'mask', 'values': {1: 1, 255: 2}, 'objects': 2}
    """
    array = _whole_numbers(array)
    missing = array == unlabeled if unlabeled is not None else None
    if missing is not None:
        array = np.where(missing, 0, array)
    tops = [_top(section) for section in array]
    if all(top is not None for top in tops) and (set(tops) - {0} <= BINARY_VALUES or len(set(tops) - {0}) == 1):
        halves = np.array([max(1, (top + 1) // 2) for top in tops], np.uint64)
        labels, objects = ndimage.label(array >= halves[:, None, None], np.ones((3, 3, 3), bool), output=np.uint32)
        note = {"kind": "mask", "values": {top: tops.count(top) for top in sorted(set(tops) - {0})}}
    else:
        ids = np.unique(array)
        ids = ids[ids != 0]
        labels = np.where(array != 0, np.searchsorted(ids, array) + 1, 0).astype(np.uint32)
        note, objects = {"kind": "instances"}, len(ids)
    if missing is not None:
        labels[missing] = UNLABELED
    return labels, {**note, "objects": int(objects)}


def _top(section: np.ndarray) -> int | None:
    """The highest value of a section that holds no other but 0 and, from 255 on, strays; 0 if empty, None otherwise."""
    values, counts = np.unique(section, return_counts=True)
    counts = counts[values != 0]
    if not counts.size:
        return 0
    top = int(values[-1])
    strays = counts[:-1].sum() / counts.sum()
    return top if strays == 0 or (top in BINARY_VALUES and strays < STRAYS) else None


def _whole_numbers(array: np.ndarray) -> np.ndarray:
    """``array`` with an integer dtype; refuses one that is not 3-D, or holds fractions or negative numbers."""
    if array.ndim != 3:
        raise UserError(f"labels have {array.ndim} axes {array.shape}; give a stack with axes z, y, x")
    if array.dtype == bool:
        return array.view(np.uint8)
    if array.dtype.kind == "f" and not np.array_equal(array, np.round(array)):
        raise UserError(f"labels are {array.dtype} with fractions; {WANTED}")
    if array.dtype.kind not in "uif":
        raise UserError(f"labels have dtype {array.dtype}; {WANTED}")
    if array.size and array.min() < 0:
        raise UserError(f"labels hold the negative number {array.min()}; {WANTED}")
    return array.astype(np.int64) if array.dtype.kind == "f" else array


def mask_and_contour(labels: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two uint8 arrays, 0 or 1: voxels in objects, and voxels at most ``width`` in the plane from an object's border.

    The contour lies on both sides of the border, and between objects that touch. ``labels`` is (z, y, x) or (y, x).

    >>> mask_and_contour(np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2]]), 1)[1].tolist()
    [[0, 0, 1, 1, 0, 0, 1, 1, 0]]
    """
    contour = np.zeros(labels.shape, bool)
    if width:
        _mark_steps(labels, contour)
    if width > 1:
        reach = np.arange(1 - width, width)
        disc = reach[:, None] ** 2 + reach**2 <= (width - 1) ** 2
        contour = ndimage.binary_dilation(contour, disc.reshape((1,) * (labels.ndim - 2) + disc.shape))
    return (labels != 0).view(np.uint8), contour.view(np.uint8)


def _mark_steps(labels: np.ndarray, marked: np.ndarray) -> None:
    """Sets ``marked`` on both sides of every change of label along y and x."""
    for axis in (-2, -1):
        here, there = np.moveaxis(labels, axis, 0), np.moveaxis(marked, axis, 0)
        step = here[1:] != here[:-1]
        there[1:] |= step
        there[:-1] |= step


def contacts(labels: np.ndarray, width: int, across: bool) -> np.ndarray:
    """bool, as ``labels`` (z, y, x): voxels at most ``width`` from where two objects touch.

    ``across`` looks along z too, so that a wall in the plane counts, which no section shows as a line; for sections that
    lie as close as voxels do. Otherwise an object's next section would count as its neighbor's.

    >>> contacts(np.array([[[1, 1, 1, 0]], [[1, 1, 2, 2]]]), 1, across=True)[:, 0].astype(int).tolist()
    [[0, 0, 1, 0], [0, 1, 1, 0]]
    """
    touching = np.zeros(labels.shape, bool)
    objects = np.where(labels == UNLABELED, 0, labels)
    for axis in range(0 if across else 1, 3):
        here, there = np.moveaxis(objects, axis, 0), np.moveaxis(touching, axis, 0)
        wall = (here[1:] != here[:-1]) & (here[1:] != 0) & (here[:-1] != 0)
        there[1:] |= wall
        there[:-1] |= wall
    if width > 1 and touching.any():
        reach = np.arange(1 - width, width)
        z = reach if across else np.zeros(1, int)
        ball = z[:, None, None] ** 2 + reach[:, None] ** 2 + reach**2 <= (width - 1) ** 2
        touching = ndimage.binary_dilation(touching, ball)
    return touching


def distances(labels: np.ndarray, voxel_size_nm: tuple[float, float, float], far_nm: float) -> np.ndarray:
    """uint8, as ``labels`` (z, y, x): how far a voxel lies from the nearest one that is not of its object; 0 outside.

    In units of ``far_nm`` / 255, up to that. Objects go on past the ends of the array and where nobody annotated, so a lone
    section is measured in its plane.

    >>> distances(np.array([[[0, 1, 1, 1, 1, 2]]]), (5, 5, 5), 10)[0].tolist()
    [[0, 128, 255, 255, 128, 128]]
    """
    out = np.zeros(labels.shape, np.uint8)
    missing = labels == UNLABELED
    ids, numbers = np.unique(
        np.where(missing, 0, labels), return_inverse=True
    )  # ids may be far too high to count up to
    numbers = numbers.reshape(labels.shape) + (ids[0] != 0)
    for number, box in enumerate(ndimage.find_objects(numbers), 1):
        around = tuple(slice(max(0, s.start - 1), s.stop + 1) for s in box)
        own = numbers[around] == number
        body = own | missing[around]
        far = np.full(body.shape, far_nm) if body.all() else ndimage.distance_transform_edt(body, voxel_size_nm)
        out[around][own] = np.minimum(far[own] * (255 / far_nm) + 0.5, 255)
    return out


def parse_sections(parts: Iterable[str | int], depth: int) -> list[int]:
    """The sections named by numbers and ``start:stop`` ranges, sorted, each once; refuses those outside ``0:depth``.

    >>> parse_sections(("0:3", 12, "2:5"), 20)
    [0, 1, 2, 3, 4, 12]
    """
    found: set[int] = set()
    for part in parts:
        try:
            first, colon, stop = str(part).partition(":")
            start = int(first)
            stop = int(stop) if colon else start + 1
        except ValueError:
            raise UserError(f"sections {part!r} is neither a number nor start:stop, for instance 0:10") from None
        if not 0 <= start < stop <= depth:
            raise UserError(f"sections {part!r} are not in 0:{depth}, all that this volume has (stop is not included)")
        found.update(range(start, stop))
    return sorted(found)


def describe(labels: np.ndarray, sections: list[int], first: int = 0, depth: int = 0) -> dict:
    """What was annotated on ``sections`` of normalized ``labels``, and advice on it, as plain data.

    ``first`` is the number of ``labels[0]`` in its volume of ``depth`` sections; ``sections`` are indices into ``labels``.

    Keys: ``sections`` (how many), ``objects``, ``foreground`` (share of the annotated voxels), ``empty`` (numbers of
    sections without an object while others have some), ``advice`` (a list of sentences).
    """
    chosen = labels[sections]
    annotated = chosen != UNLABELED
    inside = annotated & (chosen != 0)
    filled = inside.any(axis=(1, 2))
    empty = [first + z for z, full in zip(sections, filled, strict=True) if not full] if filled.any() else []
    objects = int(np.unique(chosen[inside]).size)
    advice = []
    if objects < FEW_OBJECTS:
        advice.append(f"{objects} annotated objects, fewer than {FEW_OBJECTS}: annotate more if results disappoint")
    if empty:
        names = ", ".join(map(str, empty[:8])) + (", ..." if len(empty) > 8 else "")
        advice.append(f"{len(empty)} sections hold no object, others do ({names}): leave out what is not annotated")
    span = sections[-1] - sections[0] + 1
    if len(sections) <= FEW_SECTIONS and len(sections) < 0.9 * depth and 2 * span < depth:
        place = f"{first + sections[0]}:{first + sections[-1] + 1}"
        advice.append(
            f"all {len(sections)} sections lie in {place} of {depth}: spread evenly, they would show more objects"
        )
    share = float(inside.sum() / max(1, annotated.sum()))
    return {"sections": len(sections), "objects": objects, "foreground": share, "empty": empty, "advice": advice}
