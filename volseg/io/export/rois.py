"""Outlines of objects, section by section, as ImageJ and Fiji keep them: a zip file of regions of interest.

An outline runs along the edges of pixels, so it encloses the object's pixels and no others. Pixels that touch by a corner alone
are outlined each for itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))  # right, down, left, up: y x; the object lies to the right of each
MOVE, LINE, CLOSE = 0.0, 1.0, 4.0  # of the paths in which ImageJ keeps regions of several outlines


def outlines(mask: np.ndarray) -> Iterator[np.ndarray]:
    """The outlines of the pixels in ``mask``: corners (n, 2), x y, clockwise around pixels and the other way around holes.

    Parameters
    ----------
    mask
        bool (y, x).

    Examples
    --------
    >>> [outline.tolist() for outline in outlines(np.ones((1, 3), bool))]
    [[[0, 0], [3, 0], [3, 1], [0, 1]]]
    """
    padded = np.pad(mask, 1)
    inside = padded[1:-1, 1:-1]
    above, right, below, left = padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2]
    edges: set[tuple[int, int, int]] = set()  # the corner where each begins, and its step
    corners = ((0, 0), (0, 1), (1, 1), (1, 0))
    for step, (beside, corner) in enumerate(zip((above, right, below, left), corners, strict=True)):
        edges.update((y, x, step) for y, x in (np.argwhere(inside & ~beside) + corner).tolist())
    for first in sorted(edges):
        if first in edges:
            yield np.array(_follow(edges, first))[:, ::-1]


def _follow(edges: set[tuple[int, int, int]], first: tuple[int, int, int]) -> list[tuple[int, int]]:
    """The corners y x of the outline that begins with the edge ``first``; its edges are taken out.

    Where two outlines meet at a corner it turns right, and so stays at the same pixel.
    """
    found, edge, before = [], first, -1
    while True:
        y, x, step = edge
        if step != before:
            found.append((y, x))
        y, x, before = y + STEPS[step][0], x + STEPS[step][1], step
        edge = next((y, x, turn % 4) for turn in (step + 1, step, step - 1) if (y, x, turn % 4) in edges)
        if edge == first:
            break
        edges.remove(edge)
    edges.remove(first)
    return found


def encode(name: str, z: int, outer: list[np.ndarray]) -> bytes:
    """A region in section ``z`` (from 0) as ImageJ stores it: a traced polygon or, of several outlines, a path."""
    import roifile

    roi: Any = roifile.ImagejRoi.frompoints(outer[0], name=name, position=z)
    if len(outer) == 1:
        roi.roitype = roifile.ROI_TYPE.TRACED
        return roi.tobytes()
    points = np.concatenate(outer)
    roi.roitype, roi.n_coordinates, roi.integer_coordinates = roifile.ROI_TYPE.RECT, 0, None
    roi.left, roi.top = map(int, points.min(axis=0))
    roi.right, roi.bottom = map(int, points.max(axis=0))
    path: list[float] = []
    for outline in outer:
        for i, (x, y) in enumerate(outline.tolist()):
            path += [LINE if i else MOVE, x, y]
        path.append(CLOSE)
    roi.multi_coordinates, roi.shape_roi_size = np.array(path, np.float32), len(path)
    return roi.tobytes()
