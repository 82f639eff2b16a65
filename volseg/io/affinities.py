"""Affinities of neighbors, as the mask and contour of a run.

An affinity tells how much two voxels next to each other belong together. A voxel has up to six, one for each side. It is in
an object as far as the highest of them says: so does the watershed on affinities leave out voxels of which no affinity
reaches its low threshold (Zlateski and Seung, arXiv 1505.00249). It lies at an object's end as far as the lowest says.
Both are whole numbers made of a voxel's own six, so blocks that share a voxel agree on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from volseg.box import Box, Triple

HEADS = ("mask", "contour")  # what affinities become
OFFSETS = {-1: "the voxel before it", 1: "the voxel behind it"}  # with which an affinity joins the one it is stored at


def mask_and_contour(
    read: Sequence[Callable[[Box], np.ndarray]], box: Box, shape: Triple, offset: int = -1
) -> np.ndarray:
    """The mask and contour probability of ``box``.

    Parameters
    ----------
    read
        For z, y and x what gives the affinities along that axis in a box, uint8, 255 for 1. They are asked for up to one
        voxel around ``box``, inside the volume.
    box
        Inside the volume.
    shape
        Of the volume, z y x. Affinities that would lead out of it are not looked at.
    offset
        -1: the affinity at voxel v of axis c joins v and v - 1 along c; 1: v and v + 1.

    Returns
    -------
    uint8 (2, z, y, x)
        The highest affinity of each voxel, and 255 less the lowest.

    Examples
    --------
    Two objects of two voxels in a row:

    >>> along_x = np.array([[[0, 255, 20, 255]]], np.uint8)
    >>> read = [lambda box: along_x[box.slices]] * 3
    >>> mask_and_contour(read, Box((0, 0, 0), (1, 1, 4)), (1, 1, 4))[:, 0, 0].tolist()
    [[255, 255, 255, 255], [0, 235, 235, 0]]
    """
    highest, lowest = np.zeros(box.shape, np.uint8), np.full(box.shape, 255, np.uint8)
    for axis, read_axis in enumerate(read):
        # face k lies between the voxels k - 1 and k of the axis, and its affinity is stored at one of them
        first, last = max(box.start[axis], 1), min(box.stop[axis], shape[axis] - 1)
        if first > last:
            continue
        begin = first if offset < 0 else first - 1
        at = _with_span(box, axis, begin, begin + last - first + 1)
        faces = np.moveaxis(read_axis(at), axis, 0)
        for lower in (0, 1):  # faces as those of the voxels k, then of the voxels k - 1
            start, stop = max(first - lower, box.start[axis]), min(last + 1 - lower, box.stop[axis])
            part = faces[start + lower - first : stop + lower - first]
            for result, pick in ((highest, np.maximum), (lowest, np.minimum)):
                out = np.moveaxis(result, axis, 0)[start - box.start[axis] : stop - box.start[axis]]
                pick(out, part, out=out)
    return np.stack([highest, 255 - lowest])


def _with_span(box: Box, axis: int, start: int, stop: int) -> Box:
    """``box`` with other ends along one axis."""

    def changed(ends: Triple, end: int) -> Triple:
        z, y, x = (end if k == axis else own for k, own in enumerate(ends))
        return z, y, x

    return Box(changed(box.start, start), changed(box.stop, stop))
