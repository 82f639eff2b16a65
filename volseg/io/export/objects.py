"""The object table for other programs: as AnnData (.h5ad), which scanpy and squidpy read, and as points, which napari reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

POINTS = ("index", "axis-0", "axis-1", "axis-2", "id", "z_nm", "y_nm", "x_nm", "voxels", "mean_probability")
PLACES = tuple(f"{axis}{end}" for axis in "zyx" for end in "01")  # voxels: where an object lies, not what it is like
CENTROID = tuple(f"centroid_{axis}_nm" for axis in "xyz")


def write_anndata(path: str, columns: Mapping[str, np.ndarray]) -> None:
    """The file at ``path`` holds the object table.

    ``X`` has the measures (float64), ``obs`` what identifies and places an object, ``obsm["spatial"]`` the centroids x y z in
    nm. The layout is that of AnnData 0.8 and later; anndata itself is not needed, since it holds pandas back.
    """
    import h5py

    apart = {"id", *PLACES, *CENTROID, *(name for name, values in columns.items() if values.dtype.kind == "b")}
    measures = [name for name in columns if name not in apart]
    with h5py.File(path, "w") as file:
        _mark(file, "anndata", "0.1.0")
        matrix = np.stack([columns[name].astype(np.float64) for name in measures], axis=1)
        _array(file, "X", matrix)
        placed = {name: columns[name] for name in columns if name in apart and name not in CENTROID}
        _frame(file, "obs", [str(label) for label in columns["id"].tolist()], placed)
        _frame(file, "var", measures, {})
        for name in ("layers", "obsm", "obsp", "uns", "varm", "varp"):
            _mark(file.create_group(name), "dict", "0.1.0")
        _array(file["obsm"], "spatial", np.stack([columns[name] for name in CENTROID], axis=1))


def centers_table(columns: Mapping[str, np.ndarray], voxel_size_nm: Sequence[float]) -> str:
    """A table (CSV) of the objects' centers as napari has points: voxels in ``axis-0`` to ``axis-2``, the rest are features.

    >>> table = {f"centroid_{axis}_nm": np.array([100.0]) for axis in "zyx"}
    >>> table |= {"id": np.array([7]), "voxels": np.array([9]), "mean_probability": np.array([0.5])}
    >>> print(centers_table(table, (50, 8, 8)))
    index,axis-0,axis-1,axis-2,id,z_nm,y_nm,x_nm,voxels,mean_probability
    0,2.000,12.500,12.500,7,100.000,100.000,100.000,9,0.500
    <BLANKLINE>
    """
    centers = np.stack([columns[f"centroid_{axis}_nm"] for axis in "zyx"], axis=1)
    lines = [",".join(POINTS)]
    rows = zip(
        centers / voxel_size_nm, columns["id"], centers, columns["voxels"], columns["mean_probability"], strict=True
    )
    for i, (zyx, label, nm, voxels, probability) in enumerate(rows):
        places, lengths = (",".join(f"{n:.3f}" for n in three) for three in (zyx, nm))
        lines.append(f"{i},{places},{label},{lengths},{voxels},{probability:.3f}")
    return "\n".join([*lines, ""])


def _mark(node: Any, kind: str, version: str) -> None:
    node.attrs["encoding-type"], node.attrs["encoding-version"] = kind, version


def _array(parent: Any, name: str, values: np.ndarray) -> None:
    _mark(parent.create_dataset(name, data=values), "array", "0.2.0")


def _frame(file: Any, name: str, index: list[str], columns: Mapping[str, np.ndarray]) -> None:
    import h5py

    group = file.create_group(name)
    _mark(group, "dataframe", "0.2.0")
    names = h5py.string_dtype()
    group.attrs["_index"] = "_index"
    group.attrs.create("column-order", list(columns), dtype=names)
    _mark(group.create_dataset("_index", data=np.array(index, object), dtype=names), "string-array", "0.2.0")
    for column, values in columns.items():
        _array(group, column, values)
