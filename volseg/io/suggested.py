"""Folders of sections that wait to be corrected: the image, today's labels, and what says which of them were.

    image/s0012.tif      what to look at
    labels/s0012.tif     what to correct, and to save under its name
    checked.txt          names of sections whose labels are right as they were written
    suggest.json         which sections these are, of which volume, and a checksum of the labels as they were written
    README.txt, train.toml

Labels that nobody changed teach a network what it says already: sections whose labels are what was written count as not
annotated, unless ``checked.txt`` names them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from volseg.box import Box, Triple
from volseg.errors import UserError
from volseg.io import files, slices
from volseg.io.header import TripleNm, shape_text

QUEUE, CHECKED, README, CONFIG = "suggest.json", "checked.txt", "README.txt", "train.toml"
IMAGES, LABELS = "image", "labels"
UNKNOWN = 65535  # label value of voxels that nobody looked at
FORMAT = 1
IMAGEJ_TYPES = ("uint8", "uint16", "float32")


@dataclass(frozen=True)
class Item:
    """A section, or a window of one, that waits to be corrected.

    Attributes
    ----------
    name
        Of its files, without their ending.
    box
        Its voxels in the volume, one section deep.
    checksum
        Of its labels as they were written, see `labels_checksum`.
    """

    name: str
    box: Box
    checksum: str


@dataclass(frozen=True)
class Queue:
    """What ``suggest.json`` says.

    Attributes
    ----------
    image
        Path of the volume, as `volume.open` takes it.
    shape
        Its voxels, z y x.
    voxel_size_nm
        Size of a voxel along z, y, x; None where nobody says.
    run, model
        The run whose labels these are, and the model file that made it; "" for the shipped one.
    items
        What waits, in order.
    """

    image: str
    shape: Triple
    voxel_size_nm: TripleNm | None
    run: str
    model: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class State:
    """What became of the items of a queue.

    Attributes
    ----------
    corrected
        Those to learn from, each with the file of its labels: changed, or named in ``checked.txt``.
    untouched, missing
        Names of those whose labels are as they were written, and of those without a file.
    others
        Names of files of labels that belong to no item.
    """

    corrected: tuple[tuple[Item, str], ...]
    untouched: tuple[str, ...]
    missing: tuple[str, ...]
    others: tuple[str, ...]

    def notes(self, path: str) -> tuple[str, ...]:
        """What is left out, a line each."""
        left_out = {
            "labels as they were written": self.untouched,
            "no file of labels": self.missing,
            "a name that suggest.json lacks": self.others,
        }
        advice = {"labels as they were written": f"; name those in {CHECKED} that are right so"}
        return tuple(
            f"{path}: left out for {why}: {', '.join(names)}{advice.get(why, '')}"
            for why, names in left_out.items()
            if names
        )


# ---------------------------------------------------------------- writing


def item_name(box: Box, shape: Triple, image_names: Sequence[str] = ()) -> str:
    """The name of an item's files: the number of its section or, of a folder of slices, the name of that slice; and where a
    window of it begins.

    >>> item_name(Box((12, 0, 0), (13, 64, 64)), (90, 64, 64)), item_name(Box((12, 0, 64), (13, 64, 128)), (90, 64, 128))
    ('s0012', 's0012_y0_x64')
    >>> item_name(Box((1, 0, 0), (2, 64, 64)), (2, 64, 64), ("em 6.tif", "em 7.tif"))
    'em 7'
    """
    z, y, x = box.start
    name = os.path.splitext(image_names[z])[0] if image_names else f"s{z:0{max(4, len(str(shape[0])))}d}"
    return name if box.shape[1:] == tuple(shape[1:]) else f"{name}_y{y}_x{x}"


def labels_checksum(labels: np.ndarray) -> str:
    """A checksum of labels (y, x) that no change of the file's type or compression alters."""
    digest = hashlib.sha256(json.dumps(labels.shape).encode())
    digest.update(np.ascontiguousarray(labels, "<i8"))
    return digest.hexdigest()


def fitting_labels(labels: np.ndarray) -> np.ndarray:
    """Labels (y, x) as uint16, which every editor reads: as they are or, where they are too high, numbered from 1."""
    if labels.max(initial=0) < UNKNOWN:
        return labels.astype(np.uint16)
    ids, index = np.unique(labels, return_inverse=True)
    if ids.size > UNKNOWN - 1:
        raise UserError(
            f"a section holds {ids.size} objects, more than 16 bits can number; give a smaller --roi to the run"
        )
    return (index.reshape(labels.shape) + (ids[0] != 0)).astype(np.uint16)


