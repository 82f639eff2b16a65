"""Read this first: the path of a voxel, one function per stage.

    predict    tiles of one block -> blended uint8 probabilities; of several planes, the mean of what each pass stored
    take       instead of predict: one block of probabilities that another network made -> uint8
    fragments  probabilities -> basins of one block, and a table of how they touch
    faces      a block's exits and crossing edges come to name its neighbours' basins
    stitch     all tables -> the label of every basin; beyond one memory by `tree`, `number` and `names`
    relabel    basins -> labels of one block, and sums for the object table
    pyramid    labels -> the next coarser level of one block

Each stage reads what earlier ones stored in the run's folder, writes whole shards, and then its done-marker. A stage's
key is the hash of all that determines its output, so a restart does only what no marker of that key covers.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from volseg import cluster, foreign, forward, merges, model, objects, probe, pyramid, stitch, tiles, tree, volume
from volseg import fragments as basins
from volseg.box import Blocks, Box, Triple, back, turned
from volseg.config import Config, UserError
from volseg.decide import decide, label_dtype, rules
from volseg.grey import normalisation

CHANNELS = ("mask", "contour")
BLOCK_VOXELS = 1 << 24  # voxels of a block that volseg chooses itself
LIGHT = 1 << 29  # voxels up to which `segment` needs no worker processes
SLAB_VOXELS = 1 << 27  # voxels up to which predict's blocks grow to the source's chunks
IO_THREADS = 16  # small objects read or written at once
ISOTROPIC = 1.5  # longest edge of a voxel against its shortest, up to which other planes look like xy planes
FLAT_EDGES = 50_000_000  # edges that one process stitches unless it is told otherwise: about 4 GB
EDGE_BYTES = 80  # that stitching takes in memory for each of them, as benchmarks/README.md measures
FREE = ("out", "config.cluster.", "config.output.keep_work", "config.stitch.reduce", "engine.why")  # decide no byte


# ---------------------------------------------------------------- the run as plain data


@dataclass(frozen=True)
class Run:
    """All that determines a run's output; stored in its folder, from where workers read it.

    Its probabilities come from a network, or are ``taken`` from other volumes: then ``source`` is the mask's, and what
    describes a network is left as it is here.
    """

    out: str
    source: volume.Volume
    config: Config
    heads: tuple[str, ...]
    voxel_size_nm: tuple[float, float, float]
    checksum: str
    predict_block: Triple
    block: Triple
    model_sha256: str = ""
    sections: int = 1
    mean: float = 0.0
    std: float = 1.0
    engine: dict = field(default_factory=dict)
    taken: tuple[foreign.Channel, ...] = ()

    @property
    def shape(self) -> Triple:
        return self.source.shape

    @property
    def first(self) -> str:
        """The stage that stores probabilities."""
        return "take" if self.taken else "predict"

    @property
    def batch(self) -> int:
        """Tiles in one forward pass; the last are padded, so that each pass has the same bits."""
        return self.engine.get("batch") or self.config.predict.batch or 1

    @property
    def predict_grid(self) -> Blocks:
        return Blocks(self.shape, self.predict_block)

    @property
    def grid(self) -> Blocks:
        return Blocks(self.shape, self.block)

    @property
    def passes(self) -> dict[str, str]:
        """The plane that each stage before `predict` looks at; none where `predict` itself looks at the one there is."""
        planes = self.config.predict.planes
        return {} if planes == ("xy",) or self.taken else {f"predict-{plane}": plane for plane in planes}

    def pass_grid(self, plane: str) -> Blocks:
        """The blocks of a pass over several planes: deep across its planes, as `blocks` chooses those of xy planes."""
        axes = tiles.PLANES[plane]
        slab = turned(slabs(turned(self.shape, axes), self.source.chunk[axes[0]]), back(axes))
        return Blocks(self.shape, _fit(self.config.blocks.shape or slab, self.shape))

    def tile_grid(self, plane: str) -> tiles.Grid:
        """The tiles of every section of a pass: a function of the volume's shape."""
        return tiles.grid(turned(self.shape, tiles.PLANES[plane])[1:], self.config.predict.tile, self.config.predict.overlap)

    @property
    def metric(self) -> basins.Metric:
        return basins.metric(self.config.fragments, self.voxel_size_nm)

    @property
    def levels(self) -> list[tuple[Triple, Triple]]:
        return pyramid.levels(self.shape, self.voxel_size_nm, self.config.output.levels)

    @cached_property
    def keys(self) -> dict[str, str]:
        """Each stage's hash of all that determines its output."""
        c = self.config
        first = _hash(
            self.checksum, self.shape, self.model_sha256, self.mean, self.std, _bits(self.engine), self.predict_block,
            c.predict.tile, c.predict.overlap, c.predict.batch, c.predict.tta, sorted(c.predict.planes), c.output.chunk,
        )  # fmt: skip
        if self.taken:
            roles = [(channel.name, channel.source is not None, channel.inverted) for channel in self.taken]
            first = _hash(self.checksum, self.shape, roles, self.predict_block, c.output.chunk)
        passes = {stage: _hash(first, stage, self.pass_grid(plane).block) for stage, plane in self.passes.items()}
        fragments = _hash(first, c.fragments.model_dump(), asdict(self.metric), self.block, basins.EDGE.names)
        stitched = _hash(fragments, c.stitch.model_dump(exclude={"reduce"}))
        levels = {f"pyramid{k}": _hash(stitched, k, *self.levels) for k in range(1, len(self.levels))}
        steps = [f"{stage}{k}" for stage in ("tree", "names") for k in range(tree.top(self.grid) + 1)]
        return {**passes, self.first: first, "fragments": fragments, "faces": fragments, "stitch": stitched,
                **dict.fromkeys([*steps, "number"], stitched), "relabel": stitched, **levels}  # fmt: skip

    @cached_property
    def id(self) -> str:
        """The hash of the whole description: what workers remember a run by."""
        return _hash(self.to_json())

    def to_json(self) -> dict:
        plain = asdict(replace(self, config=None))
        return {**plain, "config": self.config.model_dump(mode="json", exclude={"train"}), "keys": self.keys}

    @classmethod
    def from_json(cls, plain: dict) -> Run:
        known = {name: _tuples(plain[name]) for name in cls.__dataclass_fields__ if name in plain}
        taken = tuple(replace(foreign.Channel(**c), source=_volume(c["source"])) for c in plain.get("taken", ()))
        whole = {"engine": plain["engine"], "taken": taken, "config": Config(**plain["config"])}
        return cls(**{**known, **whole, "source": _volume(plain["source"])})


