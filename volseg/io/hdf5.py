"""Volumes in HDF5 files: any dataset by its path, Imaris files (.ims), and those of BigDataViewer."""

from __future__ import annotations

import contextlib
import json
import os
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from volseg import system
from volseg.box import Box
from volseg.errors import UserError, printable
from volseg.io import axes, files, ome
from volseg.io import place as places
from volseg.io.header import Header, check_shape, decoding, decoding_room, packing, reason, shape_text, voxel_dtype

if TYPE_CHECKING:
    from volseg.io.volume import Volume

SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5", ".ims", ".ilp", ".emd", ".nc", ".nxs", ".mat")
MAGIC = b"\x89HDF\r\n\x1a\n"
IMARIS = "DataSet/ResolutionLevel 0/TimePoint 0"
BDV = "t00000/s00/0/cells"
MAX_LISTED = 8
MAX_VISITED = 10_000
XML_BYTES = 16 << 20


def header(path: str, dataset: str = "", *, several: bool = False) -> Header:
    """What the file at ``path`` says of a dataset; without a name, of its only volume."""
    file = _file(path, files.stamp(path))
    with decoding(path):
        name, channels = _choose(file, path, dataset)
        where = f"{path}::/{name}"
        data = file[f"{name}/Channel 0/Data"] if channels else file[name]
        shape = _imaris_shape(data) if channels else data.shape
        check_shape(shape, where)
        if data.chunks:
            check_shape(data.chunks, f"a chunk of {where}")
        dtype = _dtype(name, data)
        names = axes.axis_names(_axis_names(data), len(shape))
        lead = axes.channel_axis(shape, names, where) if several or "c" in names else None
        time = axes.time_axis(names, lead)
        axes.check(shape, names, lead, where, time)
        space = axes.space(len(shape), lead, time)
        size, size_notes = _voxel_size_nm(file, name, data, space, path)
        turned, packed = packing(data.attrs, where)
        begin = _place(file, name, data, space)
        zyx = tuple(shape[axis] for axis in space)
        chunk = tuple(data.chunks[axis] for axis in space) if data.chunks else (1, *zyx[1:])
    return Header(
        "hdf5",
        zyx,
        voxel_dtype(dtype, where),
        size,
        tuple(min(c, n) for c, n in zip(chunk, zyx, strict=True)),
        dataset=name,
        channels=channels or (1 if lead is None else shape[lead]),
        channel_axis=lead,
        times=1 if time is None else shape[time],
        time_axis=time,
        binary=dtype.kind == "b",
        inverted=turned,
        place=begin,
        notes=(*_notes(where, data), *packed),
        size_notes=size_notes,
    )


def read(volume: Volume, box: Box) -> np.ndarray:
    """The voxels of ``box``; only the chunks that hold them are read."""
    where = f"{volume.path}::/{volume.dataset}"
    with decoding(where, box):
        data = _data(volume.path, volume.dataset, volume.channel, files.stamp(volume.path))
        index = axes.index(data.ndim, box.slices, volume.chosen)
        with decoding_room(prod(data.chunks or (1,)) * data.dtype.itemsize, f"a chunk of {where}"):
            voxels = data[index]
    return np.ascontiguousarray(voxels.view(_dtype(volume.dataset, data)), dtype=volume.dtype)


@lru_cache(maxsize=16)
def _file(path: str, stamp: Any) -> Any:
    """The file, open as long as this process uses it; h5py lets one thread in at a time."""
    system.require("h5py", extra="formats")
    import h5py

    with contextlib.suppress(ImportError):
        import hdf5plugin  # noqa: F401  # codecs such as blosc, zstd and bitshuffle
    try:
        return h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        raise UserError(f"cannot open {path} as HDF5: {reason(error)}; damaged or cut short: copy it again") from None


@lru_cache(maxsize=64)
def _data(path: str, name: str, channel: int, stamp: Any) -> Any:
    """An open dataset, which keeps its last chunks decoded; of an Imaris file, that of a channel."""
    node = _file(path, stamp)[name]
    return node if hasattr(node, "dtype") else node[f"Channel {channel}/Data"]


