"""Stages side by side: on a real LocalCluster, told by what workers leave behind."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import SHAPE, Quiet, digest, markers_of, settings
from volseg import progress
from volseg.engine import cluster, compiled, finish, folder, schedule
from volseg.engine.receipts import RunStatistics
from volseg.engine.stages import group_of
from volseg.io import volume
from volseg.planning import prepare as describe

CUT = {"blocks": {"shape": (3, 150, 170)}}


def marks(out, stage):
    """Receipt and time of each block's end, by block."""
    found = {}
    for path in Path(out, "work/markers", stage).glob("[0-9]*.json"):
        found[int(path.name.partition("-")[0])] = json.loads(path.read_text()), path.stat().st_mtime_ns
    return found


def begun(image, out, **options):
    """A run of which nothing is done."""
    run = describe.from_image(volume.open(image), settings(**CUT, cluster=options), folder.partial_path(out))
    folder.begin(run, overwrite=False)
    return run


@pytest.fixture(scope="module")
def beside(image, tmp_path_factory):
    """A run on one worker that infers, for two tasks at once as on a GPU, and one worker beside it; what that told."""
    out = str(tmp_path_factory.mktemp("beside") / "run.volseg.zarr")
    run = begun(image, out, workers=1, cpu_workers=1)
    start = time.perf_counter()
    with cluster.connect(run.config.cluster, gpus=1) as client:
        ledger = schedule.run_stages(client, run, markers_of(run), Quiet())
        metrics = heartbeat(client)
        periodic = client.run(lambda dask_worker: set(dask_worker.periodic_callbacks))
    finished = finish.finish(run, out, ledger, start, start)
    return out, finished, metrics, periodic


def heartbeat(client):
    """The workers' metrics, once they have told of every block."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        found = [worker["metrics"] for worker in workers if "volseg" in worker["metrics"]]
        done = sum(metrics["volseg"]["voxels"].get("relabel", 0) for metrics in found)
        if len(found) == 2 and done == np.prod(SHAPE):
            return found
        time.sleep(0.1)
    raise AssertionError(f"no heartbeat told of all blocks: {found}")


def test_basins_are_cut_while_others_are_still_predicted(image, tmp_path):
    run = begun(image, str(tmp_path / "run.volseg.zarr"), workers=1)
    with cluster.connect(run.config.cluster, light=True) as client:  # one thread: what is handed out first ends first
        schedule._run_together(client, run, group_of(run, "basins"), markers_of(run), Quiet(), RunStatistics())
    assert marks(run.out, "fragments")[0][1] < max(stamp for _, stamp in marks(run.out, "predict").values())


def test_a_block_waits_for_what_it_is_made_from(beside, reference):
    out = beside[0]
    predicted, cut, linked = (marks(out, stage) for stage in ("predict", "fragments", "link"))
    assert len(predicted) == len(cut) == len(linked) == 8
    for i, (_, stamp) in cut.items():
        assert all(predicted[j][1] < stamp for j in (i - 1, i, i + 1) if j in predicted)
    for i, (_, stamp) in linked.items():
        assert all(cut[j][1] < stamp for j in (i - 1, i, i + 1) if j in cut)
    assert digest(out) == digest(reference)


def test_what_needs_no_device_leaves_it_alone(beside):
    pids = {
        stage: {receipt["pid"] for receipt, _ in marks(beside[0], stage).values()} for stage in ("predict", "fragments")
    }
    assert len(pids["predict"]) == len(pids["fragments"]) == 1
    assert not pids["predict"] & pids["fragments"]


def test_workers_count_what_they_do(beside):
    metrics = beside[2]
    total = {}
    for of in metrics:
        cluster.add(total, of["volseg"]["voxels"])
        assert set(of) >= {"volseg_voxels", "volseg_device_share", "volseg_queue"}
    assert {total[stage] for stage in ("predict", "fragments", "link", "relabel")} == {np.prod(SHAPE)}
    infers, other = sorted(metrics, key=lambda of: "predict" not in of["volseg"]["voxels"])
    assert 0 < infers["volseg_device_share"] <= 1
    assert other["volseg_device_share"] == 0
    assert set(infers["volseg"]["seconds"]) >= {"read", "infer", "blend", "write", "wait"}


def test_no_worker_keeps_what_it_did_each_second(beside):
    for periodic in beside[3].values():
        assert "heartbeat" in periodic
        assert not any(name.startswith("profile") for name in periodic)


def test_a_run_tells_where_its_time_went(beside):
    run = beside[1]
    facts = run.summary
    assert set(facts["worker_seconds"]["predict"]) == {
        "read",
        "cut",
        "load",
        "infer",
        "blend",
        "wait",
        "write",
        "other",
    }
    assert 0 < facts["device_share"] <= 1
    assert facts["queue"] >= 0
    spans = [facts["seconds"][stage] for stage in ("predict", "fragments", "link", "relabel")]
    assert all(0 < span <= facts["seconds"]["total"] for span in spans)
    said = run.report()[1:4]
    assert [line.partition(" ")[0] for line in said] == ["took", "workers", "device"]
    assert "predict" in said[1]
    assert "infer" in said[1]


def test_a_level_waits_for_the_one_above(beside):
    relabeled, coarser = marks(beside[0], "relabel"), marks(beside[0], "pyramid1")
    assert len(coarser) == 4
    for i, (_, stamp) in coarser.items():
        assert all(relabeled[j][1] < stamp for j in (2 * i, 2 * i + 1))


def test_lines_tell_of_all_stages_under_way(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0)
    show = progress.Lines()
    first, second = (show.stage(name, 100, 0) for name in ("predict", "fragments"))
    show.stage("link", 100, 100)
    first(50)
    second(25)
    first(50)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("%")[0].split() for line in lines] == [
        ["link", "100"], ["predict", "50"], ["predict", "50"], ["predict", "100"],
    ]  # fmt: skip
    assert "; fragments   25 %" in lines[2]


def test_loops_are_compiled_by_one_worker_alone(image, tmp_path, monkeypatch):
    monkeypatch.setenv("VOLSEG_CACHE", str(tmp_path / "cache"))  # as on a machine where nothing has run
    told = []
    begin, end = RunStatistics.begin, RunStatistics.end
    monkeypatch.setattr(RunStatistics, "begin", lambda self, title: (told.append((title, 1)), begin(self, title)))
    monkeypatch.setattr(RunStatistics, "end", lambda self, title, _: (told.append((title, -1)), end(self, title, _)))
    assert not compiled.known()
    run = begun(image, tmp_path / "run.volseg.zarr", workers=2)
    with cluster.connect(run.config.cluster) as client:
        schedule.run_stages(client, run, markers_of(run), Quiet())
    for title in ("fragments", "relabel"):
        steps = [step for name, step in told if name == title]
        assert steps[:2] == [1, -1], "the first block ends before another begins"
        assert len(steps) == 2 * len(run.grid)
    assert compiled.known()
