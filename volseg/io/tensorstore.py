"""Volumes in N5 containers and Neuroglancer's precomputed format, on disk, HTTP, S3 and Google's object store."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg import system
from volseg.box import Box
from volseg.errors import UserError, printable
from volseg.io import axes, files, ome
from volseg.io.header import Header, TripleNm, check_shape, decoding_room, reason, voxel_dtype
from volseg.io.place import ORIGIN, Place, from_attributes, from_lengths, placed

if TYPE_CHECKING:
    from volseg.io.volume import Volume

PRECOMPUTED = "precomputed://"
DRIVERS = {"n5": "n5", "precomputed": "neuroglancer_precomputed"}
METADATA = {"n5": "attributes.json", "precomputed": "info"}
MAX_LISTED = 8


def kind(path: str) -> str:
    """ "n5" or "precomputed" where that is what lies at ``path``, as far as its name or a local folder tells; else ""."""
    if path.startswith(PRECOMPUTED):
        return "precomputed"
    if ".n5" in {os.path.splitext(part)[1].lower() for part in path.split("/")}:
        return "n5"
    if files.is_remote(path):
        return ""
    return next((kind for kind, name in METADATA.items() if os.path.isfile(os.path.join(path, name))), "")


def remote_kind(path: str) -> str:
    """The same of a URL that has no telling name, by the metadata that are there."""
    return next((kind for kind, name in METADATA.items() if files.exists(f"{path}/{name}")), "")


def header(path: str, dataset: str, *, several: bool) -> Header:
    """What the metadata at ``path`` say of an array: of a group, its finest level."""
    system.require("tensorstore", extra="formats")
    found = kind(path) or remote_kind(path)
    name = _full_resolution(path, dataset) if found == "n5" else dataset
    where = f"{path}/{name}".rstrip("/")
    array, offset = _array(found, path, name, _stamp(found, path, name))
    chunk = array.chunk_layout.read_chunk.shape or array.shape
    shape, chunk = array.shape[::-1], chunk[::-1]
    check_shape(shape, where)
    check_shape(chunk, f"a chunk of {where}")
    labels = [label or letter for label, letter in zip(array.domain.labels, "xyzct"[: array.ndim], strict=True)]
    names = axes.axis_names(labels[::-1], array.ndim)
    lead = axes.channel_axis(shape, names, where) if several or "c" in names else None
    time = axes.time_axis(names, lead)
    axes.check(shape, names, lead, where, time)
    space = axes.space(array.ndim, lead, time)
    size, size_notes = _precomputed_size(array) if found == "precomputed" else _n5_size(path, name)
    corner = placed([offset[axis] + 0.5 for axis in range(3)]) if found == "precomputed" else ORIGIN
    return Header(
        found,
        tuple(shape[axis] for axis in space),
        voxel_dtype(array.dtype.numpy_dtype, where),
        size,
        tuple(min(chunk[axis], shape[axis]) for axis in space),
        dataset=name,
        channels=1 if lead is None else shape[lead],
        channel_axis=lead,
        times=1 if time is None else shape[time],
        time_axis=time,
        place=corner if found == "precomputed" else _n5_place(path, name),
        notes=_nothing_stored(found, where),
        size_notes=size_notes,
    )


def read(volume: Volume, box: Box) -> np.ndarray:
    """The voxels of ``box``; only the chunks that hold them are read."""
    where = f"{volume.path}/{volume.dataset}".rstrip("/")
    array, _ = _array(volume.kind, volume.path, volume.dataset, _stamp(volume.kind, volume.path, volume.dataset))
    index = axes.index(array.ndim, box.slices, volume.chosen)
    chunk = prod(array.chunk_layout.read_chunk.shape or ()) * array.dtype.numpy_dtype.itemsize
    try:
        with decoding_room(chunk, f"a chunk of {where}"):
            data = array[index[::-1]].read(order="F").result()
    except UserError:
        raise
    except Exception as error:  # tensorstore maps what goes wrong to several kinds
        raise UserError(
            f"cannot read {where} in box {box}: {_reason(error)}; the data is damaged or unreachable: copy it again"
        ) from error
    return np.ascontiguousarray(data.T, dtype=volume.dtype)


# ------------------------------------------------------------------------------------------------------------- opened


@lru_cache(maxsize=64)
def _array(kind: str, path: str, name: str, stamp: Any) -> tuple[Any, list[int]]:
    """The array, opened once in this process, its first voxel at 0 along each axis; and where that was, z y x."""
    import tensorstore as ts

    spec: dict = {
        "driver": DRIVERS[kind],
        "kvstore": _kvstore(path if kind == "precomputed" else f"{path}/{name}".rstrip("/")),
    }
    if kind == "precomputed" and name:
        spec["scale_metadata"] = {"key": name}
    try:
        array = ts.open(spec, read=True, open=True).result()
    except Exception as error:
        where = f"{path}/{name}".rstrip("/")
        if "NOT_FOUND" in str(error):
            raise UserError(f"no {kind} array at {where}{_contents(kind, path)}") from None
        raise UserError(f"cannot open {where} as {kind}: {_reason(error)}") from None
    return array[ts.d[:].translate_to[0]], list(array.domain.origin[2::-1])


def _kvstore(path: str) -> Any:
    """Tensorstore's name of a folder or URL; S3 follows the environment's endpoint, as s3fs does."""
    path = path.removeprefix(PRECOMPUTED).rstrip("/")
    if not files.is_remote(path):
        return {"driver": "file", "path": f"{path}/"}
    protocol, _, rest = path.partition("://")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if protocol == "s3" and endpoint:
        bucket, _, key = rest.partition("/")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        return {"driver": "s3", "bucket": bucket, "path": f"{key}/", "endpoint": endpoint, "aws_region": region}
    return f"{path}/"


def _stamp(kind: str, path: str, name: str) -> Any:
    """Changes when a local array's metadata do."""
    if files.is_remote(path):
        return None
    document = os.path.join(path, name if kind == "n5" else "", METADATA[kind])
    return files.stamp(document) if os.path.exists(document) else None


