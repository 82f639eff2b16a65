"""Zarr arrays and groups by their path: opened once, made, written in whole shards."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from math import log as ln
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zarr
from zarr.abc.store import Store, SuffixByteRequest
from zarr.codecs import BloscCodec, ZstdCodec
from zarr.core.array import AsyncArray
from zarr.storage import FsspecStore, LocalStore, MemoryStore, WrapperStore, ZipStore

from volseg.box import Blocks, Box
from volseg.errors import UserError
from volseg.io import files, frames, remote
from volseg.io.header import decoding_room, reason, shape_text

BOMB = "it decodes to far more bytes than a chunk of this array has"
SEPARATORS = {"/": ".", ".": "/"}  # of chunk keys, each with the other one
ZARR_FILES = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
_OPENING = threading.Lock()  # zarr's configuration and warning filters belong to the whole process
_PYTHON = "zarr.core.codec_pipeline.BatchedCodecPipeline"
_RUST = "zarrs.ZarrsCodecPipeline"  # twice as fast; local stores, native byte order and C order only


class _CheckedStore(WrapperStore):
    """A store that refuses chunks cut short, which zarr's own codecs read as fill value or as garbage, and those that would
    decode to far more than a chunk."""

    def __init__(self, store: Store, array: zarr.Array) -> None:
        super().__init__(store)
        self.array = array  # opened without these checks
        self.blosc = _blosc(array)  # whether each whole object is one blosc frame, which states its own length
        self.compression = frames.compression(array)

    def _with_store(self, store: Store) -> _CheckedStore:
        return _CheckedStore(store, self.array)

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        value = await self._store.get(key, prototype, byte_range)
        if os.path.basename(key) in ZARR_FILES:
            return value
        if value is None:
            if isinstance(self._store, LocalStore):
                refuse_dangling(Path(self._store.root, key), key)
            return value
        data = memoryview(value.as_numpy_array() if self.compression or self.blosc else b"")
        if byte_range is None:
            stated = int.from_bytes(data[12:16], "little") if self.blosc else len(value)
            if len(value) == 0 or stated != len(value):
                raise OSError(f"{key} is cut short: it holds {len(value)} bytes")
        is_index = isinstance(byte_range, SuffixByteRequest) or getattr(byte_range, "start", None) == 0
        if self.compression and not is_index and any(map(self.compression.too_large, self._chunks(data, byte_range))):
            raise OSError(BOMB)
        return value

    def _chunks(self, data: memoryview, byte_range: Any) -> Iterator[memoryview]:
        """The compressed chunks in an object, or in the part of it that was read: of a whole shard, each by itself."""
        shards = frames.sharding(self.array.metadata)
        if shards is None or byte_range is not None:
            yield data
            return
        spans = frames.shard_ranges(shards, self.array.shards, len(data), lambda at, length: data[at : at + length])
        for offset, length in spans.values():
            yield data[offset : offset + length]


def refuse_dangling(file: Path, key: str) -> None:
    """A chunk that is a link to nowhere is damaged; zarr takes it for one that was never written."""
    if file.is_symlink() and not file.exists():
        raise OSError(f"it is a link to {os.readlink(file)}, where there is no file")


def archive_of(path: str) -> tuple[str, str] | None:
    """The zip file at ``path`` or above it, and what of it the path names; None where there is no such file.

    A path inside a zip file arises where metadata of a group above an array are looked for.
    """
    inside: list[str] = []
    while path and not files.is_remote(path) and not os.path.isdir(path):
        if os.path.isfile(path):
            return path, "/".join(reversed(inside))
        path, _, name = path.rpartition("/")
        inside.append(name)
    return None


def _place(path: str, name: str) -> tuple[Store, str]:
    """The store that holds the node ``name`` at ``path``, and its name there."""
    if archive := archive_of(path):
        return _CheckedZipStore(archive[0], mode="r"), files.join_keys(archive[1], name)
    return _store(path), name


class _CheckedZipStore(ZipStore):
    """A zip file whose members are looked at before they are decoded: a small one may hold more than the memory."""

    def _get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        if not self._is_open:
            self._sync_open()
        with contextlib.suppress(KeyError):
            nbytes = self._zf.getinfo(key).file_size
            with decoding_room(nbytes, f"{key} in {self.path}"):
                return super()._get(key, prototype, byte_range)
        return None


def _store(path: str) -> Store:
    if not files.is_remote(path):
        return LocalStore(path)
    remote.filesystem(path)  # says in a line what is wrong
    zarr.config.set({"async.concurrency": remote.REQUESTS})
    return FsspecStore.from_url(path, storage_options=remote.options(path))


@contextmanager
def _pipeline(name: str) -> Iterator[None]:
    """Inside, arrays open with that codec pipeline and without warnings; one thread at a time."""
    with _OPENING, warnings.catch_warnings(), zarr.config.set({"codec_pipeline.path": name}):
        warnings.simplefilter("ignore", UserWarning)
        yield


def node(path: str, name: str = "") -> zarr.Array | zarr.Group:
    """The array or group ``name`` at ``path``; :class:`UserError` where there is none."""
    try:
        with _pipeline(_PYTHON):
            store, inside = _place(path, name)
            return zarr.open(store, path=inside, mode="r")
    except (FileNotFoundError, KeyError, zarr.errors.NodeNotFoundError):
        raise UserError(f"no zarr array or group at {files.join(path, name)}{contents(path) if name else ''}") from None
    except UserError:
        raise
    except Exception as error:  # damaged metadata, no permission, no network: whatever the store raises
        if files.is_remote(path) and remote.denies(error):
            raise UserError(f"the store refuses {path} ({reason(error)}); {remote.advice(path)}") from None
        raise UserError(f"cannot open zarr {files.join(path, name)}: {reason(error)}") from error


def contents(path: str) -> str:
    """Advice that lists the arrays of a zarr group."""
    try:
        group = node(path)
    except UserError:
        return ""
    if isinstance(group, zarr.Array):
        return f"; {path} is itself an array: leave input.dataset empty"
    try:
        with _pipeline(_PYTHON):
            names = sorted(name for name, node in group.members(max_depth=4) if isinstance(node, zarr.Array))
    except Exception as error:  # whatever the store or damaged metadata of a member raise
        return f"; what it holds cannot be listed: {reason(error)}"
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"; arrays inside: {listed}: pick one with --set input.dataset={names[0]}" if names else "; it has no arrays"


def _blosc(array: zarr.Array) -> bool:
    """Whether each stored object of ``array`` is one blosc frame."""
    if array.metadata.zarr_format == 2:
        return getattr(array.metadata.compressor, "codec_id", "") == "blosc"
    return isinstance(array.metadata.codecs[-1], BloscCodec)


def _document(path: str, name: str) -> tuple[int, int, int] | None:
    """Stamp of a local array's metadata, or of the zip file around it; None for a remote one."""
    if files.is_remote(path):
        return None
    if os.path.isfile(path):
        return files.stamp(path)
    found = (os.path.join(path, name, file) for file in ("zarr.json", ".zarray"))
    return next((files.stamp(file) for file in found if os.path.exists(file)), None)


