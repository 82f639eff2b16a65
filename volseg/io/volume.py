"""Volumes in, runs out: the only module that knows formats.

A :class:`Volume` reads boxes (z y x) from a zarr array, an OME-Zarr group, a multi-page TIFF or a folder of slices. The
functions below it make the zarr v3 arrays of a run, and keep plain objects beside them. Paths are local or fsspec URLs.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import re
import shutil
import threading
import uuid
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from math import log as ln
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, ZstdCodec
from zarr.storage import FsspecStore, LocalStore, WrapperStore

from volseg.box import Blocks, Box, Triple
from volseg.errors import UserError

TripleNm = tuple[float, float, float]

NM = {
    "angstrom": 0.1,
    "nanometer": 1.0,
    "nanometre": 1.0,
    "nm": 1.0,
    "micrometer": 1e3,
    "micrometre": 1e3,
    "micron": 1e3,
    "microns": 1e3,
    "um": 1e3,
    "µm": 1e3,
    "μm": 1e3,
    "\\u00b5m": 1e3,
    "millimeter": 1e6,
    "millimetre": 1e6,
    "mm": 1e6,
    "meter": 1e9,
    "metre": 1e9,
    "å": 0.1,
}  # how many nanometers one unit is
TIFF = (".tif", ".tiff", ".btf", ".tf8")
SLICES = (".tif", ".tiff", ".png")
ZARR_FILES = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
ISOTROPIC = 1.5  # longest edge of a voxel against its shortest, up to which all planes look alike
CHANNEL = ("c", "ch", "channel", "channels")  # what a channel axis is called
FEW = 4  # entries of an axis without a name that is taken for channels
CACHE_BYTES = 128 << 20  # decoded TIFF strips and PNG slices kept per file or folder
READS = "volseg reads zarr and OME-Zarr, multi-page TIFF, and folders of TIFF or PNG slices"

_opening = threading.Lock()  # zarr's configuration, warning filters and tifffile's log belong to the whole process


# ---------------------------------------------------------------------------------------------------------- volumes


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
            raise UserError(f"box {box} is empty or leaves {self.path}, which is {_by(self.shape)} (z y x)")
        readers = {"zarr": self._read_zarr, "tiff": self._read_tiff, "slices": self._read_slices}
        out = readers[self.kind](box)
        if out.dtype.kind == "f" and not np.isfinite(out).all():
            bad = np.argwhere(~np.isfinite(out))
            at = Box(tuple((bad.min(0) + box.start).tolist()), tuple((bad.max(0) + 1 + box.start).tolist()))
            raise UserError(f"{self.path} holds NaN or infinity in box {at}; replace these voxels, for instance by 0")
        return out

    def checksum(self) -> str:
        """Fingerprint of the voxels: shape, type and 16 patches spread over the volume, whatever the file format."""
        digest = hashlib.sha256(f"{self.shape} {self.dtype}".encode())
        with ThreadPoolExecutor(4) as pool:
            for patch in pool.map(self.read, patches(self.shape)):
                digest.update(patch.tobytes())
        return digest.hexdigest()

    def _read_zarr(self, box: Box) -> np.ndarray:
        array = _array(self.path, self.dataset)
        try:
            data = np.asarray(array[self._index(array.ndim, box.slices)])
        except Exception as error:  # a damaged chunk raises whatever its codec raises
            where = self._damaged(array, box) or f"box {box}"
            raise UserError(
                f"cannot read {_join(self.path, self.dataset)} in box {box}: {where}: {_cause(error)}; "
                "the data is damaged or unreachable: copy it again or make it anew"
            ) from error
        return np.ascontiguousarray(data, dtype=self.dtype)

    def _index(self, ndim: int, zyx: tuple, channel: int | None = None) -> tuple:
        """Where ``zyx`` of this channel stands in an array of so many axes; all others have one entry."""
        index = [0] * ndim
        if self.channel_axis is not None:
            index[self.channel_axis] = self.channel if channel is None else channel
        for axis, place in zip(_space(ndim, self.channel_axis), zyx, strict=True):
            index[axis] = place
        return tuple(index)

    def _damaged(self, array: zarr.Array, box: Box) -> str:
        """The key of the first stored object under ``box`` that cannot be read; "" when each can, on its own."""
        space, stored = _space(array.ndim, self.channel_axis), array.shards or array.chunks
        grid = Blocks(self.shape, tuple(stored[axis] for axis in space))
        row = 0 if self.channel_axis is None else self.channel // stored[self.channel_axis]
        for i in grid.meeting(box):
            try:
                array[self._index(array.ndim, grid[i].intersect(box).slices)]
            except Exception:  # the caller tells the cause
                return array.metadata.encode_chunk_key(self._index(array.ndim, grid.coords(i), row))
        return ""

    def _read_tiff(self, box: Box) -> np.ndarray:
        out = np.empty(box.shape, self.dtype)
        pages = _tiff(self.path, _stamp(self.path))
        for z, plane in zip(range(box.start[0], box.stop[0]), out, strict=True):
            with _naming(f"page {z} of {self.path}", box):
                pages.fill(plane, z, box.slices[1:], self.channel)
        return out

    def _read_slices(self, box: Box) -> np.ndarray:
        out = np.empty(box.shape, self.dtype)
        folder = _folder(self.path, _stamp(self.path))
        if len(folder.files) != self.shape[0]:
            raise UserError(f"{self.path} held {self.shape[0]} slices and now holds {len(folder.files)}; start again")
        for z, plane in zip(range(box.start[0], box.stop[0]), out, strict=True):
            with _naming(f"slice {os.path.join(self.path, folder.files[z])}", box):
                folder.fill(plane, z, box.slices[1:])
        return out


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
    return _open(path, dataset, voxel_size_nm, several=False)[0]


def open_channels(path: str | Path, *, dataset: str = "", voxel_size_nm: TripleNm | None = None) -> tuple[Volume, ...]:
    """One volume for each channel at ``path``, in the order stored; a volume without channels comes alone.

    The channels of a zarr array lie along the axis called c or channel; of four axes without such a name, along the
    first or the last, whichever has at most `FEW` entries. In a TIFF file they are its axis C, its samples, or the shorter
    of two unnamed stack axes. The rest is as in :func:`open`.
    """
    return _open(path, dataset, voxel_size_nm, several=True)


def _open(path: str | Path, dataset: str, voxel_size_nm: TripleNm | None, *, several: bool) -> tuple[Volume, ...]:
    path = _absolute(path)
    if is_remote(path):
        found = _open_zarr(path, dataset, several=several)
    elif not os.path.exists(path):
        raise UserError(f"no such file or folder: {path}{_near(path)}")
    elif os.path.isdir(path):
        found = _open_zarr(path, dataset, several=several) if _looks_zarr(path) else (_open_folder(path),)
    else:
        found = _open_file(path, several=several)
    size = tuple(float(n) for n in voxel_size_nm) if voxel_size_nm else None
    return tuple(replace(one, voxel_size_nm=size) for one in found) if size else found


def _open_file(path: str, *, several: bool) -> tuple[Volume, ...]:
    suffix = os.path.splitext(path)[1].lower()
    if os.path.getsize(path) == 0:
        raise UserError(f"{path} is empty (0 bytes); copy it again")
    if suffix in TIFF:
        pages = _tiff(path, _stamp(path))
        if pages.channels > 1 and not several:
            raise UserError(f"{path} {pages.what_channels()}")
        if pages.shape[0] == 1:
            raise UserError(f"{path} is 2-D ({_by(pages.shape[1:])}); give a multi-page TIFF or a folder of slices")
        one = Volume(path, "tiff", pages.shape, pages.dtype, pages.voxel_size_nm, pages.chunk, binary=pages.binary)
        return tuple(replace(one, channel=i) for i in range(pages.channels))
    if suffix in SLICES:
        raise UserError(f"{path} is a single 2-D slice; give the folder that holds the slices")
    raise UserError(f"{path} has the unsupported extension {suffix or '(none)'}; {READS}: convert it first")


def _dtype(dtype: np.dtype, where: str) -> str:
    """The name of the type in which voxels are handed out; refuses what is no gray value and no label."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return "uint8"
    if dtype.kind not in "uif":
        raise UserError(f"{where} holds {dtype} voxels; volseg reads bool, integer and float voxels: convert it first")
    return dtype.newbyteorder("=").name


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape)


