import shutil
from dataclasses import replace

import numpy as np
import pytest

from tests.helpers import Quiet
from volseg import api as launch
from volseg.config import Stitch, load
from volseg.errors import UserError
from volseg.evaluation import calibrate
from volseg.evaluation.evaluate import evaluate
from volseg.evaluation.metrics import Contingency
from volseg.inference import model


def test_a_candidates_score_is_the_score_of_its_labels(image, reference, tmp_path):
    """Each row, counted from tables alone, equals the evaluation of a run decided that way."""
    truth = f"{image}/labels/truth"
    rows = calibrate.calibrate(reference, truth)
    assert sum(row["own"] for row in rows) == sum(row["default"] for row in rows) == 1
    run = str(tmp_path / "run.volseg.zarr")
    shutil.copytree(reference, run)
    joined = next(row for row in rows if row["persistence"] and row["join_mean"] and row["pq"] != rows[0]["pq"])
    for row in (rows[0], joined, rows[-1]):
        sets = [f"stitch.{name}={row[name]}" for name in calibrate.KNOBS]
        launch.segment(
            run, lambda c, sets=sets: load(sets=sets, base=c.model_dump(mode="json", exclude={"train"})), show=Quiet()
        )
        scores = evaluate(run, truth)
        assert scores["foreground"]["iou"] == pytest.approx(row["iou"])
        assert {name: scores["instances"][name] for name in calibrate.SCORES} == {
            name: pytest.approx(row[name]) for name in calibrate.SCORES
        }


def test_rows_come_best_first(image, reference):
    rows = calibrate.calibrate(reference, f"{image}/labels/truth")
    assert [row["pq"] for row in rows] == sorted((row["pq"] for row in rows), reverse=True)
    assert "the run's own" in calibrate.table(rows)


def test_renaming_is_counting_again():
    rng = np.random.default_rng(0)
    truth, pred = rng.integers(0, 4, 500), rng.integers(0, 6, 500)
    names = np.array([0, 2, 2, 0, 1, 3])
    assert Contingency.of(truth, pred).renamed(names) == Contingency.of(truth, names[pred])


def test_the_best_goes_into_a_model_file(image, reference, tmp_path):
    path = tmp_path / "model.safetensors"
    shutil.copy(model.shipped(), path)
    row = calibrate.calibrate(reference, f"{image}/labels/truth")[0]
    calibrate.into_model(path, row, calibrate.stored_run(reference))
    decode = model.load_card(path).decode
    assert {name: decode["stitch"][name] for name in calibrate.KNOBS} == {name: row[name] for name in calibrate.KNOBS}
    assert not decode["stitch"]["keep_unseeded"]
    run = calibrate.stored_run(reference)
    kept = run.config.stitch.model_copy(update={"keep_unseeded": True, "min_volume_nm3": 3.0})
    calibrate.into_model(path, row, replace(run, config=run.config.model_copy(update={"stitch": kept})))
    chosen = load(base=model.load_card(path).decode).stitch
    assert chosen == kept.model_copy(update={name: row[name] for name in calibrate.KNOBS})
    before, after = (model.load(p)[0].state_dict() for p in (model.shipped(), path))
    assert all(bool((before[name] == after[name]).all()) for name in before)


def test_what_is_not_searched_stays_as_the_run_has_it():
    own = Stitch(keep_unseeded=True, min_volume_nm3=5, seed=0.3)
    tried = calibrate.candidates(own)
    assert all((knobs.keep_unseeded, knobs.min_volume_nm3) == (True, 5) for knobs in tried)
    assert tried[0] == own
    assert all(getattr(tried[1], name) == getattr(Stitch(), name) for name in calibrate.KNOBS)


def test_a_low_seed_level_stays_where_it_is_lower():
    tried = calibrate.candidates(Stitch(seed=0.8, seed_low=0.65))
    assert {(knobs.seed, knobs.seed_low) for knobs in tried[2:] if knobs.seed in (0.6, 0.7)} == {(0.6, 0), (0.7, 0.65)}
    assert tried[1].seed_low == 0
    for knobs in tried[:20]:
        Stitch.model_validate(knobs.model_dump())  # as a model file or a run would be read again


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no basins to decide on"):
        calibrate.calibrate(str(tmp_path), "truth.tif")
