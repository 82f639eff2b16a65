"""What shows nothing: padding around an image and sections that were lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import ndimage

from volseg.inference import padding
from volseg.inference.device import NUMPY, TorchDevice
from volseg.inference.padding import SQUARE, Padding, empty_voxels, mirrored
from volseg.inference.sections import blend_sections, predict_sections
from volseg.inference.tiles import Blend, Slab, grid

VALUES = (0.0, 255.0)


@st.composite
def sections(draw):
    """Noise without the values of padding, with boxes of these in it, and single voxels of them."""
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    shape = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    section = rng.integers(1, 255, shape, np.uint8)
    section[rng.random(shape) < 0.1] = 0
    for _ in range(draw(st.integers(0, 3))):
        y, x = (draw(st.integers(-20, n)) for n in shape)
        height, width = (draw(st.integers(1, 90)) for _ in range(2))
        section[max(0, y) : y + height, max(0, x) : x + width] = draw(st.sampled_from([0, 255]))
    return section


@hypothesis_settings(deadline=None, max_examples=60)
@given(sections())
def test_empty_voxels_are_the_opening_by_a_square(section):
    found = empty_voxels(section, VALUES)
    if (section == section[0, 0]).all():
        assert found.all()
        return
    want = np.zeros(section.shape, bool)
    for value in VALUES:
        seen = np.pad(section == value, SQUARE, constant_values=True)
        want |= ndimage.binary_opening(seen, np.ones((SQUARE, SQUARE)))[SQUARE:-SQUARE, SQUARE:-SQUARE]
    np.testing.assert_array_equal(np.zeros_like(want) if found is None else found, want)


def reflected(row, known, x):
    """By hand: the distance of the nearest known voxel of a row, and what is mirrored there to ``x``."""
    found = []
    for step in (-1, 1):
        end = next((k for k in range(x, -1 if step < 0 else len(row), step) if known[k]), None)
        if end is not None:
            part = []
            while 0 <= end < len(row) and known[end]:
                part.append(row[end])
                end += step
            away = abs(x - (end - step * len(part)))
            wave = part + part[::-1]
            found.append((away, wave[(away - 1) % len(wave)]))
    return min(found, key=lambda one: one[0]) if found else None


@hypothesis_settings(deadline=None, max_examples=60)
@given(st.integers(0, 999), st.integers(1, 14), st.integers(1, 14))
def test_padding_is_filled_by_its_mirror_image(seed, height, width):
    rng = np.random.default_rng(seed)
    section = rng.integers(1, 255, (height, width), np.uint8)
    empty = ndimage.binary_dilation(rng.random(section.shape) < 0.1, iterations=int(rng.integers(1, 4)))
    if empty.all():
        return
    made = mirrored(section, empty)
    np.testing.assert_array_equal(made[~empty], section[~empty])
    for y, x in np.argwhere(empty):
        row, column = reflected(section[y], ~empty[y], x), reflected(section[:, x], ~empty[:, x], y)
        near = [one for one in (row, column) if one]
        if near:
            assert made[y, x] == min(near, key=lambda one: one[0])[1]
        else:
            assert made[y, x] in made[~empty]


@pytest.mark.parametrize("kind", ["f2", ">u2", ">f4", "i2", "u8", "f8"])
def test_every_type_is_filled(kind):
    section = np.random.default_rng(0).integers(1, 99, (40, 50)).astype(kind)
    plain = section.astype(np.uint8)
    empty = np.zeros(section.shape, bool)
    empty[5:9, 7:] = True
    found = mirrored(section, empty)
    assert found.dtype == section.dtype
    np.testing.assert_array_equal(found.astype(np.uint8), mirrored(plain, empty))


def slab(edit):
    """Five random sections of 96 x 128 voxels that ``edit`` changes."""
    voxels = np.random.default_rng(0).integers(1, 255, (5, 96, 128), np.uint8)
    edit(voxels)
    return Slab(voxels, (0, 0, 0), 1, len(voxels), VALUES)


def said(voxels, tiles=None, around=1):
    """What a network that passes on its sections, one head each, says of every section."""
    plane = voxels.voxels.shape[1:]
    tiles = tiles or grid(plane, 128, 0)
    told = {"grid": tiles, "heads": 2 * around + 1, "scale": (0.0, 1 / 255)}
    return np.rint(255 * predict_sections(lambda batch: batch, voxels, range(5), **told)).astype(int)


def test_a_lost_section_is_seen_as_the_one_before_and_those_beside_it_as_if_it_had_ended_there():
    for value in (0, 255, 77):

        def lose(voxels, value=value):
            voxels[2] = value

        found, kept = said(slab(lose)), slab(lose).voxels
        np.testing.assert_array_equal(found[:, 1], kept[[0, 1, 1]])
        np.testing.assert_array_equal(found[:, 2], kept[[1, 1, 3]])
        np.testing.assert_array_equal(found[:, 3], kept[[3, 3, 4]])


def test_a_band_that_was_lost_is_replaced_alone():
    def lose(voxels):
        voxels[2, 40:80] = 0

    kept = slab(lose).voxels
    found = said(slab(lose))
    np.testing.assert_array_equal(found[1, 2, 40:80], kept[1, 40:80])
    np.testing.assert_array_equal(np.delete(found[:, 2], np.s_[40:80], 1), np.delete(kept[1:4], np.s_[40:80], 1))


def test_padding_is_0_and_seen_as_a_mirror():
    def pad(voxels):
        voxels[:, :, 70:] = 0
        voxels[3:, :50] = 255

    found, kept = said(slab(pad)), slab(pad).voxels
    assert not found[:, :, :, 70:].any()
    assert not found[:, 3:, :50].any()
    np.testing.assert_array_equal(found[1, :3, :, :70], kept[:3, :, :70])
    sections, something = Padding(VALUES).shown(list(kept[:3]), range(3))
    assert (something == (kept[1] > 0)).all()
    for section in sections:
        np.testing.assert_array_equal(section[:, 70:], sections[1][:, 69:11:-1])


def test_two_lost_sections_show_nothing():
    def lose(voxels):
        voxels[2:4] = 0

    assert not said(slab(lose))[:, 2:4].any()


def test_dark_tissue_is_no_padding():
    def darken(voxels):
        voxels[:, 20:51, 20:51] = 0
        voxels[np.random.default_rng(1).random(voxels.shape) < 0.3] = 0
        voxels[:, [0, 0, -1, -1], [0, -1, 0, -1]] = 1  # nobody sees what lies beside a corner

    voxels = slab(darken)
    assert all(empty_voxels(section, VALUES) is None for section in voxels.voxels)
    np.testing.assert_array_equal(said(voxels)[1], voxels.voxels)


@pytest.mark.parametrize("value", [0, 255])
def test_a_section_that_was_lost_is_a_row_of_those_across(value):
    rng = np.random.default_rng(0)
    voxels = rng.integers(1, 255, (3, 40, 300), np.uint8)
    voxels[:, 10] = voxels[:, 0] = voxels[:, -1] = value  # the first and the last one show nothing, as in other passes
    voxels[:, 20:22, 50:250] = value
    voxels[:, 30, :100] = value  # too short to be one
    found, something = Padding((0.0, 255.0), across=True).shown(list(voxels), range(3))
    want = voxels.copy()
    want[:, 10] = voxels[:, 9]
    for section, wanted in zip(found, want, strict=True):
        np.testing.assert_array_equal(section[something], wanted[something])
    assert not something[20:22, 50:250].any()
    assert not something[[0, -1]].any()
    assert something.sum() == something.size - 400 - 600
    assert Padding((0.0, 255.0)).shown(list(voxels[:, 5:15]), range(3)) is None


def test_other_sections_across_are_seen_as_they_are():
    voxels = list(np.random.default_rng(0).integers(0, 255, (3, 40, 300), np.uint8))
    assert Padding((0.0, 255.0), across=True).shown(voxels, range(3)) is None


@pytest.mark.parametrize("most", [1, 2, 64])
def test_what_is_remembered_changes_nothing(monkeypatch, most):
    def edit(voxels):
        voxels[1, :, 30:90] = 0
        voxels[2:, 60:] = 0

    tiles = grid((96, 128), 64, 16)
    want = said(slab(edit), tiles)
    monkeypatch.setattr(padding, "MOST_KEPT", most)
    np.testing.assert_array_equal(said(slab(edit), tiles), want)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_device_sees_the_same(batch):
    def edit(voxels):
        voxels[2, :, 30:90] = 0
        voxels[:, 60:] = 255

    source, plane = slab(edit), (slice(0, 96), slice(0, 128))
    tiles = grid((96, 128), 64, 16)
    keys = [(z, tile) for z in range(5) for tile in tiles.overlapping(*plane)]
    made = []
    for device in (NUMPY, TorchDevice("cpu")):
        with device.stream():
            lies = Slab(device.put_sections(list(source.voxels)), (0, 0, 0), 1, 5)
            blend = Blend(3, tiles, *plane, device)
            out = device.empty_output(np.zeros((5, 3, 96, 128), np.uint8))
            told = {"scale": (20.0, 1 / 200), "batch": batch, "source": source}
            for z, _ in blend_sections(lambda rows: rows, lies, keys, blend, **told):
                blend.quantize(out[z])
            made.append(device.get(out))
    np.testing.assert_array_equal(*made)
    assert made[0].any()


def test_what_is_lost_is_no_padding():
    sections = np.random.default_rng(0).integers(1, 255, (8, 64, 96), np.uint8)
    sections[:, :, 60:] = 0
    sections[3] = 255
    sections[5, 20:] = 0
    lost = padding.lost_voxels(sections, VALUES)
    assert [z for z in range(8) if lost[z] is not None] == [3, 5]
    assert lost[3][:, :60].all()
    assert not lost[3][:, 60:].any(), "padding of another value is padding"
    assert lost[5][20:, :60].all()
    assert lost[5].sum() == 44 * 60
    assert padding.lost_voxels(sections[:2, :, :50], VALUES) == [None, None]


def test_edges_that_move_and_dark_corners_are_not_lost():
    rng = np.random.default_rng(0)
    sections = rng.integers(1, 255, (30, 200, 220), np.uint8)
    sections[rng.random(sections.shape) < 0.02] = 0
    sections[:, [0, 0, -1, -1], [0, -1, 0, -1]] = rng.choice([0, 9], (30, 4))
    for z in range(30):
        sections[z, :, : 40 + rng.integers(-3, 4)] = 0  # a margin that jitters
        sections[z, 60 + 2 * z : 120 + 2 * z, 100:160] = 255  # a vessel that drifts
    sections[12, :, 40:] = 0
    lost = padding.lost_voxels(sections, VALUES)
    assert [z for z in range(30) if lost[z] is not None] == [12]
    seen = Padding(VALUES)
    told = []
    for z in range(1, 29):
        seen.shown(list(sections[z - 1 : z + 2]), [(n,) for n in range(z - 1, z + 2)])
        told += [z] * seen.lost
    assert told == [12]