def _cause(error: BaseException) -> str:
    """One line of what went wrong."""
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__


@contextmanager
def _naming(where: str, box: Box | None = None) -> Iterator[None]:
    """Turns whatever a decoder raises into a :class:`UserError` that names the file and the box."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # decoders of damaged files raise anything
        inside = f" in box {box}" if box else ""
        raise UserError(f"cannot read {where}{inside}: {_cause(error)}; damaged or cut short: copy it again") from error


# ------------------------------------------------------------------------------------------------------------- paths


def is_remote(path: str | Path) -> bool:
    """Whether ``path`` is an fsspec URL such as ``s3://bucket/key`` and not a local path."""
    return "://" in str(path) and not str(path).startswith("file://")


def _absolute(path: str | Path) -> str:
    path = str(path)
    return path.rstrip("/") if is_remote(path) else os.path.abspath(os.path.expanduser(path.removeprefix("file://")))


def _join(path: str | Path, *keys: str) -> str:
    return "/".join([_absolute(path), *(key.strip("/") for key in keys if key)])


def _near(path: str) -> str:
    """`` (did you mean ...?)`` from the names beside a path that does not exist."""
    folder, name = os.path.split(path)
    if not os.path.isdir(folder):
        return f"; there is no folder {folder}"
    near = difflib.get_close_matches(name, os.listdir(folder), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else f"; {folder} holds nothing of that name"


def _stamp(path: str) -> tuple[int, int, int]:
    """Changes when the file at ``path`` does, so that a cached handle is not used for another file."""
    with _naming(path):
        status = os.stat(path)
    return status.st_mtime_ns, status.st_size, status.st_ino


# -------------------------------------------------------------------------------------------------------------- zarr


class _Whole(WrapperStore):
    """A store that refuses chunks cut short, which zarr's own codecs read as fill value or as garbage."""

    def __init__(self, store: Store, blosc: bool) -> None:
        super().__init__(store)
        self.blosc = blosc  # whether each whole object is one blosc frame, which states its own length

    def _with_store(self, store: Store) -> _Whole:
        return _Whole(store, self.blosc)

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        value = await self._store.get(key, prototype, byte_range)
        if value is None or byte_range is not None or os.path.basename(key) in ZARR_FILES:
            return value
        stated = int.from_bytes(value[12:16].to_bytes(), "little") if self.blosc else len(value)
        if len(value) == 0 or stated != len(value):
            raise OSError(f"{key} is cut short: it holds {len(value)} bytes")
        return value


def _looks_zarr(path: str) -> bool:
    return path.endswith(".zarr") or any(os.path.exists(os.path.join(path, name)) for name in ZARR_FILES)


def _store(path: str) -> Store:
    if not is_remote(path):
        return LocalStore(path)
    try:
        return FsspecStore.from_url(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot reach {path}: {_cause(error)}; pip install 'volseg[s3]' for s3:// URLs") from None


@contextmanager
def _pipeline(name: str) -> Iterator[None]:
    """Inside, arrays open with that codec pipeline and without warnings; one thread at a time."""
    with _opening, warnings.catch_warnings(), zarr.config.set({"codec_pipeline.path": name}):
        warnings.simplefilter("ignore", UserWarning)
        yield


_PYTHON = "zarr.core.codec_pipeline.BatchedCodecPipeline"
_RUST = "zarrs.ZarrsCodecPipeline"  # twice as fast; local stores, native byte order and C order only


def _node(path: str, name: str = "") -> zarr.Array | zarr.Group:
    """The array or group ``name`` at ``path``; :class:`UserError` where there is none."""
    try:
        with _pipeline(_PYTHON):
            return zarr.open(_store(path), path=name, mode="r")
    except (FileNotFoundError, KeyError, zarr.errors.NodeNotFoundError):
        raise UserError(f"no zarr array or group at {_join(path, name)}{_inside(path) if name else ''}") from None
    except UserError:
        raise
    except Exception as error:  # damaged metadata, no permission, no network: whatever the store raises
        raise UserError(f"cannot open zarr {_join(path, name)}: {_cause(error)}") from error


def _inside(path: str) -> str:
    """Advice that lists the arrays of a zarr group."""
    try:
        group = _node(path)
    except UserError:
        return ""
    if isinstance(group, zarr.Array):
        return f"; {path} is itself an array: leave input.dataset empty"
    with _pipeline(_PYTHON):
        names = sorted(name for name, node in group.members(max_depth=4) if isinstance(node, zarr.Array))
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"; arrays inside: {listed}: pick one with --set input.dataset={names[0]}" if names else "; it has no arrays"


def _blosc(array: zarr.Array) -> bool:
    """Whether each stored object of ``array`` is one blosc frame."""
    if array.metadata.zarr_format == 2:
        return getattr(array.metadata.compressor, "codec_id", "") == "blosc"
    return isinstance(array.metadata.codecs[-1], BloscCodec)


def _document(path: str, name: str) -> tuple[int, int, int] | None:
    """Stamp of a local array's metadata; None for a remote one."""
    if is_remote(path):
        return None
    found = (os.path.join(path, name, file) for file in ("zarr.json", ".zarray"))
    return next((_stamp(file) for file in found if os.path.exists(file)), None)


def _array(path: str, name: str, mode: str = "r") -> zarr.Array:
    return _cached_array(path, name, mode, _document(path, name))


@lru_cache(maxsize=64)
def _cached_array(path: str, name: str, mode: str, stamp: Any) -> zarr.Array:
    array = _node(path, name)
    if isinstance(array, zarr.Group):
        raise UserError(f"{_join(path, name)} is a zarr group, not an array{_inside(_join(path, name))}")
    if not is_remote(path) and array.dtype.isnative and array.order == "C":
        with _pipeline(_RUST):
            return zarr.open_array(_store(path), path=name, mode=mode)
    with _pipeline(_PYTHON):
        return zarr.open_array(_Whole(_store(path), _blosc(array)), path=name, mode=mode)


def forget() -> None:
    """This process holds no zarr array open any more; the next use opens it anew."""
    _cached_array.cache_clear()


def _space(ndim: int, channel_axis: int | None) -> list[int]:
    """Which axes of an array are z y x: the last three, the channels apart."""
    return [axis for axis in range(ndim) if axis != channel_axis][-3:]


def _open_zarr(path: str, dataset: str, *, several: bool) -> tuple[Volume, ...]:
    node = _node(path, dataset)
    if isinstance(node, zarr.Group):
        dataset = _full_resolution(node, path, dataset)
        node = _node(path, dataset)
    where = _join(path, dataset)
    if isinstance(node, zarr.Group):
        raise UserError(f"{where} is a zarr group, not an array{_inside(where)}")
    image, entry = _multiscales(path, dataset)
    axes = _axes(image, node)
    lead = _channel_axis(node, axes, where) if several else None
    _check_axes(node, axes, lead, where)
    shape, chunk = (tuple(sizes[axis] for axis in _space(node.ndim, lead)) for sizes in (node.shape, node.chunks))
    chunk = tuple(min(c, n) for c, n in zip(chunk, shape, strict=True))
    one = Volume(path, "zarr", shape, _dtype(node.dtype, where), _ome_nm(image, entry, lead), chunk, dataset,
                 channel_axis=lead, binary=node.dtype.kind == "b")  # fmt: skip
    return (one,) if lead is None else tuple(replace(one, channel=i) for i in range(node.shape[lead]))


def _full_resolution(group: zarr.Group, path: str, dataset: str) -> str:
    """Path of the first dataset of a multiscales group; for a volseg run, of its labels."""
    if not dataset and exists(_join(path, "run.json")) and exists(_join(path, "labels/instances/0")):
        return "labels/instances/0"
    images = _ome(group.attrs.asdict()).get("multiscales") or [{}]
    datasets = images[0].get("datasets") or []
    if not datasets:
        raise UserError(f"zarr group {_join(path, dataset)} has no OME-Zarr multiscales{_inside(path)}")
    return "/".join(key for key in (dataset.strip("/"), datasets[0]["path"].strip("/")) if key)


def _ome(attributes: dict) -> dict:
    """OME-Zarr metadata of a group: 0.5 keeps it under ``ome``, 0.4 at the top."""
    return attributes.get("ome", attributes)


def _multiscales(path: str, dataset: str) -> tuple[dict, dict]:
    """The multiscales image that lists an array as one of its levels, and its entry; empty when none does."""
    keys = dataset.strip("/").split("/") if dataset else []
    above = [(_join(path, *keys[:i]), "/".join(keys[i:])) for i in reversed(range(len(keys)))]
    for root, name in above or [tuple(path.rsplit("/", 1))]:
        for image in _images(root):
            for entry in image.get("datasets", []):
                if entry.get("path", "").strip("/") == name:
                    return image, entry
    return {}, {}


def _images(root: str) -> list[dict]:
    """The multiscales of the group at ``root``; none where there is no group."""
    if not root or root.endswith(":/"):
        return []
    try:
        return _ome(_node(root).attrs.asdict()).get("multiscales") or []
    except UserError:
        return []


def _axes(image: dict, array: zarr.Array) -> list[str]:
    """Names of the array's axes, lower case, "c" for channels. Where nothing names them they are t c z y x, and of four
    the first is "?"."""
    axes = [axis if isinstance(axis, str) else _axis_name(axis) for axis in image.get("axes", [])]
    if not axes and array.metadata.zarr_format == 3:
        axes = [name or "" for name in array.metadata.dimension_names or ()]
    if len(axes) != array.ndim or not all(axes):
        axes = ["?", *"zyx"] if array.ndim == 4 else [*("?" * (array.ndim - 5)), *"tczyx"[max(0, 5 - array.ndim) :]]
    return ["c" if axis.lower() in CHANNEL else axis.lower() for axis in axes]


def _axis_name(axis: dict) -> str:
    return "c" if axis.get("type") == "channel" else axis.get("name", "")


def _channel_axis(array: zarr.Array, axes: list[str], where: str) -> int | None:
    """The axis that holds the channels; None where there is none."""
    if array.ndim == 4 and "c" not in axes:
        few = [axis for axis in (0, 3) if array.shape[axis] <= FEW]
        if len(few) != 1:
            raise UserError(
                f"{where} is 4-D ({_by(array.shape)}) and no axis is named c: volseg cannot tell which one holds the "
                f"channels; name its axes, or save it as c z y x with at most {FEW} channels"
            )
        return few[0]
    return axes.index("c") if "c" in axes and array.ndim > 3 else None


def _check_axes(array: zarr.Array, axes: list[str], channel_axis: int | None, where: str) -> None:
    if array.ndim < 3:
        raise UserError(f"{where} is {array.ndim}-D ({_by(array.shape)}); volseg needs a volume with axes z y x")
    space = _space(array.ndim, channel_axis)
    names = [axes[axis] for axis in space]
    if set(names) == set("zyx") and names != ["z", "y", "x"]:
        raise UserError(f"{where} has axes {' '.join(axes)}; volseg needs z y x last: transpose it")
    for axis, (name, n) in enumerate(zip(axes, array.shape, strict=True)):
        if n != 1 and axis not in (*space, channel_axis):
            raise UserError(
                f"{where} is {array.ndim}-D ({_by(array.shape)}): axis {name.replace('?', 'c')} has {n} entries and must "
                "have 1; save the wanted one as a z y x array"
            )
    if 0 in array.shape:
        raise UserError(f"{where} has no voxels: its shape is {_by(array.shape)}")


def _ome_nm(image: dict, entry: dict, channel_axis: int | None) -> TripleNm | None:
    """Voxel size z y x in nm from coordinate transformations and axis units; None where either is absent."""
    listed = image.get("axes", [])
    space = _space(len(listed), channel_axis)
    units = [NM.get(str(listed[i].get("unit", "")).lower()) for i in space if isinstance(listed[i], dict)]
    size = np.ones(3)
    found = False
    for step in (*entry.get("coordinateTransformations", []), *image.get("coordinateTransformations", [])):
        if step.get("type") == "scale" and len(step.get("scale", [])) == len(listed):
            size *= [step["scale"][i] for i in space]
            found = True
    if not found or len(units) != 3 or None in units or not (size > 0).all():
        return None
    return tuple(round(float(s * u), 6) for s, u in zip(size, units, strict=True))


# -------------------------------------------------------------------------------------------------------------- TIFF


class _Pages:
    """The sections of one TIFF file: where their bytes lie and how to decode them. Keeps no file open; thread-safe."""

    def __init__(self, path: str) -> None:
        import tifffile

        self.path = path
        with _naming(path), tifffile.TiffFile(path) as tif:
            with _opening, _refusing_broken_chain(path):
                len(tif.pages)
            series = _only_series(tif, path)
            key = series.keyframe
            self.shape, self.channels, self.layout = _tiff_shape(series, tif, path)
            self.dtype = _dtype(key.dtype, path)
            self.binary = key.dtype.kind == "b"
            self.stored = key.dtype.newbyteorder(tif.byteorder)
            self.voxel_size_nm = _tiff_nm(tif)
            self.offset = series.dataoffset  # of all sections when they lie in one piece
            self.pages = [] if self.offset is not None else list(series.pages)
            self.final = key.is_final
            self._check(key, series)
        segment = max(1, key.nbytes // max(1, len(key.dataoffsets)))
        self._cached = lru_cache(maxsize=max(1, CACHE_BYTES // segment))(self._decode)

    @property
    def chunk(self) -> Triple:
        return (1, *self.shape[1:])

    def _check(self, key: Any, series: Any) -> None:
        """Refuses what cannot be decoded, or lies beyond the end of the file."""
        size = os.path.getsize(self.path)
        if self.offset is not None:
            if self.offset + int(np.prod(series.shape, dtype=np.int64)) * self.stored.itemsize > size:
                raise UserError(
                    f"{self.path} is cut short: {size} bytes do not hold {_by(series.shape)} voxels; copy it again"
                )
            return
        count = self.shape[0] * (1 if self.layout == "zs" else self.channels)
        if len(self.pages) != count or len(key.shape) != 2 + (self.layout == "zs") or None in self.pages:
            raise UserError(f"{self.path} is laid out in a way volseg does not read; save it as one page per section")
        for page in self.pages:
            end = max((a + n for a, n in zip(page.dataoffsets, page.databytecounts, strict=True)), default=0)
            if end > size:
                raise UserError(
                    f"{self.path} is cut short: page {page.index} ends at byte {end} of {size}; copy it again"
                )
        if not self.final:
            self._refuse_unknown_codec(key)

    def _refuse_unknown_codec(self, key: Any) -> None:
        try:
            self._decode(0, 0)
        except Exception as error:  # tifffile has several ways to say that a codec is missing
            if not isinstance(error, ImportError) and not re.search(r"imagecodecs|COMPRESSION\.", str(error)):
                raise
            raise UserError(
                f"{self.path} is compressed with {getattr(key.compression, 'name', key.compression)}, which cannot be "
                "decoded here: pip install imagecodecs, or save it with deflate or without compression"
            ) from None

    def what_channels(self) -> str:
        """Why a file of several channels is no volume, and what to do."""
        if self.layout == "zs":
            return f"is a color image (RGB, {self.channels} samples per voxel); convert it to gray values"
        return f"has {self.channels} channels; save the wanted one alone"

    def fill(self, plane: np.ndarray, z: int, window: tuple[slice, slice], channel: int = 0) -> None:
        """``plane`` holds the voxels of section ``z`` of a channel in ``window`` (y x)."""
        page = {"zs": z, "zc": z * self.channels + channel, "cz": channel * self.shape[0] + z}[self.layout]
        sample = channel if self.layout == "zs" else 0
        if self.offset is not None:
            step = int(np.prod(self._plane, dtype=np.int64)) * self.stored.itemsize
            plane[...] = self._map(self.offset + page * step)[window][..., sample]
        elif self.final and _in_one_piece(self.pages[page]):
            plane[...] = self._map(self.pages[page].dataoffsets[0])[window][..., sample]
        else:
            self._fill_from_segments(plane, page, window, sample)

    @property
    def _plane(self) -> Triple:
        """Shape of one page, y x and samples."""
        return *self.shape[1:], self.channels if self.layout == "zs" else 1

    def _map(self, offset: int) -> np.ndarray:
        return np.memmap(self.path, self.stored, mode="r", offset=offset, shape=self._plane)

    def _fill_from_segments(self, plane: np.ndarray, z: int, window: tuple[slice, slice], sample: int) -> None:
        whole = plane.shape == self.shape[1:] and self.layout != "zs"
        decode = self._decode if whole else self._cached
        want = Box((0, window[0].start, window[1].start), (1, window[0].stop, window[1].stop))
        for i, have in self._segments(z):
            both = want.intersect(have)
            if both.voxels:
                data = decode(z, i)
                plane[both.inside(want)[1:]] = 0 if data is None else data[both.inside(have)[1:]][..., sample]

    def _segments(self, z: int) -> Iterator[tuple[int, Box]]:
        """Number and box of each strip or tile of page ``z``."""
        key = self.pages[z].keyframe
        size = (1, key.tilelength, key.tilewidth) if key.is_tiled else (1, key.rowsperstrip, key.imagewidth)
        return enumerate(Blocks((1, *self.shape[1:]), size))

    def _decode(self, z: int, i: int) -> np.ndarray | None:
        """Strip or tile ``i`` of page ``z``, y x and samples; None where the file leaves it out (all zero)."""
        page = self.pages[z]
        offset, count = page.dataoffsets[i], page.databytecounts[i]
        if not count:
            return None
        with _binary(self.path) as file:
            file.seek(offset)
            raw = file.read(count)
        if len(raw) != count:
            raise OSError(f"strip {i} holds {len(raw)} of {count} bytes")
        data, _, _ = page.keyframe.decode(raw, i, jpegtables=page.jpegtables)
        return None if data is None else data[0]


def _binary(path: str) -> Any:
    return Path(path).open("rb")


def _in_one_piece(page: Any) -> bool:
    ends = [a + n for a, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
    return all(page.databytecounts) and ends[:-1] == list(page.dataoffsets[1:])


@lru_cache(maxsize=64)
def _tiff(path: str, stamp: Any) -> _Pages:
    return _Pages(path)


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def _refusing_broken_chain(path: str) -> Iterator[None]:
    """Refuses a file whose list of pages ends in the void: tifffile only logs it, and the volume would be short."""
    log, errors = logging.getLogger("tifffile"), _Errors()
    log.addHandler(errors)
    try:
        yield
    finally:
        log.removeHandler(errors)
    if errors.messages:
        raise UserError(f"{path} is cut short or corrupt: {errors.messages[0]}; copy it again")


def _only_series(tif: Any, path: str) -> Any:
    """The one stack of equal pages in a file."""
    if not len(tif.series):
        raise UserError(f"{path} has no pages; copy it again")
    if tif.series[0].is_multifile:
        raise UserError(f"{path} is one of several files of an image; save the sections in one file, or as slices")
    if tif.pages[0].dtype is None:
        raise UserError(f"{path} holds {tif.pages[0].bitspersample}-bit voxels; save them as uint8 or uint16")
    if len(tif.series) > 1:
        kinds = ", ".join(f"{_by(s.shape)} {s.dtype}" for s in tif.series[:3])
        raise UserError(f"{path} holds {len(tif.series)} kinds of pages ({kinds}); save the sections alone")
    return tif.series[0]


def _tiff_shape(series: Any, tif: Any, path: str) -> tuple[Triple, int, str]:
    """z y x of a stack of pages, whatever its stack axis is called; its number of channels; and how pages follow each
    other: "zc" (channels change first), "cz", or "zs" (a page holds all channels of a section)."""
    sizes = list(zip(series.get_axes(False), series.get_shape(False), strict=True))
    stack = [(axis, n) for axis, n in sizes if axis not in "YX" and n > 1]
    names = "".join(axis for axis, n in sizes if axis in "YX" or n > 1)
    lead = _tiff_channels(stack)
    depth = [n for i, (_, n) in enumerate(stack) if i != lead]
    if len(depth) > 1 or not names.endswith("YXS" if "S" in names else "YX"):
        raise UserError(
            f"{path} is {len(stack) + 2}-D ({_by(series.shape)}, axes {series.axes}); save one z stack of gray pages, "
            "or several channels with their axes named, such as CZYX"
        )
    sections, channels = (depth or [1])[0], 1 if lead is None else stack[lead][1]
    promised = int((tif.imagej_metadata or {}).get("images", 1)) if tif.is_imagej else 1
    if promised > max(sections * channels, len(tif.pages)):
        raise UserError(f"{path} is cut short: it promises {promised} pages and holds {len(tif.pages)}; copy it again")
    layout = "zs" if "S" in names else "cz" if lead == 0 else "zc"
    return (sections, dict(sizes)["Y"], dict(sizes)["X"]), channels, layout


def _tiff_channels(stack: list[tuple[str, int]]) -> int | None:
    """Which of the stack axes holds channels: that called C or S, else of two the only one that is short, if not T or Z."""
    named = [i for i, (axis, _) in enumerate(stack) if axis in "CS"]
    short = [i for i, (axis, n) in enumerate(stack) if axis not in "TZ" and n <= FEW]
    found = named or (short if len(stack) == 2 else [])
    return found[0] if len(found) == 1 else None


def _tiff_nm(tif: Any) -> TripleNm | None:
    """Voxel size z y x from OME or ImageJ metadata where all three lengths and their unit are given."""
    if tif.is_ome and tif.ome_metadata:
        return _ome_tiff_nm(ElementTree.fromstring(tif.ome_metadata).find(".//{*}Pixels"))
    meta = (tif.imagej_metadata or {}) if tif.is_imagej else {}
    unit = NM.get(str(meta.get("unit", "")).lower())
    per = [tif.pages[0].tags.valueof(name) for name in ("YResolution", "XResolution")]
    if not unit or not meta.get("spacing") or not all(per) or not all(n and d for n, d in per):
        return None
    return tuple(round(float(n), 6) for n in (meta["spacing"] * unit, *(d / n * unit for n, d in per)))


def _ome_tiff_nm(pixels: Any) -> TripleNm | None:
    sizes = [None if pixels is None else pixels.get(f"PhysicalSize{axis}") for axis in "ZYX"]
    if None in sizes:
        return None
    units = [NM.get(pixels.get(f"PhysicalSize{axis}Unit", "µm").lower()) for axis in "ZYX"]
    return None if None in units else tuple(round(float(s) * u, 6) for s, u in zip(sizes, units, strict=True))


# ------------------------------------------------------------------------------------------------------------ slices


@dataclass(frozen=True)
class _Slice:
    """What the header of one slice says."""

    shape: tuple[int, int]
    dtype: str


class _Folder:
    """A folder of slices in natural order; keeps decoded PNG slices for boxes that do not span the plane."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.files = _slice_names(path)
        self._png = _png
        if self.files and self.files[0].lower().endswith(".png"):
            with _naming(os.path.join(path, self.files[0])):
                header = _slice(os.path.join(path, self.files[0]))
            nbytes = header.shape[0] * header.shape[1] * np.dtype(header.dtype).itemsize
            self._png = lru_cache(maxsize=max(1, CACHE_BYTES // nbytes))(_png)

    def fill(self, plane: np.ndarray, z: int, window: tuple[slice, slice]) -> None:
        """``plane`` holds the voxels of slice ``z`` in ``window`` (y x)."""
        file = os.path.join(self.path, self.files[z])
        if not file.lower().endswith(".png"):
            _tiff(file, _stamp(file)).fill(plane, 0, window)
            return
        data = self._png(file)
        plane[...] = data[window]


@lru_cache(maxsize=8)
def _folder(path: str, stamp: Any) -> _Folder:
    return _Folder(path)


def _natural(name: str) -> tuple:
    """Sort key by which s2.tif comes before s10.tif."""
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", name)], name


def _slice_names(path: str) -> list[str]:
    names = [n for n in os.listdir(path) if n.lower().endswith(SLICES) and not n.startswith(".")]
    return sorted((n for n in names if os.path.isfile(os.path.join(path, n))), key=_natural)


def _open_folder(path: str) -> Volume:
    files = _slice_names(path)
    if not files:
        raise UserError(f"folder {path} is neither a zarr nor holds .tif or .png slices; {READS}")
    kinds = sorted({os.path.splitext(name)[1].lower().replace("tiff", "tif") for name in files})
    if len(kinds) > 1:
        raise UserError(f"folder {path} mixes {' and '.join(kinds)} files; keep the slices of one volume alone")
    headers = [_slice(os.path.join(path, name)) for name in files]
    for name, header in zip(files, headers, strict=True):
        if header != headers[0]:
            raise UserError(
                f"slice {os.path.join(path, name)} is {_by(header.shape)} {header.dtype}, but {files[0]} is "
                f"{_by(headers[0].shape)} {headers[0].dtype}; all slices of a folder must agree"
            )
    shape = (len(files), *headers[0].shape)
    return Volume(path, "slices", shape, headers[0].dtype, None, (1, *headers[0].shape))


def _slice(file: str) -> _Slice:
    """The header of one slice; refuses color and several pages."""
    if os.path.getsize(file) == 0:
        raise UserError(f"slice {file} is empty (0 bytes); copy it again")
    if not file.lower().endswith(".png"):
        pages = _tiff(file, _stamp(file))
        if pages.shape[0] != 1:
            raise UserError(f"slice {file} holds {pages.shape[0]} pages; a folder's files hold one section each")
        return _Slice(pages.shape[1:], pages.dtype)
    with _naming(file), _binary(file) as opened:
        image = _png_image(opened)
        types = {"1": "uint8", "L": "uint8", "P": "uint8", "I;16": "uint16", "I": "int32"}
        if image.mode not in types:
            raise UserError(f"slice {file} is a color image ({image.mode}); convert it to gray values")
        return _Slice((image.height, image.width), types[image.mode])


def _png_image(opened: Any) -> Any:
    """A PNG by its own reader: no limit on the number of voxels. Palette images give their indices."""
    from PIL.PngImagePlugin import PngImageFile

    try:
        return PngImageFile(opened)
    except SyntaxError as error:
        raise OSError(_cause(error)) from None


def _png(file: str) -> np.ndarray:
    with _binary(file) as opened:
        return np.asarray(_png_image(opened))


# -------------------------------------------------------------------------------------------------- arrays of a run


def create_group(path: str) -> None:
    """There is a zarr v3 group at ``path``; one that exists keeps its attributes."""
    with _pipeline(_PYTHON):
        zarr.open_group(_store(_absolute(path)), mode="a", zarr_format=3)


def create_array(
    path: str,
    name: str,
    *,
    shape: tuple[int, ...],
    dtype: Any,
    chunk: tuple[int, ...],
    shard: tuple[int, ...],
    fill: int = 0,
    attributes: dict | None = None,
    axes: str | tuple[str, ...] | None = None,
) -> None:
    """There is a new sharded zarr v3 array ``name`` at ``path``; refuses to replace one.

    ``chunk`` is adapted to ``shard`` by :func:`fit_chunk`. zstd level 1 without shuffle, with checksums: on EPFL labels
    it takes half the bytes of blosc with bitshuffle and is as fast to write, and a flipped bit is found on reading.
    """
    with _pipeline(_PYTHON):
        try:
            zarr.create_array(
                _store(_absolute(path)),
                name=name,
                shape=shape,
                dtype=np.dtype(dtype),
                chunks=fit_chunk(chunk, shard),
                shards=tuple(shard),
                compressors=ZstdCodec(level=1, checksum=True),
                fill_value=fill,
                attributes=attributes or {},
                dimension_names=tuple(axes) if axes else None,
            )
        except zarr.errors.ContainsArrayError:
            raise UserError(f"{_join(path, name)} exists; remove it, or give another output path") from None
    forget()


def fit_chunk(chunk: tuple[int, ...], shard: tuple[int, ...]) -> tuple[int, ...]:
    """Per axis the divisor of ``shard`` nearest to ``chunk`` in ratio: chunks must tile a shard exactly.

    >>> fit_chunk((32, 256, 256), (37, 50, 1000))
    (37, 50, 250)
    """
    return tuple(
        min((d for d in range(1, s + 1) if s % d == 0), key=lambda d: abs(ln(d / c)))
        for c, s in zip(chunk, shard, strict=True)
    )


def open_array(path: str, name: str) -> zarr.Array:
    """The zarr array ``name`` at ``path``, to read and write; kept open per process. Write through :func:`write`."""
    return _array(_absolute(path), name, "r+")


def write(array: zarr.Array, box: Box, data: np.ndarray) -> None:
    """The voxels of ``box`` (z y x) in ``array`` are ``data``; leading axes of the array are written whole.

    Refuses a box that cuts a shard: two writers in one shard lose data (zarr-python #3682). A shard left torn by a
    killed writer is replaced.
    """
    lead = array.ndim - 3
    shard = array.shards or array.chunks
    ends = zip(box.start, box.stop, shard[lead:], array.shape[lead:], strict=True)
    if any(a % s or (b % s and b != n) or b > n for a, b, s, n in ends) or shard[:lead] != array.shape[:lead]:
        raise ValueError(
            f"box {box} cuts shards of {_by(shard)} in {array.name or array.store_path} ({_by(array.shape)}); "
            "one task writes whole shards"
        )
    if data.shape != (*array.shape[:lead], *box.shape):
        raise ValueError(f"data of shape {_by(data.shape)} does not fill box {box} of an array of {_by(array.shape)}")
    data = np.ascontiguousarray(data, dtype=array.dtype)
    try:
        array[(slice(None),) * lead + box.slices] = data
    except (RuntimeError, ValueError, OSError):
        if not _drop_shards(array, box):
            raise
        array[(slice(None),) * lead + box.slices] = data


def _drop_shards(array: zarr.Array, box: Box) -> bool:
    """The local shards under ``box`` are gone; whether there were any. (One at the far end is read before written.)"""
    if not isinstance(array.store, LocalStore):
        return False
    lead = array.ndim - 3
    grid = Blocks(array.shape[lead:], (array.shards or array.chunks)[lead:])
    keys = [array.metadata.encode_chunk_key((0,) * lead + grid.coords(i)) for i in grid.meeting(box)]
    files = [file for key in keys if (file := Path(array.store.root, array.path, key)).exists()]
    for file in files:
        file.unlink()
    return bool(files)


def group_attributes(path: str, name: str = "") -> dict:
    """The attributes of the zarr group (or array) ``name`` at ``path``."""
    return _node(_absolute(path), name).attrs.asdict()


def set_group_attributes(path: str, name: str, attributes: dict) -> None:
    """The zarr group (or array) ``name`` at ``path`` has these attributes; other keys keep theirs."""
    with _pipeline(_PYTHON):
        zarr.open(_store(_absolute(path)), path=name, mode="r+").attrs.update(attributes)
    forget()


def ome_multiscales(
    name: str,
    axes: str | tuple[str, ...],
    levels: list[tuple[str, tuple[float, ...]]],
    *,
    unit: str = "nanometer",
    source: str = "",
) -> dict:
    """OME-Zarr 0.5 attributes of a multiscales group.

    ``levels`` lists (dataset, voxel size z y x), finest first; unit "" leaves lengths in voxels. Coarser levels are
    shifted so that all cover the same space. ``source`` (such as ``"../../"``) makes it a label image of that image.
    """
    first = levels[0][1]
    lead = [1.0] * (len(axes) - 3)
    image = {
        "name": name,
        "axes": [_ome_axis(axis, unit) for axis in axes],
        "datasets": [
            {
                "path": dataset,
                "coordinateTransformations": [
                    {"type": "scale", "scale": [*lead, *map(float, size)]},
                    {
                        "type": "translation",
                        "translation": [*(0.0 for _ in lead), *((b - a) / 2 for a, b in zip(first, size, strict=True))],
                    },
                ],
            }
            for dataset, size in levels
        ],
    }
    label = {"image-label": {"source": {"image": source}}} if source else {}
    return {"ome": {"version": "0.5", "multiscales": [image], **label}}


def _ome_axis(name: str, unit: str) -> dict:
    if name in "zyx":
        return {"name": name, "type": "space", **({"unit": unit} if unit else {})}
    return {"name": name, "type": {"c": "channel", "t": "time"}.get(name, "")}


# ------------------------------------------------------------------------------------------------------ plain objects


def _remote(path: str) -> tuple[Any, str]:
    """The filesystem of a URL, with nothing remembered about what others may have changed, and the path in it."""
    from fsspec.core import url_to_fs

    try:
        fs, root = url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot reach {path}: {_cause(error)}; pip install 'volseg[s3]' for s3:// URLs") from None
    fs.invalidate_cache()
    return fs, root


def exists(path: str | Path) -> bool:
    """Whether a file, folder or remote prefix is there."""
    path = _absolute(path)
    if not is_remote(path):
        return os.path.exists(path)
    fs, root = _remote(path)
    return fs.exists(root)


def stored_bytes(path: str | Path) -> int:
    """Bytes of all objects under ``path``; 0 where there is none."""
    path = _absolute(path)
    if is_remote(path):
        fs, root = _remote(path)
        return sum(entry["size"] for entry in fs.find(root, detail=True).values())
    found = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names if not _temporary(name))
    return sum(os.path.getsize(file) for file in found if os.path.exists(file))


def remove(path: str | Path) -> None:
    """Nothing is at ``path`` any more; it may not have been there."""
    path = _absolute(path)
    forget()
    if is_remote(path):
        fs, root = _remote(path)
        if fs.exists(root):
            fs.rm(root, recursive=True)
    elif os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def move(source: str | Path, target: str | Path) -> None:
    """What was at ``source`` is at ``target``, which must not be a folder with content. Atomic where local."""
    source, target = _absolute(source), _absolute(target)
    forget()
    if is_remote(source):
        (fs, root), (_, goal) = _remote(source), _remote(target)
        for key in fs.find(root):
            fs.cp_file(key, goal + key[len(root) :])
        fs.rm(root, recursive=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.replace(source, target)


def read_bytes(path: str, key: str) -> bytes:
    """The object ``key`` under ``path``; FileNotFoundError where there is none."""
    where = _join(path, key)
    if not is_remote(where):
        return Path(where).read_bytes()
    fs, root = _remote(where)
    return fs.cat_file(root)


def write_bytes(path: str, key: str, data: bytes | memoryview) -> None:
    """The object ``key`` under ``path`` is ``data``: readers see the old bytes or the new ones, never a part."""
    where = _join(path, key)
    if is_remote(where):
        fs, root = _remote(where)
        fs.pipe_file(root, bytes(data))
        return
    folder, name = os.path.split(where)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        Path(temporary).write_bytes(data)
        os.replace(temporary, where)
    finally:
        Path(temporary).unlink(missing_ok=True)


def list_keys(path: str, prefix: str = "") -> list[str]:
    """Keys under ``path`` of the objects in folder ``prefix`` (or of that one object), sorted; none is no error."""
    base, where = _absolute(path), _join(path, prefix)
    if is_remote(where):
        fs, root = _remote(where)
        start = len(_remote(base)[1].rstrip("/")) + 1
        return sorted(key[start:] for key in fs.find(root))
    if os.path.isfile(where):
        return [os.path.relpath(where, base).replace(os.sep, "/")]
    walked = ((folder, name) for folder, _, names in os.walk(where) for name in names if not _temporary(name))
    return sorted(os.path.relpath(os.path.join(*pair), base).replace(os.sep, "/") for pair in walked)


def names(path: str) -> list[str]:
    """Names of what lies directly in the folder at ``path``; none is no error."""
    if not is_remote(path):
        return os.listdir(path) if os.path.isdir(path) else []
    fs, root = _remote(path)
    return [key.rstrip("/").rpartition("/")[2] for key in fs.ls(root, detail=False)] if fs.exists(root) else []


def _temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")
