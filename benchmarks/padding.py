"""What padding around an image and lost sections cost in quality: as they are seen by themselves, and as volseg shows them.

Held-out sections of EPFL are damaged, and segmented as `volseg infer` does, once with ``input.padding = "none"``, where the
network sees them as they are, and once as by default. Truth is 0 in padding, and what it was in lost sections.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile

import volseg
from benchmarks import report
from volseg.box import Box
from volseg.config import load
from volseg.inference import model
from volseg.io import volume

RIM = 200  # voxels of padding on each side of a section
EVERY = 8  # sections, of which one is lost
MODES = {"as it is": "none", "shown": "auto"}  # input.padding


def _padded(value: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda voxels: np.pad(voxels, ((0, 0), (RIM, RIM), (RIM, RIM)), constant_values=value)


def _lost(*offsets: int, value: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    def lose(voxels: np.ndarray) -> np.ndarray:
        out = voxels.copy()
        for offset in offsets:
            out[offset::EVERY] = value
        return out

    return lose


DAMAGE = {
    "none": lambda voxels: voxels,
    "black padding": _padded(0),
    "white padding": _padded(255),
    f"every {EVERY}th section black": _lost(EVERY // 2),
    f"every {EVERY}th section white": _lost(EVERY // 2, value=255),
    f"two beside each other of every {EVERY} black": _lost(EVERY // 2, EVERY // 2 + 1),
}


def measure(image: str, truth: str, box: str, nm: str, configs: tuple[str, ...], out: str) -> None:
    """A row for each damage and config: IoU and PQ both ways."""
    place, part = Path(out), Box.parse(box)
    place.mkdir(parents=True, exist_ok=True)
    gray, mask = volume.open(image).read(part), volume.open(truth).read(part)
    rows = []
    for name in configs:
        for damage, make in DAMAGE.items():
            em, labels = place / "em.tif", place / "truth.tif"
            tifffile.imwrite(em, make(gray), photometric="minisblack")
            tifffile.imwrite(labels, _padded(0)(mask) if "padding" in damage else mask, photometric="minisblack")
            row: dict = {"config": name or "default", "damage": damage}
            for mode, padding in MODES.items():
                sets = ("cluster.dashboard=''", f"input.voxel_size_nm=[{nm}]", f"input.padding={padding}")
                config = load(name or None, sets, base=model.load_card(model.shipped()).decode)
                run = volseg.infer(str(em), str(place / "run.zarr"), config=config, overwrite=True)
                found = volseg.evaluate(run, str(labels))
                row[f"IoU, {mode}"], row[f"PQ, {mode}"] = (
                    round(found.foreground.iou, 3),
                    round(found.instances.pq, 3),
                )
            rows.append(row)
            report.keep("padding", rows)
