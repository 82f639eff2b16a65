"""Draws exactness.svg, the picture in design.md, from what the package itself computes on one row of voxels.

python docs/exactness.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from volseg.box import Blocks
from volseg.segmentation.agglomerate import APART, SEED, UNSEEDED, forest
from volseg.segmentation.basins import BlockBasins, watershed_block
from volseg.segmentation.heights import OUTSIDE
from volseg.segmentation.rules import Rules, label_basins
from volseg.segmentation.stitch import Basins, gather, link

HEIGHTS = [14, 10, 6, 4, 6, 10, 12, 10, 9, 8, 7, 6, 5, 3, 1, 4, 8, 12, 16, 13, 9, 7, 9, 11, 13, 11, 9, 7, 5, 2, 0, 3,
           4, 2, 1, 5, 9, 14, 11, 9, 12, 15]  # fmt: skip
BLOCK = 14
SEED_LEVEL = 5
ACTIONS = {
    SEED: "join: within the seed level",
    UNSEEDED: "join: one side has no seed",
    APART: "apart: both have a seed",
}

LEFT, CELL, STEP, FLOOR = 24, 22, 8, 172  # pixels: margin, width of a voxel, height of one unit, where height 0 is
INK, PALE, ACCENT = "#222222", "#9a9a9a", "#c2410c"
COLORS = ("#8ecae6", "#ffd166", "#b7e4c7", "#d8b4fe", "#f8ad9d", "#cfd8dc")
WIDTH = 2 * LEFT + CELL * len(HEIGHTS)


def x_of(voxel: float) -> float:
    """The left end of a voxel."""
    return LEFT + CELL * voxel


def text(
    x: float, y: float, words: str, *, size: int = 12, color: str = INK, anchor: str = "start", bold: bool = False
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{weight}>{words}</text>'
    )


def line(x0: float, y0: float, x1: float, y1: float, color: str = INK, more: str = "") -> str:
    return f'<line x1="{x0:.0f}" y1="{y0:.0f}" x2="{x1:.0f}" y2="{y1:.0f}" stroke="{color}" {more}/>'


def cells(y: float, numbers: list[int], names: list[str], colors: list[str]) -> list[str]:
    """A row of voxels, one box for each stretch with the same number."""
    out, start = [], 0
    for stop in range(1, len(numbers) + 1):
        if stop == len(numbers) or stop % BLOCK == 0 or numbers[stop] != numbers[start]:
            out.append(
                f'<rect x="{x_of(start):.0f}" y="{y:.0f}" width="{CELL * (stop - start)}" height="22" '
                f'fill="{colors[numbers[start]]}" stroke="white"/>'
            )
            out.append(text(x_of((start + stop) / 2), y + 15, names[numbers[start]], anchor="middle"))
            start = stop
    return [*out, *block_borders(y - 4, y + 26)]


def block_borders(top: float, bottom: float) -> list[str]:
    """The lines between blocks."""
    return [line(x_of(BLOCK * k), top, x_of(BLOCK * k), bottom, PALE, 'stroke-dasharray="5 4"') for k in (1, 2)]


def heading(y: float, words: str) -> str:
    """What a step does."""
    return text(LEFT, y, words, bold=True)


def draw() -> str:
    """The picture."""
    regions, tables, basins, basin = watershed()
    rules = Rules(seed_height=SEED_LEVEL)
    _, actions = forest(*(basins.edges[key] for key in ("a", "b", "high")), basins.minimum, *rules.seeds)
    names = list("ABCDEF"[: basins.minimum.size])
    out = [heading(18, "1  Every voxel points to its lowest neighbor. Pointers that leave a block are exits (orange).")]
    out += _profile(np.array(HEIGHTS), basin)

    y = FLOOR + 44
    words = "2  Each block numbers its own regions; a region that ends in an exit drains into the next block."
    exits = [(i + 1, is_exit) for table in tables for i, is_exit in enumerate(table.is_exit)]
    titles, shades = [f"{i} exit" if e else f"{i}" for i, e in exits], ["#fed7aa" if e else "#f3f4f6" for _, e in exits]
    out += [heading(y, words), *cells(y + 10, regions, titles, shades)]

    y += 60
    words = "3  Faces are compared: exits follow on to true basins, which know nothing of blocks."
    out += [heading(y, words), *cells(y + 10, basin.tolist(), names, list(COLORS))]

    y += 60
    words = f"4  The edge table, sorted by saddle, is joined in that order. Seeds reach height {SEED_LEVEL}."
    out += [heading(y, words), *_edge_table(y + 24, names, basins.edges, actions)]
    out += _forest(y + 34, names, basins.minimum, basins.edges, actions)

    y += 64 + 20 * basins.edges.size
    words = "5  Labels, numbered by the first voxel of each object: the same bytes for any blocks."
    labels = label_basins(basins, rules)[basin].tolist()
    out += [heading(y, words), *cells(y + 10, labels, list("0123"), ["white", *COLORS])]

    height = y + 56
    out += [text(x_of(BLOCK * k + BLOCK / 2), height - 8, f"block {k}", color=PALE, anchor="middle") for k in range(3)]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">\n'
        "<title>A row of voxels cut into three blocks, from heights to labels</title>\n"
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>'
    )
    return "\n".join([head, *out, "</svg>\n"])


def watershed() -> tuple[list[int], list[BlockBasins], Basins, np.ndarray]:
    """The row in blocks: the region of each voxel (from 0, over all blocks), the tables, the basins, each voxel's basin."""
    grid = Blocks((1, 1, len(HEIGHTS)), (1, 1, BLOCK))
    volume = np.full((3, 3, len(HEIGHTS) + 2), OUTSIDE, np.int32)
    volume[1, 1, 1:-1] = HEIGHTS
    regions, tables, count = [], [], 0
    for box in grid:
        height = np.ascontiguousarray(volume[:, :, box.start[2] : box.stop[2] + 2])
        region, table = watershed_block(height, np.zeros(box.shape, np.uint8), box, grid.shape)
        regions.append(region.ravel().astype(int) - 1 + count)
        tables.append(table)
        count += table.root.size
    basins, basin_of = gather(tables, (link(i, tables.__getitem__, grid) for i in range(len(grid))))
    region = np.concatenate(regions)
    return region.tolist(), tables, basins, np.concatenate(basin_of)[region]


