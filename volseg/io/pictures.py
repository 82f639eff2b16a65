"""Pictures of a run: the image, and the image with its labels outlined in color."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from volseg.box import Box
from volseg.errors import UserError
from volseg.io import files
from volseg.io.ome import label_colors
from volseg.io.volume import Volume, open_channels, resampled

PANEL_EDGE = 1024  # longest edge of one panel, voxels
HISTOGRAM_BINS = 30  # of the histogram


def pictured_volume(source: Volume, run: str) -> Volume:
    """What pictures of the run at ``run`` show, on the grid of ``source``: it or, where it is gone, the mask probabilities that
    the run stored. Raises `UserError` where it dropped them."""
    try:
        source.read(Box((0, 0, 0), (1, 1, 1)))
    except UserError:
        if not files.exists(files.join(run, "0")):  # dropped
            raise
        mask = open_channels(run, dataset="0")[0]
        return mask if mask.shape == source.shape else resampled(mask, source.shape)
    return source


def overlay(source: Volume, labels: Volume, columns: dict[str, np.ndarray]) -> bytes:
    """A PNG of up to three sections, each as it is and with its labels: those through the middle of the largest objects.

    Planes longer than `PANEL_EDGE` are cut around the object. ``columns`` is the object table.
    """
    rows = [_pair(source, labels, center) for center in _centers(source.shape, columns)]
    file = io.BytesIO()
    Image.fromarray(np.concatenate(rows, axis=0)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _centers(shape: tuple[int, int, int], columns: dict[str, np.ndarray]) -> list[tuple[int, int, int]]:
    """A largest object's middle in each third of the volume along z; the volume's middle where there is none."""
    middle = np.stack([(columns[f"{a}0"] + columns[f"{a}1"]) // 2 for a in "zyx"], axis=1)
    centers = []
    for third in range(3):
        inside = np.flatnonzero(middle[:, 0] * 3 // shape[0] == third)
        if inside.size:
            centers.append(tuple(int(n) for n in middle[inside[np.argmax(columns["voxels"][inside])]]))
    return centers or [tuple(n // 2 for n in shape)]


def _pair(source: Volume, labels: Volume, center: tuple[int, int, int]) -> np.ndarray:
    z, *at = center
    size = [min(PANEL_EDGE, n) for n in source.shape[1:]]
    y, x = (int(np.clip(a - s // 2, 0, n - s)) for a, s, n in zip(at, size, source.shape[1:], strict=True))
    box = Box((z, y, x), (z + 1, y + size[0], x + size[1]))
    image, ids = grayscale(source.read(box)[0]), labels.read(box)[0]
    return np.concatenate([np.repeat(image[..., None], 3, axis=-1), label_overlay(image, ids)], axis=1)


def grayscale(plane: np.ndarray) -> np.ndarray:
    """A plane as uint8, stretched between its 0.5 and 99.5 percentiles."""
    low, high = np.percentile(plane, [0.5, 99.5])
    scaled = (plane.astype(np.float32) - low) / max(high - low, 1e-6)
    return np.uint8(255 * np.clip(scaled, 0, 1))


def label_overlay(image: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """A gray plane (uint8) with its objects tinted and outlined, RGB. An id has the same color in every picture."""
    distinct, index = np.unique(ids, return_inverse=True)
    color = 255 * label_colors(distinct)
    out = np.repeat(image[..., None], 3, axis=-1)
    inside, edge = ids > 0, label_outline(ids)
    tint = color[index.reshape(ids.shape)[inside]]
    out[inside] = np.where(edge[inside][:, None], tint, 0.7 * image[inside][:, None] + 0.3 * tint)
    return out


def label_outline(ids: np.ndarray) -> np.ndarray:
    """Which pixels of objects have a neighbor, by a side, of another id.

    >>> label_outline(np.array([[0, 1, 1, 1, 2]])).tolist()
    [[False, True, False, True, True]]
    """
    edge = np.zeros(ids.shape, bool)
    for axis in range(2):
        near, far = (np.moveaxis(plane, axis, 0) for plane in (ids, edge))
        apart = near[1:] != near[:-1]
        far[1:] |= apart
        far[:-1] |= apart
    return edge & (ids > 0)


# ---------------------------------------------------------------- the histogram


def volume_histogram(columns: dict[str, np.ndarray]) -> bytes:
    """A PNG of the histogram of the objects' volumes, on a logarithmic axis. ``columns`` is the object table.

    Drawn with Pillow: loading matplotlib takes longer than deciding a run anew.
    """
    volumes = columns["volume_um3"]
    extent = (volumes.min() * 0.9, volumes.max() * 1.1) if volumes.size else (0.1, 10.0)
    low, high = np.log10(extent)
    counts, _ = np.histogram(np.log10(volumes), np.linspace(low, high, HISTOGRAM_BINS + 1))
    most = max(1, int(counts.max()))
    picture = Image.new("RGB", (640, 420), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    left, top, right, bottom = 64, 40, 620, 350
    edges = np.linspace(left, right, HISTOGRAM_BINS + 1).round().astype(int)
    for count, (begin, end) in zip(counts, pairwise(edges), strict=True):
        if count:
            draw.rectangle((begin, bottom - round((bottom - top) * count / most), end - 1, bottom), fill="#1f77b4")
    draw.rectangle((left, top, right, bottom), outline="black")
    for count in sorted({0, most // 2, most}):
        y = bottom - round((bottom - top) * count / most)
        draw.line((left - 5, y, left, y), fill="black")
        draw.text((left - 9, y), str(count), "black", font, anchor="rm")
    for value in _ticks(low, high):
        x = left + round((right - left) * (np.log10(value) - low) / (high - low))
        draw.line((x, bottom, x, bottom + 5), fill="black")
        draw.text((x, bottom + 9), f"{value:g}", "black", font, anchor="mt")
    draw.text(((left + right) // 2, top - 10), f"{volumes.size} objects", "black", font, anchor="mb")
    draw.text(((left + right) // 2, bottom + 34), "volume (um^3)", "black", font, anchor="mt")
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from 10**low to 10**high: powers of ten, with their doubles and fives where these are few.

    >>> _ticks(-0.1, 1.1)
    [1.0, 2.0, 5.0, 10.0]
    """
    steps = (1, 2, 5) if high - low < 3 else (1,)
    each = [step * 10.0**power for power in range(int(np.floor(low)), int(np.ceil(high)) + 1) for step in steps]
    return [value for value in each if low <= np.log10(value) <= high]
