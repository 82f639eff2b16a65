"""Volumes in zarr arrays and OME-Zarr groups."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from volseg.box import Blocks, Box, Triple
from volseg.errors import UserError, printable
from volseg.io import arrays, axes, files, ome
from volseg.io import place as places
from volseg.io.filling import ADVICE, SKIP, record_filled, undecodable
from volseg.io.header import Header, check_shape, decoding_room, packing, reason, shape_text, voxel_dtype
from volseg.io.occupancy import Stored
from volseg.io.voxels import patches

if TYPE_CHECKING:
    from volseg.io.volume import Volume


MAX_LEVEL_NAME = 1000  # characters of a level's path
MOST_STORED = 1 << 26  # chunks or shards of an array of which it is known at once which are there


def is_zarr(path: str) -> bool:
    return path.endswith(".zarr") or any(os.path.exists(os.path.join(path, name)) for name in arrays.ZARR_FILES)


def header(path: str, dataset: str, *, several: bool) -> Header:
    """What the array or group at ``path`` says; channels are told only where ``several`` may be read."""
    node = arrays.node(path, dataset)
    notes: tuple[str, ...] = ()
    if isinstance(node, zarr.Group):
        dataset, notes = _full_resolution(node, path, dataset)
        node = arrays.node(path, dataset)
    where = files.join(path, dataset)
    if isinstance(node, zarr.Group):
        raise UserError(f"{where} is a zarr group, not an array{arrays.contents(where)}")
    check_shape(node.shape, where)
    check_shape(node.chunks, f"a chunk of {where}")
    if 0 in node.chunks:
        raise UserError(f"{where} has chunks of {shape_text(node.chunks)}: its metadata are damaged")
    image, level, odd = _multiscales(path, dataset)
    names = _axis_names(image, node)
    lead = axes.channel_axis(node.shape, names, where) if several or "c" in names else None
    time = axes.time_axis(names, lead)
    axes.check(node.shape, names, lead, where, time)
    space = axes.space(node.ndim, lead, time)
    shape, chunk = (tuple(sizes[axis] for axis in space) for sizes in (node.shape, node.chunks))
    size, size_notes = image.voxel_size_nm(level, where, node.ndim, lead, time)
    turned, packed = packing(node.attrs, where)
    return Header(
        "zarr",
        shape,
        voxel_dtype(node.dtype, where),
        size,
        tuple(min(c, n) for c, n in zip(chunk, shape, strict=True)),
        dataset=dataset,
        channels=1 if lead is None else node.shape[lead],
        channel_axis=lead,
        times=1 if time is None else node.shape[time],
        time_axis=time,
        binary=node.dtype.kind == "b",
        notes=tuple(
            dict.fromkeys(
                (
                    *notes,
                    *odd,
                    *packed,
                    *_nothing_stored(path, dataset, shape, space),
                )
            )
        ),
        inverted=turned,
        place=_place(image, level, path, dataset, space),
        size_notes=size_notes,
    )


def _full_resolution(group: zarr.Group, path: str, dataset: str) -> tuple[str, tuple[str, ...]]:
    """Path of the first dataset of a multiscales group, or of a volseg run's labels; and what was odd in its metadata."""
    run, labels = files.join(path, "run.json"), files.join(path, "labels/instances/0")
    if not dataset and files.exists(run) and files.exists(labels):
        return "labels/instances/0", ()
    where = files.join(path, dataset)
    images, notes = ome.images(group.attrs.asdict(), where)
    if not images or not images[0].datasets or not images[0].datasets[0].path.strip("/"):
        odd = "".join(f"; {note}" for note in notes[:1])
        raise UserError(f"zarr group {where} has no OME-Zarr multiscales{arrays.contents(path)}{odd}")
    first = _finest(images[0].datasets)
    if first != images[0].datasets[0]:
        notes = (*notes, printable(f"{where} does not list its finest level first: {first.path[:200]} is read"))
    level = "/".join(part for part in first.path.split("/") if part not in ("", "."))
    if len(level) > MAX_LEVEL_NAME:
        raise UserError(
            f"zarr group {where} lists a level whose name has {len(level)} characters: its metadata are damaged"
        )
    return files.join_keys(dataset, level), notes


