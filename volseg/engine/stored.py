"""What a run's folder is made of: tables of one kind, and arrays; what a block writes into either is recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import groupby
from numbers import Integral
from typing import Any, Generic, TypeVar

import numpy as np

from volseg.box import Box
from volseg.errors import DamagedFileError, UserError
from volseg.io import arrays, files, tables

T = TypeVar("T")


# ---------------------------------------------------------------- what a block writes

_RECORD: ContextVar[dict[str, list] | None] = ContextVar("record", default=None)


@contextmanager
def recording() -> Iterator[dict[str, list]]:
    """The fingerprint of each file of a run that is written inside, by its key: see `files.dated_fingerprint`."""
    record: dict[str, list] = {}
    token = _RECORD.set(record)
    try:
        yield record
    finally:
        _RECORD.reset(token)


def side_by_side(function: Callable[[Any], None], items: Iterable[Any]) -> None:
    """``function`` of each item in threads whose writes are recorded with the caller's."""
    with ThreadPoolExecutor(tables.IO_THREADS, initializer=_RECORD.set, initargs=(_RECORD.get(),)) as pool:
        list(pool.map(function, items))


def record_known(marks: dict[str, list]) -> None:
    """These files, of which the fingerprints are known, count as written."""
    record = _RECORD.get()
    if record is not None:
        record.update(marks)


def record_written(path: str, keys: Iterable[str]) -> None:
    record = _RECORD.get()
    if record is None:
        return
    for key in keys:
        try:
            record[key] = files.dated_fingerprint(path, key)
        except FileNotFoundError:
            record.pop(key, None)  # a shard that holds nothing is not stored


# ---------------------------------------------------------------- tables and arrays


PER_FOLDER = 4096  # files of a kind in one folder: file systems and people are slow in folders of a million


def subfolder(i: int) -> str:
    """Where in the folder of a kind the files of block or part ``i`` lie: itself for the first `PER_FOLDER`.

    >>> subfolder(17), subfolder(10_000)
    ('', '8192/')
    """
    return "" if i < PER_FOLDER else f"{i // PER_FOLDER * PER_FOLDER}/"


@dataclass(frozen=True)
class Tables(Generic[T]):
    """Tables of one kind, each in a file of its own; ``pattern`` takes their numbers."""

    path: str
    pattern: str
    kind: type[T]
    absent: Callable[..., T | None] = field(
        default=lambda *index: None, compare=False
    )  # what a block has that has no table

    def key(self, *index: int | str) -> str:
        folder, slash, name = self.pattern.rpartition("/")
        number = max((i for i in index if isinstance(i, Integral)), default=0)
        return f"{folder}{slash}{subfolder(number)}{name}".format(*index)

    def save(self, value: T, *index: int | str) -> None:
        tables.save(self.path, self.key(*index), **vars(value))
        record_written(self.path, [self.key(*index)])

    def keep(self, value: T, *index: int | str) -> None:
        """As `save`, for what a later block removes: it counts as no result of the block that writes it."""
        tables.save(self.path, self.key(*index), **vars(value))

    def load(self, *index: int | str, skip: tuple[str, ...] = ()) -> T:
        """One table; the arrays to ``skip`` come empty. Raises `DamagedFileError`."""
        if (value := self.absent(*index)) is not None:
            return value
        return load_table(self.path, self.key(*index), self.kind, skip)

    def load_each(self, indices: Iterable[Any], skip: tuple[str, ...] = (), ahead: int = 32) -> Iterator[T]:
        """The table of each index, in order, up to ``ahead`` of them read side by side."""
        numbers = (index if isinstance(index, tuple) else (index,) for index in indices)
        for stored, group in groupby(numbers, key=lambda index: self.absent(*index) is None):
            if stored:
                yield from tables.read_ahead(lambda index: self.load(*index, skip=skip), group, ahead)
            else:
                yield from (self.load(*index, skip=skip) for index in group)

    def exists(self, *index: int | str) -> bool:
        return files.exists(f"{self.path}/{self.key(*index)}")

    def remove(self, *index: int | str) -> None:
        files.remove(f"{self.path}/{self.key(*index)}")

    @property
    def folder(self) -> str:
        return self.pattern.rpartition("/")[0]

    def count(self) -> int:
        """How many tables of this kind there are."""
        return sum(key.endswith(".npz") for key in files.list_keys(self.path, self.folder))

    def remove_all(self) -> None:
        files.remove(f"{self.path}/{self.folder}")


