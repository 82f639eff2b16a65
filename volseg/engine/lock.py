"""One writer for each output: a lock beside it that ends with its holder."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import TracebackType

from volseg.errors import IncompleteRunError, UserError
from volseg.io import files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HEARTBEAT_S = 10  # on an object store, which cannot tell whether a holder still lives
WRITERS_WAIT_S = 60
STALE_S = 60  # after which a holder that was not heard of may be gone: clocks of two machines differ, so it is watched
SILENCE_S = 25  # of a holder that is watched, after which it is taken for gone
HOLDER_WAIT_S = 2  # in which a holder writes who it is


class Lock:
    """While it is held, no other command writes to the output ``out``; a command that wants to is told who does.

    A local output has ``OUT.lock`` beside it, under the system's `flock`, so the lock of a process that is gone is gone with
    it. On an object store, and where the system or the file system has no such locks (Windows, some network mounts), the
    lock is an object or a file that is written only where there is none, and anew every `HEARTBEAT_S`. It is taken over
    where its holder's process on this machine is gone, or where it says nothing for `SILENCE_S`; a holder that finds that
    out when it wakes up raises `IncompleteRunError`.

    Raises
    ------
    UserError
        Another command holds it.
    """

    def __init__(self, out: str) -> None:
        self.out = out
        local = fcntl is not None and not files.is_remote(out)
        self.lock: _LocalLock | _HeartbeatLock = _LocalLock(out) if local else _HeartbeatLock(out)

    def __enter__(self) -> Lock:
        try:
            self.lock.acquire()
        except _NoLocksError:
            self.lock = _HeartbeatLock(self.out)
            self.lock.acquire()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.lock.release()

    def check(self) -> None:
        """Raises `IncompleteRunError` where another command has taken the lock meanwhile."""
        self.lock.check()


def _holder() -> dict:
    return {
        "host": platform.node(),
        "machine": _machine(),
        "pid": os.getpid(),
        "command": " ".join(sys.argv[:2])[:200],
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _machine() -> str:
    """What processes have in common that see each other's numbers: the system since it started, and the container."""
    found = []
    with contextlib.suppress(OSError):
        found = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join([platform.node(), *found])


def _refusal(out: str, holder: dict) -> UserError:
    return UserError(f"output {out} {_written_by(holder)}; wait for it, end it, or give another --out")


def _written_by(holder: dict) -> str:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')}"
    return f"is being written by another volseg ({who})"


def writer(out: str) -> str:
    """``is being written by ...`` where a command holds the lock of ``out``, else ``""``."""
    lock = _HeartbeatLock(out) if fcntl is None or files.is_remote(out) else _LocalLock(out)
    holder = lock.seen()
    return "" if holder is None else _written_by(holder)


def flocks(folder: str | os.PathLike) -> bool:
    """Whether files in a folder can be locked by the system; else locks are files with a heartbeat."""
    if fcntl is None:
        return False
    path = Path(folder, f".volseg-{uuid.uuid4().hex}.lock")
    try:
        with path.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        path.unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def writing(begun: str) -> Iterator[None]:
    """Inside, this worker writes to the run whose mark is the local file ``begun``: see `wait_for_writers`."""
    if fcntl is None or files.is_remote(begun):
        yield
        return
    try:
        file = os.open(begun, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # a folder on which files cannot be opened will tell when it is written to
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH)
        yield
    finally:
        os.close(file)


def wait_for_writers(begun: str) -> None:
    """No worker of a command that is gone still writes to the run: what a killed command leaves ends within seconds."""
    if fcntl is None or files.is_remote(begun) or not files.exists(begun):
        return
    file, end = os.open(begun, os.O_RDONLY | os.O_CLOEXEC), time.monotonic() + WRITERS_WAIT_S
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    raise UserError(
                        f"workers of an earlier command still write beside {begun}; end them (dask worker processes), or "
                        "give another --out"
                    ) from None
            except OSError:  # a file system without locks
                return
            time.sleep(0.1)
    finally:
        os.close(file)


class _NoLocksError(Exception):
    """The file system has no locks."""


