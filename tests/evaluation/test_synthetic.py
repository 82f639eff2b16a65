"""Synthetic EM: the same voxels however a box is cut, and objects that are what their labels say."""

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tests.helpers import Quiet, Stops
from volseg.box import Box
from volseg.errors import UserError
from volseg.evaluation.synthetic import synth
from volseg.evaluation.synthetic_volume import write_synthetic

BIG = Box((4000, 900, 2000), (4060, 960, 2064))
FAR = Box((1_000_000, 999_990, 999_983), (1_000_020, 1_000_021, 1_000_007))
NEGATIVE = Box((-37, -350, -9), (5, -300, 40))


def cut(box: Box, seed: int, inner: Box) -> tuple[np.ndarray, np.ndarray]:
    """The part ``inner`` of a synthetic ``box``."""
    image, labels = synth(box, seed=seed)
    return image[inner.slices_within(box)], labels[inner.slices_within(box)]


@st.composite
def boxes(draw, outer: Box) -> Box:
    """Boxes inside ``outer``, single voxels included."""
    spans = []
    for low, high in zip(outer.start, outer.stop, strict=True):
        a = draw(st.integers(low, high - 1))
        spans.append((a, draw(st.integers(a + 1, high))))
    return Box(tuple(a for a, _ in spans), tuple(b for _, b in spans))


@pytest.fixture(scope="module")
def tissue() -> tuple[np.ndarray, np.ndarray]:
    """A volume that holds over a dozen objects, some in contact."""
    return synth(Box((500, 500, 500), (640, 760, 760)), seed=2)


@pytest.mark.parametrize("outer", [BIG, FAR, NEGATIVE], ids=["near", "far", "negative"])
@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 3))
def test_a_box_is_the_same_cut_out_of_a_bigger_one(outer, data, seed):
    inner = data.draw(boxes(outer))
    for alone, part in zip(synth(inner, seed=seed), cut(outer, seed, inner), strict=True):
        np.testing.assert_array_equal(alone, part)


def test_blocks_make_the_whole_where_there_are_objects(tissue):
    origin = (500, 500, 500)
    for start, stop in [((0, 0, 0), (70, 240, 50)), ((103, 0, 0), (104, 260, 260)), ((90, 101, 33), (140, 260, 61))]:
        box = Box(start, stop)
        image, labels = synth(box.shift(origin), seed=2)
        np.testing.assert_array_equal(image, tissue[0][box.slices])
        np.testing.assert_array_equal(labels, tissue[1][box.slices])


def test_shapes_and_types_are_those_promised():
    image, labels = synth(Box((3, 4, 5), (6, 8, 10)), seed=0)
    assert image.shape == labels.shape == (3, 4, 5)
    assert (image.dtype, labels.dtype) == (np.uint8, np.uint32)


def test_an_empty_box_holds_nothing():
    image, labels = synth(Box((3, 4, 5), (3, 8, 10)), seed=0)
    assert image.shape == labels.shape == (0, 4, 5)


@pytest.mark.parametrize("seed", [-1, 2**64 - 1, 2**70 + 3])
def test_any_whole_number_is_a_seed(seed):
    box = Box((0, 0, 0), (4, 20, 20))
    np.testing.assert_array_equal(synth(box, seed=seed)[0], synth(box, seed=seed % 2**64)[0])


def test_seeds_differ():
    images = [synth(Box((0, 0, 0), (8, 32, 32)), seed=seed)[0].tobytes() for seed in range(8)]
    assert len(set(images)) == 8


def test_each_object_inside_the_box_is_connected(tissue):
    whole = 0
    for label, slices in boxed(tissue[1]):
        if all(s.start > 0 and s.stop < n for s, n in zip(slices, tissue[1].shape, strict=True)):
            whole += 1
            assert ndimage.label(tissue[1][slices] == label)[1] == 1, f"object {label} is in pieces"
    assert whole >= 2


