"""Whether memory and open files stay flat: over a run of very many small blocks, and over runs in one process for hours."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
from scipy.ndimage import gaussian_filter

import volseg
from benchmarks import report
from benchmarks.chaos.episode import hash_result
from volseg.box import Blocks, Box
from volseg.evaluation.synthetic_volume import write_synthetic
from volseg.io import arrays
from volseg.progress import Silent

BLOCK = (4, 16, 16)
PATTERN = (16, 128, 128)  # voxels of noise that the volume repeats
GRID_PLANE = (32, 32)  # blocks along y and x, where there are that many
SAMPLE_S = 1.0
ROWS = 12
PRINT_EVERY = 60  # samples
LOOP_SHAPE = (16, 128, 128)
LOOP_SETTINGS = ("blocks.shape=[8,64,64]", "predict.tile=64", "predict.overlap=16", "stitch.min_voxels=20")


def measure(blocks: int, workers: int, place: str) -> None:
    """Rows along one `volseg segment` of at least so many blocks."""
    with TemporaryDirectory(prefix="soak-") as temporary:
        folder = Path(place or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        shape = volume_shape(blocks)
        source = write_probabilities(folder / "probabilities.zarr", shape)
        report.keep("soak", watch(source, folder / "run.volseg.zarr", workers))


def volume_shape(blocks: int) -> tuple[int, int, int]:
    """Voxels of the smallest volume in layers of `GRID_PLANE` that has so many blocks.

    >>> volume_shape(20_000)
    (80, 512, 512)
    """
    rows, columns = GRID_PLANE
    layers = -(-blocks // (rows * columns))
    return layers * BLOCK[0], rows * BLOCK[1], columns * BLOCK[2]


def write_probabilities(path: Path, shape: tuple[int, int, int]) -> Path:
    """A zarr array, uint8, of smooth noise repeated: a few objects in every block."""
    noise = gaussian_filter(np.random.default_rng(5).standard_normal(PATTERN), 3, mode="wrap")
    pattern = np.clip(128 + 60 * noise / noise.std(), 0, 255).astype(np.uint8)
    shard = tuple(min(n, m) for n, m in zip(PATTERN, shape, strict=True))
    arrays.create_array(str(path), "0", shape=shape, dtype="uint8", chunk=shard, shard=shard, axes="zyx")
    for box in Blocks(shape, shard):
        part = pattern[tuple(slice(0, n) for n in box.shape)]
        arrays.write(arrays.open_array(str(path), "0"), Box(box.start, box.stop), part)
    return path / "0"


def watch(source: Path, out: Path, workers: int) -> list[dict]:
    """What the run's processes hold along the way, in `ROWS` rows, and how long its log is at the end."""
    sets = ("cluster.dashboard=''", f"blocks.shape={list(BLOCK)}", "stitch.min_voxels=20", "output.levels=2")
    line = [
        sys.executable,
        "-m",
        "volseg",
        "segment",
        str(source),
        "--mask-channel",
        "0",
        "--out",
        str(out),
        "--overwrite",
    ]
    line += ["--workers", str(workers), *(part for text in sets for part in ("--set", text))]
    log, samples, start = out.with_suffix(".log"), [], time.perf_counter()
    with log.open("wb") as file, subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT) as command:
        while command.poll() is None:
            with suppress(psutil.Error):
                sample = _sample(psutil.Process(command.pid), time.perf_counter() - start)
                if not sample["client + scheduler MB"]:
                    continue  # it is ending, and holds nothing any more
                samples.append(sample)
                if len(samples) % PRINT_EVERY == 0:
                    print(samples[-1], flush=True)
            time.sleep(SAMPLE_S)
    if command.returncode:
        raise SystemExit(f"volseg ended with {command.returncode}: {log.read_text()[-2000:]}")
    text = log.read_text(errors="replace")
    chosen = [samples[round(i)] for i in np.linspace(0, len(samples) - 1, min(ROWS, len(samples)))]
    return [{**row, "log lines": len(text.splitlines()), "log bytes": len(text)} for row in chosen]


def loop(hours: float, workers: int, place: str) -> None:
    """Rows along hours in which one process infers and decides anew, again and again; each result is the same bytes.

    Raises `RuntimeError` where one is not.
    """
    with TemporaryDirectory(prefix="soak-") as temporary:
        folder = Path(place or temporary)
        image = folder / "em.zarr"
        write_synthetic(str(image), LOOP_SHAPE, LOOP_SHAPE, seed=12, overwrite=True, progress=Silent())
        report.keep("soak-loop", repeat(image, folder / "run.volseg.zarr", 3600 * hours, workers))


def repeat(image: Path, out: Path, seconds: float, workers: int) -> list[dict]:
    """What this process holds after each of `ROWS` times of that long, and how many runs it has made by then."""
    settings = [f"cluster.workers={workers}", "cluster.dashboard=''", *LOOP_SETTINGS]
    expected: list[dict[str, str]] = []
    start, rounds, samples = time.perf_counter(), 0, []
    while True:
        results = []
        volseg.infer(image, out, settings=settings, overwrite=True, progress=Silent())
        results.append(hash_result(out))
        volseg.segment(out, settings=["stitch.seed=0.9", "stitch.min_voxels=30"], progress=Silent())
        results.append(hash_result(out))
        if results != (expected := expected or results):
            raise RuntimeError(f"round {rounds} gave other bytes than the first: {out}")
        rounds += 1
        took = time.perf_counter() - start
        if took * ROWS >= len(samples) * seconds:
            samples.append({**_sample(psutil.Process(), took), "rounds": rounds})
            print(samples[-1], flush=True)
        if took >= seconds:
            return samples


def _sample(client: psutil.Process, seconds: float) -> dict:
    """Memory and open files of the client, in which the scheduler is, and the most of any worker."""
    others = [each for each in client.children(recursive=True) if "resource_tracker" not in " ".join(each.cmdline())]
    held = [(each.memory_info().rss, each.num_fds()) for each in others] or [(0, 0)]
    return {
        "s": round(seconds),
        "client + scheduler MB": round(client.memory_info().rss / 1e6),
        "its open files": client.num_fds(),
        "its threads": client.num_threads(),
        "largest worker MB": round(max(memory for memory, _ in held) / 1e6),
        "most open files of a worker": max(files for _, files in held),
        "processes": len(others) + 1,
    }
