"""Training goes on with corrected sections: the annotation loop's second half; `volseg.training.suggest` is the first.

A config's ``train.out`` is the first model. Each time that sections are added, the next one goes to a folder of its own,
``OUT-2``, ``OUT-3``, and begins with the one before. What was added before stays among what is learned from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from volseg.config import Config, Setting, Train, TrainData, load, local_path, parse_set
from volseg.errors import UserError
from volseg.inference import model
from volseg.io import files, suggested, volume
from volseg.io.annotation import Annotation, open_annotation
from volseg.training.comparison import cross_check, format_scores, held_out_scores
from volseg.training.sources import open_image, open_labels
from volseg.training.steps import Log
from volseg.training.survey import parts, ranges, runs, survey
from volseg.training.targets import parse_sections
from volseg.training.train import MODEL_NAME, train

RECORD = "added.json"  # in a folder of a training with additions: what was added, and what came of it
LENGTH, RATE = 0.25, 0.5  # of a training that goes on: its steps and minutes, and its learning rate, against the first
MIN_SHARE = 0.5  # how often all that is new is drawn, at least, against all that was there before
GAP = 8  # sections between corrected ones, from which on they are read as volumes of their own


@dataclass(frozen=True)
class Addition:
    """Corrected sections of one volume.

    Attributes
    ----------
    path
        Where they are.
    tables
        A ``[[train.data]]`` table for each group of neighbors.
    sections
        Their numbers.
    digest
        Of all their labels.
    notes
        What was decided, and what was left out, a line each.
    """

    path: str
    tables: tuple[TrainData, ...]
    sections: tuple[int, ...]
    digest: str
    notes: tuple[str, ...]


def train_more(
    config: Config,
    folders: Sequence[str | os.PathLike],
    log: Log = print,
    *,
    scribbles: bool | None = None,
    given: Sequence[str] = (),
) -> Path:
    """Train with corrected sections beside those of a config, from the model that was trained last.

    What changed is told at the end, and stored in ``added.json``: scores of the models before and after on sections that the
    config holds out; where it holds out none, of models that learned from one half of what was added on the other half.

    Parameters
    ----------
    config
        That of the model. It may have no ``[[train.data]]`` where ``train.start`` names a model.
    folders
        Folders of `volseg.suggest`, of which the corrected sections count; or labels in any form that training takes, of the
        only image of the config.
    log
        Called with each line of text.
    scribbles
        Whether 0 is what nobody looked at; None where the labels tell.
    given
        Settings of ``[train]`` that are taken as they are; else ``steps`` and ``minutes`` are a quarter of the config's and
        ``lr`` half of it, where there is a model to go on from.

    Returns
    -------
    pathlib.Path
        The model.

    Raises
    ------
    UserError
        Nothing was corrected, the last model has learned from it already, or labels do not fit their image.
    """
    base = config.train
    last, place = _last_and_next(base.out)
    before = read_record(last) if last else {}
    own = [files.absolute(local_path(os.fspath(folder))) for folder in folders]
    known = [folder for folder in before.get("folders", []) if _still_there(folder, own, log)]
    wanted = dict.fromkeys([*known, *own])
    additions = [read_addition(path, base, scribbles) for path in wanted]
    digest = hashlib.sha256("".join(one.digest for one in additions).encode()).hexdigest()
    if last and before.get("digest") == digest:
        raise UserError(
            f"{last / MODEL_NAME} has learned from all of {', '.join(wanted)} already; correct more sections"
        )
    for note in (note for one in additions for note in one.notes):
        log(note)
    config = extended(config, additions, last, place, given)
    record = _begin(place, {"folders": list(wanted), "digest": digest, "start": config.train.start}, log)
    _compare_before(record, config, _new_tables(config, additions, before.get("sections", {})), place, log)
    path = train(config, log)
    _compare_after(record, config, path, log)
    record |= {"model": str(path), "sections": {one.path: parts(one.sections) for one in additions}, "done": True}
    _save(place, record)
    return path


def _still_there(folder: str, given: Sequence[str], log: Log) -> bool:
    """Whether what was added before can be learned from again; tells where not."""
    if os.path.exists(folder) or folder in given:
        return True
    log(f"{folder}, which was added before, is not there any more: it is left out")
    return False


# ---------------------------------------------------------------- what was added


def read_addition(path: str, base: Train, scribbles: bool | None = None) -> Addition:
    """Return the corrected sections at an absolute ``path``, but for those that the config holds out; see `train_more`."""
    try:
        if folder := suggested.folder_of(path):
            return _read_suggested(folder, base, scribbles)
        return _read_labels(path, base, scribbles)
    except UserError as error:
        raise (error if path in str(error) else UserError(f"--add {path}: {error}")) from None


def _read_suggested(folder: str, base: Train, scribbles: bool | None) -> Addition:
    queue, state = suggested.read_queue(folder), suggested.state(folder)
    try:
        image = volume.open(queue.image, voxel_size_nm=queue.voxel_size_nm)
    except UserError as error:
        raise UserError(f"{error}; if it has moved, correct image in {os.path.join(folder, suggested.QUEUE)}") from None
    held_out = _held_out(base, image.path, image.shape[0])
    whole = volume_window(image.shape)
    windows: dict[str, list[int]] = {}
    for item, _ in state.corrected:
        z, window = item.box.start[0], str(item.box).partition(",")[2]
        if z not in held_out:
            windows.setdefault("" if window == whole else window, []).append(z)
    form: dict[str, Any] = {"unlabeled": 0, "background": 1} if scribbles else {"unlabeled": suggested.UNKNOWN}
    common = {"image": queue.image, "label": folder, "voxel_size_nm": queue.voxel_size_nm, **form}
    tables, notes, digests = [], list(state.notes(folder)), []
    for window, sections in windows.items():
        own = TrainData(**common, part=window)
        found = open_annotation(folder, image, part=own.window)
        groups = [sorted(sections)] if scribbles else _groups(sections)
        tables += [own.model_copy(update={"train": tuple(parts(group))}) for group in groups]
        digests.append(_digest(found, sections))
    sections = sorted(z for some in windows.values() for z in some)
    if not sections:
        open_annotation(folder, image)  # which says that nothing was corrected
        raise UserError(f"all that was corrected in {folder} is held out by the config (validate_on)")
    if out := sorted({item.box.start[0] for item, _ in state.corrected} & held_out):
        notes.append(f"{folder}: left out, since the config holds them out: sections {ranges(out)}")
    return _added(folder, tables, sections, digests, notes)


def volume_window(shape: Sequence[int]) -> str:
    """Rows and columns of a whole section, as a box has them.

    >>> volume_window((9, 64, 80))
    '0:64,0:80'
    """
    return ",".join(f"0:{n}" for n in shape[1:])


def _read_labels(path: str, base: Train, scribbles: bool | None) -> Addition:
    """Labels in any other form, of the only image of the config."""
    images = list(dict.fromkeys(table.image for table in base.data if table.image))
    if len(images) != 1:
        raise UserError(
            f"{path} does not say which image it belongs to, and the config has {len(images)}; add a [[train.data]] table "
            "with image and label"
        )
    table = next(table for table in base.data if table.image)
    image = open_image(table)
    try:
        found = open_annotation(path, image)
    except UserError:
        if table.first_number is None:
            raise
        found = open_annotation(path, image, first_number=table.first_number)
    if found.form == "points":
        raise UserError(
            f"{path} holds points, which do not say what sections they annotate: make it the label of a [[train.data]] table "
            "with train, and set train.start to the last model"
        )
    first_number = table.first_number if found.form == "sections" and table.first_number is not None else None
    surveyed = survey(found, scribbles=scribbles)
    held_out = _held_out(base, image.path, image.shape[0])
    sections = [z for z in surveyed.sections if z not in held_out]
    if not sections:
        raise UserError(f"all that is annotated in {path} is held out by the config (validate_on)")
    form = {"unlabeled": surveyed.unlabeled, "background": surveyed.background, "first_number": first_number}
    read = {name: getattr(table, name) for name in ("image", "channel", "time", "invert", "voxel_size_nm")}
    common = {**read, "label": path, **form}
    groups = [sections] if surveyed.kind == "scribbles" else _groups(sections)
    tables = [TrainData(**common, train=tuple(parts(group))) for group in groups]
    notes = [*found.notes, f"{path}: {len(sections)} sections of {surveyed.kind}: {surveyed.reason}", *surveyed.notes]
    return _added(path, tables, sections, [_digest(found, sections)], notes)


def _added(path: str, tables: list, sections: list[int], digests: list[str], notes: list[str]) -> Addition:
    plain = [table.model_dump(mode="json") for table in tables]
    digest = hashlib.sha256(json.dumps([plain, digests]).encode()).hexdigest()
    return Addition(path, tuple(tables), tuple(sections), digest, tuple(notes))


def _held_out(base: Train, image: str, depth: int) -> set[int]:
    """The sections of an image that the config holds out."""
    own = [table for table in base.data if _same_image(table, image)]
    return {z for table in own for z in parse_sections(table.validate_on, depth)}


def _same_image(table: TrainData, image: str) -> bool:
    return bool(table.image) and open_image(table).path == image


def _groups(sections: Sequence[int]) -> list[list[int]]:
    """Sections that lie near each other, together: what lies between is read with them.

    >>> _groups([1, 3, 40])
    [[1, 3], [40]]
    """
    out: list[list[int]] = []
    for run in runs(sorted(sections)):
        if out and run[0] - out[-1][-1] <= GAP:
            out[-1] += run
        else:
            out.append(list(run))
    return out


def _digest(found: Annotation, sections: Sequence[int]) -> str:
    """Of the labels of these sections."""
    return "".join(suggested.labels_checksum(found.read(z, z + 1)[0]) for z in sorted(sections))


# ---------------------------------------------------------------- the config


def extended(
    config: Config, additions: Sequence[Addition], last: Path | None, place: Path, given: Sequence[str]
) -> Config:
    """Return the config of the next training, in ``place``, which goes on from the model in ``last``."""
    base = config.train
    old = [_without_added(table, additions) for table in base.data]
    data = [*old, *_weighted(old, additions)]
    changes: dict[str, Any] = {"data": tuple(data), "out": str(place)}
    if last:
        shorter = {"steps": max(1, round(LENGTH * base.steps)), "minutes": LENGTH * base.minutes, "lr": RATE * base.lr}
        changes |= {name: value for name, value in shorter.items() if name not in given}
        changes["start"] = str(last / MODEL_NAME)
    changes["every"] = min(base.every, changes.get("steps", base.steps))
    settings = base.model_copy(update=changes)
    return _decoding_of_start(config, settings.start).model_copy(update={"train": settings})


def _decoding_of_start(config: Config, start: str) -> Config:
    """The config with the decoding of the model that training goes on from, where it does not say another."""
    if not start:
        return config
    own = config.model_dump(mode="json", include={"fragments", "stitch"}, exclude_defaults=True)
    return load(own, base=dict(model.load_card(model.named(start)).decode)).model_copy(
        update={"predict": config.predict}
    )


def _without_added(table: TrainData, additions: Sequence[Addition]) -> TrainData:
    """A table of the config without the sections that were corrected since."""
    if not table.image:
        return table
    image = open_image(table)
    corrected = {
        z
        for one in additions
        for new in one.tables
        if _same_image(new, image.path) and not new.part
        for z in parse_sections(new.train, image.shape[0])
    }
    if not corrected:
        return table
    found = open_labels(table, image)
    own = parse_sections(table.train, image.shape[0]) or list(found.sections or range(image.shape[0]))
    held_out = set(parse_sections(table.validate_on, image.shape[0]))
    left = [z for z in own if z not in corrected and z not in held_out]
    if not left or len(left) == len(set(own) - held_out):
        return table
    return table.model_copy(update={"train": tuple(parts(left))})


def _weighted(old: Sequence[TrainData], additions: Sequence[Addition]) -> list[TrainData]:
    """The new tables, with a share by their sections: as often drawn as a section of the config, and all of them together at
    least half as often as all that was there before."""
    tables = [table for one in additions for table in one.tables]
    sizes = [_section_count(table) for table in tables]
    own = [table for table in old if table.image]
    before = sum(table.share for table in old) or 1.0
    share = sum(table.share for table in own) or before
    per_section = share / max(1, sum(_section_count(table) for table in own)) if own else 1.0
    per_section = max(per_section, MIN_SHARE * before / sum(sizes))
    return [table.model_copy(update={"share": per_section * n}) for table, n in zip(tables, sizes, strict=True)]


def _section_count(table: TrainData) -> int:
    image = open_image(table)
    if named := parse_sections(table.train, image.shape[0]):
        return len(named)
    found = open_labels(table, image)
    return len(found.sections) if found.sections is not None else image.shape[0]


def given_settings(settings: Sequence[Setting]) -> list[str]:
    """Names of the settings of ``[train]`` among single settings.

    >>> given_settings(["train.steps=600", ("--set", "stitch.seed=0.7")])
    ['steps']
    """
    tables = [parse_set(one if isinstance(one, str) else one[1]) for one in settings]
    return [name for table in tables for name in table.get("train", {})]


# ---------------------------------------------------------------- rounds


def _last_and_next(out: str) -> tuple[Path | None, Path]:
    """The folder of the last finished model, None for none, and that of the next, which may be begun."""
    first = Path(out)
    record = read_record(first)
    if not (first / MODEL_NAME).exists() or (record and not record.get("done")):
        return None, first
    last = first
    for number in count(2):
        place = first.with_name(f"{first.name}-{number}")
        record = read_record(place)
        if record.get("done"):
            last = place
        elif record or not place.exists():
            break
    return last, place


def read_record(folder: Path) -> dict:
    """Return what ``added.json`` in the folder of a training holds; nothing where that is not there."""
    path = folder / RECORD
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged: remove its folder, and train anew") from None


def _save(place: Path, record: dict) -> None:
    files.write_atomic(place / RECORD, json.dumps(record, indent=1).encode())


def _begin(place: Path, record: dict, log: Log) -> dict:
    """The record of the next training; of one that was stopped with the same additions, what it holds already."""
    old = read_record(place)
    if all(old.get(key) == value for key, value in record.items()):
        return old
    if old:
        log(f"{place} was begun with other corrections: beginning anew")
        shutil.rmtree(place)
    place.mkdir(parents=True, exist_ok=True)
    _save(place, record)
    return record


# ---------------------------------------------------------------- what changed


def _new_tables(config: Config, additions: Sequence[Addition], learned: dict[str, list]) -> list[TrainData]:
    """The tables of a config with sections that no model before has learned from; ``learned`` are those of each folder."""
    paths = [one.path for one in additions for _ in one.tables]
    tables = config.train.data[len(config.train.data) - len(paths) :]
    return [table for path, table in zip(paths, tables, strict=True) if not _meet(table.train, learned.get(path, ()))]


def _meet(some: Sequence[str | int], others: Sequence[str | int]) -> bool:
    """Whether numbers and ranges of sections share one."""
    most = 1 << 40  # sections of any volume
    return not set(parse_sections(some, most)).isdisjoint(parse_sections(others, most))


def _compare_before(record: dict, config: Config, new: Sequence[TrainData], place: Path, log: Log) -> None:
    """The record has the scores of the model before, and where nothing is held out, those of a cross-check on what is new."""
    start = config.train.start
    if "before" in record or not start:
        return
    if any(table.validate_on for table in config.train.data):
        record |= {"on": "held-out sections", "before": held_out_scores(model.named(start), config)}
    else:
        before, after = cross_check(model.named(start), config, new, place, log)
        sections = sum(map(_section_count, new))
        record |= {"on": f"{sections} added sections, cross-checked", "before": before, "after": after}
    _save(place, record)


def _compare_after(record: dict, config: Config, path: Path, log: Log) -> None:
    """The record has the scores of the new model, too, and both are told."""
    if "before" not in record:
        log("nothing to compare with: this is the first model")
        return
    if "after" not in record:
        record["after"] = held_out_scores(path, config)
    before, after = record["before"], record["after"]
    log(f"what changed, on {record['on']}: {format_scores(before, after)}")
    if after and after["iou"] < before["iou"] and after.get("pq", 0) <= before.get("pq", 0):
        log(f"the model before was better: {config.train.start}; look at the corrections, or train for longer")
