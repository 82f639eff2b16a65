"""What a finished run stored, to compute from: probabilities, tables, and its work folder where that was kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np

from volseg.box import Blocks, Box, Triple
from volseg.config import Config
from volseg.engine import restore
from volseg.engine.finished import open_run
from volseg.engine.layout import Layout, StoredArray, Tables
from volseg.engine.run import Run
from volseg.errors import UserError
from volseg.io import files, volume
from volseg.segmentation.heights import height_halo
from volseg.segmentation.rules import Rules


@dataclass(frozen=True)
class OwnLabels:
    """The labels of a resampled run on its own grid, from its work folder: stored are those on the grid of its source."""

    run: Run
    dtype: str

    @property
    def shape(self) -> Triple:
        return self.run.shape

    def read(self, box: Box) -> np.ndarray:
        """Labels of ``box``."""
        blocks = self.run.grid.overlapping(box)
        labels = {i: self.run.layout.block_labels.load(i).label.astype(self.dtype) for i in blocks}
        region, label = restore.own_regions(self.run, box, labels)
        return label[region]


@dataclass(frozen=True)
class StoredRun:
    """A finished run, and what its labels follow from.

    Attributes
    ----------
    path
        Its folder.
    run
        Its description.
    labels
        Its labels at full resolution, on the grid in which it was computed.
    missing
        Why the basins of its work folder cannot be read; ``""`` where they can.
    """

    path: str
    run: Run
    labels: volume.Volume | OwnLabels
    missing: str = ""

    @property
    def layout(self) -> Layout:
        return Layout(self.path, self.run.parts.nothing)

    @property
    def config(self) -> Config:
        return self.run.config

    @property
    def shape(self) -> Triple:
        return self.labels.shape

    @property
    def voxel_size_nm(self) -> tuple[float, float, float]:
        return self.run.voxel_size_nm

    def output_labels(self, box: Box) -> np.ndarray:
        """Labels as they are stored, in a box of their own grid."""
        return volume.open(self.path, dataset="labels/instances/0").read(box)

    @property
    def grid(self) -> Blocks:
        return Blocks(self.shape, self.run.block)

    @property
    def roi(self) -> Box:
        """The part of the volume that the run was told to do."""
        return self.run.roi.roi if self.run.roi else Box.from_shape(self.shape)

    @property
    def rules(self) -> Rules:
        return self.run.rules

    @property
    def fills(self) -> bool:
        """Whether holes were filled."""
        return self.run.fills_holes

    @property
    def halo(self) -> Triple:
        """Voxels around a box that its heights need."""
        return height_halo(self.config.fragments, self.voxel_size_nm)

    def probability(self, box: Box) -> np.ndarray:
        """Stored probabilities (uint8; channels, z, y, x) of ``box`` and the halo that heights need, cut to the volume."""
        return self._voxels("probabilities", box.grow(self.halo).clip(self.shape))

    @cached_property
    def corrected(self) -> np.ndarray:
        """The labels of the objects that corrections name, ascending."""
        pairs = self.run.corrections.pairs if self.run.corrections else []
        points = [point for _, pair in pairs for point in pair]
        labels = [self.labels.read(Box((z, y, x), (z + 1, y + 1, x + 1))) for z, y, x in points]
        return np.unique(np.array(labels, np.int64))

    @cached_property
    def objects(self) -> dict[str, np.ndarray]:
        """Columns of the object table, by ascending ``id``."""
        return self.table("objects")

    def table(self, name: str) -> dict[str, np.ndarray]:
        """Columns of ``tables/NAME.parquet``."""
        stored = self.layout.read_columns(name)
        return {column: stored[column].to_numpy() for column in stored.column_names}

    def regions(self, box: Box) -> np.ndarray:
        """The region of each voxel of ``box``, numbered within its block."""
        return self._voxels("regions", box)

    def _voxels(self, name: str, box: Box) -> np.ndarray:
        """Voxels of ``box`` of an array of the run, all channels."""
        array: StoredArray = getattr(self.layout, name)
        try:
            return np.ascontiguousarray(array.read(box))
        except (RuntimeError, ValueError, OSError) as error:
            cause = " ".join(str(error).split())[:300]
            raise UserError(
                f"cannot read {array.name} of {self.path} in box {box}: {cause}; it was damaged; run volseg infer again"
            ) from None


def open_stored(run: str | PathLike | Any) -> StoredRun:
    """The finished run in a folder, or in that of an object with a ``path``.

    Raises
    ------
    UserError
        There is no finished run, or another version of volseg made it.
    """
    finished = open_run(files.path_of(run))
    labels = volume.open(finished.path, dataset="labels/instances/0")
    run = finished.run
    stored = StoredRun(finished.path, run, OwnLabels(run, labels.dtype) if run.restored else labels)
    return replace(stored, missing=_missing(stored.layout, run.parts.own.count, stored.fills))


def _missing(layout: Layout, blocks: int, fills: bool) -> str:
    """What keeps the basins of a run from being read; ``""`` for nothing."""
    if not layout.regions.exists():
        return "the run's work folder was cleaned: stored basins and id maps cannot be checked, the rest is"
    needed: list[Tables] = [layout.block_basins, layout.links, layout.block_labels]
    if fills:
        needed += [layout.block_holes, layout.hole_contacts]
    for kind in needed:
        count = kind.count()
        if count < blocks:
            return f"{kind.folder} holds {count} of {blocks} blocks: stored basins and id maps cannot be checked, the rest is"
    return ""
