"""Scores of real files: boxes, masks, runs, refusals; how the files are chunked does not matter."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import zarr
from scipy import ndimage

from volseg.box import Box
from volseg.errors import UserError
from volseg.evaluation.contingency import Contingency
from volseg.evaluation.evaluate import COMPONENTS, STORED, _block, evaluate
from volseg.evaluation.metrics import score_foreground, score_instances, score_touching, touching_pairs
from volseg.io import arrays

SHAPE = (8, 24, 32)


def labels(seed=0):
    """Nine objects in a grid, ids 3, 6, ..., 27, uint16; the same for the same seed, shifted a little by it."""
    volume = np.zeros(SHAPE, np.uint16)
    for i in range(9):
        y, x = 8 * (i // 3) + seed % 2, 10 * (i % 3) + seed % 3
        volume[1:7, y : y + 6, x : x + 7] = 3 * (i + 1)
    return volume


def write_tif(path, array):
    tifffile.imwrite(path, array, photometric="minisblack")
    return str(path)


def write_zarr(path, array, chunk):
    zarr.create_array(str(path), data=array, chunks=chunk)
    return str(path)


def write_run(path, array):
    """A run folder as the pipeline leaves it, as far as its labels go."""
    arrays.create_group(str(path))
    arrays.create_array(str(path), "labels/instances/0", shape=SHAPE, dtype="uint32", chunk=SHAPE, shard=SHAPE)
    arrays.open_array(str(path), "labels/instances/0")[:] = array
    return str(path)


@pytest.fixture
def truth(tmp_path):
    return write_tif(tmp_path / "truth.tif", labels())


def test_a_volume_against_itself_is_perfect(truth):
    scores = evaluate(truth, truth)
    assert scores.foreground.iou == scores.instances.f1 == scores.instances.pq == 1.0
    assert scores.instances.truth_objects == scores.instances.pred_objects == 9
    assert (scores.pred_instances, scores.truth_instances) == (STORED, STORED)
    assert (str(scores.box), scores.box.voxels) == ("0:8,0:24,0:32", labels().size)


@pytest.mark.parametrize("chunk", [SHAPE, (8, 8, 8), (3, 24, 5), (1, 7, 32)])
def test_chunks_and_formats_do_not_change_the_scores(tmp_path, truth, chunk):
    pred = write_zarr(tmp_path / "pred.zarr", labels(5), chunk)
    scores = evaluate(pred, truth)
    counts = Contingency.from_labels(labels(), labels(5))
    assert scores.foreground == score_foreground(counts)
    assert scores.instances == score_instances(counts)


def test_touching_objects_of_an_instance_truth_are_scored_in_any_blocks(tmp_path, monkeypatch):
    both = labels()
    both[:, 6:8] = both[:, 5:6]  # those of the first row reach the ones below
    truth, pred = write_tif(tmp_path / "truth.tif", both), write_tif(tmp_path / "pred.tif", labels(5))
    scores = evaluate(pred, truth).touching
    assert scores == score_touching(Contingency.from_labels(both, labels(5)), touching_pairs(both))
    assert scores.pairs == 3
    monkeypatch.setattr("volseg.evaluation.evaluate.BLOCK_VOXELS", 100)
    assert evaluate(pred, truth).touching == scores
    assert evaluate(pred, write_zarr(tmp_path / "mask.zarr", both > 0, SHAPE)).touching is None


def test_small_blocks_do_not_change_the_scores(tmp_path, truth, monkeypatch):
    pred = write_zarr(tmp_path / "pred.zarr", labels(5) > 0, (3, 24, 5))
    whole = evaluate(pred, truth)
    monkeypatch.setattr("volseg.evaluation.evaluate.BLOCK_VOXELS", 100)
    assert evaluate(pred, truth) == whole


@pytest.mark.parametrize("voxels", [1, 7, 1000, 10**9])
def test_a_block_keeps_to_its_voxels(voxels):
    block = _block((50, 400, 300), [(1, 400, 300), (32, 64, 64)], voxels)
    assert np.prod(block) <= voxels
    assert all(1 <= b <= n for b, n in zip(block, (50, 400, 300), strict=True))


def test_a_box_cuts_both_volumes(tmp_path, truth):
    pred = write_zarr(tmp_path / "pred.zarr", labels(5), (4, 8, 8))
    box = Box((2, 3, 5), (7, 20, 31))
    scores = evaluate(pred, truth, box=box, iou=0.25)
    assert scores.instances == score_instances(
        Contingency.from_labels(labels()[box.slices], labels(5)[box.slices]), 0.25
    )
    assert scores.box == box


def test_a_cut_out_lies_where_the_box_says(tmp_path, truth):
    box = Box((2, 3, 5), (7, 20, 31))
    part = write_tif(tmp_path / "part.tif", labels()[box.slices])
    for scores in (evaluate(part, truth, box=box), evaluate(truth, part, box=box)):
        assert scores.foreground.iou == scores.instances.pq == 1.0
        assert scores.box.voxels == box.voxels


@pytest.mark.parametrize("values", [(0, 255), (0, 1), (False, True), (0, 40_000)])
def test_the_objects_of_a_mask_are_its_components(tmp_path, truth, values):
    mask = np.asarray(values)[(labels() > 0).astype(int)]
    dtype = bool if mask.dtype == bool else np.min_scalar_type(mask.max())
    pred = write_zarr(tmp_path / "mask.zarr", mask.astype(dtype), (4, 8, 8))
    scores = evaluate(pred, truth)
    assert scores.pred_instances == COMPONENTS == "26-connected components of a binary volume"
    assert scores.truth_instances == STORED
    assert scores.instances.pred_objects == 9
    assert scores.instances.pq == 1.0


def test_a_mask_of_mixed_files_and_a_soft_brush_is_one_mask(tmp_path, truth):
    mixed = np.where(np.arange(8)[:, None, None] % 3, 255, 1) * (labels() > 0)
    mixed[3, 2, 2:5] = 7, 100, 254  # inside the first object
    scores = evaluate(truth, write_zarr(tmp_path / "mixed.zarr", mixed.astype(np.uint8), SHAPE))
    assert scores.truth_instances == COMPONENTS
    assert scores.instances.pq == 1.0


def test_labels_up_to_255_stay_labels(tmp_path, truth):
    ids = np.where(labels() == 3, 255, np.where(labels() == 6, 1, labels())).astype(np.uint8)
    scores = evaluate(truth, write_zarr(tmp_path / "ids.zarr", ids, SHAPE))
    assert scores.truth_instances == STORED
    assert scores.instances.pq == 1.0


def test_voxels_that_touch_at_a_corner_are_one_object(tmp_path):
    mask = np.zeros((2, 2, 2), np.uint8)
    mask[0, 0, 0] = mask[1, 1, 1] = 255
    path = write_zarr(tmp_path / "corner.zarr", mask, (1, 1, 1))
    assert evaluate(path, path).instances.truth_objects == 1


def test_a_mask_and_a_mask_both_give_objects(tmp_path):
    path = write_tif(tmp_path / "mask.tif", np.where(labels() > 0, 255, 0).astype(np.uint8))
    scores = evaluate(path, path)
    assert scores.pred_instances == scores.truth_instances == COMPONENTS
    assert scores.instances.matched == 9


def test_of_a_run_its_instances_are_taken(tmp_path, truth):
    scores = evaluate(write_run(tmp_path / "x.volseg.zarr", labels()), truth)
    assert scores.instances.pq == 1.0
    assert scores.pred_instances == STORED


def test_one_instance_in_two_pieces_stays_one(tmp_path, truth):
    run = write_run(tmp_path / "x.volseg.zarr", np.where(labels() > 0, 3, 0))
    for path in (run, run + "/labels/instances/0"):
        scores = evaluate(path, truth)
        assert scores.pred_instances == STORED
        assert (scores.instances.pred_objects, scores.instances.merged) == (1, 1)


def test_a_mask_in_a_folder_called_labels_is_a_mask(tmp_path, truth):
    (tmp_path / "labels").mkdir()
    mask = write_tif(tmp_path / "labels" / "mask.tif", (labels() > 0).astype(np.uint8))
    assert evaluate(mask, truth).pred_instances == COMPONENTS


def test_an_empty_pred_is_scored(tmp_path, truth):
    scores = evaluate(write_zarr(tmp_path / "none.zarr", np.zeros(SHAPE, np.uint8), SHAPE), truth)
    assert (scores.foreground.iou, scores.instances.missed) == (0.0, 9)


# --- refusals


def test_unequal_shapes_are_refused_with_both(tmp_path, truth):
    part = write_tif(tmp_path / "part.tif", labels()[:5])
    with pytest.raises(UserError, match=r"part.tif has shape \(5, 24, 32\).*truth.tif \(8, 24, 32\).*--box"):
        evaluate(part, truth)
    with pytest.raises(UserError, match="fits neither"):
        evaluate(part, truth, box=Box((0, 0, 0), (4, 24, 32)))


@pytest.mark.parametrize("box", [Box((0, 0, 0), (9, 24, 32)), Box((2, 2, 2), (2, 5, 5)), Box((-1, 0, 0), (4, 4, 4))])
def test_a_box_outside_the_volume_is_refused(truth, box):
    with pytest.raises(UserError, match=r"leaves the volume of shape \(8, 24, 32\)"):
        evaluate(truth, truth, box=box)


def test_a_cut_out_cannot_lie_outside_the_whole(tmp_path, truth):
    part = write_tif(tmp_path / "part.tif", labels()[:5])
    with pytest.raises(UserError, match="leaves the volume"):
        evaluate(part, truth, box=Box((4, 0, 0), (9, 24, 32)))


def test_probabilities_are_refused_with_advice(tmp_path, truth):
    floats = write_zarr(tmp_path / "probability.zarr", labels().astype(np.float32), SHAPE)
    with pytest.raises(UserError, match=r"probability.zarr holds float32.*volseg segment"):
        evaluate(floats, truth)


def test_negative_labels_are_refused_by_name(tmp_path, truth):
    ids = labels().astype(np.int32)
    ids[4, 4, 4] = -1
    with pytest.raises(UserError, match=r"minus.zarr holds the negative label -1"):
        evaluate(write_zarr(tmp_path / "minus.zarr", ids, SHAPE), truth)


def test_a_run_without_labels_is_refused(tmp_path, truth):
    arrays.create_group(str(tmp_path / "x.volseg.zarr"))
    with pytest.raises(UserError, match="has no labels/instances/0 yet"):
        evaluate(str(tmp_path / "x.volseg.zarr"), truth)


def test_a_wrong_threshold_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match=r"iou 1\.5"):
        evaluate(str(tmp_path / "absent.tif"), str(tmp_path / "absent.tif"), iou=1.5)


# --- the report


def test_the_report_is_two_columns_and_its_json_is_plain(truth):
    scores = evaluate(truth, truth)
    plain = scores.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert str(scores) in scores._repr_html_()
    lines = str(scores).splitlines()
    assert len(lines) == 6 + sum(1 + len(plain[part]) for part in ("foreground", "instances", "touching"))
    columns = [line.split(maxsplit=1) for line in lines]
    for row in (["truth", truth], ["iou", "1.0000"], ["truth_objects", "9"], ["foreground"], ["instances"]):
        assert row in columns
    assert len({line.index(row[1], len(row[0])) for line, row in zip(lines, columns, strict=True) if row[1:]}) == 1


def test_boxes_are_given_as_text_too_and_volumes_as_objects_or_arrays(tmp_path, truth):
    box = Box((2, 3, 5), (7, 20, 31))
    assert evaluate(Path(truth), SimpleNamespace(path=truth), box=str(box)) == evaluate(truth, truth, box=box)
    arrays_alone = evaluate(labels(5), labels(), box=box).to_json()
    files_alone = evaluate(write_zarr(tmp_path / "pred.zarr", labels(5), (4, 8, 8)), truth, box=box).to_json()
    assert arrays_alone.pop("pred") == arrays_alone.pop("truth") == "the numpy array"
    assert arrays_alone == {name: value for name, value in files_alone.items() if name not in ("pred", "truth")}
    with pytest.raises(UserError, match="not of the form z0:z1"):
        evaluate(truth, truth, box="2:7")


# --- real data


def test_the_published_truth_is_a_mask(shared_data):
    path = str(shared_data / "epfl" / "training_groundtruth.tif")
    box = Box((60, 100, 0), (76, 768, 1024))
    scores = evaluate(path, path, box=box)
    part = tifffile.imread(path, key=range(60, 76))[:, 100:]
    assert scores.truth_instances == COMPONENTS
    assert scores.instances.truth_objects == ndimage.label(part, np.ones((3, 3, 3)))[1] > 1
    assert scores.foreground.true_positive_voxels == np.count_nonzero(part)
    assert scores.instances.pq == scores.foreground.iou == 1.0


def test_slices_of_several_bit_depths_are_one_mask(shared_data):
    path = str(shared_data / "vnc" / "mitochondria")
    scores = evaluate(path, path, box=Box((0, 0, 0), (4, 1024, 1024)))
    assert scores.truth_instances == COMPONENTS
    assert 10 < scores.instances.truth_objects < 100


def test_an_image_given_for_labels_is_refused(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (2, 64, 64)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "image.tif", image, photometric="minisblack")
    with pytest.raises(
        UserError, match=r"image\.tif is neither labels nor a mask: \d\d % of its voxels.*volseg segment"
    ):
        evaluate(str(tmp_path / "image.tif"), str(tmp_path / "image.tif"))


@pytest.mark.parametrize("channel", [0, 1])
def test_stored_probabilities_given_for_labels_are_refused(reference, tmp_path, channel):
    map_of = write_tif(tmp_path / "map.tif", arrays.open_array(reference, "0")[channel])
    with pytest.raises(UserError, match="a probability map"):
        evaluate(map_of, map_of)


def test_many_small_labels_and_points_are_labels(tmp_path):
    """Objects of 2 x 2 voxels that touch, as many as uint8 can tell, and points of one voxel each."""
    dense = np.random.default_rng(0).integers(1, 256, (3, 48, 48)).astype(np.uint8).repeat(2, 1).repeat(2, 2)
    points = np.where(np.random.default_rng(1).random((3, 96, 96)) < 0.05, dense, 0).astype(np.uint8)
    for name, ids in (("dense", dense), ("points", points)):
        path = write_tif(tmp_path / f"{name}.tif", ids)
        assert evaluate(path, path).foreground.iou == 1.0