def load_table(path: str, key: str, kind: type[T], skip: tuple[str, ...] = ()) -> T:
    try:
        return kind(**tables.load(path, key, skip))
    except FileNotFoundError:
        raise DamagedFileError(path, key, "is missing") from None
    except Exception as error:  # whatever a damaged NPZ makes the zip reader, NumPy or the constructor raise
        if isinstance(error, (UserError, OSError, MemoryError)):
            raise
        raise DamagedFileError(path, key, f"is damaged ({type(error).__name__}: {error})") from None


@dataclass(frozen=True)
class StoredArray:
    """An array of the run: z y x, or channels z y x."""

    path: str
    name: str

    def read(self, box: Box, channel: int | None = None) -> np.ndarray:
        """The voxels of ``box``: of one ``channel`` where there are several, else of all."""
        with self._readable(box):
            array = arrays.open_array(self.path, self.name)
            if channel is None:
                return np.asarray(array[(..., *box.slices)])
            return np.asarray(array[(slice(channel, channel + 1), *box.slices)])[0]  # ranges: see `arrays.open_array`

    @contextmanager
    def _readable(self, box: Box) -> Iterator[None]:
        """Raises `DamagedFileError` that names the shards under ``box`` where one of them cannot be read."""
        try:
            yield
        except (RuntimeError, ValueError, OSError, UserError) as error:
            if isinstance(error, PermissionError | DamagedFileError):
                raise
            state = f"cannot be read ({' '.join(str(error).split())[:200]})"
            raise DamagedFileError(self.path, self.keys_of(box) or (f"{self.name}/zarr.json",), state) from None

    def keys_of(self, box: Box) -> tuple[str, ...]:
        """Keys of the shards under ``box``; none where the array itself cannot be opened."""
        try:
            array = arrays.open_array(self.path, self.name)
        except (UserError, OSError, ValueError, RuntimeError):
            return ()
        return tuple(f"{self.name}/{key}" for key in arrays.shard_keys(array, box))

    def write(self, box: Box, data: np.ndarray) -> None:
        """The voxels of ``box``, which covers whole shards, are these."""
        arrays.write(arrays.open_array(self.path, self.name), box, data)
        record_written(self.path, self.keys_of(box))

    def is_empty(self, box: Box) -> bool:
        """Whether no shard under ``box`` is stored, so that every voxel there is 0; on an object store, False unasked.

        Raises `DamagedFileError` where the array itself cannot be opened.
        """
        if files.is_remote(self.path):
            return False
        with self._readable(box):
            arrays.open_array(self.path, self.name)
        return not any(files.exists(f"{self.path}/{key}") for key in self.keys_of(box))

    def clear(self, box: Box) -> None:
        """The voxels of ``box``, which covers whole shards, are 0: none of its shards is stored."""
        if files.is_remote(self.path):
            array = arrays.open_array(self.path, self.name)
            self.write(box, np.zeros((*array.shape[:-3], *box.shape), array.dtype))
            return
        keys = self.keys_of(box)
        for key in keys:
            files.remove(f"{self.path}/{key}")
        record_written(self.path, keys)

    def create(self, **layout: Any) -> None:
        arrays.create_array(self.path, self.name, **layout)

    def restore(self, **form: Any) -> None:
        """The array's description is what `create` gives it; shards that there are stay."""
        if not arrays.is_as_created(self.path, self.name, **form):
            files.remove(f"{self.path}/{self.name}/zarr.json")
            self.create(**form)

    def fingerprints(self, box: Box) -> dict[str, list]:
        """Of the shards under ``box`` that are stored, by key."""
        with recording() as record:
            record_written(self.path, self.keys_of(box))
        return record

    def drop(self, box: Box) -> None:
        """The shards under ``box`` take no room any more; each is an empty file, so that nobody reads it as 0."""
        for key in self.keys_of(box):
            if files.exists(f"{self.path}/{key}"):
                files.write_bytes(self.path, key, b"")

    def exists(self) -> bool:
        return files.exists(f"{self.path}/{self.name}")

    @property
    def described(self) -> bool:
        """Whether there is a description by which it can be opened."""
        return files.exists(f"{self.path}/{self.name}/zarr.json")

    def remove(self) -> None:
        """Nothing is left of it; the description goes first, so where it is there, so are the shards."""
        files.remove(f"{self.path}/{self.name}/zarr.json")
        files.remove(f"{self.path}/{self.name}")
