"""Which module reads the volume at a path: by what lies there, by the first bytes of a file, by its name.

Each module has ``header(path, ...)``, which reads headers alone, and ``read(volume, box)``, which reads no more than the box
needs. What several calls use, open handles and parsed headers, is kept in each process and made anew when a file changes.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from typing import TYPE_CHECKING

import numpy as np

from volseg.box import Box
from volseg.errors import UserError
from volseg.io import czi, dm, files, flat, hdf5, mrc, nifti, npy, nrrd, slices, tensorstore, tiff, zarr
from volseg.io.header import READS, Header, decoding

if TYPE_CHECKING:
    from volseg.io.volume import Volume

MODULES = {
    "zarr": zarr,
    "tiff": tiff,
    "slices": slices,
    "n5": tensorstore,
    "precomputed": tensorstore,
    "hdf5": hdf5,
    "mrc": mrc,
    "nifti": nifti,
    "nrrd": nrrd,
    "npy": npy,
    "czi": czi,
    "dm": dm,
}  # by the kind of a volume
FILES = ("tiff", "hdf5", "mrc", "nifti", "nrrd", "npy", "czi", "dm")  # what one file may be
INSIDE = "::/"  # between a file and what is read inside it
HEAD_BYTES = 1024
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ZIP_MAGICS = (b"PK\3\4", b"PK\5\6")

BIOFORMATS = "bfconvert {name} OUT.ome.tiff (Bio-Formats), or bioformats2raw {name} OUT.zarr"
FIJI = "Fiji: open {name}, then File > Save As > Tiff"
CONVERTERS = {
    **dict.fromkeys(
        (".lif", ".nd2", ".oib", ".oif", ".vsi", ".lsm", ".ims5", ".zvi", ".sld", ".scn", ".svs"), BIOFORMATS
    ),
    **dict.fromkeys((".dcm", ".dicom", ".mnc", ".ser", ".spe", ".img", ".stk"), BIOFORMATS),
    **dict.fromkeys((".am", ".hx", ".mha", ".mhd", ".vtk", ".vti", ".bmp", ".gif", ".raw", ".bin", ".dat"), FIJI),
    ".npz": "python -c \"import numpy as n; n.save('OUT.npy', n.load('{name}')['arr_0'])\"",
    **dict.fromkeys((".avi", ".mp4", ".mov", ".mkv"), "mkdir OUT && ffmpeg -i {name} -pix_fmt gray OUT/%06d.png"),
}


def split(path: str) -> tuple[str, str]:
    """The place of a container, and what of it a path names: ``em.h5::/volumes/raw`` is a dataset in a file.

    >>> split("em.h5::/volumes/raw"), split("em.zarr"), split("precomputed://gs://bucket/em")
    (('em.h5', 'volumes/raw'), ('em.zarr', ''), ('gs://bucket/em', ''))
    """
    for scheme in ("precomputed://", "n5://", "zarr://", "zarr2://", "zarr3://"):
        path = path.removeprefix(scheme)
    if INSIDE not in path or files.is_remote(path) or os.path.exists(path):
        return path, ""
    place, _, inside = path.partition(INSIDE)
    return place, inside.strip("/")


def header(path: str, dataset: str, *, several: bool, allow_gaps: bool = False) -> Header:
    """What the headers at an absolute path or URL say; :class:`UserError` for all that is not a volume."""
    if files.is_remote(path):
        return _remote_header(path, dataset, several=several)
    if not os.path.exists(path):
        if tensorstore.kind(path):  # an array inside a container
            return tensorstore.header(path, dataset, several=several)
        raise UserError(f"no such file or folder: {path}{files.suggestions(path)}")
    if os.path.isdir(path):
        if zarr.is_zarr(path):
            return zarr.header(path, dataset, several=several)
        if tensorstore.kind(path):
            return tensorstore.header(path, dataset, several=several)
        return slices.header(path, several=several, allow_gaps=allow_gaps)
    return _file_header(path, dataset, several=several)


def _remote_header(path: str, dataset: str, *, several: bool) -> Header:
    """The same of a URL: TIFF and N5 by their names, precomputed and N5 by their metadata where no zarr is there."""
    if path.lower().endswith(tiff.SUFFIXES):
        return tiff.header(path, several=several)
    if tensorstore.kind(path):
        return tensorstore.header(path, dataset, several=several)
    if any(path.lower().endswith(suffix) for name in FILES for suffix in MODULES[name].SUFFIXES):
        raise UserError(
            f"{path} is a file of a format that is read from a disk alone; copy it here, or convert it to zarr"
        )
    try:
        return zarr.header(path, dataset, several=several)
    except UserError:
        if not dataset and tensorstore.remote_kind(path):
            return tensorstore.header(path, dataset, several=several)
        raise


def _file_header(path: str, dataset: str, *, several: bool) -> Header:
    if os.path.getsize(path) == 0:
        raise UserError(f"{path} is empty (0 bytes); copy it again")
    files.refuse_pointer(path)
    with decoding(path), files.open_binary(path) as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(ZIP_MAGICS) and _holds_zarr(path):
        return zarr.header(path, dataset, several=several)
    kind = _kind(path, head)
    if kind == "tiff":
        return tiff.header(path, several=several)
    if kind:
        return MODULES[kind].header(path, dataset, several=several)
    raise UserError(_unread(path))


def _kind(path: str, head: bytes) -> str:
    """The kind of a file by its first bytes or, where they do not tell, by its name; "" for one that nothing reads."""
    if head.startswith(flat.GZIP_MAGIC):
        head = _unzipped(head)
    tells = {
        "tiff": head.startswith(TIFF_MAGICS),
        "hdf5": head.startswith(hdf5.MAGIC) or head[512:].startswith(hdf5.MAGIC),
        "npy": head.startswith(npy.MAGIC),
        "nrrd": head.startswith(nrrd.MAGIC),
        "czi": head.startswith(czi.MAGIC),
        "nifti": nifti.is_nifti(head),
        "mrc": head[mrc.MAGIC_AT :].startswith(mrc.MAGIC),
    }
    name = path.lower()
    named = (kind for kind in FILES if name.endswith(MODULES[kind].SUFFIXES))
    return next((kind for kind, told in tells.items() if told), next(named, ""))


def _unzipped(head: bytes) -> bytes:
    """The first bytes of a gzip file, decoded."""
    try:
        return zlib.decompressobj(31).decompress(head, HEAD_BYTES)
    except zlib.error:
        return b""


def _holds_zarr(path: str) -> bool:
    """Whether a zip file is a zarr store."""
    with decoding(path), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.rpartition("/")[2] in zarr.arrays.ZARR_FILES for name in names):
        return True
    if path.lower().endswith((".zarr.zip", ".zip", ".ozx")):
        raise UserError(f"{path} is a zip file without a zarr in it; unpack it and give what it holds")
    return False


def _unread(path: str) -> str:
    """Why a file is not read, and the command that makes one of it that is."""
    name = os.path.basename(path)
    suffix = os.path.splitext(name)[1].lower()
    if suffix in slices.SUFFIXES:
        return f"{path} is a single 2-D slice; give the folder that holds the slices"
    if suffix in CONVERTERS:
        return (
            f"{path} is of a format that volseg does not read; convert it with: {CONVERTERS[suffix].format(name=name)}"
        )
    return (
        f"{path} has the unsupported extension {suffix or '(none)'}; {READS}: convert it first, for instance with "
        + FIJI.format(name=name)
    )


def read(volume: Volume, box: Box) -> np.ndarray:
    """The voxels of ``box``, which lies inside ``volume``."""
    return MODULES[volume.kind].read(volume, box)
