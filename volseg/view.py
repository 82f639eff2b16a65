"""Pictures of a run: the image, and the image with its labels outlined in colour."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from skimage.color import hsv2rgb
from skimage.segmentation import find_boundaries

from volseg.box import Box
from volseg.volume import Volume

EDGE = 1024  # longest edge of one panel, voxels


def overlay(source: Volume, labels: Volume, columns: dict[str, np.ndarray]) -> bytes:
    """A PNG of up to three sections, each as it is and with its labels: those through the middle of the largest objects.

    Planes longer than `EDGE` are cut around the object. ``columns`` is the object table.
    """
    rows = [_pair(source, labels, center) for center in _centers(source.shape, columns)]
    file = io.BytesIO()
    Image.fromarray(np.concatenate(rows, axis=0)).save(file, "PNG", compress_level=3)
    return file.getvalue()


def _centers(shape: tuple[int, int, int], columns: dict[str, np.ndarray]) -> list[tuple[int, int, int]]:
    """A largest object's middle in each third of the volume along z; the volume's middle where there is none."""
    middle = np.stack([(columns[f"{a}0"] + columns[f"{a}1"]) // 2 for a in "zyx"], axis=1)
    found = []
    for third in range(3):
        inside = np.flatnonzero(middle[:, 0] * 3 // shape[0] == third)
        if inside.size:
            found.append(tuple(int(n) for n in middle[inside[np.argmax(columns["voxels"][inside])]]))
    return found or [tuple(n // 2 for n in shape)]


def _pair(source: Volume, labels: Volume, center: tuple[int, int, int]) -> np.ndarray:
    z, *at = center
    size = [min(EDGE, n) for n in source.shape[1:]]
    y, x = (int(np.clip(a - s // 2, 0, n - s)) for a, s, n in zip(at, size, source.shape[1:], strict=True))
    box = Box((z, y, x), (z + 1, y + size[0], x + size[1]))
    image, ids = grey(source.read(box)[0]), labels.read(box)[0]
    return np.concatenate([np.repeat(image[..., None], 3, axis=-1), paint(image, ids)], axis=1)


def grey(plane: np.ndarray) -> np.ndarray:
    """A plane as uint8, stretched between its 0.5 and 99.5 percentiles."""
    low, high = np.percentile(plane, [0.5, 99.5])
    scaled = (plane.astype(np.float32) - low) / max(high - low, 1e-6)
    return np.uint8(255 * np.clip(scaled, 0, 1))


def paint(image: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """A grey plane (uint8) with its objects tinted and outlined, RGB. An id has the same colour in every picture."""
    names, index = np.unique(ids, return_inverse=True)
    hue = (names.astype(np.uint64) * np.uint64(0x9E3779B1) % np.uint64(1 << 32)).astype(np.float64) / (1 << 32)
    colour = 255 * hsv2rgb(np.stack([hue, np.full_like(hue, 0.75), np.ones_like(hue)], axis=-1))
    out = np.repeat(image[..., None], 3, axis=-1)
    inside, edge = ids > 0, find_boundaries(ids, mode="inner")
    of = colour[index.reshape(ids.shape)[inside]]
    out[inside] = np.where(edge[inside][:, None], of, 0.7 * image[inside][:, None] + 0.3 * of)
    return out


def volumes(columns: dict[str, np.ndarray]) -> bytes:
    """A PNG of the histogram of the objects' volumes, on a logarithmic axis. ``columns`` is the object table."""
    from matplotlib.figure import Figure

    of = columns["volume_um3"]
    figure = Figure(figsize=(4.8, 3.2), layout="tight")
    axes = figure.subplots()
    if of.size:
        axes.hist(of, bins=np.geomspace(of.min() * 0.9, of.max() * 1.1, 31))
    axes.set(xscale="log", xlabel="volume (µm³)", ylabel="objects", title=f"{of.size} objects")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
