"""Whether a finished run's labels are exactly what its settings say: parts are recomputed with other cuts and compared.

1. Boxes of `BOX` voxels: all that a box can tell whatever lies around it (`recheck`).
2. No box sees the forest as a whole. So a volume of at most `MAX_RELABELED_VOXELS` is labeled again, in other blocks, and
   every label compared; and where ``work`` was kept, the stored tables are joined again and every id map compared
   (`recompute`).
3. Block faces are compared with other planes (`seams`); that is a statistic and decides nothing.
"""

from __future__ import annotations

import html
import os
from dataclasses import dataclass
from math import prod
from os import PathLike
from typing import Any

import numpy as np

from volseg.box import Box, Triple
from volseg.engine.integrity import damaged_files
from volseg.errors import UserError
from volseg.evaluation.recheck import CHECKS, BoxCheck, check_box
from volseg.evaluation.recompute import Rejoining, Relabeling, other_block, rejoin, relabel
from volseg.evaluation.seams import MEASURES, Seams, measure_seams
from volseg.evaluation.stored import StoredRun, open_stored
from volseg.progress import format_table

BOX = (64, 256, 256)  # voxels checked at once
MAX_LISTED_FILES = 20
MAX_RELABELED_VOXELS = 64 << 20


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes
    ----------
    run
        The run's folder.
    shape, block
        Voxels of the volume and of its blocks, z y x.
    objects
        How many rows the object table has.
    seed
        By which the boxes were drawn.
    notes
        What could not be checked, and why.
    boxes
        What each box told.
    rejoining
        The stored tables joined again; None where they are not there or too large.
    relabeling
        The whole volume labeled again; None where it has more than `MAX_RELABELED_VOXELS`.
    seams
        Block faces beside other planes.
    corrections
        How many joins and splits the run has, which all that was recomputed obeys.
    damaged
        Keys of files that are missing or not as they were written; where they cannot be read, nothing was recomputed.
    """

    run: str
    shape: Triple
    block: Triple
    objects: int
    seed: int
    notes: tuple[str, ...]
    boxes: tuple[BoxCheck, ...]
    rejoining: Rejoining | None
    relabeling: Relabeling | None
    seams: Seams | None
    damaged: tuple[str, ...] = ()
    corrections: tuple[int, int] = (0, 0)

    @property
    def ok(self) -> bool:
        """Whether every file is as it was written, and nothing that was recomputed differs."""
        return self.equal and not self.damaged

    @property
    def equal(self) -> bool:
        """Whether nothing that was recomputed differs."""
        wholes = [part.wrong for part in (self.rejoining, self.relabeling) if part]
        return not any(wholes) and not any(count for box in self.boxes for count in box.wrong.values())

    def to_json(self) -> dict:
        """Plain values that ``json.dumps`` takes."""
        return {
            "run": self.run,
            "ok": self.ok,
            "shape": list(self.shape),
            "block": list(self.block),
            "objects": self.objects,
            "seed": self.seed,
            "notes": list(self.notes),
            "corrections": dict(zip(("joins", "splits"), self.corrections, strict=True)),
            "boxes": [box.to_json() for box in self.boxes],
            "joined": self.rejoining and self.rejoining.to_json(),
            "whole": self.relabeling and self.relabeling.to_json(),
            "seams": self.seams and self.seams.to_json(),
            "damaged": list(self.damaged),
        }

    def __str__(self) -> str:
        return format_verification(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(format_verification(self))}</pre>"


def verify(run: str | PathLike | Any, *, boxes: int = 5, seed: int = 0) -> Verification:
    """Recompute parts of a finished run with other cuts and compare them bit for bit.

    Memory depends on the box, the tables and `MAX_RELABELED_VOXELS`, not on the volume.

    Parameters
    ----------
    run
        Folder of a finished run, or what has it as ``path``.
    boxes
        How many boxes of `BOX` voxels are checked, every other one around a corner of blocks; fewer where boxes coincide
        because the volume is small.
    seed
        By which they are drawn.

    Returns
    -------
    Verification
        Its ``ok`` is whether nothing differs.

    Raises
    ------
    UserError
        There is no finished run, or it cannot be read.
    """
    if boxes < 1:
        raise UserError(f"{boxes} boxes to verify; give 1 or more")
    path = os.fspath(getattr(run, "path", run)).rstrip("/")
    damaged = tuple(damaged_files(path))
    try:
        return _recomputed(path, boxes, seed, damaged)
    except (UserError, OSError, ValueError):  # of libraries that read what is damaged
        if not damaged:
            raise
        return Verification(path, (0, 0, 0), (0, 0, 0), 0, seed, (), (), None, None, None, damaged)


def _recomputed(path: str, boxes: int, seed: int, damaged: tuple[str, ...]) -> Verification:
    """What `verify` finds where it can read what it recomputes."""
    stored = open_stored(path)
    if stored.run.restored and stored.missing:
        notes = (stored.missing, "the run was resampled: without its work folder, only its files are checked")
        return Verification(path, stored.shape, stored.grid.block, 0, seed, notes, (), None, None, None, damaged)
    if stored.run.drops:
        return _without_probabilities(stored, seed, damaged)
    rng = np.random.default_rng(seed)
    checked = tuple(check_box(stored, box) for box in draw_boxes(stored, boxes, rng))
    corrections = stored.run.corrections
    small = prod(stored.shape) <= MAX_RELABELED_VOXELS
    relabeling = relabel(stored, other_block(stored)) if small else None
    empty = (
        ""
        if any(box.masked for box in checked)
        else "no box held a voxel of the mask: give more --blocks or another --seed"
    )
    return Verification(
        run=stored.path,
        shape=stored.shape,
        block=stored.grid.block,
        objects=int(stored.objects["id"].size),
        seed=seed,
        notes=tuple(note for note in (stored.missing, empty) if note),
        boxes=checked,
        rejoining=None if stored.missing else rejoin(stored),
        relabeling=relabeling,
        seams=measure_seams(stored, rng),
        damaged=damaged,
        corrections=(len(corrections.joins), len(corrections.splits)) if corrections else (0, 0),
    )


def _without_probabilities(stored: StoredRun, seed: int, damaged: tuple[str, ...]) -> Verification:
    """What `verify` finds of a run that dropped them: its files, and its tables joined again."""
    corrections = stored.run.corrections
    note = "the run's probabilities were dropped (output.probabilities = 'drop'): only its files and tables are checked"
    return Verification(
        stored.path, stored.shape, stored.grid.block, int(stored.objects["id"].size), seed,
        tuple(filter(None, (note, stored.missing))), (), None if stored.missing else rejoin(stored), None, None, damaged,
        (len(corrections.joins), len(corrections.splits)) if corrections else (0, 0),
    )  # fmt: skip


def draw_boxes(run: StoredRun, count: int, rng: np.random.Generator) -> list[Box]:
    """Up to ``count`` different random boxes where something is wanted, every other one around a corner where blocks meet."""
    size, block = np.minimum(BOX, run.shape), np.array(run.grid.block)
    boxes = []
    for i in range(count):
        roi = _random_part(run, rng)
        lowest = np.minimum(roi.start, run.shape - size)
        highest = np.maximum(lowest, np.array(roi.stop) - size)
        start = rng.integers(lowest, highest + 1)
        if i % 2 == 0:
            first, end = np.array(roi.start) // block + 1, -(-np.array(roi.stop) // block)
            corner = rng.integers(first, np.maximum(end, first + 1)) * block
            several = np.array(run.grid.counts) > 1
            start = np.where(several, np.clip(corner - size // 2, lowest, highest), start)
        boxes.append(Box(tuple(start.tolist()), tuple((start + size).tolist())))
    return list(dict.fromkeys(boxes))


def _random_part(run: StoredRun, rng: np.random.Generator) -> Box:
    """The run's roi or, where it is known what a mask wants, that of one block: the likelier the more that is."""
    own = run.run.parts.own
    if run.run.roi is None or own.each is None or not own.count:
        return run.roi
    voxels = own.each[own.each > 0]
    wanted = run.run.wanted_part(own.grid[own.numbers[int(rng.choice(voxels.size, p=voxels / voxels.sum()))]])
    return wanted if wanted.voxels else run.roi


