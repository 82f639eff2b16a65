"""How much a section, or a window of one, would tell a network if it were annotated: four numbers for each candidate.

    uncertain  share of its voxels whose probability is near the threshold, as all their neighbors' is: a sharp border is not
    unlike     share of its voxels that the network sees otherwise in the section beside, as all their neighbors
    joins      how many joins and borders of objects near it were decided by little, see `segmentation.saddles`
    novelty    how far gray values and their gradients are from those of annotated sections, or from the usual ones

A volume of any size is looked at in pieces, a window of some consecutive sections each, as many as `MAX_VOXELS` allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod

import numpy as np
from scipy import ndimage

from volseg.box import Box
from volseg.evaluation.stored import StoredRun
from volseg.inference.padding import lost_voxels, values_of_nothing
from volseg.io.resample import Grid
from volseg.io.roi import RegionOfInterest
from volseg.io.volume import Volume

MAX_EDGE = 2048  # of a plane that is annotated whole, voxels; of a larger one, windows of about half of it are
DEPTH = 16  # sections of a piece
MAX_VOXELS = 1 << 30  # that are looked at
NEAR = 0.2  # a probability so near the threshold is uncertain
UNLIKE = 0.4  # probabilities so far apart in neighboring sections disagree
MARGIN = 0.05  # of a decision, that counts half as much as one without a margin
REACH = 2  # sections from a decision in which it is seen
PATCH = 512  # longest edge of the part whose gray values are looked at
MASKED_DRAWS = 8  # pieces that are tried for each one that is looked at, where a mask may want nothing of them
SEED = 0  # of the pieces that are drawn


@dataclass(frozen=True)
class Candidate:
    """A section, or a window of one, and what it would tell.

    Attributes
    ----------
    box
        In the volume as it was given, one section deep.
    uncertain, unlike, joins, novelty
        See above.
    """

    box: Box
    uncertain: float
    unlike: float
    joins: float
    novelty: float


def windows(wanted: Box) -> list[tuple[slice, slice]]:
    """Rows and columns of the windows of a box's sections: of small ones, all of it.

    >>> windows(Box((0, 0, 0), (5, 768, 1024)))
    [(slice(0, 768, None), slice(0, 1024, None))]
    >>> [window[1] for window in windows(Box((0, 0, 100), (5, 1000, 4200)))]
    [slice(100, 1125, None), slice(1125, 2150, None), slice(2150, 3175, None), slice(3175, 4200, None)]
    """
    spans = []
    for start, length in zip(wanted.start[1:], wanted.shape[1:], strict=True):
        count = 1 if length <= MAX_EDGE else length // (MAX_EDGE // 2)
        edges = [start + length * i // count for i in range(count + 1)]
        spans.append([slice(a, b) for a, b in pairwise(edges)])
    return list(product(*spans))


def pieces(wanted: Box, region: RegionOfInterest | None = None) -> Iterator[Box]:
    """The pieces of a volume that are looked at: all in the box that is wanted, or as many as `MAX_VOXELS` allow, evenly spread
    and each drawn from its share. Of a ``region`` with a mask, those that it meets, among a few times as many."""
    grid = windows(wanted)
    layers = -(-wanted.shape[0] // DEPTH)
    largest = DEPTH * max(prod(s.stop - s.start for s in window) for window in grid)
    total = layers * len(grid)
    count = min(total, max(1, MAX_VOXELS // largest))
    masked = region is not None and region.mask is not None
    shares = min(total, MASKED_DRAWS * count) if masked else count
    rng = np.random.default_rng(SEED)
    drawn = rng.random(shares) if shares < total else np.zeros(shares)
    order = rng.permutation(shares).tolist() if shares > count else range(shares)
    for i in order:
        layer, window = divmod(int((i + drawn[i]) * total / shares), len(grid))
        y, x = grid[window]
        first = wanted.start[0] + layer * DEPTH
        box = Box((first, y.start, x.start), (min(wanted.stop[0], first + DEPTH), y.stop, x.stop))
        if not masked or region.meets(box):
            yield box
            count -= 1
        if not count:
            return


def candidates(stored: StoredRun, image: Volume, annotated: Sequence[int]) -> list[Candidate]:
    """Every section of the `pieces`, with what it would tell; none of which something was lost in the middle of its window, and
    none that shows nothing there.

    Parameters
    ----------
    stored
        The run; its probabilities and table of merges are read.
    image
        The volume as it was given to the run; a part of each piece is read.
    annotated
        Sections of it that were annotated, against which novelty is measured.
    """
    run, known = stored.run, set(annotated)
    run.require_probabilities("looking for sections that would tell most")
    region = run.given_roi if run.given else run.roi
    wanted = region.roi if region else Box.from_shape(image.shape)
    decisions = _decisions(stored)
    found, looks = [], []
    for piece in pieces(wanted, region):
        shares = _uncertainty(stored, piece, wanted)
        grays = _grays(image, piece)
        for i, z in enumerate(range(piece.start[0], piece.stop[0])):
            box = Box((z, *piece.start[1:]), (z + 1, *piece.stop[1:]))
            if grays[i] is None:
                continue
            found.append((box, *shares[:, i].tolist(), _nearby(decisions, box)))
            looks.append(grays[i])
    if not found:
        return []
    distance = _novelty(np.array(looks), np.array([box.start[0] in known for box, *_ in found]))
    return [
        Candidate(box, uncertain, unlike, joins, novelty)
        for (box, uncertain, unlike, joins), novelty in zip(found, distance.tolist(), strict=True)
    ]


# ---------------------------------------------------------------- probabilities


def mask_probability(stored: StoredRun, box: Box) -> np.ndarray:
    """The mask's probabilities (uint8) in a box of the volume as it was given."""
    return _on_given_grid(stored, box, lambda own: stored.layout.probabilities.read(own, 0))


