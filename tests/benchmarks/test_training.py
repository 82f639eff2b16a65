"""Benchmarks that train, on a synthetic volume and for two steps."""

import json

import pytest

from benchmarks import (
    ablations,
    annotate,
    folds,
    labels,
    report,
    trial,
)
from volseg import cli
from volseg.config import load

RECIPE = """[train]
patch = 64
batch = 2
steps = 2
every = 2
pretrained = false
decoder = [16, 16, 8, 8, 8]
"""
HERE = ("cluster.workers=1", 'cluster.dashboard=""')


@pytest.fixture
def commands_here(monkeypatch):
    """Commands are called in this process, which spares the start of each."""
    monkeypatch.setattr(trial, "volseg", lambda *line: cli.app(list(line), standalone_mode=False))


def test_a_command_that_fails_ends_the_benchmark(tmp_path):
    trial.volseg("--version")
    with pytest.raises(SystemExit) as ended:
        trial.volseg("infer", str(tmp_path / "nothing.zarr"))
    assert ended.value.code == 2


def test_annotated_sections_are_evenly_spread():
    assert trial.spread(0, 130, 4) == [16, 48, 81, 113]
    assert trial.spread(10, 12, 2) == [10, 11]


def test_a_trial_chooses_its_seeds_with_the_decoding_that_it_is_scored_with(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[train]\npatch = 64\n[[train.data]]\nsynth_seed = 3\n")
    data, decoding = {"image": "a.tif", "label": "b.tif"}, ("fragments.contour=0", "stitch.keep_unseeded=true")
    config = load(trial.settings(str(recipe), data, tmp_path / "out", 5, ("patch=96",), decoding))
    assert (config.fragments.contour, config.stitch.keep_unseeded) == (0, True)
    assert (config.train.patch, config.train.seed, len(config.train.data)) == (96, 5, 2)


def test_a_trial_trains_infers_and_scores_on_other_sections(commands_here, image, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    pair = (image, f"{image}/labels/truth")
    labels.measure(pair, pair, ["2"], 1, str(recipe), "0:12", "14:22", str(tmp_path / "out"), ("lr=1e-4",), HERE)
    row = json.loads((tmp_path / "results" / "labels.json").read_text())["rows"][0]
    assert row["sections"] == 2
    assert row["steps"] == 2
    assert 0 <= row["IoU"] <= 1
    assert "lr = 1e-4" in (tmp_path / "out" / "n2-seed0" / "train.toml").read_text()
    for name in ("labels.png", "sections.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000


def test_an_ablation_changes_one_thing(commands_here, image, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(ablations, "TRAINED", {"the recipe": ("sections = 1",), "not asked for": ()})
    monkeypatch.setattr(ablations, "DECODED", {"threshold 0.5": ("fragments.threshold=0.5", *HERE)})
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    pair = (image, f"{image}/labels/truth")
    ablations.measure(pair, 2, "0:10", "10:12", "14:22", 1, str(recipe), ("the recipe",), str(tmp_path / "out"), ())
    rows = json.loads((tmp_path / "results" / "ablations.json").read_text())["rows"]
    assert [row["change"] for row in rows] == ["the recipe", "threshold 0.5"]
    assert "sections = 1" in (tmp_path / "out" / "the-recipe-seed0" / "train.toml").read_text()
    assert all(0 <= row["IoU"] <= 1 for row in rows)


def test_the_truth_answers_what_is_suggested(commands_here, image, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    pair = (image, f"{image}/labels/truth")
    task = annotate.task(pair, "0:12", "16:20", (2, 4), str(recipe), "", str(tmp_path / "out"), ("lr=1e-4",), HERE)
    annotate.measure(task, 1, 0, "test", ("suggested",))
    rows = json.loads((tmp_path / "out/rows.json").read_text())
    first, second = (set(row["asked"]) for row in rows.values())
    assert (len(first), len(second)) == (2, 4)
    assert first < second <= set(range(12))
    kept = json.loads((tmp_path / "results/annotate-test.json").read_text())["rows"]
    assert [(row["way"], row["sections"], row["seeds"]) for row in kept] == [("suggested", 2, 1), ("suggested", 4, 1)]
    assert all(0 <= row["PQ"] <= 1 for row in kept)
    annotate.measure(task, 1, 1e-9, "test", ("suggested",))
    assert "minutes are over; the same command goes on" in capsys.readouterr().out


def test_each_fold_is_scored_by_a_model_of_the_others(commands_here, image, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    folds.measure((image, f"{image}/labels/truth"), 2, [5, 5, 5], str(recipe), str(tmp_path / "out"), (), HERE)
    rows = json.loads((tmp_path / "results" / "folds.json").read_text())["rows"]
    assert [row["held out"] for row in rows] == ["0:11", "11:22", "all"]
    assert 'train = ["11:22"]' in (tmp_path / "out" / "fold0" / "train.toml").read_text()