def test_mitochondria_fill_a_small_share():
    planes = [Box((n, 700 * n, 900), (n + 1, 700 * n + 400, 1300)) for n in range(100, 1300, 100)]
    assert 0.03 < np.mean([(synth(plane, seed=1)[1] > 0).mean() for plane in planes]) < 0.08


def test_some_objects_touch(tissue):
    assert len(touching(tissue[1])) >= 2


def test_only_the_two_of_a_pair_touch(tissue):
    assert all(a | 1 == b for a, b in touching(tissue[1]))


def test_labels_far_apart_differ():
    here = synth(Box((0, 0, 0), (40, 200, 200)), seed=2)[1]
    there = synth(Box((4000, 4000, 4000), (4040, 4200, 4200)), seed=2)[1]
    assert here.any()
    assert there.any()
    assert not set(np.unique(here[here > 0])) & set(np.unique(there[there > 0]))


def test_mitochondria_are_darker_than_what_surrounds_them(tissue):
    image, labels = tissue
    contrasts = []
    for label, slices in boxed(labels):
        wide = tuple(slice(max(0, s.start - 10), s.stop + 10) for s in slices)
        inside = labels[wide] == label
        around = ndimage.binary_dilation(inside, iterations=10) & (labels[wide] == 0)
        contrasts.append(image[wide][around].mean() - image[wide][inside].mean())
    assert np.median(contrasts) > 10
    assert np.mean(np.array(contrasts) > 0) > 0.8


def test_gray_levels_are_those_of_real_tissue(tissue):
    image, labels = tissue
    assert 120 < image.mean() < 160
    assert 20 < image.std() < 40
    assert 85 < image[labels > 0].mean() < 125


def boxed(labels: np.ndarray) -> list[tuple[int, tuple[slice, ...]]]:
    """Each label and the slices that hold it."""
    ids = np.unique(labels[labels > 0])
    dense = np.zeros(labels.shape, np.int32)
    dense[labels > 0] = 1 + np.searchsorted(ids, labels[labels > 0])
    return [(int(label), slices) for label, slices in zip(ids, ndimage.find_objects(dense), strict=True)]


def touching(labels: np.ndarray) -> set[tuple[int, int]]:
    """Pairs of different labels that share a face, the lesser first."""
    found = set()
    for axis in range(3):
        a = labels.take(range(labels.shape[axis] - 1), axis)
        b = labels.take(range(1, labels.shape[axis]), axis)
        meet = (a != b) & (a > 0) & (b > 0)
        found |= {(int(min(p)), int(max(p))) for p in zip(a[meet], b[meet], strict=True)}
    return found


def test_synthetic_volumes_do_not_see_the_blocks(tmp_path):
    for name, block in (("a", (20, 40, 50)), ("b", (7, 16, 33))):
        write_synthetic(str(tmp_path / name), (20, 40, 50), block, seed=3, overwrite=False, progress=Quiet())
    want = synth(Box.from_shape((20, 40, 50)), seed=3)
    for name in "ab":
        for array, part in zip(("0", "labels/truth/0"), want, strict=True):
            np.testing.assert_array_equal(zarr.open_array(str(tmp_path / name / array), mode="r")[:], part)


def test_a_synthetic_volume_that_was_not_finished_leaves_nothing(tmp_path):
    """One that is stopped takes away what it wrote; what a killed one left is gone with the next."""
    out, beside = tmp_path / "em.zarr", tmp_path / "em.zarr.partial"

    def write(progress=None):
        write_synthetic(str(out), (4, 8, 8), (4, 8, 8), seed=3, overwrite=True, progress=progress or Quiet())

    with pytest.raises(KeyboardInterrupt):
        write(Stops("synth"))
    assert list(tmp_path.iterdir()) == []
    (beside / "labels").mkdir(parents=True)
    (beside / "zarr.json").write_text("{")
    write()
    assert list(tmp_path.iterdir()) == [out]
    beside.mkdir()
    (beside / "precious").touch()
    with pytest.raises(UserError, match=r"partial exists and volseg synth did not make it, so it is left alone"):
        write()
    assert (beside / "precious").exists()