def _document(path: str, name: str) -> dict:
    """The JSON object ``name`` at ``path``; empty where there is none."""
    import tensorstore as ts

    try:
        found = ts.KvStore.open(_kvstore(path)).result().read(name).result()
        parsed = json.loads(found.value) if found.state == "value" else {}
    except (ValueError, RecursionError) as error:  # tensorstore's errors are ValueError, too
        raise UserError(f"cannot read {path}/{name}: {_reason(error)}") from None
    return parsed if isinstance(parsed, dict) else {}


def _contents(kind: str, path: str) -> str:
    """Advice that lists the arrays of an N5 container, or the scales of a precomputed volume."""
    if kind == "precomputed":
        names = [
            str(scale.get("key")) for scale in _document(path, "info").get("scales", ()) if isinstance(scale, dict)
        ]
    else:
        names = _arrays(path)
    listed = ", ".join(names[:MAX_LISTED]) + (", ..." if len(names) > MAX_LISTED else "")
    return f"; it holds {listed}: pick one with --set input.dataset={names[0]}" if names else ""


def _reason(error: BaseException) -> str:
    """One line of tensorstore's error, without where in its source it arose."""
    return reason(ValueError(str(error).partition(" [source locations=")[0].partition(" [tensorstore_spec=")[0]))


def _nothing_stored(kind: str, where: str) -> tuple[str, ...]:
    """A note where a local array holds no chunk."""
    where = where.removeprefix(PRECOMPUTED)
    if files.is_remote(where):
        return ()
    stored = (name for _, _, names in os.walk(where) for name in names)
    if any(name != METADATA[kind] and not name.startswith(".") for name in stored):
        return ()
    return (printable(f"{where} stores no chunk: every voxel is 0"),)


# ------------------------------------------------------------------------------------------------------------------ N5


def _full_resolution(path: str, dataset: str) -> str:
    """The array ``dataset``; of a group, its first level; of a container with one array, that."""
    name = dataset.strip("/")
    for candidate in (name, f"{name}/s0".lstrip("/"), f"{name}/0".lstrip("/")):
        if "dimensions" in _document(f"{path}/{candidate}".rstrip("/"), METADATA["n5"]):
            return candidate
    found = [array for array in _arrays(path) if f"{array}/".startswith(f"{name}/" if name else "")]
    finest = [array for array in found if array.rpartition("/")[2] in ("s0", "0") or len(found) == 1]
    if len(finest) == 1:
        return finest[0]
    raise UserError(f"no single N5 array at {path}/{name}".rstrip("/") + _contents("n5", path))


