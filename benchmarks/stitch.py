"""Time and memory of stitching, flat and in a tree, on tables of simulated volumes far larger than any at hand.

The tables are real: a part of a finished run's probabilities is mirrored along each axis, so that it can be repeated without
a seam, and cut into blocks. A block of the simulated volume is the block of the pattern that lies there, moved: its region
names and linear indices are those of the place. So a volume of any size has consistent tables with the statistics of real
ones, and a part of the tree that lies whole periods from another is the same part, moved. One of each kind is run.

``python -m benchmarks.stitch --edges 1e8 --simulate 1e12`` needs a finished run, such as `python -m benchmarks epfl` makes.
"""

from __future__ import annotations

import json
import multiprocessing
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import ceil, prod
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks import report
from volseg import cluster, fragments, stitch, tree, volume
from volseg.box import Blocks, Box, Triple
from volseg.config import Config, Fragments, UserError
from volseg.decide import Rules, decide, rules

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
    tables: dict[int, fragments.Table]
    links: dict[int, stitch.Links]
    rules: Rules

    @property
    def edges(self) -> int:
        """Rows of a period."""
        return sum(t.edges.size for t in self.tables.values()) + sum(l.edges.size for l in self.links.values())

    def base(self, i: int, level: int = 0) -> tuple[int, Triple]:
        """The part of the period that part ``i`` of that level is a moved copy of, and by how many blocks."""
        parts = tree.parts(self.grid, level)
        coords, start = parts.coords(i), self.origin >> level
        there = [start + (c - start) % max(1, n >> level) for c, n in zip(coords, self.counts, strict=True)]
        return parts.index(tuple(there)), tuple((c - b) << level for c, b in zip(coords, there, strict=True))


