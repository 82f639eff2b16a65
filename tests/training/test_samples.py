"""Annotated volumes in memory, and the patches drawn from them."""

import numpy as np
import pytest
import tifffile
from pydantic import ValidationError

from volseg.config import Train, TrainData
from volseg.errors import UserError
from volseg.inference.tiles import PLANES
from volseg.training.samples import (
    annotated_batch,
    context_sections,
    mixed_batch,
    prefetch_batches,
    unlabeled_batch,
)
from volseg.training.sources import load_sources
from volseg.training.targets import UNLABELED
from volseg.training.validate import section_targets

SHAPE = (8, 160, 192)


def _write(folder, image, label, **settings):
    """Train settings for two arrays, written as TIFF."""
    tifffile.imwrite(folder / "image.tif", image, photometric="minisblack")
    tifffile.imwrite(folder / "label.tif", label, photometric="minisblack")
    data = TrainData(image=str(folder / "image.tif"), label=str(folder / "label.tif"), **settings)
    return Train(data=(data,), patch=64, batch=8)


@pytest.fixture
def bars():
    """Labels of two bars through all sections, and an image that shows nothing but them."""
    label = np.zeros(SHAPE, np.uint8)
    label[:, 20:60, 30:60] = 1
    label[:, 90:140, 100:170] = 2
    return np.where(label > 0, 200, 50).astype(np.uint8), label


def test_a_batch_depends_on_seed_and_step_alone(tmp_path, bars):
    settings = _write(tmp_path, *bars)
    sources = load_sources(settings)
    first, again, later = (annotated_batch(sources, settings, step) for step in (3, 3, 4))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], later[0])
    assert not np.array_equal(first[0], annotated_batch(sources, settings.model_copy(update={"seed": 1}), 3)[0])


def test_batches_made_ahead_are_those_of_their_steps(tmp_path, bars):
    settings = _write(tmp_path, *bars)
    sources = load_sources(settings)
    ahead = list(prefetch_batches(sources, settings, 5, 9))
    assert len(ahead) == 4
    for step, (images, targets) in zip(range(5, 9), ahead, strict=True):
        np.testing.assert_array_equal(images, annotated_batch(sources, settings, step)[0])
        np.testing.assert_array_equal(targets, annotated_batch(sources, settings, step)[1])


def test_shapes_and_types_are_those_of_the_network(tmp_path, bars):
    settings = _write(tmp_path, *bars).model_copy(update={"sections": 5})
    images, targets = annotated_batch(load_sources(settings), settings, 0)
    assert (images.shape, images.dtype) == ((8, 5, 64, 64), np.float32)
    assert (targets.shape, targets.dtype) == ((8, 3, 64, 64), np.uint8)
    assert set(np.unique(targets)) <= {0, 1}
    assert np.isfinite(images).all()


def test_image_and_target_stay_on_each_other_through_every_augmentation(tmp_path, bars):
    settings = _write(tmp_path, *bars)
    sources = load_sources(settings)
    for step in range(12):
        for image, (mask, contour, _) in zip(*annotated_batch(sources, settings, step), strict=True):
            sure = contour == 0
            if mask[sure].any() and not mask[sure].all():
                inside, outside = image[1][sure & (mask == 1)], image[1][sure & (mask == 0)]
                middle = (np.median(inside) + np.median(outside)) / 2
                assert ((image[1] > middle) == mask)[sure].mean() > 0.97


def test_patches_look_for_small_objects(tmp_path):
    label = np.zeros((4, 600, 600), np.uint8)
    label[:, 300:310, 300:310] = 255
    settings = _write(tmp_path, np.full(label.shape, 9, np.uint8), label)
    sources = load_sources(settings)
    masks = np.concatenate([annotated_batch(sources, settings, step)[1][:, 0] for step in range(10)])
    assert masks.any(axis=(1, 2)).mean() > 0.3


def test_held_out_sections_are_never_drawn(tmp_path, bars):
    image, label = bars
    label[3:5] = 1
    settings = _write(tmp_path, image, label, validate_on=("3:5",))
    (source,) = sources = load_sources(settings)
    assert source.train_sections == (0, 1, 2, 5, 6, 7)
    assert source.validation_sections == (3, 4)
    assert not set(source.object_positions[:, 0]) & {3, 4}
    assert all(not annotated_batch(sources, settings, step)[1][:, 0].all(axis=(1, 2)).all() for step in range(6))


def test_train_names_the_sections_to_learn_from(tmp_path, bars):
    (source,) = load_sources(_write(tmp_path, *bars, train=("3:5", 6), validate_on=(5,)))
    assert [source.numbers[z] for z in source.train_sections] == [3, 4, 6]
    assert [source.numbers[z] for z in source.validation_sections] == [5]