def _arrays(path: str) -> list[str]:
    """Names of the arrays below a local container."""
    if files.is_remote(path):
        return []
    found = []
    for folder, folders, names in os.walk(path):
        depth = os.path.relpath(folder, path).count(os.sep)
        if METADATA["n5"] in names and "dimensions" in _document(folder, METADATA["n5"]):
            found.append(os.path.relpath(folder, path))
            folders.clear()
        if depth >= 5:
            folders.clear()
    return sorted(name.replace(os.sep, "/") for name in found)


def _n5_size(path: str, name: str) -> tuple[TripleNm | None, tuple[str, ...]]:
    """Voxel size z y x from what programs write into an array's attributes, or into those of the groups above it."""
    where = place = f"{path}/{name}".rstrip("/")
    own = _document(where, METADATA["n5"])
    told = own.get("downsamplingFactors")
    factors = [number for n in (told if isinstance(told, list) else ()) if (number := ome.number(n))]
    for _ in range(3):  # the level, its image, the container
        attributes = _document(place, METADATA["n5"])
        found = _lengths(attributes)
        if found is None:
            if place.lower().endswith(".n5"):
                break
            place = place.rpartition("/")[0]
            continue
        lengths, units = found
        own_size = place == where and ("pixelResolution" not in attributes or "transform" in attributes)
        if len(factors) == 3 and not own_size:
            lengths = [a * b for a, b in zip(lengths, reversed(factors), strict=True)]
        return ome.voxel_size_nm(lengths, units, where)
    return None, ()


def _n5_place(path: str, name: str) -> Place:
    """Where the first voxel's center lies: ``transform`` of the array, or ``offset`` beside ``resolution`` (x y z), which
    Paintera writes into the group above as well."""
    place = f"{path}/{name}".rstrip("/")
    for _ in range(2):
        attributes = _document(place, METADATA["n5"])
        transform = attributes.get("transform")
        if isinstance(transform, dict):
            axes, told = transform.get("axes", "zyx"), (transform.get("translate"), transform.get("scale"))
            try:
                moved, scale = (dict(zip(axes, numbers, strict=True)) for numbers in told)
            except (TypeError, ValueError):
                return ORIGIN
            return from_lengths([moved.get(axis) for axis in "zyx"], [scale.get(axis) for axis in "zyx"])
        found = from_attributes(attributes, 3, [0, 1, 2])
        if found != ORIGIN:
            return placed(found[::-1])
        if attributes.get("downsamplingFactors") or place.lower().endswith(".n5"):
            break
        place = place.rpartition("/")[0]
    return ORIGIN


def _lengths(attributes: dict) -> tuple[list[float], list[str]] | None:
    """Lengths and units z y x that attributes state in one of the ways in use; None where they do not."""
    transform, pixel = attributes.get("transform"), attributes.get("pixelResolution")
    if isinstance(transform, dict) and isinstance(transform.get("scale"), list):
        by_axis = dict(
            zip(
                transform.get("axes", "zyx"),
                zip(transform["scale"], transform.get("units", [""] * 3), strict=False),
                strict=False,
            )
        )
        told = [by_axis.get(axis, (None, "")) for axis in "zyx"]
        lengths, units = [length for length, _ in told], [str(unit) for _, unit in told]
    elif isinstance(pixel, dict):
        lengths, units = list(pixel.get("dimensions", ()))[2::-1], [str(pixel.get("unit", ""))] * 3
    elif isinstance(attributes.get("resolution"), list):
        told = attributes.get("units", "")
        listed = told if isinstance(told, list) else [told] * len(attributes["resolution"])
        lengths, units = attributes["resolution"][2::-1], [str(unit) for unit in listed][2::-1]
    else:
        return None
    numbers = [ome.number(length) for length in lengths]
    return (numbers, units) if len(numbers) == len(units) == 3 and None not in numbers else None


# --------------------------------------------------------------------------------------------------------- precomputed


def _precomputed_size(array: Any) -> tuple[TripleNm | None, tuple[str, ...]]:
    """Voxel size z y x; precomputed volumes have it in nm."""
    units = [unit.to_json() if unit is not None else None for unit in array.dimension_units[2::-1]]
    lengths = [unit[0] if isinstance(unit, list) else None for unit in units]
    return ome.voxel_size_nm(lengths, ["nm"] * 3, "") if None not in lengths else (None, ())
