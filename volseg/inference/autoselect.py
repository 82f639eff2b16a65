"""Which backend, precision and batch a run takes where its settings say ``auto``.

Known rules decide for a small volume; for a large one every candidate runs the same few tiles in a process of its own,
is held against float32, and the fastest is kept in the user's cache for this machine and model. The choice is made once,
where the command is given, and stored in the run: timing is noisy, so workers and restarts take it from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from volseg.config import Predict
from volseg.errors import UserError
from volseg.inference import backends, cache, export, hardware, model
from volseg.inference.device import is_out_of_memory
from volseg.system import installed, require, same_imports

MIN_PROBED_VOXELS = 1 << 29  # a smaller volume is done before a probe has paid for itself
MAX_CHANGED_SHARE = 0.001  # share of voxels that may change sides of 0.5 against float32
MAX_MEAN_DIFFERENCE = 0.2 / 255  # mean difference from float32 that is allowed
INT8_TOLERANCE = 10  # int8 is judged by its held-out IoU; on the tiles it may differ by so many times more
REPEATS = 3  # the median of so many passes is a candidate's speed
MAX_BATCH = 32
DEFAULT_GPU_BATCH = 4  # tiles at once on a GPU where nothing is measured
MIN_BATCH_SPEEDUP = 1.05  # a batch twice as large must be faster by this
# What a candidate raises that does not run here.
CANDIDATE_ERRORS = (UserError, ImportError, OSError, RuntimeError)
TIME_LIMIT_S = 300  # what a probe has not measured by then is not taken


@dataclass(frozen=True)
class Measurement:
    """A candidate on this machine: million voxels/s, and how far it is from float32. ``refused`` says why not, or nothing.

    ``broken``: its process ended or was too slow, which another time may not happen.
    """

    backend: str
    precision: str
    batch: int = 1
    speed: float = 0.0
    sides: float = 0.0
    apart: float = 0.0
    refused: str = ""
    broken: bool = False

    @property
    def name(self) -> str:
        return f"{self.backend} {self.precision}"


@dataclass(frozen=True)
class Choice:
    """What a run takes, and why in a few words; ``speed``: million voxels/s of this machine, 0 where nothing was measured."""

    backend: str
    precision: str
    batch: int
    why: str
    speed: float = 0.0


def choose(
    settings: Predict, path: Path, int8: bool, voxels: int, sample: Callable[[], np.ndarray], graph: bool = False
) -> Choice:
    """The engine of a run over ``voxels`` voxels with the model at ``path``; ``int8`` and ``graph`` as in `candidates`.

    ``sample`` gives some of its tiles, (B, sections, Y, X) float32, on which candidates are compared. Below `MIN_PROBED_VOXELS`
    the choice is a function of the arguments and the machine alone. Raises `UserError` for settings that cannot be met.
    """
    wanted = candidates(settings, int8, graph)
    if len(wanted) == 1 and (settings.batch or not hardware.gpu_count()):
        why = "as set" if installed("torch") else "all that runs without torch"
        return Choice(*wanted[0], settings.batch or 1, why)
    if voxels < MIN_PROBED_VOXELS:
        found = backends.choose(settings.backend, settings.precision, int8, graph)
        known = DEFAULT_GPU_BATCH if backends.Engine.here(*found).device == "cuda" else 1
        why = "known to be fastest on such a machine; the volume is too small to try others"
        return Choice(*found, settings.batch or known, why)
    measurements, kept = _cached_measurements(path, wanted, settings.batch, sample())
    best = fastest(measurements)
    where = "measured earlier" if kept else "measured"
    return Choice(best.backend, best.precision, best.batch, f"{where}: {_comparison(measurements, best)}", best.speed)


def candidates(settings: Predict, int8: bool, graph: bool = False) -> list[tuple[str, str]]:
    """The pairs of backend and precision that the settings allow and this machine has, float32 ones first.

    ``int8``: the model's quantized form may be taken; ``graph``: it is an ONNX graph, which torch does not run.
    """
    pairs = [(b, p) for p in ("fp32", "bf16", "fp16", "int8") for b in backends.PACKAGES if p in backends.PRECISIONS[b]]
    pairs = [
        pair for pair in pairs if settings.backend in ("auto", pair[0]) and settings.precision in ("auto", pair[1])
    ]
    pairs = [pair for pair in pairs if not (graph and pair[0] == "torch")]
    asked = settings.precision != "auto"
    found = [pair for pair in pairs if _is_available(*pair, int8, graph, asked=asked)]
    return found or [backends.choose(settings.backend, settings.precision, graph=graph)]


def _is_available(backend: str, precision: str, int8: bool, graph: bool, *, asked: bool) -> bool:
    """Whether the backend is installed and computes in that precision, in hardware unless it is ``asked`` for.

    torch makes every form of a model but int8 and a ``graph`` that it is already.
    """
    if precision != "int8" and not graph and not installed("torch"):
        return False
    cuda = hardware.gpu_count() > 0 and backend != "openvino"
    fits = {"fp32": True, "bf16": asked or cuda or hardware.has_bf16(), "fp16": cuda, "int8": asked or int8}[precision]
    try:
        return fits and bool(backends.version(backend))
    except UserError:
        return False


def fastest(measurements: list[Measurement]) -> Measurement:
    """The fastest candidate that is close enough to float32."""
    allowed = [row for row in measurements if not row.refused]
    if not allowed:
        raise UserError(f"no backend runs here: {'; '.join(f'{row.name}: {row.refused}' for row in measurements)}")
    return max(allowed, key=lambda row: row.speed)


def _comparison(measurements: list[Measurement], best: Measurement) -> str:
    others = [f"{row.name} {row.refused or f'{row.speed:.2f}'}" for row in measurements if row.name != best.name]
    return f"{best.speed:.2f} Mvoxel/s" + (f"; {', '.join(others)}" if others else "")


def format_measurements(measurements: list[Measurement]) -> str:
    """The candidates as plain text, in the order they were tried."""
    lines = [f"{'engine':16}{'batch':>6}{'Mvoxel/s':>10}{'changed %':>11}{'apart /255':>11}"]
    for row in measurements:
        figures = f"{row.batch:6}{row.speed:10.2f}{100 * row.sides:11.3f}{255 * row.apart:11.3f}" if row.speed else ""
        lines.append(f"{row.name:16}{figures}  {row.refused}".rstrip())
    return "\n".join(lines)


# ---------------------------------------------------------------- cache


def _cached_measurements(path: Path, wanted: list, size: int, batch: np.ndarray) -> tuple[list[Measurement], bool]:
    """The measured candidates, and whether they were measured earlier.

    What broke is measured again the next time.
    """
    file = cache_file(path, wanted, size, batch.shape)
    try:
        return [Measurement(**row) for row in json.loads(file.read_text())], True
    except (OSError, ValueError, TypeError):
        measurements = measure(path, wanted, size, batch)
    if any(row.broken for row in measurements):
        return measurements, False
    cache.store(file, json.dumps([asdict(row) for row in measurements]).encode())
    return measurements, False


def cache_file(path: Path, wanted: list, size: int, shape: tuple) -> Path:
    """Where the choice for this machine, model, tile and these versions is kept."""
    engines = [backends.Engine.here(*pair).arithmetic for pair in wanted]
    facts = [hashlib.sha256(path.read_bytes()).hexdigest(), engines, size, shape, os.cpu_count(), hardware.gpu_count()]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    return cache.folder() / f"{key}.probe"


# ---------------------------------------------------------------- measuring


def measure(path: Path, wanted: list[tuple[str, str]], size: int, batch: np.ndarray) -> list[Measurement]:
    """A row for each candidate, from a process of its own: what it loads and what it breaks is gone afterwards.

    One that ends its process is refused, and another process goes on with the next, for `TIME_LIMIT_S` in all. Needs torch,
    which makes the float32 form that all are held against, unless the model is an ONNX graph.
    """
    if not installed("torch") and not model.load_card(path).graph:
        require("torch", extra="torch")
    end, found = time.monotonic() + TIME_LIMIT_S, list[Measurement]()
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "tiles.npy"), batch)
        while len(found) < len(wanted):
            found += _measure_in_process(Path(folder), path, wanted[len(found) :], size, end - time.monotonic())
    return found


def _measure_in_process(
    folder: Path, path: Path, wanted: list[tuple[str, str]], size: int, seconds: float
) -> list[Measurement]:
    """The rows that one process comes to, and a refusal of the candidate that ended it; of all others when time is up."""
    kept = folder / "rows.jsonl"
    kept.write_text("")
    (folder / "wanted.json").write_text(json.dumps({"model": str(path), "wanted": wanted, "batch": size}))
    command = [sys.executable, "-m", "volseg.inference.autoselect", str(folder)]
    try:
        env = {**os.environ, **same_imports()}
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, env=env)
        code, said = done.returncode, done.stderr
    except subprocess.TimeoutExpired:
        code = None
    measurements = [
        Measurement(**json.loads(line)) for line in kept.read_text().splitlines(keepends=True) if line.endswith("\n")
    ]
    rest = wanted[len(measurements) :]
    if code is None:
        late = f"not measured within {TIME_LIMIT_S} s; name one with --backend and --precision"
        return measurements + [Measurement(*pair, refused=late, broken=True) for pair in rest]
    if code == 0 or not rest:
        return measurements
    last = (said.strip().splitlines() or ["it said nothing"])[-1]
    return [*measurements, Measurement(*rest[0], refused=f"ended the probe with code {code}: {last}", broken=True)]


def measure_each(path: Path, wanted: Iterable[tuple[str, str]], size: int, batch: np.ndarray) -> Iterator[Measurement]:
    """Each candidate's row, as soon as it is measured; float32 by OpenVINO is what all are held against."""
    exact = _run(
        backends.load(export.export_model(path, "openvino"), "openvino", "fp32", (1, *batch.shape[1:])), batch, 1
    )
    for backend, precision in wanted:
        try:
            yield _measure_batches(path, backend, precision, size, batch, exact)
        except Exception as error:
            if not (isinstance(error, CANDIDATE_ERRORS) or is_out_of_memory(error)):
                raise
            yield Measurement(
                backend, precision, refused=str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            )


