"""Whole runs: a real LocalCluster, real files, real kills. The model is the one that ships."""

import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import psutil
import pytest
import tifffile
import zarr
from distributed import Client, LocalCluster

from tests.helpers import (
    SHAPE,
    Quiet,
    Stops,
    command,
    decide,
    digest,
    mark,
    markers_of,
    settings,
    wait_for_markers,
    with_sets,
)
from volseg import api
from volseg.config import Cluster, load
from volseg.engine import cluster, folder, loop, pipeline, schedule
from volseg.engine.receipts import RunStatistics
from volseg.engine.run import Run
from volseg.engine.stages import stages_of
from volseg.errors import IncompleteRunError, UserError
from volseg.evaluation import calibrate, review
from volseg.evaluation.verify import verify
from volseg.inference import model
from volseg.io import arrays, files, volume
from volseg.planning import prepare as describe


@pytest.mark.parametrize(("block", "workers"), [((7, 64, 64), 2), ((22, 37, 101), 1), ((5, 150, 170), 2)])
def test_labels_do_not_depend_on_blocks_or_workers(image, reference, tmp_path, block, workers):
    out = str(tmp_path / "run.volseg.zarr")
    summary = api.infer(
        image, out, config=settings(blocks={"shape": block}, cluster={"workers": workers}), progress=Quiet()
    )
    assert summary.object_count > 3
    assert digest(out) == digest(reference)
    for level in (1, 2):
        left, right = (zarr.open_array(f"{run}/labels/instances/{level}", mode="r")[:] for run in (out, reference))
        np.testing.assert_array_equal(left, right)
    pandas.testing.assert_frame_equal(
        pandas.read_parquet(f"{out}/tables/objects.parquet"),
        pandas.read_parquet(f"{reference}/tables/objects.parquet"),
        check_exact=True,
    )


def test_killed_workers_are_replaced_and_change_nothing(image, reference, tmp_path):
    out = tmp_path / "run.volseg.zarr"
    cut = "--set=blocks.shape=[4, 150, 170]"
    process = subprocess.Popen(command(image, out, cut, "--workers", "2"), stderr=subprocess.PIPE, text=True)
    try:
        wait_for_markers(out, 1, process)
        done = [json.loads(p.read_text()) for p in Path(f"{out}.partial/work/markers/predict").glob("[0-9]*.json")]
        for pid in {receipt["pid"] for receipt in done}:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        assert process.wait(timeout=200) == 0, process.stderr.read()
    finally:
        process.kill()
        process.stderr.close()
        process.wait()
    assert digest(out) == digest(reference)


