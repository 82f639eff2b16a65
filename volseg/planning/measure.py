"""What shapes do not tell of a run: speeds, the network's memory, and how much there is to store of a voxel.

`measure_rates` has a few processes do a little of the run and keeps what they took in the user's cache, where
`known_rates` finds it. Where nothing was measured there are rough figures, unless the network was when its engine was chosen.
They are of one core while the others compute too, as all of a run's do, and rest on few machines. Of the network: whole runs
on EPFL on 2 AVX2 cores, reading and storing included (torch and ONNX Runtime by their ratio to OpenVINO there), and what
`python -m benchmarks backends` finds on 2 cores with AVX-512 BF16. Of what follows it: the worker seconds of a run of 4e9
voxels on the latter.
"""

from __future__ import annotations

import hashlib
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

from volseg import system
from volseg.box import Box, inverse_axes, transpose_axes
from volseg.config import Fragments
from volseg.engine import cluster, finish, forkserver
from volseg.engine.run import Run
from volseg.errors import UserError
from volseg.inference import backends, cache, export, hardware, sampling, tiles
from volseg.inference.model_file import model_file
from volseg.io import probabilities
from volseg.planning import memory
from volseg.planning.memory import TABLES_PER_BLOCK_TABLE
from volseg.segmentation import objects
from volseg.segmentation.basins import BlockBasins, watershed_block
from volseg.segmentation.heights import block_heights

CORE_MVOXELS_PER_S = {"openvino fp32": 1.1, "openvino int8": 2.1, "onnx fp32": 0.9, "torch fp32": 0.45}
BF16_CORE_MVOXELS_PER_S = {
    "openvino fp32": 4.3, "openvino bf16": 7.1, "openvino int8": 11.4, "onnx fp32": 2.5, "torch fp32": 1.8, "torch bf16": 3.6
}  # fmt: skip
GPU_MVOXELS_PER_S = 60.0  # a guess
BINNED_SPEEDUP = 2.6  # of a network that bins by 2, likewise
INSTANCE_VOXELS_PER_S = 30e6  # of a core, for all that follows the network
STORED_BYTES = {"probability": 0.05, "fragments": 0.03, "labels": 0.01, "tables": 1.4, "cut": 0.0}
EDGES_PER_VOXEL = 0.02
TILE_OVERHEAD_S = 0.005e-6  # of a core for a voxel inferred: reading, blending and storing, which nothing here measures
INSTANCE_OVERHEAD_S = 0.022e-6  # of a core for a voxel: reading, storing, linking, relabeling and levels, likewise
GPU_NETWORK_SHARE = 0.87  # of predict's time on a GPU, a guess
MAX_SAMPLED_SECTIONS = 8
SAMPLED_VOXELS = 1 << 22  # enough: fewer sections where tiles are large
SAMPLED_SIDE = 512  # voxels of a section of probabilities that were made elsewhere
MIN_SAMPLED_VOXELS = 1 << 24  # tables of fewer voxels are small, whatever they hold
TIME_LIMIT_S = 300
LOOKED_TILES = 24  # of which it is looked at whether they show anything
LOOK_S = 3.0  # after which no further one is looked at
PLASTIC = 1.324717957244746  # its powers spread points evenly: M. Roberts' R2 sequence (2018)


@dataclass(frozen=True)
class Rates:
    """What shapes do not tell.

    Attributes
    ----------
    predict, instances
        Voxels/s of all workers together: through the network, and through all that follows it.
    engine_bytes, device_bytes
        Memory of the network in a worker, and on its GPU.
    packed
        Stored bytes for each voxel, of the probabilities for each channel too; ``cut`` are those of the tables for each
        voxel of a plane where blocks meet.
    edges
        Pairs of basins that touch, for each voxel.
    looked, constant
        How many tiles were looked at, spread over what is wanted, and how many of them are of one gray value: no network
        sees such tiles.
    probed
        Whether all this was measured.
    """

    predict: float
    instances: float
    engine_bytes: int
    device_bytes: int = 0
    packed: dict[str, float] = field(default_factory=lambda: dict(STORED_BYTES))
    edges: float = EDGES_PER_VOXEL
    looked: int = 0
    constant: int = 0
    probed: bool = False

    @property
    def constant_share(self) -> float:
        """Of the tiles, about; never quite all, for a few do not tell of every one.

        >>> Rates(1.0, 1.0, 0, looked=4, constant=1).constant_share, Rates(1.0, 1.0, 0, looked=4, constant=4).constant_share
        (0.25, 0.875)
        """
        return min(self.constant, self.looked - 0.5) / self.looked if self.looked else 0.0


