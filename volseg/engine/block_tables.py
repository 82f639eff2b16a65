"""What the small tables in a run's folder hold."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


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