def test_sections_named_to_learn_from_but_held_out_are_told_by_their_numbers_in_the_volume(tmp_path, bars):
    (source,) = load_sources(_write(tmp_path, *bars, train=("3:6",), validate_on=(4,)))
    assert source.numbers[0] == 2
    assert source.own.withheld == (4,)


def test_only_sections_in_use_and_their_neighbors_are_kept(tmp_path, bars):
    image, label = bars
    image += np.arange(8, dtype=np.uint8)[:, None, None]
    (source,) = load_sources(_write(tmp_path, image, label, train=("3:5",)))
    np.testing.assert_array_equal(source.image, image[2:6])
    np.testing.assert_array_equal(source.labels[1:3] != 0, label[3:5] != 0)
    assert not source.labels[[0, 3]].any()
    assert source.mean == pytest.approx(image.mean(), abs=1)


def test_unlabeled_voxels_carry_no_weight(tmp_path, bars):
    image, label = bars
    label[:, :, 96:] = 9
    settings = _write(tmp_path, image, label, unlabeled=9)
    (source,) = sources = load_sources(settings)
    assert (source.labels[:, :, 96:] == UNLABELED).all()
    targets = np.concatenate([annotated_batch(sources, settings, step)[1] for step in range(6)])
    assert 0.05 < (targets[:, 2] == 0).mean() < 0.95
    assert not targets[:, 0][targets[:, 2] == 0].all()


def _self_training(folder, image, label, **settings):
    return _write(folder, image, label, **settings).model_copy(update={"self_training": 0.5, "sections": 1})


def test_self_training_takes_the_sections_between_those_annotated(tmp_path, bars):
    settings = _self_training(tmp_path, *bars, train=(1, 3, 6), validate_on=(4,))
    (source,) = load_sources(settings)
    assert [source.numbers[z] for z in source.unlabeled_sections] == [2, 5]
    (source,) = load_sources(settings.model_copy(update={"sections": 3}))
    assert [source.numbers[z] for z in source.unlabeled_sections] == [2]


def test_self_training_takes_the_sections_that_it_is_told(tmp_path, bars):
    (source,) = load_sources(
        _self_training(tmp_path, *bars, train=(3,), unlabeled_sections=("0:5", 7), validate_on=(0,))
    )
    assert [source.numbers[z] for z in source.unlabeled_sections] == [1, 2, 4, 7]


def test_labels_of_sections_for_self_training_are_not_looked_at(tmp_path, bars):
    image, label = bars
    wrong = label.copy()
    wrong[[0, 1, 2, 4, 5, 6, 7]] = 77
    right, other = (load_sources(_self_training(tmp_path, image, l, train=(3,), unlabeled_sections=("0:8",)))
                    for l in (label, wrong))  # fmt: skip
    np.testing.assert_array_equal(right[0].labels, other[0].labels)
    assert right[0].label_kind == other[0].label_kind


def test_patches_for_self_training_show_their_sections_twice_in_the_same_place(tmp_path, bars):
    image, label = bars
    image[3] = 255 - image[3]
    settings = _self_training(tmp_path, image, label, train=(3,), unlabeled_sections=("0:8",))
    sources = load_sources(settings)
    clean, changed = unlabeled_batch(sources, settings, 4)
    assert clean.shape == changed.shape == (4, 1, 64, 64)
    gray = clean * sources[0].std + sources[0].mean
    assert gray.min() == pytest.approx(50)
    assert not np.array_equal(clean, changed)
    for before, after in zip(clean[:, 0], changed[:, 0], strict=True):
        if before.std() > 0.1:
            assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.9
    np.testing.assert_array_equal(mixed_batch(sources, settings, 4)[3], changed)
    np.testing.assert_array_equal(mixed_batch(sources, settings, 4)[1], annotated_batch(sources, settings, 4)[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"batch": 1}, "leaves no whole patch"), ({"self_training": 0.01}, "leaves no whole patch"),
     ({}, "no section is left without annotation")],
)  # fmt: skip
def test_self_training_on_nothing_is_refused(tmp_path, bars, changes, message):
    with pytest.raises(UserError, match=message):
        load_sources(_self_training(tmp_path, *bars).model_copy(update=changes))


def test_shares_decide_how_often_a_volume_is_drawn(tmp_path, bars):
    settings = _write(tmp_path, *bars)
    often, never = settings.data[0], TrainData(synth_seed=3, synth_shape=(4, 640, 640), share=1e-9)
    sources = load_sources(settings.model_copy(update={"data": (often, never)}))
    np.testing.assert_array_equal(
        annotated_batch(sources, settings, 0)[0], annotated_batch(sources[:1], settings, 0)[0]
    )
    assert not np.array_equal(annotated_batch(sources, settings, 0)[0], annotated_batch(sources[1:], settings, 0)[0])


