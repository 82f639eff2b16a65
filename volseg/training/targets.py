"""Labels to training targets: one encoding, the mask and contour to learn, and what the annotation holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from scipy import ndimage

from volseg.errors import UserError
from volseg.io.regions import joined, partners

MIN_SPREAD_SECTIONS = 30  # up to this many annotated sections it pays to spread them
ADVISED_OBJECTS = 150  # with fewer annotated objects, more annotation pays more than longer training
UNLABELED = np.uint32(0xFFFFFFFF)  # stands in normalized labels for voxels that nobody annotated
LABEL_ADVICE = "give whole numbers: 0 for background, then one per object"
MAX_STRAY_SHARE = 0.005  # share of a mask's voxels that may lie between 0 and the value that means inside
MIN_AGREEMENT = 0.5  # of neighboring sections, from which on instances have one number throughout the volume
MASK_VALUES = {1, 255, 65535}  # how one bit is written by the common tools


def normalize_labels(
    array: np.ndarray, *, unlabeled: int | None = None, background: int = 0, instances: bool = False
) -> tuple[np.ndarray, dict]:
    """Return instance labels for an annotation of any of the common encodings.

    An array is a mask if each section holds at most one value besides 0, and these values are all out of 1, 255 and
    65535, in any mixture, or all the same. Resampling leaves a few values between 0 and 255 or 65535: up to a share of
    `MAX_STRAY_SHARE` of a section's foreground they are rounded to the nearer end. A mask becomes its 26-connected
    components. All other arrays hold instances, which are renumbered 1..N in the order of their values. Where each section
    was numbered by itself (`section_agreement` below `MIN_AGREEMENT`), instances of neighboring sections that overlap each
    other most become one.

    Parameters
    ----------
    array
        (z, y, x) of any integer type, bool, or a float type that holds whole numbers.
    unlabeled
        Value of voxels that nobody annotated.
    background
        Value outside of objects. Where it is another than 0, and 0 is not ``unlabeled``, 0 is an object.
    instances
        Whether each value is known to be one object of the volume, as those of points are.

    Returns
    -------
    labels
        uint32 (z, y, x): 0 for background, `UNLABELED` where nobody annotated.
    note
        How the array was read: ``kind`` ("mask" or "instances"), ``objects`` (their number) and, for a mask, ``values``
        (each value, and how many sections hold it).

    Raises
    ------
    UserError
        If the array is not 3-D, or holds fractions or negative numbers.

    Examples
    --------
    >>> mixed = np.array([[[0, 1, 0, 0]], [[0, 0, 255, 0]], [[0, 0, 0, 0]], [[255, 0, 0, 0]]], np.uint8)
    >>> labels, note = normalize_labels(mixed)
    >>> labels[:, 0].tolist()
    [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [2, 0, 0, 0]]
    >>> note
    {'kind': 'mask', 'values': {1: 1, 255: 2}, 'objects': 2}
    """
    array = as_integers(array)
    missing = array == unlabeled if unlabeled is not None else None
    if background:
        if not (array == background).any():
            raise UserError(
                f"labels hold no voxel of background = {background}; correct it, or leave it out where it is 0"
            )
        array = np.where(array == background, 0, np.where(array == 0, np.array(background, array.dtype), array))
    if missing is not None:
        array = np.where(missing, 0, array)
    found = [mask_value(*np.unique(section, return_counts=True)) for section in array]
    values = [value for value in found if value is not None]
    if is_mask(found) and not instances:
        halves = np.array([max(1, (value + 1) // 2) for value in values], np.uint64)
        labels, objects = ndimage.label(array >= halves[:, None, None], np.ones((3, 3, 3), bool), output=np.uint32)
        note = {"kind": "mask", "values": {value: values.count(value) for value in sorted(set(values) - {0})}}
    else:
        ids = np.unique(array)
        ids = ids[ids != 0]
        labels = np.where(array != 0, np.searchsorted(ids, array) + 1, 0).astype(np.uint32)
        note, objects = {"kind": "instances"}, len(ids)
        if not instances and section_agreement(labels) < MIN_AGREEMENT:
            labels, objects = _link_sections(labels)
            note = {"kind": "instances, numbered section by section"}
    if missing is not None:
        labels[missing] = UNLABELED
    return labels, {**note, "objects": int(objects)}


def section_agreement(labels: np.ndarray) -> float:
    """Return in how much of where objects of neighboring sections overlap they have one number; 1 where none do.

    >>> section_agreement(np.array([[[1, 1, 2]], [[1, 1, 3]], [[0, 0, 0]]]))
    0.6666666666666666
    """
    counts = np.zeros(2, np.int64)
    for above, below in pairwise(labels):
        overlap = (above != 0) & (below != 0)
        counts += np.count_nonzero(overlap), np.count_nonzero(overlap & (above == below))
    return float(counts[1] / counts[0]) if counts[0] else 1.0


def _link_sections(labels: np.ndarray) -> tuple[np.ndarray, int]:
    """Labels of which each section was numbered by itself, as objects of the volume, and how many these are."""
    own, highest = labels.copy(), 0
    for section in own:
        section[section != 0] += np.uint32(highest)
        highest = max(highest, int(section.max()))
    pairs = [pair for above, below in pairwise(own) for pair in partners(above, below)]
    numbers = joined(highest, pairs)
    used = np.unique(numbers[np.unique(own)])
    return np.searchsorted(used, numbers).astype(np.uint32)[own], int(np.count_nonzero(used))


def is_mask(found: Sequence[int | None]) -> bool:
    """Return whether sections of which `mask_value` gives this are a mask."""
    values = set(found) - {0}
    return None not in values and (values <= MASK_VALUES or len(values) == 1)


def mask_value(values: np.ndarray, counts: np.ndarray) -> int | None:
    """Return the highest value of a section that holds no other but 0 and, from 255 on, strays; 0 if empty, None otherwise.

    ``values`` are all that it holds, in order, and ``counts`` how many voxels have each.
    """
    counts = counts[values != 0]
    if not counts.size:
        return 0
    highest = int(values[-1])
    stray_share = counts[:-1].sum() / counts.sum()
    return highest if stray_share == 0 or (highest in MASK_VALUES and stray_share < MAX_STRAY_SHARE) else None


def as_integers(array: np.ndarray) -> np.ndarray:
    """``array`` with an integer dtype; refuses one that is not 3-D, or holds fractions or negative numbers."""
    if array.ndim != 3:
        raise UserError(f"labels have {array.ndim} axes {array.shape}; give a stack with axes z, y, x")
    if array.dtype == bool:
        return array.view(np.uint8)
    if array.dtype.kind == "f" and not np.array_equal(array, np.round(array)):
        raise UserError(f"labels are {array.dtype} with fractions; {LABEL_ADVICE}")
    if array.dtype.kind not in "uif":
        raise UserError(f"labels have dtype {array.dtype}; {LABEL_ADVICE}")
    if array.size and array.min() < 0:
        raise UserError(f"labels hold the negative number {array.min()}; {LABEL_ADVICE}")
    return array.astype(np.int64) if array.dtype.kind == "f" else array


def mask_and_contour(labels: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the voxels inside objects, and those near an object's border.

    Parameters
    ----------
    labels
        Instance labels, (z, y, x) or (y, x).
    width
        How far the contour reaches from a border, in voxels in the plane. It lies on both sides of the border, and
        between objects that touch.

    Returns
    -------
    mask, contour
        uint8 of the shape of ``labels``, 0 or 1.

    Examples
    --------
    >>> mask_and_contour(np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2]]), 1)[1].tolist()
    [[0, 0, 1, 1, 0, 0, 1, 1, 0]]
    """
    contour = np.zeros(labels.shape, bool)
    if width:
        _mark_label_changes(labels, contour)
    if width > 1:
        offset = np.arange(1 - width, width)
        disc = offset[:, None] ** 2 + offset**2 <= (width - 1) ** 2
        contour = ndimage.binary_dilation(contour, disc.reshape((1,) * (labels.ndim - 2) + disc.shape))
    return (labels != 0).view(np.uint8), contour.view(np.uint8)


