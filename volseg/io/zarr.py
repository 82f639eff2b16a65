"""Volumes in zarr arrays and OME-Zarr groups."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import zarr

from volseg.box import Blocks, Box
from volseg.errors import UserError
from volseg.io import arrays, files, ome
from volseg.io.header import MAX_UNNAMED_CHANNELS, Header, reason, shape_text, voxel_dtype

if TYPE_CHECKING:
    from volseg.io.volume import Volume

CHANNEL_NAMES = ("c", "ch", "channel", "channels")  # what a channel axis is called


def is_zarr(path: str) -> bool:
    return path.endswith(".zarr") or any(os.path.exists(os.path.join(path, name)) for name in arrays.ZARR_FILES)


def header(path: str, dataset: str, *, several: bool) -> Header:
    """What the array or group at ``path`` says; channels are told only where ``several`` may be read."""
    node = arrays.node(path, dataset)
    if isinstance(node, zarr.Group):
        dataset = _full_resolution(node, path, dataset)
        node = arrays.node(path, dataset)
    where = files.join(path, dataset)
    if isinstance(node, zarr.Group):
        raise UserError(f"{where} is a zarr group, not an array{arrays.contents(where)}")
    image, entry = _multiscales(path, dataset)
    axes = _axes(image, node)
    lead = _channel_axis(node, axes, where) if several else None
    _check_axes(node, axes, lead, where)
    shape, chunk = (
        tuple(sizes[axis] for axis in ome.space_axes(node.ndim, lead)) for sizes in (node.shape, node.chunks)
    )
    chunk = tuple(min(c, n) for c, n in zip(chunk, shape, strict=True))
    return Header(
        "zarr",
        shape,
        voxel_dtype(node.dtype, where),
        ome.voxel_size_nm(image, entry, lead),
        chunk,
        dataset=dataset,
        channels=1 if lead is None else node.shape[lead],
        channel_axis=lead,
        binary=node.dtype.kind == "b",
    )


def _full_resolution(group: zarr.Group, path: str, dataset: str) -> str:
    """Path of the first dataset of a multiscales group; for a volseg run, of its labels."""
    if (
        not dataset
        and files.exists(files.join(path, "run.json"))
        and files.exists(files.join(path, "labels/instances/0"))
    ):
        return "labels/instances/0"
    images = ome.metadata(group.attrs.asdict()).get("multiscales") or [{}]
    datasets = images[0].get("datasets") or []
    if not datasets:
        raise UserError(f"zarr group {files.join(path, dataset)} has no OME-Zarr multiscales{arrays.contents(path)}")
    return "/".join(key for key in (dataset.strip("/"), datasets[0]["path"].strip("/")) if key)


def _multiscales(path: str, dataset: str) -> tuple[dict, dict]:
    """The multiscales image that lists an array as one of its levels, and its entry; empty when none does."""
    keys = dataset.strip("/").split("/") if dataset else []
    above = [(files.join(path, *keys[:i]), "/".join(keys[i:])) for i in reversed(range(len(keys)))]
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
        return ome.metadata(arrays.node(root).attrs.asdict()).get("multiscales") or []
    except UserError:
        return []


def _axes(image: dict, array: zarr.Array) -> list[str]:
    """Names of the array's axes, lower case, "c" for channels. Where nothing names them they are t c z y x, and of four
    the first is "?"."""
    axes = [axis if isinstance(axis, str) else ome.axis_name(axis) for axis in image.get("axes", [])]
    if not axes and array.metadata.zarr_format == 3:
        axes = [name or "" for name in array.metadata.dimension_names or ()]
    if len(axes) != array.ndim or not all(axes):
        axes = ["?", *"zyx"] if array.ndim == 4 else [*("?" * (array.ndim - 5)), *"tczyx"[max(0, 5 - array.ndim) :]]
    return ["c" if axis.lower() in CHANNEL_NAMES else axis.lower() for axis in axes]


def _channel_axis(array: zarr.Array, axes: list[str], where: str) -> int | None:
    """The axis that holds the channels; None where there is none."""
    if array.ndim == 4 and "c" not in axes:
        few = [axis for axis in (0, 3) if array.shape[axis] <= MAX_UNNAMED_CHANNELS]
        if len(few) != 1:
            raise UserError(
                f"{where} is 4-D ({shape_text(array.shape)}) and no axis is named c: volseg cannot tell which one holds the "
                f"channels; name its axes, or save it as c z y x with at most {MAX_UNNAMED_CHANNELS} channels"
            )
        return few[0]
    return axes.index("c") if "c" in axes and array.ndim > 3 else None


def _check_axes(array: zarr.Array, axes: list[str], channel_axis: int | None, where: str) -> None:
    if array.ndim < 3:
        raise UserError(f"{where} is {array.ndim}-D ({shape_text(array.shape)}); volseg needs a volume with axes z y x")
    space = ome.space_axes(array.ndim, channel_axis)
    names = [axes[axis] for axis in space]
    if set(names) == set("zyx") and names != ["z", "y", "x"]:
        raise UserError(f"{where} has axes {' '.join(axes)}; volseg needs z y x last: transpose it")
    for axis, (name, n) in enumerate(zip(axes, array.shape, strict=True)):
        if n != 1 and axis not in (*space, channel_axis):
            raise UserError(
                f"{where} is {array.ndim}-D ({shape_text(array.shape)}): axis {name.replace('?', 'c')} has {n} entries and "
                "must have 1; save the wanted one as a z y x array"
            )
    if 0 in array.shape:
        raise UserError(f"{where} has no voxels: its shape is {shape_text(array.shape)}")


def read(volume: Volume, box: Box) -> np.ndarray:
    """The voxels of ``box``; names the first chunk that cannot be read."""
    array = arrays.cached_array(volume.path, volume.dataset)
    try:
        data = np.asarray(array[_index(volume, array.ndim, box.slices)])
    except Exception as error:  # a damaged chunk raises whatever its codec raises
        where = _damaged_chunk(volume, array, box) or f"box {box}"
        raise UserError(
            f"cannot read {files.join(volume.path, volume.dataset)} in box {box}: {where}: {reason(error)}; "
            "the data is damaged or unreachable: copy it again or make it anew"
        ) from error
    return np.ascontiguousarray(data, dtype=volume.dtype)


def _index(volume: Volume, ndim: int, zyx: tuple, channel: int | None = None) -> tuple:
    """Where ``zyx`` of the volume's channel stands in an array of so many axes; all others have one entry."""
    index = [0] * ndim
    if volume.channel_axis is not None:
        index[volume.channel_axis] = volume.channel if channel is None else channel
    for axis, place in zip(ome.space_axes(ndim, volume.channel_axis), zyx, strict=True):
        index[axis] = place
    return tuple(index)


def _damaged_chunk(volume: Volume, array: zarr.Array, box: Box) -> str:
    """The key of the first stored object under ``box`` that cannot be read; "" when each can, on its own."""
    space, stored = ome.space_axes(array.ndim, volume.channel_axis), array.shards or array.chunks
    grid = Blocks(volume.shape, tuple(stored[axis] for axis in space))
    row = 0 if volume.channel_axis is None else volume.channel // stored[volume.channel_axis]
    for i in grid.overlapping(box):
        try:
            array[_index(volume, array.ndim, grid[i].intersect(box).slices)]
        except Exception:  # the caller tells the cause
            return array.metadata.encode_chunk_key(_index(volume, array.ndim, grid.coords(i), row))
    return ""
