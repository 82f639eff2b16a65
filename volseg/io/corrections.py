"""Corrections of objects as a file: pairs of points, or of labels, that are one object or are two.

    {"format": "volseg corrections", "version": 1, "run": "5d0e...", "labels": "91af...", "shape": [165, 768, 1024],
     "corrections": [
      {"do": "join", "points": [[3, 40, 51], [3, 44, 60]], "note": "one mitochondrion"},
      {"do": "split", "points": [[9, 12, 80], [9, 20, 80]]},
      {"do": "join", "labels": [3, 7]},
      {"do": "undecided", "points": [[5, 1, 1], [5, 1, 2]]}
    ]}

``run`` says of which probabilities the points are voxels, and ``labels`` of which decision the labels are: those of another
one have other numbers. ``shape`` is that of the grid of the points, z y x. A point is z, y, x from 0.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any, Literal

from volseg.box import Triple
from volseg.errors import UserError
from volseg.io import files

FORMAT, VERSION = "volseg corrections", 1
MAX_BYTES = 64 << 20  # of a file; a correction takes about 100
HEADER_KEYS = {"format", "version", "run", "labels", "shape", "corrections", "note"}
ENTRY_KEYS = {"do", "points", "labels", "note"}
ACTIONS = ("join", "split", "undecided")

Pair = tuple[Triple, Triple]
Action = Literal["join", "split"]


@dataclass(frozen=True)
class Corrections:
    """The corrections of a run, by voxels of the grid in which it decides.

    Attributes
    ----------
    joins
        Pairs of voxels that are in one object.
    splits
        Pairs of voxels that are in two.
    file
        The hash of the file that they were read from; it decides nothing.
    """

    joins: tuple[Pair, ...] = ()
    splits: tuple[Pair, ...] = ()
    file: str = ""

    @property
    def key(self) -> list:
        """What decides labels, whatever the order in the file."""
        return [sorted({tuple(sorted(pair)) for pair in pairs}) for pairs in (self.joins, self.splits)]

    @property
    def pairs(self) -> list[tuple[Action, Pair]]:
        """All of them, with what is to be done."""
        return [*(("join", pair) for pair in self.joins), *(("split", pair) for pair in self.splits)]

    def __str__(self) -> str:
        return f"{_counted(len(self.joins), 'join')} and {_counted(len(self.splits), 'split')}"

    @classmethod
    def from_json(cls, plain: dict | None) -> Corrections | None:
        """What ``dataclasses.asdict`` made plain."""
        if plain is None:
            return None
        joins, splits = (tuple(_pair(pair) for pair in plain[name]) for name in ("joins", "splits"))
        return cls(joins, splits, plain.get("file", ""))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _pair(plain: Any) -> Pair:
    (a, b, c), (d, e, f) = plain
    return (int(a), int(b), int(c)), (int(d), int(e), int(f))


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Entry:
    """One correction as a file has it: two ``points`` or two ``labels``, and what is to be done with them.

    ``where`` names it to a user.
    """

    where: str
    do: Action
    points: Pair | None = None
    labels: tuple[int, int] | None = None

    def __str__(self) -> str:
        if self.points:
            return f"{self.where}: {self.do} of {' and '.join(' '.join(map(str, point)) for point in self.points)}"
        return f"{self.where}: {self.do} of labels {' and '.join(map(str, self.labels or ()))}"


@dataclass(frozen=True)
class CorrectionFile:
    """What a file of corrections says.

    name       the file
    digest     the hash of its content
    run        of which probabilities its points are voxels
    labels     of which decision its labels are; "" where it names none
    shape      of the grid of its points
    entries    what is decided
    undecided  how many entries are not
    """

    name: str
    digest: str
    run: str
    labels: str
    shape: Triple
    entries: tuple[Entry, ...]
    undecided: int


def read(source: str | os.PathLike | dict) -> CorrectionFile:
    """The corrections in a file, or in a dictionary of the same form.

    Raises
    ------
    UserError
        With the line, for what is no such file, or of another version.
    """
    name = "corrections" if isinstance(source, dict) else os.fspath(source)
    try:
        text = (
            json.dumps(source, default=lambda value: value.tolist()) if isinstance(source, dict) else _read_text(name)
        )
        plain = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{name}, line {error.lineno}: no JSON ({error.msg}); write it as docs/review.md shows"
        ) from None
    except UserError:
        raise
    except (ValueError, RecursionError, TypeError, AttributeError):
        raise UserError(f"{name} holds no JSON that can be read; write it as docs/review.md shows") from None
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise UserError(
            f'{name} is no file of corrections: it does not begin with {{"format": "{FORMAT}"; volseg review writes one to '
            "fill in"
        )
    if plain.get("version") != VERSION:
        raise UserError(
            f"{name} has version {plain.get('version')!r} of corrections, and this volseg reads {VERSION}: write it anew with "
            "volseg review"
        )
    if unknown := sorted(set(plain) - HEADER_KEYS):
        raise UserError(f"{name}: unknown key {unknown[0]!r}; known here: {', '.join(sorted(HEADER_KEYS))}")
    run, labels, shape = plain.get("run"), plain.get("labels", ""), plain.get("shape")
    listed = plain.get("corrections")
    if not (isinstance(run, str) and isinstance(labels, str) and _is_point(shape) and isinstance(listed, list)):
        raise UserError(
            f'{name}: wanted are the texts "run" and "labels", the three numbers "shape" and the list "corrections", as volseg '
            "review writes them"
        )
    lines = _lines_of_entries(text) if not isinstance(source, dict) else []
    wheres = [
        f"{name}, line {lines[k]}" if len(lines) == len(listed) else f"{name}, correction {k + 1}"
        for k in range(len(listed))
    ]
    read_entries = [_entry(where, entry) for where, entry in zip(wheres, listed, strict=True)]
    entries = tuple(entry for entry in read_entries if entry)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return CorrectionFile(name, digest, run, labels, tuple(shape), entries, len(read_entries) - len(entries))


def _read_text(name: str) -> str:
    try:
        data = files.read_range(files.absolute(name), 0, MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"{name} is larger than {MAX_BYTES >> 20} MB, as no file of corrections is")
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(f"cannot read corrections {name}: {reason}; give a file as volseg review writes it") from None


def _entry(where: str, plain: Any) -> Entry | None:
    """The entry, checked; None where it is not decided."""
    if not isinstance(plain, dict) or not set(plain) <= ENTRY_KEYS or plain.get("do") not in ACTIONS:
        raise UserError(
            f'{where}: wanted is {{"do": "join" or "split" or "undecided", "points": [[z, y, x], [z, y, x]]}}, or "labels": '
            "[a, b] instead of points"
        )
    points, labels = plain.get("points"), plain.get("labels")
    has_points = isinstance(points, list) and len(points) == 2 and all(map(_is_point, points))
    has_labels = isinstance(labels, list) and len(labels) == 2 and all(map(_is_number, labels)) and min(labels) > 0
    if (points is None) == (labels is None) or not (has_points or has_labels):
        raise UserError(
            f"{where}: wanted are two points [z, y, x] of whole numbers from 0, or two labels from 1, and not both"
        )
    if plain["do"] == "undecided":
        return None
    if labels is not None:
        return Entry(where, plain["do"], labels=(labels[0], labels[1]))
    return Entry(where, plain["do"], points=_pair(points))


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))


def _lines_of_entries(text: str) -> list[int]:
    """The line, from 1, in which each entry of the list begins; none where that cannot be told."""
    decoder, lines, place, line = json.JSONDecoder(), [], 0, 1
    try:
        begin = text.index("[", text.index('"corrections"')) + 1
        while (begin := _next_value(text, begin)) < len(text) and text[begin] != "]":
            line, place = line + text.count("\n", place, begin), begin
            lines.append(line)
            _, begin = decoder.raw_decode(text, begin)
        return lines
    except ValueError:
        return []


def _next_value(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n,":
        place += 1
    return place


# ---------------------------------------------------------------- writing


def header(run: str, labels: str, shape: Triple) -> dict:
    """A file without corrections."""
    return {"format": FORMAT, "version": VERSION, "run": run, "labels": labels, "shape": list(shape), "corrections": []}


def entry(do: str, pair: Pair, note: str = "") -> dict:
    """One correction of a file, of two points."""
    return {"do": do, "points": [list(point) for point in pair]} | ({"note": note} if note else {})


def format_file(plain: dict) -> str:
    """The text of a file, a line for each correction."""
    head = json.dumps({key: value for key, value in plain.items() if key != "corrections"})
    entries = ",\n".join(f"  {json.dumps(each)}" for each in plain["corrections"])
    return f'{head[:-1]},\n "corrections": [\n{entries}\n]}}\n'
