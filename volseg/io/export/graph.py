"""The graph of a run's basins as a folder of Parquet tables, and a partition of them in such a table, or in CSV."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from volseg.errors import UserError
from volseg.io import files

NODES, EDGES, README = "nodes.parquet", "edges.parquet", "README.md"
BASINS = b"volseg basins"  # the key in a table's metadata of the id of the basins that it is of
COLUMNS = ("basin", "object")

DICTIONARY = """# Basins of a run, and how they touch

Basins are the pieces of the watershed, objects are made of whole ones. They are the same for all blocks, and so are these
tables. Probability is what `fragments.height` of the run names, smoothed: mostly that of the mask less that of the contour.
Grid: {shape} voxels (z y x) of {size} nm.

`nodes.parquet`, a row for each basin:

| column | |
|---|---|
| `basin` | its id: the linear index (z, y, x in C order) of its first voxel |
| `object` | its label in the run; 0: none |
| `voxels` | how many it has |
| `z`, `y`, `x` | its first voxel |
| `highest_probability` | at its deepest point |
| `mask_sum`, `mean_mask` | the stored mask probability of its voxels: sum of uint8 (255 is 1), and mean of 0 to 1 |
| `cut_z`, `cut_y`, `cut_x` | how many of its voxels lie on faces of the volume across z, y, x |
| `minimum` | height at its deepest point, the unit of the watershed: low inside objects |

`edges.parquet`, a row for each pair of basins that touch:

| column | |
|---|---|
| `basin_a`, `basin_b` | the two, `basin_a` < `basin_b` |
| `contact_faces` | voxel faces in contact; 0 where they touch at edges or corners alone (`fragments.connectivity = 26`) |
| `mean_probability` | of these faces, on the side where it is lower; without a face that of the saddle |
| `saddle_probability` | the highest probability at which one can go from one to the other |
| `z`, `y`, `x` | the saddle's voxel |
| `height_sum` | heights of these faces, on the higher side, added up |
| `saddle` | height of the saddle |

`voxels`, `mask_sum`, `cut_*`, `contact_faces` and `height_sum` add up where basins join; of `minimum` and `saddle` the lowest
stays.

The way back: a table (Parquet or CSV) with the columns `basin` and `object`, each basin once, object 0 for background:
`volseg segment RUN --partition FILE`.
"""


def write(
    path: str, basins_id: str, nodes: Mapping[str, np.ndarray], edges: Mapping[str, np.ndarray], **facts: str
) -> None:
    """The folder at ``path`` holds the tables, and says what their columns are."""
    import pyarrow
    from pyarrow import parquet

    for name, columns in ((NODES, nodes), (EDGES, edges)):
        table = pyarrow.table(dict(columns)).replace_schema_metadata({BASINS: basins_id.encode()})
        file = pyarrow.BufferOutputStream()
        parquet.write_table(table, file)
        files.write_bytes(path, name, file.getvalue().to_pybytes())
    files.write_bytes(path, README, DICTIONARY.format(**facts).encode())


def read_partition(source: str | os.PathLike | Mapping[str, Any]) -> tuple[str, np.ndarray, np.ndarray, str]:
    """A partition as a file or columns have it: what it is called, basins, objects, and the id of the basins, "" for none.

    Raises
    ------
    UserError
        In one line, for what is no table of these two columns of whole numbers from 0, or names a basin twice.
    """
    if isinstance(source, (str, os.PathLike)):
        name, (columns, basins_id) = os.fspath(source), _read_table(os.fspath(source))
    else:
        name, columns, basins_id = "the partition", dict(source), ""
    basin, group = (_numbers(name, column, columns) for column in COLUMNS)
    if basin.shape != group.shape:
        raise UserError(f"{name} has {basin.size} basins and {group.size} objects; give an object for each basin")
    unique, counts = np.unique(basin, return_counts=True)
    if unique.size < basin.size:
        raise UserError(f"{name} names basin {unique[counts > 1][0]} more than once; give each one object")
    return name, basin, group, basins_id


def _read_table(path: str) -> tuple[dict[str, np.ndarray], str]:
    import pyarrow
    from pyarrow import csv, parquet

    try:
        folder, _, key = files.absolute(path).rpartition("/")
        data = pyarrow.BufferReader(files.read_bytes(folder or "/", key))
        if path.lower().endswith(".csv"):
            table = csv.read_csv(data, csv.ReadOptions(use_threads=False))
        else:
            table = parquet.read_table(data, use_threads=False)
        found = {name: table[name].to_numpy() for name in COLUMNS if table.column_names.count(name) == 1}
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot read partition {path}: {reason}; give a Parquet file, or one that ends in .csv"
        ) from None
    metadata = table.schema.metadata or {}
    return found, metadata.get(BASINS, b"").decode(errors="replace")


def _numbers(where: str, column: str, columns: Mapping[str, Any]) -> np.ndarray:
    """A column of whole numbers from 0, int64."""
    if column not in columns:
        raise UserError(
            f"{where} has no column {column!r}; give {' and '.join(COLUMNS)}, as volseg export --to graph does"
        )
    values = np.asarray(columns[column])
    if values.ndim != 1 or values.dtype.kind not in "ui":
        raise UserError(f"{where}: {column} is {values.dtype}; give a whole number in each row")
    if values.size and not 0 <= values.min() <= values.max() < 1 << 63:
        raise UserError(
            f"{where}: {column} goes from {values.min()} to {values.max()}; give numbers from 0 to 2**63 - 1"
        )
    return values.astype(np.int64)
