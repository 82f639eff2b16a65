"""The object table as AnnData (.h5ad), which scanpy and squidpy read: a row for each object, a feature for each measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

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
