"""Benchmarks that compare labels, bytes and scores, on small volumes."""

import json
import shutil

import numpy as np
import pytest
import zarr
from typer.testing import CliRunner

from benchmarks import bytes as hashing
from benchmarks import (
    exact,
    heights,
    instances,
    padding,
    planes,
    report,
    touching,
)
from benchmarks.__main__ import app
from volseg import cli
from volseg.box import Box
from volseg.io import arrays


def test_stored_probabilities_cut_anew_give_one_answer(reference, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    exact.compare_blocks(reference)
    assert "one answer" in capsys.readouterr().out
    kept = json.loads((tmp_path / "exact-run.json").read_text())
    assert len(kept["rows"]) == 7
    assert kept["cores"] >= 1
    assert kept["date"]


def test_the_same_code_gives_the_same_bytes(monkeypatch):
    quick = [text.replace("fp32", "int8") for text in hashing.SETTINGS]  # which needs no torch
    monkeypatch.setattr(hashing, "SETTINGS", quick)
    different, rows = hashing.compare(hashing.ROOT, hashing.ROOT, ("blocks",), (16, 64, 96), 1)
    assert not different
    ((name, count, parts),) = rows
    assert (name, parts) == ("blocks", "-")
    assert count > 8


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


def test_volseg_finds_as_many_objects_at_every_block_size_as_one_watershed_of_the_whole(reference):
    probability = np.asarray(arrays.open_array(reference, "0"))
    counts = {side: instances.count_volseg(probability, side).objects for side in (170, 64, 24)}
    found = instances.count_scikit_image(probability, 0)
    assert set(counts.values()) == {found.objects}
    assert instances.count_per_block(probability, 170, shrink=True).objects == found.objects
    assert instances.count_per_block(probability, 24, shrink=False).objects > 0


def test_watersheds_of_bioimage_find_the_objects_that_scikit_image_finds(reference):
    pytest.importorskip("bioimage_py", reason="needs bioimage-py, which brings bioimage-cpp (extra bench)")
    probability = np.asarray(arrays.open_array(reference, "0"))
    found = [instances.count_bioimage_cpp(probability, 0), instances.count_bioimage_py(probability, 64)]
    assert {counted.objects for counted in found} == {instances.count_scikit_image(probability, 0).objects}


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
    monkeypatch.setattr(touching, "volseg", lambda *line: cli.app(list(line), standalone_mode=False))  # in this process
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


@pytest.mark.parametrize("name", [command.name or command.callback.__name__ for command in app.registered_commands])
def test_every_benchmark_explains_itself(name):
    done = CliRunner().invoke(app, [name, "--help"])
    assert done.exit_code == 0
    assert "Usage" in done.output


def test_padding_and_lost_sections_are_scored_both_ways(image, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(padding, "RIM", 40)
    monkeypatch.setattr(padding, "DAMAGE", {"black padding": padding.DAMAGE["black padding"]})
    out = str(tmp_path / "runs")
    padding.measure(image, f"{image}/labels/truth", "0:9,0:75,0:170", "5,5,5", ("",), out)
    rows = json.loads((tmp_path / "padding.json").read_text())["rows"]
    assert [row["damage"] for row in rows] == list(padding.DAMAGE)
    assert all(0 <= row[f"IoU, {mode}"] <= 1 for row in rows for mode in padding.MODES)