def known_rates(run: Run, workers: cluster.WorkerPool) -> Rates:
    """What an earlier `measure_rates` of this volume, network and machine found, else rough figures.

    Of probabilities that were made elsewhere, how many basins there are is looked at in any case, for noise has ten times
    as many as a network's: unless there are fewer than `MIN_SAMPLED_VOXELS`.
    """
    try:
        return Rates(**json.loads(_cache_file(run, workers).read_text()))
    except (OSError, ValueError, TypeError):
        pass
    every = workers.workers + workers.cpu_workers
    if run.channels:
        rates = Rates(1e6 * workers.workers, INSTANCE_VOXELS_PER_S * every, 0)
        if run.wanted_voxels < MIN_SAMPLED_VOXELS:
            return rates
        sample = measure_instances(_sample_channels(run), run.config.fragments, run.voxel_size_nm)
        return Rates(rates.predict, rates.instances, 0, packed=sample["packed"], edges=sample["edges"])
    of_worker = _predict_rate(run, 1e6 * _network_mvoxels(run, workers.threads), workers.threads)
    engine_bytes = memory.network_bytes(run, workers.threads)
    return Rates(workers.workers * of_worker, INSTANCE_VOXELS_PER_S * every, engine_bytes)


def _network_mvoxels(run: Run, threads: int) -> float:
    """Million voxels/s of the network alone in a worker of so many threads, as its engine's choice measured it, or roughly."""
    if finish.gpus_of(run):
        return run.engine.speed or GPU_MVOXELS_PER_S
    if run.engine.speed:
        return run.engine.speed * threads / cluster.CPU_COUNT
    speeds = {**CORE_MVOXELS_PER_S, **(BF16_CORE_MVOXELS_PER_S if hardware.has_bf16() else {})}
    of_core = speeds.get(f"{run.engine.backend} {run.engine.precision}", 1.0)
    return of_core * threads * (BINNED_SPEEDUP if run.binning > 1 else 1)


def _cache_file(run: Run, workers: cluster.WorkerPool) -> Path:
    sizes = [run.tile_grid(plane).size for plane in run.config.predict.planes]
    engine = run.engine and run.engine.arithmetic
    facts = [run.checksum, run.model_sha256, engine, sorted(STORED_BYTES), sizes, run.config.predict.tta, run.heads,
             run.config.fragments.model_dump(mode="json"), asdict(workers), os.cpu_count(), str(run.roi or "")]  # fmt: skip
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return cache.folder() / f"{key}.plan"


def measure_rates(run: Run, workers: cluster.WorkerPool) -> Rates:
    """Measures, in as many processes as there will be workers, some sections of a tile: the network, then the rest.

    Raises
    ------
    UserError
        A process ended, or took more than `TIME_LIMIT_S`.
    """
    if run.channels:
        return known_rates(run, workers)
    path = model_file(run.config.predict)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "tiles.npy"), _sample_tiles(run))
        Path(folder, "model.bin").write_bytes(export.export_model(path, run.engine.backend, run.engine.precision))
        task = {**run.engine.arithmetic, "threads": workers.threads, "voxel_size_nm": run.voxel_size_nm,
                "fragments": run.config.fragments.model_dump(mode="json")}  # fmt: skip
        Path(folder, "task.json").write_text(json.dumps(task))
        found = _side_by_side(folder, _probes(run, workers))
    looked, constant = _constant_tiles(run)
    seconds_per_voxel = float(np.mean([1 / one["instances"] for one in found])) + INSTANCE_OVERHEAD_S
    rates = Rates(
        predict=workers.workers
        / len(found)
        * sum(_predict_rate(run, one["predict"], workers.threads) for one in found),
        instances=(workers.workers + workers.cpu_workers) / seconds_per_voxel,
        engine_bytes=max(one["engine_bytes"] for one in found),
        device_bytes=found[0]["device_bytes"],
        packed=found[0]["packed"],
        edges=found[0]["edges"],
        looked=looked,
        constant=constant,
        probed=True,
    )
    cache.store(_cache_file(run, workers), json.dumps(asdict(rates)).encode())
    return rates