def cached_array(path: str, name: str, mode: str = "r") -> zarr.Array:
    return _cached_array(path, name, mode, (files.generation(), _document(path, name)))


@lru_cache(maxsize=64)
def _cached_array(path: str, name: str, mode: str, stamp: Any) -> zarr.Array:
    array = node(path, name)
    if isinstance(array, zarr.Group):
        raise UserError(f"{files.join(path, name)} is a zarr group, not an array{contents(files.join(path, name))}")
    archive = archive_of(path)
    if not archive and not files.is_remote(path) and array.dtype.isnative and array.order == "C":
        with _pipeline(_RUST):
            return _with_keys_found(zarr.open_array(_store(path), path=name, mode=mode), path, name)
    with _pipeline(_PYTHON):
        place, inside = _place(path, name)
        store = _CheckedStore(place, array)
        opened = zarr.open_array(store, path=inside, mode=mode)
        return opened if archive else _with_keys_found(opened, path, name)


def _with_keys_found(array: zarr.Array, path: str, name: str) -> zarr.Array:
    """The array, with its chunks' keys separated as they are stored (0/0/0 or 0.0.0) where its metadata say otherwise."""
    metadata: Any = array.metadata
    encoding = metadata if metadata.zarr_format == 2 else metadata.chunk_key_encoding
    separator = getattr(encoding, "dimension_separator" if metadata.zarr_format == 2 else "separator", None)
    if separator not in SEPARATORS or array.ndim < 2:
        return array
    other = SEPARATORS[separator]
    prefix = "c" if getattr(encoding, "name", "") == "default" else ""
    if not _keys_are_separated_by(other, separator, files.join(path, name), prefix, array.ndim):
        return array
    if metadata.zarr_format == 2:
        metadata = replace(metadata, dimension_separator=other)
    else:
        metadata = replace(metadata, chunk_key_encoding=replace(encoding, separator=other))
    return zarr.Array(AsyncArray(metadata, array.store_path))


