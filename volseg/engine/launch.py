"""Schedulers and workers that are no processes of this command: given, or started by a queue, over SSH, in Kubernetes."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask.config
from dask.utils import parse_bytes
from distributed import Client, Scheduler
from distributed.comm import CommClosedError
from distributed.security import Security

from volseg import system
from volseg.config import Cluster, local_path
from volseg.engine.local import DEVICE, TASKS_PER_GPU, THREADS, PortlessScheduler, local_address, private_security
from volseg.errors import IncompleteRunError, UserError

ANSWER_S = 10.0  # in which a scheduler that is there answers
WORKER_S = 5.0  # in which a worker of a scheduler that is given comes, which may have been started at the same time
NOTE_S = 10.0  # without any worker, after which that is said; four times as long each further time
LOOK_S = 2.0  # between looks for workers, while there are some
QUEUES = {
    "slurm": "SLURMCluster", "lsf": "LSFCluster", "pbs": "PBSCluster", "sge": "SGECluster", "htcondor": "HTCondorCluster",
}  # fmt: skip


# ---------------------------------------------------------------- given


@contextmanager
def given(config: Cluster) -> Iterator[Client]:
    """A client of the scheduler that the settings name, which has workers."""
    address = _address(config)
    try:
        client = Client(address, timeout=ANSWER_S, set_as_default=False, security=_security(config))
    except (OSError, ValueError, TypeError, TimeoutError) as error:  # TypeError: TLS without certificates
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"no Dask scheduler answers at {address!r} ({reason}); start one or leave out --scheduler"
        ) from None
    state = "begun"
    try:
        with _silent(), client:
            if not _workers_come(client, WORKER_S):
                raise UserError(f"the scheduler at {address} has no workers; start some with: dask worker {address}")
            try:
                yield client
                state = "done"
            except Exception:
                state = "begun" if client.status == "running" else "lost"
                raise
    except UserError:
        raise
    except (
        Exception
    ) as error:  # which one a lost connection raises depends on what was under way, also while it is closed
        if state == "begun" and not isinstance(error, CommClosedError):
            raise
        if state != "done":
            raise IncompleteRunError(
                f"the connection to the scheduler at {address} was lost; what is done is kept: see that it and its workers "
                "run, and give the same command again"
            ) from error


def _address(config: Cluster) -> str:
    """Of the scheduler: as told, or as it wrote it into its file."""
    if config.kind == "scheduler-file":
        try:
            return str(json.loads(Path(local_path(config.scheduler)).read_text(encoding="utf-8"))["address"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = getattr(error, "strerror", None) or "it is no such file"
            raise UserError(
                f"cannot read the scheduler's file {config.scheduler}: {reason}; a scheduler writes it that is started with: "
                "dask scheduler --scheduler-file FILE"
            ) from None
    if not re.fullmatch(r"(\w+://)?[^/:]+:\d+", config.scheduler):
        raise UserError(
            f"scheduler {config.scheduler!r} is not of the form tcp://host:port; for a file that a scheduler wrote, set "
            "cluster.kind=scheduler-file"
        )
    return config.scheduler


def _security(config: Cluster) -> Security | None:
    """What the settings say of TLS, for all roles; None where they say nothing."""
    if not (config.tls_ca or config.tls_cert or config.tls_key):
        return None
    roles = ("client", "scheduler", "worker")
    files = {"cert": config.tls_cert, "key": config.tls_key or config.tls_cert}
    pairs = {f"tls_{role}_{part}": path for role in roles for part, path in files.items()}
    return Security(tls_ca_file=config.tls_ca, require_encryption=True, **pairs)


@contextmanager
def _silent() -> Iterator[None]:
    """Inside, Dask's client writes no tracebacks of connections that it loses: what comes of it is said once."""
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ---------------------------------------------------------------- started


@contextmanager
def started(config: Cluster, gpu: bool, tell: Callable[[str], None]) -> Iterator[Client]:
    """A client of a cluster that the kind's library starts, once it has its first worker; it ends with the block."""
    start = {"kubernetes": _kubernetes, "ssh": _ssh, "gateway": _gateway}.get(config.kind, _queue)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Port .* is already in use")
            cluster = start(config, gpu)
    except UserError:
        raise
    except Exception as error:  # each library raises what it likes for a server that is away, or an option it lacks
        raise UserError(
            f"cannot start a cluster of kind {config.kind!r}: {_first_line(error)}; see cluster.options and "
            f"configs/cluster/{config.kind}.toml"
        ) from error
    with closed_certificates(cluster), cluster, Client(cluster, set_as_default=False) as client:
        if config.maximum:
            cluster.adapt(minimum=max(1, config.minimum), maximum=config.maximum)
        elif config.kind != "ssh":
            cluster.scale(config.workers)
        with watched(client, tell):
            while not _workers_come(client, NOTE_S):
                pass
        yield client


@contextmanager
def closed_certificates(cluster: Any) -> Iterator[None]:
    """Afterwards the files are gone from which jobs of a queue read certificate and key: dask-jobqueue keeps them open."""
    try:
        yield
    finally:
        for value in list(vars(cluster).values()):
            if hasattr(value, "delete") and hasattr(value, "file"):  # of tempfile.NamedTemporaryFile
                value.close()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _workers_come(client: Client, seconds: float) -> bool:
    """Whether there is a worker, or comes one within these seconds."""
    end = time.monotonic() + seconds
    while not client.nthreads():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@contextmanager
