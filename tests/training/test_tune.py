"""The search for a learning rate and a batch size."""

import csv

import pytest

from volseg.config import load, resolve
from volseg.errors import UserError
from volseg.training.tune import open_study, tune, tuned_config


def _config(tables, out, **changes):
    train = {**tables, "out": str(out), "steps": 40, "batch": 2}
    tuning = {"share": 0.25, "batch": [2, 4], "trials": 3, **changes}
    return resolve(("test", {"train": train, "tune": tuning, "stitch": {"seed": 0.7}}))


@pytest.fixture(scope="module")
def study(tables, tmp_path_factory):
    """Folder and report of a study of three trials, stopped after two and begun again."""
    out, lines = tmp_path_factory.mktemp("study"), []
    tune(_config(tables, out, trials=2), lines.append)
    tune(_config(tables, out), lines.append)
    return out, lines


def test_a_study_goes_on_where_it_was(study):
    assert any("2 of 3 trials are done" in line for line in study[1])
    with (study[0] / "tune.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["trial"]) for row in rows) == [0, 1, 2]
    assert len({row["lr"] for row in rows}) == 3
    assert {row["batch"] for row in rows} <= {"2", "4"}
    assert all(int(row["steps"]) * int(row["batch"]) == 20 for row in rows)
    assert (study[0] / "tune.png").read_bytes().startswith(b"\x89PNG")


def test_training_takes_the_best_values_as_they_are(study, tables):
    with (study[0] / "tune.csv").open() as file:
        best = next(csv.DictReader(file))
    config = load(study[0] / "tuned.toml")
    assert config.train.lr == pytest.approx(float(best["lr"]), rel=0.01)
    assert config.train.batch == int(best["batch"])
    assert config.train.batch * config.train.steps == 80
    assert config.train.data == _config(tables, study[0]).train.data
    assert (config.train.patch, config.train.decoder, config.stitch.seed) == (64, (16, 16, 8, 8, 8), 0.7)
    assert config.train.out.endswith("tuned")


def test_a_study_from_before_a_setting_goes_on_where_that_has_its_default(tables, tmp_path):
    begun = open_study(_config(tables, tmp_path), tmp_path)
    settings = begun.user_attrs["settings"]
    data = [{key: value for key, value in table.items() if key != "planes"} for table in settings["train.data"]]
    earlier = {key: value for key, value in settings.items() if "distance" not in key}
    begun.set_user_attr("settings", {**earlier, "train.data": data})
    with pytest.raises(UserError, match=r"begun with another train\.distance_nm;"):
        open_study(_config({**tables, "distance_nm": 50}, tmp_path), tmp_path)
    assert open_study(_config(tables, tmp_path), tmp_path).user_attrs["settings"] == settings


def test_a_study_of_other_settings_is_refused_by_name(study, tables):
    with pytest.raises(UserError, match=r"begun with another train\.ema"):
        tune(_config({**tables, "ema": 0.25}, study[0]), print)


def test_without_held_out_sections_it_says_how_to_name_some(tables, tmp_path):
    data = [{**tables["data"][0], "validate_on": []}]
    with pytest.raises(UserError, match=r"needs held-out sections: set validate_on"):
        tune(_config({**tables, "data": data}, tmp_path), print)


def test_a_time_budget_that_no_trial_fits_says_so(tables, tmp_path):
    with pytest.raises(UserError, match=r"no trial came to its end; allow more tune\.minutes"):
        tune(_config(tables, tmp_path, minutes=1e-6), print)


def test_strings_and_sections_survive_the_config(tables, tmp_path):
    data = [{**tables["data"][0], "image": 'C:\\daten\\ä "1".tif', "train": [1, "2:4"]}]
    config = _config({**tables, "data": data}, tmp_path)
    path = tmp_path / "tuned.toml"
    path.write_text(tuned_config(config, {"lr": 1e-3, "batch": 4, "iou": 0.5}), encoding="utf-8")
    assert load(path).train.data == config.train.data