class _LocalLock:
    def __init__(self, out: str) -> None:
        self.out, self.path, self.file = out, f"{out}.lock", -1

    def acquire(self) -> None:
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        while True:
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = self._holder()
                os.close(self.file)
                raise _refusal(self.out, holder) from None
            except OSError:  # a file system without locks, such as Lustre mounted without flock
                self._discard()
                raise _NoLocksError from None
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self.path).st_ino == os.fstat(self.file).st_ino:
                    break
            os.close(self.file)  # the holder before removed it between the two calls
        os.ftruncate(self.file, 0)
        os.write(self.file, json.dumps(_holder()).encode())

    def seen(self) -> dict | None:
        """Who holds it; None where nobody does."""
        try:
            holder = _parsed(Path(self.path).read_bytes())
        except OSError:
            return None
        lives = holder.get("machine") != _machine() or _process_lives(holder.get("pid"))
        return holder if holder and lives else None

    def _holder(self) -> dict:
        """Who holds it; a holder that has it only just now is waited for."""
        end = time.monotonic() + HOLDER_WAIT_S
        while not (holder := _parsed(os.pread(self.file, 4096, 0))) and time.monotonic() < end:
            time.sleep(0.02)
        return holder

    def _discard(self) -> None:
        """The file is closed and, unless somebody wrote to it, gone."""
        if not os.fstat(self.file).st_size:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        os.close(self.file)

    def check(self) -> None:
        """The system keeps it as long as this process lives."""

    def release(self) -> None:
        if self.file < 0:
            return
        with contextlib.suppress(OSError):  # what has turned read-only keeps the file, which locks nothing by itself
            os.unlink(self.path)
        os.close(self.file)


class _HeartbeatLock:
    def __init__(self, out: str) -> None:
        self.out, self.id = out, uuid.uuid4().hex
        self.folder, name = out.rpartition("/")[::2] if files.is_remote(out) else os.path.split(out)
        self.key = f"{name}.lock"
        self.done = threading.Event()
        self.last = 0.0
        self.lost = False
        self.thread: threading.Thread | None = None

    def acquire(self) -> None:
        while not files.create_bytes(self.folder, self.key, self._data()):
            holder = self._holder()
            if holder is None:
                continue
            if holder.get("id") == self.id:  # the store did as told, and its answer was lost on the way
                break
            if self._lives(holder):
                raise _refusal(self.out, holder)
            files.remove(f"{self.folder}/{self.key}")
        self.last = time.monotonic()
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    def _data(self) -> bytes:
        return json.dumps({**_holder(), "id": self.id, "heartbeat": time.time()}).encode()

    def seen(self) -> dict | None:
        """Who holds it; None where nobody does."""
        return self._holder()

    def _holder(self) -> dict | None:
        try:
            return _parsed(files.read_bytes(self.folder, self.key))
        except FileNotFoundError:
            return None

    def _lives(self, holder: dict) -> bool:
        """Whether a holder still does, by its process where that is on this machine, else by its heartbeat."""
        if holder.get("machine") == _machine() and not _process_lives(holder.get("pid")):
            return False
        if abs(time.time() - holder.get("heartbeat", 0)) < STALE_S:
            return True
        end = time.monotonic() + SILENCE_S
        while time.monotonic() < end:
            time.sleep(1)
            if (now := self._holder()) != holder:
                return now is not None
        return False

    def _beat(self) -> None:
        while not self.lost and not self.done.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):
                self._renew()

    def _renew(self) -> None:
        """It is written anew, unless another has it."""
        holder = self._holder()
        if holder is None:
            self.lost = not files.create_bytes(self.folder, self.key, self._data())
        elif holder.get("id") != self.id:
            self.lost = True
        else:
            files.write_bytes(self.folder, self.key, self._data())
        self.last = time.monotonic()

    def check(self) -> None:
        if not self.lost and time.monotonic() - self.last >= STALE_S / 2:
            self.lost = (self._holder() or {}).get("id") != self.id
        if self.lost:
            raise IncompleteRunError(
                f"this command stood still for so long that another took over {self.out}; it goes on there"
            )

    def release(self) -> None:
        self.done.set()
        if self.thread:
            self.thread.join()
        with contextlib.suppress(OSError):
            if (self._holder() or {}).get("id") == self.id:
                files.remove(f"{self.folder}/{self.key}")


def _process_lives(pid: object) -> bool:
    import psutil

    return isinstance(pid, int) and psutil.pid_exists(pid)


def _parsed(data: bytes) -> dict:
    try:
        plain = json.loads(data)
    except ValueError:
        return {}
    return plain if isinstance(plain, dict) else {}