def _finest(levels: tuple[ome.Dataset, ...]) -> ome.Dataset:
    """The level of the smallest voxels; the first one where they do not all say that."""
    steps = [[step.scale for step in level.coordinateTransformations if step.type == "scale"] for level in levels]
    if not all(len(one) == 1 and all(n > 0 for n in one[0]) for one in steps):
        return levels[0]
    sizes = [prod(one[0]) for one in steps]
    finest = levels[sizes.index(min(sizes))]
    return finest if finest.path.strip("/") else levels[0]


def _multiscales(path: str, dataset: str) -> tuple[ome.Image, ome.Dataset, tuple[str, ...]]:
    """The multiscales image that lists an array as one of its levels, the level, and what was odd; empty when none does."""
    keys = dataset.strip("/").split("/") if dataset else []
    above = [(files.join(path, *keys[:i]), "/".join(keys[i:])) for i in reversed(range(len(keys)))]
    for root, name in above or [path.rpartition("/")[::2]]:
        images, notes = _images(root)
        for image in images:
            for level in image.datasets:
                if "/".join(part for part in level.path.split("/") if part not in ("", ".")) == name:
                    return image, level, notes
    return ome.Image(), ome.Dataset(), ()


def coarser_levels(path: str, dataset: str, *other_axes: int | None) -> list[tuple[str, tuple[float, ...]]]:
    """The levels of an image that follow the array ``dataset``, finest first: each one's path below ``path``, and how many
    times as long its voxels are along z y x, which are not ``other_axes``. None where the metadata do not tell all that."""
    image, level, _ = _multiscales(path, dataset)
    keys = dataset.strip("/").split("/")
    above = keys[: len(keys) - len(level.path.strip("/").split("/"))]
    if not dataset or level not in image.datasets:
        return []
    space = axes.space(len(image.axes), *other_axes)
    own = _scale(level, space)
    found = []
    for other in image.datasets[image.datasets.index(level) + 1 :]:
        scale = _scale(other, space)
        if own and scale and other.path.strip("/"):
            ratio = tuple(b / a for a, b in zip(own, scale, strict=True))
            found.append(("/".join([*above, other.path.strip("/")]), ratio))
    return [(name, ratio) for name, ratio in found if min(ratio) > 0.99 and max(ratio) > 1.01]


def _scale(level: ome.Dataset, space: tuple[int, ...]) -> tuple[float, ...] | None:
    """The scale of a level along z y x; None where it has none above 0."""
    steps = [step.scale for step in level.coordinateTransformations if step.type == "scale"]
    if len(steps) != 1 or len(space) != 3 or len(steps[0]) <= max(space):
        return None
    scale = tuple(abs(steps[0][axis]) for axis in space)
    return scale if min(scale) > 0 else None


def _images(root: str) -> tuple[tuple[ome.Image, ...], tuple[str, ...]]:
    """The multiscales of the group at ``root``; none where there is no group."""
    if not root or root.endswith(":/"):
        return (), ()
    try:
        return ome.images(arrays.node(root).attrs.asdict(), root)
    except UserError:
        return (), ()


def _axis_names(image: ome.Image, array: zarr.Array) -> list[str]:
    """Names of the array's axes: from OME metadata, else from zarr 3's own, else as xarray writes them."""
    told = _told_names(image, array)
    return axes.axis_names([name if isinstance(name, str) else "" for name in told], array.ndim)


def _told_names(image: ome.Image, array: zarr.Array) -> Any:
    """The same as they are written; empty where they are not."""
    told: Any = image.axis_names
    if not told and array.metadata.zarr_format == 3:
        told = array.metadata.dimension_names
    if not told and not isinstance(told := array.attrs.get("_ARRAY_DIMENSIONS"), list):
        told = ()
    return told


