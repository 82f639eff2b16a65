"""The predict stage against the bare model and against the pipelines one would write without volseg; outputs compared."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from statistics import median

import numpy as np
import tifffile

from benchmarks import bare, report
from benchmarks.repeat import time_in_turn
from volseg.box import Box
from volseg.config import Config
from volseg.engine import cluster
from volseg.inference import backends, export, model, tiles
from volseg.inference.normalization import standardized
from volseg.io import arrays, volume
from volseg.system import tune_malloc

OVERLAP = 64  # voxels, of the peers' windows as of volseg's tiles


def measure(
    image: str, sections: int, few: int, repeats: int, standard: str, out: str, sets: tuple[str, ...], seconds: float
) -> None:
    """A row for each way to the same probabilities: million voxels/s, and how far they lie from the plain network's.

    The bare model is watched for so many ``seconds`` in each of its layouts, and the better one counts.

    The others run the model at ``standard``, or ours where that is empty. Their process keeps the memory that it frees, as
    volseg's workers do.
    """
    tune_malloc()
    folder = Path(out)
    path = last_sections(image, sections, folder)
    depth, *plane = volume.open(str(path)).shape
    runs = {"auto": sets, "fp32": (*sets, "predict.precision=fp32")}
    predicted = {name: [] for name in runs}
    for _ in range(repeats):
        for name, changes in runs.items():
            predicted[name].append(_predict(path, folder / f"{name}.volseg.zarr", changes))
    summaries = {name: json.loads((folder / f"{name}.volseg.zarr/run.json").read_text()) for name in runs}
    slab = standardized(tifffile.imread(path), summaries["auto"]["mean"], summaries["auto"]["std"])
    model_path = Path(summaries["auto"]["config"]["predict"]["model"] or model.shipped())
    network, _ = model.load(Path(standard) if standard else model_path)
    candidates = {
        **{f"MONAI sliding_window_inference, {name}": call for name, call in _monai(network, slab[: few + 2]).items()},
        "dask map_overlap + torch fp32": partial(_map_overlap, network, slab[: few + 2]),
    }
    results = {}

    def keep(name: str, call: Callable) -> None:
        results[name] = call()

    seconds_in_turn = time_in_turn({name: partial(keep, name, call) for name, call in candidates.items()}, repeats)
    part, bare_speed = tifffile.imread(path)[: bare.SECTIONS + 2], {}
    for run in summaries.values():
        results[_bare_name(run)] = _bare(slab, run, model_path)()
        bare_speed[_bare_name(run)] = max(bare.speeds(part, run, seconds).values()) * 1e6 / prod(plane)
    exact = results["MONAI sliding_window_inference, fp32, whole planes"]
    ours = {name: f"volseg predict, end to end, {run['engine']['precision']}" for name, run in summaries.items()}
    speed = {ours[name]: depth / median(predicted[name]) for name in runs}
    speed.update(bare_speed)
    speed.update({name: len(results[name]) / seconds for name, seconds in seconds_in_turn.items()})
    for name, row in ours.items():
        stored = np.asarray(arrays.open_array(str((folder / f"{name}.volseg.zarr").resolve()), "0"))
        results[row] = stored.transpose(1, 0, 2, 3)[1:-1]
    report.keep("throughput", [
        {"way": name, "Mvoxel/s": round(planes * prod(plane) / 1e6, 2),
         **{f"volseg {key} is x": round(speed[row] / planes, 2) for key, row in ours.items()},
         **difference(results[name], exact)}
        for name, planes in speed.items()
    ])  # fmt: skip


def last_sections(image: str, sections: int, folder: Path) -> Path:
    """A file in ``folder`` of the last sections of a volume, or of all it has."""
    source = volume.open(image)
    depth = min(sections, source.shape[0])
    folder.mkdir(parents=True, exist_ok=True)
    part = source.read(Box((source.shape[0] - depth, 0, 0), source.shape))
    tifffile.imwrite(folder / "image.tif", part, photometric="minisblack")
    return folder / "image.tif"


def _bare_name(run: dict) -> str:
    return f"bare model, {run['engine']['backend']} {run['engine']['precision']}, tiles in memory"


def _predict(path: Path, out: Path, sets: tuple[str, ...]) -> float:
    """Seconds of the predict stage of one run as a worker spends them on average: other stages run beside it.

    Neither the workers' start nor their loading of the network is counted: both are done once, in all ways compared.
    """
    line = [sys.executable, "-m", "volseg", "infer", str(path), "--out", str(out), "--overwrite"]
    subprocess.run([*line, *(part for text in sets for part in ("--set", text))], check=True, stderr=subprocess.DEVNULL)
    facts = json.loads((out / "run.json").read_text())
    seconds = facts["worker_seconds"]["predict"]
    return (sum(seconds.values()) - seconds["load"]) / facts["workers"]


def _windows(slab: np.ndarray) -> np.ndarray:
    """Each section between its neighbors: (n - 2, 3, y, x)."""
    return np.lib.stride_tricks.sliding_window_view(slab, 3, axis=0).transpose(0, 3, 1, 2)


def _bare(slab: np.ndarray, run: dict, path: Path) -> Callable[[], np.ndarray]:
    """The backend alone over tiles that lie in memory: what it makes of all."""
    threads = cluster.CPU_COUNT
    grid = tiles.grid(slab.shape[1:], Config().predict.tile, OVERLAP, model.load_card(path).multiple)
    exported = export.export_model(path, run["engine"]["backend"], run["engine"]["precision"])
    shape = (1, 3, *grid.size)
    network = backends.load(exported, run["engine"]["backend"], run["engine"]["precision"], shape, threads)
    batches = [(z, np.ascontiguousarray(window)[None]) for z, window in enumerate(_windows(slab))]
    return lambda: np.stack([done[0] for _, done in backends.imap(network, batches, threads)])


def _monai(network: object, slab: np.ndarray) -> dict[str, Callable[[], np.ndarray]]:
    import torch

    network = network.to(memory_format=torch.channels_last)
    return {
        "fp32, its defaults (roi 256, overlap 0.25)": partial(slide, network, slab, (256, 256), torch.float32),
        "fp32, whole planes": partial(slide, network, slab, slab.shape[1:], torch.float32),
        "bf16 autocast, whole planes": partial(slide, network, slab, slab.shape[1:], torch.bfloat16),
    }


@contextmanager
def as_it_comes() -> Iterator[None]:
    """Inside, torch has its own threads and kernels: one thread and deterministic ones are what volseg's network sets."""
    import torch

    threads, deterministic = torch.get_num_threads(), torch.backends.cudnn.deterministic
    torch.set_num_threads(cluster.CPU_COUNT)
    torch.backends.cudnn.deterministic = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = deterministic