def test_sections_at_the_end_repeat():
    assert context_sections(7, 5, 8).tolist() == [5, 6, 7, 7, 7]
    assert context_sections(0, 1, 8).tolist() == [0]


def test_labels_of_another_shape_are_refused_with_both_shapes(tmp_path, bars):
    with pytest.raises(UserError, match=r"8 x 160 x 192.*7 x 160 x 192"):
        load_sources(_write(tmp_path, bars[0], bars[1][:7]))


@pytest.mark.parametrize(
    ("value", "message"), [(0, "no labeled voxel on the 8 sections"), (1, "every annotated voxel is in an object")]
)
def test_labels_of_one_class_are_refused(tmp_path, bars, value, message):
    with pytest.raises(UserError, match=message):
        load_sources(_write(tmp_path, bars[0], np.full(SHAPE, value, np.uint8)))


def test_a_volume_held_out_as_a_whole_is_refused(tmp_path, bars):
    with pytest.raises(UserError, match="every section is held out"):
        load_sources(_write(tmp_path, *bars, validate_on=("0:8",)))


def test_no_data_at_all_is_refused():
    with pytest.raises(UserError, match=r"train\.data is empty"):
        load_sources(Train())


@pytest.mark.parametrize("z", [3, 7])
def test_an_image_that_holds_nan_is_refused_by_name(tmp_path, bars, z):
    image = bars[0].astype(np.float32)
    image[z, 7, 9] = np.nan
    with pytest.raises(UserError, match=r"image\.tif holds NaN or infinity"):
        load_sources(_write(tmp_path, image, bars[1], train=("2:4",)))


def test_without_augmentation_patches_are_cut_out_as_they_are(tmp_path, bars):
    image = np.random.default_rng(0).integers(1, 255, SHAPE).astype(np.uint8)
    settings = _write(tmp_path, image, bars[1]).model_copy(update={"augment": (), "sections": 1})
    (source,) = load_sources(settings)
    images, _ = annotated_batch([source], settings, 0)
    windows = np.lib.stride_tricks.sliding_window_view(image, (1, 2, 2)).reshape(-1, 4).astype(np.float32)
    means = np.unique(windows.mean(axis=1))
    gray = images * source.std + source.mean
    assert 0 < gray.std() < image.std()  # cut at half voxels, so a mean of neighbors
    assert np.isin(np.round(gray[:, 0, 8:12, 8:12] * 4) / 4, means).mean() > 0.2


@pytest.mark.parametrize("kind", ["flip", "affine", "elastic", "gray", "neighbors", "domain"])
def test_each_augmentation_changes_patches(tmp_path, bars, kind):
    image = np.random.default_rng(0).integers(1, 255, SHAPE).astype(np.uint8)
    settings = _write(tmp_path, image, bars[1]).model_copy(update={"augment": ()})
    sources = load_sources(settings)
    plain = [annotated_batch(sources, settings, step)[0] for step in range(3)]
    other = [annotated_batch(sources, settings.model_copy(update={"augment": (kind,)}), step)[0] for step in range(3)]
    assert not all(np.array_equal(a, b) for a, b in zip(plain, other, strict=True))


def test_a_wall_in_the_plane_is_contour_and_counts_more(tmp_path):
    label = np.zeros((12, 96, 96), np.uint8)
    label[:6, 20:80, 20:80] = 1
    label[6:, 20:80, 20:80] = 2
    settings = _write(tmp_path, label * 90, label, voxel_size_nm=(5, 5, 5))
    (source,) = sources = load_sources(settings)
    assert set(source.contact_positions[:, 0]) == {4, 5, 6, 7}
    targets = np.concatenate([annotated_batch(sources, settings, step)[1] for step in range(6)])
    assert set(np.unique(targets[:, 2])) == {1, settings.contact_weight}
    assert targets[:, 1][targets[:, 2] > 1].all()
    section, _ = section_targets(source, 5, settings)
    assert section[1, 50, 50] == 1
    assert section_targets(source, 1, settings)[0][1, 50, 50] == 0
    (source,) = load_sources(_write(tmp_path, label * 90, label, voxel_size_nm=(50, 5, 5)))
    assert not source.contacts.any()


