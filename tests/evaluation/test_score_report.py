"""The page about labels held against the truth: every object has a verdict and a place, also of a cut-out."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile

from tests.evaluation.test_run_report import Page
from volseg.box import Box
from volseg.errors import UserError
from volseg.evaluation.contingency import Contingency
from volseg.evaluation.evaluate import evaluate
from volseg.evaluation.metrics import score_instances
from volseg.evaluation.object_scores import score_objects
from volseg.evaluation.voxel_scores import NEAR_VOXELS, score_borders, score_reliability


@pytest.fixture
def labels():
    """Truth and prediction: an object found, one split, two merged, one missed, and one of nothing."""
    truth, pred = np.zeros((2, 12, 40, 60), np.uint32)
    truth[2:9, 2:10, 2:10], pred[2:9, 2:10, 2:10] = 1, 11
    truth[2:9, 2:10, 20:40], pred[2:9, 2:10, 20:30], pred[2:9, 2:10, 30:40] = 2, 12, 13
    truth[2:9, 20:30, 2:10], truth[2:9, 20:30, 10:18], pred[2:9, 20:30, 2:18] = 3, 4, 14
    truth[2:9, 20:30, 30:36] = 5
    pred[1:4, 33:38, 50:58] = 15
    return truth, pred


def test_each_object_has_the_verdict_that_the_scores_count(labels):
    table = Contingency.from_labels(*labels)
    scores, found = score_instances(table), score_objects(table)
    count = Counter(each.verdict for each in found)
    assert (scores.missed, scores.spurious, scores.split) == (count["missed"], count["spurious"], count["split"])
    assert [(each.verdict, each.truth, each.pred, each.others) for each in found] == [
        ("missed", 5, 0, ()), ("spurious", 0, 15, ()), ("split", 2, 12, (13,)), ("merged", 3, 14, (4,)),
        ("merged", 4, 14, (3,)), ("matched", 1, 11, ()),
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_verdicts_and_scores_agree_on_anything(seed):
    rng = np.random.default_rng(seed)
    table = Contingency.from_labels(*rng.integers(0, 9, (2, 8, 8, 8)) * (rng.random((2, 8, 8, 8)) < 0.4))
    scores, count = score_instances(table), Counter(each.verdict for each in score_objects(table))
    assert sum(count.values()) - count["spurious"] == scores.truth_objects
    assert (scores.missed, scores.spurious) == (count["missed"], count["spurious"])


def test_a_report_shows_what_is_wrong_and_where(labels, tmp_path):
    truth, pred = labels
    image = tmp_path / "em.tif"
    tifffile.imwrite(image, np.random.default_rng(0).integers(0, 255, truth.shape, dtype=np.uint8))
    out = tmp_path / "page.html"
    scores = evaluate(pred, truth, report=out, image=image)
    text = out.read_text()
    page = Page(text)
    assert not page.open
    assert page.heads == ["Where voxels are wrong", "Objects that are wrong", "Objects", "Scores"]
    assert sum(source.startswith("data:image/jpeg") for source in page.sources) == 5
    assert scores.report == str(out)
    assert [each.box for each in scores.objects if each.truth == 2] == [Box((2, 2, 20), (9, 10, 40))]
    for each in scores.objects:  # the place under each picture lies in the object
        (where,) = [
            head for head in page.text if f"truth {each.truth or '-'}, predicted {each.pred or '-'}" in head
        ] or [""]
        if where:
            x, y, z = map(int, where.rpartition(" at ")[2].split(", "))
            assert (truth if each.truth else pred)[z, y, x] == (each.truth or each.pred)


def test_a_cut_out_is_reported_in_the_frame_of_the_whole(labels, tmp_path):
    truth, pred = labels
    box = Box((1, 0, 0), (10, 40, 45))
    whole = evaluate(pred, truth, box=box, report=tmp_path / "a.html")
    part = evaluate(
        pred[box.slices], truth, box=box, report=tmp_path / "b.html", image=truth[box.slices].astype(np.uint8)
    )
    assert whole.objects == part.objects
    assert whole.borders == part.borders


def test_a_run_tells_how_often_its_probabilities_are_right(image, reference, tmp_path):
    scores = evaluate(reference, f"{image}/labels/truth", report=tmp_path / "page.html")
    page = Page(Path(scores.report).read_text())
    assert "How sure, and how often right" in page.heads
    assert sum(scores.reliability.voxels) == scores.box.voxels
    assert 0 <= scores.reliability.error < 0.2
    assert scores.to_json()["reliability"]["error"] == scores.reliability.error
    assert "calibration_error" in str(scores)


@pytest.mark.parametrize("block", [(12, 40, 60), (3, 7, 60), (12, 40, 11)])
def test_how_it_was_cut_changes_nothing(labels, block):
    truth, pred = labels
    whole = Box.from_shape(truth.shape)
    probability = np.random.default_rng(0).integers(0, 256, truth.shape, dtype=np.uint8)
    starts = [range(0, n, b) for n, b in zip(truth.shape, block, strict=True)]
    boxes = [
        Box((z, y, x), (z + block[0], y + block[1], x + block[2])).intersect(whole)
        for z in starts[0] for y in starts[1] for x in starts[2]
    ]  # fmt: skip
    reads = [lambda box, a=a: a[box.slices] for a in (truth, pred, probability)]
    assert score_borders(*reads[:2], boxes, whole) == score_borders(*reads[:2], [whole], whole)
    cut, uncut = (score_reliability(reads[0], reads[2], parts) for parts in (boxes, [whole]))
    assert cut == uncut


def test_near_is_as_near_as_it_says():
    truth, pred = np.zeros((2, 1, 1, 40), int)
    truth[..., 20:] = 1
    pred[..., 20 - NEAR_VOXELS :] = 1  # all that is near, on the outside
    scores = score_borders(*(lambda box, a=a: a[box.slices] for a in (truth, pred)), [Box.from_shape((1, 1, 40))],
                           Box.from_shape((1, 1, 40)))  # fmt: skip
    assert (scores.near_iou, scores.beyond_iou, scores.wrong_near) == (0.5, 1.0, 1.0)


def test_an_image_of_another_shape_and_a_place_that_cannot_be_written_are_refused(labels, tmp_path):
    truth, pred = labels
    with pytest.raises(UserError, match="the image has shape"):
        evaluate(pred, truth, report=tmp_path / "a.html", image=np.zeros((3, 40, 60), np.uint8))
    with pytest.raises(UserError, match="give another --report"):
        evaluate(pred, truth, report=tmp_path)