def labels_at(stored: StoredRun, box: Box) -> np.ndarray:
    """Labels in a box of the volume as it was given."""
    if stored.run.restored:
        return stored.output_labels(box)
    return _on_given_grid(stored, box, stored.output_labels)


def _on_given_grid(stored: StoredRun, box: Box, read: Callable[[Box], np.ndarray]) -> np.ndarray:
    """What ``read`` gives of a box of the run's own grid, in a box of the volume as it was given."""
    run = stored.run
    if not run.given:
        return read(box)
    to_own = Grid.between(run.given.shape, run.given.voxel_size_nm, run.shape, run.voxel_size_nm)
    own = to_own.nearest_box(box)
    return to_own.take(read(own), own, box)


def _uncertainty(stored: StoredRun, piece: Box, wanted: Box) -> np.ndarray:
    """For each section of a piece, the shares of voxels that are uncertain, and unlike in the section beside."""
    around = Box((piece.start[0] - 1, *piece.start[1:]), (piece.stop[0] + 1, *piece.stop[1:])).intersect(wanted)
    sections = mask_probability(stored, around)
    threshold = round(255 * stored.config.fragments.threshold)
    near = np.array([_thick_share(_distance(section, threshold) <= 255 * NEAR) for section in sections])
    apart = np.array([_thick_share(_distance(a, b) >= 255 * UNLIKE) for a, b in pairwise(sections)])
    beside = np.stack([np.r_[np.nan, apart], np.r_[apart, np.nan]])  # of each section, from both sides
    unlike = np.nanmean(beside, axis=0) if apart.size else np.zeros(len(sections))
    own = slice(piece.start[0] - around.start[0], piece.stop[0] - around.start[0])
    return np.stack([near[own], unlike[own]])


def _distance(a: np.ndarray, b: np.ndarray | int) -> np.ndarray:
    """How far probabilities (uint8) lie apart."""
    return np.abs(a.astype(np.int16) - b)


def _thick_share(marked: np.ndarray) -> float:
    """The share of a section (y, x) that is marked with all its eight neighbors."""
    return float(ndimage.binary_erosion(marked, np.ones((3, 3), bool)).mean())


# ---------------------------------------------------------------- decisions


def _decisions(stored: StoredRun) -> np.ndarray:
    """Place z, y, x and weight of each join and border in the table of merges, on the grid of the volume as it was given."""
    columns = stored.table("merges")
    place = np.stack([columns[axis].astype(float) for axis in "zyx"], axis=1)
    run = stored.run
    if run.given and not run.restored:
        place *= [n / m for n, m in zip(run.given.shape, run.shape, strict=True)]
    return np.c_[place, np.exp2(-columns["margin"] / MARGIN)]


def _nearby(decisions: np.ndarray, box: Box) -> float:
    """The weights of all decisions that are seen in a section, less from further away."""
    z, y, x, weight = decisions.T
    away = np.abs(z - box.start[0])
    (_, y0, x0), (_, y1, x1) = box.start, box.stop
    inside = (away <= REACH) & (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
    return float((weight[inside] / (1 + away[inside])).sum())


# ---------------------------------------------------------------- gray values


def _grays(image: Volume, piece: Box) -> list[np.ndarray | None]:
    """Mean, deviation and gradient of each section of a piece, in the middle of its window; None where that is no tissue to
    learn from: one gray value, or something that was lost.
    """
    start, stop = list(piece.start), list(piece.stop)
    for axis in (1, 2):
        edge = min(PATCH, piece.shape[axis])
        start[axis] += (piece.shape[axis] - edge) // 2
        stop[axis] = start[axis] + edge
    stored = image.read(Box(tuple(start), tuple(stop)))
    lost = lost_voxels(stored, values_of_nothing(stored.dtype, (0.0,)))
    voxels = stored.astype(np.float32)
    slopes = [np.abs(np.diff(voxels, axis=axis)).mean(axis=(1, 2)) if voxels.shape[axis] > 1 else 0 for axis in (1, 2)]
    looks = np.stack([voxels.mean(axis=(1, 2)), voxels.std(axis=(1, 2)), slopes[0] + slopes[1]], axis=1)
    return [look if look[1] and one is None else None for look, one in zip(looks, lost, strict=True)]


def _novelty(looks: np.ndarray, annotated: np.ndarray) -> np.ndarray:
    """How far each row lies from the nearest annotated one, or from the median of all, in deviations of all."""
    spread = np.maximum(looks.std(axis=0), 1e-6 * np.maximum(1, np.abs(looks).max(axis=0)))
    scaled = (looks - np.median(looks, axis=0)) / spread
    middles = scaled[annotated] if annotated.any() else np.zeros((1, looks.shape[1]))
    out = np.full(len(looks), np.inf)
    for middle in middles:  # one at a time: all distances together would be as many as squares of candidates
        out = np.minimum(out, np.sqrt(((scaled - middle) ** 2).sum(axis=1)))
    return out
