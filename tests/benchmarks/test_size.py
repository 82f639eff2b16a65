"""Benchmarks of what volumes cost as they grow, on small ones."""

import json

import numpy as np
import pytest

from benchmarks import (
    horizon,
    report,
    restart,
    scaling,
    scattered,
    soak,
    stitch,
)
from tests.helpers import run_stages
from volseg.box import Box
from volseg.engine import finish
from volseg.io import volume


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


def test_what_a_run_of_many_blocks_holds_is_told_along_the_way(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(soak, "GRID_PLANE", (2, 3))
    monkeypatch.setattr(soak, "SAMPLE_S", 0.2)
    soak.measure(12, 1, str(tmp_path / "runs"))
    rows = json.loads((tmp_path / "soak.json").read_text())["rows"]
    assert rows[-1]["client + scheduler MB"] > 50
    assert rows[-1]["log lines"] > 5


def test_runs_in_one_process_are_watched_for_hours(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    soak.loop(1e-9, 1, str(tmp_path / "runs"))
    (row,) = json.loads((tmp_path / "soak-loop.json").read_text())["rows"]
    assert row["rounds"] == 1
    assert row["its open files"] > 2


def test_a_volume_made_of_moved_tables_is_stitched_flat_and_in_a_tree(reference):
    pattern = stitch.cut_pattern(reference, (8, 16, 16), (16, 32, 64))
    assert pattern.counts == (4, 4, 8)
    row = stitch.measure_flat(pattern, stitch.periods_for(pattern, 3 * pattern.edges))
    assert 3 * pattern.edges > row["edges"] > 2 * pattern.edges
    assert row["objects"] > 0
    rows = stitch.measure_levels(pattern, 64 * 8 * 16 * 16)
    assert [r["parts"] for r in rows] == [64, 8, 1]
    assert rows[-1]["go up"] == 0 < rows[-1]["finished"]


def test_a_restart_reads_all_markers_and_looks_at_files_wherever_they_are(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(restart, "LATENCY_S", 0.0)
    restart.measure(27)
    rows = json.loads((tmp_path / "restart.json").read_text())["rows"]
    assert [(row["store"], row["blocks"]) for row in rows] == [("disk", 27), ("30 ms away", 27)]


def test_more_workers_meet_another_limit():
    few, many = (horizon.hours_of(1e15, workers, 1.0, horizon.Rates()) for workers in (1, 10_000))
    assert few["compute"] == pytest.approx(10_000 * many["compute"])
    assert few["scheduler"] == many["scheduler"]
    assert max(few, key=few.get) == "compute"
    assert max(many, key=many.get) == "requests"


def test_scattered_spots_cost_tasks_of_their_own_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(scattered, "SPOT", (4, 16, 16))
    piece = np.random.default_rng(0).integers(1, 255, (4, 40, 40), np.uint8)
    em, mask = scattered.write(tmp_path, (8, 300, 400), piece, 2, 4)
    given = {"mask": str(mask), "voxel_size_nm": (5.0, 5.0, 5.0)}
    run, statistics = run_stages(str(em), tmp_path / "run.zarr", blocks={"shape": (4, 64, 64)}, input=given)
    finish.finish(run, run.out, statistics, 0.0, 0.0)
    row = scattered.facts(run.out)
    assert 0 < row["tasks"] < row["of a whole run"] / 4
    assert row["inferred / wanted"] > 1
