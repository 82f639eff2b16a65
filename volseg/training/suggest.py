"""Which sections of a run to annotate next, written as files to correct: the annotation loop's first half.

The other half is `volseg.training.corrections`, which goes on training with them.
"""

from __future__ import annotations

import html
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg.box import Box, Triple
from volseg.config import local_path
from volseg.errors import DamagedFileError, UserError
from volseg.evaluation.stored import StoredRun, open_stored
from volseg.evaluation.uncertainty import Candidate, candidates, labels_at
from volseg.inference import model
from volseg.inference.model_card import ModelCard
from volseg.inference.model_file import model_file
from volseg.io import files, slices, suggested, volume
from volseg.io.formats import INSIDE
from volseg.io.suggested import Item, Queue
from volseg.io.volume import Volume
from volseg.progress import format_table
from volseg.training.suggest_text import config_text, readme_text
from volseg.training.targets import parse_sections

if TYPE_CHECKING:
    import pandas

WEIGHTS = {"uncertain": 1.0, "unlike": 0.5, "joins": 1.0, "novelty": 0.5}  # of a candidate's ranks in each
NEIGHBORS = 2  # sections that two chosen ones of one window lie apart, at least


@dataclass(frozen=True)
class Suggestion:
    """A section, or a window of one, to annotate next.

    Attributes
    ----------
    name
        Of its files, without their ending.
    z, y0, y1, x0, x1
        Where it lies in the volume.
    score
        0 to 1: how much it would tell, against the other sections that were looked at.
    uncertain, unlike, joins, novelty
        Why; see `evaluation.uncertainty`.
    """

    name: str
    z: int
    y0: int
    y1: int
    x0: int
    x1: int
    score: float
    uncertain: float
    unlike: float
    joins: float
    novelty: float


