"""TIFF, NRRD and HDF5: one file for the whole volume, made empty and then filled block by block, in any order."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from volseg.box import Box, Triple
from volseg.errors import UserError
from volseg.io.export.frame import Frame

CHUNK = (64, 128, 128)  # of HDF5
IMAGEJ_BYTES = 1 << 32  # that an ImageJ TIFF may have; larger ones are BigTIFF with OME metadata
EXACT_FLOAT32 = 1 << 24  # up to which float32 holds every integer
NRRD_TYPES = {"uint8": "uint8", "uint16": "uint16", "uint32": "uint32", "uint64": "uint64", "float32": "float"}
_HDF5 = threading.Lock()  # h5py lets one thread in at a time anyway, and a file must be closed before it is opened anew


@dataclass(frozen=True)
class Place:
    """Where voxels go in a file: its type there and, where they lie plainly one after another, the first one's offset."""

    path: str
    shape: Triple
    dtype: str
    offset: int | None = None
    name: str = ""  # of the array in an HDF5 file


def fitting(kind: str, dtype: np.dtype, largest: int) -> np.dtype:
    """The type in which a file of that ``kind`` holds integers from 0 to ``largest``, stored as ``dtype``.

    TIFF takes the smallest one that ImageJ opens: it knows no integers above 16 bits, but float32 up to 2**24 is exact.

    >>> [fitting("tiff", np.dtype("uint32"), n).name for n in (9, 70_000, 1 << 25)]
    ['uint16', 'float32', 'uint32']
    """
    if kind != "tiff" or dtype.kind == "f" or dtype.itemsize <= 2:
        return dtype
    if largest <= np.iinfo(np.uint16).max:
        return np.dtype(np.uint16)
    if largest <= EXACT_FLOAT32:
        return np.dtype(np.float32)
    if largest <= np.iinfo(np.uint32).max:
        return np.dtype(np.uint32)
    raise UserError(f"TIFF readers know no integers above 32 bits, and there is a label {largest}; export hdf5 or n5")


def create(kind: str, path: str, frame: Frame, dtype: np.dtype, name: str) -> Place:
    """There is a file at ``path`` that holds zeros; ``name`` says what its voxels are."""
    if kind == "hdf5":
        return _create_hdf5(path, frame, dtype, name)
    return _create_tiff(path, frame, dtype) if kind == "tiff" else _create_nrrd(path, frame, dtype, name)


def write(place: Place, box: Box, data: np.ndarray) -> None:
    """The voxels of ``box`` in the file are ``data``."""
    if place.offset is None:
        import h5py

        with _HDF5, h5py.File(place.path, "r+") as file:
            file[place.name][box.slices] = data
    elif data.any():  # what is never written takes no room on the disk
        mapped = np.memmap(place.path, place.dtype, "r+", place.offset, place.shape)  # mapped anew, so no page is kept
        mapped[box.slices] = data


def _create_tiff(path: str, frame: Frame, dtype: np.dtype) -> Place:
    import tifffile

    shape, (z, y, x) = frame.shape, (n / 1000 for n in frame.voxel_size_nm)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    imagej = nbytes < IMAGEJ_BYTES - (1 << 20) and dtype.name in ("uint8", "uint16", "float32")
    metadata: dict = {"axes": "ZYX", "spacing": z, "unit": "um"}
    if not imagej:
        units = {f"PhysicalSize{axis}Unit": "µm" for axis in "ZYX"}
        metadata = {"axes": "ZYX", "PhysicalSizeZ": z, "PhysicalSizeY": y, "PhysicalSizeX": x, **units}
    if frame.is_moved:
        metadata |= _imagej_place(frame) if imagej else _ome_place(frame)
    stored = dtype.newbyteorder("<")
    offset, _ = tifffile.imwrite(  # type: ignore[misc]  # what it was asked to return
        path, shape=shape, dtype=stored, imagej=imagej, ome=not imagej, bigtiff=not imagej, byteorder="<",
        photometric="minisblack", resolution=(1 / x, 1 / y), metadata=metadata, returnoffset=True,
    )  # fmt: skip
    return Place(path, shape, stored.str, offset)


def _imagej_place(frame: Frame) -> dict:
    """Which pixel of ImageJ's has the coordinates 0."""
    pairs = zip("zyx", frame.center_nm, frame.voxel_size_nm, strict=True)
    return {f"{axis}origin": f"{-begin / size:.9g}" for axis, begin, size in pairs}


def _ome_place(frame: Frame) -> dict:
    """Positions of all sections."""
    (z, y, x), sections = frame.center_nm, range(frame.shape[0])
    places = {
        "X": [x] * len(sections),
        "Y": [y] * len(sections),
        "Z": [z + k * frame.voxel_size_nm[0] for k in sections],
    }
    units = {f"Position{axis}Unit": ["µm"] * len(sections) for axis in places}
    return {"Plane": {**{f"Position{axis}": [n / 1000 for n in told] for axis, told in places.items()}, **units}}


def _create_nrrd(path: str, frame: Frame, dtype: np.dtype, name: str) -> Place:
    """Raw voxels after a header as pynrrd writes it; teem, ITK, 3D Slicer and ImageJ read it."""
    shape, (z, y, x) = frame.shape, (f"{n:.12g}" for n in frame.voxel_size_nm)
    lines = [
        "NRRD0004",
        "# volseg",
        f"type: {NRRD_TYPES[dtype.name]}",
        "dimension: 3",
        "space dimension: 3",
        f"sizes: {' '.join(map(str, shape[::-1]))}",
        f"space directions: ({x},0,0) (0,{y},0) (0,0,{z})",
        "kinds: domain domain domain",
        'labels: "x" "y" "z"',
        f"content: {name}",
        "endian: little",
        "encoding: raw",
        'space units: "nm" "nm" "nm"',
        f"space origin: ({','.join(f'{n:.12g}' for n in frame.center_nm[::-1])})",
    ]
    head = "\n".join(lines).encode() + b"\n\n"
    stored = dtype.newbyteorder("<")
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
    return Place(path, shape, stored.str, len(head))


def _create_hdf5(path: str, frame: Frame, dtype: np.dtype, name: str) -> Place:
    """One dataset, with the voxel size as ilastik and PlantSeg (um) and as CREMI (nm) look for it, and CREMI's offset."""
    import h5py

    shape, size = frame.shape, frame.voxel_size_nm
    with h5py.File(path, "w") as file:
        chunk = tuple(min(c, n) for c, n in zip(CHUNK, shape, strict=True))
        data = file.create_dataset(
            name, shape, dtype, chunks=chunk, compression="gzip", compression_opts=1, shuffle=True
        )
        data.attrs["element_size_um"] = [n / 1000 for n in size]
        data.attrs["resolution"], data.attrs["units"] = list(map(float, size)), ["nm"] * 3
        data.attrs["axes"] = ["z", "y", "x"]
        if frame.is_moved:
            data.attrs["offset"] = list(frame.center_nm)
    return Place(path, shape, dtype.str, name=name)
