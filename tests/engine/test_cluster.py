"""Who may use the workers."""

import asyncio

import pytest
from distributed import Client
from distributed.comm import connect

from volseg.config import Cluster
from volseg.engine import cluster
from volseg.errors import UserError


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


async def _connect(address):
    comm = await connect(address, timeout=2)
    await comm.close()


@pytest.mark.parametrize(
    ("scheduler", "warned"),
    [("", False), ("tcp://127.0.0.1:8786", False), ("tls://10.0.0.1:8786", False), ("tcp://10.0.0.1:8786", True)],
)
def test_a_scheduler_open_to_a_network_is_warned_of(scheduler, warned):
    assert ("can run code" in cluster.exposure(Cluster(scheduler=scheduler))) == warned


def test_a_scheduler_that_is_not_there_is_refused_in_a_line():
    with (
        pytest.raises(UserError, match="no Dask scheduler answers"),
        cluster.connect(Cluster(scheduler="tcp://127.0.0.1:1")),
    ):
        pass
