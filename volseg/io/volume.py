"""Volumes by their path: a :class:`Volume` reads boxes (z y x) from a zarr array, an OME-Zarr group, a multi-page TIFF or
a folder of slices. Paths are local or fsspec URLs."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from volseg.box import Box, Triple
from volseg.errors import UserError
from volseg.io import files, formats
from volseg.io.header import TripleNm, shape_text

ISOTROPIC = 1.5  # longest edge of a voxel against its shortest, up to which all planes look alike


@dataclass(frozen=True)
class Volume:
    """A z y x array of voxels in a file, folder or store. Holds no handle: pickles small, opens on first read."""

    path: str
    kind: str  # "zarr", "tiff" or "slices"
    shape: Triple
    dtype: str
    voxel_size_nm: TripleNm | None
    chunk: Triple  # what is cheap to read at once
    dataset: str = ""  # where the array stands inside a zarr group
    channel: int = 0  # which one is read, where several are stored
    channel_axis: int | None = None  # the axis of a zarr array that holds them; TIFF files tell it themselves
    binary: bool = False  # stored as bool: voxels are 0 and 1

    def read(self, box: Box) -> np.ndarray:
        """The voxels of ``box``, which must lie inside, as a new array of ``self.dtype`` (bool comes as uint8 0/1).

        Raises :class:`UserError` that names file and box where a chunk or page is damaged, or holds NaN or infinity.
        """
        if box.clip(self.shape) != box or not box.voxels:
            raise UserError(f"box {box} is empty or leaves {self.path}, which is {shape_text(self.shape)} (z y x)")
        out = formats.read(self, box)
        if out.dtype.kind == "f" and not np.isfinite(out).all():
            places = np.argwhere(~np.isfinite(out))
            start, stop = places.min(0) + box.start, places.max(0) + 1 + box.start
            bad = Box(tuple(start.tolist()), tuple(stop.tolist()))
            raise UserError(f"{self.path} holds NaN or infinity in box {bad}; replace these voxels, for instance by 0")
        return out

    def checksum(self) -> str:
        """Fingerprint of the voxels: shape, type and 16 patches spread over the volume, whatever the file format."""
        digest = hashlib.sha256(f"{self.shape} {self.dtype}".encode())
        with ThreadPoolExecutor(4) as pool:
            for patch in pool.map(self.read, patches(self.shape)):
                digest.update(patch.tobytes())
        return digest.hexdigest()


def patches(shape: Triple) -> list[Box]:
    """16 boxes of up to 1 x 128 x 128 voxels, spread over a volume of that shape."""
    size = (1, *(min(128, n) for n in shape[1:]))
    places = [
        tuple(k % 16 * (n - s) // 15 for k, n, s in zip((i, 5 * i, 11 * i), shape, size, strict=True))
        for i in range(16)
    ]
    return [Box(at, tuple(a + s for a, s in zip(at, size, strict=True))) for at in places]


def isotropic(voxel_size_nm: TripleNm) -> bool:
    """Whether voxels are about as long along z as in the plane: the longest edge at most `ISOTROPIC` times the shortest.

    >>> isotropic((5.0, 4.0, 4.0)), isotropic((50.0, 4.6, 4.6))
    (True, False)
    """
    return max(voxel_size_nm) <= ISOTROPIC * min(voxel_size_nm)


def open(path: str | Path, *, dataset: str = "", voxel_size_nm: TripleNm | None = None) -> Volume:
    """The volume at ``path``; reads headers only.

    ``dataset`` names an array (or multiscales group) inside a zarr group; "" takes the OME-Zarr full resolution, or the
    labels of a volseg run. ``voxel_size_nm`` (z y x) overrides what the file says. Raises :class:`UserError` for all
    that is not a volume.
    """
    return _volumes(path, dataset, voxel_size_nm, several=False)[0]


def open_channels(path: str | Path, *, dataset: str = "", voxel_size_nm: TripleNm | None = None) -> tuple[Volume, ...]:
    """One volume for each channel at ``path``, in the order stored; a volume without channels comes alone.

    The channels of a zarr array lie along the axis called c or channel; of four axes without such a name, along
    the first or the last, whichever has at most `MAX_UNNAMED_CHANNELS` entries. In a TIFF file they are its axis C, its
    samples, or the shorter of two unnamed stack axes. The rest is as in :func:`open`.
    """
    return _volumes(path, dataset, voxel_size_nm, several=True)


def _volumes(path: str | Path, dataset: str, voxel_size_nm: TripleNm | None, *, several: bool) -> tuple[Volume, ...]:
    path = files.absolute(path)
    header = formats.header(path, dataset, several=several)
    size = tuple(float(n) for n in voxel_size_nm) if voxel_size_nm else header.voxel_size_nm
    return tuple(
        Volume(
            path=path,
            kind=header.kind,
            shape=header.shape,
            dtype=header.dtype,
            voxel_size_nm=size,
            chunk=header.chunk,
            dataset=header.dataset,
            channel=channel,
            channel_axis=header.channel_axis,
            binary=header.binary,
        )
        for channel in range(header.channels)
    )
