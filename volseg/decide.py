"""The label of every basin, from the volume's basins and their edges alone: no voxel is read, so it takes seconds.

Kruskal's algorithm over the edges in their total order. Join when the saddle is no higher than the seed level, or when at
most one side holds a seed. What comes out is the minimum spanning forest rooted at the connected components of
``height <= seed level`` (Cousty et al. 2009; Zlateski and Seung, arXiv 1505.00249), then size rules on global sums.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from volseg.stitch import Basins, add_up, least


def decide(basins: Basins, *, seed_height: int, keep_unseeded: bool = False, min_voxels: int = 0) -> np.ndarray:
    """The label of each basin: 1..n in the raster order of each object's first voxel, 0 for what is dropped.

    An object is dropped when it has fewer than ``min_voxels`` voxels in the whole volume, or holds no seed (no voxel with
    ``height <= seed_height``) and ``keep_unseeded`` is false.
    """
    seeded = basins.depth <= seed_height
    root = forest(basins.edges["a"], basins.edges["b"], basins.edges["high"], seeded.copy(), seed_height)
    roots, group = np.unique(root, return_inverse=True)
    voxels = add_up(basins.voxels, group, roots.size)
    first = least(basins.first, group, roots.size)
    keep = voxels >= min_voxels
    if not keep_unseeded:
        keep &= add_up(seeded.astype(np.int64), group, roots.size) > 0
    label = np.zeros(roots.size, np.int64)
    order = np.flatnonzero(keep)[np.argsort(first[keep])]
    label[order] = np.arange(1, order.size + 1)
    return label[group]


@njit(cache=True)
def forest(a, b, saddle, seeded, level):
    """The root of each basin after Kruskal's algorithm over edges given in ascending order."""
    parent = np.arange(seeded.size)
    for e in range(a.size):
        p, q = find(parent, a[e]), find(parent, b[e])
        if p != q and (saddle[e] <= level or not (seeded[p] and seeded[q])):
            top, under = min(p, q), max(p, q)
            parent[under] = top
            seeded[top] = seeded[top] or seeded[under]
    for i in range(parent.size):
        parent[i] = find(parent, i)
    return parent


@njit(cache=True)
def find(parent, i):
    """The root of ``i``, halving the path on the way (Tarjan and van Leeuwen 1984)."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


def label_dtype(objects: int) -> str:
    """The dtype that holds that many labels: uint32, or uint64 when there are more than it can count."""
    return "uint32" if objects < 2**32 else "uint64"