@dataclass(frozen=True)
class Suggestions:
    """What to annotate next, the most telling first, and the folder that holds the files.

    Attributes
    ----------
    run, folder
        Their paths.
    suggestions
        The sections.
    notes
        What was decided, a line each.
    """

    run: str
    folder: str
    suggestions: tuple[Suggestion, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict:
        """Plain values that ``json.dumps`` takes."""
        return json.loads(json.dumps(asdict(self)))

    def to_frame(self) -> pandas.DataFrame:
        """A row for each suggestion."""
        import pandas

        return pandas.DataFrame(list(map(vars, self.suggestions)), columns=list(Suggestion.__dataclass_fields__))

    def __str__(self) -> str:
        return "\n".join([format_suggestions(self.suggestions), *(f"note     {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre><p>{html.escape(self.folder)}</p>"


def suggest(
    run: str | os.PathLike | Any,
    count: int = 6,
    out: str | os.PathLike | None = None,
    *,
    annotated: Sequence[str | int] = (),
    image: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Suggestions:
    """Choose the sections of a run to annotate next, and write their image and labels to correct.

    Chosen are sections on which the network is unsure of the mask, says something else than in the section beside, where
    joins of objects were decided by little, and whose gray values are new to it; spread over the volume, no two of them
    neighbors. Of planes wider than 2048 voxels, windows are chosen. Large volumes are looked at in pieces.

    Parameters
    ----------
    run
        A finished run, or what has its place as ``path``.
    count
        How many.
    out : path, optional
        The folder to make; beside the run if not given. Correct the files in its ``labels``, and give it to
        ``volseg train CONFIG --add``.
    annotated : sequence of int or str
        Sections that were annotated already, as numbers and "start:stop" ranges; those that the model of the run says it has
        learned from are known.
    image : path, optional
        The volume, where the run's own has moved, or the run was made of probabilities.
    overwrite : bool
        Whether to replace a folder of suggestions in which nothing was corrected.

    Returns
    -------
    Suggestions
        With ``folder`` and ``to_frame()``.

    Raises
    ------
    UserError
        There is no finished run or no image, ``out`` exists, or a section is not in the volume.

    Examples
    --------
    >>> suggest("em.volseg.zarr", count=6).to_frame()  # doctest: +SKIP
    """
    stored = open_stored(run)
    source = given_image(stored, image)
    folder = Path(local_path(os.fspath(out))).absolute() if out is not None else Path(default_out(stored.path))
    refuse_existing(folder, overwrite)
    card, notes = _card(stored)
    known = sorted({*parse_sections(annotated, source.shape[0]), *_learned(card, source)})
    if known:
        notes.append(f"{len(known)} sections are annotated already")
    if not stored.objects["id"].size:
        notes.append("the run has no object, so little tells which sections are hard: evenly spaced ones are as good")
    found = candidates(_with_merges(stored), source, known)
    chosen, scores = choose(found, count, known, source.shape)
    if not chosen:
        raise UserError(
            f"{stored.path} has no section left to suggest: all are annotated, beside one that is, of one gray value, or lost"
        )
    if len(chosen) < count:
        notes.append(f"{len(chosen)} sections are all that are neither annotated nor neighbors")
    names = slices.slice_names(source.path) if source.kind == "slices" else ()
    named = [suggested.item_name(one.box, source.shape, names) for one in chosen]
    listed = tuple(map(_suggestion, named, chosen, scores))
    _write(stored, source, folder, listed, card)
    return Suggestions(stored.path, str(folder), listed, tuple(notes))


def default_out(run: str) -> str:
    """The folder beside a run; of one on an object store, in the current folder.

    >>> default_out("/data/em.volseg.zarr"), default_out("/data/run.zarr")
    ('/data/em.suggest', '/data/run.suggest')
    """
    place = os.path.basename(run) if files.is_remote(run) else run
    return f"{place.removesuffix('.zarr').removesuffix('.volseg')}.suggest"


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Nothing is replaced but a folder of suggestions in which nothing was corrected, where ``overwrite`` says so."""
    if not folder.exists():
        return
    if not (folder / suggested.QUEUE).exists():
        raise UserError(f"{folder} exists and holds no suggestions, so it is left alone; give another --out")
    if not overwrite:
        raise UserError(f"{folder} exists; give another --out, or --overwrite to replace it")
    if corrected := suggested.state(folder).corrected:
        raise UserError(
            f"{folder} holds corrected labels ({corrected[0][0].name}), so it is left alone; give another --out, or move them"
        )


# ---------------------------------------------------------------- what is known


def given_image(stored: StoredRun, image: str | os.PathLike | None) -> Volume:
    """The volume that a run was given, or ``image``, which must have its shape; `UserError` where nothing can read it."""
    run = stored.run
    own = run.given or run.source
    if image is not None:
        opened = volume.open(os.fspath(image), voxel_size_nm=own.voxel_size_nm)
        if opened.shape != own.shape:
            raise UserError(
                f"{image} has shape {opened.shape} z y x, the run {own.shape}; give the volume that it was made of"
            )
        return opened
    if run.channels:
        raise UserError(f"{stored.path} was made of probabilities, and does not know their image: give --image VOLUME")
    try:
        own.read(Box((0, 0, 0), (1, 1, 1)))
    except UserError as error:
        raise UserError(f"the volume of {stored.path} cannot be read ({error}): give --image VOLUME") from None
    if not _opens_as_it_is(own):
        raise UserError(
            f"{own.path} is read with input.channel, input.time or input.invert, which volseg train does not do: make a "
            "volume of what is meant with volseg convert, and give it as --image"
        )
    return own


def _opens_as_it_is(source: Volume) -> bool:
    """Whether its path alone names the volume, without settings of ``[input]``: so training opens it."""
    try:
        opened = volume.open(image_path(source), voxel_size_nm=source.voxel_size_nm)
    except UserError:
        return False
    facts = ("shape", "dtype", "dataset", "channel", "time", "inverted")
    return all(getattr(opened, name) == getattr(source, name) for name in facts)


def _card(stored: StoredRun) -> tuple[ModelCard | None, list[str]]:
    """The card of the run's model, and a note where that is not there."""
    if stored.run.channels:
        return None, []
    try:
        return model.load_card(model_file(stored.config.predict)), []
    except UserError:
        path = stored.config.predict.model or str(model.shipped())
        return None, [f"the model {path} is not there: what it learned from is not known"]


def _learned(card: ModelCard | None, source: Volume) -> list[int]:
    """Sections of the volume that a model says it has learned from, or held out."""
    if card is None:
        return []
    depth = source.shape[0]
    own = [one for one in card.training.data if one.name == Path(source.path).name and one.depth == depth]
    return sorted({z for one in own for z in parse_sections((*one.learned, *one.held), depth)})


def _with_merges(stored: StoredRun) -> StoredRun:
    """The run; `UserError` where it lacks the table of merges."""
    try:
        stored.table("merges")
    except DamagedFileError:
        raise UserError(f"{stored.path} has no sound table of merges: volseg segment {stored.path} writes it") from None
    return stored


# ---------------------------------------------------------------- the choice


def choose(
    found: Sequence[Candidate], count: int, annotated: Sequence[int], shape: Triple
) -> tuple[list[Candidate], list[float]]:
    """The candidates that tell most, far from each other and from what is annotated, and their scores.

    A score is the weighted mean of a candidate's ranks. The best one is taken, then the one whose score times its distance to
    those before and to annotated sections is best, where half of an even spacing is as good as more.

    Examples
    --------
    >>> flat = [Candidate(Box((z, 0, 0), (z + 1, 8, 8)), z / 40, 0.0, 0.0, 0.0) for z in range(40)]
    >>> [one.box.start[0] for one in choose(flat, 4, [39], (40, 8, 8))[0]]
    [34, 29, 24, 19]
    """
    if not found:
        return [], []
    score = _scores(found)
    corner = np.array([one.box.start for one in found], float)
    edge = np.array([one.box.shape for one in found], float)
    spacing = max(NEIGHBORS, shape[0] / (2 * count))
    nearness = np.ones(len(found))
    allowed = np.ones(len(found), bool)
    for z in annotated:
        _keep_apart(nearness, allowed, np.abs(corner[:, 0] - z), np.zeros(len(found)), spacing)
    chosen: list[int] = []
    while len(chosen) < count and allowed.any():
        best = int(np.where(allowed, score * nearness, -1).argmax())
        chosen.append(best)
        beside = (np.abs(corner[:, 1:] - corner[best, 1:]) / edge[best, 1:]).max(axis=1)
        _keep_apart(nearness, allowed, np.abs(corner[:, 0] - corner[best, 0]), beside, spacing)
    return [found[i] for i in chosen], [float(score[i]) for i in chosen]


def _keep_apart(
    nearness: np.ndarray, allowed: np.ndarray, sections: np.ndarray, windows_away: np.ndarray, spacing: float
) -> None:
    """Takes down candidates that lie so many sections and windows from one that is annotated, or will be."""
    np.minimum(nearness, np.maximum(sections / spacing, windows_away), out=nearness)
    allowed &= (sections >= NEIGHBORS) | (windows_away >= 0.5)


def _scores(found: Sequence[Candidate]) -> np.ndarray:
    """The weighted mean of each candidate's ranks, 0 to 1; equal values have their mean rank."""
    from scipy.stats import rankdata

    ranks = {name: rankdata([getattr(one, name) for one in found]) / len(found) for name in WEIGHTS}
    return sum(weight * ranks[name] for name, weight in WEIGHTS.items()) / sum(WEIGHTS.values())


def _suggestion(name: str, one: Candidate, score: float) -> Suggestion:
    (z, y0, x0), (_, y1, x1) = one.box.start, one.box.stop
    reasons = (round(value, 6) for value in (score, one.uncertain, one.unlike, one.joins, one.novelty))
    return Suggestion(name, z, y0, y1, x0, x1, *reasons)


# ---------------------------------------------------------------- the folder


def _write(
    stored: StoredRun, source: Volume, folder: Path, listed: tuple[Suggestion, ...], card: ModelCard | None
) -> None:
    """The folder of suggestions is there as a whole."""
    partial = folder.with_name(f"{folder.name}.partial")
    size = source.voxel_size_nm
    try:
        shutil.rmtree(partial, ignore_errors=True)
        for name in (suggested.IMAGES, suggested.LABELS):
            (partial / name).mkdir(parents=True)
        items = tuple(_write_item(stored, source, partial, one) for one in listed)
        model_path = stored.config.predict.model and files.absolute(stored.config.predict.model)
        queue = Queue(image_path(source), source.shape, size, stored.path, model_path, items)
        texts = {
            suggested.README: readme_text(queue, format_suggestions(listed), str(folder)),
            suggested.CHECKED: CHECKED_TEXT,
        }
        if card and not card.graph:
            texts[suggested.CONFIG] = config_text(card, queue, folder.name)
        for name, text in texts.items():
            files.write_atomic(partial / name, text.encode())
        suggested.write_queue(partial, queue)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; give another --out") from None


CHECKED_TEXT = "# Names of sections whose labels are right as they were written, a line each, such as s0012\n"


def _write_item(stored: StoredRun, source: Volume, folder: Path, one: Suggestion) -> Item:
    box = Box((one.z, one.y0, one.x0), (one.z + 1, one.y1, one.x1))
    labels = suggested.fitting_labels(labels_at(stored, box)[0])
    suggested.write_plane(folder / suggested.IMAGES / f"{one.name}.tif", source.read(box)[0], source.voxel_size_nm)
    suggested.write_plane(folder / suggested.LABELS / f"{one.name}.tif", labels, source.voxel_size_nm)
    return Item(one.name, box, suggested.labels_checksum(labels))


def image_path(source: Volume) -> str:
    """The path by which `volume.open` opens it: with the array inside a container."""
    return (
        f"{source.path}{INSIDE}{source.dataset}" if source.dataset and not files.is_remote(source.path) else source.path
    )


def format_suggestions(listed: Sequence[Suggestion]) -> str:
    """A line for each suggestion."""
    columns = ["section", "z", "y", "x", "score", "uncertain [%]", "unlike [%]", "joins", "novelty"]
    rows = [
        [
            one.name, one.z, f"{one.y0}:{one.y1}", f"{one.x0}:{one.x1}", f"{one.score:.2f}", f"{100 * one.uncertain:.2f}",
            f"{100 * one.unlike:.2f}", f"{one.joins:.1f}", f"{one.novelty:.1f}",
        ]
        for one in listed
    ]  # fmt: skip
    return format_table(columns, rows)