def _keys_are_separated_by(other: str, separator: str, folder: str, prefix: str, ndim: int) -> bool:
    """Whether chunks in ``folder`` have keys with the ``other`` separator, and none the one that was said."""
    if files.is_remote(folder):  # slow to list: the first chunk tells, if it is stored
        nested, flat = (f"{folder}/{prefix or '0'}", f"{folder}/{prefix + '.' if prefix else ''}{'.'.join('0' * ndim)}")
        wanted, said = (nested, flat) if other == "/" else (flat, nested)
        return not files.exists(said) and files.exists(wanted)
    with os.scandir(folder) as entries:
        for entry in entries:
            bare = entry.name.removeprefix(prefix).lstrip(".")
            if entry.name.startswith(prefix) and (bare.replace(".", "").isdigit() or entry.name == prefix):
                return entry.is_dir() == (other == "/")
    return False


def stores_chunks(array: zarr.Array, path: str, name: str, keys: Iterable[str]) -> bool:
    """Whether any chunk is stored; on an object store, which is slow to list, whether any of ``keys`` is."""
    folder = files.join(path, name)
    if files.is_remote(path):
        return any(files.exists(f"{folder}/{key}") for key in keys)
    if archive := archive_of(path):
        prefix = files.join_keys(archive[1], name)
        with zipfile.ZipFile(archive[0]) as opened:
            held = {member for member in opened.namelist() if member.startswith(f"{prefix}/" if prefix else "")}
        return any(member.rpartition("/")[2] not in ZARR_FILES for member in held if not member.endswith("/"))
    walked = (file for _, _, found in os.walk(folder) for file in found)
    return any(file not in ZARR_FILES and not file.startswith(".") for file in walked)


Stored = Iterable[tuple[str, Callable[[tuple[int, ...]], bool]]]


def check_chunks(array: zarr.Array, folder: str, stored: Stored) -> None:
    """Refuses a chunk of the local array in ``folder``, or chunks of a shard, that would decode to far more than a chunk.

    ``stored``: the key of each stored object, and what says of a chunk's place in it, if it is a shard, whether it is read.
    zarrs, which reads local arrays, has no such check.
    """
    compression, shards = frames.compression(array), frames.sharding(array.metadata)
    for key, inner in stored:
        try:
            opened = open(f"{folder}/{key}", "rb")  # noqa: SIM115  # a Path takes three times as long
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            refuse_dangling(Path(folder, key), key)
            continue
        with opened:
            _check_object(opened, compression, shards, array.shards, inner)


def _check_object(
    opened: BinaryIO, compression: frames.Compression | None, shards: Any, shape: Any, inner: Callable
) -> None:
    def read(offset: int, length: int) -> bytes:
        opened.seek(offset)
        return opened.read(length)

    size = os.fstat(opened.fileno()).st_size
    ranges = [(0, size)]
    if shards:
        found = frames.shard_ranges(shards, shape, size, read)
        if any(offset + length > size for offset, length in found.values()):
            raise OSError("the index of this shard points beyond its end")
        ranges = [span for place, span in found.items() if inner(place)]
    if compression and any(compression.too_large_in(opened, offset, length) for offset, length in ranges):
        raise OSError(BOMB)


def is_local(array: zarr.Array) -> bool:
    """Whether zarrs reads the array, straight from local files."""
    return isinstance(array.store, LocalStore)


def location(node: Any) -> tuple[str, str] | None:
    """Path and name of a zarr array or group that any process can open by them; None for all else."""
    if not isinstance(node, (zarr.Array, zarr.Group)):
        return None
    store = node.store
    if isinstance(store, LocalStore):
        return str(store.root), node.path
    if isinstance(store, FsspecStore) and _known_by_url(store.fs):
        return store.fs.unstrip_protocol(store.path), node.path
    return None


def _known_by_url(filesystem: Any) -> bool:
    """Whether a URL alone leads another process there: not into memory, and without keys or an endpoint."""
    of_zarr = ("asynchronous", "loop", "skip_instance_cache")
    return "memory" not in filesystem.protocol and not set(filesystem.storage_options) - set(of_zarr)


def clear_array_cache() -> None:
    """This process holds no zarr array open any more; the next use opens it anew."""
    _cached_array.cache_clear()


