"""Time and memory of stitching, flat and in a tree, on tables of simulated volumes far larger than any at hand.

The tables are real: a part of a finished run's probabilities is mirrored along each axis, so that it can be repeated without
a seam, and cut into blocks. A block of the simulated volume is the block of the pattern that lies there, moved: its region
names and linear indices are those of the place. So a volume of any size has consistent tables with the statistics of real
ones, and a part of the tree that lies whole periods from another is the same part, moved. One of each kind is run.

``python -m benchmarks stitch --edges 1e8 --simulate 1e12`` needs a finished run, such as `python -m benchmarks epfl` makes.
"""

from __future__ import annotations

import multiprocessing
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from math import ceil, prod

import numpy as np

from benchmarks import report
from volseg.box import Blocks, Box, Triple
from volseg.config import Fragments
from volseg.engine.finished import open_run
from volseg.engine.receipt import peak_bytes
from volseg.errors import UserError
from volseg.segmentation import hierarchy, stitch
from volseg.segmentation.basins import BlockBasins, watershed_block
from volseg.segmentation.heights import block_heights, height_halo
from volseg.segmentation.rules import Rules, label_basins

LEVELS = 8  # of the tree that the simulated volumes have room for


@dataclass(frozen=True)
class Pattern:
    """Tables and links of one period of a volume that repeats itself.

    grid     blocks of a volume with room for many periods; the one that was cut begins at block ``origin`` on each axis
    counts   blocks of a period, powers of two
    """

    grid: Blocks
    counts: Triple
    origin: int
    tables: dict[int, BlockBasins]
    links: dict[int, stitch.Links]
    rules: Rules

    @property
    def edges(self) -> int:
        """Rows of a period."""
        return sum(t.edges.size for t in self.tables.values()) + sum(l.edges.size for l in self.links.values())

    def base(self, i: int, level: int = 0) -> tuple[int, Triple]:
        """The part of the period that part ``i`` of that level is a moved copy of, and by how many blocks."""
        parts = hierarchy.parts(self.grid, level)
        coords, start = parts.coords(i), self.origin >> level
        base = [start + (c - start) % max(1, n >> level) for c, n in zip(coords, self.counts, strict=True)]
        return parts.index(tuple(base)), tuple((c - b) << level for c, b in zip(coords, base, strict=True))


