"""What a run will take, before it does: voxels through the network, bytes, memory, seconds, cost.

Shapes tell all but speed, the network's memory and how well the output compresses: those come from a `probe` of a few
tiles, kept in the user's cache, or from rough figures where none was made.

Rough figures are of one core while the others compute too, as all of a run's do, and rest on few machines. Of the network:
whole runs on EPFL on 2 AVX2 cores, reading, blending and storing included (torch and ONNX Runtime by their ratio to OpenVINO
there), and bare loops on 2 cores with AVX-512 BF16. Of what follows it, the worker seconds of the EPFL runs on the former.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path

import numpy as np

from volseg import system as machine
from volseg.box import Box, Triple
from volseg.config import Fragments
from volseg.engine import cluster
from volseg.engine import forkserver as prefork
from volseg.engine.run import Run, redundancy
from volseg.errors import UserError
from volseg.inference import backends, cache, export, hardware, model, sampling, tiles
from volseg.io import files
from volseg.planning import memory
from volseg.planning import prepare as describe
from volseg.segmentation import objects
from volseg.segmentation.basins import BlockBasins, watershed_block
from volseg.segmentation.heights import block_heights

START = 3.0  # seconds: 2 until workers are there, 1 for the table and the picture
SPEED = {
    "openvino fp32": 1.1, "openvino int8": 2.1, "onnx fp32": 0.9, "torch fp32": 0.45,
}  # fmt: skip  # million voxels/s of a core
FAST = {"openvino bf16": 2.1, "openvino int8": 3.5, "torch fp32": 0.7, "torch bf16": 1.4}  # where it multiplies in bf16
GPU_SPEED = 60.0  # million voxels/s of a GPU, a guess
BINNED = 2.6  # times as fast where the network bins by 2, likewise
INSTANCES = 10e6  # voxels/s of a core for all that follows the network
PACKED = {
    "probability": 0.05,
    "fragments": 0.03,
    "labels": 0.01,
    "tables": 1.4,
    "cut": 0.0,
}  # stored bytes for each voxel (and
# channel); of the tables, more for each voxel of a plane where blocks meet, which the rough figure has in it
LAID = (
    0.03e-6  # seconds of a core for a voxel inferred: reading, laying tiles, blending and storing, which no probe sees
)
ON_GPU = 0.87  # share of predict's time in the network on a GPU, a guess
AFTER = 0.04e-6  # seconds of a core for a voxel: reading, storing, faces, relabeling and levels, likewise
LINKED = 1.33  # bytes of all tables for each one of the blocks' own, likewise
SECTIONS = 8  # sections of the probe, fewer where tiles are large
PROBE_VOXELS = 1 << 22  # voxels that are enough
SECONDS = 300  # a probe that takes longer is given up


@dataclass(frozen=True)
class Rates:
    """What shapes do not tell. Speeds are voxels/s of all workers: through the network, and through all that follows it."""

    predict: float
    instances: float
    engine_bytes: int
    device_bytes: int = 0
    packed: dict[str, float] = field(default_factory=lambda: dict(PACKED))
    probed: bool = False


@dataclass(frozen=True)
class Plan:
    """What a run will take. Bytes read are of the volume, uncompressed; bytes written are an estimate of what is stored.

    ``beside`` are workers that do what needs no device, where the others have one. Memory is the most that each holds.
    """

    shape: Triple
    block: Triple
    blocks: int
    predict_block: Triple
    predict_blocks: int
    tile: tuple[int, int]
    inferred_voxels: int
    redundancy: float
    read_bytes: int
    written_bytes: int
    workers: int
    worker_bytes: int
    beside: int
    beside_bytes: int
    client_bytes: int
    device_bytes: int
    seconds: dict[str, float]
    probed: bool
    network: str = ""
    wanted: str = ""
    local: bool = True
    refusal: str = ""  # why it would be refused

    def to_json(self) -> dict:
        """As plain values, with the total of the seconds."""
        return {**asdict(self), "total_seconds": self.total_seconds}

    @classmethod
    def from_json(cls, plain: dict) -> Plan:
        return cls(**{name: value for name, value in plain.items() if name != "total_seconds"})

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(table(self))}</pre>"

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def host_bytes(self) -> int:
        """Of all processes on this machine."""
        workers = self.workers * self.worker_bytes + self.beside * self.beside_bytes
        return self.local * workers + self.client_bytes


def make(run: Run, workers: cluster.WorkerPool, rates: Rates) -> Plan:
    """The plan of ``run`` on the workers of ``workers``."""
    through, grid, shape = run.inferred_voxels, run.predict_grid, run.shape
    tile = run.tile_grid(run.config.predict.planes[0]).size
    return Plan(
        shape=shape,
        block=run.block,
        blocks=len(run.grid),
        predict_block=run.predict_block,
        predict_blocks=len(grid),
        tile=tile,
        inferred_voxels=through,
        redundancy=redundancy(run),
        read_bytes=_read_bytes(run),
        written_bytes=_written_bytes(run, rates),
        workers=workers.workers,
        beside=workers.cpu_workers,
        beside_bytes=memory.worker(run, 1, engine=0),
        network="" if run.channels else describe.engine(run),
        wanted=str(run.roi or ""),
        local=not run.config.cluster.scheduler,
        worker_bytes=memory.worker(run, workers.threads, workers.tasks, rates.engine_bytes),
        client_bytes=memory.CLIENT,
        device_bytes=rates.device_bytes,
        seconds={"start": START, "predict": through / rates.predict, "instances": prod(shape) / rates.instances},
        probed=rates.probed,
    )


def _read_bytes(run: Run) -> int:
    """Of the volume: blocks also read the sections around them, and the rows and columns under their tiles."""
    if run.channels:
        return sum(
            prod(run.shape) * np.dtype(channel.source.dtype).itemsize for channel in run.channels if channel.source
        )
    grids = {plane: run.pass_grid(plane) for plane in run.passes.values()} or {"xy": run.predict_grid}
    core = run.wanted_part(Box.from_shape(run.shape))
    return sum(memory.source_bytes(run, plane, grid) * grid.count_overlapping(core) for plane, grid in grids.items())


def _written_bytes(run: Run, rates: Rates) -> int:
    levels = sum(prod(shape) for shape, _ in run.levels)
    probability = len(run.heads) * rates.packed["probability"] * (1 + len(run.passes))
    each = prod(run.shape) * (probability + rates.packed["fragments"]) + table_bytes(run.shape, run.block, rates.packed)
    each += levels * rates.packed["labels"]
    return round(each)


def table_bytes(shape: Triple, block: Triple, packed: dict[str, float]) -> float:
    """What the tables take of a volume in such blocks: by its voxels, and by those of the planes where blocks meet."""
    planes = sum((n - 1) // b / n for b, n in zip(block, shape, strict=True))
    return prod(shape) * (packed["tables"] + packed["cut"] * planes)


# ---------------------------------------------------------------- whether it fits


def refuse(plan: Plan, run: Run, free_memory: int, free_disk: int | None) -> None:
    """Raises `UserError` where memory or disk (None: unknown) of this machine are too small."""
    if plan.host_bytes > free_memory:
        room = (free_memory - plan.client_bytes) // plan.worker_bytes if plan.local else 0
        advice = f"set cluster.workers={room}" if room > 0 else _smaller(run)
        raise UserError(
            f"{plan.workers} worker(s) of {_gb(plan.worker_bytes)} and {_gb(plan.client_bytes)} here would hold "
            f"{_gb(plan.host_bytes)}, and {_gb(free_memory)} of memory are free: {advice}"
        )
    if free_disk is not None and plan.written_bytes > free_disk:
        raise UserError(
            f"about {_gb(plan.written_bytes)} would be written to {run.out}, and {_gb(free_disk)} are free there: give --out "
            "on a larger disk"
        )


def refuse_limit(plan: Plan, run: Run, limit: int) -> None:
    """Raises `UserError` where a worker would hold more than ``limit`` bytes (0: no limit)."""
    if limit and plan.worker_bytes > limit:
        raise UserError(
            f"a worker would hold {_gb(plan.worker_bytes)} and may hold {_gb(limit)}: {_smaller(run)}, or give it more with "
            "cluster.memory_limit"
        )


def _smaller(run: Run) -> str:
    """What to set where no worker could hold a block."""
    if run.batch > 1:
        return f"set predict.batch={run.batch // 2} or less"
    if run.config.blocks.shape:
        return "leave out blocks.shape, or make it smaller"
    multiple = tiles.MULTIPLE * run.binning
    longest = max(max(run.tile_grid(plane).size) for plane in run.config.predict.planes)
    smaller = max(multiple, min(longest, run.config.predict.tile) // 2 // multiple * multiple)
    return f"set predict.tile={smaller}" if smaller < longest else "use a machine with more"


def room_on_disk(run: Run) -> int | None:
    """Bytes that a run may still store where it lies, with those that it already has; None on an object store."""
    if files.is_remote(run.out):
        return None
    return machine.free_disk(run.out) + files.stored_bytes(run.out)


# ---------------------------------------------------------------- in words


def table(plan: Plan, price: float | None = None) -> str:
    """The plan as plain text; ``price`` is that of an hour."""
    shape, block, predicted = (" x ".join(map(str, n)) for n in (plan.shape, plan.block, plan.predict_block))
    cut = f"{plan.blocks} of {block}"
    if plan.predict_block != plan.block:
        cut += f"; of the network {plan.predict_blocks} of {predicted}"
    rows = {
        "volume": f"{shape}, {prod(plan.shape) / 1e6:.1f} million voxels" + f"; {plan.wanted}" * bool(plan.wanted),
        "network": plan.network,
        "blocks": cut,
        "tiles": f"{plan.inferred_voxels // prod(plan.tile)} of {plan.tile[0]} x {plan.tile[1]}"
        if plan.network
        else "",
        "redundancy": f"{plan.redundancy:.3f} voxels inferred for each one wanted" if plan.network else "",
        "reads": f"{_gb(plan.read_bytes)} of the volume, uncompressed",
        "writes": f"about {_gb(plan.written_bytes)}, compressed{_rough(plan)}",
        "memory": f"{_gb(plan.worker_bytes)} in each of {plan.workers} worker(s), "
        + f"{_gb(plan.beside_bytes)} in {plan.beside} beside them, " * bool(plan.beside)
        + f"{_gb(plan.client_bytes)} here",
        "device": f"{_gb(plan.device_bytes)}" if plan.device_bytes else "",
        "time": f"about {duration(plan.total_seconds)}{_rough(plan)}: "
        + ", ".join(f"{name} {duration(s)}" for name, s in plan.seconds.items()),
        "cost": f"about {price * plan.total_seconds / 3600:.2f}" if price is not None else "",
    }
    return "\n".join(f"{name:10} {text}" for name, text in rows.items() if text)


def _rough(plan: Plan) -> str:
    return "" if plan.probed else " (rough: nothing was measured, volseg plan does)"


def compared(plan: Plan, seconds: float, worker_bytes: int, written_bytes: int | None) -> str:
    """Plan against actual, as a line."""
    wrote = "" if written_bytes is None else f", writes {_gb(plan.written_bytes)} / {_gb(written_bytes)}"
    return (
        f"plan / actual: {duration(plan.total_seconds)} / {duration(seconds)}, worker memory {_gb(plan.worker_bytes)} / "
        f"{_gb(worker_bytes)}{wrote}{_rough(plan)}"
    )


def compare_with(plan: dict, actual: dict) -> list[str]:
    """What a finished run stored of its plan and of what it took, as a line; none where it was not planned."""
    if not plan:
        return []
    made = Plan.from_json(plan)
    return [compared(made, actual["total_seconds"], actual["worker_bytes"], actual["written_bytes"])]


def duration(seconds: float) -> str:
    """
    >>> duration(3.21), duration(250), duration(9000)
    ('3.2 s', '4.2 min', '2.5 h')
    """
    for unit, length, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < most:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count < 1e11 else f"{count / 1e12:.2f} TB"


# ---------------------------------------------------------------- what shapes do not tell


def known(run: Run, workers: cluster.WorkerPool) -> Rates:
    """What an earlier `probe` of this volume, network and machine found; rough figures where there was none."""
    try:
        return Rates(**json.loads(_cache_file(run, workers).read_text()))
    except (OSError, ValueError, TypeError):
        pass
    engine, cuda = run.engine, describe.gpus_of(run) > 0
    speeds = {**SPEED, **(FAST if hardware.has_bf16() else {})}
    of_core = speeds.get(f"{engine.backend} {engine.precision}", 1.0) if engine else 1.0
    speed = workers.workers * (GPU_SPEED if cuda else workers.threads * of_core * (BINNED if run.binning > 1 else 1))
    return Rates(1e6 * speed, INSTANCES * (workers.workers + workers.cpu_workers), memory.network(run, workers.threads))


def _cache_file(run: Run, workers: cluster.WorkerPool) -> Path:
    sizes = [run.tile_grid(plane).size for plane in run.config.predict.planes]
    engine = run.engine and run.engine.arithmetic
    facts = [run.checksum, run.model_sha256, engine, sorted(PACKED), sizes, run.config.predict.tta, run.heads,
             run.config.fragments.model_dump(mode="json"), asdict(workers), os.cpu_count()]  # fmt: skip
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return cache.folder() / f"{key}.plan"


def probe(run: Run, workers: cluster.WorkerPool) -> Rates:
    """Measures, in as many processes as there will be workers, some sections of a tile: the network, then the rest."""
    if run.channels:
        return known(run, workers)
    batch = _sample(run)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "tiles.npy"), batch)
        path = Path(run.config.predict.model) if run.config.predict.model else model.shipped()
        Path(folder, "model.bin").write_bytes(export.export_model(path, run.engine.backend, run.engine.precision))
        asked = {**run.engine.arithmetic, "threads": workers.threads, "voxel_size_nm": run.voxel_size_nm,
                 "fragments": run.config.fragments.model_dump(mode="json")}  # fmt: skip
        Path(folder, "asked.json").write_text(json.dumps(asked))
        found = _together(folder, 1 if run.engine.device == "cuda" else workers.workers)
    count = workers.workers / len(found)
    rates = Rates(
        predict=count * sum(_predicted(run, one["predict"], workers.threads) for one in found),
        instances=(workers.workers + workers.cpu_workers)
        / (float(np.mean([1 / one["instances"] for one in found])) + AFTER),
        engine_bytes=max(one["engine_bytes"] for one in found),
        device_bytes=found[0]["device_bytes"],
        packed=found[0]["packed"],
        probed=True,
    )
    cache.keep(_cache_file(run, workers), json.dumps(asdict(rates)).encode())
    return rates


def _predicted(run: Run, network: float, threads: int) -> float:
    """Voxels/s of predict in a worker whose network alone does so many."""
    if run.engine.device == "cuda":
        return ON_GPU * network
    return 1 / (1 / network + LAID / (threads * run.config.predict.tta))


def _sample(run: Run) -> np.ndarray:
    """A tile of consecutive sections from the middle of what is wanted, as the network takes it: (n, sections, Y, X)."""
    plane = run.config.predict.planes[0]
    axes, grid = tiles.PLANES[plane], run.tile_grid(plane)
    depth = run.shape[axes[0]]
    wanted = run.wanted_part(Box.from_shape(run.shape)).transpose(axes)
    z, y, x = ((a + b) // 2 for a, b in zip(wanted.start, wanted.stop, strict=True))
    tile = grid.overlapping(slice(y, y + 1), slice(x, x + 1))[0]
    count = min(max(2, min(SECTIONS, PROBE_VOXELS // prod(grid.size))), depth)
    first = min(max(0, z - count // 2), depth - count)
    return sampling.read_tiles(
        run.source, grid.place(tile), range(first, first + count), sections=run.sections, norm=(run.mean, run.std),
        plane=plane,
    )  # fmt: skip


def _together(folder: str, count: int) -> list[dict]:
    """What ``count`` processes measure side by side."""
    command = [sys.executable, "-m", "volseg.planning.plan", folder]
    env = {**prefork.ENVIRONMENT, **os.environ}
    started = [
        subprocess.Popen([*command, str(i)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for i in range(count)
    ]
    end = time.monotonic() + SECONDS
    try:
        said = [process.communicate(timeout=max(1.0, end - time.monotonic()))[1] for process in started]
    except subprocess.TimeoutExpired:
        raise UserError(f"a few tiles took more than {SECONDS} s; set a smaller predict.tile") from None
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stderr.close()
    for process, text in zip(started, said, strict=True):
        if process.returncode:
            last = (text.strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"the probe of a few tiles ended with code {process.returncode}: {last}; mend that, or give "
                            "another predict.backend; volseg infer does without a probe")  # fmt: skip
    return [json.loads(Path(folder, f"{i}.json").read_text()) for i in range(count)]


def main(folder: str, number: str) -> None:
    """What `probe` starts: one worker's share of it, in a process that treats memory as workers do."""
    machine.tune_malloc()
    asked = json.loads(Path(folder, "asked.json").read_text())
    batch = np.load(Path(folder, "tiles.npy"))
    found, probability = _network(asked, Path(folder, "model.bin").read_bytes(), batch)
    found |= _instances(probability, Fragments(**asked["fragments"]), tuple(asked["voxel_size_nm"]))
    Path(folder, f"{number}.json").write_text(json.dumps(found))