# ---------------------------------------------------------------- as text


WRONG = "NOT EQUAL: the labels are not those of this run's rule"
LEGEND = (
    "masked: voxels in the mask; joins: edges that must join in any surroundings; whole: objects that lie whole in the box",
    "then how many voxels are wrong by each check ('-': could not be checked): heights cut thin, basins by descent, ids by the",
    "stored map, labels outside the mask, the rule of forest and sizes, rows of the object table",
)


def format_verification(result: Verification) -> str:
    """What was found, as lines of text."""
    if result.damaged:
        listed = [f"  {key}" for key in result.damaged[:MAX_LISTED_FILES]]
        more = [f"  and {len(result.damaged) - len(listed)} more"] if len(result.damaged) > len(listed) else []
        lines = [f"{result.run}: {len(result.damaged)} file(s) missing or not as written", *listed, *more]
        advice = f"DAMAGED: volseg repair {result.run} makes them again"
    else:
        lines, advice = [], ""
    if result.seams is None:
        rejoined = _rejoining_lines(result.rejoining)
        verdict = [] if result.equal else [WRONG]
        end = [advice] if advice else [] if verdict else ["every file is as it was written"]
        return "\n".join([*lines, *result.notes, *rejoined, *verdict, *end])
    title = f"{result.run}: {_by(result.shape)} voxels in blocks of {_by(result.block)}, {result.objects} objects"
    columns = ("box", "masked", "joins", "whole", *CHECKS)
    cells = [
        (
            str(box.box),
            box.masked,
            box.sure_joins,
            box.complete_objects,
            *(_verdict(box.wrong[name]) for name in CHECKS),
        )
        for box in result.boxes
    ]
    firsts = [
        f"  {name} in {box.box}: first wrong voxel at z y x {first}"
        for box in result.boxes
        for name, first in box.first.items()
    ]
    joins, splits = result.corrections
    corrections = [f"corrected by {joins} join(s) and {splits} split(s), which what follows obeys"] * any(
        (joins, splits)
    )
    parts = [*lines, title, *corrections, *result.notes, format_table(columns, cells), *firsts, *LEGEND,
             *_rejoining_lines(result.rejoining), _relabeling_line(result.relabeling), *_seam_lines(result.seams)]  # fmt: skip
    last = advice if result.equal and advice else "all that was checked is equal" if result.equal else WRONG
    return "\n".join([*parts, last, *([advice] if advice and not result.equal else [])])


