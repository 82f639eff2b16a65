"""Speed and quality of every backend and precision, one after another on the same whole planes."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks import report
from volseg.config import Config, Predict
from volseg.inference import autoselect as probe
from volseg.inference import backends, export, model, sampling, tiles
from volseg.inference.normalization import gray_statistics
from volseg.io import volume

PLANES = 2  # whole planes that each pass computes


def measure(image: str, model_file: str, threads: tuple[int, ...], repeats: int) -> None:
    """A row for each engine and number of threads: million voxels/s (median), and how far it is from float32."""
    path = Path(model_file) if model_file else model.shipped()
    card = model.load_card(path)
    source = volume.open(image)
    norm = gray_statistics(source.shape, source.read)
    grid = tiles.grid(source.shape[1:], Config().predict.tile, Config().predict.overlap, card.multiple)
    first = source.shape[0] - PLANES
    last = range(first, source.shape[0])
    batch = sampling.read_tiles(source, grid.place((0, 0)), last, sections=card.sections, norm=norm)
    rows = [
        row
        for count in threads
        for row in _side_by_side(path, probe.candidates(Predict(), card.int8 is not None), batch, count, repeats)
    ]
    report.keep("backends", rows)
    if held := card.int8 and card.int8.held_out:
        print(f"held out {held.sections}: IoU {held.iou_int8:.4f} in int8, {held.iou_fp32:.4f} in fp32")


def _side_by_side(path: Path, engines: list, batch: np.ndarray, threads: int, repeats: int) -> list[dict]:
    """All engines in turn, ``repeats`` times over, so that whatever else the machine does meets all of them."""
    networks = {
        engine: backends.load(export.export_model(path, *engine), *engine, (1, *batch.shape[1:]), threads)
        for engine in engines
    }
    load = [(i, batch[i % len(batch)][None]) for i in range(max(len(batch), threads))]
    took: dict = {engine: [] for engine in engines}
    out = {
        engine: np.concatenate([p for _, p in backends.imap(net, load, threads)]) for engine, net in networks.items()
    }
    for _ in range(repeats):
        for engine, network in networks.items():
            start = time.perf_counter()
            for _ in backends.imap(network, load, threads):
                pass
            took[engine].append(time.perf_counter() - start)
    exact = out[("openvino", "fp32")]
    base = statistics.median(took[("openvino", "fp32")])
    return [
        {
            "engine": " ".join(engine),
            "threads": threads,
            "mvoxel_per_s": round(len(load) * batch[0, 0].size / statistics.median(took[engine]) / 1e6, 2),
            "times_fp32": round(base / statistics.median(took[engine]), 2),
            "changed_percent": round(100 * float(np.mean((out[engine] >= 0.5) != (exact >= 0.5))), 4),
            "apart_255": round(255 * float(np.abs(out[engine] - exact).mean()), 4),
        }
        for engine in engines
    ]