def _network(asked: dict, blob: bytes, batch: np.ndarray) -> tuple[dict, np.ndarray]:
    """Speed and memory of the network, and the probabilities (uint8; heads, sections, y, x) of the tiles.

    Tiles lie where the network takes them, since a run cuts them there.
    """
    count, threads, size = len(batch), asked["threads"], asked["batch"]
    before = machine.resident()
    there = backends.device(asked["backend"])
    network = there.synchronized(
        backends.network(blob, asked["backend"], asked["precision"], (size, *batch.shape[1:]), threads)
    )
    steps = range(0, max(count, 2 * threads * size), size)
    load = [(at, there.put(np.ascontiguousarray(batch[np.arange(at, at + size) % count]))) for at in steps]
    for _ in backends.imap(network, load[:threads], threads):
        pass
    start = time.perf_counter()
    made = [part for _, part in backends.imap(network, load, threads)]
    took = time.perf_counter() - start
    engine_bytes = machine.resident("HWM") - before
    if asked["device"] == "cpu" or asked["backend"] != "torch":
        engine_bytes -= sum(part.nbytes for part in made) + sum(one.nbytes for _, one in load)
    parts = [there.get(part) for part in made]
    every = np.concatenate(parts)[:count].transpose(1, 0, 2, 3)
    found = {
        "predict": len(load) * size * batch[0, 0].size / took,
        "engine_bytes": max(0, engine_bytes),
        "device_bytes": hardware.peak_gpu_bytes(),
    }
    return found, np.floor(every * np.float32(255) + np.float32(0.5)).astype(np.uint8)


