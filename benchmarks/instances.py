"""Probabilities to instances: volseg's blocks against whole-volume and blockwise peers, with what the cutting does to them.

Each row has a process of its own, on one core, which times a whole call after one on a small crop: numba's kernels are
compiled and libraries loaded by then. Peers get volseg's heights and mask, so that all cut one landscape; making it counts
for all of them (for bioimage-cpp in the floats that it takes), and a column says how much of the time it was, since volseg
makes it block by block and peers at once.
Memory is the most that a process held during its calls, over what it held before the first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from scipy import ndimage

from benchmarks import report
from benchmarks.repeat import Timed, time_isolated
from volseg.box import Blocks, Box, Triple
from volseg.config import Config
from volseg.evaluation.synthetic import synth
from volseg.io import arrays
from volseg.segmentation import objects, stitch
from volseg.segmentation.basins import BlockBasins, watershed_block
from volseg.segmentation.edges import find
from volseg.segmentation.heights import OUTSIDE, block_heights, height_halo, seed_height
from volseg.segmentation.rules import Rules, label_basins
from volseg.system import tune_malloc

SIDES = (256, 128, 64, 32)  # of the blocks, voxels; cut to the volume
TIMED_SIDE = 128
SHAPE, SEED = (128, 512, 512), 8  # of the synthetic volume: 5 % of it is foreground
WARM_UP_SHAPE = (32, 128, 128)  # for the first call
MIN_VOXELS = 500  # voxels; every method drops objects below
WHOLE_VOLUME = "scikit-image watershed, whole volume"
BIOIMAGE_CPP = "bioimage-cpp watershed, whole volume"  # in 65,536 steps of height
BIOIMAGE_PY = "bioimage-py watershed, blocks with a halo"  # by the same in each block
WHOLE_VOLUMES = (WHOLE_VOLUME, BIOIMAGE_CPP)
HALO = 32  # voxels: it wants one as wide as objects reach beyond a block
DASK = "dask-image label (no watershed)"  # is timed alone: in blocks of 32 it had not ended after minutes
PACKAGES = {BIOIMAGE_CPP: "bioimage_cpp", BIOIMAGE_PY: "bioimage_py"}  # there are none for Linux on ARM
CONFIG = Config()


def measure(run: str, sections: int, repeats: int) -> None:
    """A row for each method: seconds, speed and memory in blocks of `TIMED_SIDE`, and how many objects it finds at four block
    sizes; those of the whole volume at once, and dask-image's, at one."""
    methods = {
        "volseg": count_volseg, WHOLE_VOLUME: count_scikit_image, BIOIMAGE_CPP: count_bioimage_cpp,
        BIOIMAGE_PY: count_bioimage_py, DASK: count_dask_image,
        "watershed per block, any contact joins": partial(count_per_block, shrink=False),
        "watershed per block, cellpose's rule": partial(count_per_block, shrink=True),
    }  # fmt: skip
    for name in [name for name, package in PACKAGES.items() if not find_spec(package)]:
        print(f"left out: {name}, since {PACKAGES[name]} is not installed")
        del methods[name]
    probability = _probability(run, sections)
    share, voxels = float((_landscape(probability)[0] != OUTSIDE).mean()), probability[0].size
    with TemporaryDirectory() as folder:
        stored = Path(folder, "probability.npy")
        np.save(stored, probability)
        del probability
        calls = {name: partial(_load, stored, method) for name, method in methods.items()}
        others = tuple(side for side in SIDES if side != TIMED_SIDE)
        counted_at = {name: () if name in (*WHOLE_VOLUMES, DASK) else others for name in methods}
        timed, counted = time_isolated(calls, TIMED_SIDE, repeats, counted_at)
    rows = [
        {"method": name, **_row(timed[name], voxels), **_objects(name, timed[name], counted[name])} for name in methods
    ]
    print(
        f"{voxels / 1e6:.1f} million voxels, {100 * share:.1f} % in the mask; blocks of {TIMED_SIDE}; medians of {repeats}"
    )
    report.keep("instances-run" if run else "instances", rows)
    own, *peers = ({**row, "s": row["s"] - row["of it heights"]} for row in rows)
    print("\nseconds of others / volseg's, heights given to all: "
          + ", ".join(f"{row['method']} {row['s'] / own['s']:.2f}" for row in peers))  # fmt: skip


