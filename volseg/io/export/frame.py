"""Where an exported grid of voxels lies, as formats count: from the center of its first voxel, or from its outer corner."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor

from volseg.box import Triple
from volseg.io.header import TripleNm
from volseg.io.place import ORIGIN


@dataclass(frozen=True)
class Frame:
    """A grid of voxels, z y x.

    shape          voxels
    voxel_size_nm  of each
    center_nm      of the first one
    corner         the outer corner of the first one, in voxels: see `Run.corner`

    >>> Frame((4, 4, 4), (40.0, 4.0, 4.0), corner=(2.0, 0.0, 3.5)).first
    (2, 0, 4)
    """

    shape: Triple
    voxel_size_nm: TripleNm
    center_nm: TripleNm = ORIGIN
    corner: tuple[float, float, float] = ORIGIN

    @property
    def first(self) -> Triple:
        """The first voxel, of those that are counted from corner to corner from the origin on: the nearest one."""
        z, y, x = (floor(n + 0.5) for n in self.corner)
        return z, y, x

    @property
    def begin_nm(self) -> TripleNm:
        """The outer corner of that voxel."""
        z, y, x = (n * length for n, length in zip(self.first, self.voxel_size_nm, strict=True))
        return z, y, x

    @property
    def is_moved(self) -> bool:
        """Whether it lies anywhere but at the origin."""
        return self.center_nm != ORIGIN
