"""A simulated annotator: the truth answers what is asked. Scores over the number of annotated sections, for three ways to ask.

    suggested  some evenly spaced sections first, then those that `volseg suggest` chooses on a run of the model so far
    spaced     evenly spaced sections, others for each number
    random     sections in random order

Every model is trained anew by the same recipe, so that ways differ in their sections alone. What is done is kept: a call that
was stopped, or ended by its minutes, goes on when it is given again.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import tifffile

from benchmarks import report, trial
from volseg.box import Box
from volseg.errors import UserError
from volseg.io import volume
from volseg.training.suggest import suggest

WAYS = ("spaced", "suggested", "random")


@dataclass(frozen=True)
class Task:
    """What is annotated, and how models are trained and scored.

    Attributes
    ----------
    image, label
        The sections that may be annotated, as files of their own.
    test
        Image, labels and box that are scored.
    counts
        Numbers of annotated sections, ascending.
    recipe, train_sets, infer_sets
        As in `trial`.
    voxel_size_nm
        z y x; None where the files say.
    out
        Folder of models, runs and rows.
    """

    image: str
    label: str
    test: tuple[str, str, Box]
    counts: tuple[int, ...]
    recipe: str
    train_sets: tuple[str, ...]
    infer_sets: tuple[str, ...]
    voxel_size_nm: tuple[float, ...] | None
    out: Path

    @property
    def depth(self) -> int:
        """How many sections may be annotated."""
        return volume.open(self.image).shape[0]


def task(
    pair: tuple[str, str], learn: str, test: str, counts: tuple[int, ...], recipe: str, voxel_size: str, out: str,
    train_sets: tuple[str, ...], infer_sets: tuple[str, ...],
) -> Task:  # fmt: skip
    """The task on a volume: sections ``learn`` may be annotated, ``test`` are scored."""
    folder = Path(out)
    size = tuple(float(n) for n in voxel_size.split(",")) if voxel_size else None
    first, stop = trial.span(pair[0], learn)
    if max(counts) > stop - first:
        raise SystemExit(f"{max(counts)} sections cannot be annotated of {stop - first}: give smaller --counts")
    files = []
    for kind, path in zip(("image", "label"), pair, strict=True):
        opened, target = volume.open(path), folder / f"{kind}.tif"
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(target, opened.read(Box((first, 0, 0), (stop, *opened.shape[1:]))))
        files.append(str(target))
        size = size or opened.voxel_size_nm
    sets = (*infer_sets, *([f"input.voxel_size_nm={list(size)}"] if size else []))
    scored = trial.cut(*pair, test, folder / "test")
    return Task(*files, scored, tuple(sorted(counts)), recipe, train_sets, sets, size, folder)


def measure(given: Task, seeds: int, minutes: float, name: str, ways: tuple[str, ...] = WAYS) -> None:
    """A row for each way and number of sections, mean over seeds; no training begins after so many ``minutes``."""
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    rows = _stored(given.out)
    for seed in range(seeds):
        for way in ways:
            asked: list[int] = []
            for last, count in pairwise((0, *given.counts)):
                if time.monotonic() > end:
                    print(f"{minutes:g} minutes are over; the same command goes on")
                    return
                before, asked = asked, ask(given, way, seed, count, asked, last)
                if asked == before:
                    print(f"{way}, seed {seed}: nothing is left to ask for beyond {len(before)} sections")
                    break
                key = f"{way} {seed} {count}"
                if key not in rows:
                    rows[key] = {"way": way, "seed": seed, "sections": count, **_score(given, way, seed, count, asked)}
                    (given.out / "rows.json").write_text(json.dumps(rows, indent=1))
                    report.keep(f"annotate-{name}", summary(list(rows.values())))


def ask(given: Task, way: str, seed: int, count: int, before: list[int], last: int) -> list[int]:
    """The sections that are annotated of ``count``, where ``before`` were annotated already, of ``last``.

    Fewer where `suggest` finds fewer that are worth it.
    """
    if way == "random":
        return sorted(random.Random(seed).sample(range(given.depth), max(given.counts))[:count])
    if way == "spaced" or not before:
        return trial.spread(0, given.depth, count)
    place = _place(given, way, seed, last)
    run, folder = place / "pool.volseg.zarr", place / "asked"
    if not (folder / "sections.json").exists():
        changes = (part for text in given.infer_sets for part in ("--set", text))
        model = str(place / "model.safetensors")
        trial.volseg("infer", given.image, "--model", model, "--out", str(run), "--overwrite", *changes)
        try:
            made = suggest(run, count - len(before), folder, annotated=before, overwrite=True)
        except UserError:  # all others lie beside one that is annotated
            return before
        more = [one.z for one in made.suggestions]
        (folder / "sections.json").write_text(json.dumps(sorted({*before, *more})))
    return json.loads((folder / "sections.json").read_text())


def _place(given: Task, way: str, seed: int, count: int) -> Path:
    """The folder of a model; the first ones that are asked for are spaced."""
    first = way == "suggested" and count == given.counts[0]
    return given.out / f"{'spaced' if first else way}-seed{seed}-{count}"


def _score(given: Task, way: str, seed: int, count: int, sections: list[int]) -> dict:
    """A model of these sections is trained and scored."""
    table: dict = {"image": given.image, "label": given.label, "train": sections}
    if given.voxel_size_nm:
        table["voxel_size_nm"] = list(given.voxel_size_nm)
    config = trial.settings(given.recipe, table, _place(given, way, seed, count), seed, given.train_sets)
    model, card = trial.trained(config)
    _, scores = trial.scored(model, *given.test, given.infer_sets)
    return {**trial.row(card, scores), "asked": sections}


def _stored(out: Path) -> dict:
    path = out / "rows.json"
    return json.loads(path.read_text()) if path.exists() else {}


def summary(rows: list[dict]) -> list[dict]:
    """Means over seeds for each way and number of sections.

    >>> same = {"way": "spaced", "sections": 2, "IoU": 0.8, "minutes": 1.0}
    >>> rows = [{**same, "seed": seed, "PQ": pq} for seed, pq in enumerate((0.4, 0.6))]
    >>> summary(rows)[0]["PQ"], summary(rows)[0]["deviation"]
    (0.5, 0.1)
    """
    groups: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["way"], row["sections"]), []).append(row)
    return [
        {
            "way": way, "sections": count, "seeds": len(own),
            **{name: round(float(np.mean([row[name] for row in own])), 4) for name in ("IoU", "PQ", "minutes")},
            "deviation": round(float(np.std([row["PQ"] for row in own])), 4),
        }
        for (way, count), own in sorted(groups.items())
    ]  # fmt: skip
