"""Volumes in Gatan's files of DigitalMicrograph (.dm3, .dm4)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg import system
from volseg.box import Box
from volseg.errors import UserError
from volseg.io import files, flat, ome
from volseg.io.header import Header, reason

if TYPE_CHECKING:
    from volseg.io.volume import Volume

SUFFIXES = (".dm3", ".dm4")
MAGICS = (b"\0\0\0\3", b"\0\0\0\4")


def header(path: str, dataset: str = "", *, several: bool = False) -> Header:
    """What the tags of the file at ``path`` say."""
    return flat.header("dm", _layout(path, files.stamp(path)), path, several=several)


def read(volume: Volume, box: Box) -> np.ndarray:
    """The voxels of ``box``."""
    return flat.read(_layout(volume.path, files.stamp(volume.path)), volume, box)


@lru_cache(maxsize=64)
def _layout(path: str, stamp: Any) -> flat.Layout:
    system.require("ncempy", extra="formats")
    from ncempy.io import dm

    try:
        with files.open_binary(path) as opened:
            file = dm.fileDM(opened)  # reads the tags and skips the images
            i = 0 if file.numObjects == 1 else 1  # the first of several is a thumbnail
            shape = [int(sizes[i]) for sizes in (file.zSize2, file.zSize, file.ySize, file.xSize)]
            dtype = np.dtype(file._DM2NPDataType(file.dataType[i])).newbyteorder("<")
            offset, ndim = int(file.dataOffset[i]), int(file.dataShape[i])
            first = sum(int(n) for n in file.dataShape[:i])
            lengths, units = (list(told[first : first + 3]) for told in (file.scale, file.scaleUnit))
    except Exception as error:  # of a damaged file, ncempy raises whatever its tags lead to
        raise UserError(f"{path} cannot be read as a DM3 or DM4 file: {reason(error)}; copy it again") from None
    told = len(lengths) == len(units) == 3 and any(units)
    numbers, names = [float(f"{n:.6g}") for n in lengths[::-1]], [str(unit) for unit in units[::-1]]
    size, notes = ome.voxel_size_nm(numbers, names, path) if told else (None, ())
    shape = shape[-max(3, ndim) :]
    return flat.Layout(
        path, offset, tuple(shape), dtype, names="tzyx"[-len(shape) :], voxel_size_nm=size, size_notes=notes
    )
