"""What the headers of a file say of the volume in it, and what all formats share."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, prod

import numpy as np

from volseg.box import Box, Triple
from volseg.errors import UserError, printable
from volseg.io.filling import ADVICE, undecodable
from volseg.io.place import ORIGIN, Place
from volseg.system import free_memory

TripleNm = tuple[float, float, float]

MAX_VOXELS = 1 << 53  # each voxel has an exact number in double precision
CACHE_BYTES = 128 << 20  # decoded TIFF strips and PNG slices kept per file or folder
READS = (
    "volseg reads zarr, OME-Zarr, N5, precomputed, TIFF, HDF5, Imaris, MRC, NIfTI, NRRD, npy, CZI, DM3, DM4, and folders of "
    "TIFF, PNG or JPEG slices"
)


@dataclass(frozen=True)
class Header:
    """A volume as its headers tell it; the fields are those of :class:`volseg.io.volume.Volume`."""

    kind: str
    shape: Triple
    dtype: str
    voxel_size_nm: TripleNm | None
    chunk: Triple
    dataset: str = ""
    channels: int = 1  # how many are stored
    channel_axis: int | None = None
    times: int = 1
    time_axis: int | None = None
    binary: bool = False
    inverted: bool = False  # whether lower stored values mean higher gray values
    place: Place = ORIGIN
    notes: tuple[str, ...] = ()  # what was decided on the way, a line each
    size_notes: tuple[str, ...] = ()  # the same for the voxel size


def voxel_dtype(dtype: np.dtype, where: str) -> str:
    """The name of the type in which voxels are handed out; refuses what is no gray value and no label."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return "uint8"
    if dtype.kind not in "uif":
        raise UserError(f"{where} holds {dtype} voxels; volseg reads bool, integer and float voxels: convert it first")
    return dtype.newbyteorder("=").name


def packing(attributes: Mapping, where: str) -> tuple[bool, tuple[str, ...]]:
    """Whether stored values are to be turned around, and a note, where ``scale_factor`` and ``add_offset`` tell what they mean,
    as netCDF has it. Any other line through them leaves an image as it is.

    >>> packing({"scale_factor": -2.0}, "em.nc")[0], packing({"scale_factor": 0.5}, "em.nc")[0], packing({}, "em.nc")
    (True, False, (False, ()))
    """
    try:
        factor, offset = (float(attributes.get(key, n)) for key, n in (("scale_factor", 1), ("add_offset", 0)))
    except (TypeError, ValueError):
        return False, ()
    if (factor, offset) == (1, 0) or not (isfinite(factor) and isfinite(offset)):
        return False, ()
    read = "they are read turned around, but not scaled" if factor < 0 else "they are read as they are stored"
    return factor < 0, (printable(f"{where} says that its values times {factor:g} plus {offset:g} are meant: {read}"),)


def check_shape(shape: Sequence[int], where: str) -> None:
    """Refuses a shape that no volume has, before anything is made of that size."""
    if prod(shape) > MAX_VOXELS:
        raise UserError(
            f"{where} has shape {shape_text(shape)}, more than {MAX_VOXELS:.0e} voxels: its metadata is damaged"
        )


def shape_text(shape: Sequence[int]) -> str:
    """
    >>> shape_text((5, 40, 33))
    '5 x 40 x 33'
    """
    return " x ".join(str(n) for n in shape)


def reason(error: BaseException) -> str:
    """One line of what went wrong."""
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__


_LARGE = threading.RLock()  # one large piece is decoded at a time


@contextmanager
def decoding_room(nbytes: int, where: str) -> Iterator[None]:
    """Inside, a piece of a file that decodes to so many bytes may be decoded; refuses one that the memory does not hold."""
    if nbytes <= CACHE_BYTES:
        yield
        return
    with _LARGE:
        free = free_memory()
        if nbytes > free:
            raise UserError(
                f"{where} decodes to {nbytes / 1e9:.3g} GB at once, and {free / 1e9:.3g} GB of memory are free; "
                "save the volume in smaller pieces, such as zarr chunks of 128 x 128 x 128 voxels"
            )
        yield


@contextmanager
def decoding(where: str, box: Box | None = None) -> Iterator[None]:
    """Turns whatever a decoder raises into a :class:`UserError` that names the file and the box."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # decoders of damaged files raise anything
        inside = f" in box {box}" if box else ""
        go_on = ADVICE if box and undecodable(error) else ""
        raise UserError(
            f"cannot read {where}{inside}: {reason(error)}; damaged or cut short: copy it again{go_on}"
        ) from error