def test_a_distance_is_learnt_where_it_is_asked_for(tmp_path):
    label = np.zeros((9, 96, 96), np.uint8)
    label[:, 20:80, 20:50], label[:, 20:80, 50:80] = 1, 2
    changes = {"distance_nm": 50, "augment": ()}
    settings = _write(tmp_path, label * 90, label, voxel_size_nm=(40, 5, 5), train=("0:4", 7)).model_copy(
        update=changes
    )
    (source,) = load_sources(settings)
    assert source.distance[2, 50, [19, 20, 35, 49, 50, 64]].tolist() == [0, 26, 255, 26, 26, 255]
    assert not source.distance[5].any()
    (targets,) = annotated_batch([source], settings.model_copy(update={"batch": 1}), 0)[1]
    assert targets.shape[0] == 4
    assert ((targets[2] > 0) == (targets[0] > 0)).all()
    section, weights = section_targets(source, 2, settings)
    assert section.shape == weights.shape == (3, 96, 96)
    assert float(section[2, 50, 35]) == 1
    with pytest.raises(UserError, match="voxel_size_nm"):
        load_sources(_write(tmp_path, label * 90, label).model_copy(update=changes))


def blocks_of_an_isotropic_volume(folder, **settings):
    """Train settings for a volume of noise, 80 x 96 x 112, with one object."""
    image = np.random.default_rng(0).integers(0, 65536, (80, 96, 112), dtype=np.uint16)
    label = np.zeros(image.shape, np.uint8)
    label[10:50, 20:60, 30:90] = 1
    settings = _write(folder, image, label, **{"voxel_size_nm": (5, 5, 5), "planes": ("xy", "xz", "yz"), **settings})
    return settings.model_copy(update={"augment": ()}), image, label


def test_patches_of_other_planes_are_those_of_the_volume(tmp_path):
    settings, image, label = blocks_of_an_isotropic_volume(tmp_path)
    (source,) = load_sources(settings)
    whole = (image - source.mean) / source.std
    seen = {name: set() for name in PLANES}
    for step in range(6):
        for patch, targets in zip(*annotated_batch([source], settings, step), strict=True):
            for name, axes in PLANES.items():
                windows = np.lib.stride_tricks.sliding_window_view(whole.transpose(axes), (64, 64), axis=(1, 2))
                near = np.argwhere(np.abs(windows[..., 0, 0] - patch[1, 0, 0]) < 1e-4)
                for z, y, x in near:
                    if np.abs(windows[z, y, x] - patch[1]).max() < 1e-3:
                        np.testing.assert_array_equal(targets[0], label.transpose(axes)[z, y : y + 64, x : x + 64])
                        seen[name].add((step, z))
    assert all(len(found) > 5 for found in seen.values())
    assert sum(len(found) for found in seen.values()) >= 6 * settings.batch // 2


def test_other_planes_show_no_section_that_is_held_out(tmp_path):
    settings, image, _ = blocks_of_an_isotropic_volume(tmp_path, validate_on=("40:44",))
    (source,) = load_sources(settings)
    for resliced, axes in zip(source.resliced, (PLANES["xz"], PLANES["yz"]), strict=True):
        np.testing.assert_array_equal(resliced.image, image[:40].transpose(axes))
        assert not resliced.validation_sections


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"voxel_size_nm": (50, 5, 5)}, r"need voxels as long as wide, and voxels are \(50.0, 5.0, 5.0\) nm"),
        ({"voxel_size_nm": None}, "nobody says how large a voxel is"),
        ({"train": (3, 20, "30:40")}, "need 32 neighboring sections to learn from, and the longest run has 10"),
    ],
)
def test_other_planes_of_what_has_none_are_refused(tmp_path, changes, message):
    settings, _, _ = blocks_of_an_isotropic_volume(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        load_sources(settings)


def test_planes_without_xy_are_refused():
    with pytest.raises(ValidationError, match="must name xy"):
        TrainData(synth_seed=1, planes=("xz",))


def test_volumes_get_the_voxel_size_of_the_first(tmp_path, bars):
    image, label = bars
    fine, coarse = tmp_path / "fine", tmp_path / "coarse"
    fine.mkdir()
    coarse.mkdir()
    nm = {"voxel_size_nm": (5.0, 5.0, 5.0)}
    settings = _write(fine, image, label, validate_on=("6:8",), **nm)
    small = _write(
        coarse, image[:, ::2, ::2], label[:, ::2, ::2], validate_on=("6:8",), voxel_size_nm=(10.0, 10.0, 10.0)
    )
    first, second = load_sources(settings.model_copy(update={"data": (*settings.data, *small.data)}))
    assert second.image.shape == second.labels.shape == (16, *SHAPE[1:])
    assert second.voxel_size_nm == (5.0, 5.0, 5.0)
    assert (first.train_sections, second.train_sections) == (tuple(range(6)), tuple(range(12)))
    assert second.validation_sections == (12, 13, 14, 15)
    np.testing.assert_array_equal(second.labels[::2] > 0, first.labels > 0)
    alone = load_sources(settings.model_copy(update={"voxel_size_nm": (10.0, 10.0, 10.0)}))[0]
    assert alone.image.shape == tuple(n // 2 for n in SHAPE)
    assert alone.validation_sections == (3,)
