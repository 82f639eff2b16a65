"""Draws overview.png, the picture in README.md: a section, the regions that its blocks see, and the labels.

volseg synth em.zarr --shape 96,384,384 --seed 12
volseg infer em.zarr --config configs/touching.toml --set blocks.shape=[32,64,64]
python docs/overview.py em.zarr em.volseg.zarr 64
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import zarr
from PIL import Image, ImageDraw, ImageFont

SECTION = 28
SHOWN = 320  # voxels along y and x
GAP, CAPTION = 8, 26  # pixels
CAPTIONS = ("an EM section (synthetic)", "basins, as blocks see them", "labels: the same for any blocks")


def main(image: str, run: str, block: int) -> None:
    """The picture of a run in blocks of ``block`` voxels along y and x."""
    window = (SECTION, slice(0, SHOWN), slice(0, SHOWN))
    gray = np.asarray(zarr.open_array(f"{image}/0", mode="r")[window])
    regions = np.asarray(zarr.open_array(f"{run}/work/fragments", mode="r")[window]).astype(np.int64)
    labels = np.asarray(zarr.open_array(f"{run}/labels/instances/0", mode="r")[window]).astype(np.int64)
    y, x = np.indices(regions.shape) // block
    regions[regions > 0] += (1000 * (1 + 10 * y + x))[regions > 0]
    panels = [np.stack([gray] * 3, axis=-1), painted(gray, regions), painted(gray, labels)]
    for k in range(block, SHOWN, block):
        panels[1][k, ::4] = panels[1][::4, k] = 255
    page = Image.new("RGB", (3 * SHOWN + 2 * GAP, SHOWN + CAPTION), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for i, (panel, caption) in enumerate(zip(panels, CAPTIONS, strict=True)):
        page.paste(Image.fromarray(panel), (i * (SHOWN + GAP), CAPTION))
        draw.text((i * (SHOWN + GAP) + 2, 4), caption, fill="black", font=font)
    page.quantize(256, kmeans=4, dither=Image.Dither.NONE).save(Path(__file__).with_name("overview.png"), optimize=True)


def painted(gray: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The section with a color for each label laid over it."""
    rank = np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
    hue = (rank * 0.61803398875) % 1  # far apart for numbers that follow each other
    color = 0.5 + 0.5 * np.cos(2 * np.pi * (hue[..., None] - np.array([0, 1 / 3, 2 / 3])))
    mixed = np.where(labels[..., None] > 0, 0.45 * gray[..., None] + 0.55 * 255 * color, gray[..., None])
    return mixed.astype(np.uint8)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
