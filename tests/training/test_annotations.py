"""Training from labels as people make them: some sections alone, outlines, scribbles."""

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from pydantic import ValidationError

from tests.helpers import config_of
from volseg.config import Train, TrainData
from volseg.errors import UserError
from volseg.io.export import rois
from volseg.training.decoding import calibrate
from volseg.training.report import format_data
from volseg.training.samples import UNKNOWN, annotated_batch
from volseg.training.sources import load_sources
from volseg.training.steps import _batch_tensors
from volseg.training.targets import UNLABELED, normalize_labels
from volseg.training.validate import section_targets, validate


@pytest.fixture
def annotated(tables, tmp_path):
    """Image, labels of 8 sections, and a folder with those of sections 0, 3 and 7 alone."""
    image, label = (tifffile.imread(tables["data"][0][key]) for key in ("image", "label"))
    folder = tmp_path / "labels"
    folder.mkdir()
    for z in (0, 3, 7):
        Image.fromarray(label[z]).save(folder / f"s{z + 1}.png")
    return tables["data"][0]["image"], image, label, folder


def _train(image, label, **settings):
    return Train(data=(TrainData(image=image, label=str(label), **settings),), patch=64, batch=4)


def test_a_folder_of_annotated_sections_teaches_those(annotated):
    image, _, label, folder = annotated
    (source,) = sources = load_sources(_train(image, folder, validate_on=(7,)))
    assert (source.train_sections, source.validation_sections) == ((0, 3), (7,))
    np.testing.assert_array_equal(source.labels[3] > 0, label[3] > 0)
    assert not source.labels[[1, 2, 4, 5, 6]].any()
    assert "labels: folder" in format_data(sources)
    assert "count from 1" in format_data(sources)


def test_what_was_lost_of_an_annotated_section_counts_nowhere(annotated, tmp_path):
    path, image, _, folder = annotated
    plain = load_sources(_train(path, folder, validate_on=(7,)))[0]
    assert not any("counts in no loss" in note for note in plain.notes)
    assert not (plain.labels == UNLABELED).any()
    damaged = image.copy()
    damaged[3], damaged[7, :, 40:] = 0, 255
    tifffile.imwrite(tmp_path / "damaged.tif", damaged)
    (source,) = sources = load_sources(_train(str(tmp_path / "damaged.tif"), folder, validate_on=(7,)))
    assert (source.labels[3] == UNLABELED).all()
    assert (source.labels[7, :, 40:] == UNLABELED).all()
    np.testing.assert_array_equal(source.labels[7, :, :40], plain.labels[7, :, :40])
    np.testing.assert_array_equal(source.labels[0], plain.labels[0])
    assert "sections 3, 7: what was lost there counts in no loss and no score" in format_data(sources)


def test_a_section_without_annotation_is_refused(annotated):
    image, _, _, folder = annotated
    for settings in ({"train": (0, 2)}, {"validate_on": (2,)}):
        with pytest.raises(UserError, match=r"train\.data\[0\]: section 2 has no annotation .* annotates 0, 3, 7"):
            load_sources(_train(image, folder, **settings))


def test_one_channel_of_an_image_teaches_inverted_or_not(annotated, tmp_path):
    _, image, _, folder = annotated
    path = str(tmp_path / "channels.tif")
    tifffile.imwrite(path, np.stack([255 - image, image], axis=1), imagej=True, metadata={"axes": "ZCYX"})
    for chosen in ({"channel": 1}, {"channel": 0, "invert": True}):
        (source,) = load_sources(_train(path, folder, **chosen))
        np.testing.assert_array_equal(source.image, image)
        assert source.train_sections == (0, 3, 7)
    with pytest.raises(UserError, match="2 channels"):
        load_sources(_train(path, folder))


def test_an_image_given_as_labels_is_refused(annotated):
    image, _, _, _ = annotated
    with pytest.raises(UserError, match=r"train\.data\[0\]: .*image\.tif holds no labels"):
        load_sources(_train(image, image))


def test_an_outline_teaches_its_object(annotated, tmp_path):
    image, _, label, _ = annotated
    (tmp_path / "ball.roi").write_bytes(rois.encode("ball", 3, list(rois.outlines(label[3] == 2))))
    (source,) = load_sources(_train(image, tmp_path / "ball.roi"))
    assert source.train_sections == (source.train_sections[0],)
    assert source.numbers[source.train_sections[0]] == 3
    np.testing.assert_array_equal(source.labels[source.train_sections[0]] > 0, label[3] == 2)


# --------------------------------------------------------------------------------------------------------------- points