def _choose(file: Any, path: str, dataset: str) -> tuple[str, int]:
    """Name of the dataset, or of the group of an Imaris file's channels; and how many channels that has, else 0."""
    import h5py

    name = dataset.strip("/")
    if not name and isinstance(file.get(IMARIS), h5py.Group):
        channels = sum(key.startswith("Channel ") for key in file[IMARIS])
        if not channels or not isinstance(file.get(f"{IMARIS}/Channel 0/Data"), h5py.Dataset):
            raise UserError(f"{path} is an Imaris file without a channel; export it anew")
        return IMARIS, channels
    if name and isinstance(file.get(name), h5py.Dataset):
        return name, 0
    if name and file.get(name) is None:
        raise UserError(f"{path} has no dataset {name}{_listed(_volumes(file), path)}")
    found = _volumes(file[name] if name else file)
    if name:
        found = {f"{name}/{key}": shape for key, shape in found.items()}
    if BDV in found and not any(key.endswith("/0/cells") for key in found if key != BDV):
        return BDV, 0  # BigDataViewer, one view: the other datasets are its coarser levels
    if len(found) == 1:
        return next(iter(found)), 0
    if not found:
        raise UserError(f"{path} holds no dataset of three axes; give its path: {path}::/PATH")
    raise UserError(f"{path} holds {len(found)} volumes{_listed(found, path)}")