# ------------------------------------------------------------------------------------------------------- made anew


def create_group(path: str) -> None:
    """There is a zarr v3 group at ``path``; one that exists keeps its attributes."""
    with files.answering(path), _pipeline(_PYTHON):
        zarr.open_group(_store(files.absolute(path)), mode="a", zarr_format=3)


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
    form = {
        "shape": shape,
        "dtype": dtype,
        "chunk": chunk,
        "shard": shard,
        "fill": fill,
        "attributes": attributes,
        "axes": axes,
    }
    with files.answering(files.join(path, name)), _pipeline(_PYTHON):
        try:
            _create(_store(files.absolute(path)), name, **form)
        except zarr.errors.ContainsArrayError:
            raise UserError(f"{files.join(path, name)} exists; remove it, or give another output path") from None
    clear_array_cache()


def _create(
    store: Store, name: str, *, shape: tuple[int, ...], dtype: Any, chunk: tuple[int, ...], shard: tuple[int, ...],
    fill: int = 0, attributes: dict | None = None, axes: str | tuple[str, ...] | None = None,
) -> None:  # fmt: skip
    zarr.create_array(
        store,
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


def is_as_created(path: str, name: str, **form: Any) -> bool:
    """Whether the array's description is the one that `create_array` gives it."""
    documents: dict = {}
    with _pipeline(_PYTHON):
        _create(MemoryStore(documents), "", **form)
    return _document_is(path, name, documents)


def set_group(path: str, name: str, attributes: dict) -> None:
    """There is a zarr v3 group ``name`` at ``path`` with exactly these attributes, whatever its description was."""
    documents: dict = {}
    with _pipeline(_PYTHON):
        zarr.create_group(MemoryStore(documents), attributes=attributes)
    if not _document_is(path, name, documents):
        files.write_bytes(path, files.join_keys(name, "zarr.json"), documents["zarr.json"].to_bytes())
        clear_array_cache()


def _document_is(path: str, name: str, documents: dict) -> bool:
    try:
        stored = json.loads(files.read_bytes(path, files.join_keys(name, "zarr.json")))
    except (FileNotFoundError, ValueError):
        return False
    return stored == json.loads(documents["zarr.json"].to_bytes())


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
    """The zarr array ``name`` at ``path``, to read and write; kept open per process. Write through :func:`write`, and index
    it with ranges alone, not with numbers: zarrs 0.2.3 refuses some of these over several shards ("incompatible offset")."""
    return cached_array(files.absolute(path), name, "r+")


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
            f"box {box} cuts shards of {shape_text(shard)} in {array.name or array.store_path} ({shape_text(array.shape)}); "
            "one task writes whole shards"
        )
    if data.shape != (*array.shape[:lead], *box.shape):
        raise ValueError(
            f"data of shape {shape_text(data.shape)} does not fill box {box} of an array of {shape_text(array.shape)}"
        )
    data = np.ascontiguousarray(data, dtype=array.dtype)
    try:
        array[(slice(None),) * lead + box.slices] = data
    except (RuntimeError, ValueError, OSError):
        if not _drop_shards(array, box):
            raise
        array[(slice(None),) * lead + box.slices] = data


def shard_keys(array: zarr.Array, box: Box) -> list[str]:
    """Keys, below the array, of the shards that hold a voxel of ``box``, whether they are stored or not."""
    lead = array.ndim - 3
    grid = Blocks(array.shape[lead:], (array.shards or array.chunks)[lead:])
    return [array.metadata.encode_chunk_key((0,) * lead + grid.coords(i)) for i in grid.overlapping(box)]


def _drop_shards(array: zarr.Array, box: Box) -> bool:
    """The local shards under ``box`` are gone; whether there were any. (One at the far end is read before written.)"""
    if not isinstance(array.store, LocalStore):
        return False
    files = [file for key in shard_keys(array, box) if (file := Path(array.store.root, array.path, key)).exists()]
    for file in files:
        file.unlink()
    return bool(files)


def group_attributes(path: str, name: str = "") -> dict:
    """The attributes of the zarr group (or array) ``name`` at ``path``."""
    return node(files.absolute(path), name).attrs.asdict()


def set_group_attributes(path: str, name: str, attributes: dict) -> None:
    """The zarr group (or array) ``name`` at ``path`` has these attributes; other keys keep theirs."""
    with _pipeline(_PYTHON):
        zarr.open(_store(files.absolute(path)), path=name, mode="r+").attrs.update(attributes)
    clear_array_cache()