def _edge_table(y: float, names: list[str], edges: np.ndarray, actions: np.ndarray) -> list[str]:
    """A row for each edge: its basins, its saddle, and what is done there."""
    columns = (LEFT + 4, LEFT + 80, LEFT + 150)
    rows = [
        (f"{names[e['a']]} – {names[e['b']]}", f"{e['high']}", ACTIONS[int(n)])
        for e, n in zip(edges, actions, strict=True)
    ]
    out = [text(x, y, word, color="#555555") for x, word in zip(columns, ("basins", "saddle", "action"), strict=True)]
    for n, row in enumerate(rows, 1):
        color = ACCENT if actions[n - 1] == APART else INK
        out += [text(x, y + 20 * n, word, color=color) for x, word in zip(columns, row, strict=True)]
    return out


def _profile(height: np.ndarray, basin: np.ndarray) -> list[str]:
    """Heights as bars, the seed level, and each voxel's pointer."""
    out = []
    for i, h in enumerate(height.tolist()):
        top = FLOOR - STEP * h
        out.append(
            f'<rect x="{x_of(i) + 1:.0f}" y="{top}" width="{CELL - 2}" height="{STEP * h + 6}" fill="{COLORS[basin[i]]}"/>'
        )
        near = [j for j in (i - 1, i + 1) if 0 <= j < height.size]
        lowest = min(near, key=lambda j: (height[j], j))
        if (height[lowest], lowest) > (h, i):  # a minimum
            out.append(f'<circle cx="{x_of(i + 0.5):.0f}" cy="{top - 6}" r="4" fill="{INK}"/>')
            continue
        leaves = lowest // BLOCK != i // BLOCK
        step = 1 if lowest > i else -1
        x, y = x_of(i + 0.5) - 5 * step, top - 6
        out.append(
            f'<path d="M{x:.0f} {y} h{10 * step} m{-4 * step} -3 l{4 * step} 3 l{-4 * step} 3" fill="none" '
            f'stroke="{ACCENT if leaves else INK}" stroke-width="{2.5 if leaves else 1}"/>'
        )
    out += block_borders(30, FLOOR + 14)
    level = FLOOR - STEP * SEED_LEVEL
    out.append(line(LEFT, level, WIDTH - LEFT, level, ACCENT, 'stroke-dasharray="2 3"'))
    out.append(text(WIDTH - LEFT, level - 3, "seed level", size=11, color=ACCENT, anchor="end"))
    return out


def _forest(y: float, names: list[str], minimum: np.ndarray, edges: np.ndarray, actions: np.ndarray) -> list[str]:
    """Basins as nodes; the forest's edges drawn through, borders that stay dashed."""
    place = {i: (470 + 84 * i, y + 60) for i in range(len(names))}
    out = []
    for edge, action in zip(edges, actions, strict=True):
        (x0, y0), (x1, y1) = place[int(edge["a"])], place[int(edge["b"])]
        style = 'stroke-width="1.5" stroke-dasharray="4 4"' if action == APART else 'stroke-width="3"'
        out.append(line(x0, y0, x1, y1, ACCENT if action == APART else INK, style))
        out.append(text((x0 + x1) / 2, y0 - 8, f"{edge['high']}", size=11, anchor="middle"))
    for i, (x, down) in place.items():
        border = INK if minimum[i] <= SEED_LEVEL else PALE
        out.append(f'<circle cx="{x}" cy="{down:.0f}" r="15" fill="{COLORS[i]}" stroke="{border}" stroke-width="2"/>')
        out.append(text(x, down + 4, names[i], anchor="middle"))
        out.append(
            text(
                x,
                down + 34,
                f"{'seed' if minimum[i] <= SEED_LEVEL else 'no seed'}, {minimum[i]}",
                size=11,
                anchor="middle",
            )
        )
    return out


if __name__ == "__main__":
    Path(__file__).with_name("exactness.svg").write_text(draw(), encoding="utf-8")