def test_points_teach_balls_of_the_sections_that_are_named(annotated, tmp_path):
    image, _, _, _ = annotated
    (tmp_path / "points.csv").write_text("z,y,x\n2,20,20\n3,20.4,20\n5,70,30\n7,66,74\n")
    settings = {"voxel_size_nm": (50.0, 5.0, 5.0), "radius_nm": 30.0, "validate_on": (7,)}
    (source,) = sources = load_sources(_train(image, tmp_path / "points.csv", **settings))
    assert source.label_kind == "points"
    assert source.train_sections == tuple(range(7))
    assert source.labels.max() == 4  # points in neighboring sections are no one object
    assert set(np.unique(source.labels[2])) == {0, 1}
    assert set(np.unique(source.labels[3])) == {0, 2}
    assert np.count_nonzero(source.labels[5]) == 113  # a disk of 6 voxels' radius
    assert "4 points (z, y, x) are balls of 30 nm radius" in format_data(sources)
    (source,) = load_sources(_train(image, tmp_path / "points.csv", **{**settings, "train": (2, 3)}))
    assert [source.numbers[z] for z in source.train_sections] == [2, 3]
    (tmp_path / "points.csv").write_text("z,y,x\n2,20,20\n3,20,99\n")
    with pytest.raises(UserError, match=r"train\.data\[0\]: row 2 of .* outside of the volume of 8 x 96 x 96"):
        load_sources(_train(image, tmp_path / "points.csv"))


# ------------------------------------------------------------------------------------------------------------ scribbles


@pytest.fixture
def scribbled(annotated, tmp_path):
    """Settings for scribbles on all sections: 2 in objects, 1 beside them, 0 elsewhere."""
    image, _, label, _ = annotated
    scribbles = np.zeros_like(label)
    y, x = np.mgrid[:96, :96]
    for cy, cx in ((20, 20), (24, 70), (70, 30), (66, 74)):
        scribbles[:, (abs(y - cy) < 2) & (abs(x - cx) < 8)] = 2
    scribbles[:, 46:49, 10:90] = scribbles[:, 10:90, 47:50] = 1
    assert (label[scribbles == 2] > 0).all()
    assert not label[scribbles == 1].any()
    tifffile.imwrite(tmp_path / "scribbles.tif", scribbles, photometric="minisblack")
    return {"image": image, "label": str(tmp_path / "scribbles.tif"), "unlabeled": 0, "background": 1}


def test_thin_scribbles_teach_the_mask_and_no_contour(scribbled, tables):
    config = config_of({**tables, "data": [scribbled]}, "out", augment=(), batch=8)
    sources = load_sources(config.train)
    images, targets = annotated_batch(sources, config.train, 0)
    assert set(np.unique(targets[:, 0])) == {0, 1, UNKNOWN}
    assert (targets[:, 0] != UNKNOWN).any(axis=(1, 2)).all()  # each patch shows some
    state = type("State", (), {"network": torch.nn.Conv2d(1, 1, 1)})
    _, aims, weights, _ = _batch_tensors(state, (images, targets), config.train)
    assert set(aims[:, 0].unique().tolist()) == {0, 1}
    known = torch.from_numpy(targets[:, 0]) != UNKNOWN
    assert torch.equal(weights[:, 0] > 0, known)
    assert (weights[:, 1] > 0).sum() < 0.1 * known.sum()  # their borders are none of objects
    _, section_weights = section_targets(sources[0], 0, config.train)
    assert torch.equal(section_weights[0] > 0, torch.from_numpy(sources[0].labels[0] != UNLABELED))
    assert section_weights[1].sum() < 0.1 * section_weights[0].sum()


class Splits(torch.nn.Module):
    """Says 1 where the gray value is high, or wherever ``wrong`` (y, x) is."""

    def __init__(self, source, wrong):
        super().__init__()
        self.level, self.wrong = (130 - source.mean) / source.std, torch.from_numpy(wrong)
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, images):
        mask = torch.where((images[:, 1:2] > self.level) | self.wrong, 9.0, -9.0)
        return torch.cat([mask, torch.full_like(mask, -9.0)], 1) * self.scale


def test_what_nobody_annotated_counts_in_no_score(scribbled, tables):
    config = config_of({**tables, "data": [{**scribbled, "train": ["0:6"], "validate_on": ["6:8"]}]}, "out")
    (source,) = load_sources(config.train)
    assert source.label_kind == "scribbles"
    unknown = (source.labels[6:8] == UNLABELED).all(axis=0)
    scores = [validate(Splits(source, wrong), [source], config)["all"] for wrong in (unknown, ~unknown)]
    assert scores[0]["iou"] > 0.98
    assert scores[1]["iou"] < 0.5
    chosen = calibrate(Splits(source, unknown), [source], config)
    assert chosen.iou > 0.98
    assert (chosen.pq, chosen.seed, chosen.min_voxels) == (None, config.stitch.seed, config.stitch.min_voxels)


def test_a_mask_whose_background_is_255_is_turned(annotated):
    _, _, label, _ = annotated
    inverted = np.where(label > 0, 0, 255).astype(np.uint8)
    labels, note = normalize_labels(inverted, background=255)
    assert note["kind"] == "mask"
    np.testing.assert_array_equal(labels > 0, label > 0)
    with pytest.raises(UserError, match="no voxel of background = 7"):
        normalize_labels(inverted, background=7)


def test_a_background_that_is_unlabeled_too_is_refused():
    with pytest.raises(ValidationError, match="give background the value that was drawn outside"):
        TrainData(image="em.tif", label="scribbles.tif", unlabeled=0)
