"""Volumes from Python: arrays of numpy, zarr or dask, and whatever has a shape, a dtype and slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import numpy as np

from volseg.box import Box, Triple
from volseg.errors import UserError
from volseg.io import arrays, axes, files, ome
from volseg.io.header import TripleNm, check_shape, reason, shape_text, voxel_dtype
from volseg.io.place import ORIGIN, Place, from_coordinates, nm
from volseg.io.voxels import check_inside, choose, chosen_entries, fingerprint, finite, inverted

CHUNK = (32, 256, 256)  # voxels that are compressed together
REGION = (64, 512, 512)  # voxels that are read and written together, unless the array's own blocks are larger
COPY = "volseg_copy"  # the attribute that a finished copy has: its fingerprint


@dataclass(frozen=True)
class ArrayVolume:
    """A z y x array of voxels that this process alone can read: `materialize` writes it where workers can, too."""

    array: Any
    name: str  # in messages
    shape: Triple
    dtype: str
    voxel_size_nm: TripleNm | None
    channel_axis: int | None = None
    channel: int = 0
    binary: bool = False
    time_axis: int | None = None
    time: int = 0
    inverted: bool = False
    place: Place = ORIGIN
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def origin_nm(self) -> TripleNm:
        """Where the center of the first voxel lies, as `Volume.origin_nm`: what the coordinates of an xarray tell."""
        return nm(self.place, self.voxel_size_nm) if self.voxel_size_nm else ORIGIN

    @property
    def chosen(self) -> dict[int, int]:
        """Which entry is read of each axis that is not z, y or x."""
        return chosen_entries(self)

    def read(self, box: Box) -> np.ndarray:
        """The voxels of ``box``, as `Volume.read` gives them."""
        check_inside(self, box, self.name)
        index = axes.index(len(self.array.shape), box.slices, self.chosen)
        try:
            data = np.asarray(self.array[index])
        except Exception as error:  # whatever the array's own library raises
            raise UserError(f"cannot read {self.name} in box {box}: {reason(error)}") from error
        if data.shape != box.shape:
            raise UserError(
                f"{self.name} gives {shape_text(data.shape)} voxels for box {box} of {shape_text(box.shape)}; "
                "give one that is indexed like a numpy array"
            )
        voxels = finite(np.array(data, dtype=self.dtype, order="C"), box, self.name)
        return inverted(voxels, self.binary) if self.inverted else voxels

    def checksum(self) -> str:
        """The fingerprint that a file of these voxels has."""
        return fingerprint(self)


def wrap(
    array: Any,
    *,
    voxel_size_nm: TripleNm | None = None,
    names: str | Sequence[str] = "",
    channel: int | None = None,
    time: int | None = None,
) -> ArrayVolume:
    """The volume that an array holds; nothing of it is read.

    ``names`` are those of its axes, such as "czyx". Raises `UserError` as for files.
    """
    name = f"the {type(array).__module__.partition('.')[0]} array"
    try:
        shape, dtype = tuple(int(n) for n in array.shape), np.dtype(array.dtype)
    except (TypeError, ValueError) as error:  # dask does not know every shape, and torch's types are not numpy's
        raise UserError(f"{name} has no shape or type that numpy understands: {reason(error)}") from None
    if isinstance(array, np.ma.MaskedArray):
        raise UserError(f"{name} is masked; fill its masked voxels, for instance with array.filled(0)")
    if names and len(names) != len(shape):
        raise UserError(f"axes {' '.join(names)} name {len(names)} axes, but {name} is {shape_text(shape)}")
    named = axes.axis_names(list(names), len(shape))
    lead = axes.channel_axis(shape, named, name) if channel is not None or "c" in named else None
    times = axes.time_axis(named, lead)
    axes.check(shape, named, lead, name, times)
    entry, note = choose(name, "channel", 1 if lead is None else shape[lead], channel)
    instant, instant_note = choose(name, "time", 1 if times is None else shape[times], time)
    zyx = tuple(shape[axis] for axis in axes.space(len(shape), lead, times))
    check_shape(zyx, name)
    return ArrayVolume(
        array, name, zyx, voxel_dtype(dtype, name), voxel_size_nm, lead, entry, binary=dtype.kind == "b",
        time_axis=times, time=instant, place=_place(array, axes.space(len(shape), lead, times)), notes=(*note, *instant_note),
    )  # fmt: skip


def _place(array: Any, space: list[int]) -> Place:
    """What the coordinates of an array of xarray tell; the origin of any other array."""
    dims, coords = getattr(array, "dims", ()), getattr(array, "coords", {})
    if not isinstance(dims, tuple) or not all(len(dims) > axis and dims[axis] in coords for axis in space):
        return ORIGIN
    return from_coordinates([coords[dims[axis]] for axis in space])


def copy(source: ArrayVolume, path: str | Path) -> None:
    """An OME-Zarr image at ``path`` holds the voxels of ``source``; one that does already is left as it is.

    The array is read once, region by region. Each region holds whole blocks of the array, so that dask computes none twice;
    the fingerprint is that of the copy.
    """
    path = files.absolute(path)
    if _holds(path, source):
        return
    regions = _regions(source)
    shard = tuple(max(lengths) for lengths in regions)
    try:
        files.remove(path)
        arrays.create_group(path)
        arrays.create_array(
            path,
            "0",
            shape=source.shape,
            dtype=bool if source.binary else source.dtype,
            chunk=CHUNK,
            shard=shard,
            axes="zyx",
        )
        target = arrays.open_array(path, "0")
        for box in _boxes(regions):
            target[box.slices] = source.read(box)
        size = source.voxel_size_nm
        levels, begin = [("0", size or (1.0, 1.0, 1.0))], nm(source.place, size or (1.0, 1.0, 1.0))
        attributes = ome.multiscales("image", "zyx", levels, unit="nanometer" if size else "", begin=begin)
        copied = replace(source, array=target, channel_axis=None, time_axis=None, inverted=False)
        arrays.set_group_attributes(path, "", {**attributes, COPY: copied.checksum()})
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}; make room, or give another output path") from error


def _holds(path: str, source: ArrayVolume) -> bool:
    """Whether a finished copy of ``source`` is at ``path``."""
    if not files.exists(path):
        return False
    try:
        return arrays.group_attributes(path).get(COPY) == source.checksum()
    except UserError:  # whatever is there is no zarr group
        return False


def _regions(source: ArrayVolume) -> list[list[int]]:
    """How the volume is cut along z, y and x: lengths of whole blocks of the array, together up to `REGION`."""
    array = source.array
    blocks = getattr(array, "shards", None) or getattr(array, "chunks", None)
    ndim = len(array.shape)
    if not isinstance(blocks, tuple) or len(blocks) != ndim:
        blocks = (1,) * ndim
    space = axes.space(ndim, *source.chosen)
    return [_grouped(blocks[axis], n, most) for axis, n, most in zip(space, source.shape, REGION, strict=True)]


def _grouped(blocks: int | tuple[int, ...], length: int, most: int) -> list[int]:
    """Lengths of runs of whole blocks along an axis: each run up to ``most``, or one block where that is longer.

    >>> _grouped(10, 64, 32), _grouped((50, 7, 7, 40), 104, 32)
    ([30, 30, 4], [50, 14, 40])
    """
    if isinstance(blocks, tuple):
        out: list[int] = []
        for n in blocks:
            if out and out[-1] + n <= most:
                out[-1] += n
            else:
                out.append(n)
        return out
    step = min(length, max(1, most // blocks) * blocks)
    return [step] * (length // step) + [length % step] * bool(length % step)


def _boxes(regions: list[list[int]]) -> list[Box]:
    spans = [list(zip([0, *accumulate(lengths)], accumulate(lengths), strict=False)) for lengths in regions]
    return [Box(*zip(*spans_zyx, strict=True)) for spans_zyx in product(*spans)]
