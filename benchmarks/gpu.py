"""The predict stage on a GPU against the bare model on tiles that lie there, and against MONAI."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from math import prod
from pathlib import Path

import numpy as np

from benchmarks import report
from benchmarks.repeat import time_in_turn
from benchmarks.throughput import difference, last_sections, slide
from volseg.box import Box
from volseg.config import load
from volseg.engine import cluster, folder, pipeline
from volseg.engine.receipt import Receipt
from volseg.engine.run import Run
from volseg.inference import backends, export, model
from volseg.inference.normalization import standardized
from volseg.io import arrays, volume
from volseg.planning import prepare as describe

BATCH = 8  # tiles at once where predict.batch is not set
COLUMNS = ("way", "Mvoxel/s", "of the bare model", "TFLOP/s", "bytes sent / voxel", "bytes fetched / voxel", "mean diff /255",
           "other side %")  # fmt: skip


def measure(image: str, sections: int, repeats: int, out: str, sets: tuple[str, ...], device: str) -> None:
    """A row for each way to the probabilities of the same voxels, and how far these are from volseg's in float32."""
    name = backends.device("torch").name
    if name == "cpu" != device:
        raise SystemExit(
            "no CUDA device here, nothing was measured; --device cpu goes through all of it on the processor"
        )
    path = last_sections(image, sections, Path(out))
    precisions = dict.fromkeys((backends.choose("torch")[1], "fp32"))
    runs = {p: _begun(path, Path(out, f"{p}.volseg.zarr"), p, sets) for p in precisions}
    for _ in range(2):  # a new run lets go of the networks of others; from the second pass on all are loaded
        receipts = {p: _predict(run) for p, run in runs.items()}
    exact = _stored(runs["fp32"]) / np.float32(255)
    peers, results = _monai(runs["fp32"], name), {}

    def keep(way: str, call: Callable) -> None:
        results[way] = call()

    bare = {("bare", p): _bare(run, _sum(receipts[p], "inferred_voxels")) for p, run in runs.items()}
    ours = {("volseg", p): partial(_predict, run) for p, run in runs.items()}
    seconds = time_in_turn({**bare, **ours, **{way: partial(keep, way, call) for way, call in peers.items()}}, repeats)
    voxels, rows = prod(runs["fp32"].shape), []
    for p, run in runs.items():
        work = voxels, _flops(run) * _sum(receipts[p], "inferred_voxels")
        rows += [
            {"way": f"bare model, {p}, tiles on the device", **_speed(seconds["bare", p], *work)},
            {"way": f"volseg predict, {p}, end to end", **_speed(seconds["volseg", p], *work),
             "of the bare model": round(seconds["bare", p] / seconds["volseg", p], 3),
             **{f"bytes {way} / voxel": round(_sum(receipts[p], f"bytes_{way}") / voxels, 3) for way in ("sent", "fetched")},
             **difference(_stored(run), exact)},
        ]  # fmt: skip
    rows += [{"way": way, **_speed(seconds[way], voxels), **difference(results[way], exact)} for way in peers]
    report.keep("gpu", [{**dict.fromkeys(COLUMNS, ""), **row} for row in rows])


def _begun(path: Path, out: Path, precision: str, sets: tuple[str, ...]) -> Run:
    """A run by torch whose blocks `_predict` may do; what an earlier one left there is gone."""
    shutil.rmtree(out, ignore_errors=True)
    chosen = ["predict.backend=torch", f"predict.batch={BATCH}", *sets, f"predict.precision={precision}"]
    config = load(sets=chosen, base=model.load_card(model.shipped()).decode)
    run = describe.from_image(volume.open(str(path)), config, str(out.resolve()))
    folder.begin(run, overwrite=False)
    return run


def _predict(run: Run) -> list[Receipt]:
    """All blocks are read, predicted and stored, as many at once as on a worker with a GPU; the receipts."""
    with ThreadPoolExecutor(cluster.TASKS_PER_GPU) as pool:
        return list(pool.map(partial(pipeline.process_block, run.out, run.id, "predict"), range(len(run.predict_grid))))


def _bare(run: Run, inferred: int) -> Callable[[], None]:
    """Sends as many voxels through the network alone, a batch that lies on its device over and over."""
    shape = (run.batch, run.sections, *run.tile_grid("xy").size)
    device = backends.device("torch")
    blob = export.export_model(model.shipped(), "torch")
    network = device.synchronized(backends.network(blob, "torch", run.engine.precision, shape))
    batch = device.put(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    count = -(-inferred // (run.batch * prod(shape[2:])))

    def call() -> None:
        for _ in backends.imap(network, ((k, batch) for k in range(count)), cluster.TASKS_PER_GPU):
            pass

    return call


def _flops(run: Run) -> float:
    """Floating-point operations of the network for each voxel of a tile, two for a multiplication with its sum."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    network, card = model.load(model.shipped())
    tile = torch.empty(1, card.sections, *run.tile_grid("xy").size, device="meta")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network.to("meta")(tile)
    return counter.get_total_flops() / tile[0, 0].numel()


def _speed(seconds: float, voxels: int, flops: float = 0.0) -> dict:
    row = {"Mvoxel/s": float(f"{voxels / seconds / 1e6:.3g}")}
    return row | ({"TFLOP/s": round(flops / seconds / 1e12, 3)} if flops else {})


def _monai(run: Run, device: str) -> dict[str, Callable[[], np.ndarray]]:
    """MONAI over the same sections with the same weights, in float32 on a CPU; nothing where it is not installed."""
    if not find_spec("monai"):
        return {}
    import torch

    slab = standardized(run.source.read(Box.from_shape(run.shape)), run.mean, run.std)
    slab = np.pad(slab, ((1, 1), (0, 0), (0, 0)), mode="edge")
    network = model.load(model.shipped())[0].to(device, memory_format=torch.channels_last)
    kinds = {"fp32": torch.float32} if device == "cpu" else {"fp16": torch.float16, "bf16": torch.bfloat16}
    rois = {"its defaults (roi 256, overlap 0.25)": (256, 256), "whole planes": run.tile_grid("xy").size}
    return {
        f"MONAI sliding_window_inference, {kind}, channels_last, {name}":
            partial(slide, network, slab, roi, kinds[kind], device, run.batch)
        for kind in kinds for name, roi in rois.items()
    }  # fmt: skip


def _stored(run: Run) -> np.ndarray:
    """What it predicted, section after section."""
    return np.asarray(arrays.open_array(run.out, "0")).transpose(1, 0, 2, 3)


def _sum(receipts: list[Receipt], name: str) -> int:
    return sum(getattr(receipt, name) for receipt in receipts)
