"""Benchmarks run, on small volumes."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr
from typer.testing import CliRunner

from benchmarks import (
    ablations,
    annotate,
    backends,
    epfl,
    exact,
    folds,
    formats,
    gpu,
    heights,
    instances,
    io,
    labels,
    planes,
    repeat,
    report,
    scaling,
    soak,
    stitch,
    throughput,
    touching,
    trial,
)
from benchmarks import bytes as hashing
from benchmarks.__main__ import app
from benchmarks.chaos import bench
from benchmarks.chaos.episode import SAME, Episode, hash_result
from benchmarks.chaos.stand import Reference, Stand
from volseg import cli
from volseg.box import Box
from volseg.config import load
from volseg.engine import cluster
from volseg.inference import hardware
from volseg.io import arrays, volume

RECIPE = """[train]
patch = 64
batch = 2
steps = 2
every = 2
pretrained = false
decoder = [16, 16, 8, 8, 8]
"""


def test_stored_probabilities_cut_anew_give_one_answer(reference, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    exact.compare_blocks(reference)
    assert "one answer" in capsys.readouterr().out
    kept = json.loads((tmp_path / "exact-run.json").read_text())
    assert len(kept["rows"]) == 7
    assert kept["cores"] >= 1
    assert kept["date"]


def test_the_same_code_gives_the_same_bytes():
    different, rows = hashing.compare(hashing.ROOT, hashing.ROOT, ("foreign",), (16, 64, 96), 1)
    assert not different
    assert [(name, parts) for name, _, parts in rows] == [("blocks", "-"), ("foreign", "-")]
    assert all(count > 8 for _, count, _ in rows)


def test_a_revision_is_there_as_long_as_it_is_needed():
    with hashing.checked_out("HEAD") as tree:
        assert (tree / "volseg/__init__.py").exists()
    assert not tree.exists()
    with pytest.raises(SystemExit, match="cannot check out nothing"), hashing.checked_out("nothing"):
        pass


def test_every_part_of_a_run_is_hashed(reference, tmp_path):
    run = shutil.copytree(reference, tmp_path / "run.volseg.zarr")
    before = hashing.hash_run(run)
    assert {"probabilities", "labels/0", "tables/objects.csv", "tables/merges.csv", "work/tables"} <= before.keys()
    labels = zarr.open_array(run / "labels/instances/0", mode="r+")
    labels[0, 0, 0] = labels[0, 0, 0] + 1
    (run / "tables/objects.csv").write_text("id\n")
    after = hashing.hash_run(run)
    assert hashing.differences(before, after) == ["labels/0", "tables/objects.csv"]


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


def test_peers_have_torch_as_it_comes_whatever_volseg_sets():
    before = torch.get_num_threads()
    deterministic = torch.backends.cudnn.deterministic
    try:
        torch.set_num_threads(1)
        torch.backends.cudnn.deterministic = True
        with throughput.as_it_comes():
            assert torch.get_num_threads() == cluster.CPU_COUNT
            assert not torch.backends.cudnn.deterministic
        assert torch.get_num_threads() == 1
        assert torch.backends.cudnn.deterministic
    finally:
        torch.set_num_threads(before)
        torch.backends.cudnn.deterministic = deterministic


def test_a_trial_trains_infers_and_scores_on_other_sections(image, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    pair = (image, f"{image}/labels/truth")
    labels.measure(pair, pair, ["2"], 1, str(recipe), "0:12", "14:22", str(tmp_path / "out"), ("lr=1e-4",), ())
    row = json.loads((tmp_path / "results" / "labels.json").read_text())["rows"][0]
    assert row["sections"] == 2
    assert row["steps"] == 2
    assert 0 <= row["IoU"] <= 1
    assert "lr = 1e-4" in (tmp_path / "out" / "n2-seed0" / "train.toml").read_text()
    for name in ("labels.png", "sections.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000


def test_an_ablation_changes_one_thing(image, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(ablations, "TRAINED", {"the recipe": ("sections = 1",), "not asked for": ()})
    monkeypatch.setattr(ablations, "DECODED", {"threshold 0.5": ("fragments.threshold=0.5",)})
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    pair = (image, f"{image}/labels/truth")
    ablations.measure(pair, 2, "0:10", "10:12", "14:22", 1, str(recipe), ("the recipe",), str(tmp_path / "out"), ())
    rows = json.loads((tmp_path / "results" / "ablations.json").read_text())["rows"]
    assert [row["change"] for row in rows] == ["the recipe", "threshold 0.5"]
    assert "sections = 1" in (tmp_path / "out" / "the-recipe-seed0" / "train.toml").read_text()
    assert all(0 <= row["IoU"] <= 1 for row in rows)


def test_the_truth_answers_what_is_suggested(image, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(trial, "volseg", lambda *line: cli.app(list(line), standalone_mode=False))  # in this process
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    pair, sets = (image, f"{image}/labels/truth"), ("cluster.workers=1", 'cluster.dashboard=""')
    task = annotate.task(pair, "0:12", "16:20", (2, 4), str(recipe), "", str(tmp_path / "out"), ("lr=1e-4",), sets)
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


def test_volseg_finds_as_many_objects_at_every_block_size_as_one_watershed_of_the_whole(reference):
    probability = np.asarray(arrays.open_array(reference, "0"))
    counts = {side: instances.count_volseg(probability, side).objects for side in (170, 64, 24)}
    found = instances.count_scikit_image(probability, 0)
    assert set(counts.values()) == {found.objects}
    assert instances.count_per_block(probability, 170, shrink=True).objects == found.objects
    assert instances.count_per_block(probability, 24, shrink=False).objects > 0


def test_candidates_are_called_in_turn_each_in_a_process_of_its_own():
    makers = {"here": partial(partial, pow, 2), "there": partial(partial, pow, 3)}
    timed, counted = repeat.time_isolated(makers, 3, 2, {"here": (5,), "there": ()})
    assert [done.result for done in timed["here"] + timed["there"]] == [8, 8, 27, 27]
    assert all(done.seconds >= 0 and done.peak_bytes >= 0 for done in timed["here"])
    assert counted == {"here": {5: 32}, "there": {}}


def test_a_candidate_whose_process_ends_is_told():
    with pytest.raises(RuntimeError, match="ended without a result"):
        repeat.time_isolated({"gone": partial(os._exit, 3)}, 1, 1, {"gone": ()})


def test_each_method_is_timed_in_a_process_of_its_own(reference, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    instances.measure(reference, 22, 1)
    rows = json.loads((tmp_path / "instances-run.json").read_text())["rows"]
    assert len(rows) == 5
    assert all(row["Mvoxel/s"] > 0 and row["peak MB"] > 0 for row in rows)
    assert len({row[f"objects at {side}"] for side in instances.SIDES for row in rows[:2]}) == 1


def test_the_table_of_a_gpu_is_made_on_a_processor_when_asked(image, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    gpu.measure(image, 2, 1, str(tmp_path / "out"), ("predict.tile=96", "predict.overlap=32", "predict.batch=2"), "cpu")
    rows = {row["way"]: row for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]}
    ours = rows["volseg predict, fp32, end to end"]
    assert ours["bytes fetched / voxel"] == 2
    assert 1 < ours["bytes sent / voxel"] < 1.2
    assert ours["TFLOP/s"] > 0
    assert ours["mean diff /255"] == 0
    peers = [row for way, row in rows.items() if way.startswith("MONAI sliding_window_inference, fp32, channels_last")]
    assert len(peers) == 2
    assert all(row["Mvoxel/s"] > 0 for row in peers)


@pytest.mark.skipif(hardware.gpu_count() > 0, reason="a CUDA device is here")
def test_the_table_of_a_gpu_is_refused_without_one():
    done = CliRunner().invoke(app, ["gpu"])
    assert done.exit_code == 1
    assert "no CUDA device" in str(done.exception)


def test_stores_are_compared(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(io, "SHAPE", (32, 64, 96))
    io.measure(1)
    rows = json.loads((tmp_path / "io.json").read_text())["rows"]
    assert len(rows) == 12
    assert all(row["MB/s"] > 0 for row in rows)


def test_every_format_is_written_and_read_by_both(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "PLANE", (70, 60))
    shape = (9, 70, 60)
    expected = np.stack(list(formats._planes(shape)))
    whole = tuple(slice(0, n) for n in shape)
    for name, (write, alone) in formats.FORMATS.items():
        (tmp_path / name).mkdir()
        path = write(tmp_path / name, shape)
        np.testing.assert_array_equal(alone(path)(whole).view(np.uint8), expected)
        assert formats._volseg(path)(shape) == formats._library(alone, path)(shape)


def test_a_volume_grows_by_mirrored_copies(tmp_path):
    folder = scaling._mirror_copies(tmp_path / "grown", (4, 32, 48), (2, 1, 3))
    voxels = volume.open(str(folder / "em.zarr")).read(Box.from_shape((8, 32, 144)))
    piece = volume.open(str(folder / "piece.zarr")).read(Box.from_shape((4, 32, 48)))
    assert (voxels[4:, :, 48:96] == piece[::-1, :, ::-1]).all()
    assert (voxels[:4, :, 96:] == piece).all()


def test_memory_and_cost_are_told_for_each_size(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    cut = ("blocks.shape=[2, 64, 64]",)
    monkeypatch.setitem(scaling.GROWTH, "z", ((4, 64, 64), cut, ((2, 1, 1), (64, 1, 1))))
    scaling.measure_volumes(str(tmp_path / "runs"), 8, "tree", "z")
    rows = json.loads((tmp_path / "scaling-volume-z.json").read_text())["rows"]
    assert [(row["volume"], row["larger"], row["inferred for each voxel"]) for row in rows] == [("8 x 64 x 64", 2, 1)]
    assert rows[0]["worker MB"] > 50
    assert "its memory grows by" in capsys.readouterr().out


def test_many_empty_blocks_are_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    scaling.measure_blocks(500)
    rows = json.loads((tmp_path / "scaling-blocks.json").read_text())["rows"]
    assert rows[-1]["blocks"] == 500


def test_every_height_that_the_channels_allow_is_scored(image, reference, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(heights, "SEEDS", (0.3, 0.6))
    truth = f"{image}/labels/truth"
    heights.measure(reference, truth, "0:10,0:150,0:170", (reference, truth, "10:22,0:150,0:170"), "synth")
    rows = json.loads((tmp_path / "heights-synth.json").read_text())["rows"]
    assert [row["height"] for row in rows] == [name for name in heights.HEIGHTS if name != "head"]
    assert all(0 < row["IoU"] <= 1 and row["objects"] > 3 for row in rows)


def test_objects_that_touch_are_counted_over_volumes(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    config = tmp_path / "quick.toml"
    config.write_text("[stitch]\nmin_voxels = 100\n[cluster]\nworkers = 1\ndashboard = ''\n")
    touching.measure(
        (3, 5), "16,128,128", str(config), "", ("predict.backend=openvino",), str(tmp_path / "runs"), "two"
    )
    *rows, total = json.loads((tmp_path / "touching-two.json").read_text())["rows"]
    assert [row["seed"] for row in rows] == [3, 5]
    assert total["objects"] == sum(row["objects"] for row in rows) > 0
    assert total["separated"] <= total["pairs"]


def test_looks_are_scored_where_nothing_was_chosen(reference, image):
    chosen, tested = Box((0, 0, 0), (10, 150, 170)), Box((10, 0, 0), (22, 150, 170))
    row = planes.scores(reference, f"{image}/labels/truth", chosen, tested)
    assert row["IoU"] > 0.5
    assert row["threshold"] in planes.THRESHOLDS


def test_predict_is_timed_beside_what_one_would_write_without_volseg(image, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    source = volume.open(image)
    tifffile.imwrite(tmp_path / "em.tif", source.read(Box((0, 0, 0), (6, 128, 128))), photometric="minisblack")
    sets = ("cluster.workers=1", "cluster.dashboard=''")
    throughput.measure(str(tmp_path / "em.tif"), 6, 2, 1, "", str(tmp_path / "out"), sets)
    rows = {row["way"]: row for row in json.loads((tmp_path / "throughput.json").read_text())["rows"]}
    assert sum("MONAI" in way for way in rows) == 3
    assert "dask map_overlap + torch fp32" in rows
    assert all(row["volseg fp32 is x"] > 0 for row in rows.values())
    assert rows["volseg predict, end to end, fp32"]["mean diff /255"] < 1


def test_every_backend_of_this_machine_is_timed(image, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    backends.measure(image, "", (1,), 1)
    rows = {row["engine"]: row for row in json.loads((tmp_path / "backends.json").read_text())["rows"]}
    assert rows["openvino fp32"]["changed_percent"] == 0
    assert all(row["mvoxel_per_s"] > 0 and row["changed_percent"] < 1 for row in rows.values())


def test_a_whole_command_is_timed_and_scored(image, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    epfl.measure(image, f"{image}/labels/truth", "14:22,0:150,0:170", ("",), 1, str(tmp_path / "em.volseg.zarr"), 1)
    (row,) = json.loads((tmp_path / "epfl.json").read_text())["rows"]
    assert row["model"] == "shipped"
    assert row["seconds"] > 0
    assert 0 < row["IoU"] <= 1


def test_each_fold_is_scored_by_a_model_of_the_others(image, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    folds.measure((image, f"{image}/labels/truth"), 2, [5, 5, 5], str(recipe), str(tmp_path / "out"), (), ())
    rows = json.loads((tmp_path / "results" / "folds.json").read_text())["rows"]
    assert [row["held out"] for row in rows] == ["0:11", "11:22", "all"]
    assert 'train = ["11:22"]' in (tmp_path / "out" / "fold0" / "train.toml").read_text()


@pytest.fixture
def stand(image, reference, tmp_path):
    """Episodes are played on a run that is there already."""
    (tmp_path / "em.zarr").symlink_to(image)
    shutil.copytree(reference, tmp_path / "reference-infer/run.volseg.zarr")
    return Stand(tmp_path, workers=1, references={"infer": Reference(hash_result(Path(reference)), 5.0)})


def test_a_killed_command_goes_on_to_the_same_bytes(stand):
    episode = bench.play(stand, "kill-finish", 0, 2)
    assert (episode.job, episode.outcome, episode.tracebacks) == ("decide", SAME, 0)
    assert episode.codes[-1] == 0


def test_what_verify_finds_in_a_damaged_run_is_repaired(stand):
    episode = bench.play(stand, "verify-pyramid", 0, 0)
    assert (episode.outcome, episode.faults, episode.tracebacks) == (SAME, 1, 0)


def test_what_a_run_of_many_blocks_holds_is_told_along_the_way(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(soak, "GRID_PLANE", (2, 3))
    monkeypatch.setattr(soak, "SAMPLE_S", 0.2)
    soak.measure(12, 1, str(tmp_path / "runs"))
    rows = json.loads((tmp_path / "soak.json").read_text())["rows"]
    assert rows[-1]["client + scheduler MB"] > 50
    assert rows[-1]["log lines"] > 5


def test_episodes_are_counted_by_kind():
    ended = [
        Episode("a", outcome=SAME, faults=2),
        Episode("a", outcome="different", tracebacks=1),
        Episode("b", outcome="skipped"),
    ]
    a, b, all_kinds = bench.table(ended)
    assert (a["faults"], a["went on"], a["bytes different"], a["tracebacks"]) == (2, 1, 1, 1)
    assert (b["skipped"], all_kinds["kind"], all_kinds["episodes"]) == (1, "all 1 kinds", 3)
    assert set(bench.chosen("store,power-cut")) > {"store-503", "power-cut", "power-cut-after"}
    with pytest.raises(SystemExit, match="no kind is called nothing"):
        bench.chosen("nothing")


@pytest.mark.parametrize("name", [command.name or command.callback.__name__ for command in app.registered_commands])
def test_every_benchmark_explains_itself(name):
    done = CliRunner().invoke(app, [name, "--help"])
    assert done.exit_code == 0
    assert "Usage" in done.output


def test_a_volume_made_of_moved_tables_is_stitched_flat_and_in_a_tree(reference):
    pattern = stitch.cut_pattern(reference, (8, 16, 16), (16, 32, 64))
    assert pattern.counts == (4, 4, 8)
    row = stitch.measure_flat(pattern, stitch.periods_for(pattern, 3 * pattern.edges))
    assert 3 * pattern.edges > row["edges"] > 2 * pattern.edges
    assert row["objects"] > 0
    rows = stitch.measure_levels(pattern, 64 * 8 * 16 * 16)
    assert [r["parts"] for r in rows] == [64, 8, 1]
    assert rows[-1]["go up"] == 0 < rows[-1]["finished"]