@as_it_comes()
def slide(
    network: object, slab: np.ndarray, roi: tuple[int, int], kind: object, device: str = "cpu", batch: int = 1
) -> np.ndarray:
    """Probabilities by MONAI, of some sections ``batch`` after the other.

    Only the network computes in ``kind``: MONAI multiplies what it gets by weights in place, and divides by them in float32.
    """
    import torch
    from monai.inferers import sliding_window_inference

    def predict(tile: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.partition(":")[0], kind, enabled=kind != torch.float32):
            logits = network(tile)
        return torch.sigmoid(logits.float())

    batches, windows = [], _windows(slab)
    with torch.inference_mode():
        for k in range(0, len(windows), batch):
            tile = torch.from_numpy(np.array(windows[k : k + batch])).to(device)
            probability = sliding_window_inference(tile, roi, max(4, batch), predict, overlap=0.25, mode="gaussian")
            batches.append(probability.cpu().numpy())
    return np.concatenate(batches)


@as_it_comes()
def _map_overlap(network: object, slab: np.ndarray) -> np.ndarray:
    """A dask.array pipeline as tutorials write it: 512 x 512 chunks with an overlap, torch in each."""
    import dask.array
    import torch

    def infer(block: np.ndarray) -> np.ndarray:
        padded = np.pad(
            block[None], ((0, 0), (0, 0), (0, -block.shape[1] % 64), (0, -block.shape[2] % 64)), mode="symmetric"
        )
        with torch.inference_mode():
            probability = torch.sigmoid(network(torch.from_numpy(padded)))[0].numpy()
        return probability[:, : block.shape[1], : block.shape[2]]

    def section(window: np.ndarray) -> np.ndarray:
        lazy = dask.array.from_array(window, chunks=(3, 512, 512))
        grown = dask.array.overlap.overlap(lazy, {0: 0, 1: OVERLAP, 2: OVERLAP}, "reflect")
        mapped = grown.map_blocks(infer, chunks=(2, *grown.chunks[1:]), dtype=np.float32)
        depth, edge = {0: 0, 1: OVERLAP, 2: OVERLAP}, "reflect"  # so that what the reflection added is trimmed too
        return dask.array.overlap.trim_internal(mapped, depth, edge).compute(scheduler="threads")

    return np.stack([section(np.ascontiguousarray(window)) for window in _windows(slab)])


def difference(probability: np.ndarray, exact: np.ndarray) -> dict:
    """Mean difference of the mask probability in steps of 1/255, and the share of voxels on another side of 0.5.

    uint8 means steps of 1/255, as runs store them; floats are probabilities, which rounding may bring above 1.
    """
    probability, exact = (
        array[: len(exact), 0] / np.float32(255 if array.dtype == np.uint8 else 1) for array in (probability, exact)
    )
    return {"mean diff /255": round(float(np.abs(probability - exact).mean()) * 255, 3),
            "other side %": round(100 * float(((probability >= 0.5) != (exact >= 0.5)).mean()), 3)}  # fmt: skip