def _row(timed: list[Timed], voxels: int) -> dict:
    seconds = median(done.seconds for done in timed)
    return {
        "s": round(seconds, 3),
        "of it heights": round(median(done.result.heights for done in timed), 3),
        "Mvoxel/s": round(voxels / 1e6 / seconds, 1),
        "peak MB": round(max(done.peak_bytes for done in timed) / 1e6),
    }


def _objects(name: str, timed: list[Timed], counted: dict[int, Counted]) -> dict:
    """Objects at each block size; those of the whole volume are the same at all, what was not counted is a dash."""
    results = {TIMED_SIDE: timed[0].result, **counted}
    constant = results[TIMED_SIDE].objects if name in WHOLE_VOLUMES else "-"
    return {f"objects at {side}": results[side].objects if side in results else constant for side in SIDES}


def _load(stored: Path, method: Callable) -> Callable[[int], Counted]:
    """``method`` on stored probabilities, by the side of a block; it has been called once, on a crop of them.

    The process keeps the memory that it frees, as volseg's workers do.
    """
    tune_malloc()
    probability = np.load(stored)
    method(np.ascontiguousarray(probability[(slice(None), *map(slice, WARM_UP_SHAPE))]), WARM_UP_SHAPE[1] // 2)
    return partial(method, probability)


@dataclass(frozen=True)
class Counted:
    """How many objects, and the seconds that making the heights took."""

    objects: int
    heights: float


def _probability(run: str, sections: int) -> np.ndarray:
    """uint8 probabilities (mask, contour; z y x): the last sections of a run's, or a synthetic volume's."""
    if run:
        return np.asarray(arrays.open_array(str(Path(run).resolve()), "0")[:2, -sections:])
    labels = synth(Box((0, 0, 0), SHAPE), seed=SEED)[1]
    steps = [np.diff(labels, axis=axis, append=labels.take([-1], axis)) != 0 for axis in range(3)]
    rng, sharp = np.random.default_rng(0), (labels > 0, np.any(steps, axis=0))
    soft = (ndimage.gaussian_filter(np.float32(255) * field, 1.5) for field in sharp)
    return np.stack([np.clip(s + 12 * rng.standard_normal(SHAPE, np.float32), 0, 255).astype(np.uint8) for s in soft])


def _landscape(probability: np.ndarray) -> tuple[np.ndarray, int, float]:
    """Heights of the whole volume, the height of a seed, and seconds."""
    start, shape = time.perf_counter(), probability.shape[1:]
    height = block_heights(probability, Box.from_shape(shape), shape, CONFIG.fragments)
    seed = seed_height(CONFIG.stitch.seed, CONFIG.fragments)
    return height[1:-1, 1:-1, 1:-1], seed, time.perf_counter() - start


def _blocks(shape: Triple, side: int) -> Blocks:
    return Blocks(shape, tuple(min(n, side) for n in shape))


def _count_large(labels: np.ndarray) -> int:
    """Objects of at least `MIN_VOXELS` voxels."""
    return int((np.bincount(labels.ravel())[1:] >= MIN_VOXELS).sum())


# ---------------------------------------------------------------- the methods: how many objects


@dataclass(frozen=True)
class _Cut:
    region: np.ndarray
    table: BlockBasins


def count_volseg(probability: np.ndarray, side: int) -> Counted:
    """The stages of a run in memory: fragments, faces, stitch, relabel."""
    shape, settings, seconds = probability.shape[1:], CONFIG.fragments, 0.0
    grid = _blocks(shape, side)
    cuts = []
    for box in grid:
        padded, start = box.grow(height_halo(settings)).clip(shape), time.perf_counter()
        height = block_heights(probability[(slice(None), *padded.slices)], box, shape, settings)
        seconds += time.perf_counter() - start
        cuts.append(_Cut(*watershed_block(height, probability[0][box.slices], box, shape)))
    tables = [cut.table for cut in cuts]
    basins, basin_of = stitch.gather(tables, [stitch.link(i, tables.__getitem__, grid) for i in range(len(grid))])
    label = label_basins(basins, Rules(seed_height(CONFIG.stitch.seed, settings), min_voxels=MIN_VOXELS))
    out = np.zeros(shape, np.uint32)
    for box, cut, basin in zip(grid, cuts, basin_of, strict=True):
        objects.paint(cut.region, np.r_[0, label[basin]].astype(np.uint32), out[box.slices])
    return Counted(int(label.max(initial=0)), seconds)


def count_scikit_image(probability: np.ndarray, _: int) -> Counted:
    """Seeded watershed of the whole volume at once."""
    from skimage.segmentation import watershed

    height, seed, seconds = _landscape(probability)
    markers, _ = ndimage.label(height <= seed)
    return Counted(_count_large(watershed(height, markers, mask=height != OUTSIDE, connectivity=1)), seconds)


def _float_landscape(probability: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Heights as bioimage-cpp takes them, which of them are seeds and which are in the mask, and seconds."""
    height, seed, seconds = _landscape(probability)
    start = time.perf_counter()
    return height.astype(np.float32), height <= seed, height != OUTSIDE, seconds + time.perf_counter() - start


def count_bioimage_cpp(probability: np.ndarray, _: int) -> Counted:
    """Seeded watershed of the whole volume at once."""
    from bioimage_cpp.segmentation import label, watershed

    height, seeds, mask, seconds = _float_landscape(probability)
    markers = label(seeds, connectivity=1).view(np.int64)
    return Counted(_count_large(watershed(height, markers, mask=mask)), seconds)


def count_bioimage_py(probability: np.ndarray, side: int) -> Counted:
    """Seeds labeled block by block, then a seeded watershed of each block and its halo."""
    from bioimage_py.segmentation import label, watershed

    height, seeds, mask, seconds = _float_landscape(probability)
    block, labels = _blocks(height.shape, side).block, np.zeros(height.shape, np.int64)
    with redirect_stderr(StringIO()):  # its bars
        markers = label(seeds, connectivity=1, block_shape=block)
        watershed(height, markers, labels, halo=(HALO,) * 3, block_shape=block, mask=mask)
    return Counted(_count_large(labels), seconds)


def count_dask_image(probability: np.ndarray, side: int) -> Counted:
    """Connected components of the mask, block by block."""
    import dask.array
    from dask_image import ndmeasure

    height, _, seconds = _landscape(probability)
    mask = dask.array.from_array(height != OUTSIDE, chunks=_blocks(height.shape, side).block)
    return Counted(_count_large(ndmeasure.label(mask)[0].compute(scheduler="single-threaded")), seconds)


def count_per_block(probability: np.ndarray, side: int, *, shrink: bool) -> Counted:
    """A watershed in each block by itself; labels that touch across a face are one.

    With ``shrink``, after each lost its outermost voxels in the face: the rule of cellpose's distributed segmentation.
    """
    from skimage.segmentation import watershed

    height, seed, seconds = _landscape(probability)
    grid = _blocks(height.shape, side)
    out, last = np.zeros(height.shape, np.int64), 0
    for box in grid:
        block_height = height[box.slices]
        markers, count = ndimage.label(block_height <= seed)
        labels = watershed(block_height, markers, mask=block_height != OUTSIDE, connectivity=1)
        out[box.slices] = np.where(labels > 0, labels + last, 0)
        last += count
    parent = np.arange(last + 1)
    for a, b in _touching_labels(out, grid.block, shrink):
        p, q = find(parent, a), find(parent, b)
        parent[max(p, q)] = min(p, q)
    return Counted(_count_large(np.array([find(parent, i) for i in range(last + 1)])[out]), seconds)


def _touching_labels(labels: np.ndarray, block: Triple, shrink: bool) -> Iterator[np.ndarray]:
    """Pairs of labels that meet at block faces."""
    for axis, (size, length) in enumerate(zip(block, labels.shape, strict=True)):
        for face in range(size, length, size):
            low, high = (
                _shrink(plane) if shrink else plane for plane in (labels.take(face - 1, axis), labels.take(face, axis))
            )
            both = (low > 0) & (high > 0)
            yield from np.unique(np.stack([low[both], high[both]], axis=1), axis=0)


def _shrink(plane: np.ndarray) -> np.ndarray:
    inner = (ndimage.minimum_filter(plane, 3) == plane) & (ndimage.maximum_filter(plane, 3) == plane)
    return np.where(inner, plane, 0)
