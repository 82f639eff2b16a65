"""A volume of any format as a sharded OME-Zarr pyramid: block by block, on a cluster, and going on after a stop.

1. Level 0 is written from the source, a whole number of shards at a time; each coarser level from the level above it.
2. As blocks end, the journal ``convert.json`` takes up the fingerprints of their shards. A command that is given again looks
   at what the journal names and does what is missing or not as it was written.
3. At the end patches of level 0 are compared with the source, and the output gets its name; the journal stays in it, as its
   manifest. On an object store, which cannot rename, the output has OME metadata only once it is whole.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from volseg.box import Blocks, Box, Triple
from volseg.config import Cluster
from volseg.engine import cluster, loop
from volseg.engine.folder import partial_path
from volseg.engine.lock import Lock
from volseg.errors import IncompleteRunError, UserError
from volseg.io import arrays, files, ome, pyramid, volume
from volseg.io.filling import filled_line, recording_filled
from volseg.io.header import shape_text
from volseg.progress import Progress
from volseg.system import free_memory

JOURNAL = "convert.json"
CHUNK = (64, 128, 128)  # voxels that are compressed together
SHARD, SHARD_OF_SECTIONS = (
    (256, 512, 512),
    (64, 1024, 1024),
)  # and stored in one object; of a source in sections, flat ones
BLOCK_BYTES = 1 << 30  # of the source that a task holds at most, where chunks of the source are large
PIECE_BYTES = 64 << 20  # of a level that are held while the next one is made from them
LIGHT_BYTES = 1 << 29  # up to which processes would start slower than threads are done
JOURNAL_SHARE = 0.05  # of the time that may go into writing the journal
JOURNAL_S = 2.0  # between two writings, at least
MAX_LEVELS = 20
IO_THREADS = 8


@dataclass(frozen=True)
class Conversion:
    """What is written, where, and from what; small enough to go to workers with each task."""

    source: volume.Volume
    path: str  # where it is written
    labels: bool  # coarser levels take the most frequent value, not the mean
    chunk: Triple
    shard: Triple
    block: Triple  # of level 0, a whole number of shards
    levels: tuple[tuple[Triple, Triple], ...] = field(default=())  # shape and factor against the level above

    def grid(self, level: int) -> Blocks:
        """The blocks of a level."""
        return Blocks(self.levels[level][0], self.block if level == 0 else self.shard)

    @property
    def dtype(self) -> Any:
        """The type stored."""
        return np.dtype(bool if self.source.binary else self.source.dtype)

    def description(self) -> dict:
        """What determines the bytes: another conversion cannot go on from these."""
        return {
            "source": self.source.path, "dataset": self.source.dataset,
            "channel": self.source.channel, "time": self.source.time,
            "inverted": self.source.inverted, "shape": self.source.shape, "dtype": self.dtype.name, "labels": self.labels,
            "voxel_size_nm": self.source.voxel_size_nm, "chunk": self.chunk, "shard": self.shard,
            "checksum": self.source.checksum(),
        }  # fmt: skip


def plan(
    source: volume.Volume, out: str, *, labels: bool, chunk: Triple | None, shard: Triple | None, workers: int = 1
) -> Conversion:
    """The conversion of ``source`` to ``out``, by so many ``workers``; refuses what has no pyramid.

    Without a ``shard``, that of `default_shard` is taken.
    """
    chunk = chunk or CHUNK
    shard = shard or default_shard(source, chunk)
    dtype = np.dtype(source.dtype)
    if dtype.kind in "iu" and dtype.itemsize > 2 and not labels:
        raise UserError(f"{source.path} holds {source.dtype} voxels, as labels do: add --labels, or save it in 16 bits")
    if labels and dtype.kind == "f":
        raise UserError(f"{source.path} holds {source.dtype} voxels, and labels are integers: leave out --labels")
    if any(s % c for s, c in zip(shard, chunk, strict=True)):
        raise UserError(
            f"a shard of {shape_text(shard)} is no whole number of chunks of {shape_text(chunk)}; change one of them"
        )
    pieces = [min(c, n) for c, n in zip(chunk, source.shape, strict=True)]
    stored = [min(s // c, -(-n // c)) * c for s, c, n in zip(shard, pieces, source.shape, strict=True)]
    chunk, shard = (pieces[0], pieces[1], pieces[2]), (stored[0], stored[1], stored[2])
    room = min(BLOCK_BYTES, free_memory() // (4 * workers))
    levels = tuple(pyramid.levels(source.shape, source.voxel_size_nm, MAX_LEVELS))
    return Conversion(source, partial_path(out), labels, chunk, shard, block_shape(source, shard, room), levels)


def default_shard(source: volume.Volume, chunk: Triple) -> Triple:
    """A whole number of chunks near `SHARD` or, of a source stored section by section, near `SHARD_OF_SECTIONS`."""
    near = SHARD if source.chunk[0] >= min(chunk[0], source.shape[0]) else SHARD_OF_SECTIONS
    z, y, x = (max(1, s // c) * c for s, c in zip(near, chunk, strict=True))
    return z, y, x


def block_shape(source: volume.Volume, shard: Triple, room: int) -> Triple:
    """Shards that one task reads together, so that no chunk of the source is decoded by many: as ``room`` bytes allow."""
    block, itemsize = list(shard), np.dtype(source.dtype).itemsize
    for axis in (2, 1, 0):
        others = prod(block) // block[axis] * itemsize
        most = max(1, room // (others * shard[axis]))
        wanted = -(-min(source.chunk[axis], source.shape[axis]) // shard[axis])
        block[axis] = shard[axis] * min(wanted, most)
    return tuple(block)


# ---------------------------------------------------------------- what one task does


def write_block(job: Conversion, level: int, i: int) -> tuple[dict[str, list], list[str]]:
    """Block ``i`` of a level is stored: the fingerprints of its shards, of absent ones (all zero) ``[0, ""]``; and the boxes
    of the source that cannot be decoded and are 0."""
    box = job.grid(level)[i]
    array = arrays.open_array(job.path, str(level))
    with recording_filled() as filled:
        arrays.write(array, box, job.source.read(box) if level == 0 else _downsampled(job, level, box))
    return {key: _fingerprint(job.path, key) for key in _keys(array, level, box)}, [str(one) for _, one in filled]


def _keys(array: Any, level: int, box: Box) -> list[str]:
    return [f"{level}/{key}" for key in arrays.shard_keys(array, box)]


def _fingerprint(path: str, key: str) -> list:
    try:
        return files.fingerprint(path, key)
    except FileNotFoundError:
        return [0, ""]


def _downsampled(job: Conversion, level: int, box: Box) -> np.ndarray:
    """The voxels of ``box`` in a level, made from the level above in slabs."""
    above, factor = job.levels[level - 1][0], job.levels[level][1]
    source = arrays.open_array(job.path, str(level - 1))
    reduce = pyramid.downsample if job.labels else pyramid.downsample_mean
    out = np.empty(box.shape, np.uint8 if job.source.binary else job.dtype)
    depth = max(1, PIECE_BYTES // (prod(box.shape[1:]) * prod(factor) * out.itemsize))
    for z in range(0, box.shape[0], depth):
        piece = Box((box.start[0] + z, *box.start[1:]), (min(box.stop[0], box.start[0] + z + depth), *box.stop[1:]))
        data = np.asarray(source[pyramid.parent_box(piece, factor, above).slices])
        out[z : z + depth] = reduce(data.view(out.dtype), factor)
    return out


# ---------------------------------------------------------------- the whole


def execute(
    job: Conversion, out: str, config: Cluster, progress: Progress, *, overwrite: bool = False
) -> volume.Volume:
    """The conversion is at ``out``; what an earlier command left is gone on from."""
    _refuse(job, out, overwrite)
    light = prod(job.source.shape) * job.dtype.itemsize <= LIGHT_BYTES
    with Lock(out) as lock, cluster.connect(config, light=light, tell=progress.message) as client:
        _refuse(job, out, overwrite)
        journal = _begin(job, overwrite, progress)
        for level in range(len(job.levels)):
            _write_level(client, job, level, journal, config, progress, lock)
        lock.check()
        if journal.filled:
            progress.message(filled_line(job.source.path, sorted(journal.filled), f"filled in {out}/{JOURNAL}"))
        return _finish(job, out, journal)


def _refuse(job: Conversion, out: str, overwrite: bool) -> None:
    """No conversion replaces what it reads from, nor what `refuse_existing` keeps."""
    if f"{files.absolute(job.source.path)}/".startswith((f"{out}/", f"{job.path}/")):
        raise UserError(f"output {out} would replace the volume it is made from; give another path")
    refuse_existing(out, overwrite)


def refuse_existing(out: str, overwrite: bool) -> None:
    """Nothing that a conversion did not make is ever replaced, and a conversion only where ``overwrite`` says so."""
    for path in {out, partial_path(out)}:
        if files.exists(path) and not files.exists(files.join(path, JOURNAL)):
            raise UserError(
                f"output {path} exists and volseg convert did not make it, so it is left alone; give another path"
            )
    if _finished(out) and not overwrite:
        raise UserError(f"output {out} exists; give another path, or --overwrite to replace it")


def _finished(out: str) -> bool:
    if out != partial_path(out):
        return files.exists(out)
    return files.exists(out) and "ome" in arrays.group_attributes(out)


class Journal:
    """What is stored so far: fingerprints by key, and the boxes that were filled with 0; written beside it now and then."""

    def __init__(self, path: str, description: dict, marks: dict[str, list], filled: Iterable[str] = ()) -> None:
        self.path, self.description, self.marks, self.filled = path, description, marks, set(filled)
        self.due = 0.0

    def add(self, marks: dict[str, list], filled: Iterable[str]) -> None:
        self.marks.update(marks)
        self.filled.update(filled)
        if time.monotonic() >= self.due:
            self.save()

    def save(self) -> None:
        start = time.monotonic()
        document = {"of": self.description, "files": self.marks, "filled": sorted(self.filled)}
        files.write_bytes(self.path, JOURNAL, json.dumps(document).encode())
        end = time.monotonic()
        self.due = end + max(JOURNAL_S, (end - start) / JOURNAL_SHARE)


def _begin(job: Conversion, overwrite: bool, progress: Progress) -> Journal:
    """The journal of what is stored and as it was written; empty arrays where nothing was begun."""
    description = json.loads(json.dumps(job.description()))
    last = files.join(job.path, str(len(job.levels) - 1), "zarr.json")  # made last
    stored = _stored_journal(job.path) if not overwrite and files.exists(last) else None
    if stored is not None and stored["of"] != description:
        changed = sorted(key for key in description if stored["of"].get(key) != description[key])
        raise UserError(
            f"{job.path} was begun with other {', '.join(changed)}; give the same command, or --overwrite to begin anew"
        )
    if stored is None:
        files.remove(job.path)
        journal = Journal(job.path, description, {})
        journal.save()
        _create(job)
        return journal
    marks = stored["files"]
    with ThreadPoolExecutor(IO_THREADS) as pool:
        found = dict(zip(marks, pool.map(lambda key: _fingerprint(job.path, key), marks), strict=True))
    damaged = [key for key, mark in marks.items() if found[key] != mark]
    if damaged:
        progress.message(
            f"{job.path}/{damaged[0]} and {len(damaged) - 1} more are not as they were written: written again"
        )
    kept = {key: mark for key, mark in marks.items() if found[key] == mark}
    return Journal(job.path, description, kept, stored.get("filled", ()))


def _stored_journal(path: str) -> dict | None:
    """The journal at ``path``; None where there is none, or none that can be read."""
    try:
        stored = json.loads(files.read_bytes(path, JOURNAL))
    except (FileNotFoundError, ValueError):
        return None
    return stored if isinstance(stored, dict) and {"of", "files"} <= stored.keys() else None


def _create(job: Conversion) -> None:
    """Empty arrays, the coarsest last."""
    arrays.create_group(job.path)
    for level, (shape, _) in enumerate(job.levels):
        arrays.create_array(
            job.path, str(level), shape=shape, dtype=job.dtype, chunk=job.chunk, shard=job.shard, axes="zyx"
        )


def _missing(job: Conversion, level: int, marks: dict[str, list]) -> list[tuple[int, int]]:
    """Blocks of a level with a shard that the journal does not have."""
    array = arrays.open_array(job.path, str(level))
    grid = job.grid(level)
    return [(level, i) for i in range(len(grid)) if not all(key in marks for key in _keys(array, level, grid[i]))]


def _write_level(
    client: Any, job: Conversion, level: int, journal: Journal, config: Cluster, progress: Progress, lock: Lock
) -> None:
    grid = job.grid(level)
    items = _missing(job, level, journal.marks)
    advance = progress.stage(
        f"level {level}", prod(grid.shape), prod(grid.shape) - sum(grid[i].voxels for _, i in items)
    )

    def done(item: tuple[int, int], stored: tuple[dict[str, list], list[str]]) -> None:
        lock.check()
        journal.add(*stored)
        advance(grid[item[1]].voxels)

    def handed_out() -> Iterator[tuple[int, int]]:
        yield from items

    failures = loop.run(
        client, write_block, handed_out(), job, done=done, tries=config.tries, window=cluster.window(client, config),
        stop=lambda error: isinstance(error, UserError),
    )  # fmt: skip
    journal.save()
    if failures:
        raise IncompleteRunError(
            f"{len(failures)} of {len(grid)} blocks of level {level} failed, the first with: {failures[0].reason}; the rest is "
            "kept, and the same command goes on from there"
        )


def _finish(job: Conversion, out: str, journal: Journal) -> volume.Volume:
    """The output is compared with its source in patches, described, and has its name."""
    written = volume.open(job.path, dataset="0", voxel_size_nm=job.source.voxel_size_nm)
    if written.checksum() != journal.description["checksum"]:
        raise UserError(
            f"{job.path} does not hold the voxels of {job.source.path}; has it changed meanwhile? Convert it anew"
        )
    size = job.source.voxel_size_nm
    sizes, begin = (
        pyramid.sizes(list(job.levels), size or (1.0, 1.0, 1.0)),
        job.source.origin_nm if size else job.source.place,
    )
    name = out.rpartition("/")[2].removesuffix(".zarr").removesuffix(".ome")
    levels = [(str(level), one) for level, one in enumerate(sizes)]
    attributes = ome.multiscales(name, "zyx", levels, unit="nanometer" if size else "", begin=begin)
    if job.labels:
        attributes["ome"]["image-label"] = {}
    arrays.set_group_attributes(job.path, "", attributes)
    if job.path != out:
        files.sync_filesystem(job.path)
        files.remove(out)
        files.move(job.path, out)
    return volume.open(out)