def _measure_batches(
    path: Path, backend: str, precision: str, size: int, batch: np.ndarray, exact: np.ndarray
) -> Measurement:
    blob = export.export_model(path, backend, precision)
    cuda = hardware.gpu_count() > 0 and backend != "openvino"
    threads = 2 if cuda else os.cpu_count() or 1
    sizes = [size] if size else _doubling_batches() if cuda else [1]
    return _largest_useful_batch(
        sizes, lambda count: _measure_batch(blob, backend, precision, count, batch, exact, threads)
    )


def _largest_useful_batch(sizes: Iterable[int], timed: Callable[[int], Measurement]) -> Measurement:
    """The row of the last of growing batches that is worth it: memory holds it, and it is faster than the one before."""
    best = None
    for count in sizes:
        try:
            row = timed(count)
        except Exception as error:  # ONNX Runtime's are no RuntimeError
            if best is None or not is_out_of_memory(error):
                raise
            break
        if best is not None and row.speed < MIN_BATCH_SPEEDUP * best.speed:
            break
        best = row
    return best


def _doubling_batches() -> list[int]:
    return [1 << k for k in range(MAX_BATCH.bit_length())]


def _measure_batch(
    blob: bytes, backend: str, precision: str, count: int, batch: np.ndarray, exact: np.ndarray, threads: int
) -> Measurement:
    """One candidate at one batch: its speed over all tiles, and its distance from ``exact``.

    Tiles lie where the network takes them, since a run cuts them there.
    """
    target = backends.device(backend)
    network = target.synchronized(backends.network(blob, backend, precision, (count, *batch.shape[1:]), threads))
    found = _run(lambda tiles: target.get(network(target.put(tiles))), batch, count)
    sides, apart = float(np.mean((found >= 0.5) != (exact >= 0.5))), float(np.abs(found - exact).mean())
    load = [(i, target.put(_padded(batch, i, count))) for i in range(0, max(len(batch), threads * count), count)]
    took = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in backends.imap(network, load, threads):
            pass
        took.append(time.perf_counter() - start)
    speed = len(load) * count * batch[0, 0].size / statistics.median(took) / 1e6
    slack = INT8_TOLERANCE if precision == "int8" else 1
    far = sides > slack * MAX_CHANGED_SHARE or apart > slack * MAX_MEAN_DIFFERENCE
    said = f"{100 * sides:.2f} % of voxels change sides, {255 * apart:.2f}/255 apart" if far else ""
    return Measurement(backend, precision, count, speed, sides, apart, said)


def _padded(batch: np.ndarray, first: int, count: int) -> np.ndarray:
    """``count`` tiles from ``first`` on, beginning anew where they end."""
    return np.ascontiguousarray(batch[np.arange(first, first + count) % len(batch)])


def _run(network: backends.Forward, batch: np.ndarray, count: int) -> np.ndarray:
    """Probabilities of all tiles, in batches of ``count``."""
    parts = [network(_padded(batch, first, count)) for first in range(0, len(batch), count)]
    return np.concatenate(parts)[: len(batch)]


def main(folder: str) -> None:
    """What `measure` starts: rows are written one by one, so that a crash loses only the one that caused it."""
    asked = json.loads(Path(folder, "wanted.json").read_text())
    batch = np.load(Path(folder, "tiles.npy"))
    with Path(folder, "rows.jsonl").open("w") as file:
        for row in measure_each(Path(asked["model"]), asked["wanted"], asked["batch"], batch):
            print(json.dumps(asdict(row)), file=file, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
