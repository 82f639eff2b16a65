"""Objects as detections: hand-made cases, and points that go the whole way round."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest

import volseg
from tests.helpers import digest, segment_probabilities, write_volume
from volseg.box import Box
from volseg.errors import UserError
from volseg.evaluation import detection
from volseg.io import points

SHAPE, SIZE = (20, 100, 100), (10.0, 5.0, 5.0)
FAR = 25.0  # nm


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """Scores of centers (labels 11, 12, ...) against points, both in voxels."""

    def score(truth, centers, **settings):
        nm = np.array(centers, float).reshape(-1, 3) * SIZE
        columns = {f"centroid_{axis}_nm": nm[:, i] for i, axis in enumerate("zyx")}
        table = pyarrow.table({"id": np.arange(11, 11 + len(nm), dtype=np.uint64), **columns})
        run = SimpleNamespace(path="run", shape=SHAPE, voxel_size_nm=SIZE, objects_arrow=lambda: table)
        monkeypatch.setattr(detection, "open_run", lambda path: run)
        lines = ["z,y,x", *(",".join(map(str, row)) for row in truth)]
        (tmp_path / "points.csv").write_text("\n".join(lines))
        return detection.evaluate_points("run", tmp_path / "points.csv", **{"distance_nm": FAR, **settings})

    return score


def pairs(found):
    return [(one.row, one.id) for one in found.matched]


def test_each_object_stands_for_one_point(scored):
    found = scored([(5, 50, 50), (5, 50, 53), (15, 10, 10)], [(5, 50, 51), (5, 80, 80)])
    assert pairs(found) == [(1, 11)]
    assert [one.number for one in found.missed] == [2, 3]
    assert [(one.number, one.z, one.y, one.x_nm) for one in found.spurious] == [(12, 5, 80, 400)]
    assert (found.precision, found.recall) == (1 / 2, 1 / 3)
    assert found.f1 == pytest.approx(2 / 5)
    assert found.mean_distance_nm == 5


def test_as_many_pairs_as_possible_come_before_short_ones(scored):
    found = scored([(5, 50, 50), (5, 50, 54)], [(5, 50, 52), (5, 50, 47.5)])  # 11 is near both, 12 near the first alone
    assert pairs(found) == [(1, 12), (2, 11)]
    found = scored([(5, 50, 50), (5, 50, 54)], [(5, 50, 51), (5, 50, 53)])
    assert pairs(found) == [(1, 11), (2, 12)]


def test_a_distance_counts_in_nm_and_its_end_belongs_to_it(scored):
    assert pairs(scored([(5, 50, 50)], [(7, 50, 53)])) == [(1, 11)]  # 20 nm and 15 nm
    assert pairs(scored([(5, 50, 50)], [(8, 50, 50)])) == []
    assert pairs(scored([(5, 50, 50)], [(5, 50, 55)])) == [(1, 11)]
    assert pairs(scored([(5, 50, 50)], [(5, 50, 60)], distance_nm=None)) == [(1, 11)]  # two radii of 25 nm
    assert scored([(5, 50, 50)], [(5, 50, 60.1)], distance_nm=None).recall == 0


def test_a_box_leaves_out_what_lies_beyond(scored):
    found = scored([(5, 50, 50), (15, 50, 50)], [(5, 50, 50), (16, 10, 10)], box="0:10,0:100,0:100")
    assert (found.precision, found.recall, found.f1) == (1, 1, 1)
    with pytest.raises(UserError, match="leaves the volume"):
        scored([(5, 50, 50)], [], box=Box((0, 0, 0), (21, 100, 100)))


def test_no_object_is_no_recall_and_no_mistake(scored):
    found = scored([(5, 50, 50)], [])
    assert (found.precision, found.recall, found.f1, found.mean_distance_nm) == (1, 0, 0, 0)
    with pytest.raises(UserError, match="finds nothing"):
        scored([(5, 50, 50)], [], distance_nm=0.0)


def test_long_lists_are_cut_in_text_and_whole_in_json(scored):
    found = scored([(1, y, 9) for y in range(14)], [])
    text = str(found)
    assert text.count("missed    row") == 11
    assert "4 more with --json" in text
    plain = json.loads(json.dumps(found.to_json()))
    assert [one["row"] for one in plain["missed"]] == list(range(1, 15))
    assert plain["detection"]["missed"] == 14


# ---------------------------------------------------------------- the whole way


PLACES = np.array([(8, 20, 20), (8, 20, 70), (9, 70, 24), (12, 60, 60), (12, 60, 70.5), (4, 85, 85)])
RULES = {"fragments": {"distance_nm": 30.0, "height": "distance"}, "stitch": {"min_voxels": 20, "seed": 0.7}}


@pytest.fixture(scope="module")
def found_again(tmp_path_factory):
    """Runs of a network that is sure of balls around points, cut in two ways, and the points."""
    folder = tmp_path_factory.mktemp("points")
    lines = ["index,axis-0,axis-1,axis-2", *(f"{i},{z},{y},{x}" for i, (z, y, x) in enumerate(PLACES))]
    (folder / "points.csv").write_text("\n".join(lines))
    found = points.read(str(folder / "points.csv"), SHAPE, SIZE, 30.0)
    balls = points.balls(found, Box.from_shape(SHAPE))
    em = write_volume(str(folder / "probabilities.zarr"), np.where(balls, 255, 0).astype(np.uint8), SIZE)
    shapes = ((20, 100, 100), (7, 33, 64))
    runs = [
        segment_probabilities(em, folder / f"{i}.volseg.zarr", blocks={"shape": shape}, **RULES).path
        for i, shape in enumerate(shapes)
    ]
    return folder, runs


def test_points_of_sure_probabilities_are_all_found(found_again):
    folder, runs = found_again
    scores = volseg.evaluate_points(runs[0], folder / "points.csv")
    assert (scores.f1, len(scores.matched), scores.missed, scores.spurious) == (1.0, len(PLACES), (), ())
    assert scores.mean_distance_nm < 8
    assert scores.distance_nm == 50
    assert digest(runs[0]) == digest(runs[1])


def test_exported_centers_are_points_again_the_same_for_every_cutting(found_again, tmp_path):
    _, runs = found_again
    made = [volseg.export(run, tmp_path / f"{i}.points.csv") for i, run in enumerate(runs)]
    assert Path(made[0]).read_bytes() == Path(made[1]).read_bytes()
    back = points.read(made[0], SHAPE, SIZE)
    objects = volseg.open(runs[0]).objects
    np.testing.assert_allclose(back.zyx * SIZE, objects[[f"centroid_{axis}_nm" for axis in "zyx"]], atol=0.01)
    scores = volseg.evaluate_points(runs[0], made[0], distance_nm=1.0)
    assert scores.f1 == 1.0
    one = volseg.export(runs[0], tmp_path / "one.csv", kind="points", objects=[2])
    assert len(points.read(one, SHAPE, SIZE)) == 1


def test_the_command_tells_missed_points_and_refuses_what_has_no_effect(found_again, run, tmp_path):
    folder, runs = found_again
    more = tmp_path / "more.csv"
    more.write_text((folder / "points.csv").read_text() + "\n6,3,50,40\n")
    code, out, _ = run("evaluate", runs[0], more, "--distance-nm", "40", "--json")
    plain = json.loads(out)
    assert code == 0
    assert (plain["detection"]["missed"], plain["missed"][0]["row"], plain["missed"][0]["y_nm"]) == (1, 7, 250)
    assert [one["row"] for one in plain["matches"]] == [1, 2, 3, 4, 5, 6]
    code, out, _ = run("evaluate", runs[0], more, "--distance-nm", "40")
    assert code == 0
    assert "missed    row 7 at 3, 50, 40 (z, y, x)" in out
    for arguments, said in (
        ((more, "--report", tmp_path / "page.html"), "leave out --report"),
        ((runs[1], "--distance-nm", "40"), "is for a table of points"),
        ((tmp_path / "none.csv",), "none.csv"),
    ):
        code, _, err = run("evaluate", runs[0], *arguments)
        assert code == 2
        assert said in err
        assert "Traceback" not in err
    code, _, err = run("evaluate", folder / "probabilities.zarr", more)
    assert code == 2
    assert "is not a finished volseg run" in err
