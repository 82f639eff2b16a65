"""What labels hold: which sections are annotated, what kind of labels they are and why, and which sections to hold out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
from scipy import ndimage

from volseg.errors import UserError
from volseg.evaluation.evaluate import MAX_ISOLATED_SHARE, count_isolated
from volseg.io.annotation import Annotation
from volseg.training.targets import (
    MIN_AGREEMENT,
    as_integers,
    is_mask,
    mask_value,
    normalize_labels,
    section_agreement,
)

SLAB_VOXELS = 1 << 26  # read at once
COUNTED_VOXELS = 1 << 29  # of consecutive sections, up to which objects are counted
SAMPLES = 8  # sections whose shapes are looked at
STROKE = 6  # half the width, in voxels, of the widest stroke of a scribble
MAX_WIDE_SHARE = 0.02  # of a scribble's voxels that may lie further inside
MAX_SCRIBBLED = 0.25  # share of annotated sections that scribbles cover at most
MAX_CLASSES = 4  # values of scribbles
LENGTH = 3  # lengths of a stroke's width that it has at least
HELD_OUT_SHARE, MAX_HELD_OUT = 0.15, 24  # of the annotated sections
MAX_CORNER = 0.4  # share of a section that labels fill where it may be all that was looked at
MIN_SECTIONS = 4  # with fewer, none is held out
LONG_RUN = 40  # consecutive sections from which on two blocks are held out

Kind = Literal["instances", "mask", "scribbles"]
POINTS: tuple[Kind, str] = ("instances", "a ball around each point")


@dataclass(frozen=True)
class Survey:
    """What labels hold.

    Attributes
    ----------
    kind
        "instances", "mask" or "scribbles".
    reason
        Why they are taken for that.
    sections
        Annotated sections, from 0.
    unlabeled, background
        Settings of ``[[train.data]]`` with which to read them.
    objects
        How many; None where there is too much to count.
    foreground
        Share of the annotated voxels that lies in objects.
    notes
        What their user should know.
    """

    kind: Kind
    reason: str
    sections: tuple[int, ...]
    unlabeled: int | None
    background: int
    objects: int | None
    foreground: float
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Values:
    """The values that a section holds, in order, and how many voxels have each."""

    values: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, section: np.ndarray) -> _Values:
        if section.dtype.itemsize > 2 or section.dtype.kind == "i":
            return cls(*np.unique(section, return_counts=True))
        counts = np.bincount(section.ravel())
        values = np.flatnonzero(counts)
        return cls(values, counts[values])

    @property
    def empty(self) -> bool:
        return not self.values.any()


def survey(annotation: Annotation, *, scribbles: bool | None = None, background: int | None = None) -> Survey:
    """Look at labels: all sections of a volume, else those that hold annotation.

    Parameters
    ----------
    annotation
        From `annotation.open_annotation`.
    scribbles
        Whether 0 stands for what nobody annotated; None where that is to be decided.
    background
        The value outside of objects; None where that is to be decided.

    Raises
    ------
    UserError
        Nothing is annotated, the labels are an image, or all that is annotated lies in objects.
    """
    named = annotation.sections if annotation.sections is not None else tuple(range(annotation.depth))
    held = _values(annotation, named)
    sections = tuple(z for z in named if annotation.sections is not None or not held[z].empty)
    found = [held[z] for z in sections]
    if not any(one.values.any() for one in found):
        raise UserError(f"{annotation.path} holds no label: all of its voxels are 0")
    drawn = [z for z in sections if not held[z].empty]
    chosen = drawn[:: max(1, len(drawn) // SAMPLES)][:SAMPLES]
    samples = [as_integers(annotation.read(z, z + 1))[0] for z in chosen]
    refuse_image(samples, annotation.path)
    values = sorted(set().union(*(one.values.tolist() for one in found)) - {0, annotation.unlabeled})
    kind, reason = POINTS if annotation.form == "points" else _kind(found, samples, values, scribbles)
    unlabeled = 0 if kind == "scribbles" else annotation.unlabeled
    if kind == "scribbles":
        sections = tuple(drawn)
    found = [held[z] for z in sections]
    notes = []
    if background is None:
        background, note = _background(kind, values, found)
        notes += note
    if unlabeled == background or (background and background not in values):
        raise UserError(
            f"{annotation.path} has the values {_few(values)} beside 0, and background = {background} is none of them; give "
            "the one outside of objects"
        )
    inside = sum(int(one.counts[_in_objects(one.values, background, unlabeled)].sum()) for one in found)
    known = sum(
        int(one.counts[one.values != unlabeled].sum()) if unlabeled is not None else int(one.counts.sum())
        for one in found
    )
    if not inside or inside == known:
        what = "in an object" if inside else "background"
        raise UserError(
            f"{annotation.path}: every annotated voxel is {what}; draw both, or give --background, the value outside of objects"
        )
    by_section = kind == "instances" and annotation.form != "points" and _numbered_by_section(annotation, sections)
    if by_section:
        reason += "; each section was numbered by itself, so objects that overlap most in neighboring sections are one"
    return Survey(
        kind, reason, sections, unlabeled, background, _objects(annotation, sections, kind, found, background, by_section),
        inside / known, tuple(notes + _notes(named, sections, held, samples, kind, values)),
    )  # fmt: skip


def _values(annotation: Annotation, named: Sequence[int]) -> dict[int, _Values]:
    """The values of each of these sections, read in slabs."""
    out: dict[int, _Values] = {}
    start = 0
    plane = annotation.read(named[0], named[0] + 1).size if named else 1
    depth = max(1, min(64, SLAB_VOXELS // plane))
    while start < len(named):
        first = named[start]
        own = [z for z in named[start : start + depth] if z < first + depth]
        slab = as_integers(annotation.read(first, own[-1] + 1))
        out.update((z, _Values.of(slab[z - first])) for z in own)
        start += len(own)
    return out


def refuse_image(samples: Sequence[np.ndarray], path: str) -> None:
    """Raise `UserError` where sections (y, x) of labels look like those of an image."""
    above = sum(int(np.count_nonzero(sample)) for sample in samples)
    if sum(map(count_isolated, samples)) > MAX_ISOLATED_SHARE * above:
        raise UserError(f"{path} holds no labels: its voxels differ from all their neighbors, as those of an image do")


def _in_objects(values: np.ndarray, background: int, unlabeled: int | None) -> np.ndarray:
    inside = values != background
    return inside & (values != unlabeled) if unlabeled is not None else inside


# ----------------------------------------------------------------------------------------------------------------- kind


def _kind(
    found: Sequence[_Values], samples: Sequence[np.ndarray], values: list[int], scribbles: bool | None
) -> tuple[Kind, str]:
    """The kind of labels with these values, and why."""
    if scribbles:
        return "scribbles", "as you say"
    if scribbles is None and (reason := _scribbled(found, samples, values)):
        return "scribbles", reason
    written = {mask_value(one.values, one.counts) for one in found} - {0}
    if is_mask(list(written)):
        both = " or ".join(map(str, sorted(v for v in written if v is not None)))
        return "mask", f"each section holds 0 and {both} alone; connected parts are its objects"
    return "instances", f"{len(values)} values beside 0 ({_few(values)}): an object each"


def _scribbled(found: Sequence[_Values], samples: Sequence[np.ndarray], values: list[int]) -> str:
    """Why the labels are scribbles; "" where they are not: few values, in strokes that are thin and long."""
    total, drawn = (
        sum(int(counts.sum()) for counts in each)
        for each in zip(*((one.counts, one.counts[one.values != 0]) for one in found), strict=True)
    )
    if not 2 <= len(values) <= MAX_CLASSES or values[-1] > 2 * MAX_CLASSES or drawn > MAX_SCRIBBLED * total:
        return ""
    wide = inside = pieces = long = 0
    for sample in samples:
        for value in values:
            stroke = sample == value
            depth = ndimage.distance_transform_cdt(np.pad(stroke, 1))[1:-1, 1:-1]
            parts, count = ndimage.label(stroke, np.ones((3, 3)))
            numbers = np.arange(1, count + 1)
            areas = ndimage.sum_labels(stroke, parts, numbers)
            widths = 2 * np.asarray(ndimage.maximum(depth, parts, numbers)) if count else np.zeros(0)
            wide, inside = wide + int((depth > STROKE).sum()), inside + int(stroke.sum())
            pieces, long = pieces + count, long + int((areas >= LENGTH * widths**2).sum())
    if not inside or wide > MAX_WIDE_SHARE * inside or 2 * long < pieces:
        return ""
    return (
        f"{_few(values)} are the only values beside 0, in long strokes of at most {2 * STROKE} voxels' width that cover "
        f"{100 * drawn / total:.1f} % of the annotated sections; 0 is what nobody annotated"
    )


def _background(kind: Kind, values: list[int], found: Sequence[_Values]) -> tuple[int, list[str]]:
    """The value outside of objects, and a note where that is no more than likely."""
    if kind == "scribbles":
        note = f"{values[0]} is taken for strokes outside of objects, {_few(values[1:])} for those inside"
        return values[0], [f"{note}; with --background N, N is outside"]
    if any(one.values[0] == 0 for one in found) or len(values) != 2:
        return 0, []
    note = f"nothing is 0: {values[0]} is taken for background, {values[1]} for objects"
    return values[0], [f"{note}; with --background {values[1]} it is the other way around"]


def _objects(
    annotation: Annotation, sections: tuple[int, ...], kind: Kind, found: Sequence[_Values], background: int,
    by_section: bool,
) -> int | None:  # fmt: skip
    """How many objects there are: values or, of one value, connected parts in consecutive sections.

    Where each section was numbered ``by_section``, objects that overlap in neighboring sections are one.
    """
    unlabeled = 0 if kind == "scribbles" else annotation.unlabeled
    own = set().union(*(one.values[_in_objects(one.values, background, unlabeled)].tolist() for one in found))
    if kind != "mask" and len(own) > 1 and not by_section:
        return len(own)
    total = 0
    for run in runs(sections):
        slab = annotation.read(run[0], run[-1] + 1)
        if prod(slab.shape) > COUNTED_VOXELS:
            return None
        if background and not by_section:
            total += ndimage.label(_in_objects(slab, background, unlabeled), np.ones((3, 3, 3)))[1]
        else:
            total += normalize_labels(slab, background=background)[1]["objects"]
    return total


def _numbered_by_section(annotation: Annotation, sections: Sequence[int]) -> bool:
    """Whether objects of neighboring sections have numbers that have nothing to do with each other."""
    known = set(sections)
    neighbors = [z for z in sections if z + 1 in known]
    chosen = neighbors[:: max(1, len(neighbors) // SAMPLES)][:SAMPLES]
    found = [section_agreement(annotation.read(z, z + 2)) for z in chosen]
    return bool(found) and float(np.mean(found)) < MIN_AGREEMENT


def _notes(
    named: Sequence[int], sections: Sequence[int], held: dict[int, _Values], samples: Sequence[np.ndarray], kind: Kind,
    values: list[int],
) -> list[str]:  # fmt: skip
    """What the user of the labels should know."""
    notes = []
    if left_out := sorted({*named} - {*sections}):
        nothing = "stroke" if kind == "scribbles" else "label"
        are = "is" if len(left_out) == 1 else "are"
        advice = "" if kind == "scribbles" else ": name those in train that were annotated and hold no object"
        notes.append(f"{_count(left_out)} no {nothing} and {are} left out ({ranges(left_out)}){advice}")
    if empty := [z for z in sections if held[z].empty]:
        notes.append(f"{_count(empty)} no object, as annotated ({ranges(empty)}): leave out what was not looked at")
    found = [held[z] for z in sections]
    share = sum(int(one.counts[one.values == 255].sum()) for one in found) / sum(int(one.counts.sum()) for one in found)
    if kind == "mask" and share > 0.5:
        notes.append(f"255 covers {100 * share:.0f} % of the sections: with --background 255, the rest are the objects")
    if kind != "scribbles" and (place := _corner(samples)):
        notes.append(
            f"all labels lie in {place}, and all else of their sections counts as background: if nobody looked there, cut "
            "image and labels to it, or give what is beyond a value of its own and name it as unlabeled"
        )
    if kind == "instances" and len(values) <= MAX_CLASSES:
        pieces = [sum(ndimage.label(sample == value)[1] for sample in samples) / len(samples) for value in values]
        if min(pieces) > 2:
            notes.append(
                f"each value lies in several pieces a section ({pieces[0]:.0f} of {values[0]}): if they are classes and no "
                "objects, keep one, as a mask; if they are scribbles, give --scribbles"
            )
    return notes


def _corner(samples: Sequence[np.ndarray]) -> str:
    """The part of the sections that labels lie in, in words; "" where that is more than `MAX_CORNER` of them."""
    rows, columns = (
        np.flatnonzero(np.any([(sample != 0).any(axis=axis) for sample in samples], axis=0)) for axis in (1, 0)
    )
    (y0, y1), (x0, x1) = ((int(span[0]), int(span[-1]) + 1) for span in (rows, columns))
    return f"y {y0}:{y1}, x {x0}:{x1}" if (y1 - y0) * (x1 - x0) < MAX_CORNER * samples[0].size else ""


def _count(sections: Sequence[int]) -> str:
    """
    >>> _count([3]), _count([3, 4])
    ('1 section holds', '2 sections hold')
    """
    return "1 section holds" if len(sections) == 1 else f"{len(sections)} sections hold"


# ------------------------------------------------------------------------------------------------------------- sections


def runs(sections: Sequence[int]) -> list[list[int]]:
    """Return ascending numbers as runs without gaps.

    >>> runs((1, 2, 5))
    [[1, 2], [5]]
    """
    out: list[list[int]] = []
    for z in sections:
        if out and out[-1][-1] == z - 1:
            out[-1].append(z)
        else:
            out.append([z])
    return out


def parts(sections: Sequence[int]) -> list[int | str]:
    """Return ascending numbers as a config names them.

    >>> parts((1, 2, 3, 5))
    ['1:4', 5]
    """
    return [run[0] if len(run) == 1 else f"{run[0]}:{run[-1] + 1}" for run in runs(sections)]


def ranges(sections: Sequence[int], most: int = 8) -> str:
    """Return ascending numbers in words, as many as a line holds.

    >>> ranges((1, 2, 3, 5))
    '1:4, 5'
    """
    found = [str(part) for part in parts(sections)]
    return ", ".join(found[:most]) + (", ..." if len(found) > most else "")


def _few(values: Sequence[int]) -> str:
    """
    >>> _few([1, 2]), _few([1, 2, 3, 4, 90])
    ('1, 2', '1, 2, 3, ..., 90')
    """
    shown = list(map(str, values))
    return ", ".join(shown if len(shown) <= 4 else [*shown[:3], "...", shown[-1]])


def hold_out(sections: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose which annotated sections to learn from, and which to hold out: spread, and no neighbors where that is possible.

    About `HELD_OUT_SHARE` are held out, up to `MAX_HELD_OUT`; none of fewer than `MIN_SECTIONS`. Where sections lie apart, some
    of them are. Of neighbors, one block at the end of the longest run is or, of a very long run, two blocks within. A section
    beside a block is left out, since it looks like its neighbor.

    Returns
    -------
    train, held_out
        Ascending numbers of sections.

    Examples
    --------
    >>> hold_out((5, 16, 27, 38, 49, 60, 71, 82))
    ((5, 16, 27, 38, 60, 71, 82), (49,))
    >>> hold_out(range(20))[1], len(hold_out(range(20))[0]), ranges(hold_out(range(100))[1])
    ((17, 18, 19), 16, '21:29, 72:79')
    """
    sections = sorted(sections)
    if len(sections) < MIN_SECTIONS:
        return tuple(sections), ()
    wanted = min(MAX_HELD_OUT, max(1, round(HELD_OUT_SHARE * len(sections))))
    groups = runs(sections)
    longest = max(groups, key=len)
    short = [run for run in groups if len(run) <= max(2, wanted)]
    if len(short) >= MIN_SECTIONS:
        count = min(len(short) // 2, max(1, round(wanted * len(short) / sum(map(len, short)))))
        chosen = {(2 * i + 1) * len(short) // (2 * count) for i in range(count)}
        held = [z for i in sorted(chosen) for z in short[i]]
    elif len(longest) >= LONG_RUN:
        sizes = (wanted + 1) // 2, wanted // 2
        middles = (len(longest) // 4, 3 * len(longest) // 4)
        held = [z for middle, n in zip(middles, sizes, strict=True) for z in longest[middle - n // 2 :][:n]]
    else:
        held = longest[-min(wanted, len(longest) - 1) :]
    beside = {z + step for z in held for step in (-1, 1)}
    apart = [z for z in sections if z not in held and z not in beside]
    train = apart if len(apart) >= MIN_SECTIONS - 1 else [z for z in sections if z not in held]
    return tuple(train), tuple(held)