def test_a_killed_run_goes_on_and_does_nothing_twice(image, reference, tmp_path):
    out = tmp_path / "run.volseg.zarr"
    line = command(image, out, "--set=blocks.shape=[3, 150, 170]", "--workers", "1")
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for_markers(out, 2, process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not out.exists()
    before = {p.name: p.stat().st_mtime_ns for p in Path(f"{out}.partial/work/markers/predict").glob("[0-9]*.json")}
    again = subprocess.run(line, capture_output=True, timeout=250, text=True)
    assert again.returncode == 0
    share = f"{100 * len(before) / 8:.0f} %"
    assert f"going on from an earlier command: {share} of predict is done" in again.stderr
    took = [text for text in again.stdout.splitlines() if text.startswith(("took", "plan / actual"))]
    assert len(took) == 2
    assert all(f"{share} of the probabilities were there before" in text for text in took)
    assert "Mvoxel/s" not in again.stdout
    after = {p.name: p.stat().st_mtime_ns for p in (out / "work/markers/predict").glob("[0-9]*.json")}
    assert 2 <= len(before) < len(after)
    assert all(after[name] == stamp for name, stamp in before.items())
    assert digest(out) == digest(reference)


def test_a_worker_with_another_volseg_makes_nothing(image, tmp_path):
    """As in a folder or on a host that has one of another state, whose results would lie under other keys."""
    run = describe.from_image(volume.open(image), settings(), str(tmp_path / "run.partial"))
    folder.begin(run, overwrite=False)
    plain = run.layout.load_description()
    run.layout.save_description({**plain, "keys": {**plain["keys"], "stitch": "of another state"}})
    with pytest.raises(
        UserError, match=r"the worker on .* has another volseg than the command .*: what it made would not fit"
    ):
        pipeline.process_block(run.out, run.id, "predict", 0)
    assert not markers_of(run).done("predict")


def test_an_unfinished_run_of_other_settings_is_refused(image, tmp_path):
    out = str(tmp_path / "run.volseg.zarr")
    config = settings()
    source = volume.open(image)
    folder.begin(describe.from_image(source, config, f"{out}.partial"), overwrite=False)
    with pytest.raises(UserError, match=r"fragments\.threshold = 0\.\d+, this one 0\.123.*--overwrite"):
        api.infer(image, out, config=settings(fragments={"threshold": 0.123}), progress=Quiet())
    with pytest.raises(UserError, match=r"backend = 'auto', this one 'onnx'"):
        api.infer(image, out, config=settings(predict={"backend": "onnx"}), progress=Quiet())


def test_a_stopped_run_is_kept_unless_it_is_to_be_overwritten(image, tmp_path):
    out = str(tmp_path / "run.volseg.zarr")
    run = describe.from_image(volume.open(image), settings(), f"{out}.partial")
    folder.begin(run, overwrite=False)
    mark(run, "predict", 0)
    folder.begin(run, overwrite=False)
    assert markers_of(run).done("predict") == {0}
    folder.begin(run, overwrite=True)
    assert not markers_of(run).done("predict")


def test_half_made_label_arrays_are_made_again(image, tmp_path):
    run = describe.from_image(volume.open(image), settings(), str(tmp_path / "run.partial"))
    folder.begin(run, overwrite=False)
    arrays.create_array(run.out, "labels/instances/0", shape=SHAPE, dtype="uint8", chunk=SHAPE, shard=SHAPE)
    folder.create_labels(run, markers_of(run))
    folder.create_labels(run, markers_of(run))
    made = zarr.open_group(run.out, mode="r")["labels/instances"]
    assert sorted(made.keys()) == [str(level) for level in range(len(run.levels))]
    assert made["0"].dtype == np.uint32
    assert made.attrs["ome"]["multiscales"]


@pytest.mark.parametrize("where", ["em.zarr", "folder"])
def test_what_no_run_made_is_never_replaced(image, tmp_path, where):
    shutil.copytree(image, tmp_path / "em.zarr")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/precious").write_text("kept")
    out = str(tmp_path / where)
    with pytest.raises(UserError, match=r"would replace the volume|not a volseg run"):
        api.infer(str(tmp_path / "em.zarr"), out, config=settings(), overwrite=True, progress=Quiet())
    assert (tmp_path / "em.zarr/0").exists()
    assert (tmp_path / "folder/precious").exists()


def test_a_bucket_that_holds_other_things_is_left_alone(bucket, image):
    files.write_bytes(f"{bucket}/shared", "precious", b"kept")
    with pytest.raises(UserError, match="not a volseg run"):
        api.infer(image, f"{bucket}/shared", config=settings(), overwrite=True, progress=Quiet())
    assert files.read_bytes(f"{bucket}/shared", "precious") == b"kept"


def test_a_worker_of_another_kind_is_refused(image, tmp_path):
    run = describe.from_image(volume.open(image), settings(), str(tmp_path / "run.partial"))
    foreign = replace(run, engine=replace(run.engine, processor="abacus"))
    folder.begin(foreign, overwrite=False)
    with pytest.raises(UserError, match=r"abacus.*bits differ"):
        pipeline.process_block(foreign.out, foreign.id, "predict", 0)


def test_a_damaged_chunk_ends_the_run_in_one_line(image, reference, tmp_path):
    broken = tmp_path / "broken.zarr"
    shutil.copytree(image, broken)
    shard = next(broken.glob("0/c/0/1/*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "run.volseg.zarr"
    checked = settings(blocks={"shape": (22, 75, 170)}, cluster={"workers": 1, "tries": 2}, predict={"tile": 64})
    with pytest.raises(UserError, match=r"cannot read .* damaged"):
        api.infer(str(broken), str(out), config=checked, progress=Quiet())
    assert not out.exists()


def test_a_block_that_cannot_be_read_leaves_a_run_that_can_go_on(image, reference, tmp_path):
    out = tmp_path / "run.volseg.zarr"
    config = settings(blocks={"shape": (11, 150, 170)}, cluster={"workers": 1, "tries": 1})
    copy = tmp_path / "em.zarr"
    shutil.copytree(image, copy)
    run = describe.from_image(volume.open(str(copy)), config, f"{out}.partial")
    folder.begin(run, overwrite=False)
    shard = next(copy.glob("0/c/0/1/*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with cluster.connect(config.cluster) as client, pytest.raises(IncompleteRunError, match="block 0:11,0:150,0:170"):
        schedule._run_together(client, run, [stages_of(run)["predict"]], markers_of(run), Quiet(), RunStatistics())
    shard.write_bytes(whole)
    api.infer(str(copy), str(out), config=config, progress=Quiet())
    assert digest(out) == digest(reference)


def hold_at_most(more):
    """This process, once its libraries are loaded, is given so many bytes more and no others."""
    import resource

    importlib.import_module("volseg.engine.pipeline")
    model.load(model.shipped())
    status = Path("/proc/self/status").read_text()
    held = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmData:"))) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (held + more, held + more))


def test_a_run_is_no_image(reference, tmp_path):
    for work in (api.infer, api.plan):
        with pytest.raises(UserError, match=r"is a run, not an image: decide it anew with volseg segment"):
            work(reference, str(tmp_path / "run.volseg.zarr"), config=settings())
    with pytest.raises(UserError, match="is a run, not an image"):
        describe.try_backends(reference, settings())


@pytest.mark.parametrize(
    ("sets", "why"),
    [
        ({"fragments": {"threshold": 0.7}}, "no voxel, smoothed, reaches fragments.threshold = 0.7"),
        ({"stitch": {"seed": 0.8}}, "none of 1 basins holds a seed: mask less contour, smoothed, is at most 0.60, stitch.seed "
                                    "= 0.8"),
        ({"stitch": {"seed": 0.5, "min_voxels": 9999}}, "all are of another size than stitch.min_voxels = 9999 and the like "
                                                        "want them"),
    ],
)  # fmt: skip
def test_a_run_without_objects_says_what_it_lacks(tmp_path, sets, why):
    chance = np.zeros((9, 20, 20), np.uint8)
    chance[:, 5:15, 5:15] = 153
    tifffile.imwrite(tmp_path / "chance.tif", chance)
    config = load(base={"fragments": {"threshold": 0.5}, "cluster": {"workers": 1, "dashboard": ""}, **sets})
    paths = str(tmp_path / "chance.tif"), str(tmp_path / "run.volseg.zarr")
    summary = api.segment(*paths, config=config, progress=Quiet())
    assert (summary.object_count, summary.summary["why_no_object"]) == (0, why)


@pytest.fixture
def small(reference):
    """Address of a scheduler whose one worker has 500 MB for what it computes; kernels are compiled, since a run was made."""
    if sys.platform != "linux":
        pytest.skip("limits a process's memory as Linux does")
    with LocalCluster(n_workers=1, threads_per_worker=1, memory_limit=0, dashboard_address=":0") as workers:
        with Client(workers, set_as_default=False) as client:
            client.run(hold_at_most, 500 << 20)
        yield workers.scheduler_address


def test_a_batch_that_does_not_fit_the_memory_is_halved_and_the_run_begins_again(image, small, tmp_path):
    out, show = str(tmp_path / "run.volseg.zarr"), Quiet()
    options = {"predict": {"backend": "torch", "precision": "fp32", "batch": 1024}}
    api.infer(image, out, config=settings(**options, cluster={"scheduler": small}), progress=show)
    said = [text for text in show.said if "beginning again" in text]
    assert "1024 tiles of 64 x 64 at once (" in said[0]
    assert said[0].endswith("beginning again, 512 at once")
    facts = json.loads(Path(out, "run.json").read_text())
    fits = facts["engine"]["batch"]
    assert fits == 1024 >> len(said) > 1
    assert facts["config"]["predict"]["batch"] == 1024
    assert facts["engine"]["why"].count("memory holds no more") == 1
    again = str(tmp_path / "again.volseg.zarr")
    options["predict"]["batch"] = fits
    api.infer(image, again, config=settings(**options, cluster={"workers": 1}), progress=Quiet())
    np.testing.assert_array_equal(*(zarr.open_array(f"{run}/0", mode="r")[:] for run in (out, again)))


def test_a_run_that_has_come_far_is_kept_where_a_batch_does_not_fit(image, small, tmp_path):
    out = str(tmp_path / "run.volseg.zarr")
    sets = {"predict": {"backend": "torch", "precision": "fp32", "batch": 1024}, "blocks": {"shape": [2, 150, 170]}}
    config = settings(**sets, cluster={"scheduler": small})
    run = describe.from_image(volume.open(image), config, folder.partial_path(out))
    folder.begin(run, overwrite=False)
    for i in range(2):  # of 11
        mark(run, "predict", i)
    with pytest.raises(IncompleteRunError, match=r"what is done is kept.* --set predict\.batch=512 --overwrite"):
        api.infer(image, out, config=config, progress=Quiet())
    assert markers_of(run).done("predict") == {0, 1}


def test_a_removal_that_was_stopped_leaves_nothing_that_counts(image, reference, tmp_path, monkeypatch):
    out = tmp_path / "run.volseg.zarr"
    shutil.copytree(reference, f"{out}.partial")
    run = replace(Run.from_json(json.loads(Path(reference, "work/run.json").read_text())), out=f"{out}.partial")
    remove, left = files.remove, Path(f"{out}.partial")
    every = len(list(left.iterdir())) + len(list((left / "work").iterdir()))
    for stopped in range(1, every - 2, 3):
        removed = []

        def stop(path, removed=removed, most=stopped):
            if len(removed) == most:
                raise KeyboardInterrupt
            removed.append(path)
            remove(path)

        monkeypatch.setattr(files, "remove", stop)
        with pytest.raises(KeyboardInterrupt):
            folder.restart(run)
        monkeypatch.undo()
        assert not (left / "work/run.json").exists()
        folder.check_output([], str(out), overwrite=False)
        shutil.rmtree(left)
        shutil.copytree(reference, left)


def test_one_tile_that_does_not_fit_the_memory_is_refused(small, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (2, 2048, 2048), np.uint8)
    tifffile.imwrite(tmp_path / "em.tif", noise)
    large = settings(predict={"backend": "torch", "precision": "fp32", "tile": 2048}, cluster={"scheduler": small})
    with pytest.raises(
        IncompleteRunError, match=r"1 tile of 2048 x 2048 at once .*; a smaller predict\.tile takes less"
    ):
        api.infer(str(tmp_path / "em.tif"), str(tmp_path / "run.volseg.zarr"), config=large, progress=Quiet())


def test_a_run_is_an_ome_zarr_image_with_labels(reference):
    group = zarr.open_group(reference, mode="r")
    image = group.attrs["ome"]
    assert image["version"] == "0.5"
    assert [axis["name"] for axis in image["multiscales"][0]["axes"]] == ["c", "z", "y", "x"]
    assert group["0"].shape == (2, *SHAPE)
    assert group["labels"].attrs["ome"]["labels"] == ["instances"]
    levels = group["labels/instances"].attrs["ome"]["multiscales"][0]["datasets"]
    assert [group[f"labels/instances/{level['path']}"].shape for level in levels][:2] == [SHAPE, (11, 75, 85)]
    assert group["labels/instances/0"].dtype == np.uint32


def test_a_run_tells_what_it_was(reference):
    facts = json.loads(Path(reference, "run.json").read_text())
    assert facts["objects"] == len(pandas.read_parquet(f"{reference}/tables/objects.parquet"))
    assert facts["model_sha256"] == hashlib.sha256(model.shipped().read_bytes()).hexdigest()
    assert facts["peak_bytes"]["worker"] > 0
    assert facts["bus_bytes"] == {"sent": 0, "fetched": 0}
    assert facts["config"]["predict"]["tile"] == 96
    assert Path(reference, "overlay.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_counts_the_labels(reference):
    labels = zarr.open_array(f"{reference}/labels/instances/0", mode="r")[:]
    ids, voxels = np.unique(labels[labels > 0], return_counts=True)
    table = pandas.read_parquet(f"{reference}/tables/objects.parquet")
    assert table["id"].tolist() == ids.tolist() == list(range(1, len(ids) + 1))
    assert table["voxels"].tolist() == voxels.tolist()


def test_a_run_from_and_to_an_object_store(bucket, image, reference):
    em, out = f"{bucket}/em.zarr", f"{bucket}/run.volseg.zarr"
    for path in Path(image).rglob("*"):
        if path.is_file():
            files.write_bytes(em, str(path.relative_to(image)), path.read_bytes())
    config = settings(cluster={"workers": 1})
    api.infer(em, out, config=config, progress=Quiet())
    assert digest(out) == digest(reference)
    with pytest.raises(UserError, match="exists"):
        api.infer(em, out, config=config, progress=Quiet())


def test_a_run_on_an_object_store_begins_again(bucket, image, reference):
    out, config = f"{bucket}/again.volseg.zarr", settings(cluster={"workers": 1})
    run = describe.from_image(volume.open(image), config, folder.partial_path(out))
    folder.begin(run, overwrite=False)
    arrays.write(
        arrays.open_array(run.out, "0"), run.predict_grid[0], np.full((2, *run.predict_grid[0].shape), 9, np.uint8)
    )
    mark(run, "predict", 0)
    folder.restart(run)
    assert markers_of(run).done("predict") == set()
    assert not arrays.open_array(run.out, "0")[:].any()
    api.infer(image, out, config=config, progress=Quiet())
    assert digest(out) == digest(reference)


@pytest.fixture
def finished(reference, tmp_path):
    """A copy of a finished run that a test may change."""
    shutil.copytree(reference, tmp_path / "run.volseg.zarr")
    return str(tmp_path / "run.volseg.zarr")


def test_deciding_anew_gives_what_a_new_run_would(image, reference, finished, tmp_path):
    fresh = str(tmp_path / "fresh.volseg.zarr")
    other = {"stitch": {"seed": 0.95, "min_voxels": 3000}, "cluster": {"workers": 1}}
    api.infer(image, fresh, config=settings(**other), progress=Quiet())
    show = Quiet()
    change = with_sets("stitch.seed=0.95", "stitch.min_voxels=3000")
    summary = decide(finished, change, progress=show)
    assert digest(finished) == digest(fresh) != digest(reference)
    assert show.stages["predict"][0] == show.stages["fragments"][0] == np.prod(SHAPE)
    assert show.stages["relabel"][0] == 0
    assert summary.object_count == len(pandas.read_parquet(f"{finished}/tables/objects.parquet"))
    back = with_sets(f"stitch.seed={settings().stitch.seed}", "stitch.min_voxels=100")
    decide(finished, back, progress=Quiet())
    assert digest(finished) == digest(reference)


def test_other_blocks_from_stored_probabilities_change_nothing(reference, finished):
    decide(finished, with_sets("blocks.shape=[9, 50, 71]"), progress=Quiet())
    assert digest(finished) == digest(reference)


def test_a_run_whose_volume_was_moved_away_is_decided_and_reviewed_all_the_same(image, finished):
    for name in ("run.json", "work/run.json"):
        facts = Path(finished, name).read_text()
        assert image in facts
        Path(finished, name).write_text(facts.replace(image, f"{image}-moved"))
    before = Path(finished, "overlay.png").read_bytes()
    decide(finished, with_sets("stitch.min_voxels=3000"), progress=Quiet())
    after = Path(finished, "overlay.png").read_bytes()
    assert before != after
    assert after.startswith(b"\x89PNG")
    assert len(review.review(finished, 1).decisions) <= 1


def test_a_tree_of_blocks_that_was_stopped_goes_on_to_the_same_labels(image, reference, finished):
    change = with_sets("blocks.shape=[9, 50, 71]", "stitch.reduce=tree")
    with pytest.raises(KeyboardInterrupt):
        decide(finished, change, progress=Stops("assign1"))
    show = Quiet()
    decide(finished, change, progress=show)
    assert digest(finished) == digest(reference)
    voxels = np.prod(SHAPE)
    assert [show.stages[name][0] for name in ("contract0", "contract2", "rank", "assign2", "assign1")] == [
        voxels
    ] * 4 + [0]
    assert not Path(finished, "work/tree").exists()
    assert any("joins need all edges" in said for said in show.said)
    made, flat = (pandas.read_parquet(f"{out}/tables/objects.parquet") for out in (finished, reference))
    pandas.testing.assert_frame_equal(made, flat, check_exact=True)
    made, flat = (pandas.read_parquet(f"{out}/tables/merges.parquet") for out in (finished, reference))
    borders = flat[flat["kind"] == "border"].reset_index(drop=True)
    pandas.testing.assert_frame_equal(made, borders, check_exact=True)
    assert len(review.review(finished, 3).decisions) == min(3, len(borders))
    result = verify(str(finished))
    assert result.ok, str(result)
    assert result.rejoining.wrong == 0
    with pytest.raises(UserError, match=r"--set stitch\.reduce=flat"):
        calibrate.calibrate(finished, f"{image}/labels/truth")
    show = Quiet()
    decide(finished, with_sets("stitch.reduce=flat"), progress=show)
    assert digest(finished) == digest(reference)
    assert show.stages["stitch"][0] == 0
    assert show.stages["relabel"][0] == voxels
    assert calibrate.calibrate(finished, f"{image}/labels/truth").candidates


def test_a_cleaned_run_is_decided_anew_only_when_asked(reference, finished):
    shutil.rmtree(f"{finished}/work")
    with pytest.raises(UserError, match="--recompute"):
        decide(finished, with_sets("stitch.seed=0.9"), progress=Quiet())
    decide(finished, with_sets(), recompute=True, progress=Quiet())
    assert digest(finished) == digest(reference)


def test_a_run_of_another_version_is_decided_anew_only_when_asked(reference, finished):
    before = Path(finished, "work/run.json").read_text()
    key = json.loads(before)["keys"]["predict"]
    Path(finished, "work/run.json").write_text(before.replace(key, "0123456789abcdef"))
    with pytest.raises(UserError, match="another version of volseg"):
        decide(finished, with_sets("stitch.seed=0.9"), progress=Quiet())
    decide(finished, with_sets(), recompute=True, progress=Quiet())
    assert digest(finished) == digest(reference)


def test_deciding_anew_refuses_what_needs_the_network(reference, finished, tmp_path):
    with pytest.raises(UserError, match="cannot change input, predict"):
        decide(finished, with_sets("predict.batch=2"), progress=Quiet())
    with pytest.raises(UserError, match="follows a channel of distance"):
        decide(finished, with_sets("fragments.height=head"), progress=Quiet())
    assert Path(finished, "run.json").exists()
    assert digest(finished) == digest(reference)
    with pytest.raises(UserError, match="no such file or folder"):
        decide(str(tmp_path / "absent"), with_sets(), progress=Quiet())


def double(out, key, stage, item):
    if item == 3:
        raise ValueError("three is broken")
    return 2 * item


def test_the_loop_returns_failures_and_keeps_going():
    found = {}
    with cluster.connect(Cluster(workers=1, dashboard="")) as client:
        failures = loop.run(
            client, double, range(40), "out", "key", "double", tries=2, window=4, done=found.__setitem__
        )
    assert found == {i: 2 * i for i in range(40) if i != 3}
    assert [(f.item, f.reason) for f in failures] == [(3, "ValueError: three is broken")]


def together(stage, item):
    return f"{stage} {item}"


def test_the_loop_asks_again_for_what_is_not_there_yet():
    ended, waiting = [], deque()

    def items():
        first = iter(("first", i) for i in range(20))
        while True:
            yield waiting.popleft() if waiting else next(first, None)

    def done(item, result):
        ended.append(result)
        if item[0] == "first":
            waiting.append(("second", item[1]))

    with cluster.connect(Cluster(workers=1, dashboard="")) as client:
        failures = loop.run(client, together, items(), window=2, done=done)
    assert not failures
    assert sorted(ended) == sorted(f"{stage} {i}" for stage in ("first", "second") for i in range(20))
    assert ended.index("second 0") < ended.index("first 19")


def test_a_scheduler_that_does_not_answer_is_refused():
    with pytest.raises(UserError, match="no Dask scheduler answers"), cluster.connect(
        Cluster(scheduler="tcp://127.0.0.1:9")
    ):  # fmt: skip
        pass


@pytest.mark.parametrize(
    ("options", "said"),
    [({"tile": 127, "overlap": 48}, r"overlap = 48 is more than half of a tile of 64.*tile = 127.*set 32 or less"),
     ({"tile": 32, "overlap": 16}, r"tile = 32: this network takes multiples of 64; set 64 or more")],
)  # fmt: skip
def test_tiles_that_a_network_which_bins_cannot_take_are_refused(image, options, said):
    """Half of a tile of 127 is more for a network that takes multiples of 32: only the model file tells."""
    with pytest.raises(UserError, match=said):
        describe.from_image(volume.open(image), settings(predict=options), "out")
