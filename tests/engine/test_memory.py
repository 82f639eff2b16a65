"""Workers that take too much memory or die, as real processes: the block is tried alone, and the bytes stay the same."""

import json
import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import dask.config
import numpy as np
import pytest
from distributed import LocalCluster, WorkerPlugin

from tests.helpers import Quiet, digest, settings
from volseg import api
from volseg.config import Cluster
from volseg.engine import cluster, folder, forkserver, guard, loop
from volseg.engine.pipeline import process_block, process_block_in_pieces
from volseg.io import volume
from volseg.planning import prepare


class Glutton(WorkerPlugin):
    """The first worker that begins the block takes memory until it is ended."""

    name = "glutton"

    def __init__(self, task, mark):
        self.task, self.mark = task, mark

    def transition(self, key, start, finish, **kwargs):
        if finish == "executing" and str(key).startswith(self.task):
            try:
                Path(self.mark).touch(exist_ok=False)
            except FileExistsError:
                return
            held = [np.ones(25_000_000) for _ in range(8)]
            time.sleep(60)
            del held


def test_a_worker_over_its_memory_is_ended_and_its_block_tried_alone(reference, tmp_path):
    config = settings(
        probabilities={"mask_channel": 0, "contour_channel": 1}, cluster={"memory_limit": 0.5, "tries": 2},
        blocks={"shape": (8, 150, 170)},
    )  # fmt: skip
    forkserver.start()
    forked = {"distributed.worker.multiprocessing-method": forkserver.method()}
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0, **forked}),
        LocalCluster(2, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=50) as workers,
    ):
        with workers.get_client() as client:
            client.register_plugin(Glutton("import-1", str(tmp_path / "mark")))
        sets = [f"cluster.scheduler={workers.scheduler_address}"]
        show = Quiet()
        run = api.segment(f"{reference}/0", tmp_path / "run", config=config, settings=sets, progress=show)
    told = [text for text in show.said if "trying it alone" in text]
    assert any("set fewer cluster.workers" in text for text in told)
    assert digest(run.path) == digest(reference)


def allocate(folder, i, size=4 << 30):
    """An item of the loop: the first one takes more than there is."""
    started = time.monotonic()
    np.ones(size if i == 0 else 10, np.uint8)
    time.sleep(0.05)
    Path(folder, f"{i}-{os.getpid()}").write_text(json.dumps([started, time.monotonic()]))
    return i


def carefully(folder, i):
    return allocate(folder, i, size=1 << 20)


def limit_memory():
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, resource.RLIM_INFINITY))


def test_what_does_not_fit_is_tried_in_pieces_while_nothing_else_runs(tmp_path):
    done = []
    with cluster.connect(Cluster(workers=2, dashboard="")) as client:
        client.run(limit_memory)
        task = loop.run(
            client, allocate, iter(range(8)), str(tmp_path), done=lambda item, result: done.append(item),
            careful=carefully,
        )  # fmt: skip
    assert task == []
    assert sorted(done) == list(range(8))
    spans = {path.name.partition("-")[0]: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    start, end = spans.pop("0")
    assert all(stop <= start or begin >= end for begin, stop in spans.values())


def die(i):
    if i == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def gorge(i):
    held = [np.ones(25_000_000) for _ in range(6)]
    time.sleep(30)
    del held


def test_who_ended_a_worker_is_told():
    with cluster.connect(Cluster(workers=1, dashboard="")) as client:
        killed = loop.run(client, die, iter([0]), tries=1)
        cluster.watch_memory(client, guard.MemoryLimits(allowed=500_000_000))
        ended = loop.run(client, gorge, iter([0]), tries=1)
    assert "its worker was killed (signal 9) by somebody else than the system" in killed[0].reason
    assert re.search(
        r"its worker held (too much memory|\S+ GB, cluster\.memory_limit allows 0\.50 GB); set", ended[0].reason
    )


@pytest.mark.parametrize(
    ("code", "short", "said"),
    [
        (-9, True, "the system ended its worker for want of memory; set fewer cluster.workers"),
        (-9, False, "by somebody else"),
        (-11, False, "crashed (signal 11, SIGSEGV)"),
        (guard.OVER_MEMORY, False, "held too much memory; set fewer cluster.workers"),
        (None, False, "if memory was out, set fewer"),
        (3, False, "exit code 3"),
    ],
)
def test_causes_of_death_are_told_apart(code, short, said):
    assert said in guard.cause_of_death(code, short)


def test_no_healthy_worker_is_ended():
    limits = guard.MemoryLimits(planned=10**9)
    assert not limits.exceeded(5 * 10**9, free=lambda: 10**12)
    assert not limits.exceeded(15 * 10**8, free=lambda: 0)
    assert "no memory is left" in limits.exceeded(24 * 10**8, free=lambda: 0)
    assert not guard.MemoryLimits().exceeded(10**12, free=lambda: 0)
    assert "cluster.memory_limit allows 1.00 GB" in guard.MemoryLimits(allowed=10**9).exceeded(2 * 10**9)


def test_pieces_give_the_same_bytes(image, tmp_path):
    """A block of many sections, once whole and once in pieces."""
    config = settings(input={"roi": "1:20,10:140,20:160"}, cluster={"workers": 1})
    run = prepare.from_image(volume.open(image), config, folder.partial_path(str(tmp_path / "run")))
    folder.begin(run, overwrite=False)
    read = partial(run.layout.probabilities.read, run.predict_grid[0])
    whole, stored = process_block(run.out, run.id, "predict", 0), read()
    run.layout.probabilities.write(run.predict_grid[0], np.zeros_like(stored))
    pieces = process_block_in_pieces(run.out, run.id, "predict", 0)
    assert stored.any()
    np.testing.assert_array_equal(read(), stored)  # within a shard, zarrs orders chunks by chance
    assert whole.inferred_voxels == pieces.inferred_voxels