def watched(client: Client, tell: Callable[[str], None]) -> Iterator[None]:
    """Inside, it is told when no worker has been there for a while, and when there are some again."""
    stopped = threading.Event()

    def watch() -> None:
        since, note, told = time.monotonic(), NOTE_S, False
        while not stopped.wait(min(LOOK_S, NOTE_S)):
            try:
                count = len(client.nthreads())
            except Exception:  # the connection is lost: who works on it says so
                return
            waited = time.monotonic() - since
            if count:
                if told:
                    tell(f"{count} worker(s) have come: going on")
                since, note, told = time.monotonic(), NOTE_S, False
            elif waited > note:
                tell(f"no worker for {waited:.0f} s at {client.scheduler.address}; waiting for some")
                note, told = 4 * note, True

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(1.0)  # it may wait for an answer that does not come


# ---------------------------------------------------------------- what is started


def expected_workers(config: Cluster) -> int:
    """How many workers a cluster that is started will have, at most."""
    if config.kind == "ssh":
        return (len(config.options["hosts"]) - 1) * config.options.get("worker_options", {}).get("n_workers", 1)
    return config.maximum or config.workers


def threads_of_worker(config: Cluster) -> int:
    """Tiles that a worker without a GPU will run at once: the cores of its job."""
    options = config.options
    if config.kind in QUEUES:
        return max(1, options.get("cores", 1) // options.get("processes", 1))
    return int({**options.get("env", {}), **options.get("worker_options", {}).get("env", {})}.get(THREADS, 1))


def memory_of_worker(config: Cluster) -> int:
    """Bytes that a worker of a queue's job may hold; 0 where the settings do not say."""
    given = config.options.get("memory") if config.kind in QUEUES else None
    return parse_bytes(given) // config.options.get("processes", 1) if given else 0


def worker_arguments(gpu: bool) -> list[str]:
    """What `dask worker` is told beyond how much it may hold: one task at once, or those of a GPU."""
    if not gpu:
        return ["--nthreads", "1"]
    return ["--nthreads", str(TASKS_PER_GPU), "--resources", f"{DEVICE}={TASKS_PER_GPU}"]


def queue_options(config: Cluster, gpu: bool) -> dict[str, Any]:
    """Arguments of a cluster of dask-jobqueue: the settings' own, and what volseg's workers need.

    A job is one worker unless ``processes`` says otherwise; of several, each takes the GPU of its number.
    """
    options = {"processes": 1, "shared_temp_directory": os.getcwd(), **config.options}
    quiet = [] if config.dashboard else ["--no-dashboard"]
    place = {"dashboard": bool(config.dashboard), "dashboard_address": local_address(config.dashboard)}
    return {
        **options,
        "worker_extra_args": [*options.get("worker_extra_args", ()), *worker_arguments(gpu), *quiet],
        "job_script_prologue": [
            f"export {THREADS}={threads_of_worker(config)}",
            "export PYTHONSAFEPATH=1",  # the folder from which a job is submitted is nothing to import from
            *options.get("job_script_prologue", ()),
        ],
        "scheduler_options": {**place, **options.get("scheduler_options", {})},
        "scheduler_cls": Scheduler if config.dashboard else PortlessScheduler,
        "security": _security(config) or private_security(),
    }


def _queue(config: Cluster, gpu: bool) -> Any:
    """A scheduler in this process; workers are jobs of a queue, and all that they say is encrypted."""
    system.require("dask_jobqueue", extra="jobqueue")
    import dask_jobqueue

    kind = getattr(dask_jobqueue, QUEUES[config.kind])
    command = shlex.split(kind.job_cls.submit_command)[0]
    if not shutil.which(command):
        raise UserError(f"{command} is not on the PATH: give this command where jobs of {config.kind} are submitted")
    return kind(**queue_options(config, gpu))


def _kubernetes(config: Cluster, gpu: bool) -> Any:
    """Pods of the Dask operator, which must be installed in the cluster."""
    system.require("dask_kubernetes", extra="kubernetes")
    from dask_kubernetes.operator import KubeCluster

    command = ["dask", "worker", *worker_arguments(gpu), "--memory-limit", "0"]
    return KubeCluster(**{"name": "volseg", "worker_command": command, "n_workers": 0, "quiet": True, **config.options})


def _ssh(config: Cluster, gpu: bool) -> Any:
    """A process on each host: the first has the scheduler, the others workers."""
    system.require("asyncssh", extra="ssh")
    from distributed import SSHCluster

    security = _security(config)
    tasks = TASKS_PER_GPU if gpu else 1
    worker = {"nthreads": tasks, "memory_limit": 0, "resources": {DEVICE: tasks} if gpu else {}}
    place = {"port": 0, "dashboard": bool(config.dashboard), "protocol": "tls://" if security else "tcp://"}
    options = {
        **config.options,
        "worker_options": {**worker, **config.options.get("worker_options", {})},
        "scheduler_options": {**place, **config.options.get("scheduler_options", {})},
    }
    with dask.config.set(_tls_settings(config) if security else {}):  # the hosts inherit what Dask is told here
        return SSHCluster(**options, security=security)


def _tls_settings(config: Cluster) -> dict[str, Any]:
    """Dask's own settings that say what `_security` does."""
    pair = {"cert": config.tls_cert, "key": config.tls_key or config.tls_cert}
    tls = {"ca-file": config.tls_ca, **dict.fromkeys(("client", "scheduler", "worker"), pair)}
    return {"distributed.comm.tls": tls, "distributed.comm.require-encryption": True}


def _gateway(config: Cluster, gpu: bool) -> Any:
    """A cluster of a Dask Gateway server, which decides what its workers are."""
    system.require("dask_gateway", extra="gateway")
    from dask_gateway import Gateway

    options = dict(config.options)
    server = {name: options.pop(name) for name in ("address", "proxy_address", "auth") if name in options}
    return Gateway(**server).new_cluster(**options)
