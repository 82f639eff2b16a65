"""Memory that is planned, against real processes that stitch noise: of all images it has the most basins."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from tests.helpers import LIGHT, begin_run, settings, write_volume
from volseg.box import Box
from volseg.engine import cluster
from volseg.engine.receipt import Timings
from volseg.engine.stages import stages_of
from volseg.io.roi import RegionOfInterest
from volseg.planning import measure, memory, plan

WORKERS = cluster.WorkerPool(1)
STAGE = """
import sys
import volseg.engine.preload
from volseg.engine.receipt import Timings
from volseg.engine.run import stored_run
from volseg.engine.stages import stages_of
from volseg.system import resident
run = stored_run(sys.argv[1], "")
stages_of(run)[sys.argv[2]].function(run, 0, Timings())
print(resident("HWM"))
"""


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A run of noise whose blocks are all linked, with 1.8 million edges."""
    folder = tmp_path_factory.mktemp("noise")
    voxels = np.random.default_rng(0).integers(0, 255, (260, 260, 260), dtype=np.uint8)
    path = write_volume(str(folder / "probability.zarr"), voxels)
    config = settings(**LIGHT, fragments={"threshold": 0.3}, stitch={"seed": 0.6}, blocks={"shape": (130, 130, 260)})
    run = begin_run(path, folder / "run", config)
    for name in ("import", "fragments", "link"):
        for i in range(len(run.grid)):
            stages_of(run)[name].function(run, i, Timings())
    return run


@pytest.fixture(scope="module")
def rates(noise):
    return measure.known_rates(noise, WORKERS)


def peak(run, stage):
    command = [sys.executable, "-c", STAGE, run.out, stage]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("stage", ["fragments", "link"])
def test_a_block_of_noise_takes_what_is_planned(noise, rates, stage):
    """Within 30 % either way."""
    planned = memory.PROCESS_BYTES + memory.stage_bytes(noise, 1, rates)[stage]
    assert 1 / 1.3 < planned / peak(noise, stage) < 1.3


def test_stitching_noise_takes_what_is_planned(noise, rates):
    held = peak(noise, "stitch")
    made = plan.make_plan(noise, WORKERS, rates)
    assert 1 / 1.3 < (memory.PROCESS_BYTES + memory.stitch_bytes(noise, rates)) / held < 1.3
    assert made.worker_bytes > held / 1.3
    assert made.worker_bytes >= made.block_bytes


def test_a_sample_tells_how_many_edges_there_are(noise, rates):
    links = [noise.layout.links.load(i).edges.size for i in range(len(noise.grid))]
    edges = [noise.layout.block_basins.load(i).edges.size for i in range(len(noise.grid))]
    assert rates.edges * np.prod(noise.shape) == pytest.approx(sum(edges) + sum(links), rel=0.15)
    assert rates.edges > 4 * measure.EDGES_PER_VOXEL, "rough figures are of images"


def test_one_process_is_planned_no_more_edges_than_it_may_hold(noise, rates):
    def bytes_of(reduce):
        stitch = noise.config.stitch.model_copy(update={"reduce": reduce})
        run = replace(noise, config=noise.config.model_copy(update={"stitch": stitch}))
        return memory.stitch_bytes(run, replace(rates, edges=100.0))

    assert bytes_of("auto") < 8e9 < bytes_of("flat")
    assert bytes_of("tree") < 1e9


def test_a_part_takes_the_time_and_the_disk_of_its_voxels(noise, rates):
    box = Box((0, 0, 0), (26, 260, 260))
    whole = plan.make_plan(noise, WORKERS, rates)
    run = replace(noise, roi=RegionOfInterest(box, voxels=box.voxels))
    part, blocks = plan.make_plan(run, WORKERS, rates), run.parts.own.block_voxels
    assert box.voxels < blocks < np.prod(noise.shape), "blocks beyond the part take no time"
    share = (box.voxels + plan.UNWANTED_COST * (blocks - box.voxels)) / np.prod(noise.shape)
    assert part.seconds["instances"] == pytest.approx(whole.seconds["instances"] * share)
    assert part.written_bytes == pytest.approx(0.1 * whole.written_bytes, rel=1e-6)
    assert part.read_bytes == whole.read_bytes // 10


def test_plans_are_kept_as_json(noise, rates):
    made = plan.make_plan(noise, WORKERS, rates)
    again = plan.Plan.from_json(json.loads(json.dumps(made.to_json())))
    assert again.host_bytes == made.host_bytes
    assert again.total_seconds == made.total_seconds
