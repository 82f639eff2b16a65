"""Volumes in folders of TIFF, PNG or JPEG slices, one section each."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg.box import Box
from volseg.errors import UserError, printable
from volseg.io import files, tiff
from volseg.io.filling import filling, undecodable
from volseg.io.header import (
    CACHE_BYTES,
    READS,
    Header,
    TripleNm,
    check_shape,
    decoding,
    decoding_room,
    reason,
    shape_text,
)

if TYPE_CHECKING:
    from volseg.io.volume import Volume

JPEG = (".jpg", ".jpeg")
SUFFIXES = (".tif", ".tiff", ".png", *JPEG)
PNG_TYPES = {"1": "uint8", "L": "uint8", "P": "uint8", "I;16": "uint16", "I": "int32"}  # by Pillow's mode
LARGE_BYTES = 1 << 30  # of a decoded slice, above which its file is looked at
MAX_RATIO = 200  # of a decoded slice to its file; images reach 10, blank ones 1000
PNG_SAMPLES = {"LA": 2, "RGB": 3, "RGBA": 4}


def header(path: str, *, several: bool = False, allow_gaps: bool = False) -> Header:
    """What the headers of all slices in the folder at ``path`` say; refuses several channels unless they may be read."""
    names = slice_names(path)
    if not names:
        raise UserError(f"folder {path} is neither a zarr nor holds .tif, .png or .jpg slices; {READS}")
    kinds = sorted({os.path.splitext(name)[1].lower().replace("tiff", "tif").replace("jpeg", "jpg") for name in names})
    if len(kinds) > 1:
        raise UserError(f"folder {path} mixes {' and '.join(kinds)} files; keep the slices of one volume alone")
    gap, uneven = missing(names), ""
    if not gap:
        uneven = unevenly(names)
    if gap and not allow_gaps:
        raise UserError(
            f"folder {path} {gap}: sections would lie beside each other that do not belong together; add what is missing and "
            "move what does not belong there, or read it so with input.allow_gaps=true"
        )
    slices = [_slice(os.path.join(path, name)) for name in names]
    for name, one in zip(names, slices, strict=True):
        if one.kind != slices[0].kind:
            raise UserError(f"slice {os.path.join(path, name)} is {one}, but {names[0]} is {slices[0]}; all slices of a "
                            "folder must agree")  # fmt: skip
    first = slices[0]
    if first.channels > 1 and not several:
        raise UserError(f"slice {os.path.join(path, names[0])} {first.channels_text}")
    shape = (len(names), *first.shape)
    check_shape((*shape, first.channels), path)
    notes = [f"folder {path} {gap or uneven}: its slices are read as neighbors"] if gap or uneven else []
    size, size_notes = _voxel_size_nm(os.path.join(path, names[0]))
    notes += [f"{note} (and so do {n - 1} other slices)" if n > 1 else note for note, n in _notes(slices)]
    return Header(
        "slices",
        shape,
        first.dtype,
        size,
        (1, *first.shape),
        channels=first.channels,
        notes=tuple(printable(note) for note in notes),
        size_notes=size_notes,
    )


def _voxel_size_nm(file: str) -> tuple[TripleNm | None, tuple[str, ...]]:
    """The voxel size that a slice states as one of a stack, as Fiji saves them; and notes on it, or why it is not used."""
    if not _is_tiff(file):
        return None, ()
    stack = tiff.open_stack(file)
    return stack.voxel_size_nm, stack.size_notes


def _notes(slices: Sequence[_Slice]) -> list[tuple[str, int]]:
    """What was decided in any slice, once, and in how many."""
    said = {one.note.partition(" says ")[2]: one.note for one in reversed(slices) if one.note}
    counts = Counter(one.note.partition(" says ")[2] for one in slices if one.note)
    return [(said[text], n) for text, n in counts.items()]


def missing(names: Sequence[str]) -> str:
    """What is wrong with the numbers of slices, in words; "" where they have no gap, or are no count of sections.

    >>> missing(["s001.tif", "s002.tif", "s004.tif", "s005.tif"]), missing(["z000.tif", "z010.tif", "z020.tif"])
    ('has no slice between s002.tif and s004.tif', '')
    >>> missing(["s4.tif", "s5.tif", "s005.tif", "s6.tif"]), missing(["s1.tif", "s2.tif", "s3.tif", "mean.tif"])
    ('has two slices of one number, s5.tif and s005.tif', 'has a slice whose name is not like the others, mean.tif')
    """
    parts = {name: re.split(r"(\d+)", os.path.splitext(name)[0]) for name in names}
    kinds = Counter(tuple(part[::2]) for part in parts.values())
    (usual, count), others = kinds.most_common(1)[0], len(kinds) - 1
    if others and 2 * count > len(names) and len(usual) > 1:
        odd = next(name for name in names if tuple(parts[name][::2]) != usual)
        return f"has a slice whose name is not like the others, {odd}"
    numbers = _numbers(names)
    for i, (first, second) in enumerate(pairwise(numbers)):
        if first == second:
            return f"has two slices of one number, {names[i]} and {names[i + 1]}"
    for steps in _steps(numbers):
        gaps = _gaps(steps)
        if gaps and 2 * len(gaps) < len(steps):
            more = f" and {len(gaps) - 1} more gaps" if len(gaps) > 1 else ""
            return f"has no slice between {names[gaps[0]]} and {names[gaps[0] + 1]}{more}"
    return ""


def unevenly(names: Sequence[str]) -> str:
    """How the numbers of slices that `missing` has nothing to say of are uneven, in words; "" where they are not.

    >>> unevenly(["s1.tif", "s2.tif", "s4.tif"]), unevenly(["s1.tif", "s3.tif", "s5.tif"])
    ('has uneven numbers, such as from s2.tif to s4.tif', '')
    """
    for steps in _steps(_numbers(names)):
        if gaps := _gaps(steps):
            return f"has uneven numbers, such as from {names[gaps[0]]} to {names[gaps[0] + 1]}"
    return ""


def _numbers(names: Sequence[str]) -> list[tuple[int, ...]]:
    """The numbers in names that are else alike; none where they are not alike, have none, or longer ones than a count has."""
    parts = [re.split(r"(\d+)", os.path.splitext(name)[0]) for name in names]
    alike = len({tuple(part[::2]) for part in parts}) == 1
    if not alike or any(len(text) > 19 for part in parts for text in part[1::2]):
        return []
    return [tuple(map(_number, part[1::2])) for part in parts]


def _steps(numbers: list[tuple[int, ...]]) -> list[dict[int, int]]:
    """By how much numbers of names that follow each other differ, of each number that may count the sections, by its place.

    The last one that varies may, and any that differs in all names; where names are alike before it, among these alone. Where
    one of them counts without a gap, none is missing, whatever the others are: times, for instance.
    """
    columns = list(zip(*numbers, strict=True))
    varying = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    found = []
    for i in reversed(varying):
        if i == varying[-1] or len(set(columns[i])) == len(numbers):
            pairs = list(enumerate(pairwise(numbers)))
            alike = [(at, pair) for at, pair in pairs if pair[0][:i] == pair[1][:i]]
            found.append({at: b[i] - a[i] for at, (a, b) in alike or pairs})
    counts = any(len(set(steps.values())) == 1 and min(steps.values()) > 0 for steps in found)
    return [] if counts else found


def _gaps(steps: dict[int, int]) -> list[int]:
    """Where a number that grows from name to name skips some."""
    step = min(steps.values(), default=0)
    return [at for at, n in steps.items() if n != step] if step > 0 else []


# ------------------------------------------------------------------------------------------------------------- slices


@dataclass(frozen=True)
class _Slice:
    """What the header of one slice says."""

    shape: tuple[int, int]
    dtype: str
    channels: int = 1
    channels_text: str = ""  # why a slice of several channels is no section
    note: str = ""

    @property
    def kind(self) -> tuple:
        return self.shape, self.dtype, self.channels

    def __str__(self) -> str:
        return f"{shape_text(self.shape)} {self.dtype}" + f" of {self.channels} channels" * (self.channels > 1)


class _Folder:
    """A folder of slices in natural order; keeps decoded PNG and JPEG slices for boxes that do not span the plane."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.files = slice_names(path)
        self._png = _png
        if self.files and not _is_tiff(self.files[0]):
            with decoding(os.path.join(path, self.files[0])):
                first = _slice(os.path.join(path, self.files[0]))
            self.shape = first.shape
            nbytes = prod(first.shape) * first.channels * np.dtype(first.dtype).itemsize
            self._png = lru_cache(maxsize=max(1, CACHE_BYTES // nbytes))(_png)

    def fill(
        self, plane: np.ndarray, z: int, window: tuple[slice, slice], channel: int, bad: list[Box] | None = None
    ) -> None:
        """``plane`` holds the voxels of slice ``z`` in ``window`` (y x); ``bad`` as in `tiff.Stack.fill`."""
        file = os.path.join(self.path, self.files[z])
        if _is_tiff(file):
            tiff.open_stack(file).fill(plane, 0, window, channel, bad=bad)
            return
        try:
            data = self._png(file, files.stamp(file))[window]
        except Exception as error:  # decoders of damaged files raise anything
            if bad is None or not undecodable(error):
                raise
            plane[...] = 0
            bad.append(Box((0, 0, 0), (1, *self.shape)))
            return
        plane[...] = data[..., channel] if data.ndim == 3 else data


@lru_cache(maxsize=8)
def _folder(path: str, stamp: Any) -> _Folder:
    return _Folder(path)


def _natural(name: str) -> tuple:
    """Sort key by which s2.tif comes before s10.tif."""
    return [_number(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", name)], name


def _number(digits: str) -> int:
    """The number written so; of too many digits for one, those in front count."""
    return int(digits[:4000])


def slice_names(path: str) -> list[str]:
    """Names of the slices in a folder, in natural order; refuses links to nowhere, which are slices that are missing."""
    names = [n for n in os.listdir(path) if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
    for name in sorted(names, key=_natural):
        file = os.path.join(path, name)
        if os.path.islink(file) and not os.path.exists(file):
            raise UserError(f"slice {file} is a link to {os.readlink(file)}, which is not there; {files.FETCH}")
    return sorted((n for n in names if os.path.isfile(os.path.join(path, n))), key=_natural)


def _slice(file: str) -> _Slice:
    """The header of one slice; refuses several pages."""
    if os.path.getsize(file) == 0:
        raise UserError(f"slice {file} is empty (0 bytes); copy it again")
    files.refuse_pointer(file)
    if _is_tiff(file):
        stack = tiff.open_stack(file)
        if stack.shape[0] != 1:
            raise UserError(f"slice {file} holds {stack.shape[0]} pages; a folder's files hold one section each")
        return _Slice(stack.shape[1:], stack.dtype, stack.channels, stack.channels_text(), "".join(stack.notes))
    with decoding(file), files.open_binary(file) as opened:
        image = _image(opened, file)
        channels = PNG_SAMPLES.get(image.mode, 1)
        if channels == 1 and image.mode not in PNG_TYPES:
            raise UserError(f"slice {file} is a color image ({image.mode}); convert it to gray values")
        text = f"is a color image ({image.mode}); {tiff.CONVERT}"
        _, notes = _palette(image, file)
        dtype = PNG_TYPES.get(image.mode, "uint8")
        _refuse_bomb(image.height * image.width * channels * np.dtype(dtype).itemsize, file)
        return _Slice((image.height, image.width), dtype, channels, text, "".join(notes))


def _refuse_bomb(nbytes: int, file: str) -> None:
    """Refuses a large slice that would be far more than its file: no image compresses so, and each would take seconds."""
    size = os.path.getsize(file)
    if nbytes > LARGE_BYTES and nbytes > MAX_RATIO * size:
        raise UserError(
            f"slice {file} of {size} bytes decodes to {nbytes / 1e9:.3g} GB, which no image does: it is damaged, or blank; "
            "convert the slices to zarr, which leaves out what is blank"
        )


def _palette(image: Any, file: str) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The gray values of a PNG's palette, see `tiff.grays_of_colors`."""
    if image.mode != "P" or image.palette is None:
        return None, ()
    colors = np.frombuffer(bytes(image.palette.palette), np.uint8)
    return tiff.grays_of_colors(colors[: len(colors) // 3 * 3].reshape(-1, 3), np.dtype("uint8"), file)


def _is_tiff(name: str) -> bool:
    return name.lower().endswith((".tif", ".tiff"))


def _image(opened: Any, file: str) -> Any:
    """A PNG or JPEG by its own reader: no limit on the number of voxels."""
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile

    try:
        return JpegImageFile(opened) if file.lower().endswith(JPEG) else PngImageFile(opened)
    except SyntaxError as error:
        raise OSError(reason(error)) from None


def _png(file: str, stamp: Any) -> np.ndarray:
    """The voxels of a PNG or JPEG file, y x and samples; ``stamp`` tells a cache of them that the file has changed.

    libpng refuses a file that ends early, of which Pillow gives what there is and zeros. Pillow gives a palette's indices
    and bits as they are, which libpng turns into colors and 255.
    """
    import imagecodecs

    with files.open_binary(file) as opened:
        image = _image(opened, file)
        samples = PNG_SAMPLES.get(image.mode, 1)
        nbytes = image.height * image.width * samples * np.dtype(PNG_TYPES.get(image.mode, "uint8")).itemsize
        with decoding_room(nbytes, file):
            if file.lower().endswith(JPEG):
                return np.asarray(image)
            opened.seek(0)
            decoded = imagecodecs.png_decode(opened.read())
            shape = (image.height, image.width, samples)[: 3 if samples > 1 else 2]
            if image.mode not in ("1", "P") and decoded.shape == shape:
                return decoded
            opened.seek(0)
            stored = np.asarray(_image(opened, file))
            grays, _ = _palette(image, file)
            return stored if grays is None else grays[stored]


def plane(file: str) -> np.ndarray:
    """The voxels of the slice in ``file``, y x; of one with several samples that are all alike, as of gray values saved as RGB,
    one of them. An opaque alpha channel does not count.

    Raises
    ------
    UserError
        It is damaged, holds several pages, or is a color image.
    """
    facts = _slice(file)
    with decoding(f"slice {file}"):
        if _is_tiff(file):
            stack = tiff.open_stack(file)
            out = np.empty((facts.channels, *facts.shape), facts.dtype)
            for channel in range(facts.channels):
                stack.fill(out[channel], 0, (slice(0, facts.shape[0]), slice(0, facts.shape[1])), channel)
        else:
            decoded = _png(file, files.stamp(file))
            out = decoded[None] if decoded.ndim == 2 else np.moveaxis(decoded, -1, 0)
    colors = out[:-1] if len(out) in (2, 4) and (out[-1] == out[-1].flat[0]).all() else out
    if (colors != colors[:1]).any():
        raise UserError(
            f"slice {file} is a color image of {facts.channels} channels, and labels are one number for each voxel; save it "
            "with 8 or 16 bits of gray, an object a value"
        )
    return colors[0]


def label_plane(file: str) -> np.ndarray:
    """The labels in ``file`` as integers, y x; those of unsigned 64 bits become signed where they fit.

    Raises
    ------
    UserError
        What `plane` raises; or they are no whole numbers.
    """
    labels = plane(file)
    if labels.dtype.kind == "f":
        if not np.array_equal(labels, np.round(labels)):
            raise UserError(f"slice {file} holds fractions; give whole numbers: 0 for background, then one per object")
        return labels.astype(np.int64)
    return labels.astype(np.int64) if labels.dtype == np.uint64 and labels.max(initial=0) < 1 << 62 else labels


def plane_shape(file: str) -> tuple[int, int]:
    """The shape y x of the slice in ``file``, from its header."""
    return _slice(file).shape


def read(volume: Volume, box: Box) -> np.ndarray:
    """The voxels of ``box``; refuses a folder that holds another number of slices than it did."""
    out = np.empty(box.shape, volume.dtype)
    folder = _folder(volume.path, files.stamp(volume.path))
    if len(folder.files) != volume.shape[0]:
        raise UserError(f"{volume.path} held {volume.shape[0]} slices and now holds {len(folder.files)}; start again")
    for z, plane in zip(range(box.start[0], box.stop[0]), out, strict=True):
        with decoding(f"slice {os.path.join(volume.path, folder.files[z])}", box), filling(volume, z) as bad:
            folder.fill(plane, z, box.slices[1:], volume.channel, bad)
    return out
