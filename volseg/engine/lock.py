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
from types import TracebackType

from volseg.errors import IncompleteRunError, UserError
from volseg.io import files

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None  # type: ignore[assignment]

HEARTBEAT_S = 10  # on an object store, which cannot tell whether a holder still lives
WRITERS_WAIT_S = 60
STALE_S = 60  # after which a holder that was not heard of is taken for gone


class Lock:
    """While it is held, no other command writes to the output ``out``; a command that wants to is told who does.

    A local output has ``OUT.lock`` beside it, under the system's `flock`, so the lock of a process that is gone is gone with
    it. On an object store the lock is an object that is written only where there is none, and anew every `HEARTBEAT_S`; one
    that is `STALE_S` old is taken over, and a holder that finds that out when it wakes up raises `IncompleteRunError`.

    Raises
    ------
    UserError
        Another command holds it.
    """

    def __init__(self, out: str) -> None:
        self.out = out
        self.lock: _LocalLock | _RemoteLock = _RemoteLock(out) if files.is_remote(out) else _LocalLock(out)

    def __enter__(self) -> Lock:
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
        "pid": os.getpid(),
        "command": " ".join(sys.argv[:2])[:200],
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _refusal(out: str, holder: dict) -> UserError:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')}"
    return UserError(
        f"output {out} is being written by another volseg ({who}); wait for it, end it, or give another --out"
    )


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


class _LocalLock:
    def __init__(self, out: str) -> None:
        self.out, self.path, self.file = out, f"{out}.lock", -1

    def acquire(self) -> None:
        if fcntl is None:
            return
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        while True:
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _parsed(os.read(self.file, 4096))
                os.close(self.file)
                raise _refusal(self.out, holder) from None
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self.path).st_ino == os.fstat(self.file).st_ino:
                    break
            os.close(self.file)  # the holder before removed it between the two calls
        os.ftruncate(self.file, 0)
        os.write(self.file, json.dumps(_holder()).encode())

    def check(self) -> None:
        """The system keeps it as long as this process lives."""

    def release(self) -> None:
        if self.file < 0:
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        os.close(self.file)


class _RemoteLock:
    def __init__(self, out: str) -> None:
        self.out, self.key, self.id = out, f"{out.rpartition('/')[2]}.lock", uuid.uuid4().hex
        self.folder = out.rpartition("/")[0]
        self.done = threading.Event()
        self.last = 0.0
        self.thread: threading.Thread | None = None

    def acquire(self) -> None:
        while not files.create_bytes(self.folder, self.key, self._data()):
            try:
                holder = _parsed(files.read_bytes(self.folder, self.key))
            except FileNotFoundError:
                continue
            if time.time() - holder.get("heartbeat", 0) < STALE_S:
                raise _refusal(self.out, holder)
            files.remove(f"{self.folder}/{self.key}")
        self.last = time.monotonic()
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    def _data(self) -> bytes:
        return json.dumps({**_holder(), "id": self.id, "heartbeat": time.time()}).encode()

    def _beat(self) -> None:
        while not self.done.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError, IncompleteRunError):
                self.check()
                files.write_bytes(self.folder, self.key, self._data())
                self.last = time.monotonic()

    def check(self) -> None:
        if time.monotonic() - self.last < STALE_S / 2:
            return
        try:
            holder = _parsed(files.read_bytes(self.folder, self.key))
        except FileNotFoundError:
            holder = {}
        if holder.get("id") != self.id:
            raise IncompleteRunError(
                f"this command stood still for so long that another took over {self.out}; it goes on there"
            )

    def release(self) -> None:
        self.done.set()
        if self.thread:
            self.thread.join()
        with contextlib.suppress(OSError):
            if _parsed(files.read_bytes(self.folder, self.key)).get("id") == self.id:
                files.remove(f"{self.folder}/{self.key}")


def _parsed(data: bytes) -> dict:
    try:
        plain = json.loads(data)
    except ValueError:
        return {}
    return plain if isinstance(plain, dict) else {}