def _by(shape: Triple) -> str:
    return " x ".join(map(str, shape))


def _verdict(wrong: int | None) -> str:
    return "-" if wrong is None else str(wrong) if wrong else "equal"


def _rejoining_lines(rejoining: Rejoining | None) -> list[str]:
    if rejoining is None:
        return []
    verdict = f"{rejoining.wrong} differ or lead nowhere" if rejoining.wrong else "every id map equal"
    return [f"stored tables of {rejoining.regions} regions joined again: {verdict}"]


def _relabeling_line(relabeling: Relabeling | None) -> str:
    if relabeling is None:
        return f"whole volume: more than {MAX_RELABELED_VOXELS >> 20} Mvoxel, so only boxes were checked"
    cut = f"whole volume in {relabeling.blocks} blocks of {_by(relabeling.block)}"
    if not relabeling.wrong:
        return f"{cut}: every label equal"
    return f"{cut}: {relabeling.wrong} labels differ, first at z y x {relabeling.first}; {relabeling.objects} objects"


def _seam_lines(seams: Seams) -> list[str]:
    """What was seen at block faces, one line for each measure, and what follows."""
    if not seams.faces:
        return ["seams: no block face with a plane half a block away to compare it with"]
    rows = [
        (f"  {name}", *(f"{value:.4g}" for value in (measure.face, measure.control)), _p(measure.p))
        for name, measure in seams.measures.items()
        if measure.face is not None
    ]
    lines = [f"at {seams.faces} block faces, and at {seams.controls} planes half a block away:"]
    lines += [format_table(("", "faces", "planes", "p"), rows)]
    if seams.p is None:
        return [*lines, "too few planes to tell seams from chance"]
    corrected = f"(p = {seams.p:.3g}, corrected for {len(MEASURES)} measures)"
    if seams.visible:
        return [*lines, f"labels at block faces have other statistics than labels elsewhere {corrected}; what was recomputed "
                "says whether they are exact"]  # fmt: skip
    return [*lines, f"no seams visible {corrected}"]


def _p(p: float | None) -> str:
    return "-" if p is None else f"{p:.3g}"
