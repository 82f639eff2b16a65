"""Volumes in NRRD files (.nrrd, and .nhdr with a data file of its own), raw or compressed with gzip."""

from __future__ import annotations

import os
from functools import lru_cache
from math import hypot, prod
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg import system
from volseg.box import Box
from volseg.errors import UserError, printable
from volseg.io import files, flat, ome
from volseg.io.header import Header, reason
from volseg.io.place import from_affine, turned_note

if TYPE_CHECKING:
    from volseg.io.volume import Volume

SUFFIXES = (".nrrd", ".nhdr")
MAGIC = b"NRRD000"
HEADER_BYTES = 1 << 20
ENCODINGS = {"raw": False, "gzip": True, "gz": True}  # whether compressed
SAMPLE_KINDS = (
    "list",
    "vector",
    "rgb-color",
    "rgba-color",
    "covariant-vector",
    "normal",
    "point",
    "2-vector",
    "3-vector",
)
TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
DTYPES = {name: dtype for dtype, names in TYPES.items() for name in names}


def header(path: str, dataset: str = "", *, several: bool = False) -> Header:
    """What the header of the file at ``path`` says."""
    return flat.header("nrrd", _layout(path, files.stamp(path)), path, several=several)


def read(volume: Volume, box: Box) -> np.ndarray:
    """The voxels of ``box``."""
    return flat.read(_layout(volume.path, files.stamp(volume.path)), volume, box)


@lru_cache(maxsize=64)
def _layout(path: str, stamp: Any) -> flat.Layout:
    system.require("nrrd", extra="formats")
    import nrrd

    with files.open_binary(path) as file:
        head = file.read(HEADER_BYTES)
    length = _header_length(head)
    try:
        fields = nrrd.read_header(head[:length].splitlines(keepends=True))
        sizes = [int(n) for n in fields["sizes"]]
        dtype = np.dtype(DTYPES[str(fields["type"]).lower()])
        encoding = str(fields["encoding"]).lower()
        if len(sizes) != int(fields["dimension"]):
            raise ValueError(f"{fields['dimension']} axes, and sizes of {len(sizes)}")
        if dtype.itemsize > 1:
            dtype = dtype.newbyteorder({"little": "<", "big": ">"}[str(fields["endian"]).lower()])
    except Exception as error:  # pynrrd's own errors, and those of fields that are absent or odd
        raise UserError(f"{path} has a damaged NRRD header: {reason(error)}; copy it again") from None
    if encoding not in ENCODINGS:
        raise UserError(
            f"{path} is encoded as {encoding}, which can only be read whole; convert it with: unu save -f nrrd -e raw -i "
            f"{os.path.basename(path)} -o OUT.nrrd"
        )
    data, start = _data(path, fields, length, prod(sizes) * dtype.itemsize)
    zipped = ENCODINGS[encoding]
    size, size_notes = _voxel_size_nm(fields, len(sizes), path)
    place, turned = from_affine([row for row in _directions(fields) if row[0] == row[0]], fields.get("space origin"))
    return flat.Layout(
        data,
        0 if zipped else start,
        tuple(reversed(sizes)),
        dtype,
        names=_axis_names(fields, len(sizes)),
        gzip_at=start if zipped else None,
        voxel_size_nm=size,
        place=place,
        notes=(printable(turned_note(path)),) if turned else (),
        size_notes=size_notes,
    )


def _header_length(head: bytes) -> int:
    """Bytes up to the blank line that ends the header; of a header alone, all."""
    ends = [at + len(mark) for mark in (b"\n\n", b"\n\r\n") if (at := head.find(mark)) >= 0]
    return min(ends, default=len(head))


def _data(path: str, fields: Any, length: int, nbytes: int) -> tuple[str, int]:
    """The file that holds the voxels, and where they begin in it."""
    name = fields.get("data file", fields.get("datafile"))
    lines, skip = (int(fields.get(key, fields.get(key.replace(" ", ""), 0))) for key in ("line skip", "byte skip"))
    if lines or (skip and "gz" in str(fields["encoding"])):
        raise UserError(
            f"{path} skips lines of its data, which volseg does not; convert it with: unu save -f nrrd -e raw"
        )
    if name is None:
        return path, length + skip if skip >= 0 else os.path.getsize(path) - nbytes
    name = str(name)
    if name.lower().startswith("list") or "%" in name:
        raise UserError(f"{path} has its voxels in several files; join them with: unu save -f nrrd -e raw -o OUT.nrrd")
    data = os.path.join(os.path.dirname(path), name)
    if not os.path.isfile(data):
        raise UserError(f"{path} has its voxels in {data}, which is not there; copy both files")
    return data, os.path.getsize(data) - nbytes if skip < 0 else skip


def _axis_names(fields: Any, ndim: int) -> list[str]:
    """Names of the axes, slowest first; one that holds samples is c."""
    kinds = [str(kind).lower() for kind in fields.get("kinds", ())]
    names = ["c" if kind in SAMPLE_KINDS else "" for kind in kinds] if len(kinds) == ndim else [""] * ndim
    if names.count("") != 3:
        return []
    space = iter("xyz")
    return [name or next(space) for name in names][::-1]


def _directions(fields: Any) -> list[list[float]]:
    """Where the axes point, the fastest first, in the space that the file names; those without a direction are left out."""
    return [[float(n) for n in row] for row in fields.get("space directions", ()) if row is not None]


def _voxel_size_nm(fields: Any, ndim: int, path: str) -> tuple[Any, tuple[str, ...]]:
    """Voxel size z y x from space directions or spacings, and their units."""
    units: list[str] = [str(unit) for unit in fields.get("space units", ())]
    if "space directions" in fields:
        lengths = [hypot(*row) for row in _directions(fields)]
    else:
        lengths = [float(n) for n in fields.get("spacings", ())]
        units = [str(unit) for unit in fields.get("units", units)]
    known = [n for n in lengths if n == n]  # an axis of channels has none
    told: list[float | None] = [*known] if ndim > 3 else [n if n == n else None for n in lengths]
    if len(told) != 3:
        return None, ()
    units = units[-3:] if len(units) >= 3 else [""] * 3
    return ome.voxel_size_nm(told[::-1], units[::-1], path)