def near_unlabeled(missing: np.ndarray, width: int) -> np.ndarray:
    """Return the voxels of a section that nobody annotated, and those so near that a contour there may be missing.

    Parameters
    ----------
    missing
        bool (y, x): nobody annotated.
    width
        How far a contour reaches from a border, see `mask_and_contour`.

    Returns
    -------
    numpy.ndarray
        bool (y, x).
    """
    return ndimage.binary_dilation(missing, iterations=width) if width and missing.any() else missing


def _mark_label_changes(labels: np.ndarray, marked: np.ndarray) -> None:
    """Sets ``marked`` on both sides of every change of label along y and x."""
    for axis in (-2, -1):
        values, marks = np.moveaxis(labels, axis, 0), np.moveaxis(marked, axis, 0)
        change = values[1:] != values[:-1]
        marks[1:] |= change
        marks[:-1] |= change


def contact_mask(labels: np.ndarray, width: int, along_z: bool) -> np.ndarray:
    """Return the voxels near a place where two objects touch.

    Parameters
    ----------
    labels
        Instance labels (z, y, x), as `normalize_labels` gives them.
    width
        How far that reaches, in voxels.
    along_z
        Whether objects also touch across sections. Right only where sections lie as close as voxels do: otherwise an
        object's next section would count as its neighbor's.

    Returns
    -------
    numpy.ndarray
        bool (z, y, x).

    Examples
    --------
    >>> contact_mask(np.array([[[1, 1, 1, 0]], [[1, 1, 2, 2]]]), 1, along_z=True)[:, 0].astype(int).tolist()
    [[0, 0, 1, 0], [0, 1, 1, 0]]
    """
    contacts = np.zeros(labels.shape, bool)
    objects = np.where(labels == UNLABELED, 0, labels)
    for axis in range(0 if along_z else 1, 3):
        values, marks = np.moveaxis(objects, axis, 0), np.moveaxis(contacts, axis, 0)
        wall = (values[1:] != values[:-1]) & (values[1:] != 0) & (values[:-1] != 0)
        marks[1:] |= wall
        marks[:-1] |= wall
    if width > 1 and contacts.any():
        offset = np.arange(1 - width, width)
        z = offset if along_z else np.zeros(1, int)
        ball = z[:, None, None] ** 2 + offset[:, None] ** 2 + offset**2 <= (width - 1) ** 2
        contacts = ndimage.binary_dilation(contacts, ball)
    return contacts


