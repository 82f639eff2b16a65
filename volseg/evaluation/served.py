"""Volumes, object table and meshes as Neuroglancer asks for them: made as they are asked for, in its precomputed format.

Nothing is copied and nothing is held: a chunk is read from where it lies, whatever the format. The outer corner of the first
voxel is the origin at every level, so volumes of several voxel sizes lie over each other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from volseg.box import Box, Triple
from volseg.engine import meshing
from volseg.io.export import meshes
from volseg.io.export.properties import segment_properties
from volseg.io.volume import Volume

CUBE, FLAT = (64, 64, 64), (16, 128, 128)  # chunks: of volumes stored in deep chunks, and of stored sections
MESH_VOXELS = 1 << 23  # of an object's box, up to which its mesh is made of the finest voxels
KEPT_MESHES = 256
NUMBERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "float32")  # that Neuroglancer reads


@dataclass(frozen=True, eq=False)
class Served:
    """A volume under a name.

    levels   finest first, each with a voxel size
    columns  of the object table, where these are labels
    meshed   whether meshes are made
    """

    name: str
    levels: tuple[Volume, ...]
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    meshed: bool = False

    @property
    def dtype(self) -> np.dtype:
        """The type of the voxels as they are sent."""
        stored = np.dtype(self.levels[0].dtype)
        return stored if stored.name in NUMBERS else np.dtype("uint8" if stored.kind == "b" else "float32")

    @property
    def chunk(self) -> Triple:
        return CUBE if self.levels[0].chunk[0] >= FLAT[0] else FLAT

    def answer(self, path: str) -> tuple[bytes, str] | None:
        """What lies at ``path`` below the volume, and its media type; None where nothing does."""
        if found := re.fullmatch(r"(\d+)/(\d+)-(\d+)_(\d+)-(\d+)_(\d+)-(\d+)", path):
            level, x0, x1, y0, y1, z0, z1 = map(int, found.groups())
            return self._chunk(level, Box((z0, y0, x0), (z1, y1, x1)))
        if found := re.fullmatch(r"mesh/(\d+):0", path):
            return _json({"fragments": [found[1]]}) if self.meshed else None
        if found := re.fullmatch(r"mesh/(\d+)", path):
            return self._mesh(int(found[1]))
        documents = {"info": self._info, "properties/info": self._properties, "mesh/info": self._mesh_info}
        return documents[path]() if path in documents else None

    def _info(self) -> tuple[bytes, str]:
        scales = [
            {
                "key": str(number),
                "size": list(level.shape[::-1]),
                "resolution": [float(n) for n in level.voxel_size_nm[::-1]],  # type: ignore[index]
                "voxel_offset": [0, 0, 0],
                "chunk_sizes": [list(self.chunk[::-1])],
                "encoding": "raw",
            }
            for number, level in enumerate(self.levels)
        ]
        kind, more = ("segmentation", {"segment_properties": "properties"}) if self.columns else ("image", {})
        more |= {"mesh": "mesh"} if self.meshed else {}
        return _json({
            "@type": "neuroglancer_multiscale_volume", "type": kind, "data_type": self.dtype.name, "num_channels": 1,
            "scales": scales, **more,
        })  # fmt: skip

    def _chunk(self, level: int, box: Box) -> tuple[bytes, str] | None:
        if level >= len(self.levels):
            return None
        source = self.levels[level]
        if box.clip(source.shape) != box or any(n > c for n, c in zip(box.shape, self.chunk, strict=True)):
            return None
        data = source.read(box).astype(self.dtype, copy=False)
        return np.ascontiguousarray(data, self.dtype.newbyteorder("<")).tobytes(), "application/octet-stream"

    def _properties(self) -> tuple[bytes, str] | None:
        return (segment_properties(self.columns), "application/json") if self.columns else None

    def _mesh_info(self) -> tuple[bytes, str] | None:
        return _json({"@type": "neuroglancer_legacy_mesh"}) if self.meshed else None

    def _mesh(self, label: int) -> tuple[bytes, str] | None:
        found = self.object(label) if self.meshed else None
        return (_encoded_mesh(self, found), "application/octet-stream") if found else None

    def object(self, label: int) -> meshing.Object | None:
        """The object of that label, if there is one."""
        row = int(np.searchsorted(self.columns["id"], label))
        if row == len(self.columns["id"]) or int(self.columns["id"][row]) != label:
            return None
        (found,) = meshing.objects_of({name: values[row : row + 1] for name, values in self.columns.items()})
        return found


@lru_cache(maxsize=KEPT_MESHES)
def _encoded_mesh(served: Served, each: meshing.Object) -> bytes:
    error = min(served.levels[0].voxel_size_nm) / 2
    return meshes.encode_precomputed(meshing.mesh_of(served.levels, each, error, MESH_VOXELS))


def _json(plain: Any) -> tuple[bytes, str]:
    return json.dumps(plain).encode(), "application/json"