def cut_pattern(run: str, block: Triple, max_shape: Triple) -> Pattern:
    """The pattern of a run's probabilities in blocks of that shape, of at most ``max_shape`` voxels before mirroring."""
    finished = open_run(run)
    config, shape, voxel_size_nm = finished.config, finished.shape, finished.voxel_size_nm
    counts = tuple(_blocks(min(n, m), b) for n, m, b in zip(shape, max_shape, block, strict=True))
    half = [c * b // 2 for c, b in zip(counts, block, strict=True)]
    corner = (slice(n - h, n) for n, h in zip(shape, half, strict=True))
    period = np.asarray(finished.probabilities[(slice(None), *corner)])
    for axis in (1, 2, 3):
        period = np.concatenate([period, np.flip(period, axis)], axis)
    origin = 2 << LEVELS
    grid = Blocks(tuple(2 * origin * b for b in block), block)
    pattern = Pattern(grid, counts, origin, {}, {}, Rules.from_config(config, voxel_size_nm))
    places = [grid.index(tuple(origin + c for c in coords)) for coords in product(*map(range, counts))]
    for i in places:
        pattern.tables[i] = _table(period, grid[i], grid.shape, config.fragments, voxel_size_nm)
    table_of = lru_cache(64)(lambda j: _moved_table(pattern, j))
    for i in places:
        pattern.links[i] = stitch.link(i, table_of, grid)
    return pattern


def _blocks(length: int, block: int) -> int:
    """The most blocks, a power of two, that fit twice the length."""
    if 2 * length < block:
        raise UserError(f"{length} voxels mirrored are less than a block of {block}; give a smaller --block")
    return 1 << (2 * length // block).bit_length() - 1


def _table(period: np.ndarray, box: Box, shape: Triple, settings: Fragments, voxel_size_nm: tuple) -> BlockBasins:
    padded = box.grow(height_halo(settings, voxel_size_nm))
    index = [np.arange(a, b) % n for a, b, n in zip(padded.start, padded.stop, period.shape[1:], strict=True)]
    probability = period[np.ix_(range(len(period)), *index)]
    height = block_heights(probability, box, shape, settings, voxel_size_nm)
    mass = np.ascontiguousarray(probability[0][box.slices_within(padded)])
    return watershed_block(height, mass, box, shape, settings.connectivity)[1]


# ---------------------------------------------------------------- moving


def _voxels(pattern: Pattern, move: Triple) -> int:
    """How far in linear index a move by so many blocks goes."""
    (_, ny, nx), (z, y, x) = pattern.grid.shape, (n * b for n, b in zip(move, pattern.grid.block, strict=True))
    return (z * ny + y) * nx + x


def _shifted(rows: np.ndarray, offset: int, names: int, fields: tuple[str, ...]) -> np.ndarray:
    out = rows.copy()
    for field in ("high_voxel", "low_voxel"):
        out[field] += offset
    for field in fields:
        out[field] += names
    return out


def _moved_table(pattern: Pattern, i: int) -> BlockBasins:
    base, move = pattern.base(i)
    table, offset = pattern.tables[base], _voxels(pattern, move)
    moved = {name: getattr(table, name) + offset for name in ("root", "first", "face_voxel")}
    crossing = _shifted(table.crossing_edges, offset, 0, ())
    crossing["b"] += offset
    return replace(table, **moved, edges=_shifted(table.edges, offset, 0, ()), crossing_edges=crossing)


def _moved_links(pattern: Pattern, i: int) -> stitch.Links:
    base, move = pattern.base(i)
    names = (i - base) << 32
    links = pattern.links[base]
    return stitch.Links(links.drains + names, _shifted(links.edges, _voxels(pattern, move), names, ("a", "b")))


def _moved_graph(pattern: Pattern, graph: hierarchy.Graph, move: Triple) -> hierarchy.Graph:
    offset = _voxels(pattern, move)
    _, ny, nx = pattern.grid.counts
    names = ((move[0] * ny + move[1]) * nx + move[2]) << 32
    inner = _shifted(graph.inner, offset, 0, ())
    return replace(
        graph,
        first=graph.first + offset,
        inner=inner,
        outer=_shifted(graph.outer, offset, names, ("region", "neighbor")),
    )


# ---------------------------------------------------------------- flat


def periods_for(pattern: Pattern, edges: int) -> Triple:
    """Periods along each axis of a volume with at least so many edges."""
    periods = ceil(edges / pattern.edges)
    side = max(1, round(periods ** (1 / 3)))
    return side, side, ceil(periods / side**2)


def repeat_blocks(pattern: Pattern, repeats: Triple) -> Iterator[tuple[BlockBasins, stitch.Links]]:
    """Tables and links of a volume of so many periods: blocks are numbered one period after another.

    What leads out of the volume is left out.
    """
    number = {base: k for k, base in enumerate(pattern.tables)}
    tables, links = list(pattern.tables.values()), [pattern.links[base] for base in number]
    first, first_cuts = _stacked([t.first for t in tables])
    inner, inner_cuts = _stacked([t.edges for t in tables])
    edges, edge_cuts = _stacked([l.edges for l in links])
    drains, drain_cuts = _stacked([l.drains for l in links])
    a, start = (_relative(pattern, names, number)[1] for names in (edges["a"], drains[:, 0]))
    (b_side, b), (end_side, end) = (_relative(pattern, names, number) for names in (edges["b"], drains[:, 1]))
    for period in product(*map(range, repeats)):
        offset = _voxels(pattern, tuple(n * c for n, c in zip(period, pattern.counts, strict=True)))
        periods = _periods_around(period, repeats)
        block = periods * len(tables) << 32
        own_block = block[13]
        rows = _shifted(edges, offset, 0, ())
        rows["a"], rows["b"] = a + own_block, b + block[b_side]
        pairs = np.stack([start + own_block, end + block[end_side]], axis=1)
        inside = np.split(periods[b_side] >= 0, edge_cuts), np.split(periods[end_side] >= 0, drain_cuts)
        parts = (np.split(first + offset, first_cuts), np.split(_shifted(inner, offset, 0, ()), inner_cuts),
                 np.split(rows, edge_cuts), np.split(pairs, drain_cuts), *inside)  # fmt: skip
        for table, begin, within, over, drain, stays, flows in zip(tables, *parts, strict=True):
            yield replace(table, first=begin, edges=within), stitch.Links(drain[flows], over[stays])


def _stacked(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The parts in one array, and where it is to be cut into them again."""
    return np.concatenate(parts), np.cumsum([part.shape[0] for part in parts])[:-1]


def _relative(pattern: Pattern, names: np.ndarray, number: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """For each name the period that it lies in (0..26, 13 is the pattern's own), and its name within a period."""
    blocks, row = np.unique(names >> 32, return_inverse=True)
    bases = [pattern.base(int(block)) for block in blocks]
    sides = [
        sum((n // c + 1) * 3**k for n, c, k in zip(move, pattern.counts, (2, 1, 0), strict=True)) for _, move in bases
    ]
    own_number = np.array([number[base] for base, _ in bases], np.int64)
    return np.array(sides, np.int64)[row], (own_number[row] << 32) | (names & stitch.REGION_MASK)


def _periods_around(period: Triple, repeats: Triple) -> np.ndarray:
    """The numbers of a period and its neighbors in a volume of so many periods, below 0 for those outside it."""
    out = np.full(27, -1, np.int64)
    for k, side in enumerate(product((-1, 0, 1), repeat=3)):
        z, y, x = (a + step for a, step in zip(period, side, strict=True))
        if 0 <= z < repeats[0] and 0 <= y < repeats[1] and 0 <= x < repeats[2]:
            out[k] = (z * repeats[1] + y) * repeats[2] + x
    return out


def measure_flat(pattern: Pattern, repeats: Triple) -> dict:
    """One row: what `gather` and `label_basins` take for a volume of so many periods, all in this process.

    The time to draw the tables is left out, as is that to read them where they are stored.
    """
    clock, drawing, counts = _Clock(), _Clock(), np.zeros(2, np.int64)
    tables, links = _unzipped(_counted(repeat_blocks(pattern, repeats), drawing, counts))
    basins, _ = stitch.gather(tables, links)
    gathered = clock.lap()
    label = label_basins(basins, pattern.rules)
    decided = clock.lap()
    return {
        "edges": int(counts[1]), "regions": int(counts[0]), "basins": label.size, "objects": int(label.max(initial=0)),
        "gather s": round(gathered[0] - drawing.total[0], 1), "decide s": round(decided[0], 1),
        "cpu s of both": round(gathered[1] - drawing.total[1] + decided[1], 1), "drawing s": round(drawing.total[0], 1),
        "peak GB": round(peak_bytes() / 1e9, 2), "bytes per edge": round(peak_bytes() / max(1, counts[1])),
    }  # fmt: skip


def _counted(pairs: Iterator[tuple], clock: _Clock, counts: np.ndarray) -> Iterator[tuple]:
    """The pairs; ``counts`` has their regions and edges, ``clock.total`` the time that they took to make."""
    clock.lap()
    for table, links in pairs:
        clock.add()
        counts += (table.root.size, table.edges.size + links.edges.size)
        yield table, links
        clock.lap()


def _unzipped(pairs: Iterator[tuple]) -> tuple[Iterator, Iterator]:
    """Two iterators over the sides of pairs; each left side is taken before its right side."""
    waiting: list = []

    def left() -> Iterator:
        for one, other in pairs:
            waiting.append(other)
            yield one

    def right() -> Iterator:
        while waiting:
            yield waiting.pop()

    return left(), right()


class _Clock:
    """Laps of wall-clock and CPU seconds; on a shared machine the second says more."""

    def __init__(self) -> None:
        self.last, self.total = (time.perf_counter(), time.process_time()), (0.0, 0.0)

    def lap(self) -> tuple[float, float]:
        now = time.perf_counter(), time.process_time()
        before, self.last = self.last, now
        return now[0] - before[0], now[1] - before[1]

    def add(self) -> None:
        """The lap is part of the total."""
        wall, cpu = self.lap()
        self.total = self.total[0] + wall, self.total[1] + cpu


# ---------------------------------------------------------------- tree


def measure_levels(pattern: Pattern, voxels: float) -> list[dict]:
    """A row for each level of the tree over a volume of so many voxels: every kind of part is contracted once.

    Seconds are of one process and without storage. The volume's outer faces are taken for inner ones, except at the top.
    """
    graphs: dict[int, hierarchy.Graph] = {}
    rows, last = [], _top(pattern, voxels)
    for level in range(last + 1):
        graphs, row = _level(pattern, graphs, level, level == last)
        part = prod(b << level for b in pattern.grid.block)
        count = max(1, round(voxels / part))
        rows.append({"level": level, "parts": count, "of voxels": f"{part:.2g}", **row,
                     "all parts, cpu h": round(count * row["cpu s"] / 3600, 3)})  # fmt: skip
    return rows


def _top(pattern: Pattern, voxels: float) -> int:
    level = 0
    while prod(b << level for b in pattern.grid.block) < voxels:
        level += 1
    if level > LEVELS:
        raise UserError(f"a volume of {voxels:g} voxels has {level} levels; there is room for {LEVELS}")
    return level


def _level(
    pattern: Pattern, below: dict[int, hierarchy.Graph], level: int, last: bool
) -> tuple[dict[int, hierarchy.Graph], dict]:
    """The contracted parts of one period at that level, and their mean cost."""
    start, ups, costs = pattern.origin >> level, {}, []
    parts = hierarchy.parts(pattern.grid, level)
    for coords in product(*(range(max(1, n >> level)) for n in pattern.counts)):
        n = parts.index(tuple(start + c for c in coords))
        if level == 0:
            links = {j: _moved_links(pattern, j) for j in hierarchy.linked_blocks(pattern.grid, n, 26)}
            build = partial(hierarchy.block_graph, n, pattern.tables[n], links)
            size = pattern.tables[n].edges.nbytes + sum(l.edges.nbytes for l in links.values())
        else:
            build = partial(_join_children, pattern, below, level, n, last)
            graphs = list(_children(pattern, below, level, n, last))
            size = sum(_bytes(g) for g in graphs)
        clock = _Clock()
        graph = build() if level == 0 else hierarchy.join(graphs, pattern.grid, level, n)
        ups[n], finished, _ = hierarchy.contract(graph, pattern.rules.seed_height)
        costs.append((clock.lap()[1], graph.minimum.size, graph.inner.size + graph.outer.size, finished.minimum.size,
                      size, _bytes(ups[n]), ups[n].minimum.size))  # fmt: skip
        if last:
            break
    cpu, components, rows, finished, read, written, up = np.mean(costs, axis=0)
    return ups, {
        "components": round(components), "rows": round(rows), "finished": round(finished), "go up": round(up),
        "MB read": round(read / 1e6, 3), "MB up": round(written / 1e6, 3), "cpu s": round(cpu, 4),
        "peak MB": round(_peak(build, pattern) / 1e6, 2),
    }  # fmt: skip


def _join_children(
    pattern: Pattern, below: dict[int, hierarchy.Graph], level: int, n: int, last: bool
) -> hierarchy.Graph:
    return hierarchy.join(_children(pattern, below, level, n, last), pattern.grid, level, n)


def _children(
    pattern: Pattern, below: dict[int, hierarchy.Graph], level: int, n: int, last: bool
) -> Iterator[hierarchy.Graph]:
    """The graphs of the parts that make up part ``n``; where it is the ``last``, nothing leads out of it."""
    for child in hierarchy.children(pattern.grid, level, n):
        base, move = pattern.base(child, level - 1)
        graph = _moved_graph(pattern, below[base], move)
        yield _without_outside(pattern, graph, level, n) if last else graph


def _without_outside(pattern: Pattern, graph: hierarchy.Graph, level: int, n: int) -> hierarchy.Graph:
    """The graph if the volume ended where part ``n`` does."""
    place = np.unravel_index(graph.outer["neighbor"] >> 32, pattern.grid.counts)
    coords = hierarchy.parts(pattern.grid, level).coords(n)
    inside = np.all([p >> level == c for p, c in zip(place, coords, strict=True)], axis=0)
    return replace(graph, outer=graph.outer[inside])


def _bytes(graph: hierarchy.Graph) -> int:
    return sum(getattr(graph, name).nbytes for name in hierarchy.Graph.__dataclass_fields__)


def _peak(build: object, pattern: Pattern) -> int:
    """Most bytes that one part takes, with what it is given: as in a run, a part of its own at a time."""
    tracemalloc.start()
    hierarchy.contract(build(), pattern.rules.seed_height)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


# ---------------------------------------------------------------- command


def measure(edges: float, simulate: float, run: str, block: Triple, max_shape: Triple) -> None:
    """Seconds and memory of stitching edge tables with the statistics of real blocks, in one process and in a tree."""
    begin = time.perf_counter()
    pattern = cut_pattern(run, block, max_shape)
    print(f"pattern of {len(pattern.tables)} blocks, {pattern.edges} edges, cut in {time.perf_counter() - begin:.0f} s")
    if simulate:
        report.keep("stitch-tree", measure_levels(pattern, simulate))
    if edges:
        repeats = periods_for(pattern, int(edges))
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own: its peak is that of the work
            pool.apply(measure_flat, (pattern, (1, 1, 1)))
            report.keep("stitch-flat", [pool.apply(measure_flat, (pattern, repeats))])
