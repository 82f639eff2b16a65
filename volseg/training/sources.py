"""Annotated volumes in memory: which of their sections teach, which validate, and where patches are drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from volseg.box import Box
from volseg.config import Train, TrainData
from volseg.errors import UserError
from volseg.evaluation.synthetic import VOXEL_SIZE_NM, synth
from volseg.inference.model import load_card, named
from volseg.inference.normalization import GrayLevels, gray_levels
from volseg.inference.padding import lost_voxels, values_of_nothing
from volseg.inference.tiles import MULTIPLE, PLANES
from volseg.inference.voxel_size import matches
from volseg.io import volume
from volseg.io.annotation import Annotation, open_annotation
from volseg.io.filling import MOST_TOLD
from volseg.io.header import TripleNm
from volseg.io.resample import Grid, resample, shape_at
from volseg.training.survey import SAMPLES, refuse_image
from volseg.training.targets import (
    UNLABELED,
    border_distance,
    contact_mask,
    describe_annotation,
    normalize_labels,
    parse_sections,
)

MAX_POSITIONS = 200_000  # positions in objects, and near contacts, that are kept of a volume


@dataclass(frozen=True)
class OwnSections:
    """Sections of a volume as it is stored, by their numbers there, whatever voxels its `Source` has.

    Attributes
    ----------
    train, validation, unlabeled
        As those of `Source`.
    withheld
        Those that were named to learn from, but are held out.
    depth
        How many the whole volume has.
    annotation
        What is annotated on ``train``, see `targets.describe_annotation`.
    """

    train: tuple[int, ...]
    validation: tuple[int, ...]
    unlabeled: tuple[int, ...]
    withheld: tuple[int, ...]
    depth: int
    annotation: dict


@dataclass(frozen=True, eq=False)
class Source:
    """The sections in use of one annotated volume. Numbers of sections are indices into ``image``, but for those in ``own``.

    Attributes
    ----------
    name
        Path of the image, or the seed of a synthetic volume.
    image
        Gray values (z, y, x), of the type in which they are stored.
    labels
        Instance labels uint32 (z, y, x), see `targets.normalize_labels`.
    numbers
        Number in the volume as it is stored of each section of ``image``; one may be there several times, or not at all, where
        the volume was resampled.
    own
        What is annotated, as its user counts.
    train_sections, validation_sections
        Annotated sections to learn from, and those held out.
    unlabeled_sections
        Sections for self-training; their labels, if there are any, were not read.
    object_positions
        (n, 3) voxels z, y, x inside objects on the sections to learn from.
    contacts
        bool (z, y, x): near where two objects touch, see `targets.contact_mask`.
    contact_positions
        (n, 3) voxels of ``contacts`` on the sections to learn from.
    distance
        uint8 (z, y, x), see `targets.border_distance`; None where no head learns it.
    mean, std
        Mean and standard deviation of the volume's gray values.
    padding
        Gray values of what shows nothing, see `inference.padding`.
    share
        How often the volume is drawn, against the others.
    voxel_size_nm
        Size of a voxel along z, y, x; None where nobody says.
    checksum
        SHA-256 of image and labels.
    label_kind
        How the labels were read: "instances", "points", or "mask" and how that was written.
    resliced
        The sections to learn from as volumes whose sections lie along other axes.
    scribbles
        Whether objects are annotated in part, so that their extent is not known.
    background_positions
        (n, 3) annotated voxels outside of objects on the sections to learn from; None but of scribbles.
    notes
        What was decided when the labels were opened, a line each.
    """

    name: str
    image: np.ndarray
    labels: np.ndarray
    numbers: tuple[int, ...]
    own: OwnSections
    train_sections: tuple[int, ...]
    validation_sections: tuple[int, ...]
    unlabeled_sections: tuple[int, ...]
    object_positions: np.ndarray
    contacts: np.ndarray
    contact_positions: np.ndarray
    distance: np.ndarray | None
    mean: float
    std: float
    padding: tuple[float, ...]
    share: float
    voxel_size_nm: tuple[float, float, float] | None
    checksum: str
    label_kind: str
    resliced: tuple[Source, ...] = ()
    scribbles: bool = False
    background_positions: np.ndarray | None = None
    notes: tuple[str, ...] = ()


def load_sources(settings: Train) -> list[Source]:
    """Return every volume of ``settings.data``, in its order.

    Raises
    ------
    UserError
        If there is none, or one cannot be learnt from: nothing is annotated, every section is held out, image and labels
        differ in shape, or self-training has no section. The message names the table of the config.
    """
    if not settings.data:
        raise UserError("train.data is empty: add a [[train.data]] table with image and label")
    size, sources = _model_size(settings), []
    for i, data in enumerate(settings.data):
        sources.append(_load_named(data, settings, f"train.data[{i}]", size))
        size = size or sources[-1].voxel_size_nm
    if settings.self_training:
        _check_self_training(sources, settings)
    return sources


def _model_size(settings: Train) -> TripleNm | None:
    """The voxel size that all volumes get; None where that of the first of them counts."""
    if settings.voxel_size_nm or not settings.start:
        return settings.voxel_size_nm
    return load_card(named(settings.start)).voxel_size_nm


def _load_named(data: TrainData, settings: Train, table: str, size: TripleNm | None) -> Source:
    """`_load`, whose errors all name the table of the config."""
    try:
        return _load(data, settings, table, size)
    except UserError as error:
        raise (error if str(error).startswith(table) else UserError(f"{table}: {error}")) from None


def unlabeled_patches(settings: Train) -> int:
    """Return how many patches of a batch self-training takes from unlabeled sections; at least one is annotated.

    >>> unlabeled_patches(Train(batch=8, self_training=0.5)), unlabeled_patches(Train(batch=2, self_training=0.9))
    (4, 1)
    """
    return min(settings.batch - 1, round(settings.self_training * settings.batch))


def _check_self_training(sources: list[Source], settings: Train) -> None:
    if not unlabeled_patches(settings):
        raise UserError(
            f"train.self_training = {settings.self_training} of train.batch = {settings.batch} leaves no whole patch; "
            "raise one of them, or set train.self_training = 0"
        )
    if not any(source.unlabeled_sections for source in sources):
        raise UserError(
            f"train.self_training = {settings.self_training}, but no section is left without annotation; "
            "name some in train.data.unlabeled_sections, or set train.self_training = 0"
        )


def open_image(data: TrainData) -> volume.Volume:
    """The image of a ``[[train.data]]`` table; reads headers only."""
    return volume.open(
        data.image, voxel_size_nm=data.voxel_size_nm, channel=data.channel, time=data.time, invert=data.invert
    )


def open_labels(data: TrainData, image: volume.Volume) -> Annotation:
    """The labels of a ``[[train.data]]`` table, of the part of the sections that it names; see `open_annotation`."""
    return open_annotation(
        data.label, image, first_number=data.first_number, part=data.window, radius_nm=data.radius_nm
    )


def _load(data: TrainData, settings: Train, table: str, model_nm: TripleNm | None) -> Source:
    """The source that ``data`` describes, in voxels of about the model's size; reads the sections in use and their neighbors
    on both sides."""
    margin = settings.sections // 2
    synthetic = data.synth_seed is not None
    place = f"{table} ({f'synth {data.synth_seed}' if synthetic else data.image})"
    image = None if synthetic else open_image(data)
    depth = image.shape[0] if image else data.synth_shape[0]
    held_out = parse_sections(data.validate_on, depth)
    named = parse_sections(data.train, depth)
    annotation = _annotation(data, image, place) if image else None
    named = _annotated_sections(annotation, named, held_out, depth)
    train = [z for z in named if z not in set(held_out)]
    if not train:
        raise UserError(f"{place}: every section is held out; leave some to learn from")
    unlabeled = _unlabeled_sections(data, train, held_out, margin, depth) if settings.self_training else []
    used = train + held_out + unlabeled
    first, stop = max(0, min(used) - margin), min(depth, max(used) + 1 + margin)
    annotated = np.isin(np.arange(first, stop), train + held_out)
    if image is None or annotation is None:
        fields = _synthesize(data, first, annotated)
    else:
        fields = _read(data, image, annotation, first, annotated)
    lost = fields.pop("lost", ())
    withheld = tuple(sorted(set(named) & set(held_out))) if data.train else ()
    described = describe_annotation(fields["labels"], [z - first for z in train], first, depth)
    own = OwnSections(tuple(train), tuple(held_out), tuple(unlabeled), withheld, depth, described)
    numbers = tuple(range(first, stop))
    lists = (train, held_out, unlabeled, [first + int(z) for z in np.flatnonzero(annotated)])
    uses = [tuple(z - first for z in sections) for sections in lists]
    if model_nm and not matches(fields["voxel_size_nm"], model_nm):
        fields, uses, section = _resample(fields, uses, model_nm)
        numbers = tuple(numbers[z] for z in section)
    train, held_out, unlabeled = uses[:3]  # type: ignore[assignment]
    if not train:
        raise UserError(
            f"{place}: in voxels of the model's size no section to learn from is left; annotate neighbors too"
        )
    annotated = np.isin(np.arange(len(fields["image"])), uses[3])
    positions = _object_positions(fields["labels"], train, place, looked_at=_looked_at(annotation, data))
    size = fields["voxel_size_nm"]  # where nobody says, sections may lie far apart
    contacts = contact_mask(fields["labels"], settings.contour_width, size is not None and volume.isotropic(size))
    source = Source(
        numbers=numbers, own=own, train_sections=train, validation_sections=held_out, unlabeled_sections=unlabeled,
        object_positions=positions, share=data.share, contacts=contacts, scribbles=data.unlabeled == 0,
        notes=(*(annotation.notes if annotation else ()), *lost),
        background_positions=_background_positions(fields["labels"], train) if data.unlabeled == 0 else None,
        contact_positions=_positions(np.flatnonzero(contacts[list(train)]), train, contacts.shape),
        distance=_distance(fields["labels"], annotated, size, settings, place), **fields,
    )  # fmt: skip
    return replace(source, resliced=tuple(_reslice(source, plane, place) for plane in data.planes if plane != "xy"))


def _annotation(data: TrainData, image: volume.Volume, place: str) -> Annotation:
    """The labels of a volume, of the part of its sections that is annotated."""
    window = data.window
    if window and any(span.stop > n for span, n in zip(window, image.shape[1:], strict=True)):
        y, x = image.shape[1:]
        raise UserError(f"{place}: part = {data.part!r} is not in 0:{y},0:{x}, all that a section has; correct it")
    return open_labels(data, image)


def _looked_at(annotation: Annotation | None, data: TrainData) -> bool:
    """Whether sections without any object, or without background, are known to be annotated."""
    return annotation is not None and annotation.form == "suggested" and data.unlabeled != 0


def _annotated_sections(annotation: Annotation | None, named: list[int], held_out: list[int], depth: int) -> list[int]:
    """The sections to learn from: those named, else all that may be annotated; refuses named ones that are not."""
    if annotation is None or annotation.sections is None:
        return named or list(range(depth))
    missing = sorted({*named, *held_out} - set(annotation.sections))
    if missing:
        others = ", ".join(map(str, annotation.sections[:12])) + (", ..." if len(annotation.sections) > 12 else "")
        raise UserError(
            f"section {missing[0]} has no annotation in {annotation.path}, which annotates {others}; correct train and "
            "validate_on"
        )
    return named or list(annotation.sections)


def _resample(
    fields: dict, uses: list[tuple[int, ...]], model_nm: TripleNm
) -> tuple[dict, list[tuple[int, ...]], np.ndarray]:
    """Fields of a `Source` in voxels of about ``model_nm``, lists of sections as their numbers are then, and for each section
    then the one that it was.

    A section has the labels, and the use, of the one in which its middle lies.
    """
    image, size = fields["image"], fields["voxel_size_nm"]
    shape = shape_at(image.shape, size, model_nm)
    made_nm = tuple(n * a / b for n, a, b in zip(size, image.shape, shape, strict=True))
    grid, box, stored = (
        Grid.between(shape, made_nm, image.shape, size),
        Box.from_shape(shape),
        Box.from_shape(image.shape),
    )
    made = resample(lambda part: image[part.slices], image.shape, image.dtype.name, shape, box)
    labels = grid.take(fields["labels"], stored, box)
    section = grid.nearest(0, 0, shape[0])
    moved = [tuple(np.flatnonzero(np.isin(section, numbers)).tolist()) for numbers in uses]
    return {**fields, "image": made, "labels": labels, "voxel_size_nm": made_nm}, moved, section


def _reslice(source: Source, plane: str, place: str) -> Source:
    """The longest run of sections to learn from, as a volume of its own with sections along another axis."""
    size = source.voxel_size_nm
    if size is None or not volume.isotropic(size):
        reason = "nobody says how large a voxel is" if size is None else f"voxels are {size} nm (z y x)"
        raise UserError(f"{place}: planes other than xy need voxels as long as wide, and {reason}; set planes = ['xy']")
    run = max(_runs(np.array(source.train_sections)), key=len)
    if len(run) < MULTIPLE:
        raise UserError(
            f"{place}: planes other than xy need {MULTIPLE} neighboring sections to learn from, and the longest run has "
            f"{len(run)}; annotate more in a row, or set planes = ['xy']"
        )

    def reslice(voxels: np.ndarray | None) -> np.ndarray | None:
        return None if voxels is None else voxels[run[0] : run[-1] + 1].transpose(PLANES[plane])

    image, labels, contacts = reslice(source.image), reslice(source.labels), reslice(source.contacts)
    sections = tuple(range(len(image)))
    return replace(
        source, image=image, labels=labels, contacts=contacts, distance=reslice(source.distance), numbers=sections,
        train_sections=sections, validation_sections=(), unlabeled_sections=(), background_positions=None,
        object_positions=_object_positions(labels, sections, place),
        contact_positions=_positions(np.flatnonzero(contacts), sections, contacts.shape),
    )  # fmt: skip


def _runs(sections: np.ndarray) -> list[np.ndarray]:
    """Ascending numbers, split into runs without gaps."""
    return np.split(sections, np.flatnonzero(np.diff(sections) > 1) + 1)


def _distance(
    labels: np.ndarray, annotated: np.ndarray, size: tuple[float, float, float] | None, settings: Train, place: str
) -> np.ndarray | None:
    """What the distance head is to learn, each run of annotated sections by itself; None where there is no such head."""
    if not settings.distance_nm:
        return None
    if size is None:
        raise UserError(f"{place}: train.distance_nm needs the size of a voxel; give voxel_size_nm in this table")
    out = np.zeros(labels.shape, np.uint8)
    for run in _runs(np.flatnonzero(annotated)):
        out[run] = border_distance(labels[run], size, settings.distance_nm)
    return out


def _unlabeled_sections(data: TrainData, train: list[int], held_out: list[int], margin: int, depth: int) -> list[int]:
    """The sections for self-training: not annotated, and none that would see a held-out one within ``margin``."""
    chosen = data.unlabeled_sections
    allowed = range(min(train), max(train)) if chosen is None else parse_sections(chosen, depth)
    near_held_out = {z + d for z in held_out for d in range(-margin, margin + 1)}
    return [z for z in allowed if z not in near_held_out and z not in set(train)]


def _synthesize(data: TrainData, first: int, annotated: np.ndarray) -> dict:
    """Sections of a synthetic volume from ``first`` on, as fields of `Source`; see `_read`."""
    _, height, width = data.synth_shape
    image, labels = synth(Box((first, 0, 0), (first + len(annotated), height, width)), seed=data.synth_seed)
    labels[~annotated] = 0
    name = f"synth {data.synth_seed}"
    return {
        "name": name, "image": image, "labels": labels, "label_kind": "instances",
        **_gray(gray_levels(image.shape, lambda box: image[box.slices]), image.dtype),
        "voxel_size_nm": data.voxel_size_nm or VOXEL_SIZE_NM, "checksum": _digest(image, labels),
    }  # fmt: skip


def _gray(found: GrayLevels, dtype: np.dtype) -> dict:
    """Gray values of a volume as fields of `Source`."""
    return {"mean": found.mean, "std": found.std, "padding": values_of_nothing(dtype, found.padding)}


def _read(data: TrainData, image: volume.Volume, annotation: Annotation, first: int, annotated: np.ndarray) -> dict:
    """Sections of an annotated volume from ``first`` on, as fields of `Source`.

    ``annotated`` says of each section whether its labels count; the others' are background whatever the file holds.
    """
    rows, columns = data.window or Box.from_shape(image.shape).slices[1:]
    box = Box((first, rows.start, columns.start), (first + len(annotated), rows.stop, columns.stop))
    voxels, stored = image.read(box), annotation.read(first, first + len(annotated))
    marked = np.flatnonzero(annotated)
    refuse_image([stored[z] for z in marked[:: -(-len(marked) // SAMPLES)]], annotation.path)
    background = np.array(data.background).astype(stored.dtype)  # where it does not fit, no voxel has it: told below
    stored[~annotated] = background
    unlabeled = annotation.unlabeled if data.unlabeled is None else data.unlabeled
    of_points = annotation.form == "points"
    gray = _gray(gray_levels(image.shape, image.read), voxels.dtype)
    labels, note = normalize_labels(stored, unlabeled=unlabeled, background=data.background, instances=of_points)
    kind = "scribbles" if data.unlabeled == 0 else "points" if of_points else _format_label_kind(note)
    lost = [first + z for z in _without_lost(voxels, labels, annotated, gray["padding"])]
    more = f" and {len(lost) - MOST_TOLD} more" * (len(lost) > MOST_TOLD)
    which = f"section{'s' * (len(lost) > 1)} {', '.join(map(str, lost[:MOST_TOLD]))}{more}"
    return {
        "name": data.image, "image": voxels, "labels": labels, **gray,
        "lost": (f"{which}: what was lost there counts in no loss and no score",) if lost else (),
        "label_kind": kind, "voxel_size_nm": image.voxel_size_nm, "checksum": _digest(voxels, stored),
    }  # fmt: skip


def _without_lost(
    image: np.ndarray, labels: np.ndarray, annotated: np.ndarray, padding: tuple[float, ...]
) -> list[int]:
    """What of annotated sections shows nothing, but for padding, is unlabeled: nobody can learn it. Gives these sections."""
    lost = lost_voxels(image, padding)
    found = [int(z) for z in np.flatnonzero(annotated) if lost[z] is not None]
    for z in found:
        labels[z][lost[z]] = UNLABELED
    return found


def _digest(*arrays: np.ndarray) -> str:
    """SHA-256 of the arrays' bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _format_label_kind(note: dict) -> str:
    """How labels were read, in words.

    >>> _format_label_kind({"kind": "mask", "values": {1: 3, 255: 17}})
    'mask: 1 in 3 sections, 255 in 17'
    """
    values = list(note.get("values", {}).items())
    if not values:
        return note["kind"]
    (value, count), *more = values
    return ", ".join([f"mask: {value} in {count} sections", *(f"{v} in {n}" for v, n in more)])