def write_plane(path: Path, plane: np.ndarray, voxel_size_nm: TripleNm | None) -> None:
    """A TIFF file of ``plane`` (y, x) with its voxel size, as Fiji writes it; types that Fiji lacks become float32."""
    import tifffile

    if plane.dtype.name not in IMAGEJ_TYPES:
        plane = plane.astype(np.float32)
    size: dict = {}
    if voxel_size_nm:
        z, y, x = (n / 1000 for n in voxel_size_nm)
        size = {"resolution": (1 / x, 1 / y), "metadata": {"axes": "YX", "unit": "um", "spacing": z}}
    tifffile.imwrite(path, plane, imagej=True, photometric="minisblack", **size)


def write_queue(folder: str | Path, queue: Queue) -> None:
    """``suggest.json`` holds the queue: written last, it makes the folder one of suggestions."""
    items = [{"name": item.name, "box": str(item.box), "checksum": item.checksum} for item in queue.items]
    plain = {"format": FORMAT, **asdict(queue), "items": items}
    files.write_atomic(Path(folder) / QUEUE, json.dumps(plain, indent=1).encode())


# ---------------------------------------------------------------- reading


def folder_of(path: str | Path) -> str:
    """The folder of suggestions that ``path`` is, or whose labels it holds; "" for none."""
    place = os.fspath(path).rstrip("/")
    if files.is_remote(place):
        return ""
    above = os.path.dirname(os.path.abspath(place)) if os.path.basename(place) == LABELS else ""
    return next((one for one in (place, above) if one and os.path.isfile(os.path.join(one, QUEUE))), "")


def read_queue(folder: str | Path) -> Queue:
    """What ``suggest.json`` of a folder says.

    Raises
    ------
    UserError
        It is damaged, or another version of volseg wrote it.
    """
    path = os.path.join(folder, QUEUE)
    try:
        plain = json.loads(Path(path).read_bytes())
        written = plain["format"]
        items = tuple(Item(str(one["name"]), Box.parse(one["box"]), str(one["checksum"])) for one in plain["items"])
        z, y, x = map(int, plain["shape"])
        size = plain["voxel_size_nm"] and tuple(map(float, plain["voxel_size_nm"]))
        image, run, model = (str(plain[key]) for key in ("image", "run", "model"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}): make the folder anew with volseg suggest"
        ) from None
    if written != FORMAT:
        raise UserError(f"{path} is of another version of volseg (format {written!r}): make it anew")
    return Queue(image, (z, y, x), size, run, model, items)


def state(folder: str | Path) -> State:
    """What became of the items of the queue in a folder.

    Raises
    ------
    UserError
        A file of labels is damaged, has another size than was written, or there are two for one item; ``checked.txt`` names
        what is no item.
    """
    queue, stored = read_queue(folder), label_files(folder)
    checked = _checked(folder, queue)
    corrected, untouched, missing = [], [], []
    for item in queue.items:
        file = stored.pop(item.name, "")
        if not file:
            missing.append(item.name)
        elif item.name in checked or labels_checksum(read_labels(file, item)) != item.checksum:
            corrected.append((item, file))
        else:
            untouched.append(item.name)
    others = tuple(os.path.basename(file) for file in stored.values())
    return State(tuple(corrected), tuple(untouched), tuple(missing), others)


def label_files(folder: str | Path) -> dict[str, str]:
    """The files of labels in a folder, by the name of their item; refuses two of one."""
    place = os.path.join(folder, LABELS)
    found: dict[str, str] = {}
    for name in slices.slice_names(place) if os.path.isdir(place) else []:
        stem = os.path.splitext(name)[0]
        if stem in found:
            other = os.path.basename(found[stem])
            raise UserError(f"{place} has two files of {stem}, {other} and {name}; keep the one that is corrected")
        found[stem] = os.path.join(place, name)
    return found


def read_labels(file: str, item: Item) -> np.ndarray:
    """The labels (y, x) in the file of an item, as integers; `UserError` where they do not fit it."""
    labels = slices.label_plane(file)
    if labels.shape != item.box.shape[1:]:
        raise UserError(
            f"slice {file} is {shape_text(labels.shape)} y x, but was written as {shape_text(item.box.shape[1:])}; give "
            "labels of that size"
        )
    return labels


def _checked(folder: str | Path, queue: Queue) -> set[str]:
    """The names in ``checked.txt``; none where there is no such file."""
    path = Path(folder) / CHECKED
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError):
        raise UserError(f"cannot read {path}: write names of sections into it as text, a line each") from None
    named = {line.strip() for line in lines if line.strip() and not line.startswith("#")}
    named = {os.path.splitext(name)[0] if name.lower().endswith(slices.SUFFIXES) else name for name in named}
    if unknown := sorted(named - {item.name for item in queue.items}):
        raise UserError(f"{path} names {unknown[0]!r}, which is none of the suggested sections; correct it")
    return named
