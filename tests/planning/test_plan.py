"""What a run will take is told before it runs, and held against real processes."""

import json
import os
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.helpers import Quiet, digest, run_stages, settings, write_volume
from volseg import api, cli
from volseg.box import Box, transpose_axes
from volseg.config import Config
from volseg.engine import cluster
from volseg.engine.blocks import choose_blocks, with_cuts, with_full_batches
from volseg.engine.run import Run, redundancy
from volseg.engine.shares import Share
from volseg.errors import UserError
from volseg.inference import cache, tiles
from volseg.inference.backends import Engine
from volseg.io import arrays, files, volume
from volseg.io.roi import RegionOfInterest
from volseg.planning import measure, memory, plan
from volseg.planning import prepare as describe

GB = 10**9
ENGINE = Engine("openvino", "fp32", "cpu", "x86_64", "2025.3", "0.1.0", why="as set")


def unread(shape, tmp_path, chunk=(1, 4096, 4096), **sections):
    """A run over a volume of that shape whose voxels nobody reads, on two workers that share 24 GB."""
    config = settings(**{"predict": {"tile": 1280, "overlap": 64}, **sections})
    source = volume.Volume(str(tmp_path / "em.zarr"), "zarr", shape, "uint8", (5.0, 5.0, 5.0), chunk)
    slab, block = choose_blocks(shape, config.blocks.shape)
    run = Run(str(tmp_path / "run"), source, config, ("mask", "contour"), (5.0, 5.0, 5.0), "", slab, block,
              sections=3, engine=ENGINE)  # fmt: skip
    return memory.with_blocks_that_fit(run, (24 * GB - memory.CLIENT_BYTES) // 2, threads=1)


def test_few_voxels_are_inferred_twice(tmp_path):
    assert redundancy(unread((165, 768, 1024), tmp_path)) <= 1.05  # EPFL
    assert redundancy(unread((16, 4096, 4096), tmp_path)) <= 1.15


def test_each_tile_is_inferred_once(tmp_path):
    run = unread((5, 300, 2000), tmp_path, predict={"tile": 256, "overlap": 32}, blocks={"shape": (2, 170, 900)})
    grid = run.tile_grid("xy")
    own = [tile for i in range(len(run.predict_grid)) for tile in Share.of_block(run, "xy", i).own]
    assert sorted(own) == sorted(3 * list(grid.overlapping(slice(0, 300), slice(0, 2000)))), "3 layers of blocks"
    assert run.inferred_voxels == 5 * len(own) // 3 * grid.size[0] * grid.size[1]
    assert redundancy(run) == run.inferred_voxels / (5 * 300 * 2000)


@pytest.mark.parametrize("shape", [(64, 1536, 1536), (64, 20000, 20000), (3000, 20000, 20000)])
def test_no_worker_is_left_idle_by_a_few_deep_chunks(tmp_path, shape):
    run = unread(shape, tmp_path, chunk=(64, 64, 64))
    region = Box((0, 0, 0), (64, 1536, 1536))
    for workers in (2, 4):
        small = replace(run, roi=RegionOfInterest(region), cuts={})
        cut = with_cuts(small, memory.cut_room(small), workers)
        wanted = [i for i in cut.predict_grid.overlapping(region) if cut.predict_grid[i].intersect(region).voxels]
        assert len(wanted) >= workers


@pytest.mark.parametrize("shape", [(64, 3000, 3000), (16, 4096, 4096), (500, 900, 900), (8, 20000, 20000)])
@pytest.mark.parametrize("room", [3 * GB, 1 * GB])
def test_blocks_are_cut_until_they_fit(tmp_path, shape, room):
    run = memory.with_blocks_that_fit(unread(shape, tmp_path), room, threads=1)
    assert memory.worker_bytes(run, 1) <= room


@pytest.mark.parametrize(
    ("shape", "planes", "gpus", "deep"),
    [
        ((165, 768, 1024), ("xy",), 1, {"xy": 48}),
        ((165, 768, 1024), ("xy",), 2, {"xy": 24}),
        ((1024, 1024, 1024), ("xy",), 1, {"xy": 64}),
        ((512, 4096, 4096), ("xy",), 1, {"xy": 4}),
        ((165, 768, 1024), ("xy", "xz", "yz"), 1, {"xy": 48, "xz": 64, "yz": 64}),
        ((5, 768, 1024), ("xy",), 1, {"xy": 5}),
    ],
)
def test_blocks_on_a_gpu_fill_its_batches(tmp_path, shape, planes, gpus, deep):
    run = unread(shape, tmp_path, predict={"tile": 1280, "overlap": 64, "planes": planes})
    run = with_full_batches(replace(run, engine=replace(ENGINE, device="cuda", batch=8)), gpus)
    found = {
        p: transpose_axes(run.pass_grid(p).block if run.passes else run.predict_block, tiles.PLANES[p])[0]
        for p in planes
    }
    assert found == deep
    for plane, depth in found.items():
        grid = run.tile_grid(plane)
        sections, *section = transpose_axes(shape, tiles.PLANES[plane])
        each = len(grid.overlapping(*(slice(0, n) for n in section)))
        slots = sum(-(-min(depth, sections - z) * each // 8) * 8 for z in range(0, sections, depth))
        assert sections * each / slots > 0.9 or sections < 8
    own = unread(shape, tmp_path, blocks={"shape": (3, 300, 300)})
    assert with_full_batches(own, gpus) == own


def test_with_memory_to_spare_blocks_are_as_ever(tmp_path):
    run = unread((500, 900, 900), tmp_path)
    assert (run.predict_block, run.block) == choose_blocks((500, 900, 900), None)
    own = unread((64, 3000, 3000), tmp_path, blocks={"shape": (64, 3000, 3000)})
    assert memory.with_blocks_that_fit(own, GB, 1) == own


@pytest.mark.parametrize(
    ("memory_free", "disk_free", "limit", "said"),
    [
        (2 * GB, 100 * GB, 0, r"2 worker\(s\) of .* GB and .* GB here would hold .*, and 2\.00 GB of memory are free: "
                              r"set cluster\.workers=1"),
        (GB // 2, 100 * GB, 0, r"0\.50 GB of memory are free: set predict\.tile=544"),
        (64 * GB, GB // 2, 0, r"would be written to .*, and 0\.50 GB are free there: give --out on a larger disk"),
        (64 * GB, 100 * GB, GB // 5, r"may hold 0\.20 GB: set predict\.tile=544, or give it more with cluster\.memory_limit"),
    ],
)  # fmt: skip
def test_a_run_that_will_not_fit_is_refused(tmp_path, memory_free, disk_free, limit, said):
    run = unread((64, 4096, 4096), tmp_path)
    workers = cluster.WorkerPool(2)
    run = memory.with_blocks_that_fit(run, GB, 1)
    found = plan.make_plan(run, workers, measure.known_rates(run, workers))
    plan.refuse_limit(found, run, GB)
    plan.refuse(found, run, 64 * GB, 100 * GB)
    with pytest.raises(UserError, match=said):
        _ = plan.refuse_limit(found, run, limit) or plan.refuse(found, run, memory_free, disk_free)


def test_a_network_that_was_measured_when_it_was_chosen_is_planned_with_that_speed(tmp_path):
    run = unread((64, 4096, 4096), tmp_path)
    fast = replace(run, engine=replace(run.engine, speed=1000.0 * cluster.CPU_COUNT))
    assert fast.engine.arithmetic == run.engine.arithmetic
    one, two = (measure.known_rates(run, cluster.WorkerPool(n)) for n in (1, 2))
    assert two.predict == 2 * one.predict
    alone = measure.known_rates(fast, cluster.WorkerPool(1)).predict
    assert one.predict < alone < 1e9, "reading and storing take time beside it"


def test_a_batch_that_will_not_fit_is_what_the_advice_is_about(tmp_path):
    run = unread((64, 4096, 4096), tmp_path)
    run = replace(run, engine=replace(run.engine, batch=64))
    found = plan.make_plan(run, cluster.WorkerPool(1), measure.known_rates(run, cluster.WorkerPool(1)))
    with pytest.raises(UserError, match=r"set predict\.batch=32 or less$"):
        plan.refuse(found, run, 8 * GB, 100 * GB)


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A volume of noise, wide enough that a block outweighs the libraries. Tests must not change it."""
    voxels = np.random.default_rng(0).integers(1, 255, (3, 1000, 1000), dtype=np.uint8)
    return write_volume(str(tmp_path_factory.mktemp("noise") / "em.zarr"), voxels)


def test_the_projected_memory_is_that_of_a_real_worker(noise, tmp_path):
    """Whole runs, their plan against the most that a worker process held: within 30 % either way."""
    out = str(tmp_path / "run.volseg.zarr")
    config = settings(predict={"tile": 256, "overlap": 32}, cluster={"workers": 1}, input={"roi": "0:3,0:260,0:260"},
                      blocks={"shape": (3, 1000, 1000)})  # fmt: skip
    run = api.infer(noise, out, config=config, progress=Quiet())
    facts = json.loads(Path(out, "run.json").read_text())
    assert 1 / 1.3 < facts["plan"]["worker_bytes"] / facts["actual"]["worker_bytes"] < 1.3
    assert facts["plan"]["inferred_voxels"] == facts["actual"]["inferred_voxels"]
    assert facts["actual"]["written_bytes"] > 0
    made = plan.Plan.from_json(run.plan)
    assert "plan / actual" in plan.format_comparison(made, run.seconds["total"], 1, 1)


def test_a_probe_tells_the_bytes_of_the_tables_that_a_run_stores(reference):
    """Within a factor of 2 of those of a real run, which cuts the same voxels into other blocks."""
    facts = json.loads(Path(reference, "run.json").read_text())
    probability = np.asarray(arrays.open_array(reference, "0"))
    found = measure.measure_instances(probability, Config(**facts["config"]).fragments, tuple(facts["voxel_size_nm"]))
    stored = sum(files.stored_bytes(f"{reference}/work/{name}") for name in ("tables", "links", "labels"))
    block = Run.from_json(json.loads(Path(reference, "work/run.json").read_text())).block
    assert 0.5 < plan.table_bytes(probability.shape[1:], block, found["packed"]) / stored < 2


def test_a_height_that_the_model_cannot_give_is_refused_before_anything_is_measured(image, tmp_path):
    with pytest.raises(UserError, match=r"channel of distance, which this run lacks: .* a model"):
        api.plan(image, str(tmp_path / "run"), config=settings(fragments={"height": "head"}))


def test_a_plan_of_more_than_one_worker_is_shorter(tmp_path):
    run = unread((64, 1024, 1024), tmp_path)
    pools = cluster.WorkerPool(1), cluster.WorkerPool(2)
    one, two = (plan.make_plan(run, workers, measure.known_rates(run, workers)) for workers in pools)
    assert one.total_seconds > two.total_seconds > one.total_seconds / 2
    assert one.written_bytes == two.written_bytes > np.prod(run.shape)


def test_two_workers_keep_within_a_small_limit_and_change_nothing(noise, tmp_path):
    """Blocks are cut to fit, each worker holds less than its limit, and the labels are those of other blocks."""
    options = {
        "predict": {"tile": 128, "overlap": 32},
        "stitch": {"min_voxels": 10},
        "input": {"roi": "0:3,0:200,0:260"},
    }
    limit = 0.36
    config = settings(**options, cluster={"workers": 2, "memory_limit": limit})
    free = describe.from_image(volume.open(noise), settings(**options, cluster={"workers": 2}), str(tmp_path / "x"))
    tight = describe.from_image(volume.open(noise), config, str(tmp_path / "x"))
    assert np.prod(tight.block) < np.prod(free.block)
    outs = [str(tmp_path / name) for name in ("tight.zarr", "free.zarr")]
    summary = api.infer(noise, outs[0], config=config, progress=Quiet())
    run_stages(noise, outs[1], **options, cluster={"workers": 1})
    assert summary.actual["worker_bytes"] < limit * GB
    assert digest(outs[0]) == digest(outs[1])


def test_a_begun_run_keeps_its_blocks_whatever_is_free(noise, tmp_path):
    from volseg.engine import folder

    tight = settings(cluster={"memory_limit": 0.36})
    begun = describe.from_image(volume.open(noise), tight, str(tmp_path / "run"))
    folder.begin(begun, overwrite=False)
    again = describe.from_image(volume.open(noise), settings(), str(tmp_path / "run"))
    assert again.block == begun.block != choose_blocks(begun.shape, None)[1]
    assert folder.changed(again) == ""


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of its own, which knows the exported network already."""
    (tmp_path / "cache").mkdir()
    for file in cache.folder().glob("*.onnx"):
        (tmp_path / "cache" / file.name).symlink_to(file)
    monkeypatch.setenv("VOLSEG_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("own_cache")
def test_the_plan_is_printed_and_kept(image, tmp_path):
    sets = ["--set", "predict.tile=96", "--set", "predict.overlap=32", "--workers", "1"]
    run = CliRunner()
    said = run.invoke(cli.app, ["plan", image, *sets, "--price-per-hour", "3.6"]).stdout
    for name in ("volume", "network", "blocks", "tiles", "redundancy", "reads", "writes", "memory", "time", "cost"):
        assert f"\n{name}" in f"\n{said}"
    assert "rough" not in said
    told = json.loads(run.invoke(cli.app, ["plan", image, *sets, "--json"]).stdout)
    assert told["probed"]
    assert told["redundancy"] > 1
    assert not Path(api.default_out(image)).exists()
    config = settings(cluster={"workers": 1})
    kept = describe.from_image(volume.open(image), config, str(tmp_path / "run"))
    assert measure.known_rates(kept, cluster.worker_pool(config.cluster)).probed
    assert not measure.known_rates(replace(kept, model_sha256="other"), cluster.worker_pool(config.cluster)).probed


@pytest.mark.usefixtures("own_cache")
def test_a_plan_that_does_not_fit_ends_in_one_line(image, tmp_path):
    limit = [
        "--set",
        "cluster.memory_limit=0.1",
        "--set",
        "predict.tile=96",
        "--set",
        "predict.overlap=32",
        "--workers",
        "1",
    ]
    found = CliRunner().invoke(cli.app, ["plan", image, *limit])
    assert isinstance(found.exception, UserError)
    assert "cluster.memory_limit" in str(found.exception)
    with pytest.raises(UserError, match=r"may hold 0\.10 GB"):
        api.infer(image, str(tmp_path / "run"), config=settings(cluster={"memory_limit": 0.1}), progress=Quiet())
    assert not (tmp_path / "run.partial").exists()


@pytest.mark.parametrize(
    "shape", [(1 << 16, 1 << 17, 1 << 17), (1, 1, 1 << 50), (1 << 50, 1, 1), (1, 1 << 50, 1), (1, 1 << 25, 1 << 25)]
)
@pytest.mark.parametrize("planes", [("xy",), ("xy", "xz", "yz")])
def test_a_volume_of_absurd_size_is_planned_in_little_time_and_memory(tmp_path, shape, planes):
    """Nothing in a plan grows with the number of tiles or blocks."""
    run = unread(
        shape,
        tmp_path,
        chunk=tuple(min(n, 128) for n in shape),
        predict={"tile": 1280, "overlap": 64, "planes": planes},
    )
    start, workers = time.process_time(), cluster.WorkerPool(2)
    tracemalloc.start()
    made = plan.make_plan(run, workers, measure.known_rates(run, workers))
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.inferred_voxels >= 1 << 50
    assert made.blocks == np.prod([-(-n // b) for n, b in zip(shape, made.block, strict=True)], dtype=object)
    assert held < 10_000_000
    assert time.process_time() - start < 30


def test_workers_elsewhere_are_not_all_started_here_to_measure(image, tmp_path):
    queue = {"kind": "slurm", "workers": 1000, "options": {"cores": 4, "memory": "8GB"}}
    run = describe.from_image(volume.open(image), settings(cluster=queue), str(tmp_path / "run"))
    workers = describe.workers_of(run)
    assert (workers.workers, workers.threads) == (1000, 4)
    assert measure._probes(run, workers) == max(1, os.cpu_count() // 4)
    assert plan.make_plan(run, workers, measure.known_rates(run, workers)).host_bytes < 1e9  # none of them is here


@pytest.mark.usefixtures("own_cache")
def test_a_plan_says_how_many_tiles_show_nothing(tmp_path):
    """Three quarters of this volume are black: as much of the network's time is not needed."""
    image = np.random.default_rng(0).integers(1, 255, (8, 256, 256), dtype=np.uint8)
    image[:, 64:] = 0
    path = write_volume(str(tmp_path / "em.zarr"), image)
    config = settings(
        predict={"tile": 64, "overlap": 0, "backend": "openvino", "precision": "fp32"}, cluster={"workers": 1}
    )
    made = api.plan(path, tmp_path / "run.zarr", config=config)
    assert made.looked_tiles == measure.LOOKED_TILES
    assert 0.6 < made.constant_tiles / made.looked_tiles < 0.9
    assert f"; {made.constant_tiles} of {made.looked_tiles} looked at are of one gray value" in plan.format_plan(made)
    run = describe.from_image(volume.open(path), config, str(tmp_path / "run"))
    rates = measure.known_rates(run, describe.workers_of(run))
    assert made.seconds["predict"] == pytest.approx(made.inferred_voxels * (1 - rates.constant_share) / rates.predict)
    assert not measure.known_rates(replace(run, roi=RegionOfInterest(Box((0, 0, 0), (8, 64, 64)))),
                                   describe.workers_of(run)).probed  # fmt: skip


@pytest.mark.usefixtures("own_cache")
def test_a_mask_that_wants_nothing_is_planned(image, tmp_path):
    mask = write_volume(str(tmp_path / "mask.zarr"), np.zeros(volume.open(image).shape, np.uint8))
    config = settings(
        input={"mask": mask}, predict={"backend": "openvino", "precision": "fp32"}, cluster={"workers": 1}
    )
    made = api.plan(image, tmp_path / "run.zarr", config=config)
    assert (made.inferred_voxels, made.looked_tiles) == (0, 0)


def test_a_plan_of_a_region_counts_its_own_blocks(tmp_path):
    run = unread((640, 20000, 20000), tmp_path, chunk=(64, 64, 64))
    box = Box((0, 0, 0), (64, 1536, 1536))
    run = replace(run, roi=RegionOfInterest(box, voxels=box.voxels))
    found = plan.make_plan(run, cluster.WorkerPool(2), measure.known_rates(run, cluster.WorkerPool(2)))
    assert found.blocks == run.parts.own.count < len(run.grid) / 10
    assert found.predict_blocks == run.parts.inferred("xy").count < len(run.predict_grid) / 10


def test_smaller_tiles_are_named_where_a_region_is_small(tmp_path):
    run = unread((640, 20000, 20000), tmp_path, chunk=(64, 64, 64))
    box, large = Box((0, 5000, 5000), (64, 5300, 5300)), Box((0, 0, 0), (64, 9000, 9000))
    small = replace(run, roi=RegionOfInterest(box, voxels=box.voxels))
    said = describe.tile_note(small)
    assert "predict.tile=" in said
    assert said in describe.notes(small)
    assert not describe.tile_note(run)
    assert not describe.tile_note(replace(run, roi=RegionOfInterest(large, voxels=large.voxels)))
