"""Surfaces of single objects, through zmesh, and the files that hold them. Vertices are x y z in nm.

An object that fills the voxels ``z0 .. z1`` reaches from ``z0`` to ``z1`` times the voxel size, from the outer corner of the
volume's first voxel on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from volseg.box import Box, Triple
from volseg.io import files, pyramid
from volseg.io.header import TripleNm
from volseg.io.place import ORIGIN

if TYPE_CHECKING:
    from volseg.io.volume import Volume

SLAB_VOXELS = 1 << 24  # of labels that are held while a mask is made of them
MOST_REDUCED = 1000  # triangles that simplification may make one of; the error limits it first


@dataclass(frozen=True)
class Mesh:
    """A closed surface: vertices (n, 3) float32, x y z in nm, and triangles (m, 3) uint32 of their numbers."""

    vertices: np.ndarray
    triangles: np.ndarray


def surface(
    mask: np.ndarray, start: Triple, voxel_size_nm: TripleNm, max_error_nm: float, begin_nm: TripleNm = ORIGIN
) -> Mesh:
    """The surface around the voxels of an object.

    Parameters
    ----------
    mask
        bool or uint8 (z, y, x): the voxels of the object's box.
    start
        Where the box begins, in voxels.
    voxel_size_nm
        z y x.
    max_error_nm
        How far simplification may move the surface; 0 for none.
    begin_nm
        Where the outer corner of the volume's first voxel lies, z y x.
    """
    from zmesh import Mesher

    padded = np.pad(mask.astype(np.uint8), 1)  # closed where the volume ends, too
    if not padded.any():
        return Mesh(np.empty((0, 3), np.float32), np.empty((0, 3), np.uint32))
    mesher = Mesher(voxel_size_nm[::-1])
    mesher.mesh(np.asfortranarray(padded.T))
    reduced = MOST_REDUCED if max_error_nm > 0 else 0
    found = mesher.get(1, reduction_factor=reduced, max_error=max_error_nm or None, voxel_centered=True)
    origin = (np.array(start[::-1]) - 1) * np.array(voxel_size_nm[::-1]) + np.array(begin_nm[::-1])
    return Mesh((found.vertices.astype(np.float64) + origin).astype(np.float32), found.faces.astype(np.uint32))


def read_mask(labels: Volume, box: Box, label: int, factor: int) -> np.ndarray:
    """Which cells of ``factor`` voxels along each axis, from the start of ``box`` on, belong mostly to an object: uint8."""
    whole = Box(tuple(n // factor * factor for n in box.start), box.stop)
    sections = max(1, SLAB_VOXELS // (whole.shape[1] * whole.shape[2] * factor)) * factor
    parts = []
    for z in range(whole.start[0], whole.stop[0], sections):
        slab = replace(whole, start=(z, *whole.start[1:]), stop=(min(z + sections, whole.stop[0]), *whole.stop[1:]))
        part = (labels.read(slab) == label).astype(np.uint8)
        for _ in range(factor.bit_length() - 1):
            part = pyramid.downsample(part, (2, 2, 2))
        parts.append(part)
    return np.concatenate(parts)


# ---------------------------------------------------------------- files


def save(path: str, kind: str, label: int, mesh: Mesh) -> None:
    """The mesh of an object is in the folder at ``path``: in Neuroglancer's form, or as ``LABEL.obj``, ``.ply``, ``.glb``."""
    if kind == "mesh":
        fragment = f"{label}:0:0"
        files.write_bytes(path, fragment, encode_precomputed(mesh))
        files.write_bytes(path, f"{label}:0", json.dumps({"fragments": [fragment]}).encode())
        return
    from trimesh import Trimesh

    data = Trimesh(mesh.vertices, mesh.triangles, process=False).export(file_type=kind)
    files.write_bytes(path, f"{label}.{kind}", data.encode() if isinstance(data, str) else data)


def encode_precomputed(mesh: Mesh) -> bytes:
    """A fragment of Neuroglancer's single-resolution meshes: the count of vertices, vertices, triangles."""
    count = np.uint32(len(mesh.vertices)).tobytes()
    return count + mesh.vertices.astype("<f4").tobytes() + mesh.triangles.astype("<u4").tobytes()


def describe(path: str, **more: str) -> None:
    """The folder says that it holds meshes in Neuroglancer's form."""
    files.write_bytes(path, "info", json.dumps({"@type": "neuroglancer_legacy_mesh", **more}).encode())
