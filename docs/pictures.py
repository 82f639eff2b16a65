"""Draws the pictures of own-data.md: a section of EPFL, its labels, and what the network said of it.

volseg infer ../shared/data/epfl/training.tif --voxel-nm 5,5,5 --out epfl.volseg.zarr
python docs/pictures.py epfl.volseg.zarr
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import volseg
from volseg.box import Box
from volseg.io import pictures, volume

SECTION = 152
SHOWN = (slice(0, 480), slice(160, 800))  # voxels along y and x
SMALLER = 2  # voxels of a pixel
GAP, CAPTION = 6, 22  # pixels


def main(path: str) -> None:
    run = volseg.open(path)
    window = Box((SECTION, SHOWN[0].start, SHOWN[1].start), (SECTION + 1, SHOWN[0].stop, SHOWN[1].stop))
    gray = pictures.grayscale(volume.open(run.run.source.path).read(window)[0])
    labels = np.asarray(run.labels[window.slices])[0]
    mask, contour = np.asarray(run.probabilities[(slice(0, 2), *window.slices)])[:, 0]
    plain = np.repeat(gray[..., None], 3, axis=-1)
    ids = sorted({int(label) for label in np.unique(labels) if label})
    panels = [
        (plain, f"EPFL, section {SECTION}"),
        (pictures.label_overlay(gray, labels), f"labels {', '.join(map(str, ids))}"),
    ]
    save("epfl-labels.png", panels, 96)
    heat = [
        (np.repeat(channel[..., None], 3, axis=-1), text) for channel, text in ((mask, "mask"), (contour, "contour"))
    ]
    save("epfl-probabilities.png", heat, 32)


def save(name: str, panels: list[tuple[np.ndarray, str]], colors: int) -> None:
    """The panels side by side, each below its caption, with a scale bar of 500 nm in the first."""
    small = [Image.fromarray(panel).reduce(SMALLER) for panel, _ in panels]
    width, height = small[0].size
    page = Image.new("RGB", (len(panels) * (width + GAP) - GAP, height + CAPTION), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for i, (picture, (_, caption)) in enumerate(zip(small, panels, strict=True)):
        page.paste(picture, (i * (width + GAP), CAPTION))
        draw.text((i * (width + GAP) + 2, 3), caption, fill="black", font=font)
    bar = 500 // 5 // SMALLER
    draw.rectangle((10, page.height - 14, 10 + bar, page.height - 10), fill="white")
    draw.text((14 + bar, page.height - 20), "500 nm", fill="white", font=font, stroke_width=2, stroke_fill="black")
    page.quantize(colors, kmeans=2, dither=Image.Dither.NONE).save(Path(__file__).with_name(name), optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
