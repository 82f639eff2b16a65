"""Volumes by their path: a :class:`Volume` reads boxes (z y x) from whatever `volseg.io.formats` knows. Paths are local, or
URLs. Arrays from Python become volumes, too."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from volseg.box import Box, Triple
from volseg.config import Input
from volseg.errors import UserError, printable
from volseg.io import array_volume, arrays, files, formats, resample, zarr
from volseg.io import place as places
from volseg.io.array_volume import ArrayVolume
from volseg.io.filling import recording_filled, zeroed
from volseg.io.header import TripleNm, check_shape
from volseg.io.occupancy import Stored
from volseg.io.place import ORIGIN, Place
from volseg.io.voxels import check_inside, choose, chosen_entries, fingerprint, finite, inverted, patches

__all__ = [
    "ArrayVolume",
    "Volume",
    "isotropic",
    "levels",
    "materialize",
    "open",
    "open_channels",
    "open_input",
    "open_input_channels",
    "open_volume",
    "patches",
    "readable_by_workers",
    "resampled",
]

ISOTROPIC = 1.5  # longest edge of a voxel against its shortest, up to which all planes look alike


Opened = TypeVar("Opened", bound="Volume | ArrayVolume")


@dataclass(frozen=True)
class Volume:
    """A z y x array of voxels in a file, folder or store. Holds no handle: pickles small, opens on first read."""

    path: str
    kind: str  # one of `volseg.io.formats.MODULES`
    shape: Triple
    dtype: str
    voxel_size_nm: TripleNm | None
    chunk: Triple  # what is cheap to read at once
    dataset: str = ""  # the array inside a zarr group, an N5 container or an HDF5 file
    channel: int = 0  # which one is read, where several are stored
    channel_axis: int | None = None  # the axis of a zarr array that holds them; TIFF files say it themselves
    binary: bool = False  # stored as bool: voxels are 0 and 1
    on_bad_chunk: str = "fail"  # or "skip": 0 in the place of a chunk, strip or slice that cannot be decoded
    time: int = 0
    time_axis: int | None = None
    inverted: bool = False  # gray values are turned around when they are read
    stored_shape: Triple | None = None  # of the array whose voxels are resampled as they are read
    place: Place = (
        ORIGIN  # of the center of its first voxel in the world that the file speaks of, in voxels: see `place`
    )
    notes: tuple[str, ...] = field(default=(), compare=False)  # what was decided when it was opened, a line each

    def read(self, box: Box) -> np.ndarray:
        """The voxels of ``box``.

        Parameters
        ----------
        box
            Inside the volume, z y x.

        Returns
        -------
        numpy.ndarray
            A new array of ``box.shape`` and ``self.dtype``; bool comes as uint8 0 and 1.

        Raises
        ------
        UserError
            Names file and box where a chunk or page is damaged, or holds NaN or infinity.
        """
        check_inside(self, box, self.path)
        if self.stored_shape:
            stored = replace(self, shape=self.stored_shape, stored_shape=None)
            return resample.resample(stored.read, stored.shape, self.dtype, self.shape, box)
        with recording_filled() as filled:
            data = finite(formats.read(self, box), box, self.path)
        return zeroed(inverted(data, self.binary), box, filled) if self.inverted else data

    def stored(self) -> Stored | None:
        """Which of its chunks or shards are stored, where those that are not hold 0; None where only reading tells."""
        plain = self.kind == "zarr" and not self.stored_shape and not self.inverted
        return zarr.stored(self) if plain else None

    @property
    def origin_nm(self) -> TripleNm:
        """Where the center of the first voxel lies in the world that the file speaks of, z y x in nm; 0 where it says nothing.

        OME-Zarr's translation, the origin of NRRD, NIfTI and MRC, N5's and HDF5's offset and coordinates of xarray are centers
        as they are. Neuroglancer's voxel_offset and Imaris' extent are corners: half a voxel is added. A volume whose voxel
        size nobody knows has 0; ``place`` is the same in voxels.
        """
        return places.nm(self.place, self.voxel_size_nm) if self.voxel_size_nm else ORIGIN

    @property
    def chosen(self) -> dict[int, int]:
        """Which entry is read of each axis of a zarr array that is not z, y or x."""
        return chosen_entries(self)

    def checksum(self) -> str:
        """Fingerprint of the voxels: shape, type and 16 patches spread over the volume, whatever the file format."""
        return fingerprint(self)


def isotropic(voxel_size_nm: TripleNm) -> bool:
    """Whether voxels are about as long along z as in the plane: the longest edge at most `ISOTROPIC` times the shortest.

    >>> isotropic((5.0, 4.0, 4.0)), isotropic((50.0, 4.6, 4.6))
    (True, False)
    """
    return max(voxel_size_nm) <= ISOTROPIC * min(voxel_size_nm)


def open(
    path: str | Path,
    *,
    dataset: str = "",
    voxel_size_nm: TripleNm | None = None,
    channel: int | None = None,
    time: int | None = None,
    invert: bool = False,
    allow_gaps: bool = False,
) -> Volume:
    """The volume at ``path``; reads headers only.

    Parameters
    ----------
    path
        Whatever `volseg.io.formats` reads: local, or a URL. ``file::/inside`` names a dataset of a file.
    dataset
        An array (or multiscales group) inside a zarr group, an N5 container or an HDF5 file; "" takes the full resolution of
        an image, the labels of a volseg run, or the only volume of a file.
    voxel_size_nm
        z y x; overrides what the file says.
    channel
        Which of several channels, counted from 0; None refuses several.
    time
        Which of several times, counted from 0; None refuses several.
    invert
        Whether gray values are turned around: bright becomes dark, see :func:`volseg.io.voxels.inverted`.
    allow_gaps
        Whether a folder of slices may lack some, by its numbers; those there become neighbors.

    Raises
    ------
    UserError
        For all that is not a volume.
    """
    volumes = _volumes(path, dataset, voxel_size_nm, time, several=channel is not None, allow_gaps=allow_gaps)
    number, note = choose(volumes[0].path, "channel", len(volumes), channel)
    chosen = volumes[number]
    return turned(replace(chosen, notes=(*chosen.notes, *map(printable, note))), invert)


def open_channels(
    path: str | Path,
    *,
    dataset: str = "",
    voxel_size_nm: TripleNm | None = None,
    time: int | None = None,
    allow_gaps: bool = False,
) -> tuple[Volume, ...]:
    """One volume for each channel at ``path``, in the order stored; a volume without channels comes alone.

    The channels of a zarr array lie along the axis called c or channel; of four axes without such a name, along the first or
    the last, whichever is short: see `axes.channel_axis`. In a TIFF file they are its axis C, its samples, or the shorter of
    two unnamed stack axes. The rest is as in :func:`open`.
    """
    return _volumes(path, dataset, voxel_size_nm, time, several=True, allow_gaps=allow_gaps)


def open_volume(
    source: Any,
    *,
    dataset: str = "",
    voxel_size_nm: TripleNm | None = None,
    axes: str | Sequence[str] = "",
    channel: int | None = None,
    time: int | None = None,
    invert: bool = False,
    allow_gaps: bool = False,
) -> Volume | ArrayVolume:
    """The volume in ``source``: a path, a `Volume`, or an array; reads headers only.

    Parameters
    ----------
    source
        What :func:`open` takes; or an array of numpy, zarr or dask, or anything with ``shape``, ``dtype`` and slices, with
        axes z y x. A zarr array in a folder or on an object store is opened by its path.
    dataset, channel, time, invert, allow_gaps
        As in :func:`open`; an array has no ``dataset``.
    voxel_size_nm
        z y x; overrides what the source says.
    axes
        Names of an array's axes, such as "czyx". Without them four axes are c z y x.

    Returns
    -------
    Volume or ArrayVolume
        Both read boxes and have a checksum. Workers cannot read an `ArrayVolume`: `materialize` it first.

    Raises
    ------
    UserError
        For all that is not a volume, in one line.

    Examples
    --------
    >>> cells = open_volume(np.zeros((8, 64, 64), np.uint8), voxel_size_nm=(50, 5, 5))
    >>> cells.shape, cells.dtype, cells.voxel_size_nm
    ((8, 64, 64), 'uint8', (50.0, 5.0, 5.0))
    """
    if isinstance(source, (str, PathLike)):
        return open(
            source,
            dataset=dataset,
            voxel_size_nm=voxel_size_nm,
            channel=channel,
            time=time,
            invert=invert,
            allow_gaps=allow_gaps,
        )
    if isinstance(source, (Volume, ArrayVolume)):
        if voxel_size_nm:
            source = replace(source, voxel_size_nm=_size_nm(voxel_size_nm))
        return turned(source, invert)
    if (stored := arrays.location(source)) is not None:
        path, name = stored
        name = files.join_keys(name, dataset)
        return open(path, dataset=name, voxel_size_nm=voxel_size_nm, channel=channel, time=time, invert=invert)
    if not all(hasattr(source, name) for name in ("shape", "dtype", "__getitem__")):
        raise UserError(
            f"a volume is a path or an array with axes z y x, such as numpy's, zarr's or dask's; a {type(source).__name__} "
            "is neither"
        )
    size = _size_nm(voxel_size_nm)
    return turned(array_volume.wrap(source, voxel_size_nm=size, names=axes, channel=channel, time=time), invert)


def open_input(source: Any, settings: Input) -> Volume | ArrayVolume:
    """What :func:`open_volume` opens, as the settings of ``[input]`` say."""
    opened = open_volume(
        source,
        dataset=settings.dataset,
        voxel_size_nm=settings.voxel_size_nm,
        channel=settings.channel,
        time=settings.time,
        invert=settings.invert,
        allow_gaps=settings.allow_gaps,
    )
    return replace(opened, on_bad_chunk=settings.on_bad_chunk) if isinstance(opened, Volume) else opened


def open_input_channels(source: Any, settings: Input) -> tuple[Volume | ArrayVolume, ...]:
    """Every channel of a path or an array, as :func:`open_channels` and :func:`open_volume` open it by the settings.

    A zarr array in a folder or on an object store is opened by its path.
    """
    dataset = settings.dataset
    if not isinstance(source, (str, PathLike)) and (stored := arrays.location(source)) is not None:
        source, dataset = stored[0], files.join_keys(stored[1], dataset)
    size = settings.voxel_size_nm
    if isinstance(source, (str, PathLike)):
        channels = open_channels(
            source, dataset=dataset, voxel_size_nm=size, time=settings.time, allow_gaps=settings.allow_gaps
        )
        return tuple(replace(channel, on_bad_chunk=settings.on_bad_chunk) for channel in channels)
    opened = open_volume(source, voxel_size_nm=size, channel=0, time=settings.time)
    if not isinstance(opened, ArrayVolume) or opened.channel_axis is None:
        return (opened,)
    return tuple(replace(opened, channel=number) for number in range(opened.array.shape[opened.channel_axis]))


def turned(source: Opened, invert: bool) -> Opened:
    """``source``, or where ``invert``, the same with its gray values turned around."""
    if not invert:
        return source
    dtype = np.dtype(source.dtype)
    rule = "negated" if dtype.kind == "f" else f"taken from {1 if source.binary else np.iinfo(dtype).max}"
    rule = rule if dtype.kind != "i" else "turned about -0.5"
    where = source.path if isinstance(source, Volume) else source.name
    note = printable(f"{where}: contrast is turned as input.invert says: gray values are {rule}")
    return replace(source, inverted=not source.inverted, notes=(*source.notes, note))


def levels(source: Volume) -> tuple[Volume, ...]:
    """The resolution levels of an OME-Zarr image, finest first, from the one that ``source`` reads; else it alone.

    Raises
    ------
    UserError
        A level that the metadata list is no volume.
    """
    if source.kind != "zarr" or source.voxel_size_nm is None:
        return (source,)
    found = [source]
    for dataset, scale in zarr.coarser_levels(source.path, source.dataset, source.channel_axis, source.time_axis):
        size = tuple(n * factor for n, factor in zip(source.voxel_size_nm, scale, strict=True))
        level = zarr.header(source.path, dataset, several=True)
        if level.dtype == source.dtype and level.channels > source.channel:
            found.append(
                replace(
                    source, shape=level.shape, chunk=level.chunk, dataset=level.dataset, voxel_size_nm=size,
                    place=places.regridded(source.place, source.voxel_size_nm, size),
                )
            )  # fmt: skip
    return tuple(found)


def resampled(source: Volume, shape: Triple) -> Volume:
    """The volume in ``shape`` voxels of the same space, made as it is read: see `resample`.

    Raises
    ------
    UserError
        There is no voxel size, or ``shape`` has too many voxels.

    Examples
    --------
    A volume of 10 x 8 x 8 nm in voxels of 5 x 4 x 4 nm has ``resampled(source, tuple(2 * n for n in source.shape))``.
    """
    if source.voxel_size_nm is None:
        raise UserError(
            f"{source.path} does not say how large its voxels are: give --voxel-nm z,y,x (input.voxel_size_nm)"
        )
    check_shape(shape, f"{source.path}, resampled,")
    scale = [n / m for n, m in zip(source.shape, shape, strict=True)]
    size = tuple(n * s for n, s in zip(source.voxel_size_nm, scale, strict=True))
    chunk = tuple(max(1, min(m, round(c / s))) for c, m, s in zip(source.chunk, shape, scale, strict=True))
    begin = places.regridded(source.place, source.voxel_size_nm, size)
    return replace(source, shape=shape, voxel_size_nm=size, chunk=chunk, stored_shape=source.shape, place=begin)


def materialize(volume: Volume | ArrayVolume, path: str | Path) -> Volume:
    """A volume that workers can read: ``volume`` itself or, of an array in memory, its copy at ``path``.

    Parameters
    ----------
    volume
        From :func:`open_volume`.
    path
        Where the copy, an OME-Zarr image, is made: a folder or an fsspec URL. A finished copy of the same voxels is
        taken as it is; anything else there is removed.

    Returns
    -------
    Volume
        Its checksum is that of ``volume``.

    Raises
    ------
    UserError
        The array cannot be read, holds NaN or infinity, or the copy cannot be written.
    """
    if isinstance(volume, Volume):
        return volume
    array_volume.copy(volume, path)
    copied = open(path, dataset="0", voxel_size_nm=volume.voxel_size_nm)
    return replace(copied, place=volume.place, notes=volume.notes)


@contextmanager
def readable_by_workers(source: Any, settings: Input, out: str) -> Iterator[Volume]:
    """The volume in ``source`` as workers can read it: an array in memory is copied beside ``out``, for as long as this lasts.

    It stays where a run does not end, which goes on from it.
    """
    opened = open_input(source, settings)
    if isinstance(opened, Volume):
        yield opened
        return
    copy = f"{out}.input.zarr"
    yield materialize(opened, copy)
    files.remove(copy)


def _size_nm(size: Sequence[float] | None) -> TripleNm | None:
    """Three lengths that a user gave."""
    if size is None:
        return None
    try:
        z, y, x = (float(n) for n in size)
    except (TypeError, ValueError):
        raise UserError(f"voxel_size_nm = {size!r} is not three numbers (z y x)") from None
    if not all(isfinite(n) and n > 0 for n in (z, y, x)):
        raise UserError(f"voxel_size_nm = {size!r} must be three lengths above 0 (z y x)")
    return z, y, x


def _volumes(
    path: str | Path,
    dataset: str,
    voxel_size_nm: TripleNm | None,
    time: int | None = None,
    *,
    several: bool,
    allow_gaps: bool = False,
) -> tuple[Volume, ...]:
    place, inside = formats.split(os.fspath(path))
    path, dataset = files.absolute(place), files.join_keys(inside, dataset)
    header = formats.header(path, dataset, several=several, allow_gaps=allow_gaps)
    size = _size_nm(voxel_size_nm) or header.voxel_size_nm
    instant, note = choose(path, "time", header.times, time)
    notes = (*header.notes, *map(printable, note))
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
            time=instant,
            time_axis=header.time_axis,
            inverted=header.inverted,
            place=header.place,
            notes=notes if voxel_size_nm else (*notes, *header.size_notes),
        )
        for channel in range(header.channels)
    )
