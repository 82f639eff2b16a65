"""A run whose workers are jobs of SLURM, with its real daemons on this machine: the same labels as without it."""

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.helpers import ROOT, Quiet, digest, settings
from volseg import api
from volseg.engine.layout import Layout

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
START_S = 20.0  # in which the node is there
CONFIG = """
ClusterName=volseg
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=8000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count):
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.create_server(("127.0.0.1", 0)))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A cluster of one node, whose daemons belong to this test; where they are, ``sbatch`` finds in the environment."""
    missing = [name for name in DAEMONS if not shutil.which(name)]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurmctld slurmd munge slurm-client")
    if os.getuid() != 0:
        pytest.skip("SLURM's daemons want root")
    pytest.importorskip("dask_jobqueue", reason="needs dask-jobqueue (extra jobqueue)")
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host, ports=free_ports(2)))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # the plugin is loaded, and asked for nothing
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    munge = [f"--{name}={folder}/munge.{end}" for name, end in MUNGE_FILES.items()]
    commands = [
        ["munged", "--force", "--foreground", *munge],
        ["slurmctld", "-D", "-c", "-f", str(folder / "slurm.conf")],
        ["slurmd", "-D", "-f", str(folder / "slurm.conf"), "-N", host],
    ]
    with pytest.MonkeyPatch.context() as env, (folder / "log").open("w") as log:
        env.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        running = []
        try:
            for command in commands:
                running.append(subprocess.Popen(command, stdout=log, stderr=log))
                time.sleep(0.3)  # each talks to the one before
            wait_for_node(folder, running)
            yield folder
        finally:
            for process in reversed(running):
                process.terminate()
                process.wait(20)


MUNGE_FILES = {
    "socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed",
}  # fmt: skip


def wait_for_node(folder, running):
    """Waits until the node takes jobs; skips where it does not, with the last line that a daemon wrote."""
    end = time.monotonic() + START_S
    while "idle" not in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, check=False).stdout:
        if time.monotonic() > end or any(process.poll() is not None for process in running):
            last = ((folder / "log").read_text().strip().splitlines() or ["they said nothing"])[-1]
            pytest.skip(f"SLURM's daemons do not start here: {last}")
        time.sleep(0.2)


@pytest.mark.filterwarnings(
    "ignore:coroutine .*send_recv_from_rpc:RuntimeWarning"
)  # of a job that ends as its cluster does
def test_workers_that_are_jobs_of_slurm_give_the_labels_of_local_ones(slurm, image, reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where certificates and logs of jobs go
    options = {
        "cores": 1, "memory": "2GB", "walltime": "00:10:00", "queue": "main", "interface": "lo", "python": sys.executable,
        "log_directory": str(tmp_path), "job_script_prologue": [f"export PYTHONPATH={ROOT}"],
    }  # fmt: skip
    cluster = {"kind": "slurm", "workers": 2, "options": options}
    out = str(tmp_path / "run.volseg.zarr")
    run = api.infer(image, out, config=settings(cluster=cluster, blocks={"shape": (16, 64, 128)}), progress=Quiet())
    assert digest(out) == digest(reference)
    assert run.object_count > 0
    jobs = sorted(Path(tmp_path).glob("*.err"))
    assert len(jobs) == 2, "each worker was a job"
    assert any("Start worker at:      tls://" in job.read_text() for job in jobs)
    assert Layout(out).load_summary()["workers"] == 2
    assert not list(Path(tmp_path).glob(".dask-jobqueue*")), "nobody reads the key of a run that is over"