def _place(image: ome.Image, level: ome.Dataset, path: str, dataset: str, space: list[int]) -> places.Place:
    """Where the first voxel's center lies: by the OME metadata, or an offset among the attributes, or xarray's coordinates."""
    array = arrays.cached_array(path, dataset)
    if image.datasets:
        return image.place(level, array.ndim, space)
    attributes = array.attrs.asdict()
    if "offset" in attributes:
        return places.from_attributes(attributes, array.ndim, space)
    names, above = _told_names(image, array), files.join(path, dataset).rpartition("/")[0]
    if len(names) != array.ndim or not above or above.endswith(":/"):
        return places.ORIGIN
    coordinates = []
    for axis in space:
        if not any(files.exists(files.join(above, f"{names[axis]}/{key}")) for key in ("zarr.json", ".zarray")):
            return places.ORIGIN
        try:
            beside: Any = arrays.node(above, str(names[axis]))
            coordinates.append(np.asarray(beside[:]) if beside.shape == (array.shape[axis],) else None)
        except Exception:  # it cannot be decoded
            return places.ORIGIN
    return places.from_coordinates(coordinates)


def _nothing_stored(path: str, dataset: str, shape: Triple, space: list[int]) -> list[str]:
    """A note where not a single chunk is stored: a copy that took the metadata alone, or keys of another kind."""
    array = arrays.cached_array(path, dataset)
    stored = array.shards or array.chunks
    grid = Blocks(shape, tuple(stored[axis] for axis in space))
    places = {i for box in patches(shape) for i in grid.overlapping(box)}
    others = {axis: 0 for axis in range(array.ndim) if axis not in space}
    keys = (array.metadata.encode_chunk_key(axes.index(array.ndim, grid.coords(i), others)) for i in places)
    if arrays.stores_chunks(array, path, dataset, keys):
        return []
    value = array.metadata.fill_value
    return [printable(f"{files.join(path, dataset)} stores no chunk: every voxel is its fill value, {value!s}")]


