"""One backend with the shipped model: ``python -m volseg.inference.trial BACKEND PRECISION SECONDS THREADS``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator

import numpy as np

from volseg.inference import backends, export, model

EDGE = 512  # of the square that the network runs on


def run_backend(backend: str, precision: str, seconds: float, threads: int) -> dict:
    """Speed (voxels/s) of the shipped network, seconds until it was ready, and whether what it gives are probabilities."""
    start, path = time.perf_counter(), model.shipped()
    blob, card = export.export_model(path, backend, precision), model.load_card(path)
    shape = (1, card.sections, EDGE, EDGE)
    forward = backends.load(blob, backend, precision, shape, threads)
    batch = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    told, begin = forward(batch), time.perf_counter()

    def batches() -> Iterator[tuple[None, np.ndarray]]:
        while time.perf_counter() - begin < seconds:
            yield None, batch

    count = sum(1 for _ in backends.imap(forward, batches(), threads))
    return {
        "speed": count * EDGE * EDGE / (time.perf_counter() - begin),
        "ready": begin - start,
        "sane": bool(np.isfinite(told).all() and told.min() >= 0 and told.max() <= 1),
        "device": backends.Engine.here(backend, precision).device,
    }


if __name__ == "__main__":
    print(json.dumps(run_backend(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))))
