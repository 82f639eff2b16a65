"""Neuroglancer precomputed and N5, written chunk by chunk through tensorstore, at every level of a pyramid."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import numpy as np

from volseg.box import Box
from volseg.io import files
from volseg.io.export.frame import Frame

CHUNK = (64, 128, 128)  # of every level, z y x
CELL = 8  # edge of the cells in which compressed_segmentation keeps its palettes


def create(kind: str, path: str, levels: list[Frame], dtype: np.dtype, *, labels: bool) -> None:
    """There are empty arrays at ``path``: an array for each level, and what says how they belong together."""
    import tensorstore as ts

    for level, frame in enumerate(levels):
        spec = _precomputed(frame, dtype, labels) if kind == "precomputed" else _n5(frame, dtype)
        ts.open({**spec, "kvstore": _folder(kind, path, level)}, create=True, open=True).result()
    if kind == "n5":
        own = levels[0].voxel_size_nm
        factors = [[round(b / a) for a, b in zip(own, each.voxel_size_nm, strict=True)][::-1] for each in levels]
        finest = {"pixelResolution": {"dimensions": [float(n) for n in own[::-1]], "unit": "nm"}}
        _add(path, "attributes.json", {"n5": "2.0.0", "scales": factors, **finest})
        for level, of_level in enumerate(factors):  # n5-viewer multiplies what a level says by its factors
            placed = _n5_place(levels[level]) if levels[0].is_moved else {}
            _add(path, f"s{level}/attributes.json", {"downsamplingFactors": of_level, **finest, **placed})


def write(kind: str, path: str, level: int, box: Box, data: np.ndarray) -> None:
    """The voxels of ``box``, a whole number of chunks, are ``data``. Chunks of zeros are not stored."""
    info = "info" if kind == "precomputed" else f"s{level}/attributes.json"
    array = _opened(kind, path, level, files.stamp(f"{path}/{info}"))
    region = array[tuple(slice(a, b) for a, b in zip(box.start[::-1], box.stop[::-1], strict=True))]
    region.write(data.T.astype(array.dtype.numpy_dtype, copy=False)).result()


def link(path: str, **parts: str) -> None:
    """The ``info`` of the precomputed volume names these folders, such as ``mesh="mesh"``."""
    _add(path, "info", parts)


@lru_cache(maxsize=32)
def _opened(kind: str, path: str, level: int, stamp: Any) -> Any:
    """The array of a level, z y x the other way round; opened once in each process."""
    import tensorstore as ts

    spec: dict = {"driver": "n5", "kvstore": _folder(kind, path, level)}
    if kind == "precomputed":
        spec = {**spec, "driver": "neuroglancer_precomputed", "scale_index": level}
    array = ts.open(spec, open=True, read=True, write=True).result()
    array = array[..., 0] if kind == "precomputed" else array
    return array[ts.d[:].translate_to[0]]


def _folder(kind: str, path: str, level: int) -> dict:
    return {"driver": "file", "path": f"{path}/" if kind == "precomputed" else f"{path}/s{level}/"}


def _precomputed(frame: Frame, dtype: np.dtype, labels: bool) -> dict:
    """The specification of a scale, whose place counts in whole voxels of its own from corner to corner."""
    scale: dict = {
        "size": list(frame.shape[::-1]),
        "resolution": [float(n) for n in frame.voxel_size_nm[::-1]],
        "voxel_offset": list(frame.first[::-1]),
        "chunk_size": [min(c, n) for c, n in zip(CHUNK, frame.shape, strict=True)][::-1],
        "encoding": "raw",
    }
    if labels:
        scale |= {"encoding": "compressed_segmentation", "compressed_segmentation_block_size": [CELL] * 3}
    kind = {"type": "segmentation", "data_type": "uint64"} if labels else {"type": "image", "data_type": dtype.name}
    return {
        "driver": "neuroglancer_precomputed",
        "multiscale_metadata": {**kind, "num_channels": 1},
        "scale_metadata": scale,
    }


def _n5_place(frame: Frame) -> dict:
    """Where a level's first voxel lies, as Paintera (x y z) and COSEM's tools (by the names of axes) look for it."""
    scale, moved = map(list, (frame.voxel_size_nm, frame.center_nm))
    transform = {"axes": ["z", "y", "x"], "scale": scale, "translate": moved, "units": ["nm"] * 3}
    return {"offset": moved[::-1], "transform": transform}


def _n5(frame: Frame, dtype: np.dtype) -> dict:
    return {
        "driver": "n5",
        "metadata": {
            "dimensions": list(frame.shape[::-1]),
            "blockSize": [min(c, n) for c, n in zip(CHUNK, frame.shape, strict=True)][::-1],
            "dataType": dtype.name,
            "compression": {"type": "gzip", "level": 1},
            "axes": ["x", "y", "z"],
            "resolution": [float(n) for n in frame.voxel_size_nm[::-1]],
            "units": ["nm", "nm", "nm"],
        },
    }


def _add(path: str, key: str, more: dict) -> None:
    """The JSON object ``key`` has these members, too."""
    known = json.loads(files.read_bytes(path, key)) if files.exists(f"{path}/{key}") else {}
    files.write_bytes(path, key, json.dumps({**known, **more}).encode())
