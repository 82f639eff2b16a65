"""What other voxels than the model's cost in quality, and what resampling brings back.

Held-out sections of EPFL are made coarser by the mean of what a voxel covers, and finer by linear interpolation, with
scikit-image. Each is segmented as `volseg infer` does, once as it is and once with ``input.resample``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
from skimage.transform import resize, resize_local_mean

import volseg
from benchmarks import report
from volseg.box import Box, Triple
from volseg.config import load
from volseg.inference import model
from volseg.io import volume

SIZES = ("2.5,2.5,2.5", "5,5,5", "7,7,7", "10,10,10", "10,20,20", "15,15,15", "20,20,20")
MODES = {"as it is": "off", "resampled": "auto"}  # input.resample

Size = tuple[float, ...]


def measure(image: str, truth: str, box: str, stored_nm: str, sizes: tuple[str, ...], out: str) -> None:
    """A row for each voxel size: IoU and PQ of both ways on the volume's own grid."""
    place, stored, part = Path(out), _size(stored_nm), Box.parse(box)
    place.mkdir(parents=True, exist_ok=True)
    gray, mask = volume.open(image).read(part), volume.open(truth).read(part)
    rows = []
    for text in sizes:
        size = _size(text)
        shape = tuple(max(1, round(n * a / b)) for n, a, b in zip(gray.shape, stored, size, strict=True))
        em, labels = place / "em.tif", place / "truth.tif"
        tifffile.imwrite(em, _with_shape(gray, shape), photometric="minisblack")
        row: dict = {"nm": " x ".join(text.split(","))}
        tifffile.imwrite(labels, _nearest(mask, shape), photometric="minisblack")
        for name, resample in MODES.items():
            sets = (f"input.voxel_size_nm=[{text}]", f"input.resample={resample}", "output.space=source")
            row |= _scores(em, labels, place / "run.zarr", sets, name)
        rows.append(row)
        report.keep("voxels", rows)


def _size(text: str) -> Size:
    return tuple(float(n) for n in text.split(","))


def _with_shape(gray: np.ndarray, shape: Triple) -> np.ndarray:
    """The volume in voxels of another size: axis by axis the mean of what they cover, or lines between neighbors."""
    values = gray.astype(np.float32)
    for axis, n in enumerate(shape):
        to = tuple(n if k == axis else m for k, m in enumerate(values.shape))
        make = resize_local_mean if n < values.shape[axis] else resize
        values = make(
            values, to, preserve_range=True, **({"grid_mode": True} if make is resize_local_mean else {"order": 1})
        )
    return np.clip(np.floor(values + 0.5), 0, 255).astype(np.uint8)


def _nearest(mask: np.ndarray, shape: Triple) -> np.ndarray:
    """The mask at the middle of each voxel."""
    for axis, n in enumerate(shape):
        mask = mask.take((2 * np.arange(n) + 1) * mask.shape[axis] // (2 * n), axis)
    return mask


def _scores(em: Path, truth: Path, out: Path, sets: tuple[str, ...], name: str) -> dict:
    """IoU and PQ of a run with these settings."""
    config = load(sets=("cluster.dashboard=''", *sets), base=model.load_card(model.shipped()).decode)
    found = volseg.evaluate(volseg.infer(str(em), str(out), config=config, overwrite=True), str(truth))
    return {f"IoU, {name}": round(found.foreground.iou, 3), f"PQ, {name}": round(found.instances.pq, 3)}
