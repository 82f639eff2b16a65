"""The object table as Neuroglancer's segment properties: what its list of segments shows, sorts and filters by."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

KINDS = {"i": np.int32, "u": np.uint32, "f": np.float32}  # numbers that Neuroglancer takes


def segment_properties(columns: Mapping[str, np.ndarray]) -> bytes:
    """The ``info`` document of segment properties.

    Parameters
    ----------
    columns
        Of the object table, by name: ``id`` (unsigned integers), numbers and truth values.

    Returns
    -------
    bytes
        JSON. Real numbers have six digits, about what float32 holds. Truth values become tags; integers beyond 32 bits
        become float32; a column with a number that is not finite is left out, since JSON has none.

    Examples
    --------
    >>> table = {"id": np.array([1, 2]), "voxels": np.array([7, 9]), "touches_border": np.array([True, False])}
    >>> inline = json.loads(segment_properties(table))["inline"]
    >>> inline["ids"], [(p["id"], p["values"]) for p in inline["properties"]]
    (['1', '2'], [('voxels', [7, 9]), ('tags', [[0], []])])
    """
    numbers = [_number(name, values) for name, values in columns.items() if name != "id" and _shown(values)]
    truths = {name: values for name, values in columns.items() if values.dtype.kind == "b"}
    tags = {
        "id": "tags",
        "type": "tags",
        "tags": list(truths),
        "values": [np.flatnonzero(row).tolist() for row in np.stack([*truths.values()], axis=1)] if truths else [],
    }
    inline = {"ids": list(map(str, columns["id"].tolist())), "properties": [*numbers, *([tags] if truths else [])]}
    return json.dumps({"@type": "neuroglancer_segment_properties", "inline": inline}).encode()


def _shown(values: np.ndarray) -> bool:
    return values.dtype.kind in KINDS and bool(np.isfinite(values).all())


def _number(name: str, values: np.ndarray) -> dict:
    kind = KINDS[values.dtype.kind]
    if values.dtype.kind != "f" and values.size and not _within(values, np.iinfo(kind)):
        kind = np.float32
    numbers = [float(f"{value:.6g}") for value in values.tolist()] if kind == np.float32 else values.tolist()
    return {"id": name, "type": "number", "data_type": np.dtype(kind).name, "values": numbers}


def _within(values: np.ndarray, limits: np.iinfo) -> bool:
    return limits.min <= int(values.min()) and int(values.max()) <= limits.max
