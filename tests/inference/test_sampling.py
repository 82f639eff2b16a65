"""Tiles that are measured are those that a run infers."""

from dataclasses import dataclass

import numpy as np
import pytest

from tests.helpers import CARD
from volseg.config import Predict
from volseg.inference import sampling, tiles
from volseg.inference.normalization import scale


@dataclass
class Voxels:
    """A volume in memory, as far as it is looked at here."""

    voxels: np.ndarray

    @property
    def shape(self):
        return self.voxels.shape

    def read(self, box):
        return self.voxels[box.slices]


@pytest.fixture(scope="module")
def source():
    return Voxels(np.random.default_rng(0).integers(0, 255, (7, 50, 90), dtype=np.uint8))


@pytest.mark.parametrize("plane", ["xy", "xz", "yz"])
@pytest.mark.parametrize(("first", "stop"), [(0, 2), (2, 5), (4, 7)])
@pytest.mark.parametrize("sections", [1, 3, 7])
def test_a_sampled_tile_is_what_a_run_cuts(source, plane, first, stop, sections):
    """Against the cut that a run makes of the whole volume, mirrored and at the ends of the volume too."""
    axes = tiles.PLANES[plane]
    voxels = source.voxels.transpose(axes)
    grid, norm = tiles.grid(voxels.shape[1:], 64, 16), (120.0, 33.0)
    slab = tiles.Slab(np.ascontiguousarray(voxels), (0, 0, 0), sections // 2, voxels.shape[0])
    for tile in grid.overlapping(slice(0, voxels.shape[1]), slice(0, voxels.shape[2])):
        place = grid.place(tile)
        want = np.zeros((stop - first, sections, *grid.size), np.float32)
        for z, out in zip(range(first, stop), want, strict=True):
            slab.cut(z, place, out, scale(*norm))
        found = sampling.read_tiles(source, place, range(first, stop), sections=sections, norm=norm, plane=plane)
        np.testing.assert_array_equal(found, want)


def test_tiles_are_spread_over_the_depth(source):
    marked = Voxels(np.broadcast_to(np.arange(7, dtype=np.uint8)[:, None, None], source.shape))
    found = sampling.spread_tiles(marked, CARD, Predict(tile=64, overlap=0), (0.0, 1.0))
    assert found.shape == (sampling.SAMPLES, 3, 64, 64)
    assert found[:, 1, 0, 0].tolist() == [0, 2, 4, 6]
    assert found[0, :, 0, 0].tolist() == [0, 0, 1], "before the first section there is the first"
