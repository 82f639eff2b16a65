"""A scheduler and workers on this machine: processes of this command, or threads of it for what is over at once."""

from __future__ import annotations

import asyncio
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dask.config
import distributed.core
from dask.system import CPU_COUNT
from distributed import Nanny, Scheduler, SpecCluster, Worker
from distributed.security import Security

from volseg.config import Cluster
from volseg.engine import forkserver, guard
from volseg.engine.certificate import temporary_certificate
from volseg.errors import UserError

THREADS = "VOLSEG_THREADS"  # environment of a worker: how many tiles it runs at once
DEVICE, HOST = "GPU", "CPU"  # resources of workers: tasks for the device, tasks beside it
TASKS_PER_GPU = 2  # one computes while the other reads or writes
RESTART_PAUSES_S = (0.1, 0.5, 2.0, 5.0)  # before a worker process is started again that ended while it started
ADAPT_INTERVAL = "2s"  # between looks at how many workers there is work for


def worker_count(config: Cluster, gpus: int) -> int:
    """How many workers infer, at most."""
    return config.maximum or config.workers or gpus or min(8, CPU_COUNT)


@contextmanager
def processes(config: Cluster, gpus: int) -> Iterator[SpecCluster]:
    """A local cluster of worker processes; where they have a GPU each, others beside them.

    With a ``maximum`` there are as many as there is work for.
    """
    if config.maximum and gpus:
        raise UserError("cluster.maximum scales workers on CPUs, and there is a worker for each GPU here: leave it out")
    forkserver.start()
    settings = {
        "distributed.worker.multiprocessing-method": forkserver.method(),
        "distributed.worker.profile.enabled": False,  # it keeps a tree of calls for every second: 0.1 MB/s
        "distributed.deploy.lost-worker-timeout": "1h",  # after which a nanny that has no worker is ended: a start takes long
        "distributed.scheduler.allowed-failures": 1,  # workers that one task may end before `loop` looks after it
        "distributed.admin.tick.interval": "500ms",  # 50 times a second each process asks whether its loop is late
    }
    count, fewest = worker_count(config, gpus), max(1, config.minimum)
    with dask.config.set(settings), _processes(config, fewest if config.maximum else count, bool(gpus)) as found:
        if gpus:
            _add_cpu_workers(found, count + (config.cpu_workers or min(8, max(1, CPU_COUNT - count))))
        if config.maximum:
            found.adapt(minimum=fewest, maximum=count, interval=ADAPT_INTERVAL)
        yield found


def _add_cpu_workers(found: SpecCluster, count: int) -> None:
    """The cluster has so many workers; those that are new do what needs no device, one task at a time."""
    found.new_spec = {**found.new_spec, "options": {**found.new_spec["options"], "nthreads": 1, "resources": {HOST: 1}}}
    found.scale(count)
    found.wait_for_workers(count, timeout=60)


def _processes(config: Cluster, count: int, gpu: bool) -> SpecCluster:
    with warnings.catch_warnings(), forkserver.deaf_to_interrupts():
        warnings.filterwarnings("ignore", message="Port .* is already in use")
        try:
            return _local_cluster(
                WatchedNanny,
                count,
                dashboard=config.dashboard,
                security=private_security(),
                nthreads=TASKS_PER_GPU if gpu else 1,
                resources={DEVICE: TASKS_PER_GPU} if gpu else {},
                worker_class=Worker if config.dashboard else PortlessWorker,
                env={
                    **os.environ,
                    THREADS: str(max(1, CPU_COUNT // (config.maximum or count))),
                },  # forked ones have that of an earlier time
            )
        except (RuntimeError, OSError, ValueError) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise UserError(
                f"cannot start {count} local workers with cluster.dashboard = {config.dashboard!r}: {reason}"
            ) from None


def _local_cluster(
    worker: type, count: int, *, dashboard: str, security: Security | None, **options: Any
) -> SpecCluster:
    """What Dask's `LocalCluster` is, with classes of scheduler and worker that open no port for HTTP where none is wanted.

    With ``security`` all is encrypted: else every user of this machine could have the workers run code. Without, scheduler
    and workers are in this process and have no ports at all.
    """
    place = {"protocol": "tls://", "host": "127.0.0.1"} if security else {"protocol": "inproc://"}
    shown: dict[str, Any] = {"dashboard": bool(dashboard), "dashboard_address": local_address(dashboard)}
    common = {**place, "security": security or Security()}
    spec = {"cls": worker, "options": {**common, "memory_limit": 0, "silence_logs": logging.CRITICAL, **options}}
    scheduler = {"cls": Scheduler if dashboard else PortlessScheduler, "options": {**common, "port": 0, **shown}}
    return SpecCluster(
        workers=dict.fromkeys(range(count), spec),
        scheduler=scheduler,
        worker=spec,
        security=security,
        silence_logs=logging.CRITICAL,
    )


class _Portless:
    """A Dask node that serves no HTTP: Dask would, on a free port, where nobody asked for a dashboard, too."""

    def start_http_server(self, *args: Any, **kwargs: Any) -> None:
        pass


class PortlessScheduler(_Portless, Scheduler):
    pass


class PortlessWorker(_Portless, Worker):
    pass


def forget_handlers() -> None:
    """Dask holds no scheduler or worker of this process that has ended.

    It keeps each method that ever answered a message in a cache without limit, and by it 0.5 MB of each run.
    """
    cached = getattr(distributed.core, "_expects_comm", None)
    if hasattr(cached, "cache_clear"):
        cached.cache_clear()


def private_security() -> Security:
    """Only who has the key of this command's own certificate may connect."""
    certificate, key = temporary_certificate()
    roles = ("client", "scheduler", "worker")
    pairs = {f"tls_{role}_{part}": text for role in roles for part, text in (("cert", certificate), ("key", key))}
    return Security(require_encryption=True, tls_ca_file=certificate, **pairs)


def threads(count: int) -> SpecCluster:
    """A cluster of threads in this process."""
    return _local_cluster(PortlessWorker, 1, dashboard="", security=None, nthreads=count)


def local_address(address: str) -> str | None:
    """A dashboard address; only this machine may look unless a host is named."""
    return f"127.0.0.1{address}" if address.startswith(":") else address or None


class WatchedNanny(Nanny):
    """Keeps what each process of its worker ended with."""

    deaths: dict[str, str] | None = None
    kills = 0

    async def instantiate(self) -> Any:
        """A worker process; where one ends before it has said a word, another: Dask's nanny would give up for good."""
        self.kills = guard.oom_kills()
        is_first = self.process is None
        for pause in () if is_first else RESTART_PAUSES_S:
            try:
                return await self.process.start()
            except Exception:  # whatever a process that ends makes of its start
                await asyncio.sleep(pause)
        return await super().instantiate()

    def _on_worker_exit_sync(self, exitcode: int) -> None:
        if self.worker_address:
            cause = guard.cause_of_death(exitcode, guard.oom_kills() > self.kills)
            self.deaths = {**(self.deaths or {}), self.worker_address: cause}
        super()._on_worker_exit_sync(exitcode)
