"""Workers on hosts of their own, data in an object store over the network: hosts that are lost, leave and come.

A host is a network namespace with an address of its own on a bridge of this machine. It takes Linux, root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import report
from benchmarks.chaos.command import Command
from benchmarks.chaos.episode import hash_result
from benchmarks.chaos.network import write_certificates
from benchmarks.chaos.stores import BUCKET, Store

SILENCE_S = 5  # for which a worker may say nothing here; by default it is 30 s
LIMIT_S = 300
SETTINGS = ("blocks.shape=[8,64,64]", "stitch.min_voxels=20", "fragments.height='contour'")
CHANNELS = ("--mask-channel", "0", "--contour-channel", "1")
QUICK = f"""
from volseg.cli.commands import main
from volseg.engine import elastic
elastic.LEAST_SILENCE_S = {SILENCE_S}
main()
"""
EVENTS = ("nothing", "a host is lost, another comes", "a host retires, another comes", "all hosts are lost, two come")


@cache
def available() -> str:
    """Why hosts cannot be made here; `""` where they can."""
    if not hasattr(os, "geteuid") or os.geteuid() or not shutil.which("ip"):
        return "needs root and iproute2"
    hosts = None
    try:
        hosts = Hosts()
        hosts.add()
    except subprocess.CalledProcessError as error:
        return error.stderr.strip() or str(error)
    finally:
        if hosts:
            hosts.close()
    return ""


class Hosts:
    """This machine and hosts beside it, on one network."""

    def __init__(self) -> None:
        self.name = f"vs{os.getpid()}"
        self.network = f"10.{64 + os.getpid() // 256 % 64}.{os.getpid() % 256}"
        self.here = f"{self.network}.1"
        self.count = 0
        _ip("link", "add", self.name, "type", "bridge")
        _ip("addr", "add", f"{self.here}/24", "dev", self.name)
        _ip("link", "set", self.name, "up")

    def add(self) -> str:
        """A new host's name, which is its namespace's."""
        self.count += 1
        host = f"{self.name}h{self.count}"
        _ip("netns", "add", host)
        _ip("link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", host)
        _ip("link", "set", host, "master", self.name, "up")
        _ip("-n", host, "addr", "add", f"{self.network}.{1 + self.count}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-n", host, "link", "set", device, "up")
        return host

    def lose(self, host: str) -> None:
        """Nothing reaches the host or comes from it any more, and nobody is told."""
        _ip("link", "set", host, "down")

    def close(self) -> None:
        for k in range(self.count):
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", f"{self.name}h{k + 1}")
        _ip("link", "del", self.name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Cluster:
    """A scheduler of Dask on this machine under TLS, and workers on hosts, which see the store alone."""

    def __init__(self, hosts: Hosts, store: Store, folder: Path) -> None:
        self.hosts, self.store, self.folder = hosts, store, folder
        self.certificates = write_certificates(folder)
        self.address = f"tls://{hosts.here}:8786"
        self.commands: list[Command] = []
        self.workers: dict[str, Command] = {}
        module = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
        scheduler = self._start([*module, "--host", self.address, "--no-dashboard", *self._tls()])
        _until(lambda: "Scheduler at" in scheduler.text or not scheduler.alive)

    def _start(self, line: list[str]) -> Command:
        command = Command(line, self.folder / f"{len(self.commands)}.txt", self.store.env)
        self.commands.append(command)
        return command

    def _tls(self) -> list[str]:
        names = {"--tls-ca-file": "ca", "--tls-cert": "cert", "--tls-key": "key"}
        return [part for option, name in names.items() for part in (option, str(self.certificates[name]))]

    def add_workers(self, count: int) -> None:
        """So many workers have come, each on a new host."""
        started = []
        for _ in range(count):
            host = self.hosts.add()
            line = ["ip", "netns", "exec", host, sys.executable, "-m", "distributed.cli.dask_worker", self.address]
            options = ["--nthreads", "1", "--memory-limit", "0", "--no-dashboard", "--name", host]
            self.workers[host] = self._start([*line, *options, *self._tls()])
            started.append(self.workers[host])
        _until(lambda: all("Registered to" in worker.text or not worker.alive for worker in started))

    def segment(self, source: str, out: str) -> Command:
        """A command on this machine that computes on the hosts."""
        sets = {"tls_ca": "ca", "tls_cert": "cert", "tls_key": "key"}
        options = (*SETTINGS, *(f"cluster.{key}='{self.certificates[name]}'" for key, name in sets.items()))
        line = [sys.executable, "-c", QUICK, "segment", source, *CHANNELS, "--out", out, "--scheduler", self.address]
        return self._start([*line, *(part for text in options for part in ("--set", text))])

    def retire(self, host: str) -> None:
        """The host's worker is told to go, as a queue does before it takes a machine back."""
        self.workers[host].process.terminate()

    def close(self) -> None:
        for command in self.commands:
            command.end()


