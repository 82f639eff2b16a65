"""A mask that wants a few scattered spots of a large volume: what a run of it costs, and how much of that is the network."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import zarr

from benchmarks import report, scale
from volseg.box import Box, Triple
from volseg.engine.finished import open_run
from volseg.engine.receipts import Markers
from volseg.engine.stages import keys, stages_of

SIZES = (
    ((64, 4096, 4096), 1), ((1000, 10000, 10000), 16), ((2500, 20000, 20000), 16), ((2500, 20000, 20000), 1),
)  # 1e9, 1e11 and 1e12 voxels; how many times as long those of the mask are  # fmt: skip
CUT = (48, 768, 1024)  # of real data around a spot
SPOT = (16, 176, 176)  # that is wanted in the middle of each
SPOTS = 20
FIXED = "--set=predict.normalize=model"  # the mean of such a volume says nothing


def measure(image: str, out: str) -> None:
    """A row for each volume: the same number of spots, at random places."""
    rows, piece = [], scale.piece_of(image, CUT)
    for shape, coarser in SIZES:
        em, mask = write(Path(out), shape, piece, SPOTS, coarser)
        run = Path(out, "scattered.volseg.zarr")
        if not rows:
            scale.infer(em, run, f"--mask={mask}", FIXED)  # compiles
        seconds = scale.infer(em, run, f"--mask={mask}", FIXED)
        where = {"volume": " x ".join(map(str, shape)), "mask": f"1 / {coarser}"}
        rows.append({**where, "s": round(seconds, 1), **facts(str(run))})
        shutil.rmtree(em)
    report.keep("scale-scattered", rows)


def write(out: Path, shape: Triple, piece: np.ndarray, spots: int, coarser: int) -> tuple[Path, Path]:
    """A volume that holds that many copies of ``piece``, and a mask that wants the middle of each; nothing else is stored."""
    em, mask = out / "scattered.zarr", out / "spots.zarr"
    for path in (em, mask):
        shutil.rmtree(path, ignore_errors=True)
    voxels = zarr.create_array(em, shape=shape, chunks=(64, 64, 64), dtype="uint8")
    small = tuple(-(-n // coarser) for n in shape)
    wanted = zarr.create_array(mask, shape=small, chunks=(64, 64, 64), dtype="uint8")
    rng = np.random.default_rng(0)
    for _ in range(spots):
        start = [int(rng.integers(0, n - m + 1)) for n, m in zip(shape, piece.shape, strict=True)]
        box = Box.from_shape(piece.shape).shift((start[0], start[1], start[2]))
        voxels[box.slices] = piece
        middle = [(a + b) // 2 for a, b in zip(box.start, box.stop, strict=True)]
        spot = [slice(m // coarser - n // 2 // coarser, m // coarser + max(1, n // 2 // coarser))
                for m, n in zip(middle, SPOT, strict=True)]  # fmt: skip
        wanted[tuple(spot)] = 1
    return em, mask


def facts(path: str) -> dict:
    """What a run of it did, and where its workers spent their time."""
    finished = open_run(path)
    run, seconds = finished.run, finished.summary["worker_seconds"]
    markers = Markers(run.out, keys(run))
    inferred = sum(receipt.inferred_voxels for stage in markers.keys for _, receipt in markers.stored(stage))
    network = sum(phases.get("infer", 0.0) for phases in seconds.values())
    return {
        "objects": finished.object_count,
        "wanted": f"{run.wanted_voxels:,}",
        "inferred / wanted": round(inferred / run.wanted_voxels, 1),
        "tasks": sum(len(markers.done(stage)) for stage in markers.keys),
        "of a whole run": sum(
            len(stage.grid) for name, stage in stages_of(run).items() if stage.group in ("basins", "labels")
        ),
        "network, worker s": round(network, 1),
        "all else, worker s": round(sum(sum(phases.values()) for phases in seconds.values()) - network, 1),
    }