def border_distance(labels: np.ndarray, voxel_size_nm: tuple[float, float, float], max_nm: float) -> np.ndarray:
    """Return how far each voxel lies from the nearest voxel that is not of its object, as a share of ``max_nm``.

    Objects go on past the ends of the array and where nobody annotated, so a lone section is measured in its plane.

    Parameters
    ----------
    labels
        Instance labels (z, y, x), as `normalize_labels` gives them.
    voxel_size_nm
        Size of a voxel along z, y, x.
    max_nm
        Larger distances count as this one.

    Returns
    -------
    numpy.ndarray
        uint8 (z, y, x), 255 for ``max_nm``; 0 outside of objects.

    Examples
    --------
    >>> border_distance(np.array([[[0, 1, 1, 1, 1, 2]]]), (5, 5, 5), 10)[0].tolist()
    [[0, 128, 255, 255, 128, 128]]
    """
    out = np.zeros(labels.shape, np.uint8)
    missing = labels == UNLABELED
    ids, numbers = np.unique(np.where(missing, 0, labels), return_inverse=True)  # ids may be too high to count up to
    numbers = numbers.reshape(labels.shape) + (ids[0] != 0)
    for number, box in enumerate(ndimage.find_objects(numbers), 1):
        frame = tuple(slice(max(0, s.start - 1), s.stop + 1) for s in box)
        own = numbers[frame] == number
        body = own | missing[frame]
        distance = np.full(body.shape, max_nm) if body.all() else ndimage.distance_transform_edt(body, voxel_size_nm)
        out[frame][own] = np.minimum(distance[own] * (255 / max_nm) + 0.5, 255)
    return out


def parse_sections(parts: Iterable[str | int], depth: int) -> list[int]:
    """Return the section numbers that numbers and ``start:stop`` ranges name, sorted, each once.

    Raises
    ------
    UserError
        If a part is neither a number nor a range, or lies outside ``0:depth``.

    Examples
    --------
    >>> parse_sections(("0:3", 12, "2:5"), 20)
    [0, 1, 2, 3, 4, 12]
    """
    sections: set[int] = set()
    for part in parts:
        try:
            first, colon, last = str(part).partition(":")
            start = int(first)
            stop = int(last) if colon else start + 1
        except ValueError:
            raise UserError(f"sections {part!r} is neither a number nor start:stop, for instance 0:10") from None
        if not 0 <= start < stop <= depth:
            raise UserError(f"sections {part!r} are not in 0:{depth}, all that this volume has (stop is not included)")
        sections.update(range(start, stop))
    return sorted(sections)


def describe_annotation(labels: np.ndarray, sections: list[int], first: int = 0, depth: int = 0) -> dict:
    """Return what is annotated on some sections, and advice on it.

    Parameters
    ----------
    labels
        Instance labels (z, y, x), as `normalize_labels` gives them.
    sections
        Indices into ``labels``.
    first
        Number of ``labels[0]`` in its volume.
    depth
        Sections of the volume.

    Returns
    -------
    dict
        ``sections`` (how many), ``objects`` (how many), ``foreground`` (share of the annotated voxels), ``empty``
        (numbers of sections without an object while others have some), ``advice`` (a list of sentences).
    """
    chosen = labels[sections]
    annotated = chosen != UNLABELED
    foreground = annotated & (chosen != 0)
    filled = foreground.any(axis=(1, 2))
    empty = [first + z for z, full in zip(sections, filled, strict=True) if not full] if filled.any() else []
    objects = int(np.unique(chosen[foreground]).size)
    advice = []
    if objects < ADVISED_OBJECTS:
        advice.append(f"{objects} annotated objects, fewer than {ADVISED_OBJECTS}: annotate more if results disappoint")
    if empty:
        names = ", ".join(map(str, empty[:8])) + (", ..." if len(empty) > 8 else "")
        advice.append(f"{len(empty)} sections hold no object, others do ({names}): leave out what is not annotated")
    span = sections[-1] - sections[0] + 1
    if len(sections) <= MIN_SPREAD_SECTIONS and len(sections) < 0.9 * depth and 2 * span < depth:
        place = f"{first + sections[0]}:{first + sections[-1] + 1}"
        advice.append(
            f"all {len(sections)} sections lie in {place} of {depth}: spread evenly, they would show more objects"
        )
    share = float(foreground.sum() / max(1, annotated.sum()))
    return {"sections": len(sections), "objects": objects, "foreground": share, "empty": empty, "advice": advice}
