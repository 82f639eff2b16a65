"""Draws cutting.png, and prints the table of exactness.md: what cutting into blocks does to objects that touch.

python docs/cutting.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage.segmentation import watershed

from benchmarks import instances
from volseg.io.pictures import label_colors, label_outline
from volseg.segmentation.edges import find
from volseg.segmentation.heights import OUTSIDE

SHAPE, CELLS, SEED = (48, 192, 192), 90, 3
SIDES = (192, 96, 64, 48, 32)  # of the blocks
DRAWN, SECTION = 48, 24
RADIUS = 30.0  # voxels around its center that a cell has at most
MANY = instances.MIN_VOXELS
ZOOM, GAP, CAPTION = 2, 8, 26  # pixels


def tissue() -> np.ndarray:
    """Probabilities (mask, contour; z y x) of round cells that touch, with some noise, uint8."""
    rng = np.random.default_rng(SEED)
    centers = rng.uniform((0, 0, 0), SHAPE, (CELLS, 3))
    near = cKDTree(centers).query(np.stack(np.indices(SHAPE), axis=-1), 2)[0]
    contour = np.exp(-(((near[..., 1] - near[..., 0]) / 3) ** 2)) * 0.8
    mask = 1 / (1 + np.exp((near[..., 0] - RADIUS) / 1.5))
    noise = ndimage.gaussian_filter(rng.standard_normal((2, *SHAPE)), (0, 2, 2, 2)) * 0.6
    return np.uint8(255 * np.clip(np.stack([mask, contour]) + noise, 0, 1))


def per_block(probability: np.ndarray, side: int, *, shrink: bool) -> np.ndarray:
    """Labels of a watershed in each block by itself, joined over faces: as `benchmarks.instances` does for its table."""
    height, seed, _ = instances._landscape(probability)
    grid, out, last = instances._blocks(height.shape, side), np.zeros(height.shape, np.int64), 0
    for box in grid:
        part = height[box.slices]
        markers, count = ndimage.label(part <= seed)
        labels = watershed(part, markers, mask=part != OUTSIDE, connectivity=1)
        out[box.slices] = np.where(labels > 0, labels + last, 0)
        last += count
    parent = np.arange(last + 1)
    for a, b in instances._touching_labels(out, grid.block, shrink):
        p, q = find(parent, a), find(parent, b)
        parent[max(p, q)] = min(p, q)
    return np.array([find(parent, i) for i in range(last + 1)])[out]


def main() -> None:
    probability = tissue()
    print(f"| way | {' | '.join(f'{side}' for side in SIDES)} |\n|---|{'---|' * len(SIDES)}")
    ways = {
        "volseg": lambda side: instances.count_volseg(probability, side).objects,
        "joined where they touch": lambda side: instances._count_large(per_block(probability, side, shrink=False)),
        "cellpose's rule": lambda side: instances._count_large(per_block(probability, side, shrink=True)),
    }
    for name, count in ways.items():
        print(f"| {name} | {' | '.join(str(count(side)) for side in SIDES)} |")
    whole = per_block(probability, max(SHAPE), shrink=False)  # one block: nothing is cut
    panels = [("uncut, and volseg's for any blocks", whole)]
    panels.append(("joined where they touch", per_block(probability, DRAWN, shrink=False)))
    panels.append(("cellpose's rule", per_block(probability, DRAWN, shrink=True)))
    draw(panels)


def draw(panels: list[tuple[str, np.ndarray]]) -> None:
    """Sections of the labels beside each other, those that were cut with the faces of their blocks."""
    width, height = ZOOM * SHAPE[2] + GAP, ZOOM * SHAPE[1] + CAPTION
    page = Image.new("RGB", (len(panels) * width - GAP, height), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for i, (name, labels) in enumerate(panels):
        page.paste(Image.fromarray(section(labels, cut=i > 0)), (i * width, CAPTION))
        pen.text((i * width + 2, 4), name, fill="black", font=font)
    page.quantize(128).save(Path(__file__).with_name("cutting.png"), optimize=True)


def section(labels: np.ndarray, *, cut: bool) -> np.ndarray:
    """One section of large objects in colors, with black borders between them."""
    large = np.bincount(labels.ravel(), minlength=labels.max() + 1) >= MANY
    plane = np.where(large[labels[SECTION]], labels[SECTION], 0).repeat(ZOOM, 0).repeat(ZOOM, 1)
    distinct, index = np.unique(plane, return_inverse=True)
    color = np.uint8(255 * label_colors(distinct) * (distinct > 0)[:, None])[index.reshape(plane.shape)]
    color[label_outline(plane)] = 0
    for k in range(ZOOM * DRAWN, ZOOM * SHAPE[1], ZOOM * DRAWN) if cut else ():
        color[k, ::4] = color[::4, k] = 255
    return color


if __name__ == "__main__":
    main()