def _probes(run: Run, workers: cluster.WorkerPool) -> int:
    """How many processes measure side by side: as many as workers, of those elsewhere as many as this machine has cores for."""
    if run.engine.device == "cuda":
        return 1
    here = workers.workers if run.config.cluster.is_local else max(1, (os.cpu_count() or 1) // workers.threads)
    return min(workers.workers, here)


def _predict_rate(run: Run, network: float, threads: int) -> float:
    """Voxels/s of predict in a worker whose network alone does ``network``."""
    if run.engine.device == "cuda":
        return GPU_NETWORK_SHARE * network
    return 1 / (1 / network + TILE_OVERHEAD_S / (threads * run.config.predict.tta))


# ---------------------------------------------------------------- samples


def _middle(run: Run, axes: tuple[int, int, int]) -> tuple[int, int, int]:
    """The voxel in the middle of what is wanted or, where a mask is known, of the block in which it wants most; in the axes of
    a pass."""
    box, own = Box.from_shape(run.shape), run.parts.own
    if own.each is not None and own.count:
        box = own.grid[own.numbers[int(own.each[own.each > 0].argmax())]]
    wanted = run.wanted_part(box).transpose(axes)
    z, y, x = ((a + b) // 2 for a, b in zip(wanted.start, wanted.stop, strict=True))
    return z, y, x


def _around(middle: int, count: int, length: int) -> range:
    """``count`` places around one, all of them below ``length``."""
    first = min(max(0, middle - count // 2), max(0, length - count))
    return range(first, min(first + count, length))


def _sample_tiles(run: Run) -> np.ndarray:
    """A tile of consecutive sections from the middle of what is wanted, as the network takes it: (n, sections, Y, X)."""
    plane = run.config.predict.planes[0]
    axes, grid = tiles.PLANES[plane], run.tile_grid(plane)
    z, y, x = _middle(run, axes)
    tile = grid.overlapping(slice(y, y + 1), slice(x, x + 1))[0]
    sections = _around(z, max(2, min(MAX_SAMPLED_SECTIONS, SAMPLED_VOXELS // prod(grid.size))), run.shape[axes[0]])
    return sampling.read_tiles(
        run.source, grid.place(tile), sections, sections=run.sections, norm=(run.mean, run.std), plane=plane
    )


def _constant_tiles(run: Run) -> tuple[int, int]:
    """How many tiles were looked at, up to `LOOKED_TILES` spread over what is wanted, and how many are of one gray value."""
    plane = run.config.predict.planes[0]
    axes, grid = tiles.PLANES[plane], run.tile_grid(plane)
    shape, back = transpose_axes(run.shape, axes), inverse_axes(axes)
    wanted = run.wanted_part(Box.from_shape(run.shape)).transpose(axes)
    window = grid.overlapping(*wanted.slices[1:])
    looked = constant = 0
    if not wanted.voxels:
        return looked, constant
    end = time.monotonic() + LOOK_S
    for k in range(4 * LOOKED_TILES):  # in the box around a mask there may be many that show nothing wanted
        if looked == LOOKED_TILES or (looked and time.monotonic() > end):
            break
        z = wanted.start[0] + int((0.5 + k / PLASTIC) % 1 * wanted.shape[0])
        y, x = grid.place(window[int((0.5 + k / PLASTIC**2) % 1 * len(window))])
        tile = Box((z, y.start, x.start), (z + 1, y.stop, x.stop)).clip(shape)
        if run.wants_any(tile.transpose(back)):
            seen = tile.grow((run.sections // 2, 0, 0)).clip(shape)
            looked += 1
            constant += tiles.is_constant(list(run.source.read(seen.transpose(back)).transpose(axes)))
    return looked, constant


def _sample_channels(run: Run) -> np.ndarray:
    """Probabilities that were made elsewhere, from the middle of what is wanted; uint8 (channels, z, y, x)."""
    most = (MAX_SAMPLED_SECTIONS, SAMPLED_SIDE, SAMPLED_SIDE)
    spans = [_around(m, n, length) for m, n, length in zip(_middle(run, (0, 1, 2)), most, run.shape, strict=True)]
    box = Box(tuple(span.start for span in spans), tuple(span.stop for span in spans))
    return probabilities.read(run.channels, box)


# ---------------------------------------------------------------- processes


def _side_by_side(folder: str, count: int) -> list[dict]:
    """What ``count`` processes measure at the same time."""
    command = [sys.executable, "-m", "volseg.planning.measure", folder]
    env = {**forkserver.ENVIRONMENT, **os.environ, **system.same_imports()}
    processes = [
        subprocess.Popen([*command, str(i)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for i in range(count)
    ]
    end = time.monotonic() + TIME_LIMIT_S
    try:
        errors = [process.communicate(timeout=max(1.0, end - time.monotonic()))[1] for process in processes]
    except subprocess.TimeoutExpired:
        raise UserError(f"a few tiles took more than {TIME_LIMIT_S} s; set a smaller predict.tile") from None
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stderr.close()
    for process, text in zip(processes, errors, strict=True):
        if process.returncode:
            last = (text.strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"the probe of a few tiles ended with code {process.returncode}: {last}; mend that, or give "
                            "another predict.backend; volseg infer does without a probe")  # fmt: skip
    return [json.loads(Path(folder, f"{i}.json").read_text()) for i in range(count)]


def main(folder: str, number: str) -> None:
    """What `measure_rates` starts: one worker's share, in a process that treats memory as workers do."""
    system.tune_malloc()
    task = json.loads(Path(folder, "task.json").read_text())
    batch = np.load(Path(folder, "tiles.npy"))
    found, probability = measure_network(task, Path(folder, "model.bin").read_bytes(), batch)
    found |= measure_instances(probability, Fragments(**task["fragments"]), tuple(task["voxel_size_nm"]))
    Path(folder, f"{number}.json").write_text(json.dumps(found))


def measure_network(task: dict, blob: bytes, batch: np.ndarray) -> tuple[dict, np.ndarray]:
    """Speed and memory of the network, and the probabilities (uint8; heads, sections, y, x) of the tiles.

    Tiles lie where the network takes them, since a run cuts them there.
    """
    count, threads, size = len(batch), task["threads"], task["batch"]
    before = system.resident()
    device = backends.device(task["backend"])
    network = device.synchronized(
        backends.network(blob, task["backend"], task["precision"], (size, *batch.shape[1:]), threads)
    )
    steps = range(0, max(count, 2 * threads * size), size)
    load = [(step, device.put(np.ascontiguousarray(batch[np.arange(step, step + size) % count]))) for step in steps]
    for _ in backends.imap(network, load[:threads], threads):
        pass
    start = time.perf_counter()
    parts = [part for _, part in backends.imap(network, load, threads)]
    seconds = time.perf_counter() - start
    engine_bytes = system.resident("HWM") - before
    if task["device"] == "cpu" or task["backend"] != "torch":
        engine_bytes -= sum(part.nbytes for part in parts) + sum(one.nbytes for _, one in load)
    probability = np.concatenate([device.get(part) for part in parts])[:count].transpose(1, 0, 2, 3)
    found = {
        "predict": len(load) * size * batch[0, 0].size / seconds,
        "engine_bytes": max(0, engine_bytes),
        "device_bytes": hardware.peak_gpu_bytes(),
    }
    return found, np.floor(probability * np.float32(255) + np.float32(0.5)).astype(np.uint8)


def measure_instances(probability: np.ndarray, settings: Fragments, voxel_size_nm: tuple[float, float, float]) -> dict:
    """Of what follows the network: its voxels/s, its edges per voxel, and the bytes in which its outputs are stored.

    ``probability`` is uint8 (heads, z, y, x). The result has the names of `Rates`.
    """
    from numcodecs import Zstd

    shape = probability.shape[1:]
    box, mask = Box.from_shape(shape), np.ascontiguousarray(probability[0])
    for _ in range(2):  # numba may compile in the first
        start = time.perf_counter()
        height = block_heights(probability, box, shape, settings, voxel_size_nm)
        regions, basins = watershed_block(height, mask, box, shape, settings.connectivity)
        label = np.arange(basins.root.size + 1, dtype=np.uint32)
        labels = objects.paint(regions, label)
        objects.measure(regions, label, mask, box, [None] * 3)
        stored = {"probability": probability, "fragments": regions, "labels": labels}
        packed = {name: len(Zstd(1).encode(np.ascontiguousarray(data))) / data.size for name, data in stored.items()}
        seconds = time.perf_counter() - start
    half = shape[0] // 2
    halves = [Box((a, 0, 0), (b, *shape[1:])) for a, b in ((0, half), (half, shape[0])) if a < b]
    cut = [
        watershed_block(height[p.start[0] : p.stop[0] + 2], mask[p.slices], p, shape, settings.connectivity)[1]
        for p in halves
    ]
    whole = _table_bytes(basins)
    packed["tables"] = TABLES_PER_BLOCK_TABLE * whole / mask.size
    packed["cut"] = TABLES_PER_BLOCK_TABLE * max(0, sum(map(_table_bytes, cut)) - whole) / prod(shape[1:])
    edges = basins.edges.size / mask.size * (1 + 1 / shape[0])  # a thin sample has fewer along z
    return {"instances": mask.size / seconds, "packed": packed, "edges": edges}


def _table_bytes(table: BlockBasins) -> int:
    return sum(column.nbytes for column in vars(table).values())


if __name__ == "__main__":
    main(*sys.argv[1:])