def _until(reached: Callable[[], bool], limit: float = LIMIT_S) -> bool:
    deadline = time.monotonic() + limit
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.05)
    return reached()


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """A store and a cluster on a network of their own, with two workers."""
    hosts = Hosts()
    try:
        store = Store(hosts.here)
        cluster = Cluster(hosts, store, folder)
        try:
            cluster.add_workers(2)
            yield cluster
        finally:
            cluster.close()
            store.close()
    finally:
        hosts.close()


def measure(probabilities: str, events: tuple[str, ...] = EVENTS) -> list[dict]:
    """A row for each thing that happens to the hosts in the middle of `volseg segment` from store to store: seconds, exit code,
    and whether the result is the same bytes as where nothing happens on this machine alone.

    ``probabilities`` is an array (mask, contour; z y x) on this machine; of a synthetic volume if not given.
    """
    if reason := available():
        raise SystemExit(f"cannot make hosts: {reason}")
    with TemporaryDirectory(prefix="hosts-") as temporary, running(Path(temporary)) as cluster:
        probabilities = probabilities or _synthetic(Path(temporary))
        expected = _reference(probabilities, Path(temporary))
        _upload(cluster.store, Path(probabilities), "probabilities.zarr")
        rows = [_play(cluster, k, event, expected, Path(temporary, "copy")) for k, event in enumerate(events)]
    report.keep("hosts", rows)
    return rows


def _synthetic(folder: Path) -> str:
    for line in (
        ["synth", str(folder / "em.zarr"), "--shape", "32,256,256", "--seed", "12"],
        ["infer", str(folder / "em.zarr"), "--out", str(folder / "em.volseg.zarr")],
    ):
        subprocess.run([sys.executable, "-m", "volseg", *line], check=True, capture_output=True)
    return str(folder / "em.volseg.zarr/0")


def _reference(probabilities: str, folder: Path) -> dict[str, str]:
    out = folder / "reference.volseg.zarr"
    sets = (part for text in SETTINGS for part in ("--set", text))
    line = [sys.executable, "-m", "volseg", "segment", probabilities, *CHANNELS, "--out", str(out), *sets]
    subprocess.run(line, check=True, capture_output=True)
    return _hashes(out)


def _hashes(run: Path) -> dict[str, str]:
    """Of all but the group's own description, which links the source where it lies."""
    return {key: text for key, text in hash_result(run).items() if key != "zarr.json"}


def _upload(store: Store, array: Path, prefix: str) -> None:
    """The array's group, with this array alone, is in the store."""
    for path in (array.parent / "zarr.json", *(path for path in array.rglob("*") if path.is_file())):
        key = f"{prefix}/{path.relative_to(array.parent)}"
        store.client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())


def _play(cluster: Cluster, number: int, event: str, expected: dict[str, str], copy: Path) -> dict:
    prefix, begin = f"run{number}.volseg.zarr", time.monotonic()
    command = cluster.segment(f"s3://{BUCKET}/probabilities.zarr/0", f"s3://{BUCKET}/{prefix}")
    begun = _until(lambda: bool(cluster.store.keys(f"{prefix}/work/markers/fragments/")) or not command.alive)
    done = len(cluster.store.keys(f"{prefix}/work/markers/")) if begun else 0
    living = [host for host, worker in cluster.workers.items() if worker.alive]
    if event.startswith("a host is lost"):
        cluster.hosts.lose(living[0])
        cluster.add_workers(1)
    elif event.startswith("a host retires"):
        cluster.retire(living[0])
        cluster.add_workers(1)
    elif event.startswith("all hosts"):
        for host in living:
            cluster.hosts.lose(host)
        cluster.add_workers(2)
    code = command.wait(LIMIT_S)
    for host in living if "lost" in event else ():  # what lives on behind a link that is down takes part no more
        if event.startswith("all") or host == living[0]:
            cluster.workers[host].end()
    cluster.store.copy(prefix, copy)
    return {
        "event": event,
        "markers by then": done,
        "exit code": code,
        "s": round(time.monotonic() - begin, 1),
        "same bytes": _hashes(copy) == expected,
    }
