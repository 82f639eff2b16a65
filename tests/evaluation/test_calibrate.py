import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from tests.helpers import Quiet, decide
from volseg.box import Box
from volseg.config import Stitch, load
from volseg.errors import UserError
from volseg.evaluation import calibrate
from volseg.evaluation.contingency import Contingency
from volseg.evaluation.evaluate import evaluate, read_truth
from volseg.evaluation.stored import open_stored
from volseg.inference import model
from volseg.segmentation.rules import Rules, components


def test_a_candidates_score_is_the_score_of_its_labels(image, reference, tmp_path):
    """Each candidate, counted from tables alone, equals the evaluation of a run decided that way."""
    truth = f"{image}/labels/truth"
    calibration = calibrate.calibrate(reference, truth)
    assert sum(each.own for each in calibration.candidates) == sum(each.default for each in calibration.candidates) == 1
    run = str(tmp_path / "run.volseg.zarr")
    shutil.copytree(reference, run)
    joined = next(c for c in calibration.candidates if c.persistence and c.join_mean and c.pq != calibration.best.pq)
    for candidate in (calibration.best, joined, calibration.candidates[-1]):
        decide(
            run,
            lambda c, sets=candidate.settings: load(sets=sets, base=c.model_dump(mode="json", exclude={"train"})),
            progress=Quiet(),
        )
        scores = evaluate(run, truth)
        assert scores.foreground.iou == pytest.approx(candidate.iou)
        assert [getattr(scores.instances, name) for name in calibrate.SCORES] == pytest.approx(candidate.scores[1:])


def test_candidates_come_best_first(image, reference):
    calibration = calibrate.calibrate(reference, f"{image}/labels/truth")
    pq = [candidate.pq for candidate in calibration.candidates]
    assert pq == sorted(pq, reverse=True)
    assert "the run's own" in str(calibration)
    assert "the defaults" in calibration._repr_html_()
    assert f"PQ {calibration.other_slabs_pq:.3f} in slabs" in str(calibration)
    flat = calibrate.calibrate(reference, f"{image}/labels/truth", box="0:3,0:150,0:170")
    assert flat.other_slabs_pq is None
    assert json.loads(json.dumps(calibration.to_json()))["candidates"][0]["pq"] == calibration.best.pq


def test_joins_are_held_against_truth(image, reference):
    """Counted from tables, they are what each voxel and its neighbors tell."""
    truth = f"{image}/labels/truth"
    stored = open_stored(reference)
    count = stored.layout.load_basins().minimum.size
    true = read_truth(truth, stored.run.output_grid.shape, Box.from_shape(stored.run.shape))(
        Box.from_shape(stored.run.shape)
    )
    basin = np.zeros(stored.run.shape, np.int64)
    for i, box in enumerate(stored.run.grid):
        basin[box.slices] = calibrate._number_basins(stored, i, box, count)
    target = [0] + [int(np.bincount(true[basin == n].astype(np.int64)).argmax()) for n in range(1, count + 1)]
    pairs = set()
    for axis in range(3):
        one, other = (np.moveaxis(basin, axis, 0)[part] for part in (slice(None, -1), slice(1, None)))
        touch = (one != other) & (one > 0) & (other > 0)
        pairs |= set(zip(one[touch].tolist(), other[touch].tolist(), strict=True))
    pairs = {tuple(sorted(pair)) for pair in pairs if all(target[n] for n in pair)}
    assert len(pairs) > 10
    calibration = calibrate.calibrate(reference, truth)
    assert str(calibration.joins) in str(calibration)
    assert calibration.to_json()["joins"]["borders"] == len(pairs)
    wrong = set()
    for seed in (stored.config.stitch.seed, 1.0, 0.0):
        changed = stored.run.config.model_copy(update={"stitch": Stitch(seed=seed)})
        other, basins = replace(stored, run=replace(stored.run, config=changed)), stored.layout.load_basins()
        found, rules = calibrate._joins(other, basins, np.array(target, np.uint64)), other.run.rules
        joined = components(basins, Rules(rules.seed_height, low_height=rules.low_height))
        ends = [(a, b, joined[a - 1] == joined[b - 1]) for a, b in pairs]
        together = {tuple(sorted((target[a], target[b]))) for a, b, same in ends if same and target[a] != target[b]}
        apart = {
            tuple(sorted((joined[a - 1], joined[b - 1]))) for a, b, same in ends if not same and target[a] == target[b]
        }
        assert found == calibrate.Joins(len(pairs), len(together), len(apart))
        wrong.add((bool(together), bool(apart)))
    assert {(True, False), (True, True)} <= wrong