def stored(volume: Volume) -> Stored | None:
    """Which chunks or shards are there, from one listing; None where others may hold something, too, or are too many."""
    array = arrays.cached_array(volume.path, volume.dataset)
    value = array.metadata.fill_value
    if value is None or value != 0 or arrays.archive_of(volume.path):
        return None
    space, sizes = axes.space(array.ndim, *volume.chosen), array.shards or array.chunks
    grid = Blocks(volume.shape, tuple(sizes[axis] for axis in space))
    if len(grid) > MOST_STORED:
        return None
    there, chosen = np.zeros(grid.counts, bool), {axis: n // sizes[axis] for axis, n in volume.chosen.items()}
    for key in files.list_keys(files.join(volume.path, volume.dataset)):
        coords = tuple(int(digits) for digits in re.findall(r"\d+", key.removeprefix("c")))
        if len(coords) == array.ndim and array.metadata.encode_chunk_key(coords) == key:
            zyx = tuple(coords[axis] for axis in space)
            if coords == axes.index(array.ndim, zyx, chosen) and all(
                c < n for c, n in zip(zyx, grid.counts, strict=True)
            ):
                there[zyx] = True
    return Stored(grid, there)


def read(volume: Volume, box: Box) -> np.ndarray:
    """The voxels of ``box``; names the first chunk that cannot be read, or fills it where the volume is to be read so."""
    array = arrays.cached_array(volume.path, volume.dataset)
    where = files.join(volume.path, volume.dataset)
    try:
        with decoding_room(prod(array.chunks) * array.dtype.itemsize, f"a chunk of {where}"):
            data = (_filled if volume.on_bad_chunk == SKIP else _voxels)(volume, array, box)
    except Exception as error:  # a damaged chunk raises whatever its codec raises
        if isinstance(error, UserError):
            raise
        chunk = _damaged_chunk(volume, array, box) or f"box {box}"
        raise UserError(
            f"cannot read {where} in box {box}: {chunk}: {reason(error)}; "
            f"the data is damaged or unreachable: copy it again or make it anew{ADVICE * undecodable(error)}"
        ) from error
    return np.ascontiguousarray(data, dtype=volume.dtype)


def _voxels(volume: Volume, array: zarr.Array, box: Box) -> np.ndarray:
    index = axes.index(array.ndim, box.slices, volume.chosen)
    if arrays.is_local(array):
        folder = files.join(volume.path, volume.dataset)
        stored = _stored_objects(volume, array, box)
        arrays.check_chunks(array, folder, ((key, partial(_meets, array, index, origin)) for key, origin in stored))
    ranges = tuple(place if isinstance(place, slice) else slice(place, place + 1) for place in index)
    return np.asarray(array[ranges]).reshape(box.shape)


def _filled(volume: Volume, array: zarr.Array, box: Box) -> np.ndarray:
    """The voxels of ``box``, 0 in each chunk that cannot be decoded.

    Chunks are read whole, a layer of them at once: some codecs find damage only in what they decode.
    """
    out = np.empty(box.shape, volume.dtype)
    chunks = Blocks(volume.shape, tuple(array.chunks[axis] for axis in axes.space(array.ndim, *volume.chosen)))
    depth = chunks.block[0]
    for z in range(box.start[0] // depth * depth, box.stop[0], depth):
        layer = Box((z, *box.start[1:]), (z + depth, *box.stop[1:]))
        layer = _whole_chunks(chunks, layer.intersect(box))
        try:
            voxels = _voxels(volume, array, layer)
        except Exception as error:  # whatever a codec raises
            if not undecodable(error):
                raise
            voxels = np.empty(layer.shape, volume.dtype)
            for i in chunks.overlapping(layer):
                voxels[chunks[i].slices_within(layer)] = _voxels_or_none(volume, array, chunks[i])
        both = layer.intersect(box)
        out[both.slices_within(box)] = voxels[both.slices_within(layer)]
    return out


def _whole_chunks(chunks: Blocks, box: Box) -> Box:
    """All chunks that hold a voxel of ``box``."""
    start = tuple(a // n * n for a, n in zip(box.start, chunks.block, strict=True))
    return Box(start, tuple(-(-b // n) * n for b, n in zip(box.stop, chunks.block, strict=True))).clip(chunks.shape)


def _voxels_or_none(volume: Volume, array: zarr.Array, chunk: Box) -> np.ndarray | int:
    """The voxels of a chunk; 0, which is recorded, where its bytes are there and twice cannot be decoded."""
    where, (key, _) = files.join(volume.path, volume.dataset), next(_stored_objects(volume, array, chunk))
    for _ in range(2):
        try:
            return _voxels(volume, array, chunk)
        except Exception as error:
            if not undecodable(error):
                raise
            files.fingerprint(where, key)  # raises where the store is what fails
    record_filled(where, chunk)
    return 0


def _stored_objects(volume: Volume, array: zarr.Array, box: Box) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Key and first index of each stored object (a chunk or a shard) that holds voxels of ``box``."""
    stored = array.shards or array.chunks
    grid = Blocks(volume.shape, tuple(stored[axis] for axis in axes.space(array.ndim, *volume.chosen)))
    chosen = {axis: place // stored[axis] for axis, place in volume.chosen.items()}
    for i in grid.overlapping(box):
        coords = axes.index(array.ndim, grid.coords(i), chosen)
        yield array.metadata.encode_chunk_key(coords), tuple(c * n for c, n in zip(coords, stored, strict=True))


def _meets(array: zarr.Array, index: tuple, origin: tuple[int, ...], place: tuple[int, ...]) -> bool:
    """Whether a chunk, ``place`` chunks from the first index of its shard, holds voxels of ``index``."""
    starts = [o + p * n for o, p, n in zip(origin, place, array.chunks, strict=True)]
    spans = [(i.start, i.stop) if isinstance(i, slice) else (i, i + 1) for i in index]
    return all(a < start + n and start < b for (a, b), start, n in zip(spans, starts, array.chunks, strict=True))


def _damaged_chunk(volume: Volume, array: zarr.Array, box: Box) -> str:
    """The key of the first stored object under ``box`` that cannot be read; "" when each can, on its own."""
    space = axes.space(array.ndim, *volume.chosen)
    stored = array.shards or array.chunks
    for key, origin in _stored_objects(volume, array, box):
        start = tuple(origin[axis] for axis in space)
        part = Box(start, tuple(origin[axis] + stored[axis] for axis in space)).intersect(box)
        try:
            _voxels(volume, array, part)
        except Exception:  # the caller tells the cause
            return key
    return ""
