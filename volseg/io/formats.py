"""Which module reads the volume at a path: `zarr`, `tiff` or `slices`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from volseg.box import Box
from volseg.errors import UserError
from volseg.io import files, slices, tiff, zarr
from volseg.io.header import READS, Header

if TYPE_CHECKING:
    from volseg.io.volume import Volume

MODULES = {"zarr": zarr, "tiff": tiff, "slices": slices}  # by the kind of a volume


def header(path: str, dataset: str, *, several: bool, allow_gaps: bool = False) -> Header:
    """What the headers at an absolute path or URL say; :class:`UserError` for all that is not a volume."""
    if files.is_remote(path):
        return zarr.header(path, dataset, several=several)
    if not os.path.exists(path):
        raise UserError(f"no such file or folder: {path}{files.suggestions(path)}")
    if os.path.isdir(path):
        if zarr.is_zarr(path):
            return zarr.header(path, dataset, several=several)
        return slices.header(path, several=several, allow_gaps=allow_gaps)
    return _file_header(path, several=several)


def _file_header(path: str, *, several: bool) -> Header:
    suffix = os.path.splitext(path)[1].lower()
    if os.path.getsize(path) == 0:
        raise UserError(f"{path} is empty (0 bytes); copy it again")
    files.refuse_pointer(path)
    if suffix in tiff.SUFFIXES:
        return tiff.header(path, several=several)
    if suffix in slices.SUFFIXES:
        raise UserError(f"{path} is a single 2-D slice; give the folder that holds the slices")
    raise UserError(f"{path} has the unsupported extension {suffix or '(none)'}; {READS}: convert it first")


def read(volume: Volume, box: Box) -> np.ndarray:
    """The voxels of ``box``, which lies inside ``volume``."""
    return MODULES[volume.kind].read(volume, box)
