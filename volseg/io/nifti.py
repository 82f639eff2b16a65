"""Volumes in NIfTI files (.nii, .nii.gz, and pairs of .hdr and .img)."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg import system
from volseg.box import Box
from volseg.errors import UserError, printable
from volseg.io import files, flat, ome
from volseg.io.header import Header, reason
from volseg.io.place import ORIGIN, Place, from_affine, placed, turned_note

if TYPE_CHECKING:
    from volseg.io.volume import Volume

SUFFIXES = (".nii", ".nii.gz", ".hdr", ".hdr.gz")
HEADER_BYTES = 540  # of NIfTI-2, which is the longer one
MAGICS = {344: (b"n+1\0", b"ni1\0"), 4: (b"n+2\0", b"ni2\0")}  # by their place in NIfTI-1 and NIfTI-2


def is_nifti(head: bytes) -> bool:
    return any(head[at : at + 4] in magics for at, magics in MAGICS.items())


def header(path: str, dataset: str = "", *, several: bool = False) -> Header:
    """What the header of the file at ``path`` says."""
    return flat.header("nifti", _layout(path, files.stamp(path)), path, several=several)


def read(volume: Volume, box: Box) -> np.ndarray:
    """The voxels of ``box``; real values where the header has a slope."""
    return flat.read(_layout(volume.path, files.stamp(volume.path)), volume, box)


@lru_cache(maxsize=64)
def _layout(path: str, stamp: Any) -> flat.Layout:
    system.require("nibabel", extra="formats")
    from nibabel import Nifti1Header, Nifti2Header

    head, gzip_at = flat.head(path, HEADER_BYTES)
    if not is_nifti(head):
        raise UserError(f"{path} is no NIfTI file: its header has no mark of one; copy it again")
    kind, length = (Nifti1Header, 348) if head[344:348] in MAGICS[344] else (Nifti2Header, 540)
    try:
        parsed = kind(head[:length], check=False)
        shape, dtype, offset = parsed.get_data_shape(), parsed.get_data_dtype(), int(parsed.get_data_offset())
        slope, intercept = parsed.get_slope_inter()
    except Exception as error:  # nibabel's own errors of damaged fields, and those of numpy
        raise UserError(f"{path} has a damaged NIfTI header: {reason(error)}; copy it again") from None
    data = path
    if head[344:348] == b"ni1\0" or head[4:8] == b"ni2\0":
        data = _image_file(path)
    scaled = slope is not None and (slope, intercept) not in ((1, 0), (0, 0))
    size, size_notes = _voxel_size_nm(parsed, path)
    place, turned = _place(parsed)
    notes = [f"{path} scales its voxels by {slope:g} and adds {intercept:g}: real values are read"] if scaled else []
    notes += [turned_note(path)] if turned else []
    return flat.Layout(
        data,
        offset,
        tuple(int(n) for n in reversed(shape)),
        dtype,
        names="ctzyx"[5 - len(shape) :],
        scale=(float(slope), float(intercept)) if scaled else None,
        gzip_at=gzip_at,
        voxel_size_nm=size,
        place=place,
        notes=tuple(map(printable, notes)),
        size_notes=size_notes,
    )


def _place(parsed: Any) -> tuple[Place, bool]:
    """Where the first voxel's center lies by the sform or else the qform, if these are set; and whether it is turned."""
    try:
        sform, qform = (parsed.get_sform(coded=True)[0], parsed.get_qform(coded=True)[0])
    except Exception:  # a quaternion that is none
        return ORIGIN, False
    affine = qform if sform is None else sform
    if affine is None:
        return ORIGIN, False
    place, turned = from_affine(affine[:3, :3].T, affine[:3, 3])
    return placed([round(n, 4) for n in place]), turned  # stored in single precision


def _image_file(path: str) -> str:
    """The .img file of a pair."""
    stem, dot, suffix = path.rpartition(".hdr")
    data = f"{stem}.img{suffix}"
    if not dot or not os.path.exists(data):
        raise UserError(f"{path} is the header of a pair, and {data} is not beside it; copy both")
    return data


def _voxel_size_nm(parsed: Any, path: str) -> tuple[Any, tuple[str, ...]]:
    """Voxel size z y x from the grid spacings and their unit."""
    lengths = [float(f"{n:.6g}") for n in reversed(parsed.get_zooms()[:3])]  # stored in single precision
    try:
        unit = parsed.get_xyzt_units()[0]
    except KeyError:
        unit = "unknown"
    if len(lengths) < 3 or not any(lengths):
        return None, ()
    return ome.voxel_size_nm(lengths, ["" if unit == "unknown" else unit] * 3, path)