def _instances(probability: np.ndarray, knobs: Fragments, voxel_size_nm: tuple) -> dict:
    """Speed of what is computed after the network, and how many bytes its outputs take when they are stored."""
    from numcodecs import Zstd

    shape = probability.shape[1:]
    box, mass = Box.from_shape(shape), np.ascontiguousarray(probability[0])
    for _ in range(2):  # numba may compile in the first
        start = time.perf_counter()
        height = block_heights(probability, box, shape, knobs, voxel_size_nm)
        region, table = watershed_block(height, mass, box, shape, knobs.connectivity)
        label = np.arange(table.root.size + 1, dtype=np.uint32)
        labels = objects.paint(region, label)
        objects.measure(region, label, mass, box, [None] * 3)
        packed = {"probability": probability, "fragments": region, "labels": labels}
        sizes = {name: len(Zstd(1).encode(np.ascontiguousarray(data))) / data.size for name, data in packed.items()}
        took = time.perf_counter() - start
    whole = _bytes(table)
    parts = [Box((a, 0, 0), (b, *shape[1:])) for a, b in ((0, shape[0] // 2), (shape[0] // 2, shape[0]))]
    cut = [
        watershed_block(height[p.start[0] : p.stop[0] + 2], mass[p.slices], p, shape, knobs.connectivity)[1]
        for p in parts
    ]
    sizes["tables"] = LINKED * whole / mass.size
    sizes["cut"] = LINKED * max(0, sum(map(_bytes, cut)) - whole) / prod(shape[1:])
    return {"instances": mass.size / took, "packed": sizes}


def _bytes(table: BlockBasins) -> int:
    return sum(column.nbytes for column in vars(table).values())


if __name__ == "__main__":
    main(*sys.argv[1:])
