"""What grows with what: workers, the volume, and the number of blocks.

A run over a small volume comes first and is not told: it compiles the kernels and exports the network, which would
otherwise count as memory of the first row.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import numpy as np
import psutil

from benchmarks import report
from volseg import config
from volseg.box import Blocks, Box
from volseg.engine import cluster, loop
from volseg.io import arrays, ome, volume
from volseg.segmentation.edges import argsort_rows

GROWTH = {  # piece, blocks and tiles, and how often the piece is laid along z, y and x: once, then 8 and 64 times as much
    "z": ((16, 512, 512), ("blocks.shape=[8, 512, 512]",), ((1, 1, 1), (8, 1, 1), (64, 1, 1))),
    "zyx": (  # three blocks along each axis, so that the smallest volume too has one with neighbors on all sides
        (12, 384, 384),
        ("blocks.shape=[4, 128, 128]", "predict.tile=128", "predict.overlap=32"),
        ((1, 1, 1), (2, 2, 2), (4, 4, 4)),
    ),
}
SHAPE = (192, 768, 768)  # of the volume that several workers share, in blocks of whole planes
SLABS = ("blocks.shape=[4, 768, 768]",)
MEMORY_SAMPLES = 20  # memory is looked at that often


def measure_volumes(out: str, max_copies: int, reduce: str, along: str) -> None:
    """A row for each volume size: one worker, blocks of one shape; peak memory must not grow, nor the cost of a voxel.

    The volumes are one synthetic piece, mirrored from copy to copy, so that no block of the larger ones holds more than
    those of the smallest do. With ``reduce`` "flat" one process holds all edges, with "tree" none does.
    """
    piece, cut, copies = GROWTH[along]
    flags = (*cut, f"stitch.reduce={reduce}", "cluster.workers=1")
    cores, rows = _cores(), []
    _infer(_mirror_copies(Path(out, "first"), piece, (1, 1, 1)), flags, cores)
    _compile_kernels()
    for times in (times for times in copies if prod(times) <= max_copies):
        summary = _infer(_mirror_copies(Path(out, f"{along}{prod(times)}"), piece, times), flags, cores)
        shape = " x ".join(str(n) for n in summary["source"]["shape"])
        rows.append({"volume": shape, "larger": prod(times), **_memory(summary), **_cost(summary)})
    report.keep(f"scaling-volume-{along}", rows)
    setting = f"one worker, stitch.reduce={reduce}"
    print(f"\n{setting}: its memory grows by {100 * (rows[-1]['worker MB'] / rows[0]['worker MB'] - 1):.1f} %")


def _compile_kernels() -> None:
    """Kernels that sort long tables are compiled: only the larger volumes have any, and compiling takes 56 MB of a worker."""
    many = np.arange(1 << 16)
    for high in (many.astype(np.int32), many):
        argsort_rows(high, many)


def measure_workers(out: str, counts: tuple[int, ...]) -> None:
    """A row for each number of workers over one volume: each has a core of its own as far as there are any."""
    cores = _cores()
    folder = _mirror_copies(Path(out, "workers"), SHAPE, (1, 1, 1))
    _infer(folder, (*SLABS, "cluster.workers=1"), cores)
    rows = []
    for count in counts:
        summary = _infer(folder, (*SLABS, f"cluster.workers={count}"), cores[:count])
        spent = _seconds_spent(summary)
        rows.append({"workers": count, "cores": min(count, len(cores)), "s without start": round(spent, 1),
                     "Mvoxel/s": round(prod(SHAPE) / 1e6 / spent, 2), **_memory(summary), **_cost(summary)})  # fmt: skip
    for row in rows:
        row["faster"] = round(rows[0]["s without start"] / row["s without start"], 2)
    report.keep("scaling-workers", rows)


def _cores() -> list[int]:
    """The cores this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _mirror_copies(folder: Path, piece: tuple[int, ...], times: tuple[int, ...]) -> Path:
    """``folder`` holds em.zarr: a synthetic piece of that shape laid so many times along z, y and x, each copy mirrored."""
    folder.mkdir(parents=True, exist_ok=True)
    image = folder / "em.zarr"
    if image.exists():
        return folder
    start = [sys.executable, "-m", "volseg", "synth", str(folder / "piece.zarr"), "--overwrite", "--seed", "1"]
    subprocess.run([*start, "--shape", ",".join(map(str, piece))], check=True)
    one = volume.open(str(folder / "piece.zarr"))
    voxels = one.read(Box.from_shape(one.shape))
    laid = np.pad(voxels, [(0, n * (k - 1)) for n, k in zip(piece, times, strict=True)], mode="symmetric")
    arrays.create_group(str(image))
    arrays.create_array(
        str(image), "0", shape=laid.shape, dtype=laid.dtype, chunk=(16, 256, 256), shard=piece, axes="zyx"
    )
    arrays.set_group_attributes(str(image), "", ome.multiscales("em", "zyx", [("0", one.voxel_size_nm)]))
    for box in Blocks(laid.shape, piece):
        arrays.write(arrays.open_array(str(image), "0"), box, laid[box.slices])
    return folder


