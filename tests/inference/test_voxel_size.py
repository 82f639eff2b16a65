"""Which voxels the network is given."""

from dataclasses import replace

import numpy as np
import pytest

from volseg.box import Box
from volseg.inference.voxel_size import in_source, match
from volseg.io import arrays, ome, volume

MODEL = (5.0, 5.0, 5.0)


@pytest.fixture(scope="module")
def levels(tmp_path_factory):
    """An image of three levels: 4, 8 and 16 nm in the plane, 40 nm along z."""
    path = str(tmp_path_factory.mktemp("levels") / "em.zarr")
    arrays.create_group(path)
    sizes = []
    for k in range(3):
        shape = (4, 32 >> k, 32 >> k)
        arrays.create_array(path, f"s{k}", shape=shape, dtype="uint8", chunk=shape, shard=shape, axes="zyx")
        arrays.write(arrays.open_array(path, f"s{k}"), Box.from_shape(shape), np.full(shape, 50 + k, np.uint8))
        sizes.append((f"s{k}", (40.0, 4.0 * 2**k, 4.0 * 2**k)))
    arrays.set_group_attributes(path, "", ome.multiscales("em", "zyx", sizes))
    return path


def at(levels, size):
    return replace(volume.open(levels), voxel_size_nm=size)


@pytest.mark.parametrize("size", [(5.0, 5.0, 5.0), (4.0, 6.0, 6.4), None])
def test_near_and_unknown_sizes_are_taken_as_they_are(levels, size):
    source = at(levels, size)
    found = match(source, MODEL, "auto")
    assert found.volume == source
    assert found.given is None
    assert ("near enough" in found.note) == (size == (4.0, 6.0, 6.4))


def test_off_is_told(levels):
    found = match(at(levels, (40.0, 4.0, 4.0)), MODEL, "off")
    assert found.given is None
    assert "nothing is resampled" in found.note


def test_an_unknown_model_takes_all(levels):
    source = at(levels, (40.0, 4.0, 4.0))
    assert match(source, None, "auto").volume == source


def test_a_volume_is_resampled_to_the_model(levels):
    found = match(at(levels, (40.0, 4.0, 4.0)), MODEL, "auto")
    assert found.volume.shape == (32, 26, 26)
    assert found.volume.dataset == "s0"
    assert found.given.shape == (4, 32, 32)
    assert "resampled to 5 x 4.923 x 4.923 nm" in found.note


def test_a_coarser_level_is_read_where_it_is_fine_enough(levels):
    found = match(volume.open(levels), (40.0, 16.0, 16.0), "auto")
    assert (found.volume.dataset, found.volume.shape, found.volume.stored_shape) == ("s2", (4, 8, 8), None)
    assert found.volume.read(Box((0, 0, 0), (1, 1, 1))).item() == 52
    found = match(volume.open(levels), (40.0, 12.0, 12.0), "auto")  # from 8 nm, not from 4
    assert (found.volume.dataset, found.volume.shape, found.volume.stored_shape) == ("s1", (4, 11, 11), (4, 16, 16))
    named = match(volume.open(levels), (40.0, 16.0, 16.0), "auto", any_level=False)
    assert named.volume.dataset == "s0"


def test_the_nearest_level_is_taken_as_it_is_stored(levels):
    found = match(volume.open(levels), (40.0, 11.0, 11.0), "nearest level")
    assert (found.volume.dataset, found.volume.stored_shape) == ("s1", None)
    assert match(volume.open(levels), (40.0, 2.0, 2.0), "nearest level").given is None


def test_labels_come_back_unless_that_is_far(levels):
    source = volume.open(levels)
    four, five = (match(source, (40.0, n, n), "nearest level").volume for n in (16.0, 16.0))
    assert in_source("auto", source, four)
    assert not in_source("auto", source, replace(five, voxel_size_nm=(40.0, 20.0, 20.0)))
    assert not in_source("model", source, four)
