"""The watershed of an array is that of a run, whatever blocks the run had."""

import numpy as np
import pytest
import tifffile
from scipy import ndimage

import volseg
from tests.helpers import segment_here
from volseg.box import Box
from volseg.config import load
from volseg.errors import UserError
from volseg.io import volume
from volseg.segmentation.watershed import watershed

SHAPE = (19, 44, 51)
SETTINGS = {
    "seeds": ["stitch.seed=0.7"],
    "distances": ["fragments.height=distance", "fragments.distance=4", "fragments.contour=0.5", "stitch.seed=0.5"],
    "nm": ["fragments.distance_nm=30", "stitch.min_volume_nm3=40000", "stitch.persistence=0.05"],
    "holes": ["fragments.smooth=[0, 0, 0]", "fragments.connectivity=26", "stitch.fill_holes_voxels=60", "stitch.join_mean=0.6"],
    "unseeded": ["fragments.height=contour", "stitch.seed=0.9", "stitch.seed_low=0.8", "stitch.keep_unseeded=true"],
}  # fmt: skip
NM = (8.0, 5.0, 5.0)


def blobs(sigma, seed):
    """A smooth random field, float32 0..1."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).random(SHAPE), sigma)
    return ((field - field.min()) / np.ptp(field)).astype(np.float32)


@pytest.fixture(scope="module")
def probability():
    """Mask and contour, float32 (channel, z, y, x)."""
    return np.stack([np.clip(2 * blobs(3, 0) - 0.4 * blobs(0.8, 1) - 0.3, 0, 1), 0.5 * blobs(1, 2)])


def labels_of_run(folder, probability, settings, block):
    """Labels of a run through the engine, in blocks of that shape."""
    path = folder / "probability.tif"
    tifffile.imwrite(path, probability, photometric="minisblack", metadata={"axes": "CZYX"})
    sets = [*settings, f"blocks.shape={list(block)}", "probabilities.mask_channel=0", "probabilities.contour_channel=1",
            f"input.voxel_size_nm={list(NM)}", "stitch.min_voxels=20", "cluster.dashboard=", "cluster.workers=1"]  # fmt: skip
    segment_here(str(path), str(folder / "run"), load(sets=sets))
    return volume.open(str(folder / "run"), dataset="labels/instances/0").read(Box.from_shape(SHAPE))


@pytest.mark.parametrize("block", [SHAPE, (8, 17, 51), (5, 44, 13)])
@pytest.mark.parametrize("name", SETTINGS)
def test_an_array_has_the_labels_of_a_run(name, block, probability, tmp_path):
    labels = watershed(probability, voxel_size_nm=NM, settings=[*SETTINGS[name], "stitch.min_voxels=20"])
    expected = labels_of_run(tmp_path, probability, SETTINGS[name], block)
    assert labels.dtype == expected.dtype == np.uint32
    assert labels.max() > 1
    np.testing.assert_array_equal(labels, expected)


def test_a_run_of_the_network_has_the_labels_of_its_probabilities(reference):
    run = volseg.open(reference)
    labels = volseg.watershed(run.probabilities[:], voxel_size_nm=run.voxel_size_nm, config=run.config)
    np.testing.assert_array_equal(labels, run.labels[:])


def test_channels_may_be_one_array_or_two(probability):
    together = watershed(probability)
    np.testing.assert_array_equal(watershed(probability[0], probability[1]), together)
    np.testing.assert_array_equal(watershed(np.floor(255 * probability.astype(float) + 0.5).astype(np.uint8)), together)
    np.testing.assert_array_equal(watershed(probability[0]), watershed(probability[0], np.zeros(SHAPE)))


def test_nothing_in_the_mask_is_no_object():
    labels = watershed(np.zeros((3, 4, 5), bool), settings=["stitch.fill_holes_voxels=10"])
    assert labels.shape == (3, 4, 5)
    assert not labels.any()


ZEROS = np.zeros((2, 3, 4))


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((np.zeros((3, 4)),), [], r"shape \(3, 4\); give \(z, y, x\)"),
        ((np.zeros((0, 3, 4)),), [], "none of them 0"),
        ((np.zeros((2, 3, 4), int),), [], "probabilities are int64; give floats"),
        ((ZEROS - 0.1,), [], "channel 0: voxel 0, 0, 0 of it is -0.1"),
        ((ZEROS, ZEROS + 255), [], r"channel 1: .* apply the sigmoid"),
        ((ZEROS, np.zeros((2, 3, 5))), [], r"contour has shape \(2, 3, 5\)"),
        ((np.zeros((2, 2, 3, 4)), ZEROS), [], "not both"),
        ((ZEROS,), ["fragments.height=contour"], "follows channel 1, counted from 0, and there are 1"),
        ((np.zeros((2, 2, 3, 4)),), ["fragments.height=head"], "follows channel 2"),
        ((ZEROS,), ["fragments.distance_nm=20"], "fragments.distance_nm is set, so a voxel's size is needed"),
        ((ZEROS,), ["stitch.min_volume_nm3=20"], "stitch.min_volume_nm3 is set"),
        ((ZEROS,), ["stitch.sede=0.7"], "did you mean 'seed'"),
        ((np.broadcast_to(np.uint8(0), (2000, 2000, 2000)),), [], "too many for one block"),
    ],
)
def test_what_is_no_probability_is_refused_in_one_line(arguments, settings, message):
    with pytest.raises(UserError, match=message) as error:
        watershed(*arguments, settings=settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [(1, 2), (1, 2, 0), (1, 2, float("nan"))])
def test_what_is_no_voxel_size_is_refused(size):
    with pytest.raises(UserError, match="three lengths above 0"):
        watershed(ZEROS, voxel_size_nm=size)


@pytest.mark.parametrize("smooth", [0, 3])
def test_no_voxel_is_of_two_classes_whose_probabilities_sum_to_1(smooth):
    """Also where both are a half, which as bytes are 128 each."""
    first = np.where(blobs(1, 3) > 0.5, np.float32(0.5), blobs(2, 4))
    options = [f"fragments.smooth=[{smooth}, {smooth}, {smooth}]", "stitch.seed=0.51", "stitch.min_voxels=0"]

    def classes(threshold):
        settings = [*options, f"fragments.threshold={threshold}"]
        return [watershed(class_, voxel_size_nm=NM, settings=settings) > 0 for class_ in (first, 1 - first)]

    one, other = classes(0.51)
    assert one.any()
    assert other.any()
    assert not (one & other).any()
    if not smooth:
        assert np.logical_and(*classes(0.5)).any()
