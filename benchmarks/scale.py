"""Volumes as they are stored: how often a chunk is decoded, what an empty part costs, and a run against its bare model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from unittest import mock

import numpy as np
import tifffile
import zarr

from benchmarks import report
from volseg.box import Box, Triple
from volseg.engine import folder, pipeline
from volseg.engine.block_tables import TileParts
from volseg.engine.blocks import SPAN
from volseg.engine.keys import probability_key
from volseg.engine.run import digest, redundancy
from volseg.engine.shares import Share
from volseg.inference.settings import settings_of
from volseg.io import volume
from volseg.planning import memory, prepare

MEASURED_BLOCKS = 4  # in a row: where they begin in a chunk differs from one to the next
PIECE = (64, 1536, 1536)  # of real data, the part of a large volume that is wanted
LARGE = (  # where the piece lies in volumes of 1e9, 2.6e10 and 1e12 voxels
    ((64, 4096, 4096), (0, 0, 0)),
    ((64, 20000, 20000), (0, 0, 0)),
    ((64, 20000, 20000), (0, 7001, 9001)),
    ((2500, 20000, 20000), (0, 0, 0)),
)


# ---------------------------------------------------------------- bytes decoded for each one wanted


def measure_decoding(chunks: tuple[int, ...], planes: tuple[int, ...], depth: int) -> None:
    """A row for each chunk and plane: what some blocks in the middle of the volume decode, from the reads that they make.

    Each read decodes every chunk that it touches. The volumes hold no chunk, so every tile is constant and none is inferred:
    what is read is the same.
    """
    rows = []
    for chunk in chunks:
        for plane in planes:
            with tempfile.TemporaryDirectory() as out:
                rows.append(_decoding(Path(out), chunk, (depth, plane, plane)))
                print(rows[-1], file=sys.stderr)
    report.keep("scale-decoding", rows)


def _decoding(out: Path, chunk: int, shape: Triple) -> dict:
    zarr.create_array(out / "em.zarr", shape=shape, chunks=(chunk,) * 3, dtype="uint8")
    fixed = {"backend": "openvino", "precision": "int8", "normalize": "model"}
    config = settings_of({"input": {"voxel_size_nm": (5.0, 5.0, 5.0)}, "predict": fixed, "cluster": {"workers": 1}})
    source = volume.open(str(out / "em.zarr"), voxel_size_nm=(5.0, 5.0, 5.0))
    run = prepare.from_image(source, config, str(out / "run.partial"))
    folder.begin(run, overwrite=False)
    grid, boxes, read = run.predict_grid, [], volume.Volume.read
    middle = [n // 2 - (n % 2 == 0) for n in grid.counts]
    diagonal = [(middle[0], *(min(m + k, n - 1) for m, n in zip(middle[1:], grid.counts[1:], strict=True)))
                for k in range(MEASURED_BLOCKS)]  # fmt: skip
    blocks = [grid.index(place) for place in dict.fromkeys(diagonal)]

    def recorded(source: volume.Volume, box: Box) -> np.ndarray:
        boxes.append(box)
        return read(source, box)

    start = time.perf_counter()
    for i in blocks:
        share, key = Share.of_block(run, "xy", i), digest(probability_key(run), "xy")
        sections = share.reach.slices[0]
        for giver in share.givers:  # what the blocks before it would hand over
            for span in range(sections.start // SPAN, -(-sections.stop // SPAN)):
                run.layout.tile_parts.keep(TileParts.packed([]), key, giver, i, span)
        with mock.patch.object(volume.Volume, "read", recorded):
            pipeline.process_block(run.out, run.id, "predict", i)
    wanted = sum(grid[i].voxels for i in blocks)
    return {
        "chunk": chunk,
        "plane": shape[1],
        "block": " x ".join(map(str, grid[blocks[0]].shape)),
        "blocks": len(grid),
        "decoded / wanted": round(sum(_whole_chunks(box, chunk, shape) for box in boxes) / wanted, 3),
        "inferred / wanted": round(redundancy(run), 3),
        "worker GB": round(memory.worker_bytes(run, 1) / 1e9, 2),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _whole_chunks(box: Box, chunk: int, shape: Triple) -> int:
    ends = zip(box.start, box.stop, shape, strict=True)
    return prod(min(-(-b // chunk) * chunk, n) - a // chunk * chunk for a, b, n in ends)


# ---------------------------------------------------------------- a small part of a large volume


def measure_sparse(image: str, out: str, repeats: int) -> None:
    """A row for each volume that is empty but for the same piece: a run of that piece, beside one of the piece alone."""
    rows, piece = [], piece_of(image, PIECE)
    alone = _volume(Path(out, "alone.zarr"), PIECE, piece, (0, 0, 0))
    infer(alone, Path(out, "alone.volseg.zarr"))  # compiles
    for shape, corner in LARGE:
        large, box = _volume(Path(out, "large.zarr"), shape, piece, corner), Box.from_shape(PIECE).shift(corner)
        took: dict[str, list[float]] = {"alone": [], "part": []}
        for _ in range(repeats):
            took["alone"].append(infer(alone, Path(out, "alone.volseg.zarr")))
            took["part"].append(infer(large, Path(out, "large.volseg.zarr"), f"--roi={box}"))
        shutil.rmtree(large)
        ratios = np.divide(took["part"], took["alone"])
        rows.append({
            "volume": " x ".join(map(str, shape)),
            "part": str(box),
            "wanted": f"{100 * prod(PIECE) / prod(shape):.3g} %",
            "alone s": round(float(np.median(took["alone"])), 1),
            "part s": round(float(np.median(took["part"])), 1),
            "part / alone": round(float(np.median(ratios)), 2),
            "inferred": round(_inferred(Path(out, "large.volseg.zarr")) / _inferred(Path(out, "alone.volseg.zarr")), 2),
        })  # fmt: skip
    report.keep("scale-sparse", rows)


def piece_of(image: str, shape: Triple) -> np.ndarray:
    """Real data of that shape, mirrored where the stack has less in the plane."""
    sections = tifffile.imread(image)[: shape[0]]
    wide = np.concatenate([sections, sections[:, ::-1]], 1)
    return np.concatenate([wide, wide[:, :, ::-1]], 2)[tuple(map(slice, shape))]


def _volume(path: Path, shape: Triple, piece: np.ndarray, corner: Triple) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    array = zarr.create_array(path, shape=shape, chunks=(64, 64, 64), shards=(64, 1024, 1024), dtype="uint8")
    array[Box.from_shape(PIECE).shift(corner).slices] = piece
    return path


def infer(path: Path, out: Path, *more: str) -> float:
    """Seconds from command to prompt."""
    line = [
        sys.executable,
        "-m",
        "volseg",
        "infer",
        str(path),
        "--out",
        str(out),
        "--overwrite",
        "--voxel-nm=5,5,5",
        *more,
    ]
    start = time.perf_counter()
    subprocess.run(line, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _inferred(out: Path) -> int:
    return json.loads((out / "run.json").read_text())["actual"]["inferred_voxels"]
