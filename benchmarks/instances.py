"""Probabilities to instances: volseg's blocks against whole-volume and blockwise peers, with what the cutting does to them.

Each row runs in a process of its own, on one core. Peers get volseg's heights and mask, so that all cut one landscape; its
making counts for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from scipy import ndimage

from benchmarks import report
from benchmarks.repeat import alone
from volseg import fragments, stitch, volume
from volseg.box import Blocks, Box, Triple
from volseg.config import Config
from volseg.decide import Rules, decide
from volseg.synth import synth

SIDES = (256, 128, 64, 32)  # of the blocks, voxels; cut to the volume
TIMED = 128
SHAPE = (128, 256, 256)  # of the synthetic volume
SMALL = 500  # voxels; every method drops objects below
CONFIG = Config()


def measure(run: str, sections: int, repeats: int) -> None:
    """A row for each method: seconds, speed and memory, and how many objects it finds at four block sizes."""
    folder = TemporaryDirectory()
    probability, stored = _probability(run, sections), Path(folder.name, "probability.npy")
    np.save(stored, probability)
    make = partial(_arguments, stored)
    share = float((_landscape(probability)[0] != fragments.OUTSIDE).mean())
    methods = {
        "volseg": ours, "scikit-image watershed, whole volume": whole, "dask-image label (no watershed)": components,
        "watershed per block, any contact joins": partial(per_block, shrink=False),
        "watershed per block, cellpose's rule": partial(per_block, shrink=True),
    }  # fmt: skip
    timed = {name: [] for name in methods}
    for _ in range(repeats):
        for name, method in methods.items():
            timed[name].append(alone(method, partial(make, TIMED), warm=name == "volseg"))  # its kernels compile once
    rows = []
    for name, method in methods.items():
        seconds = median(done.seconds for done in timed[name])
        rows.append({
            "method": name,
            "s": round(seconds, 2),
            "Mvoxel/s": round(probability[0].size / 1e6 / seconds, 1),
            "peak MB": round(median(done.peak_bytes for done in timed[name]) / 1e6),
            **{f"objects at {side}": alone(method, partial(make, side)).result for side in SIDES},
        })  # fmt: skip
    print(f"{probability[0].size / 1e6:.1f} million voxels, {100 * share:.1f} % in the mask; blocks of {TIMED}")
    report.keep("instances", rows)
    folder.cleanup()
    print(f"\nscikit-image / volseg, seconds: {rows[1]['s'] / rows[0]['s']:.2f}")


def _arguments(stored: Path, side: int) -> tuple[np.ndarray, int]:
    """What a method is called with: stored probabilities, in memory, and the side of a block."""
    return np.load(stored), side


def _probability(run: str, sections: int) -> np.ndarray:
    """uint8 probabilities (mask, contour; z y x): the last sections of a run's, or a synthetic volume's."""
    if run:
        return np.asarray(volume.open_array(str(Path(run).resolve()), "0")[:2, -sections:])
    labels = synth(Box((0, 0, 0), SHAPE), seed=5)[1]
    steps = [np.diff(labels, axis=axis, append=labels.take([-1], axis)) != 0 for axis in range(3)]
    noise = np.random.default_rng(0).normal(0, 12, (2, *SHAPE))
    fields = [ndimage.gaussian_filter(255.0 * field, 1.5) for field in (labels > 0, np.any(steps, axis=0))]
    return np.clip(np.stack(fields) + noise, 0, 255).astype(np.uint8)


def _landscape(probability: np.ndarray) -> tuple[np.ndarray, int]:
    """Heights of the whole volume, and the height of a seed."""
    shape = probability.shape[1:]
    height = fragments.heights(probability, Box.whole(shape), shape, CONFIG.fragments)
    return height[1:-1, 1:-1, 1:-1], fragments.seed_height(CONFIG.stitch.seed, CONFIG.fragments)


def _blocks(shape: Triple, side: int) -> Blocks:
    return Blocks(shape, tuple(min(n, side) for n in shape))


def _counted(labels: np.ndarray) -> int:
    """Objects of at least `SMALL` voxels."""
    return int((np.bincount(labels.ravel())[1:] >= SMALL).sum())


# ---------------------------------------------------------------- the methods: how many objects


@dataclass(frozen=True)
class _Cut:
    region: np.ndarray
    table: fragments.Table


def ours(probability: np.ndarray, side: int) -> int:
    """The stages of a run in memory: fragments, faces, stitch, relabel."""
    shape, knobs = probability.shape[1:], CONFIG.fragments
    grid = _blocks(shape, side)
    cuts = []
    for box in grid:
        have = box.grow(fragments.halo(knobs)).clip(shape)
        height = fragments.heights(probability[(slice(None), *have.slices)], box, shape, knobs)
        cuts.append(_Cut(*fragments.fragments(height, probability[0][box.slices], box, shape)))
    tables = [cut.table for cut in cuts]
    basins, basin_of = stitch.gather(tables, [stitch.link(i, tables.__getitem__, grid) for i in range(len(grid))])
    label = decide(basins, Rules(fragments.seed_height(CONFIG.stitch.seed, knobs), min_voxels=SMALL))
    out = np.empty(shape, np.uint32)
    for box, cut, basin in zip(grid, cuts, basin_of, strict=True):
        out[box.slices] = np.r_[0, label[basin]].astype(np.uint32)[cut.region]
    return int(out.max())


def whole(probability: np.ndarray, _: int) -> int:
    """Seeded watershed of the whole volume at once."""
    from skimage.segmentation import watershed

    height, seed = _landscape(probability)
    markers, _ = ndimage.label(height <= seed)
    return _counted(watershed(height, markers, mask=height != fragments.OUTSIDE, connectivity=1))


def components(probability: np.ndarray, side: int) -> int:
    """Connected components of the mask, block by block."""
    import dask.array
    from dask_image import ndmeasure

    height, _ = _landscape(probability)
    mask = dask.array.from_array(height != fragments.OUTSIDE, chunks=_blocks(height.shape, side).block)
    return _counted(ndmeasure.label(mask)[0].compute(scheduler="single-threaded"))


def per_block(probability: np.ndarray, side: int, *, shrink: bool) -> int:
    """A watershed in each block by itself; labels that touch across a face are one.

    With ``shrink``, after each lost its outermost voxels in the face: the rule of cellpose's distributed segmentation.
    """
    from skimage.segmentation import watershed

    height, seed = _landscape(probability)
    grid = _blocks(height.shape, side)
    out, last = np.zeros(height.shape, np.int64), 0
    for box in grid:
        here = height[box.slices]
        markers, count = ndimage.label(here <= seed)
        labels = watershed(here, markers, mask=here != fragments.OUTSIDE, connectivity=1)
        out[box.slices] = np.where(labels > 0, labels + last, 0)
        last += count
    parent = np.arange(last + 1)
    for a, b in _touching(out, grid.block, shrink):
        p, q = stitch.find(parent, a), stitch.find(parent, b)
        parent[max(p, q)] = min(p, q)
    return _counted(np.array([stitch.find(parent, i) for i in range(last + 1)])[out])


def _touching(labels: np.ndarray, block: Triple, shrink: bool) -> Iterator[np.ndarray]:
    """Pairs of labels that meet at block faces."""
    for axis, (size, length) in enumerate(zip(block, labels.shape, strict=True)):
        for at in range(size, length, size):
            near, far = (_shrunk(plane) if shrink else plane for plane in (labels.take(at - 1, axis), labels.take(at, axis)))
            both = (near > 0) & (far > 0)
            yield from np.unique(np.stack([near[both], far[both]], axis=1), axis=0)


def _shrunk(plane: np.ndarray) -> np.ndarray:
    inner = (ndimage.minimum_filter(plane, 3) == plane) & (ndimage.maximum_filter(plane, 3) == plane)
    return np.where(inner, plane, 0)
