"""A finished run, opened to be read: what it was, its arrays, its tables, and its work folder where that was kept."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from functools import cached_property
from os import PathLike, fspath
from typing import Any

import numpy as np

from volseg.box import Blocks, Box, Triple
from volseg.config import Config
from volseg.engine.run import Run
from volseg.errors import UserError
from volseg.io import arrays, files, tables, volume
from volseg.segmentation import holes, stitch
from volseg.segmentation.basins import BlockBasins
from volseg.segmentation.heights import height_halo
from volseg.segmentation.rules import Rules


@dataclass(frozen=True)
class FinishedRun:
    """A finished run to read from.

    Attributes
    ----------
    path
        Its folder.
    run
        Its description.
    labels
        Its labels at full resolution.
    missing
        Why the basins of its work folder cannot be read; ``""`` where they can.
    """

    path: str
    run: Run
    labels: volume.Volume
    missing: str = ""

    @property
    def config(self) -> Config:
        return self.run.config

    @property
    def shape(self) -> Triple:
        return self.labels.shape

    @property
    def voxel_size_nm(self) -> tuple[float, float, float]:
        return self.run.voxel_size_nm

    @property
    def grid(self) -> Blocks:
        return Blocks(self.shape, self.run.block)

    @property
    def roi(self) -> Box:
        """The part of the volume that the run was told to do."""
        return Box.parse(self.config.input.roi) if self.config.input.roi else Box.from_shape(self.shape)

    @property
    def rules(self) -> Rules:
        return Rules.from_config(self.config, self.voxel_size_nm)

    @property
    def fills(self) -> bool:
        """Whether holes were filled."""
        return self.rules.fill_voxels > 0

    @property
    def halo(self) -> Triple:
        """Voxels around a box that its heights need."""
        return height_halo(self.config.fragments, self.voxel_size_nm)

    # ---- results

    def probability(self, box: Box) -> np.ndarray:
        """Stored probabilities (uint8; channels, z, y, x) of ``box`` and the halo that heights need, cut to the volume."""
        return self._voxels("0", box.grow(self.halo).clip(self.shape))

    @cached_property
    def objects(self) -> dict[str, np.ndarray]:
        """Columns of the object table, by ascending ``id``."""
        return self.table("objects")

    def table(self, name: str) -> dict[str, np.ndarray]:
        """Columns of ``tables/NAME.parquet``."""
        from pyarrow import parquet

        stored = parquet.read_table(io.BytesIO(self._bytes(f"tables/{name}.parquet")))
        return {column: stored[column].to_numpy() for column in stored.column_names}

    # ---- the work folder

    def regions(self, box: Box) -> np.ndarray:
        """The region of each voxel of ``box``, numbered within its block."""
        return self._voxels("work/fragments", box)

    def block_basins(self, block: int) -> BlockBasins:
        return BlockBasins(**self._arrays(f"work/tables/{block}.npz"))

    def links(self, block: int) -> stitch.Links:
        return stitch.Links(**self._arrays(f"work/links/{block}.npz"))

    def block_labels(self, block: int) -> dict[str, np.ndarray]:
        """What was decided on a block: ``label`` and ``basin`` of its regions, and, where holes are filled, ``void``."""
        return self._arrays(f"work/labels/{block}.npz")

    def block_holes(self, block: int) -> holes.BlockHoles:
        return holes.BlockHoles(**self._arrays(f"work/voids/{block}.npz"))

    def hole_contacts(self, block: int) -> np.ndarray:
        return self._arrays(f"work/rims/{block}.npz")["pairs"]

    def basins(self) -> stitch.Basins | None:
        """The volume's basins; None where they were cleaned, or never were in one place because a tree stitched."""
        if not files.exists(f"{self.path}/work/basins.npz"):
            return None
        stored = self._arrays("work/basins.npz")
        return stitch.Basins(**{name: stored[name] for name in stitch.Basins.__dataclass_fields__})

    def volume_holes(self) -> holes.Holes:
        return holes.Holes(**self._arrays("work/voids.npz"))

    def saddle_rows(self) -> np.ndarray | None:
        """What the rows of the table of merges are made of, `saddles.ROW`; None where that was cleaned."""
        key = f"work/merges/{self.run.keys['stitch']}.npz"
        return self._arrays(key)["rows"] if files.exists(f"{self.path}/{key}") else None

    def _bytes(self, key: str) -> bytes:
        try:
            return files.read_bytes(self.path, key)
        except FileNotFoundError:
            raise UserError(
                f"{self.path} lacks {key}, which a finished run has: it was damaged; run volseg infer again"
            ) from None

    def _arrays(self, key: str) -> dict[str, np.ndarray]:
        try:
            return tables.load(self.path, key)
        except FileNotFoundError:
            raise UserError(
                f"{self.path} lacks {key}, which a finished run has: it was damaged; run volseg infer again"
            ) from None
        except (zipfile.BadZipFile, ValueError, EOFError) as error:
            raise UserError(
                f"cannot read {key} of {self.path}: {error}; it was damaged; run volseg infer again"
            ) from None

    def _voxels(self, name: str, box: Box) -> np.ndarray:
        """Voxels of ``box`` of an array of the run, all channels."""
        array = arrays.open_array(self.path, name)
        try:
            return np.ascontiguousarray(array[(slice(None),) * (array.ndim - 3) + box.slices])
        except (RuntimeError, ValueError, OSError) as error:
            cause = " ".join(str(error).split())[:300]
            raise UserError(
                f"cannot read {name} of {self.path} in box {box}: {cause}; it was damaged; run volseg infer again"
            ) from None


def run_path(run: str | PathLike | Any) -> str:
    """The folder of a run, which is given as a path or as an object that has it as ``path``."""
    return fspath(getattr(run, "path", run)).rstrip("/")


def open_finished(run: str | PathLike | Any) -> FinishedRun:
    """The finished run in a folder, or in that of an object with a ``path``.

    Raises
    ------
    UserError
        There is no finished run, or another version of volseg made it.
    """
    path = run_path(run)
    try:
        description = Run.from_json(json.loads(files.read_bytes(path, "run.json")))
    except OSError:
        raise UserError(
            f"{path} is no finished run: it holds no run.json; give the --out of a finished volseg infer"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is no run of this volseg: its run.json does not describe one; run volseg infer again"
        ) from None
    labels = volume.open(path, dataset="labels/instances/0")
    return FinishedRun(
        path, description, labels, _missing(path, len(Blocks(labels.shape, description.block)), description.fills)
    )


def _missing(path: str, blocks: int, fills: bool) -> str:
    """What keeps the basins of a run from being read; ``""`` for nothing."""
    if not files.exists(f"{path}/work/fragments"):
        return "the run's work folder was cleaned: stored basins and id maps cannot be checked, the rest is"
    for name in ("tables", "links", "labels", *(("voids", "rims") if fills else ())):
        count = len([key for key in files.list_keys(path, f"work/{name}") if key.endswith(".npz")])
        if count < blocks:
            return (
                f"work/{name} holds {count} of {blocks} blocks: stored basins and id maps cannot be checked, "
                "the rest is"
            )
    return ""
