"""Volumes in numpy's own files (.npy), in C or Fortran order."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy_format

from volseg.box import Box
from volseg.errors import UserError
from volseg.io import files, flat
from volseg.io.header import Header, reason

if TYPE_CHECKING:
    from volseg.io.volume import Volume

SUFFIXES = (".npy",)
MAGIC = npy_format.MAGIC_PREFIX
HEADER_BYTES = 1 << 16


def header(path: str, dataset: str = "", *, several: bool = False) -> Header:
    """What the header of the file at ``path`` says."""
    return flat.header("npy", _layout(path, files.stamp(path)), path, several=several)


def read(volume: Volume, box: Box) -> np.ndarray:
    """The voxels of ``box``."""
    return flat.read(_layout(volume.path, files.stamp(volume.path)), volume, box)


@lru_cache(maxsize=64)
def _layout(path: str, stamp: Any) -> flat.Layout:
    with files.open_binary(path) as file:
        head = io.BytesIO(file.read(HEADER_BYTES))
    try:
        version = npy_format.read_magic(head)
        parse = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        shape, fortran, dtype = parse(head)
    except Exception as error:  # of a damaged header, numpy and Python's parser raise anything
        raise UserError(f"{path} has a damaged numpy header: {reason(error)}; save it anew with numpy.save") from None
    if dtype.hasobject:
        raise UserError(f"{path} holds Python objects, not voxels; save a numeric array with numpy.save")
    return flat.Layout(
        path,
        head.tell(),
        shape[::-1] if fortran else shape,
        dtype,
        reversed=fortran,
    )