def _object_positions(labels: np.ndarray, sections: Sequence[int], place: str, looked_at: bool = False) -> np.ndarray:
    """Up to `MAX_POSITIONS` positions in objects, evenly spread; refuses labels with one class alone, unless somebody is known
    to have ``looked_at`` them."""
    chosen = labels[list(sections)]
    inside = np.flatnonzero((chosen != 0) & (chosen != UNLABELED))
    if looked_at:
        return _positions(inside, sections, labels.shape)
    if not inside.size:
        raise UserError(
            f"{place}: no labeled voxel on the {len(sections)} sections to learn from; check label and train"
        )
    if inside.size == np.count_nonzero(chosen != UNLABELED):
        raise UserError(
            f"{place}: every annotated voxel is in an object; give labels with background 0, or set background to the value "
            "that was drawn outside of objects"
        )
    return _positions(inside, sections, labels.shape)


def _background_positions(labels: np.ndarray, sections: Sequence[int]) -> np.ndarray:
    """Up to `MAX_POSITIONS` annotated positions outside of objects, evenly spread."""
    return _positions(np.flatnonzero(labels[list(sections)] == 0), sections, labels.shape)


def _positions(indices: np.ndarray, sections: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    """Up to `MAX_POSITIONS` (z, y, x) of flat indices into some ``sections`` of a volume, evenly spread; int32."""
    indices = indices[:: max(1, -(-indices.size // MAX_POSITIONS))]
    z, y, x = np.unravel_index(indices, (len(sections), *shape[1:]))
    return np.stack([np.asarray(sections)[z], y, x], axis=1).astype(np.int32)