def test_what_gains_less_than_half_an_object_is_not_chosen(image, reference):
    """Among ten objects PQ 0.05; of sizes that score alike the middle one is taken."""
    any_one = calibrate.calibrate(reference, f"{image}/labels/truth").best

    def rows(own_pq):
        sizes = {0: 0.7, 1000: 0.795, 2000: 0.8, 4000: 0.8, 8000: 0.79}
        tried = [replace(any_one, own=False, min_voxels=size, pq=pq) for size, pq in sizes.items()]
        return tuple(sorted([replace(any_one, own=True, seed=0.3, pq=own_pq), *tried], key=lambda each: -each.pq))

    assert calibrate._choose(rows(0.76), 10).own
    assert calibrate._choose(rows(0.74), 10).min_voxels == 2000
    assert calibrate._choose(rows(0.76), 100).min_voxels == 2000


def test_renaming_is_counting_again():
    rng = np.random.default_rng(0)
    truth, pred = rng.integers(0, 4, 500), rng.integers(0, 6, 500)
    names = np.array([0, 2, 2, 0, 1, 3])
    assert Contingency.from_labels(truth, pred).relabeled(names) == Contingency.from_labels(truth, names[pred])


def test_the_best_goes_into_a_model_file(image, reference, tmp_path):
    path = tmp_path / "model.safetensors"
    shutil.copy(model.shipped(), path)
    best, run = calibrate.calibrate(reference, f"{image}/labels/truth").best, open_stored(reference)
    values = {name: getattr(best, name) for name in calibrate.SEARCHED}
    calibrate.save_to_model(path, best, run)
    decode = model.load_card(path).decode
    assert {name: decode["stitch"][name] for name in calibrate.SEARCHED} == values
    assert not decode["stitch"]["keep_unseeded"]
    kept = run.config.stitch.model_copy(update={"keep_unseeded": True, "min_volume_nm3": 3.0})
    config = run.config.model_copy(update={"stitch": kept})
    calibrate.save_to_model(path, best, replace(run, run=replace(run.run, config=config)))
    chosen = load(base=model.load_card(path).decode).stitch
    assert chosen == kept.model_copy(update=values)
    before, after = (model.load(p)[0].state_dict() for p in (model.shipped(), path))
    assert all(bool((before[name] == after[name]).all()) for name in before)


def test_what_is_not_searched_stays_as_the_run_has_it():
    own = Stitch(keep_unseeded=True, min_volume_nm3=5, seed=0.3)
    tried = calibrate.settings_to_try(own)
    assert all((settings.keep_unseeded, settings.min_volume_nm3) == (True, 5) for settings in tried)
    assert tried[0] == own
    assert all(getattr(tried[1], name) == getattr(Stitch(), name) for name in calibrate.SEARCHED)


def test_a_low_seed_level_stays_where_it_is_lower():
    tried = calibrate.settings_to_try(Stitch(seed=0.8, seed_low=0.65))
    assert {(each.seed, each.seed_low) for each in tried[2:] if each.seed in (0.6, 0.7)} == {
        (0.6, 0),
        (0.7, 0.65),
    }
    assert tried[1].seed_low == 0
    for settings in tried[:20]:
        Stitch.model_validate(settings.model_dump())  # as a model file or a run would be read again


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a finished volseg run"):
        calibrate.calibrate(str(tmp_path), "truth.tif")
