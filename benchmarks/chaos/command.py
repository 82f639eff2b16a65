"""One command of volseg, all its processes, and how it ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

LIMIT_S = 240  # a command that has not ended by then is blocked
ORPHANS_S = 15  # in which what a command started must be gone after its end
CLIENT, FORKSERVER, WORKER, TRACKER = "client", "forkserver", "worker", "tracker"
SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)


class Command:
    """A command under way, in a session of its own: by that all processes that it starts are known, whoever their parent is.

    Parameters
    ----------
    line
        Program and arguments.
    log
        File that takes what it says.
    env
        Variables beside those of this process.
    """

    def __init__(self, line: Sequence[str], log: Path, env: dict[str, str] | None = None) -> None:
        self.line, self.log = list(line), log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                self.line, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})},
                start_new_session=True, preexec_fn=_hear_signals,
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def last_line(self) -> str:
        return (self.text.strip().splitlines() or [""])[-1][:300]

    @property
    def tracebacks(self) -> int:
        return len(re.findall(r"^Traceback \(most recent call last\)", self.text, re.M))

    def pids(self, role: str = "") -> list[int]:
        """Its processes that live, or those of one role."""
        return [pid for pid, found in self._roles().items() if not role or found == role]

    def _roles(self) -> dict[int, str]:
        members = dict(_session(self.process.pid))
        servers = {
            pid for pid, (parent, line) in members.items() if parent == self.process.pid and "forkserver" in line
        }
        roles = {}
        for pid, (parent, line) in members.items():
            if pid == self.process.pid:
                roles[pid] = CLIENT
            elif "resource_tracker" in line:
                roles[pid] = TRACKER
            elif pid in servers:
                roles[pid] = FORKSERVER
            else:
                roles[pid] = WORKER if parent in servers or "spawn_main" in line or "forkserver" in line else ""
        return roles

    def send(self, number: int, pids: Sequence[int]) -> int:
        """Sends these processes a signal; how many were there to take it."""
        taken = 0
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
                taken += 1
        return taken

    def wait(self, limit: float = LIMIT_S) -> int | None:
        """Its exit code; None, with all its processes ended, where it has not ended in so many seconds."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.end()
            return None

    def orphans(self) -> list[int]:
        """What is left of it `ORPHANS_S` after its end."""
        deadline = time.monotonic() + ORPHANS_S
        while (left := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def end(self) -> None:
        """Nothing of it lives."""
        while pids := self.pids():
            self.send(signal.SIGKILL, pids)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
        self.process.wait()


def volseg(*arguments: str) -> list[str]:
    """A command line of volseg."""
    return [sys.executable, "-m", "volseg", *arguments]


def _hear_signals() -> None:
    """Signals do what they do in a terminal, also where nohup or & had them ignored."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _session(leader: int) -> list[tuple[int, tuple[int, str]]]:
    """Pid, and parent and command line, of the living processes of a session."""
    found = []
    for pid in psutil.pids():
        with suppress(psutil.Error, OSError):
            if os.getsid(pid) == leader:
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append((pid, (process.ppid(), " ".join(process.cmdline()))))
    return found
