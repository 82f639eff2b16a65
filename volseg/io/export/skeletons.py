"""Center lines of single objects, through kimimaro, and the files that hold them. Vertices are x y z in nm, in the middle of
a voxel, and lie in the same space as meshes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from volseg.box import Triple
from volseg.io import files
from volseg.io.header import TripleNm
from volseg.io.place import ORIGIN

SCALE, CONST_VOXELS = 1.5, 10  # a branch is one from so many radii and shortest voxel edges off the line on
CENTERING = {"pdrf_scale": 100_000, "pdrf_exponent": 4}  # kimimaro's own where it is given none at all
INFO = {
    "@type": "neuroglancer_skeletons",
    "transform": [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0],
    "vertex_attributes": [{"id": "radius", "data_type": "float32", "num_components": 1}],
}
COLUMNS = ("id", "length_nm", "ends", "branch_points", "mean_radius_nm")


@dataclass(frozen=True)
class Skeleton:
    """Lines: vertices (n, 3) float32, x y z in nm, edges (m, 2) uint32 of their numbers, and radii (n,) float32 in nm."""

    vertices: np.ndarray
    edges: np.ndarray
    radii: np.ndarray

    @property
    def measures(self) -> tuple[float, int, int, float]:
        """`COLUMNS` but for the id: length, ends, points where three or more lines meet, mean radius."""
        a, b = self.vertices[self.edges[:, 0]], self.vertices[self.edges[:, 1]]
        degree = np.bincount(self.edges.ravel(), minlength=len(self.vertices))
        length = float(np.linalg.norm(a.astype(float) - b, axis=1).sum())
        return length, int((degree == 1).sum()), int((degree > 2).sum()), float(self.radii.mean(dtype=float))


def center_lines(
    mask: np.ndarray, start: Triple, voxel_size_nm: TripleNm, begin_nm: TripleNm = ORIGIN
) -> Skeleton | None:
    """The center lines of an object by TEASAR (Sato et al. 2000; kimimaro's form); None where it has no voxel.

    Parameters
    ----------
    mask
        bool or uint8 (z, y, x): the voxels of the object's box.
    start
        Where the box begins, in voxels.
    voxel_size_nm
        z y x.
    begin_nm
        Where the outer corner of the volume's first voxel lies, z y x.
    """
    import kimimaro

    size = np.array(voxel_size_nm[::-1], np.float64)
    params = {"scale": SCALE, "const": CONST_VOXELS * float(size.min()), **CENTERING}
    padded = np.pad(mask.astype(np.uint8), 1)  # the box's faces are the object's, too
    found = kimimaro.skeletonize(
        np.asfortranarray(padded.T), teasar_params=params, anisotropy=tuple(map(float, size)), dust_threshold=0,
        fix_borders=False, progress=False, parallel=1,
    )  # fmt: skip
    if 1 not in found:
        return None
    lines = found[1]
    vertices = lines.vertices.astype(np.float64) + (np.array(start[::-1]) - 0.5) * size + np.array(begin_nm[::-1])
    return Skeleton(vertices.astype(np.float32), lines.edges.astype(np.uint32), lines.radius.astype(np.float32))


# ---------------------------------------------------------------- files


def describe(path: str) -> None:
    """The folder says that it holds skeletons in Neuroglancer's form."""
    files.write_bytes(path, "info", json.dumps(INFO).encode())


def save(path: str, kind: str, label: int, found: Skeleton) -> None:
    """The skeleton of an object is in the folder at ``path``: in Neuroglancer's form, or as ``LABEL.swc``."""
    if kind == "swc":
        files.write_bytes(path, f"{label}.swc", encode_swc(found).encode())
    else:
        files.write_bytes(path, str(label), encode_precomputed(found))


def encode_precomputed(found: Skeleton) -> bytes:
    """Counts of vertices and edges, vertices, edges, radii."""
    counts = np.array([len(found.vertices), len(found.edges)], "<u4")
    return b"".join(
        part.tobytes()
        for part in (counts, found.vertices.astype("<f4"), found.edges.astype("<u4"), found.radii.astype("<f4"))
    )


def encode_swc(found: Skeleton) -> str:
    """A tree for each connected part, each vertex after the one it hangs on, in µm as SWC has it.

    >>> line = Skeleton(np.array([[0, 0, 0], [0, 0, 500]], np.float32), np.array([[0, 1]]), np.array([100, 50], np.float32))
    >>> print(encode_swc(line))
    # volseg: x y z radius in um
    1 0 0.0000 0.0000 0.0000 0.1000 -1
    2 0 0.0000 0.0000 0.5000 0.0500 1
    <BLANKLINE>
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import breadth_first_order

    n, edges = len(found.vertices), found.edges.astype(np.int64)
    graph = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), (n, n)).tocsr()
    lines, place = ["# volseg: x y z radius in um"], np.zeros(n, np.int64)
    for root in range(n):
        if place[root]:
            continue
        order, before = breadth_first_order(graph, root, directed=False)
        for vertex in order:
            place[vertex] = len(lines)
            x, y, z = found.vertices[vertex] / 1000
            parent = -1 if vertex == root else place[before[vertex]]
            lines.append(f"{place[vertex]} 0 {x:.4f} {y:.4f} {z:.4f} {found.radii[vertex] / 1000:.4f} {parent}")
    return "\n".join(lines) + "\n"
