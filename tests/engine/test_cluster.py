"""Who may use the workers."""

import asyncio
import gc
import os
import signal
import weakref

import dask
import psutil
import pytest
from distributed import Client, LocalCluster, WorkerPlugin
from distributed.comm import CommClosedError, connect

from volseg.config import Cluster
from volseg.engine import cluster, launch
from volseg.errors import IncompleteRunError, UserError


def test_nobody_else_can_have_local_workers_run_code():
    """Another user of the machine knows the port, but has no certificate."""
    with cluster.connect(Cluster(workers=1, dashboard="")) as client:
        address = client.scheduler_info()["address"]
        assert address.startswith("tls://127.0.0.1:")
        with pytest.raises((OSError, TypeError, ValueError)):
            Client(address.replace("tls", "tcp"), timeout="2s", set_as_default=False)
        with pytest.raises((OSError, TypeError, ValueError)):
            asyncio.run(_connect(address))
        assert client.submit(sum, [1, 2]).result() == 3


def listening():
    """Every port on which this process or one below it listens."""
    tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return {(c.laddr.ip, c.laddr.port) for each in tree for c in each.net_connections("inet") if c.status == "LISTEN"}


def test_without_a_dashboard_no_port_is_open_but_those_of_scheduler_nanny_and_worker():
    before = listening()
    with cluster.connect(Cluster(workers=1, dashboard="")) as client:
        known = client.scheduler_info()
        addresses = [known["address"], *known["workers"], *(worker["nanny"] for worker in known["workers"].values())]
        opened = {f"tls://{ip}:{port}" for ip, port in listening() - before}
        assert opened == set(addresses)
        assert cluster.dashboard(client) == ""
    with cluster.connect(Cluster(workers=1), light=True) as client:
        assert client.submit(sum, [1, 2]).result() == 3
        assert listening() == before


class DiesAtStart(WorkerPlugin):
    """Ends the worker's process while it starts, twice."""

    name = "dies"

    def __init__(self, folder):
        self.folder = folder

    def setup(self, worker):
        for n in range(4):  # the first is there already, and lives
            try:
                (self.folder / str(n)).touch(exist_ok=False)
            except FileExistsError:
                continue
            if n in (1, 2):
                os.kill(os.getpid(), signal.SIGKILL)
            return


@pytest.mark.parametrize("light", [True, False])
def test_a_cluster_that_has_ended_is_held_by_nobody(light):
    """Who infers again and again in one process does not run out of memory."""
    with cluster.connect(Cluster(workers=1, dashboard=""), light=light) as client:
        assert client.submit(sum, [1, 2]).result() == 3
        scheduler = weakref.ref(client.cluster.scheduler)
    del client
    gc.collect()
    assert scheduler() is None


def test_the_only_worker_comes_back_though_it_dies_while_it_starts(tmp_path):
    """Dask gives a worker up that is not back after a while."""
    gives_up = {"distributed.deploy.lost-worker-timeout": "1ms"}
    with dask.config.set(gives_up), cluster.connect(Cluster(workers=1, dashboard="")) as client:
        client.register_plugin(DiesAtStart(tmp_path))
        (pid,) = client.run(os.getpid).values()
        os.kill(pid, signal.SIGKILL)
        assert client.submit(sum, [1, 2]).result(timeout=120) == 3
        assert len(list(tmp_path.iterdir())) == 4


async def _connect(address):
    comm = await connect(address, timeout=2)
    await comm.close()


@pytest.mark.parametrize(
    ("address", "warned"),
    [
        ("inproc://10.0.0.1/1/1", False), ("tcp://127.0.0.1:8786", False), ("tls://10.0.0.1:8786", False),
        ("gateway://10.0.0.1:8786", False), ("tcp://10.0.0.1:8786", True), ("10.0.0.1:8786", True),
    ],
)  # fmt: skip
def test_a_scheduler_open_to_a_network_is_warned_of(address, warned):
    assert ("can run code" in cluster.exposure(address)) == warned


def test_a_scheduler_that_is_not_there_is_refused_in_a_line(monkeypatch):
    monkeypatch.setattr(launch, "ANSWER_S", 1.0)
    with (
        pytest.raises(UserError, match="no Dask scheduler answers"),
        cluster.connect(Cluster(scheduler="tcp://127.0.0.1:1")),
    ):
        pass


def test_a_scheduler_that_is_lost_ends_in_one_line_that_says_how_to_go_on():
    with LocalCluster(n_workers=1, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address=":0") as local:
        settings = Cluster(scheduler=local.scheduler_address)
        with pytest.raises(IncompleteRunError, match="was lost; what is done is kept"), cluster.connect(settings):
            raise CommClosedError("Stream is closed")
        with pytest.raises(KeyError), cluster.connect(settings):  # what is no lost connection stays what it is
            raise KeyError
