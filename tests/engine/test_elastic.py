"""Workers that join, retire and stop while a run goes on: nothing is lost, and the bytes stay the same. All are processes."""

import os
import signal
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from distributed import Client, wait

from tests.helpers import LIGHT, Quiet, begin_run, digest, markers_of, settings
from volseg.config import Cluster
from volseg.engine import elastic, finish, local, loop, schedule


@contextmanager
def workers(count):
    """A cluster of that many processes, and a client of it."""
    with local.processes(Cluster(workers=count, dashboard=""), 0) as cluster, Client(cluster) as client:
        elastic.let_workers_finish(client)
        yield cluster, client


def nap(folder, i):
    """Leaves a note as it begins."""
    with Path(folder, str(i)).open("a") as note:
        note.write(f"{os.getpid()}\n")
    time.sleep(0.3)
    return os.getpid()


def pids(client):
    """The process of each worker, by address."""
    return client.run(os.getpid)


def test_who_retires_finishes_its_block_and_who_joins_is_used(tmp_path):
    done = {}
    with workers(1) as (cluster, client):
        (first,) = pids(client).items()

        def ended(i, pid):
            done[i] = pid
            if len(done) == 1:
                cluster.scale(2)
                client.wait_for_workers(2)
            elif len(done) == 4:
                client.retire_workers([first[0]])  # it is in the middle of one

        assert loop.run(client, nap, range(16), str(tmp_path), done=ended) == []
        assert first[0] not in pids(client)
    notes = {i: (tmp_path / str(i)).read_text().split() for i in range(16)}
    assert notes == {i: [str(done[i])] for i in range(16)}  # each was begun once, and ended where it was begun
    assert len(set(done.values())) == 2


class Shakes(Quiet):
    """Calls what is given for a stage when its first block ends."""

    def __init__(self, **calls):
        super().__init__()
        self.calls = calls

    def stage(self, name, voxels, done):
        advance = super().stage(name, voxels, done)

        def shake(more):
            advance(more)
            self.calls.pop(name, lambda: None)()

        return shake


def test_labels_are_the_same_whoever_joins_leaves_or_stops(reference, tmp_path, monkeypatch):
    """The one that is stopped holds blocks; after a while they are given to others."""
    monkeypatch.setattr(elastic, "LEAST_SILENCE_S", 4.0)
    config = settings(**LIGHT, blocks={"shape": (6, 40, 60)}, probabilities={"mask_channel": 0, "contour_channel": 1})
    run = begin_run(f"{reference}/0", tmp_path / "run.zarr", config)
    stopped = []
    with workers(1) as (cluster, client):

        def join():
            cluster.scale(3)
            client.wait_for_workers(2)

        def leave():
            client.retire_workers([next(iter(pids(client)))])

        def stop():
            held = client.processing()
            address = max(held, key=lambda each: len(held[each]))
            stopped.append((pids(client)[address], len(held[address])))
            os.kill(stopped[0][0], signal.SIGSTOP)

        shakes = Shakes(**{"import": join, "fragments": leave, "relabel": stop})
        statistics = schedule.run_stages(client, run, markers_of(run), shakes)
        for pid, held in stopped:
            assert held  # so without it the run could not have ended
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert not shakes.calls
    finish.finish(run, run.out, statistics, 0.0, 0.0)
    assert digest(run.out) == digest(reference)


def test_how_long_a_worker_may_say_nothing_is_learnt():
    with workers(1) as (_, client):
        silence = elastic.Silence(client)
        assert silence.allowed == elastic.LEAST_SILENCE_S
        silence.silent = dict.fromkeys(pids(client), 20.0)
        silence.looked = 0.0
        assert silence.look()
        assert silence.allowed == 20.0 * elastic.SILENCE
        assert not silence.look()  # it just did


def test_a_result_that_a_stopped_worker_holds_is_computed_again(monkeypatch):
    monkeypatch.setattr(elastic, "LEAST_SILENCE_S", 2.0)
    with workers(2) as (_, client):
        future = client.submit(os.getpid, pure=False)
        wait(future)
        (holder,) = client.who_has(future)[future.key]
        stopped = pids(client)[holder]
        os.kill(stopped, signal.SIGSTOP)
        (computed_in,) = loop._gathered(client, [future], elastic.Silence(client))
        assert computed_in != stopped
        with suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGKILL)
