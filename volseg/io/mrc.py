"""Volumes in MRC files (.mrc, .rec, .st, .map), as IMOD and other tomography software writes them."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg import system
from volseg.box import Box
from volseg.errors import UserError, printable
from volseg.io import files, flat, ome
from volseg.io.header import Header, reason
from volseg.io.place import ORIGIN, Place, from_lengths, placed

if TYPE_CHECKING:
    from volseg.io.volume import Volume

SUFFIXES = (".mrc", ".rec", ".st", ".map", ".ali", ".preali", ".mrcs", ".mrc.gz", ".rec.gz", ".map.gz")
HEADER_BYTES = 1024
MAGIC, MAGIC_AT = b"MAP ", 208
IMOD_STAMP, IMOD_STAMP_AT = 1146047817, 152  # in the header of files that IMOD wrote; its flags follow
VOLUME_STACKS = range(401, 631)  # space groups of files that hold several volumes, one after the other
SIGNED, INVERTED = 1, 4  # bits of IMOD's flags: bytes are signed, the origin has the sign that MRC gives it


def header(path: str, dataset: str = "", *, several: bool = False) -> Header:
    """What the header of the file at ``path`` says."""
    return flat.header("mrc", _layout(path, files.stamp(path)), path, several=several)


def read(volume: Volume, box: Box) -> np.ndarray:
    """The voxels of ``box``."""
    return flat.read(_layout(volume.path, files.stamp(volume.path)), volume, box)


@lru_cache(maxsize=64)
def _layout(path: str, stamp: Any) -> flat.Layout:
    system.require("mrcfile", extra="formats")
    from mrcfile import dtypes, utils

    head, gzip_at = flat.head(path, HEADER_BYTES)
    if len(head) < HEADER_BYTES:
        raise UserError(f"{path} holds {len(head)} bytes, fewer than the header of an MRC file; copy it again")
    try:
        order = utils.byte_order_from_machine_stamp(head[212:214] + b"\0\0")
    except ValueError:
        order = "<"  # files before MRC2000 have no stamp
    fields = np.frombuffer(head, dtypes.HEADER_DTYPE.newbyteorder(order)).view(np.recarray)[0]
    old = head[MAGIC_AT : MAGIC_AT + 4].rstrip(b"\0 ") != MAGIC.strip()
    if old and (not 0 <= fields["mode"] <= 16 or min(fields["nx"], fields["ny"], fields["nz"]) < 1):
        raise UserError(f"{path} is no MRC file: it has neither its mark MAP nor a header that makes sense")
    try:
        dtype = utils.data_dtype_from_header(fields)
    except ValueError as error:
        raise UserError(
            f"{path} cannot be read: {reason(error)}; convert it to mode 0, 1, 2 or 6 with newstack"
        ) from None
    notes = []
    if old:
        notes.append(f"{path} lacks the mark MAP of MRC files: read as an old one")
    flags = _imod_flags(head, order)
    if dtype.kind == "i" and dtype.itemsize == 1 and flags is not None and not flags & SIGNED:
        dtype = np.dtype(np.uint8)
        notes.append(f"{path} was written by IMOD with unsigned bytes: read so")
    size, size_notes = _voxel_size_nm(fields, path)
    shape, names = [int(fields[name]) for name in ("nz", "ny", "nx")], _axis_names(fields)
    if fields["ispg"] in VOLUME_STACKS and 0 < fields["mz"] < shape[0] and shape[0] % fields["mz"] == 0:
        shape, names = [shape[0] // int(fields["mz"]), int(fields["mz"]), *shape[1:]], ["t", *names]
    return flat.Layout(
        path,
        HEADER_BYTES + max(0, int(fields["nsymbt"])),
        tuple(shape),
        dtype,
        names=names,
        gzip_at=gzip_at,
        voxel_size_nm=size,
        place=ORIGIN if old else _place(fields, flags),
        notes=tuple(map(printable, notes)),
        size_notes=size_notes,
    )


def _imod_flags(head: bytes, order: str) -> int | None:
    """What IMOD says of a file that it wrote; None where another program did."""
    stamp, flags = np.frombuffer(head, f"{order}i4", 2, IMOD_STAMP_AT)
    return int(flags) if stamp == IMOD_STAMP else None


def _place(fields: Any, flags: int | None) -> Place:
    """Where the first voxel lies: the origin in angstroms or, where that is 0, the start in voxels.

    IMOD's own origin is where the world begins, seen from the first voxel, unless the file follows MRC2014 or says so.
    """
    cell, sampling = fields["cella"], [int(fields[name]) for name in ("mz", "my", "mx")]
    steps = [float(cell[a]) / n if n > 0 else 0.0 for a, n in zip("zyx", sampling, strict=True)]
    seen_from_voxel = flags is not None and not flags & INVERTED and int(fields["nversion"]) <= 0
    place = from_lengths([float(fields["origin"][a]) for a in "zyx"], steps)
    if place != ORIGIN:
        return placed([round(-n if seen_from_voxel else n, 3) for n in place])  # stored in single precision
    starts = zip(_axis_names(fields), ("nzstart", "nystart", "nxstart"), strict=True)  # of sections, rows and columns
    along = {axis: int(fields[name]) for axis, name in starts}
    return placed([along[axis] for axis in "zyx"])


def _axis_names(fields: Any) -> list[str]:
    """Names of the stored axes, slowest first; x y z are 1 2 3 in the header, and all 0 in files that do not say."""
    order = [int(fields[name]) for name in ("maps", "mapr", "mapc")]
    if sorted(order) != [1, 2, 3]:
        return ["z", "y", "x"]
    return ["xyz"[i - 1] for i in order]


def _voxel_size_nm(fields: Any, path: str) -> tuple[Any, tuple[str, ...]]:
    """Voxel size z y x from the cell and its sampling, in angstroms."""
    cell, sampling = fields["cella"], [int(fields[name]) for name in ("mz", "my", "mx")]
    lengths = [float(f"{cell[a] / n:.6g}") if n > 0 else 0.0 for a, n in zip("zyx", sampling, strict=True)]
    if not any(lengths):
        return None, ()
    if all(round(length, 6) == 1 for length in lengths):
        note = (
            f"{path} says voxel size 1 angstrom, as programs write that know none: not used; give input.voxel_size_nm"
        )
        return None, (printable(note),)
    return ome.voxel_size_nm(lengths, ["angstrom"] * 3, path)
