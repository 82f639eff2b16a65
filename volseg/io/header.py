"""What the headers of a file say of the volume in it, and what all formats share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import numpy as np

from volseg.box import Box, Triple
from volseg.errors import UserError

TripleNm = tuple[float, float, float]

MAX_VOXELS = 1 << 53  # each voxel has an exact number in double precision
CACHE_BYTES = 128 << 20  # decoded TIFF strips and PNG slices kept per file or folder
READS = "volseg reads zarr and OME-Zarr, multi-page TIFF, and folders of TIFF or PNG slices"


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
    binary: bool = False


def voxel_dtype(dtype: np.dtype, where: str) -> str:
    """The name of the type in which voxels are handed out; refuses what is no gray value and no label."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return "uint8"
    if dtype.kind not in "uif":
        raise UserError(f"{where} holds {dtype} voxels; volseg reads bool, integer and float voxels: convert it first")
    return dtype.newbyteorder("=").name


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


@contextmanager
def decoding(where: str, box: Box | None = None) -> Iterator[None]:
    """Turns whatever a decoder raises into a :class:`UserError` that names the file and the box."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # decoders of damaged files raise anything
        inside = f" in box {box}" if box else ""
        raise UserError(f"cannot read {where}{inside}: {reason(error)}; damaged or cut short: copy it again") from error
