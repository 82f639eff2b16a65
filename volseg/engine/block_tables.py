"""What the small tables in a run's folder hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from volseg.inference.sections import TileKey


@dataclass(frozen=True)
class BlockLabels:
    """The decision on one block.

    label  of each of its regions, ``label[0]`` is 0; where holes are filled, those of its holes follow
    basin  the volume's basin (from 0) of each region; empty where a tree decided
    hole   the volume's hole (from 0) of each of its holes
    """

    label: np.ndarray
    basin: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    hole: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass(frozen=True)
class Tally:
    """How probable the voxels of each of a block's regions are, and of its holes where these are filled.

    total   int64: sum of the stored mask probability (uint8); ``total[0]`` is of what has no region
    lowest  uint8: the lowest of it; 255 where there is no voxel
    """

    total: np.ndarray
    lowest: np.ndarray


@dataclass(frozen=True)
class HoleContacts:
    """Pairs of holes, and of holes and regions, that touch over a block's far faces: see `holes.face_contacts`."""

    pairs: np.ndarray


@dataclass(frozen=True)
class Joins:
    """How each join was decided: rows of `saddles.rank_saddles`, and each object's ``confidence``."""

    rows: np.ndarray
    confidence: np.ndarray


@dataclass(frozen=True)
class Destinations:
    """What became of the components that a part of the tree was given.

    destination  of each component: its number one level up, or what finished here
    labeled      which of those that finished here are objects
    sizes        how many components each part below gave
    """

    destination: np.ndarray
    labeled: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True)
class Values:
    """One array."""

    values: np.ndarray


@dataclass
class TileParts:
    """Parts of tiles of some sections that one block handed to another: keys, and an array for each, end to end."""

    section: np.ndarray
    row: np.ndarray
    column: np.ndarray
    shape: np.ndarray
    values: np.ndarray

    @classmethod
    def packed(cls, parts: list[tuple[TileKey, np.ndarray]]) -> TileParts:
        keys = np.array([(z, *tile) for (z, tile), _ in parts], np.int64).reshape(-1, 3)
        shapes = np.array([part.shape for _, part in parts], np.int64).reshape(-1, 3)
        values = np.concatenate([part.ravel() for _, part in parts] or [np.zeros(0, np.float32)])
        section, row, column = keys.T
        return cls(section, row, column, shapes, values.astype(np.float32, copy=False))

    def unpacked(self) -> Iterator[tuple[TileKey, np.ndarray]]:
        begin = 0
        for z, row, column, shape in zip(
            *(c.tolist() for c in (self.section, self.row, self.column, self.shape)), strict=True
        ):
            end = begin + int(np.prod(shape))
            yield (z, (row, column)), self.values[begin:end].reshape(shape)
            begin = end