def _volume(plain: dict | None) -> volume.Volume | None:
    return None if plain is None else volume.Volume(**{key: _tuples(value) for key, value in plain.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _bits(engine: dict) -> dict:
    """What of an engine's description decides the bits it computes."""
    return {name: value for name, value in engine.items() if name != "why"}


def blocks(shape: Triple, wanted: Triple | None, chunk: int = 1) -> tuple[Triple, Triple]:
    """The blocks of `predict` and of the stages after it: those that suit the volume, or the shape asked for.

    Predict takes `slabs`. The other stages take the same where these are deep, else blocks of about `BLOCK_VOXELS`.
    ``chunk`` is how many sections of the source are stored together.
    """
    if wanted:
        block = _fit(wanted, shape)
        if prod(n + 2 for n in block) >= 1 << 31:
            raise UserError(f"blocks.shape = {list(block)} is too large to number its voxels; use less than 2**31 voxels")
        return block, block
    slab = slabs(shape, chunk)
    depth, (z, y, x), target = slab[0], shape, _target(shape)
    if depth >= min(z, 8) and (depth + 8) * y * x <= 1 << 26:  # the other stages read a halo too
        return slab, slab
    side = min(512, max(y, x))
    return slab, _fit((max(16, target // side**2), side, side), shape)


def slabs(shape: Triple, chunk: int = 1) -> Triple:
    """Blocks of whole planes, which need no tile twice; only planes of more than 2**28 voxels are cut into strips.

    A chunk of the source, ``chunk`` sections deep, is read by one block, or by few, where that leaves 16 blocks or more
    and no more than `SLAB_VOXELS` in each.

    >>> slabs((1024, 1024, 1024)), slabs((1024, 1024, 1024), 64), slabs((1024, 4096, 4096)), slabs((1024, 4096, 4096), 32)
    ((16, 1024, 1024), (64, 1024, 1024), (4, 4096, 4096), (8, 4096, 4096))
    """
    z, y, x = shape
    depth = min(z, max(_target(shape) // (y * x), 4 if y * x <= 1 << 26 else 1))
    if chunk < depth < z:
        depth -= depth % chunk
    parts = (chunk // k for k in (1, 2, 4, 8, 16, 32, 64) if chunk % k == 0)
    depth = next((d for d in parts if d > depth and 16 * d <= z and d * y * x <= SLAB_VOXELS), depth)
    strips = -(-depth * y * x // (1 << 28))
    return depth, -(-y // strips), x


def _target(shape: Triple) -> int:
    """Voxels of a block: there shall be 16 blocks or more."""
    return min(BLOCK_VOXELS, max(1 << 20, prod(shape) // 16))


# ---------------------------------------------------------------- stages, one block each; these run on workers


def predict(run: Run, i: int, seconds: dict[str, float]) -> None:
    """Probabilities of block ``i`` are stored: those of its xy planes, or the mean of what several passes stored."""
    box = run.predict_grid[i]
    if run.passes:
        with cluster.timed(seconds, "read"):
            stored = [np.asarray(volume.open_array(run.out, f"work/{s}")[(slice(None), *box.slices)]) for s in run.passes]
        with cluster.timed(seconds, "average"):
            out = tiles.mean_of_passes(stored)
    else:
        out = _probabilities(run, "xy", box, seconds)
    with cluster.timed(seconds, "write"):
        volume.write(volume.open_array(run.out, "0"), box, out)


def predict_plane(run: Run, i: int, seconds: dict[str, float], stage: str) -> None:
    """Probabilities of block ``i`` of one pass are stored in the work folder."""
    plane = run.passes[stage]
    box = run.pass_grid(plane)[i]
    out = _probabilities(run, plane, box, seconds)
    with cluster.timed(seconds, "write"):
        volume.write(volume.open_array(run.out, f"work/{stage}"), box, out)


def _probabilities(run: Run, plane: str, box: Box, seconds: dict[str, float]) -> np.ndarray:
    """Probabilities of ``box``, uint8, channels z y x: every tile that meets it, blended section by section in raster order.

    Everything but the result has its axes in the order of the pass: sections, rows, columns.
    """
    axes, grid = tiles.PLANES[plane], run.tile_grid(plane)
    out = np.empty((len(run.heads), *box.shape), np.uint8)
    first, y, x = box.turned(axes).slices
    sections = out.transpose(0, *(1 + a for a in axes))
    meeting = grid.meeting(y, x)
    with cluster.timed(seconds, "read"):
        tile_at = _reader(run, plane, box, meeting)

    def batches() -> Iterator[tuple[list, np.ndarray]]:
        todo = [(z, tile) for z in range(first.start, first.stop) for tile in meeting]
        size = run.batch
        for at in range(0, len(todo), size):
            batch = np.zeros((size, run.sections, *grid.size), np.float32)
            for row, key in zip(batch, todo[at : at + size], strict=False):
                row[:] = (tile_at(*key).astype(np.float32) - np.float32(run.mean)) * np.float32(1 / run.std)
            yield todo[at : at + size], batch

    blend = None
    with cluster.timed(seconds, "infer"):
        for keys, probability in forward.stream(_network(run, grid.size), batches(), threads=_threads(run)):
            for (z, tile), one in zip(keys, probability, strict=False):
                blend = tiles.Blend(len(run.heads), grid, y, x) if tile == meeting[0] else blend
                blend.add(tile, one)
                if tile == meeting[-1]:
                    sections[:, z - first.start] = blend.quantise()
    return out


def _reader(run: Run, plane: str, box: Box, meeting: list[tuple[int, int]]) -> Callable[[int, tuple[int, int]], np.ndarray]:
    """What gives a tile of a section of ``box``, with neighbouring sections; the source under them all was read at once."""
    axes, grid, around = tiles.PLANES[plane], run.tile_grid(plane), run.sections // 2
    places = [grid.place(tile) for tile in meeting]
    seen = box.turned(axes)
    start = (seen.start[0] - around, min(p[0].start for p in places), min(p[1].start for p in places))
    stop = (seen.stop[0] + around, max(p[0].stop for p in places), max(p[1].stop for p in places))
    need = Box(start, stop).clip(turned(run.shape, axes))
    slab = np.ascontiguousarray(run.source.read(need.turned(back(axes))).transpose(axes))

    def tile_at(z: int, tile: tuple[int, int]) -> np.ndarray:
        near = np.clip(np.arange(z - around, z + around + 1), 0, run.shape[axes[0]] - 1) - need.start[0]
        y, x = (slice(s.start - o, s.stop - o) for s, o in zip(grid.place(tile), need.start[1:], strict=True))
        return tiles.cut(slab[near], y, x)

    return tile_at


def take(run: Run, i: int, seconds: dict[str, float]) -> None:
    """Probabilities of block ``i`` are stored as another network made them, as uint8."""
    box = run.predict_grid[i]
    with cluster.timed(seconds, "read"):
        out = np.stack([channel.read(box) for channel in run.taken])
    with cluster.timed(seconds, "write"):
        volume.write(volume.open_array(run.out, "0"), box, out)


def fragments(run: Run, i: int, seconds: dict[str, float]) -> None:
    """Basins of block ``i`` are stored, with the table of how they touch."""
    box = run.grid[i]
    knobs = run.config.fragments
    have = box.grow(basins.halo(knobs, run.voxel_size_nm)).clip(run.shape)
    with cluster.timed(seconds, "read"):
        probability = np.asarray(volume.open_array(run.out, "0")[(slice(None), *have.slices)])
    with cluster.timed(seconds, "basins"):
        height = basins.heights(probability, box, run.shape, knobs, run.voxel_size_nm)
        mass = np.ascontiguousarray(probability[0][box.inside(have)])
        region, table = basins.fragments(height, mass, box, run.shape, knobs.connectivity)
    with cluster.timed(seconds, "write"):
        volume.write(volume.open_array(run.out, "work/fragments"), box, region)
        _save(run.out, f"work/tables/{i}.npz", **asdict(table))


def faces(run: Run, i: int, seconds: dict[str, float]) -> dict:
    """The `stitch.Links` of block ``i`` are stored; returns how many edges the block has."""
    table_of = lru_cache(lambda j: basins.Table(**_load(run.out, f"work/tables/{j}.npz")))
    found = stitch.link(i, table_of, run.grid)
    _save(run.out, f"work/links/{i}.npz", **asdict(found))
    return {"edges": int(table_of(i).edges.size + found.edges.size)}


def stitched(run: Run, _: int, seconds: dict[str, float]) -> dict:
    """The label of every region of every block is stored; returns how many objects there are."""
    count = len(run.grid)
    every = range(count)
    with cluster.timed(seconds, "gather"):
        tables = _each(run.out, [f"work/tables/{i}.npz" for i in every], skip=("crossing", "face_at", "face_of"))
        links = _each(run.out, [f"work/links/{i}.npz" for i in every])
        whole, basin_of = stitch.gather((basins.Table(**t) for t in tables), (stitch.Links(**l) for l in links))
    with cluster.timed(seconds, "decide"):
        rule = rules(run.config, run.voxel_size_nm)
        label = decide(whole, rule)
    found = int(label.max(initial=0))
    with cluster.timed(seconds, "write"):
        _save(run.out, "work/basins.npz", **asdict(whole), label=label)
        sure = merges.confidence(whole, label, run.config.fragments, run.voxel_size_nm)
        told = {"rows": merges.merges(whole, rule, label), "confidence": sure}
        volume.remove(f"{run.out}/work/merges")
        _save(run.out, f"work/merges/{run.keys['stitch']}.npz", **told)
        dtype = label_dtype(found)

        def save(i: int) -> None:
            ids = np.r_[0, label[basin_of[i]]].astype(dtype)
            _save(run.out, f"work/labels/{i}.npz", label=ids, basin=basin_of[i])

        with ThreadPoolExecutor(IO_THREADS) as pool:
            list(pool.map(save, every))
    return {"objects": found, "basins": int(label.size), "edges": int(whole.edges.size)}


def contracted(run: Run, n: int, seconds: dict[str, float], level: int) -> dict:
    """Part ``n`` of that level is contracted: what goes up is stored, what became of the rest, and what it finished."""
    with cluster.timed(seconds, "read"):
        if level == 0:
            table = basins.Table(**_load(run.out, f"work/tables/{n}.npz"))
            near = tree.near(run.grid, n, run.config.fragments.connectivity)
            links = zip(near, _each(run.out, [f"work/links/{j}.npz" for j in near]), strict=True)
            graph, sizes = tree.leaf(n, table, {j: stitch.Links(**l) for j, l in links}), []
        else:
            below = tree.children(run.grid, level, n)
            graphs = [tree.Graph(**g) for g in _each(run.out, [f"work/tree/{level - 1}/up/{c}.npz" for c in below])]
            graph, sizes = tree.join(graphs, run.grid, level, n), [g.depth.size for g in graphs]
    with cluster.timed(seconds, "contract"):
        deciding = rules(run.config, run.voxel_size_nm)
        up, finished, fate = tree.contract(graph, deciding.seed_height)
        kept = tree.kept(finished, deciding)
    with cluster.timed(seconds, "write"):
        _save(run.out, f"work/tree/{level}/up/{n}.npz", **asdict(up))
        _save(run.out, f"work/tree/{level}/fate/{n}.npz", fate=fate, kept=kept, sizes=np.array(sizes, np.int64))
        _save(run.out, f"work/tree/{level}/first/{n}.npz", first=finished.first[kept])
    return {"components": int(fate.size), "up": int(up.depth.size), "rows": int(up.inner.size + up.outer.size)}


def numbered(run: Run, layer: int, seconds: dict[str, float]) -> dict:
    """The ranks of all objects whose first voxel lies in that layer of blocks are stored; returns how many they are."""
    box = _layers(run)[layer]
    begin, end = (z * run.shape[1] * run.shape[2] for z in (box.start[0], box.stop[0]))
    places = [(k, n) for k in range(tree.top(run.grid) + 1) for n in tree.parts(run.grid, k).meeting(box)]
    stored = _each(run.out, [f"work/tree/{k}/first/{n}.npz" for k, n in places])
    firsts = [first[slice(*np.searchsorted(first, (begin, end)))] for first in (s["first"] for s in stored)]
    some = [(place, rank) for place, rank in zip(places, tree.ranks(firsts), strict=True) if rank.size]

    def save(item: tuple[tuple[int, int], np.ndarray]) -> None:
        (k, n), rank = item
        _save(run.out, f"work/tree/{k}/rank/{n}-{layer}.npz", rank=rank)

    with ThreadPoolExecutor(IO_THREADS) as pool:
        list(pool.map(save, some))
    return {"layer": layer, "objects": sum(rank.size for _, rank in some)}


def _layers(run: Run) -> Blocks:
    """The volume cut into layers one block thick: objects are numbered by the raster order of their first voxels."""
    return Blocks(run.shape, (run.block[0], *run.shape[1:]))


def named(run: Run, n: int, seconds: dict[str, float], level: int) -> None:
    """The labels of all components that part ``n`` of that level was given are stored, for each part that gave them."""
    fate = _load(run.out, f"work/tree/{level}/fate/{n}.npz")
    before = _load(run.out, "work/tree/before.npz")["before"]
    above = np.empty(0, np.int64)
    if level < tree.top(run.grid):
        above = _load(run.out, f"work/tree/{level}/label/{n}.npz")["label"]
    finished = np.zeros(fate["kept"].size, np.int64)
    finished[fate["kept"]] = _own_labels(run, n, level, before)
    label = tree.named(fate["fate"], above, finished)
    if level == 0:
        _save(run.out, f"work/labels/{n}.npz", label=np.r_[0, label].astype(label_dtype(int(before[-1]))))
        return
    shares = np.split(label, np.cumsum(fate["sizes"])[:-1])
    for child, share in zip(tree.children(run.grid, level, n), shares, strict=True):
        _save(run.out, f"work/tree/{level - 1}/label/{child}.npz", label=share)


def _own_labels(run: Run, n: int, level: int, before: np.ndarray) -> np.ndarray:
    """Labels of the objects that a part finished, ascending; ``before`` counts the objects of all layers before each."""
    first = _load(run.out, f"work/tree/{level}/first/{n}.npz")["first"]
    layers = np.unique(first // (run.shape[1] * run.shape[2] * run.block[0]))
    ranks = _each(run.out, [f"work/tree/{level}/rank/{n}-{layer}.npz" for layer in layers])
    return np.concatenate(
        [np.empty(0, np.int64), *(before[layer] + r["rank"] + 1 for layer, r in zip(layers, ranks, strict=True))]
    )


def relabel(run: Run, i: int, seconds: dict[str, float]) -> None:
    """Labels of block ``i`` are stored, and its sums for the object table."""
    box = run.grid[i]
    with cluster.timed(seconds, "read"):
        region = np.asarray(volume.open_array(run.out, "work/fragments")[box.slices])
        mass = np.asarray(volume.open_array(run.out, "0")[(0, *box.slices)])
        label = _load(run.out, f"work/labels/{i}.npz")["label"]
        behind = [_behind(run, i, axis) for axis in range(3)]
    with cluster.timed(seconds, "measure"):
        sums = objects.measure(region, label, mass, box, behind)
    with cluster.timed(seconds, "write"):
        volume.write(volume.open_array(run.out, "labels/instances/0"), box, label[region])
        _save(run.out, f"work/objects/{i}.npz", **asdict(sums))


def _behind(run: Run, i: int, axis: int) -> np.ndarray | None:
    """Labels of the plane behind block ``i`` along an axis, from the next block's table; None where the volume ends."""
    if run.grid[i].stop[axis] == run.shape[axis]:
        return None
    j = run.grid.index(tuple(c + (k == axis) for k, c in enumerate(run.grid.coords(i))))
    table = _load(run.out, f"work/tables/{j}.npz", skip=("edges", "crossing"))
    label = _load(run.out, f"work/labels/{j}.npz")["label"]
    return objects.near_face(table["face_at"], label[table["face_of"]], run.grid[j], run.shape, axis)


def coarser(run: Run, i: int, seconds: dict[str, float], level: int) -> None:
    """Block ``i`` of a pyramid level is stored, made from the level above."""
    shape, factor = run.levels[level]
    above = volume.open_array(run.out, f"labels/instances/{level - 1}")
    box = Blocks(shape, _fit(run.block, shape))[i]
    parent = np.asarray(above[pyramid.parent_box(box, factor, run.levels[level - 1][0]).slices])
    volume.write(volume.open_array(run.out, f"labels/instances/{level}"), box, pyramid.downsample(parent, factor))


STAGES: dict[str, Callable] = {
    "predict": predict, "take": take, "fragments": fragments, "faces": faces, "stitch": stitched, "number": numbered,
    "relabel": relabel,
}  # fmt: skip
OF_LEVEL: dict[str, Callable] = {"tree": contracted, "names": named, "pyramid": coarser}


def work(out: str, key: str, stage: str, i: int) -> dict:
    """One block of one stage on a worker, start to finish; returns its receipt."""
    run = _run(out, key)
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    if stage in run.passes:
        facts = predict_plane(run, i, seconds, stage)
    elif stage in STAGES:
        facts = STAGES[stage](run, i, seconds)
    else:
        name = stage.rstrip("0123456789")
        facts = OF_LEVEL[name](run, i, seconds, int(stage.removeprefix(name)))
    seconds["all"] = time.perf_counter() - start
    return cluster.mark(out, stage, run.keys[stage], i, {"seconds": seconds, **(facts or {})})


@lru_cache(maxsize=2)
def _run(out: str, key: str) -> Run:
    """The run stored at ``out``; ``key`` is its id, so that a new run at the same place is read anew."""
    return replace(Run.from_json(json.loads(volume.read_bytes(out, "work/run.json"))), out=out)


def _network(run: Run, size: tuple[int, int]) -> forward.Forward:
    """The network for tiles of one size, its mean over the ways that ``predict.tta`` lays them."""
    ways = tiles.turns(run.config.predict.tta)
    loaded = {s: _loaded(run.out, run.id, s) for s in dict.fromkeys((size, size[::-1]) if len(ways) == 8 else (size,))}
    if len(ways) == 1:
        return loaded[size]
    return lambda batch: tiles.mean_of_turns(lambda turned: loaded[turned.shape[2:]](turned), batch, ways)


@lru_cache(maxsize=2)  # tiles, and tiles on their side
def _loaded(out: str, key: str, size: tuple[int, int]) -> forward.Forward:
    """The network of a run for tiles of one size, once for each worker process."""
    run = _run(out, key)
    here = forward.describe(run.engine["backend"], run.engine["precision"])
    if _bits({**run.engine, **here}) != _bits(run.engine):
        raise UserError(
            f"this worker would run {here}, the run was begun with {_bits(run.engine)}; their bits differ, "
            "so they cannot share it"
        )
    shape = (run.batch, run.sections, *size)
    return forward.load(
        volume.read_bytes(out, "work/model.bin"),
        run.engine["backend"],
        run.engine["precision"],
        shape,
        _threads(run),
        cluster.place_here(),
    )


def _threads(run: Run) -> int:
    """Tiles under way at once in this worker: on a GPU just enough to hide the copies."""
    return 2 if run.engine["device"] == "cuda" else cluster.threads_here()


def _save(out: str, key: str, **arrays: np.ndarray) -> None:
    file = io.BytesIO()
    np.savez(file, **arrays)
    volume.write_bytes(out, key, file.getvalue())


def _load(out: str, key: str, skip: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The arrays saved under ``key``; those to ``skip`` come empty."""
    with np.load(io.BytesIO(volume.read_bytes(out, key))) as stored:  # allow_pickle is off
        return {name: np.empty(0) if name in skip else stored[name] for name in stored.files}


def _each(out: str, keys: Iterable[str], skip: tuple[str, ...] = ()) -> Iterator[dict[str, np.ndarray]]:
    """What is saved under each key, some of them read ahead side by side: an object store answers slowly."""
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(IO_THREADS) as pool:
        for key in keys:
            waiting.append(pool.submit(_load, out, key, skip))
            if len(waiting) >= 2 * IO_THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _shard(block: Triple, shape: Triple, chunk: Triple) -> Triple:
    """The shard that holds one block: the block, made a multiple of the chunk on axes that it spans."""
    return tuple(
        b if b < n else -(-n // min(c, n)) * min(c, n) for b, n, c in zip(block, shape, chunk, strict=True)
    )


def _fit(block: Triple, shape: Triple) -> Triple:
    return tuple(min(b, n) for b, n in zip(block, shape, strict=True))


# ---------------------------------------------------------------- a whole run; this runs where the command was given


class Show(Protocol):
    """How a run tells its user what it does."""

    def say(self, text: str) -> None: ...

    def stage(self, name: str, voxels: int, done: int) -> Callable[[int], None]:
        """Starts a stage of so many voxels, some done before; returns what to call with voxels as they are done."""


@dataclass(frozen=True)
class Summary:
    """What a finished run has to say. Seconds are wall-clock; bytes are the most one process held."""

    out: str
    objects: int
    voxels: int
    seconds: dict[str, float]
    worker_peak_bytes: int
    client_peak_bytes: int
    labels: str
    table: str
    picture: str


class Incomplete(UserError):
    """Some blocks could not be done; the rest is kept, and the same command goes on from there."""


def infer(path: str, out: str, config: Config, *, overwrite: bool, show: Show) -> Summary:
    """Labels, object table, pyramid and picture of the volume at ``path`` are in the OME-Zarr group ``out``.

    A run that was stopped goes on where it was, if nothing that determines its output has changed. The group has its
    final name only once it is whole (on object stores, which cannot rename, once ``run.json`` is there). Raises
    `UserError` for a bad volume or model, an existing output, or a changed configuration; `Incomplete` when blocks failed.
    """
    start = time.perf_counter()
    source = volume.open(path, dataset=config.input.dataset, voxel_size_nm=config.input.voxel_size_nm)
    out = _absolute(out)
    _make_room([source], out, overwrite)
    run = _describe(source, config, _partial(out))
    show.say(_headline(run))
    return _go(run, out, start, show, lambda: _begin(run, overwrite))


def segment_probabilities(path: str, out: str, config: Config, *, overwrite: bool, show: Show) -> Summary:
    """The OME-Zarr group ``out`` is what `infer` makes, from probabilities that another network stored at ``path``.

    ``config.probabilities`` says which of its channels is the mask, and what else there is. In all else, a run like any
    other. Raises as `infer` does, and for values that are no probabilities: in patches before anything is made, in each
    block as it is read.
    """
    start = time.perf_counter()
    of = config.input
    taken = foreign.channels(path, config.probabilities, dataset=of.dataset, voxel_size_nm=of.voxel_size_nm)
    out = _absolute(out)
    _make_room([channel.source for channel in taken if channel.source], out, overwrite)
    for note in foreign.look(taken):
        show.say(note)
    run = _describe_taken(taken, config, _partial(out))
    show.say(_headline(run))
    return _go(run, out, start, show, lambda: _begin(run, overwrite))


def segment(path: str, change: Callable[[Config], Config], *, recompute: bool = False, show: Show) -> Summary:
    """The labels of the finished run at ``path`` are those of its changed settings, from its stored probabilities.

    Only what depends on the change is done again: with another ``stitch``, no basin. While that lasts the run lies at its
    unfinished name, and a stopped `segment` goes on when it is given again. ``recompute`` allows to make basins anew where
    the work folder was cleaned. Raises `UserError` for what is no run, or a change of what `predict` depends on.
    """
    start = time.perf_counter()
    out = _absolute(path)
    old = _stored(out, recompute)
    config = change(old.config)
    block = old.block if config.blocks == old.config.blocks else blocks(old.shape, config.blocks.shape)[1]
    run = replace(old, out=_partial(out), config=config, block=block)
    fixed = ("input", "predict", "probabilities")
    if run.keys[run.first] != old.keys[run.first] or any(getattr(config, s) != getattr(old.config, s) for s in fixed):
        raise UserError(f"volseg segment cannot change {', '.join(fixed)} or output.chunk of a run; make it anew for that, "
                        "with --overwrite")  # fmt: skip

    def prepare() -> None:
        _demote(out)
        _adopt(run)

    return _go(run, out, start, show, prepare, light=prod(run.shape) <= LIGHT)


def _go(
    run: Run, out: str, start: float, show: Show, prepare: Callable[[], None], *, light: bool = False
) -> Summary:
    """Once there are workers: the run's folder, everything in it that is not done yet, and its final name."""
    _check_channels(run)
    gpus = 0 if light or run.taken else forward.gpus()
    with cluster.connect(run.config.cluster, gpus, light=light) as client:
        prepare()
        if (link := cluster.dashboard(client)) and not light:
            show.say(f"dashboard {link}")
        seconds = {"start": time.perf_counter() - start, **_stages(client, run, show)}
    return _finish(run, out, seconds, start)


def _check_channels(run: Run) -> None:
    """Refuses to follow a channel that the run does not have."""
    lacking = {channel.name for channel in run.taken if channel.source is None} | ({"distance"} - set(run.heads))
    height = run.config.fragments.height
    need = {"contour": "contour", "head": "distance"}.get(height)
    if need in lacking:
        raise UserError(f"fragments.height = {height!r} follows a channel of {need}, which this run lacks: take another "
                        "height, or probabilities that hold one")  # fmt: skip


def _stored(out: str, recompute: bool) -> Run:
    """The run at ``out``, or the one of that name which `segment` left unfinished; its work folder is there."""
    where = _partial(out) if volume.exists(f"{_partial(out)}/work/run.json") else out
    if not volume.exists(f"{where}/work/run.json"):
        if not volume.exists(f"{out}/run.json"):
            raise UserError(f"{out} is not a volseg run (no run.json in it); give a folder that volseg made")
        if not recompute:
            raise UserError(f"the work folder of {out} was cleaned: its basins must be made anew; add --recompute")
        _rebuild_work(out)
    plain = json.loads(volume.read_bytes(where, "work/run.json"))
    run = Run.from_json(plain)
    if plain["keys"].get(run.first) != run.keys[run.first]:
        if not recompute or where != out:
            raise UserError(
                f"{where} was made by another version of volseg, which may have predicted otherwise: make it anew with "
                "volseg infer --overwrite, or keep a finished run's probabilities as they are with --recompute"
            )
        volume.remove(f"{out}/work")
        _rebuild_work(out)
    return run


def _demote(out: str) -> None:
    """The finished run at ``out`` lies at its unfinished name."""
    if _partial(out) != out and volume.exists(out) and not volume.exists(_partial(out)):
        volume.move(out, _partial(out))
    volume.remove(f"{_partial(out)}/run.json")


def _rebuild_work(out: str) -> None:
    """A cleaned run has a work folder again in which its probabilities count as done."""
    facts = json.loads(volume.read_bytes(out, "run.json"))
    run = replace(Run.from_json(facts), out=out)
    _create_fragments(run)
    for i in range(len(run.predict_grid)):
        cluster.mark(out, run.first, run.keys[run.first], i, {"seconds": {}})
    volume.write_bytes(out, "work/begun", b"")
    volume.write_bytes(out, "work/run.json", json.dumps(run.to_json(), indent=1).encode())


def _adopt(run: Run) -> None:
    """The run's folder takes another description; what that makes stale is gone."""
    old = Run.from_json(json.loads(volume.read_bytes(run.out, "work/run.json")))
    for stage in {*old.keys, *run.keys}:
        if old.keys.get(stage) != run.keys.get(stage):
            volume.remove(f"{run.out}/work/markers/{stage}")
    if (old.keys["relabel"], old.levels) != (run.keys["relabel"], run.levels):
        volume.remove(f"{run.out}/work/labels.json")
        volume.remove(f"{run.out}/labels")
        volume.remove(f"{run.out}/work/markers/relabel")
    if old.block != run.block:
        volume.remove(f"{run.out}/work/fragments")
        _create_fragments(run)
    volume.write_bytes(run.out, "work/run.json", json.dumps(run.to_json(), indent=1).encode())


def _create_fragments(run: Run) -> None:
    chunk = run.config.output.chunk
    volume.create_array(
        run.out, "work/fragments", shape=run.shape, dtype="uint32", chunk=chunk, shard=_shard(run.block, run.shape, chunk)
    )


def _partial(out: str) -> str:
    return out if volume.is_remote(out) else f"{out}.partial"


def _make_room(sources: list[volume.Volume], out: str, overwrite: bool) -> None:
    """A run may be made at ``out``; on an object store, what `overwrite` is to replace is gone."""
    for source in sources:
        _refuse_existing(_absolute(source.path), out, overwrite)
    if volume.is_remote(out) and overwrite and volume.exists(f"{out}/run.json"):
        volume.remove(out)


def is_run(path: str) -> bool:
    """Whether ``path`` is a run's, finished or not."""
    return any(volume.exists(f"{p}/{name}") for p in {path, _partial(path)} for name in ("run.json", "work/run.json"))


def _refuse_existing(source: str, out: str, overwrite: bool) -> None:
    """Nothing that a run did not make is ever replaced, nor what it reads from."""
    if f"{source}/".startswith((f"{out}/", f"{_partial(out)}/")):
        raise UserError(f"output {out} would replace the volume it is made from; give another --out")
    for path in {out, _partial(out)}:
        if volume.exists(path) and not any(volume.exists(f"{path}/{name}") for name in ("run.json", "work/begun")):
            raise UserError(f"output {path} exists and is not a volseg run, so it is left alone; give another --out")
    if volume.exists(f"{out}/run.json") and not overwrite:
        raise UserError(f"output {out} exists; give another --out, or --overwrite to replace it")


def _describe(source: volume.Volume, config: Config, out: str) -> Run:
    """The run as plain data, every choice made."""
    path = Path(config.predict.model) if config.predict.model else model.shipped()
    card = model.load_card(path)
    if tuple(card["heads"]) != CHANNELS:
        raise UserError(f"{path} has heads {card['heads']}; the watershed wants {list(CHANNELS)}: train such a model")
    if source.dtype == "bool" or np.dtype(source.dtype).kind not in "uif":
        raise UserError(f"{source.path} holds {source.dtype}; inference wants grey values")
    voxel_size_nm = source.voxel_size_nm or tuple(card["voxel_size_nm"] or (1.0, 1.0, 1.0))
    _refuse_anisotropic(config.predict.planes, voxel_size_nm)
    slab, block = blocks(source.shape, config.blocks.shape, source.chunk[0])
    of_model = config.predict.normalize == "model"
    mean, std = (card["mean"], card["std"]) if of_model else normalisation(source.shape, source.read)
    engine = _begun_engine(out, config, path) or _engine(source, config, path, mean, std)
    return Run(
        out=out,
        source=replace(source, path=_absolute(source.path)),
        config=config,
        model_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        heads=tuple(card["heads"]),
        sections=card["sections"],
        mean=mean,
        std=std,
        voxel_size_nm=voxel_size_nm,
        checksum=source.checksum(),
        engine=engine,
        predict_block=slab,
        block=block,
    )


def _describe_taken(taken: tuple[foreign.Channel, ...], config: Config, out: str) -> Run:
    """The run of probabilities made elsewhere as plain data, every choice made."""
    sources = [channel.source for channel in taken if channel.source]
    slab, block = blocks(sources[0].shape, config.blocks.shape)
    return Run(
        out=out,
        source=sources[0],
        config=config,
        heads=tuple(channel.name for channel in taken),
        voxel_size_nm=next((s.voxel_size_nm for s in sources if s.voxel_size_nm), (1.0, 1.0, 1.0)),
        checksum=foreign.checksum(taken),
        predict_block=slab,
        block=block,
        taken=taken,
    )


def _engine(source: volume.Volume, config: Config, path: Path, mean: float, std: float) -> dict:
    """What a new run computes with, and why."""
    card = model.load_card(path)
    choice = probe.choose(
        config.predict, path, forward.int8_allowed(card), prod(source.shape),
        lambda: sample_tiles(source, card["sections"], config, (mean, std)),
    )  # fmt: skip
    if choice.precision == "int8":
        model.quantised(path)
    return {**forward.describe(choice.backend, choice.precision), "batch": choice.batch, "why": choice.why}


def _begun_engine(out: str, config: Config, path: Path) -> dict:
    """What the run begun at ``out`` computes with, if its settings left the choice open as these do; else nothing.

    A restart must not choose anew: timing is noisy, and another choice has other bits.
    """
    if not volume.exists(f"{out}/work/run.json"):
        return {}
    old = json.loads(volume.read_bytes(out, "work/run.json"))
    same_model = old.get("model_sha256") == hashlib.sha256(path.read_bytes()).hexdigest()
    if not same_model or old["config"]["predict"] != config.predict.model_dump(mode="json"):
        return {}
    here = forward.describe(old["engine"]["backend"], old["engine"]["precision"])
    return {**old["engine"], **here}


def try_backends(path: str, config: Config) -> list[probe.Row]:
    """Speed and distance from float32 of every backend and precision that could run the volume at ``path`` here."""
    source = volume.open(path, dataset=config.input.dataset, voxel_size_nm=config.input.voxel_size_nm)
    file = Path(config.predict.model) if config.predict.model else model.shipped()
    card = model.load_card(file)
    batch = sample_tiles(source, card["sections"], config, normalisation(source.shape, source.read))
    return probe.measure(file, probe.candidates(config.predict, model.INT8 in card), config.predict.batch, batch)


def sample_tiles(source: volume.Volume, sections: int, config: Config, norm: tuple[float, float]) -> np.ndarray:
    """A few tiles of a volume, spread over its depth, as the network takes them: (4, sections, Y, X) float32.

    On a CPU, whose speed hardly depends on their size, they are at most 512 wide.
    """
    longest = config.predict.tile if forward.gpus() else min(512, config.predict.tile)
    grid = tiles.grid(source.shape[1:], longest, 0)
    places = grid.meeting(*(slice(0, n) for n in source.shape[1:]))
    depths = [(2 * k + 1) * source.shape[0] // 8 for k in range(4)]
    return np.stack([
        normalised_tile(source, z, grid.place(places[(2 * k + 1) * len(places) // 8]), sections, norm)
        for k, z in enumerate(depths)
    ])  # fmt: skip


def normalised_tile(
    source: volume.Volume, z: int, place: tuple[slice, slice], sections: int, norm: tuple[float, float]
) -> np.ndarray:
    """A tile of section ``z`` with its neighbours as the network takes it, (sections, Y, X) float32."""
    near = np.clip(np.arange(z - sections // 2, z + sections // 2 + 1), 0, source.shape[0] - 1)
    y, x = place
    start, stop = (y.start, x.start), (min(y.stop, source.shape[1]), min(x.stop, source.shape[2]))
    planes = np.concatenate([source.read(Box((int(k), *start), (int(k) + 1, *stop))) for k in near])
    cut = tiles.cut(planes, slice(0, y.stop - y.start), slice(0, x.stop - x.start)).astype(np.float32)
    return (cut - np.float32(norm[0])) * np.float32(1 / norm[1])


def _refuse_anisotropic(planes: tuple[str, ...], voxel_size_nm: tuple[float, float, float]) -> None:
    """Refuses planes in which the network would see objects stretched."""
    if planes != ("xy",) and max(voxel_size_nm) > ISOTROPIC * min(voxel_size_nm):
        size = " x ".join(f"{n:g}" for n in voxel_size_nm)
        raise UserError(f"predict.planes = {list(planes)} wants voxels about as long along z as in the plane, these are {size} "
                        "nm: use predict.planes = ['xy'], or correct input.voxel_size_nm")  # fmt: skip


def _absolute(path: str) -> str:
    return path if volume.is_remote(path) else str(Path(path).resolve())


def _begin(run: Run, overwrite: bool) -> None:
    """The run's folder holds its description, the model and empty arrays. A stopped run of this description is kept."""
    if volume.exists(f"{run.out}/work/run.json"):
        changed = _changed(run)
        if not changed:
            return
        if not overwrite:
            raise UserError(f"an unfinished run at {run.out} {changed}; finish it with its own settings, or start again "
                            "with --overwrite")  # fmt: skip
    volume.remove(run.out)
    volume.write_bytes(run.out, "work/begun", b"")
    volume.create_group(run.out)
    lead = len(run.heads)
    volume.create_array(
        run.out, "0", shape=(lead, *run.shape), dtype="uint8", chunk=(1, *run.config.output.chunk),
        shard=(lead, *_shard(run.predict_block, run.shape, run.config.output.chunk)), axes="czyx",
    )  # fmt: skip
    for stage, plane in run.passes.items():
        block = run.pass_grid(plane).block
        chunk = _fit(run.config.output.chunk, run.predict_block)
        volume.create_array(
            run.out, f"work/{stage}", shape=(lead, *run.shape), dtype="uint8", chunk=(1, *chunk),
            shard=(lead, *_shard(block, run.shape, chunk)), axes="czyx",
        )  # fmt: skip
    _create_fragments(run)
    if not run.taken:
        path = Path(run.config.predict.model) if run.config.predict.model else model.shipped()
        blob = forward.prepare(path, run.engine["backend"], run.engine["precision"])
        volume.write_bytes(run.out, "work/model.bin", blob)
    volume.write_bytes(run.out, "work/run.json", json.dumps(run.to_json(), indent=1).encode())


def _changed(run: Run) -> str:
    """In which setting the run stored at ``run.out`` differs from ``run``; ``""`` where it would write the same bytes."""
    old = _flat(json.loads(volume.read_bytes(run.out, "work/run.json")))
    new = _flat(json.loads(json.dumps(run.to_json())))
    changed = [name for name in new if not name.startswith(FREE) and old.get(name) != new[name]]
    if not changed:
        return ""
    name = min(changed, key=lambda name: (not name.startswith(("engine.", "config.")), name.startswith("keys."), name))
    return f"has {name} = {old.get(name)!r}, this one {new[name]!r}"


def _flat(plain: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in plain.items():
        out.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return out


def _headline(run: Run) -> str:
    z, y, x = run.shape
    return (
        f"{run.source.path}: {z} x {y} x {x} {run.source.dtype}, voxels of "
        f"{' x '.join(f'{n:g}' for n in run.voxel_size_nm)} nm{_assumed(run)}\n"
        f"{_origin(run)}, {len(run.grid)} block(s) of {' x '.join(map(str, run.block))}"
    )


def _assumed(run: Run) -> str:
    """A warning where no file says how large a voxel is."""
    if any(source and source.voxel_size_nm for source in (run.source, *(channel.source for channel in run.taken))):
        return ""
    return " (assumed, the volume does not say: --set input.voxel_size_nm=[z, y, x])"


def _origin(run: Run) -> str:
    """Where a run's probabilities come from."""
    if run.taken:
        return "; ".join(map(str, run.taken))
    knobs = run.config.predict
    grids = {plane: run.tile_grid(plane) for plane in knobs.planes}
    sizes = ", ".join(f"{g.size[0]} x {g.size[1]}" + f" ({plane})" * bool(run.passes) for plane, g in grids.items())
    laid = f" laid in {knobs.tta} ways" * (knobs.tta > 1)
    return (
        f"{run.engine['backend']} {run.engine['precision']} on {run.engine['device']} ({run.engine.get('why', 'as begun')})\n"
        f"tiles of {sizes}{laid}, {redundancy(run):.2f} voxels inferred for each one wanted"
    )


def redundancy(run: Run) -> float:
    """Voxels inferred for each voxel wanted: tiles share voxels, blocks share tiles, and planes and turns come on top."""
    passes = {plane: run.pass_grid(plane) for plane in run.passes.values()} or {"xy": run.predict_grid}
    return run.config.predict.tta * sum(_redundancy(run, plane, grid) for plane, grid in passes.items())


def _redundancy(run: Run, plane: str, grid: Blocks) -> float:
    """Voxels inferred for each voxel in one pass over the volume."""
    axes, laid = tiles.PLANES[plane][1:], run.tile_grid(plane)
    inferred = 1.0
    for k, axis in zip(axes, (laid.y, laid.x), strict=True):
        length, block = run.shape[k], grid.block[k]
        starts = range(0, length, block)
        inferred *= axis.size * sum(len(axis.meeting(a, min(a + block, length))) for a in starts) / length
    return inferred


def _stages(client: Any, run: Run, show: Show) -> dict[str, float]:
    """Runs every stage after another over the blocks that no marker covers; seconds of each."""
    seconds: dict[str, float] = {}
    predicted = len(cluster.marked(run.out, run.first, run.keys[run.first])) == len(run.predict_grid)
    for stage, plane in {} if predicted else run.passes.items():
        with cluster.timed(seconds, stage):
            _stage(client, run, stage, run.pass_grid(plane), show)
    for stage in (run.first, "fragments", "faces"):
        with cluster.timed(seconds, stage):
            _stage(client, run, stage, run.predict_grid if stage == run.first else run.grid, show)
        if stage == run.first:
            _drop_passes(run)
    with cluster.timed(seconds, "stitch"):
        _stitch(client, run, show)
    _create_labels(run)
    with cluster.timed(seconds, "relabel"):
        _stage(client, run, "relabel", run.grid, show)
    for level, (shape, _) in list(enumerate(run.levels))[1:]:
        with cluster.timed(seconds, "pyramid"):
            _stage(client, run, f"pyramid{level}", Blocks(shape, _fit(run.block, shape)), show)
    return seconds


def _drop_passes(run: Run) -> None:
    """What the passes stored is gone: its mean is in place."""
    for stage in run.passes:
        volume.remove(f"{run.out}/work/{stage}")


def _stitch(client: Any, run: Run, show: Show) -> None:
    """Every block has its id map: by one process, or in a tree where that would not hold all edges."""
    lacks = run.config.stitch.reduce == "flat" and not volume.exists(f"{run.out}/work/basins.npz")
    if lacks:  # a tree has made the labels, but not what is asked for
        volume.remove(f"{run.out}/work/markers/stitch")
    if cluster.marked(run.out, "stitch", run.keys["stitch"]):
        return
    if _fits_one_process(run):
        _stage(client, run, "stitch", Blocks(run.shape, run.shape), show)
        return
    volume.remove(f"{run.out}/work/basins.npz")
    levels = range(tree.top(run.grid) + 1)
    for level in levels:
        _stage(client, run, f"tree{level}", tree.parts(run.grid, level), show)
    _stage(client, run, "number", _layers(run), show)
    receipts = cluster.receipts(run.out, "number", run.keys["number"])
    counts = [receipt["objects"] for receipt in sorted(receipts, key=lambda receipt: receipt["layer"])]
    _save(run.out, "work/tree/before.npz", before=np.cumsum([0, *counts]))
    for level in reversed(levels):
        _stage(client, run, f"names{level}", tree.parts(run.grid, level), show)
    cluster.mark(run.out, "stitch", run.keys["stitch"], 0, {"seconds": {}, "objects": sum(counts)})
    volume.remove(f"{run.out}/work/tree")


def _fits_one_process(run: Run) -> bool:
    """Whether `stitched` is to be used: as told, else by the number of edges."""
    if run.config.stitch.reduce != "auto":
        return run.config.stitch.reduce == "flat"
    receipts = cluster.receipts(run.out, "faces", run.keys["faces"])
    edges = sum(receipt.get("edges", 0) for receipt in receipts)
    if edges > FLAT_EDGES and (needs := run.config.stitch.needs_all()):
        raise UserError(
            f"stitch.{needs[0]} needs all {edges} edges in one process, about {edges * EDGE_BYTES / 1e9:.0f} GB: set it to "
            "0, or stitch.reduce to 'flat' where a worker has as much"
        )
    return edges <= FLAT_EDGES


def _stage(client: Any, run: Run, stage: str, grid: Blocks, show: Show) -> None:
    """One stage over the blocks of ``grid``; raises `Incomplete` that names the blocks given up."""
    done = cluster.marked(run.out, stage, run.keys[stage])
    advance = show.stage(stage, prod(grid.shape), sum(grid[i].voxels for i in done))
    knobs = run.config.cluster
    failures = cluster.run(
        client, work, (i for i in range(len(grid)) if i not in done), run.out, run.id, stage,
        tries=knobs.tries, window=knobs.window, done=lambda i, _: advance(grid[i].voxels),
    )  # fmt: skip
    if failures:
        first = failures[0]
        more = f" ({len(failures)} of {len(grid)} blocks)" if len(failures) > 1 else ""
        raise Incomplete(
            f"{stage} failed in block {grid[first.item]}{more} after {knobs.tries} tries: {first.reason}; "
            "what is done is kept: mend the cause and give the same command again"
        )


def _create_labels(run: Run) -> None:
    """The label arrays exist, wide enough for the number of objects."""
    if volume.exists(f"{run.out}/work/labels.json"):  # written last
        return
    volume.remove(f"{run.out}/labels")
    found = max((receipt["objects"] for receipt in cluster.receipts(run.out, "stitch", run.keys["stitch"])), default=0)
    for level, (shape, _) in enumerate(run.levels):
        volume.create_array(
            run.out, f"labels/instances/{level}", shape=shape, dtype=label_dtype(found),
            chunk=run.config.output.chunk, shard=_shard(run.block, shape, run.config.output.chunk), axes="zyx",
        )  # fmt: skip
    sizes = pyramid.sizes(run.levels, run.voxel_size_nm)
    volume.create_group(f"{run.out}/labels/instances")
    volume.set_group_attributes(run.out, "labels", {"ome": {"version": "0.5", "labels": ["instances"]}})
    volume.set_group_attributes(
        run.out,
        "labels/instances",
        volume.ome_multiscales("instances", "zyx", [(str(k), s) for k, s in enumerate(sizes)], source="../../"),
    )
    volume.write_bytes(run.out, "work/labels.json", json.dumps({"objects": found}).encode())


def _finish(run: Run, out: str, seconds: dict[str, float], start: float) -> Summary:
    """Table, picture and description are written, and the run takes its final name."""
    from volseg import view

    sums = _each(run.out, [f"work/objects/{i}.npz" for i in range(len(run.grid))])
    parts = [objects.Sums(**part) for part in sums]
    for stale in ("review", "tables/merges.parquet", "tables/merges.csv"):
        volume.remove(f"{run.out}/{stale}")
    told = _told(run)
    columns = objects.table(objects.merge(parts), run.shape, run.voxel_size_nm, told.get("confidence"))
    _write_table(run.out, "objects", columns)
    if told:
        _write_table(run.out, "merges", merges.table(told["rows"], run.config.fragments, run.shape, run.voxel_size_nm))
    labels = volume.open(run.out, dataset="labels/instances/0")
    with ThreadPoolExecutor(1) as beside:
        histogram = beside.submit(view.volumes, columns)
        volume.write_bytes(run.out, "overlay.png", view.overlay(run.source, labels, columns))
        volume.write_bytes(run.out, "tables/volumes.png", histogram.result())
    volume.set_group_attributes(
        run.out, "", volume.ome_multiscales("probability", "czyx", [("0", run.voxel_size_nm)])
    )
    receipts = [r for stage in run.keys for r in cluster.receipts(run.out, stage, run.keys[stage])]
    seconds = {**seconds, "total": time.perf_counter() - start}
    facts = {
        **run.to_json(),
        "out": out,
        "objects": int(columns["id"].size),
        "seconds": seconds,
        "worker_seconds": _add_up(r["seconds"] for r in receipts),
        "peak_bytes": {"worker": max(r["peak_bytes"] for r in receipts), "client": cluster.peak_bytes()},
        "versions": {name: metadata.version(name) for name in ("volseg", "zarr", "zarrs", "dask", "numba", "numpy")},
    }
    volume.write_bytes(run.out, "run.json", json.dumps(facts, indent=1).encode())
    if run.out != out:
        volume.remove(out)
        volume.move(run.out, out)
    if not run.config.output.keep_work:
        volume.remove(f"{out}/work")
    return Summary(
        out=out,
        objects=facts["objects"],
        voxels=prod(run.shape),
        seconds=seconds,
        worker_peak_bytes=facts["peak_bytes"]["worker"],
        client_peak_bytes=facts["peak_bytes"]["client"],
        labels=f"{out}/labels/instances",
        table=f"{out}/tables/objects.parquet",
        picture=f"{out}/overlay.png",
    )


def _told(run: Run) -> dict[str, np.ndarray]:
    """What `stitched` told of its decisions; nothing where it ran as a tree."""
    key = f"work/merges/{run.keys['stitch']}.npz"
    return _load(run.out, key) if volume.exists(f"{run.out}/{key}") else {}


def _write_table(out: str, name: str, columns: dict[str, np.ndarray]) -> None:
    """``tables/<name>`` of the run holds the columns as Parquet and as CSV."""
    import pandas

    file, frame = io.BytesIO(), pandas.DataFrame(columns)
    frame.to_parquet(file, index=False)
    volume.write_bytes(out, f"tables/{name}.parquet", file.getvalue())
    volume.write_bytes(out, f"tables/{name}.csv", frame.to_csv(index=False).encode())


def _add_up(rows: Any) -> dict[str, float]:
    total: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            total[name] = total.get(name, 0.0) + value
    return total


# ---------------------------------------------------------------- synthetic volumes


def synthesise(out: str, shape: Triple, block: Triple, *, seed: int, overwrite: bool, show: Show) -> None:
    """A synthetic EM volume with its exact labels is at ``out`` (OME-Zarr: array ``0``, and ``labels/truth/0``).

    Any block shape gives the same voxels. Voxels are 5 nm along each axis.
    """
    from volseg.synth import synth

    if volume.exists(out) and not overwrite:
        raise UserError(f"output {out} exists; give another path, or --overwrite to replace it")
    if volume.exists(out) and not volume.exists(f"{out}/labels/truth/zarr.json"):
        raise UserError(f"output {out} exists and volseg synth did not make it, so it is left alone; give another path")
    partial = _partial(out)
    volume.remove(partial)
    grid = Blocks(shape, _fit(block, shape))
    dtype = synth(Box((0, 0, 0), (1, 1, 1)), seed=seed)[1].dtype
    for group in ("", "/labels", "/labels/truth"):
        volume.create_group(f"{partial}{group}")
    for name, kind in (("0", "uint8"), ("labels/truth/0", dtype)):
        volume.create_array(partial, name, shape=shape, dtype=kind, chunk=(32, 256, 256), shard=grid.block, axes="zyx")
    nm = (5.0, 5.0, 5.0)
    volume.set_group_attributes(partial, "", volume.ome_multiscales("synthetic EM", "zyx", [("0", nm)]))
    volume.set_group_attributes(partial, "labels", {"ome": {"version": "0.5", "labels": ["truth"]}})
    truth = volume.ome_multiscales("truth", "zyx", [("0", nm)], source="../../")
    volume.set_group_attributes(partial, "labels/truth", truth)
    advance = show.stage("synth", prod(shape), 0)
    for box in grid:
        image, labels = synth(box, seed=seed)
        volume.write(volume.open_array(partial, "0"), box, image)
        volume.write(volume.open_array(partial, "labels/truth/0"), box, labels)
        advance(box.voxels)
    if partial != out:
        volume.remove(out)
        volume.move(partial, out)
