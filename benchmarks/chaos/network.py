"""Faults of a cluster elsewhere and of clocks: a scheduler and workers of their own behind a proxy that hurts what passes."""

from __future__ import annotations

import ctypes.util
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from distributed.security import Security

from benchmarks.chaos.command import LIMIT_S, Command
from benchmarks.chaos.episode import Episode, skipped
from benchmarks.chaos.stand import EXISTS, RESTARTS, Stand, wait_for_moment

START_S = 120
PIECE_BYTES = 1 << 16
JUMPS_S = (-86400, -3600, 90, 7200, 86400 * 400)
FAKETIME = (
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketime.so.1",
)


# ---------------------------------------------------------------- a proxy of bytes


@dataclass
class Wire:
    """A proxy of one port; it passes bytes on, flips some, or drops all connections."""

    target: int
    rng: Random
    flips: int = 0
    injected: int = 0
    connections: list[socket.socket] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.server.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.target), 5)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)  # that was for connecting; what is idle stays
                self.connections += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source: socket.socket, to: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(PIECE_BYTES):
                if self.flips:
                    self.flips -= 1
                    self.injected += 1
                    at = self.rng.randrange(len(data))
                    data = data[:at] + bytes([data[at] ^ 1 << self.rng.randrange(8)]) + data[at + 1 :]
                to.sendall(data)
        for end in (source, to):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Every connection ends."""
        self.injected += 1
        for end in self.connections:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.connections.clear()

    def close(self) -> None:
        self.cut()
        self.server.close()


# ---------------------------------------------------------------- a cluster


class Cluster:
    """``dask scheduler`` and two ``dask worker`` on loopback, under TLS; workers and clients come through a `Wire`."""

    def __init__(self, stand: Stand, rng: Random) -> None:
        self.stand, self.folder = stand, stand.place / "tls"
        self.folder.mkdir(exist_ok=True)
        self.files = write_certificates(self.folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.wire = Wire(self.port, rng)
        self.started: list[Command] = []
        self.scheduler = self.start_scheduler()
        self.workers = [self.start_worker() for _ in range(stand.workers)]
        self.wait()

    @property
    def settings(self) -> tuple[str, ...]:
        """Options of a command that computes there."""
        sets = {"tls_ca": "ca", "tls_cert": "cert", "tls_key": "key"}
        return ("--scheduler", f"tls://127.0.0.1:{self.wire.port}",
                *(part for key, name in sets.items() for part in ("--set", f"cluster.{key}='{self.files[name]}'")))  # fmt: skip

    def _tls(self) -> list[str]:
        names = {"--tls-ca-file": "ca", "--tls-cert": "cert", "--tls-key": "key"}
        return [part for option, name in names.items() for part in (option, str(self.files[name]))]

    def start_scheduler(self) -> Command:
        line = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
        command = self._start([*line, "--host", f"tls://127.0.0.1:{self.port}", "--no-dashboard", *self._tls()])
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:  # a worker that comes before it does not come again
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                break
            time.sleep(0.1)
        return command

    def start_worker(self) -> Command:
        line = [sys.executable, "-m", "distributed.cli.dask_worker", f"tls://127.0.0.1:{self.wire.port}"]
        return self._start([*line, "--nthreads", "1", "--memory-limit", "0", "--no-dashboard", *self._tls()])

    def _start(self, line: list[str]) -> Command:
        self.started.append(self.stand.start(line))
        return self.started[-1]

    def wait(self) -> None:
        """The workers have registered."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if sum("Registered to" in worker.text for worker in self.workers) == len(self.workers):
                return
            time.sleep(0.1)

    def mend(self) -> None:
        """What was killed is there again, as an administrator would see to."""
        if not self.scheduler.alive:
            self.scheduler = self.start_scheduler()
        for i, worker in enumerate(self.workers):
            if not worker.alive:
                self.workers[i] = self.start_worker()
        self.wait()

    def tend(self, command: Command) -> None:
        """Until the command ends, what was killed is started again."""
        deadline = time.monotonic() + LIMIT_S
        while command.alive and time.monotonic() < deadline:
            self.mend()
            time.sleep(0.5)

    def close(self) -> None:
        self.wire.close()
        for command in self.started:
            command.end()