def cut(run: str, block: Triple, most: Triple) -> Pattern:
    """The pattern of a finished run's probabilities in blocks of that shape, of at most ``most`` voxels before mirroring."""
    if not volume.exists(f"{run}/run.json"):
        raise UserError(f"{run} is not a finished run; make one with: python -m benchmarks epfl --out {run}")
    facts = json.loads(Path(run, "run.json").read_text())
    config, stored = Config(**facts["config"]), volume.open_array(run, "0")
    nm = tuple(facts["voxel_size_nm"])
    counts = tuple(_blocks(min(n, m), b) for n, m, b in zip(stored.shape[1:], most, block, strict=True))
    half = [c * b // 2 for c, b in zip(counts, block, strict=True)]
    period = np.asarray(stored[(slice(None), *(slice(n - h, n) for n, h in zip(stored.shape[1:], half, strict=True)))])
    for axis in (1, 2, 3):
        period = np.concatenate([period, np.flip(period, axis)], axis)
    origin = 2 << LEVELS
    grid = Blocks(tuple(2 * origin * b for b in block), block)
    pattern = Pattern(grid, counts, origin, {}, {}, rules(config, nm))
    places = [grid.index(tuple(origin + c for c in coords)) for coords in product(*map(range, counts))]
    for i in places:
        pattern.tables[i] = _table(period, grid[i], grid.shape, config.fragments, nm)
    table_of = lru_cache(64)(lambda j: _moved_table(pattern, j))
    for i in places:
        pattern.links[i] = stitch.link(i, table_of, grid)
    return pattern


def _blocks(length: int, block: int) -> int:
    """The most blocks, a power of two, that fit twice the length."""
    if 2 * length < block:
        raise UserError(f"{length} voxels mirrored are less than a block of {block}; give a smaller --block")
    return 1 << (2 * length // block).bit_length() - 1


def _table(period: np.ndarray, box: Box, shape: Triple, knobs: Fragments, nm: tuple) -> fragments.Table:
    around = box.grow(fragments.halo(knobs, nm))
    at = [np.arange(a, b) % n for a, b, n in zip(around.start, around.stop, period.shape[1:], strict=True)]
    probability = period[np.ix_(range(len(period)), *at)]
    height = fragments.heights(probability, box, shape, knobs, nm)
    mass = np.ascontiguousarray(probability[0][box.inside(around)])
    return fragments.fragments(height, mass, box, shape, knobs.connectivity)[1]


# ---------------------------------------------------------------- moving


def _voxels(pattern: Pattern, by: Triple) -> int:
    """How far in linear index a move by so many blocks goes."""
    (_, ny, nx), (z, y, x) = pattern.grid.shape, (n * b for n, b in zip(by, pattern.grid.block, strict=True))
    return (z * ny + y) * nx + x


def _shifted(rows: np.ndarray, far: int, names: int, fields: tuple[str, ...]) -> np.ndarray:
    out = rows.copy()
    for field in ("high_at", "low_at"):
        out[field] += far
    for field in fields:
        out[field] += names
    return out


def _moved_table(pattern: Pattern, i: int) -> fragments.Table:
    base, by = pattern.base(i)
    table, far = pattern.tables[base], _voxels(pattern, by)
    moved = {name: getattr(table, name) + far for name in ("root", "first", "face_at")}
    crossing = _shifted(table.crossing, far, 0, ())
    crossing["b"] += far
    return replace(table, **moved, edges=_shifted(table.edges, far, 0, ()), crossing=crossing)


def _moved_links(pattern: Pattern, i: int) -> stitch.Links:
    base, by = pattern.base(i)
    names = (i - base) << 32
    links = pattern.links[base]
    return stitch.Links(links.drains + names, _shifted(links.edges, _voxels(pattern, by), names, ("a", "b")))


def _moved_graph(pattern: Pattern, graph: tree.Graph, by: Triple) -> tree.Graph:
    far = _voxels(pattern, by)
    _, ny, nx = pattern.grid.counts
    names = ((by[0] * ny + by[1]) * nx + by[2]) << 32
    inner = _shifted(graph.inner, far, 0, ())
    return replace(graph, first=graph.first + far, inner=inner, outer=_shifted(graph.outer, far, names, ("here", "there")))


# ---------------------------------------------------------------- flat


def volume_of(pattern: Pattern, edges: int) -> Triple:
    """Blocks along each axis of whole periods with at least so many edges."""
    periods = ceil(edges / pattern.edges)
    side = max(1, round(periods ** (1 / 3)))
    times = (side, side, ceil(periods / side**2))
    return tuple(c * n for c, n in zip(pattern.counts, times, strict=True))


def blocks_of(pattern: Pattern, counts: Triple) -> Iterator[tuple[fragments.Table, stitch.Links]]:
    """Tables and links of a volume of so many blocks, one after another, named in its own order of blocks.

    What leads out of the volume is left out.
    """
    for coords in product(*map(range, counts)):
        i = pattern.grid.index(tuple(pattern.origin + c for c in coords))
        links = _moved_links(pattern, i)
        (a, here), (b, there) = (_renamed(pattern, links.edges[end], counts) for end in "ab")
        edges = links.edges[here & there]
        edges["a"], edges["b"] = a[here & there], b[here & there]
        (start, _), (end, inside) = (_renamed(pattern, names, counts) for names in links.drains.T)
        yield _moved_table(pattern, i), stitch.Links(np.stack([start, end], axis=1)[inside], edges)


def _renamed(pattern: Pattern, names: np.ndarray, counts: Triple) -> tuple[np.ndarray, np.ndarray]:
    """The names in a volume of so many blocks that begins at the pattern's origin, and which of them lie in it."""
    place = [p - pattern.origin for p in np.unravel_index(names >> 32, pattern.grid.counts)]
    inside = np.all([(p >= 0) & (p < n) for p, n in zip(place, counts, strict=True)], axis=0)
    block = (place[0] * counts[1] + place[1]) * counts[2] + place[2]
    return (block.astype(np.int64) << 32) | (names & stitch.LOCAL), inside


def flat(pattern: Pattern, counts: Triple) -> dict:
    """One row: what `gather` and `decide` take for a volume of so many blocks, all in this process."""
    clock = _Clock()
    regions = edges = 0
    for table, links in blocks_of(pattern, counts):
        regions, edges = regions + table.root.size, edges + table.edges.size + links.edges.size
    drawing = clock.lap()
    pairs = blocks_of(pattern, counts)
    tables, links = _unzipped(pairs)
    basins, _ = stitch.gather(tables, links)
    gathering = clock.lap()
    label = decide(basins, pattern.rules)
    deciding = clock.lap()
    return {
        "edges": edges, "regions": regions, "basins": label.size, "objects": int(label.max(initial=0)),
        "gather s": round(gathering[0] - drawing[0], 1), "decide s": round(deciding[0], 1),
        "of cpu s": round(gathering[1] - drawing[1] + deciding[1], 1),
        "peak GB": round(cluster.peak_bytes() / 1e9, 2), "bytes per edge": round(cluster.peak_bytes() / max(1, edges)),
    }  # fmt: skip


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
        self.last = time.perf_counter(), time.process_time()

    def lap(self) -> tuple[float, float]:
        now = time.perf_counter(), time.process_time()
        before, self.last = self.last, now
        return now[0] - before[0], now[1] - before[1]


# ---------------------------------------------------------------- tree


def levels(pattern: Pattern, voxels: float) -> list[dict]:
    """A row for each level of the tree over a volume of so many voxels: every kind of part is contracted once.

    Seconds are of one process and without storage. The volume's outer faces are taken for inner ones, except at the top.
    """
    graphs: dict[int, tree.Graph] = {}
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


def _level(pattern: Pattern, below: dict[int, tree.Graph], level: int, last: bool) -> tuple[dict[int, tree.Graph], dict]:
    """The contracted parts of one period at that level, and their mean cost."""
    start, ups, costs = pattern.origin >> level, {}, []
    parts = tree.parts(pattern.grid, level)
    for coords in product(*(range(max(1, n >> level)) for n in pattern.counts)):
        n = parts.index(tuple(start + c for c in coords))
        if level == 0:
            links = {j: _moved_links(pattern, j) for j in tree.near(pattern.grid, n, 26)}
            build = lambda n=n, links=links: tree.leaf(n, pattern.tables[n], links)  # noqa: E731
            size = pattern.tables[n].edges.nbytes + sum(l.edges.nbytes for l in links.values())
        else:
            graphs = [_at(pattern, below, c, level - 1) for c in tree.children(pattern.grid, level, n)]
            graphs = [_alone(pattern, g, level, n) for g in graphs] if last else graphs
            build = lambda n=n, graphs=graphs: tree.join(graphs, pattern.grid, level, n)  # noqa: E731
            size = sum(_bytes(g) for g in graphs)
        clock = _Clock()
        graph = build()
        ups[n], finished, _ = tree.contract(graph, pattern.rules.seed_height)
        costs.append((clock.lap()[1], graph.depth.size, graph.inner.size + graph.outer.size, finished.depth.size,
                      size, _bytes(ups[n]), ups[n].depth.size))  # fmt: skip
        if last:
            break
    cpu, components, rows, finished, read, written, up = np.mean(costs, axis=0)
    return ups, {
        "components": round(components), "rows": round(rows), "finished": round(finished), "go up": round(up),
        "MB read": round(read / 1e6, 3), "MB up": round(written / 1e6, 3), "cpu s": round(cpu, 4),
        "peak MB": round(_peak(build, pattern) / 1e6, 2),
    }  # fmt: skip


def _at(pattern: Pattern, graphs: dict[int, tree.Graph], n: int, level: int) -> tree.Graph:
    base, by = pattern.base(n, level)
    return _moved_graph(pattern, graphs[base], by)


def _alone(pattern: Pattern, graph: tree.Graph, level: int, n: int) -> tree.Graph:
    """The graph if the volume ended where part ``n`` does."""
    place = np.unravel_index(graph.outer["there"] >> 32, pattern.grid.counts)
    coords = tree.parts(pattern.grid, level).coords(n)
    inside = np.all([p >> level == c for p, c in zip(place, coords, strict=True)], axis=0)
    return replace(graph, outer=graph.outer[inside])


def _bytes(graph: tree.Graph) -> int:
    return sum(getattr(graph, name).nbytes for name in tree.Graph.__dataclass_fields__)


def _peak(build: object, pattern: Pattern) -> int:
    """Most bytes that one part takes beyond what it was given."""
    tracemalloc.start()
    tree.contract(build(), pattern.rules.seed_height)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


# ---------------------------------------------------------------- command


def measure(
    edges: Annotated[float, typer.Option(help="Edges of the volume that is stitched flat; 0 leaves that out.")] = 1e8,
    simulate: Annotated[float, typer.Option(help="Voxels of the volume that is stitched in a tree; 0: not.")] = 1e12,
    run: Annotated[str, typer.Option(help="A finished run, whose probabilities are the pattern.")] = "runs/epfl.volseg.zarr",
    block: Annotated[tuple[int, int, int], typer.Option(help="Voxels of a block, z y x.")] = (64, 64, 64),
    most: Annotated[tuple[int, int, int], typer.Option(help="Most voxels of the run that are taken.")] = (128, 256, 512),
) -> None:
    """Seconds and memory of stitching edge tables with the statistics of real blocks, in one process and in a tree."""
    begin = time.perf_counter()
    pattern = cut(run, block, most)
    print(f"pattern of {len(pattern.tables)} blocks, {pattern.edges} edges, cut in {time.perf_counter() - begin:.0f} s")
    if simulate:
        report.keep("stitch-tree", levels(pattern, simulate))
    if edges:
        warm = volume_of(pattern, 1)
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own: its peak is that of the work
            pool.apply(flat, (pattern, warm))
            report.keep("stitch-flat", [pool.apply(flat, (pattern, volume_of(pattern, int(edges))))])


if __name__ == "__main__":
    typer.run(measure)
