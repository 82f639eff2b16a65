"""Volumes in zarr arrays and OME-Zarr groups."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import zarr

from volseg.box import Blocks, Box
from volseg.errors import UserError
from volseg.io import arrays, axes, files, ome
from volseg.io.header import Header, reason, voxel_dtype

if TYPE_CHECKING:
    from volseg.io.volume import Volume


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
    names = _axis_names(image, node)
    lead = axes.channel_axis(node.shape, names, where) if several else None
    axes.check(node.shape, names, lead, where)
    space = axes.space(node.ndim, lead)
    shape, chunk = (tuple(sizes[axis] for axis in space) for sizes in (node.shape, node.chunks))
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
    for root, name in above or [path.rpartition("/")[::2]]:
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


def _axis_names(image: dict, array: zarr.Array) -> list[str]:
    """Names of the array's axes: from OME metadata, else from zarr 3's own."""
    names = [axis if isinstance(axis, str) else ome.axis_name(axis) for axis in image.get("axes", [])]
    if not names and array.metadata.zarr_format == 3:
        names = list(array.metadata.dimension_names or ())
    return axes.axis_names(names, array.ndim)


def read(volume: Volume, box: Box) -> np.ndarray:
    """The voxels of ``box``; names the first chunk that cannot be read."""
    array = arrays.cached_array(volume.path, volume.dataset)
    try:
        data = np.asarray(array[axes.index(array.ndim, box.slices, volume.channel_axis, volume.channel)])
    except Exception as error:  # a damaged chunk raises whatever its codec raises
        where = _damaged_chunk(volume, array, box) or f"box {box}"
        raise UserError(
            f"cannot read {files.join(volume.path, volume.dataset)} in box {box}: {where}: {reason(error)}; "
            "the data is damaged or unreachable: copy it again or make it anew"
        ) from error
    return np.ascontiguousarray(data, dtype=volume.dtype)


def _damaged_chunk(volume: Volume, array: zarr.Array, box: Box) -> str:
    """The key of the first stored object under ``box`` that cannot be read; "" when each can, on its own."""
    space, stored = axes.space(array.ndim, volume.channel_axis), array.shards or array.chunks
    grid = Blocks(volume.shape, tuple(stored[axis] for axis in space))
    row = 0 if volume.channel_axis is None else volume.channel // stored[volume.channel_axis]
    for i in grid.overlapping(box):
        try:
            array[axes.index(array.ndim, grid[i].intersect(box).slices, volume.channel_axis, volume.channel)]
        except Exception:  # the caller tells the cause
            return array.metadata.encode_chunk_key(axes.index(array.ndim, grid.coords(i), volume.channel_axis, row))
    return ""