def write_certificates(folder: Path) -> dict[str, Path]:
    """Files in ``folder`` of a temporary authority, and of a certificate and key by it."""
    security = Security.temporary()
    texts = {"ca": security.tls_ca_file, "cert": security.tls_scheduler_cert, "key": security.tls_scheduler_key}
    found = {}
    for name, text in texts.items():
        found[name] = folder / f"{name}.pem"
        found[name].write_text(text)
    return found


@contextmanager
def _cluster(stand: Stand, rng: Random) -> Iterator[Cluster]:
    cluster = Cluster(stand, rng)
    try:
        yield cluster
    finally:
        cluster.close()


def elsewhere(stand: Stand, rng: Random, episode: Episode, *, fault: str) -> Episode:
    """A run on a scheduler of its own; a process of the cluster is killed, or what passes the network is hurt."""
    reference, out = stand.reference(episode.job), stand.prepare(episode.job)
    with _cluster(stand, rng) as cluster:
        line = [*stand.line(episode.job, out), *cluster.settings]
        command = stand.start(line)
        moment = wait_for_moment(command, out, episode.job, 2 * reference.seconds, rng)
        if moment:
            episode.faults += _hurt(cluster, rng, fault)
            episode.notes.append(moment)
        for _ in range(RESTARTS + 1):
            cluster.tend(command)
            code = episode.ended(command)
            if code in (0, None) or EXISTS in episode.notes[-1]:
                break
            cluster.mend()
            command = stand.start(line)
    return episode.judge(out, reference.hashes)


def _hurt(cluster: Cluster, rng: Random, fault: str) -> int:
    if fault == "flip":
        before = cluster.wire.injected
        cluster.wire.flips = rng.choice((1, 1, 3, 20))
        time.sleep(1)
        cluster.wire.flips = 0
        return cluster.wire.injected - before
    if fault == "cut":
        cluster.wire.cut()
        return 1
    if fault == "scheduler":
        return cluster.scheduler.send(signal.SIGKILL, [cluster.scheduler.process.pid])
    worker = rng.choice(cluster.workers)
    nanny = worker.process.pid
    pids = [nanny] if fault == "nanny" else [pid for pid in worker.pids() if pid != nanny]
    return min(1, worker.send(signal.SIGKILL, pids))


# ---------------------------------------------------------------- clocks


def clock_jump(stand: Stand, rng: Random, episode: Episode) -> Episode:
    """The clock of the machine is set forward or back while a command runs; monotonic clocks go on."""
    library = next((path for path in FAKETIME if Path(path).exists()), ctypes.util.find_library("faketime"))
    if not library:
        return skipped(episode, "needs libfaketime (apt-get install libfaketime)")
    reference, out = stand.reference(episode.job), stand.prepare(episode.job)
    clock = stand.place / "clock"
    clock.write_text("+0")
    env = {
        "LD_PRELOAD": library,
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    line = stand.line(episode.job, out)
    command = stand.start(line, env)
    for _ in range(rng.choice((1, 2, 3))):
        moment = wait_for_moment(command, out, episode.job, reference.seconds, rng)
        if moment:
            seconds = rng.choice(JUMPS_S)
            clock.write_text(f"{seconds:+d}")
            episode.faults += 1
            episode.notes.append(f"{moment}, {seconds:+d} s")
    if rng.random() < 0.3 and command.alive:
        command.send(signal.SIGKILL, [command.process.pid])
    episode.ended(command)
    clock.write_text("+0")
    return stand.again(episode, line, out)


FAULTS = ("worker", "nanny", "scheduler", "flip", "cut")
KINDS = {
    **{f"cluster-{fault}": (elsewhere, ("segment", "infer"), {"fault": fault}) for fault in FAULTS},
    "clock-jump": (clock_jump, ("infer", "segment", "tree"), {}),
}
