"""All labels of a finished run once more: from its probabilities in other blocks, and from its stored tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import prod

import numpy as np

from volseg.box import Blocks, Box, Triple
from volseg.engine.corrections import region_constraints
from volseg.engine.partition import decided
from volseg.evaluation.recheck import first_voxel, heights, inner, region_rows
from volseg.evaluation.stored import StoredRun
from volseg.segmentation import stitch
from volseg.segmentation.basins import BlockBasins, watershed_block
from volseg.segmentation.constraints import Constraints
from volseg.segmentation.holes import BlockHoles, block_holes, face_contacts, number_holes
from volseg.segmentation.holes import gather as gather_holes
from volseg.segmentation.rules import label_dtype

MAX_ROWS = 50_000_000  # regions and edges up to which stored tables are joined again
OTHER_BLOCK = (37, 101, 127)  # voxels, beside the halo: a block that fits no shard or tile


@dataclass(frozen=True)
class Relabeling:
    """All labels recomputed in ``blocks`` blocks of shape ``block``.

    Attributes
    ----------
    objects
        How many there are.
    wrong
        Voxels whose stored label is another; all of them where the labels have another dtype.
    first
        The first of these, z y x; None where there are none.
    """

    block: Triple
    blocks: int
    objects: int
    wrong: int
    first: list[int] | None

    def to_json(self) -> dict:
        """Plain values that ``json.dumps`` takes."""
        return {**asdict(self), "block": list(self.block)}


@dataclass(frozen=True)
class Rejoining:
    """The stored tables joined again: their regions, and how many have another label in the id maps or lead nowhere."""

    regions: int
    wrong: int

    def to_json(self) -> dict:
        """Plain values that ``json.dumps`` takes."""
        return asdict(self)


def other_block(run: StoredRun) -> Triple:
    """A block shape that is not the run's on any axis where there is a choice, and fits no shard or tile."""
    size = [min(c + 2 * h, n // 2 + 1) for c, h, n in zip(OTHER_BLOCK, run.halo, run.shape, strict=True)]
    return tuple(max(1, n - (n == own)) for n, own in zip(size, run.grid.block, strict=True))


def relabel(run: StoredRun, block: Triple) -> Relabeling:
    """All labels are recomputed in memory, from the stored probabilities in blocks of that shape, and compared."""
    grid = Blocks(run.shape, block)
    regions, tables = zip(*(_find_basins(run, box) for box in grid), strict=True)
    links = [stitch.link(i, tables.__getitem__, grid) for i in range(len(grid))]
    holes, contacts = [], []
    if run.fills:
        holes = [block_holes(region, box, run.shape) for region, box in zip(regions, grid, strict=True)]
        contacts = [face_contacts(i, holes.__getitem__, grid) for i in range(len(grid))]
    pairs = region_constraints(run.run, grid, lambda i, box: regions[i][box.slices_within(grid[i])])
    ids = _decide(run, tables, links, holes, contacts, pairs, range(len(grid)))
    objects = max(int(block_ids.max()) for block_ids in ids)
    wrong, first = 0, None
    for box, region, block_ids in zip(grid, regions, ids, strict=True):
        differs = block_ids[number_holes(region) if run.fills else region] != run.labels.read(box).astype(np.int64)
        wrong += int(np.count_nonzero(differs))
        first = first or (first_voxel(differs, box) if differs.any() else None)
    if run.labels.dtype != label_dtype(objects):
        wrong, first = prod(run.shape), [0, 0, 0]
    return Relabeling(block, len(grid), objects, wrong, first)


def _find_basins(run: StoredRun, box: Box) -> tuple[np.ndarray, BlockBasins]:
    probability = run.probability(box)
    height, mass = heights(run, probability, box), inner(run, probability[0], box)
    return watershed_block(height, mass, box, run.shape, run.config.fragments.connectivity)


def _decide(
    run: StoredRun,
    tables: Sequence[BlockBasins],
    links: Sequence[stitch.Links],
    holes: Sequence[BlockHoles],
    contacts: Sequence[np.ndarray],
    pairs: Constraints | None,
    blocks: Sequence[int],
) -> list[np.ndarray]:
    """For each block the label of region 0 (none), 1, 2, ... and then, where holes are filled, of its holes."""
    basins, basin_of = stitch.gather(tables, links, blocks)
    constraints = pairs and pairs.looked_up(dict(zip(blocks, basin_of, strict=True)).__getitem__)
    if not run.fills:
        label = decided(run.run, basins, constraints=constraints)
        return [np.r_[0, label[basin]] for basin in basin_of]
    volume_holes, hole_of = gather_holes(holes, contacts, basin_of)
    label, hole_label = np.split(decided(run.run, basins, volume_holes, constraints), [basins.minimum.size])
    return [np.r_[0, label[basin], hole_label[hole]] for basin, hole in zip(basin_of, hole_of, strict=True)]


def rejoin(run: StoredRun) -> Rejoining | None:
    """The stored tables are joined again; None where they have more than `MAX_ROWS` rows."""
    tables, links, rows = [], [], 0
    blocks = run.run.parts.own.numbers
    for i in blocks:
        table = run.layout.block_basins.load(i)
        tables.append(
            replace(table, crossing_edges=table.edges[:0], face_voxel=table.root[:0], face_region=table.root[:0])
        )
        links.append(run.layout.links.load(i))
        rows += table.root.size + table.edges.size + links[-1].edges.size
        if rows > MAX_ROWS:
            return None
    regions = sum(table.root.size for table in tables)
    holes = [run.layout.block_holes.load(i) for i in blocks if run.fills]
    contacts = [run.layout.hole_contacts.load(i).pairs for i in blocks if run.fills]
    table_of = dict(zip(blocks, tables, strict=True))
    stray = sum(_stray_links(link, table_of) for link in links) + _stray_holes(holes, contacts, tables)
    if stray:
        return Rejoining(regions, stray)
    wrong, pairs = 0, region_constraints(run.run, run.grid, lambda i, box: run.regions(box))
    for i, expected in zip(blocks, _decide(run, tables, links, holes, contacts, pairs, blocks), strict=True):
        stored = run.layout.block_labels.load(i).label.astype(np.int64)
        wrong += int(np.count_nonzero(stored != expected)) if stored.size == expected.size else expected.size
    return Rejoining(regions, wrong)


def _stray_links(link: stitch.Links, tables: dict[int, BlockBasins]) -> int:
    """How many links of a block name a region that no table has, or drain to one that is not lower."""
    upper, lower = (region_rows(names, tables.get) for names in link.drains.T)
    (known, _, height, root), (end_known, leaves, end_height, end_root) = upper, lower
    down = (end_height < height) | ((end_height == height) & ((end_root < root) | ((end_root == root) & ~leaves)))
    ends = [region_rows(link.edges[end], tables.get)[0] for end in "ab"]
    return int(np.count_nonzero(~(known & end_known & down)) + np.count_nonzero(~(ends[0] & ends[1])))


def _stray_holes(holes: list[BlockHoles], contacts: list[np.ndarray], tables: list[BlockBasins]) -> int:
    """How many tables of holes count other regions than there are, and how many contacts name a place that no table has."""
    if not holes:
        return 0
    last = np.array([table.root.size + hole.voxels.size for hole, table in zip(holes, tables, strict=True)])
    miscounted = sum(int(hole.regions) != table.root.size for hole, table in zip(holes, tables, strict=True))
    rims = (stitch.global_id(i, hole.contacts) for i, hole in enumerate(holes))
    names = np.concatenate([np.empty((0, 2), np.int64), *contacts, *rims])
    block, place = names >> 32, names & stitch.REGION_MASK
    known = (block >= 0) & (block < len(holes)) & (place > 0) & (place <= last[np.clip(block, 0, len(holes) - 1)])
    return miscounted + int(np.count_nonzero(~known.all(axis=1)))
