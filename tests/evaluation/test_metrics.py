"""Scores against hand-worked numbers, other people's implementations, and the promise that blocks do not matter."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations
from math import log2

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment
from skimage.metrics import adapted_rand_error, variation_of_information

from volseg.box import Blocks
from volseg.evaluation.contingency import SLAB_VOXELS, Contingency
from volseg.evaluation.metrics import (
    TOUCHING_DISTANCE,
    score_foreground,
    score_instances,
    score_touching,
    touching_pairs,
)

unhurried = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
SHAPES = hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=6)


@st.composite
def label_pairs(draw, top=4):
    """Two label volumes of one shape; small ids, so that objects overlap."""
    shape = draw(SHAPES)
    volume = hnp.arrays(np.uint32, shape, elements=st.integers(0, top))
    return draw(volume), draw(volume)


def random_pair(seed, shape=(48, 48), cell=8, ids=12):
    """Two 2-D label images of blocky objects that overlap a lot; the same for the same seed."""
    rng = np.random.default_rng(seed)
    grid = rng.integers(0, ids, tuple(n // cell for n in shape))
    truth = np.kron(grid, np.ones((cell, cell), int))
    moved = truth.copy()
    moved[: shape[0] // 2] = np.roll(truth, (3, 3), (0, 1))[: shape[0] // 2]
    return truth, np.where(rng.random(shape) < 0.1, rng.integers(0, ids, shape), moved)


def scores(truth, pred, iou=0.5):
    return score_instances(Contingency.from_labels(np.asarray(truth), np.asarray(pred)), iou)


def dense_iou(truth, pred):
    """IoU of every truth object (rows) with every pred object (columns), by comparing masks."""
    rows, columns = [i for i in np.unique(truth) if i], [j for j in np.unique(pred) if j]
    pairs = [[(truth == i, pred == j) for j in columns] for i in rows]
    return np.array([[(t & p).sum() / (t | p).sum() for t, p in row] for row in pairs])


# --- the table


@unhurried
@given(label_pairs())
def test_the_table_counts_every_pair(pair):
    truth, pred = pair
    table = Contingency.from_labels(truth, pred)
    expected = Counter(zip(truth.ravel().tolist(), pred.ravel().tolist(), strict=True))
    result = list(zip(table.truth.tolist(), table.pred.tolist(), strict=True))
    assert result == sorted(expected)
    assert table.counts.tolist() == [expected[key] for key in result]


@unhurried
@given(label_pairs(), st.data())
def test_cutting_and_order_do_not_change_the_table(pair, data):
    truth, pred = pair
    block = data.draw(st.tuples(*(st.integers(1, n) for n in truth.shape)))
    boxes = data.draw(st.permutations(list(Blocks(truth.shape, block))))
    parts = [Contingency.from_labels(truth[box.slices], pred[box.slices]) for box in boxes]
    assert sum(parts, Contingency.empty()) == Contingency.from_labels(truth, pred)


def test_runs_are_counted_across_slabs():
    truth = np.repeat([0, 3, 5], SLAB_VOXELS)[:-7]
    table = Contingency.from_labels(truth, np.roll(truth, 1000))
    assert table.truth.tolist() == [0, 0, 3, 3, 5, 5]
    assert table.pred.tolist() == [0, 5, 0, 3, 3, 5]
    assert table.counts.tolist() == [SLAB_VOXELS - 1000, 1000, 1000, SLAB_VOXELS - 1000, 1000, SLAB_VOXELS - 1007]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64, np.uint64])
def test_any_whole_number_dtype_gives_the_same_table(dtype):
    truth, pred = np.array([[0, 1], [1, 1]]), np.array([[0, 0], [1, 1]])
    assert Contingency.from_labels(truth.astype(dtype), pred.astype(np.uint32)) == Contingency.from_labels(truth, pred)


def test_ids_beyond_two_to_the_63_stay_apart():
    high = np.array([2**64 - 1, 2**64 - 2, 2**63, 0], np.uint64)
    table = Contingency.from_labels(high, high)
    assert table.truth.tolist() == [0, 2**63, 2**64 - 2, 2**64 - 1]
    assert score_instances(table).matched == 3


def test_arrays_need_not_be_contiguous():
    truth, pred = random_pair(0)
    assert Contingency.from_labels(truth.T, pred.T) == Contingency.from_labels(truth, pred)


def test_no_voxels_give_the_empty_table():
    nothing = np.zeros((0, 4, 4), np.uint8)
    assert Contingency.from_labels(nothing, nothing) == Contingency.empty()
    assert Contingency.empty() != Contingency.from_labels(np.zeros(1, int), np.zeros(1, int))


@pytest.mark.parametrize(
    ("truth", "pred", "words"),
    [
        (np.zeros(3, int), np.zeros(4, int), r"\(3,\).*\(4,\)"),
        (np.zeros(3), np.zeros(3, int), "truth has dtype float64"),
        (np.zeros(3, int), np.array([0, -1, 2]), "pred holds the negative label -1"),
    ],
)
def test_what_is_no_pair_of_label_arrays_is_refused(truth, pred, words):
    with pytest.raises(ValueError, match=words):
        Contingency.from_labels(truth, pred)


# --- a case worked by hand

# Columns are voxels of one line of 20. Truth 1: voxels 0-5 (6), truth 2: 8-11 (4), truth 3: 14-15 (2), truth 4: 17 (1).
# Pred 7: voxels 0-4 (5), inside truth 1. Pred 8: 8-9 (2) and pred 9: 10-12 (3) share truth 2. Pred 6: 16-18 (3).
TRUTH = np.array([1, 1, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 0, 0, 3, 3, 0, 4, 0, 0])
PRED = np.array([7, 7, 7, 7, 7, 0, 0, 0, 8, 8, 9, 9, 9, 0, 0, 0, 6, 6, 6, 0])


def test_foreground_by_hand():
    # TP: 5 + 4 + 0 + 1 = 10. FP: voxels 12, 16, 18 = 3. FN: voxels 5, 14, 15 = 3. TN: 20 - 16 = 4.
    result = score_foreground(Contingency.from_labels(TRUTH, PRED))
    assert result.to_json() == {
        "iou": 10 / 16,
        "dice": 20 / 26,
        "accuracy": 14 / 20,
        "precision": 10 / 13,
        "recall": 10 / 13,
        "true_positive_voxels": 10,
        "false_positive_voxels": 3,
        "false_negative_voxels": 3,
        "true_negative_voxels": 4,
    }


def test_instances_by_hand():
    # IoU: (1,7) 5/6; (2,8) 2/4, not above 0.5; (2,9) 2/5; (4,6) 1/3. One match: TP 1, FP 3, FN 3.
    # At 0.75 the same match, so SA50 = SA75 = 1/7. Truth 2 is split (8 and 9 hold half each); truth 3 is missed.
    result = scores(TRUTH, PRED)
    assert {key: getattr(result, key) for key in ("matched", "truth_objects", "pred_objects")} == {
        "matched": 1,
        "truth_objects": 4,
        "pred_objects": 4,
    }
    assert {key: getattr(result, key) for key in ("split", "merged", "missed", "spurious")} == {
        "split": 1,
        "merged": 0,
        "missed": 1,
        "spurious": 0,
    }
    assert result.precision == result.recall == result.f1 == result.rq == 1 / 4
    assert result.sq == 5 / 6
    assert result.pq == pytest.approx(5 / 24)
    assert result.sa50 == result.sa75 == 1 / 7


def test_partitions_by_hand():
    # Over the 13 voxels of the truth the pairs are (1,7) 5, (1,0) 1, (2,8) 2, (2,9) 2, (3,0) 2, (4,6) 1.
    # Truth parts 6, 4, 2, 1; pred parts 7: 5, 0: 3, 8: 2, 9: 2, 6: 1.
    # H(pred|truth) = [5 log 6/5 + log 6 + 2 log 2 + 2 log 2] / 13; H(truth|pred) = [log 3 + 2 log 3/2] / 13.
    # Ordered pairs of voxels: together 20 + 2 + 2 + 2 = 26; truth 30 + 12 + 2 = 44; pred 20 + 6 + 2 + 2 = 30.
    result = scores(TRUTH, PRED)
    assert result.voi_split == pytest.approx((5 * log2(6 / 5) + log2(6) + 4) / 13)
    assert result.voi_merge == pytest.approx((log2(3) + 2 * log2(3 / 2)) / 13)
    assert result.rand_precision == pytest.approx(26 / 30)
    assert result.rand_recall == pytest.approx(26 / 44)
    assert result.rand_error == pytest.approx(1 - 2 * 26 / 74)


def test_a_merger_and_a_spurious_object_are_counted():
    # Pred 5 holds all of truth 1 and half of truth 2; pred 6 lies in the background.
    result = scores([1, 1, 2, 2, 0, 0, 0], [5, 5, 5, 0, 0, 6, 6])
    assert {key: getattr(result, key) for key in ("split", "merged", "missed", "spurious")} == {
        "split": 0,
        "merged": 1,
        "missed": 0,
        "spurious": 1,
    }
    assert result.matched == 1  # (1, 5): 2/3


def test_exactly_a_tenth_makes_no_split_no_merger_and_no_miss():
    truth = np.repeat([1, 2], 10)
    pred = np.repeat([5, 6, 5, 6], [9, 1, 1, 9])  # each holds 9 voxels of one object and 1 of the other
    result = scores(truth, pred)
    assert (result.split, result.merged) == (0, 0)
    only = scores(truth, np.repeat([5, 0, 6], [1, 18, 1]))
    assert (only.missed, only.spurious) == (0, 0)
    more = scores(truth, np.repeat([5, 6, 5, 6], [8, 2, 2, 8]))
    assert (more.split, more.merged) == (2, 2)


def test_several_objects_together_can_cover_one():
    # Twenty preds of one voxel cover truth 1 wholly: none holds more than a tenth, yet it is not missed.
    result = scores(np.ones(20, int), np.arange(1, 21))
    assert (result.split, result.missed, result.spurious) == (0, 0, 0)


# --- matching


def test_an_iou_of_exactly_the_threshold_is_no_match():
    assert scores([1, 1], [7, 8]).matched == 0  # 1/2 twice: a match would not be unique
    assert scores([1, 1], [7, 8], iou=0.49).matched == 1


def test_low_thresholds_match_as_many_objects_as_possible():
    # IoU: (1,7) 4/8, (1,8) 2/6, (2,7) 2/6. Taking the best pair first leaves one match; crossing over gives two.
    truth, pred = [1] * 6 + [2] * 2, [7] * 4 + [8] * 2 + [7] * 2
    result = scores(truth, pred, iou=0.2)
    assert result.matched == 2
    assert result.sq == pytest.approx(2 / 6)


@unhurried
@given(label_pairs(top=5), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.6]))
def test_matching_is_the_best_assignment(pair, threshold):
    truth, pred = pair
    result = scores(truth, pred, iou=threshold)
    iou = dense_iou(truth, pred)
    if not iou.size:
        assert result.matched == 0
        return
    gain = np.where(iou > threshold, 100 + iou, 0.0)
    rows, columns = linear_sum_assignment(gain, maximize=True)
    best = iou[rows, columns][iou[rows, columns] > threshold]
    assert result.matched == best.size
    assert result.sq * result.matched == pytest.approx(best.sum())


@pytest.mark.parametrize("iou", [-0.1, 1.0, 50])
def test_a_threshold_that_nothing_can_pass_is_refused(iou):
    with pytest.raises(ValueError, match="0 <= iou < 1"):
        scores([1], [1], iou=iou)


# --- against other implementations


@pytest.mark.parametrize("seed", range(6))
def test_partitions_agree_with_skimage(seed):
    truth, pred = random_pair(seed)
    result = scores(truth, pred)
    split, merge = variation_of_information(truth, pred, ignore_labels=(0,))
    error, first, second = adapted_rand_error(truth, pred)
    assert result.voi_split == pytest.approx(split, rel=1e-12)
    assert result.voi_merge == pytest.approx(merge, rel=1e-12)
    assert result.rand_error == pytest.approx(error, rel=1e-12)
    assert (result.rand_recall, result.rand_precision) == pytest.approx((first, second), rel=1e-12)  # issue 6485


@pytest.mark.parametrize("seed", range(3))
def test_foreground_agrees_with_torchmetrics(seed):
    from torchmetrics import classification  # 3 s, which no other process of the tests needs to spend

    truth, pred = random_pair(seed, ids=3)
    result = score_foreground(Contingency.from_labels(truth, pred))
    measures = {
        "iou": classification.BinaryJaccardIndex(),
        "dice": classification.BinaryF1Score(),
        "accuracy": classification.BinaryAccuracy(),
        "precision": classification.BinaryPrecision(),
        "recall": classification.BinaryRecall(),
    }
    for name, measure in measures.items():
        assert getattr(result, name) == pytest.approx(
            measure(torch.tensor(pred > 0), torch.tensor(truth > 0)).item(), rel=1e-6
        )


def colored(labels):
    """Labels as torchmetrics wants them: (1, y, x, 2) of category (1 for objects, 0 for background) and id."""
    return torch.tensor(np.stack([labels > 0, labels], axis=-1).astype(np.int64))[None]


@pytest.mark.parametrize("seed", range(6))
def test_panoptic_quality_agrees_with_torchmetrics(seed):
    from torchmetrics.detection import PanopticQuality

    truth, pred = random_pair(seed, ids=30)
    measure = PanopticQuality(things={1}, stuffs={0}, return_sq_and_rq=True, return_per_class=True)
    expected = measure(colored(pred), colored(truth))[0].tolist()  # things first
    result = scores(truth, pred)
    assert 0 < result.matched < result.truth_objects
    assert [result.pq, result.sq, result.rq] == pytest.approx(expected, rel=1e-6)  # float32


# --- what is true of every pair


@unhurried
@given(label_pairs())
def test_a_volume_against_itself_is_perfect(pair):
    labels, _ = pair
    result, voxels = scores(labels, labels), score_foreground(Contingency.from_labels(labels, labels))
    for name in ("precision", "recall", "f1", "pq", "sq", "rq", "sa50", "sa75", "rand_precision", "rand_recall"):
        assert getattr(result, name) == 1.0
    for name in ("voi_split", "voi_merge", "rand_error", "split", "merged", "missed", "spurious"):
        assert getattr(result, name) == 0
    assert result.matched == result.truth_objects == np.unique(labels[labels > 0]).size
    assert all(getattr(voxels, name) == 1.0 for name in ("iou", "dice", "accuracy", "precision", "recall"))


@unhurried
@given(label_pairs())
def test_names_of_objects_do_not_matter(pair):
    truth, pred = pair
    renamed = scores(np.where(truth, 9 - truth, 0), np.where(pred, 1000 + pred, 0))
    assert renamed.to_json() == pytest.approx(scores(truth, pred).to_json(), abs=1e-12)


@unhurried
@given(label_pairs())
def test_scores_are_plain_python_and_finite(pair):
    table = Contingency.from_labels(*pair)
    result = {**score_foreground(table).to_json(), **score_instances(table).to_json()}
    assert {type(value) for value in result.values()} <= {int, float}
    json.dumps(result, allow_nan=False)


# --- nothing there


def test_nothing_against_nothing_is_perfect():
    empty = np.zeros((2, 3, 4), np.uint8)
    assert score_foreground(Contingency.from_labels(empty, empty)).iou == 1.0
    result = scores(empty, empty)
    assert (result.f1, result.pq, result.sq, result.sa50, result.voi_split) == (1.0, 1.0, 1.0, 1.0, 0.0)


def test_a_pred_without_objects_finds_nothing_but_claims_nothing_wrong():
    table = Contingency.from_labels(np.array([0, 1, 1]), np.array([0, 0, 0]))
    voxels, result = score_foreground(table), score_instances(table)
    assert (voxels.iou, voxels.precision, voxels.recall) == (0.0, 1.0, 0.0)
    assert (result.precision, result.recall, result.f1, result.pq, result.sq) == (1.0, 0.0, 0.0, 0.0, 0.0)
    assert (result.missed, result.spurious) == (1, 0)


def test_objects_where_the_truth_has_none_are_all_wrong():
    table = Contingency.from_labels(np.array([0, 0, 0]), np.array([0, 1, 1]))
    voxels, result = score_foreground(table), score_instances(table)
    assert (voxels.iou, voxels.precision, voxels.recall) == (0.0, 0.0, 1.0)
    assert (result.precision, result.recall, result.f1, result.sa50) == (0.0, 1.0, 0.0, 0.0)
    assert (result.missed, result.spurious, result.voi_merge, result.rand_error) == (0, 1, 0.0, 0.0)


def test_objects_touch_up_to_one_voxel_apart():
    """By hand: 1 and 2 share a face, 2 and 3 an edge, 3 and 4 have one voxel between them, 4 and 5 two."""
    plane = np.array([[1, 2, 0, 0, 0, 0, 0, 0, 0], [0, 0, 3, 0, 4, 0, 0, 5, 0]])
    assert touching_pairs(plane[None]).tolist() == [[1, 2], [2, 3], [3, 4]]


@unhurried
@given(labels=hnp.arrays(np.uint64, SHAPES, elements=st.sampled_from([0, 0, 0, 1, 2, 2**63])), data=st.data())
def test_touching_objects_are_those_of_a_search_of_all_voxels_in_any_cutting(labels, data):
    places = [(tuple(at), int(labels[tuple(at)])) for at in np.argwhere(labels)]
    want = {tuple(sorted((i, j))) for (a, i), (b, j) in combinations(places, 2)
            if i != j and sum((m - n) ** 2 for m, n in zip(a, b, strict=True)) <= TOUCHING_DISTANCE**2}  # fmt: skip
    assert touching_pairs(labels).tolist() == [list(pair) for pair in sorted(want)]
    block = tuple(data.draw(st.integers(1, n)) for n in labels.shape)
    parts = [
        touching_pairs(labels[box.grow(TOUCHING_DISTANCE).clip(labels.shape).slices])
        for box in Blocks(labels.shape, block)
    ]
    np.testing.assert_array_equal(np.unique(np.concatenate(parts), axis=0), touching_pairs(labels))


def test_pairs_told_apart_by_hand():
    """Ten voxels each: 1 and 2 found, 3 and 4 merged, 5 found and 6 cut in two halves."""
    truth = np.repeat([1, 2, 3, 4, 5, 6], 10)
    pred = np.repeat([1, 2, 3, 5, 6, 7], [10, 10, 20, 10, 5, 5])
    near = np.array([[1, 2], [2, 6], [3, 4], [5, 6]], np.uint64)
    result = score_touching(Contingency.from_labels(truth, pred), near)
    assert result.to_json() == {
        "pairs": 4,
        "separated": 1,
        "pair_recall": 0.25,
        "pairs_merged": 1,
        "split_share": 1 / 6,
    }
    assert score_touching(Contingency.from_labels(truth, pred), near, 0.4).separated == 3  # then a half is a match
    assert (
        score_touching(Contingency.from_labels(truth[:25], pred[:25]), near).pairs == 1
    )  # of objects in the table alone
    nothing = score_touching(Contingency.empty(), near)
    assert (nothing.pairs, nothing.pair_recall, nothing.split_share) == (0, 1.0, 0.0)
