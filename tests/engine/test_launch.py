"""Clusters of every kind: those that can run here do, with real processes; of the others, what their library is given."""

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from dask.utils import parse_bytes
from distributed import LocalCluster

from tests.helpers import ROOT
from volseg import system
from volseg.config import Cluster, load
from volseg.engine import cluster, launch, loop
from volseg.engine.certificate import temporary_certificate
from volseg.errors import UserError

CONFIGS = ROOT / "configs" / "cluster"
PACKAGES = {
    "kubernetes": "dask_kubernetes", "ssh": "asyncssh", "gateway": "dask_gateway",
    **dict.fromkeys(launch.QUEUES, "dask_jobqueue"),
}  # fmt: skip


def square(item):
    return item * item


def wait_for(path, process):
    end = time.monotonic() + 60
    while not (path.exists() and path.read_text().endswith("}")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    """A scheduler of its own process that speaks TLS alone: its settings, its file, and how a worker of it is started."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = temporary_certificate()
    Path(folder, "pair.pem").write_text(certificate + key)
    file, pair = folder / "scheduler.json", str(folder / "pair.pem")
    tls = ["--tls-ca-file", pair, "--tls-cert", pair, "--tls-key", pair, "--protocol", "tls://"]
    place = ["--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(file)]
    started = []

    def start(program, *words):
        command = [sys.executable, "-m", f"distributed.cli.dask_{program}", *words, *tls]
        started.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True))
        return started[-1]

    def worker():
        return start(
            "worker", "--scheduler-file", str(file), "--no-dashboard", "--nthreads", "1", "--memory-limit", "0"
        )

    wait_for(file, start("scheduler", *place, "--port", "0"))
    yield {"tls_ca": pair, "tls_cert": pair}, file, worker
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_scheduler_is_found_by_its_file_and_by_its_address_over_tls(scheduler, monkeypatch):
    tls, file, worker = scheduler
    by_file = Cluster(kind="scheduler-file", scheduler=str(file), **tls)
    monkeypatch.setattr(launch, "WORKER_S", 0.3)
    with pytest.raises(UserError, match="has no workers; start some"), cluster.connect(by_file):
        pass
    worker()
    monkeypatch.setattr(launch, "WORKER_S", 60.0)  # until then it has come
    results = {}
    with cluster.connect(by_file) as client:
        address = client.scheduler.address
        assert loop.run(client, square, range(3), done=results.__setitem__) == []
    assert results == {0: 0, 1: 1, 2: 4}
    assert address.startswith("tls://127.0.0.1:")
    with cluster.connect(Cluster(kind="address", scheduler=address, **tls)) as client:
        assert client.submit(square, 5).result() == 25
    assert cluster.worker_pool(by_file).workers == 1
    monkeypatch.setattr(launch, "ANSWER_S", 2.0)
    with pytest.raises(UserError, match="no Dask scheduler answers"), cluster.connect(Cluster(scheduler=address)):
        pass


@pytest.mark.parametrize("text", [None, "no json", "[]", "{}"])
def test_a_file_that_no_scheduler_wrote_is_refused(tmp_path, text):
    file = tmp_path / "scheduler.json"
    if text is not None:
        file.write_text(text)
    settings = Cluster(kind="scheduler-file", scheduler=str(file))
    with (
        pytest.raises(UserError, match=r"cannot read the scheduler's file .*--scheduler-file"),
        cluster.connect(settings),
    ):
        pass


def test_it_is_told_when_no_worker_is_left_and_when_one_comes(monkeypatch):
    monkeypatch.setattr(launch, "NOTE_S", 0.2)
    said = []

    def heard(text):
        end = time.monotonic() + 30
        while not any(text in line for line in said):
            assert time.monotonic() < end, said
            time.sleep(0.05)

    with LocalCluster(n_workers=1, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address=":0") as local:
        settings = Cluster(scheduler=local.scheduler_address)
        with cluster.connect(settings, tell=said.append) as client:
            local.scale(0)
            heard("no worker for")
            local.scale(1)
            heard("1 worker(s) have come")
            assert client.submit(square, 3).result() == 9


def test_local_workers_are_as_many_as_there_is_work_for():
    settings = Cluster(minimum=1, maximum=2, dashboard="")
    assert cluster.worker_pool(settings).workers == 2
    with cluster.connect(settings) as client:
        assert len(client.nthreads()) == 1
        assert cluster.window(client, settings) == 2 * cluster.TASKS_IN_FLIGHT
        futures = client.map(time.sleep, [0.2] * 100, pure=False)
        end = time.monotonic() + 60
        while len(client.nthreads()) < 2:
            assert time.monotonic() < end
            time.sleep(0.1)
        client.cancel(futures)
    with (
        pytest.raises(UserError, match="there is a worker for each GPU"),
        cluster.connect(Cluster(maximum=2, dashboard=""), gpus=1),
    ):
        pass


# ---------------------------------------------------------------- kinds that need a library


@pytest.mark.parametrize("kind", sorted(PACKAGES))
def test_a_library_that_is_missing_is_named_with_the_line_that_installs_it(kind, monkeypatch):
    package = PACKAGES[kind]
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(system, "find_spec", lambda name: None if name == package else find_spec(name))
    settings = load(CONFIGS / f"{kind}.toml").cluster
    with (
        pytest.raises(UserError, match=rf"{PACKAGES[kind]} is not installed.*volseg\[\w+\]"),
        cluster.connect(settings),
    ):
        pass


def test_each_kind_has_a_config():
    kinds = set(Cluster.model_fields["kind"].annotation.__args__)
    assert {load(path).cluster.kind for path in CONFIGS.glob("*.toml")} == kinds - {"local"}
    assert {path.stem for path in CONFIGS.glob("*.toml")} == kinds - {"local"}


@pytest.mark.parametrize("kind", sorted(PACKAGES))
def test_what_a_run_will_have_is_known_before_its_workers_are(kind):
    settings = load(CONFIGS / f"{kind}.toml").cluster
    pool = cluster.worker_pool(settings)
    assert pool.workers == (2 if kind == "ssh" else settings.workers)
    assert pool.threads == (1 if kind == "gateway" else 8)
    assert bool(pool.limit) == (kind in launch.QUEUES)


def test_a_worker_of_a_job_runs_a_task_at_once_on_all_cores_of_its_job_and_says_nothing_in_clear():
    settings = load(CONFIGS / "slurm.toml").cluster
    options = launch.queue_options(settings, gpu=False)
    assert options["worker_extra_args"] == ["--nthreads", "1"]
    assert options["job_script_prologue"] == ["export VOLSEG_THREADS=8", "export PYTHONSAFEPATH=1"]
    assert (options["cores"], options["processes"], options["walltime"]) == (8, 1, "04:00:00")
    assert options["security"].require_encryption
    assert options["scheduler_options"] == {"dashboard": True, "dashboard_address": "127.0.0.1:8787"}


def test_a_worker_with_a_gpu_has_its_resource_and_no_dashboard_where_none_is_wanted():
    more = {"worker_extra_args": ["--local-directory", "/scratch"], "job_script_prologue": ["module load cuda"]}
    settings = Cluster(
        kind="pbs", maximum=4, dashboard="", options={"cores": 4, "processes": 2, "memory": "8GB", **more}
    )
    options = launch.queue_options(settings, gpu=True)
    assert options["worker_extra_args"] == [
        "--local-directory", "/scratch", "--nthreads", "2", "--resources", "GPU=2", "--no-dashboard",
    ]  # fmt: skip
    assert options["job_script_prologue"] == ["export VOLSEG_THREADS=2", "export PYTHONSAFEPATH=1", "module load cuda"]
    assert options["scheduler_cls"] is launch.PortlessScheduler
    assert launch.memory_of_worker(settings) == parse_bytes("8GB") // 2


@pytest.mark.parametrize("kind", sorted(launch.QUEUES))
def test_a_job_script_starts_workers_as_volseg_wants_them(kind, tmp_path):
    jobqueue = pytest.importorskip("dask_jobqueue", reason="needs dask-jobqueue (extra jobqueue)")
    settings = load(CONFIGS / f"{kind}.toml").cluster
    options = {**settings.options, "shared_temp_directory": str(tmp_path)}
    settings = settings.model_copy(update={"options": options, "dashboard": ""})
    with getattr(jobqueue, launch.QUEUES[kind])(**launch.queue_options(settings, gpu=False)) as made:
        script = made.job_script()
    assert "--nthreads 1" in script
    assert "export VOLSEG_THREADS=8" in script
    assert "--tls-cert" in script


@pytest.mark.parametrize("kind", sorted(launch.QUEUES))
def test_a_queue_that_is_not_here_is_refused(kind):
    jobqueue = pytest.importorskip("dask_jobqueue", reason="needs dask-jobqueue (extra jobqueue)")
    command = getattr(jobqueue, launch.QUEUES[kind]).job_cls.submit_command.split()[0]
    if shutil.which(command):
        pytest.skip(f"{command} is on the PATH")
    with pytest.raises(UserError, match="is not on the PATH"), cluster.connect(load(CONFIGS / f"{kind}.toml").cluster):
        pass