def _volumes(group: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the datasets with three or more axes."""
    import h5py

    found: dict[str, tuple[int, ...]] = {}
    visited = 0

    def visit(name: str, node: Any) -> bool | None:
        nonlocal visited
        visited += 1
        if isinstance(node, h5py.Dataset) and len(node.shape or ()) >= 3:
            found[name] = node.shape
        return True if visited > MAX_VISITED else None

    group.visititems(visit)
    return found


def _listed(found: dict[str, tuple[int, ...]], path: str) -> str:
    if not found:
        return ""
    named = ", ".join(f"/{name} ({shape_text(shape)})" for name, shape in list(found.items())[:MAX_LISTED])
    more = ", ..." if len(found) > MAX_LISTED else ""
    return f": {named}{more}; pick one by its path, such as {path}::/{next(iter(found))}"


def _dtype(name: str, data: Any) -> np.dtype:
    """The type of the voxels; BigDataViewer keeps unsigned 16-bit integers as signed ones, which Java has."""
    bdv = name.endswith("/cells") and name[:1] == "t" and data.dtype == np.int16
    return np.dtype(data.dtype.str.replace("i", "u")) if bdv else data.dtype


def _imaris_shape(data: Any) -> tuple[int, ...]:
    """The size that an Imaris channel has without the padding of its last chunks."""
    attributes = data.parent.attrs
    told = [_text(attributes.get(f"ImageSize{axis}", "")) for axis in "ZYX"]
    if not all(text.isdecimal() for text in told):
        return data.shape
    return tuple(min(int(text), n) for text, n in zip(told, data.shape, strict=True))


def _text(value: Any) -> str:
    """An attribute as text; Imaris writes arrays of single letters."""
    if isinstance(value, np.ndarray):
        value = b"".join(value.astype("S1").tolist()) if value.dtype.kind == "S" else "".join(map(str, value.tolist()))
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _axis_names(data: Any) -> list[str]:
    """Names of the axes: from ilastik's axistags, from the labels of the file's dimensions; else none."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return [str(axis["key"]) for axis in json.loads(_text(data.attrs["axistags"]))["axes"]]
    labels = [dim.label for dim in data.dims]
    last = data.ndim == 4 and not any(labels) and data.shape[3] == 1
    return ["z", "y", "x", "c"] if last else labels


def _notes(where: str, data: Any) -> tuple[str, ...]:
    if data.id.get_storage_size() == 0 and not data.is_virtual and not data.external:
        return (printable(f"{where} stores no chunk: every voxel is its fill value, {data.fillvalue!s}"),)
    return ()


# ------------------------------------------------------------------------------------------------------------ metadata


def _voxel_size_nm(file: Any, name: str, data: Any, space: list[int], path: str) -> tuple[Any, tuple[str, ...]]:
    """Voxel size z y x: element_size_um (ilastik, PlantSeg), resolution (CREMI), Imaris' extent, BigDataViewer's XML."""
    if name == IMARIS:
        unit, _, edges = _imaris_extent(file)
        return ome.voxel_size_nm(edges, [unit] * 3, path)
    if name.endswith("/cells") and (told := _bdv_size(path, name)):
        return told
    attributes = data.attrs
    for key, unit in (("element_size_um", "um"), ("resolution", "")):
        lengths = np.ravel(attributes.get(key, ()))
        if lengths.size == data.ndim:
            lengths = lengths[space]
        if lengths.size != 3 or lengths.dtype.kind not in "iuf":
            continue
        named = attributes.get("units", attributes.get("unit", unit))
        units = [_text(one) for one in named] if isinstance(named, (list, np.ndarray)) else [_text(named)] * 3
        units = units if len(units) == 3 and key == "resolution" else [unit] * 3
        if key == "resolution" and not any(units):
            size, notes = ome.voxel_size_nm(lengths.tolist(), ["nm"] * 3, path)
            note = f"{path} gives a resolution without a unit: taken as nm, as CREMI has it"
            return size, (*notes, printable(note))
        return ome.voxel_size_nm(lengths.tolist(), units, path)
    return None, ()


def _imaris_extent(file: Any) -> tuple[str, list[float | None], list[float | None]]:
    """Unit, where the volume begins, and how long a voxel is along z, y and x."""
    node = file.get("DataSetInfo/Image")
    attributes = {} if node is None else node.attrs
    starts: list[float | None] = []
    lengths: list[float | None] = []
    for i, n in zip("210", _imaris_shape(file[f"{IMARIS}/Channel 0/Data"]), strict=True):
        low, high = (ome.number(_text(attributes.get(f"Ext{end}{i}", ""))) for end in ("Min", "Max"))
        starts.append(low)
        lengths.append(None if low is None or high is None else (high - low) / n)
    return _text(attributes.get("Unit", "")) or "um", starts, lengths


def _place(file: Any, name: str, data: Any, space: list[int]) -> places.Place:
    """Where the first voxel's center lies: Imaris' extent, an offset beside the resolution, coordinates as netCDF has them."""
    if name == IMARIS:
        _, starts, lengths = _imaris_extent(file)
        ends = zip(starts, lengths, strict=True)
        return places.from_lengths([None if a is None or n is None else a + n / 2 for a, n in ends], lengths)
    if "offset" in data.attrs:
        return places.from_attributes(data.attrs, data.ndim, space)
    scales = [data.dims[axis] for axis in space]
    if not all(len(scale) and scale[0].ndim == 1 for scale in scales):
        return places.ORIGIN
    return places.from_coordinates([scale[0][:] for scale in scales])


def _bdv_size(path: str, name: str) -> tuple[Any, tuple[str, ...]] | None:
    """What the XML file beside a file of BigDataViewer says of the view that ``name`` belongs to."""
    xml = f"{os.path.splitext(path)[0]}.xml"
    if not os.path.isfile(xml) or os.path.getsize(xml) > XML_BYTES:
        return None
    _, setup, level, _ = name.split("/")
    try:
        text = Path(xml).read_bytes()
        if b"<!ENTITY" in text:  # which may stand for any amount of text
            return None
        setups = ElementTree.fromstring(text).iter("ViewSetup")
        found = next(one for one in setups if one.findtext("id", "").strip() == str(int(setup[1:])))
        lengths = [float(n) for n in found.findtext("voxelSize/size", "").split()][::-1]
        unit = found.findtext("voxelSize/unit", "").strip()
    except (ElementTree.ParseError, ValueError, StopIteration):
        return None
    return ome.voxel_size_nm(lengths, [unit] * 3, xml) if len(lengths) == 3 and level == "0" else None