def _infer(folder: Path, sets: tuple[str, ...], cores: list[int]) -> dict:
    """run.json of a run over the volume in ``folder``, on those cores alone (where the system can do that)."""
    changes = (part for text in sets for part in ("--set", text))
    bound = [sys.executable, "-c", BOUND, ",".join(map(str, cores)), "-m", "volseg", "infer", str(folder / "em.zarr")]
    out = folder / "em.volseg.zarr"
    subprocess.run([*bound, "--out", str(out), "--overwrite", *changes], check=True)
    return json.loads((out / "run.json").read_text())


BOUND = """
import os, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [int(core) for core in sys.argv[1].split(",")])
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def _seconds_spent(summary: dict) -> float:
    return summary["seconds"]["total"] - summary["seconds"]["start"]


def _memory(summary: dict) -> dict:
    return {f"{name} MB": round(summary["peak_bytes"][name] / 1e6) for name in ("worker", "client")}


def _cost(summary: dict) -> dict:
    """Workers' time for each voxel: of the network's stage by what went through it, of all others by the volume.

    Where blocks are smaller than planes, tiles at their borders are inferred by each block that they meet.
    """
    busy = {stage: sum(phases.values()) for stage, phases in summary["worker_seconds"].items()}
    load = summary["worker_seconds"]["predict"].get("load", 0.0)
    voxels, inferred = prod(summary["source"]["shape"]), summary["actual"]["inferred_voxels"]
    predict = busy.pop("predict") - load
    return {
        "inferred for each voxel": round(inferred / voxels, 2),
        "network, µs per voxel inferred": round(1e6 * predict / inferred, 3),
        "rest, µs per voxel": round(1e6 * sum(busy.values()) / voxels, 3),
        "objects": summary["objects"],
    }


def null_block(item: int) -> int:
    """A block with nothing to do."""
    return item


def measure_blocks(count: int) -> None:
    """Rows along one run of so many null blocks: how fast they go, and the memory of scheduler and client together.

    As in a run, up to `loop.MAX_BATCHED_ITEMS` blocks that take no time share a task.
    """
    rows = []
    with cluster.connect(config.Cluster(workers=2, dashboard="")) as client:
        start, state = time.perf_counter(), {"done": 0}

        def count_done(_item: int, _result: int) -> None:
            state["done"] += 1
            if state["done"] % max(1, count // MEMORY_SAMPLES) == 0:
                seconds = time.perf_counter() - start
                rows.append({"blocks": state["done"], "blocks/s": round(state["done"] / seconds),
                             "client + scheduler MB": round(psutil.Process().memory_info().rss / 1e6)})  # fmt: skip

        loop.run(client, null_block, range(count), window=64, done=count_done)
    report.keep("scaling-blocks", rows)
