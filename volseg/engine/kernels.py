"""The loops that numba compiles: by one process for all of a machine, beside the first run's inference.

numba keeps what it has compiled, but each of several workers that want a loop at once would compile it for itself: for a
quarter of a minute each. So a run that finds no stamp of these versions on this machine starts ``volseg compile``, which
holds a lock for as long as it takes. `schedule` hands out meanwhile what needs no such loops, and a worker that has nothing
else waits for the lock.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import volseg
from volseg.engine import lock
from volseg.inference import cache, hardware

LOCK_VARIABLE = "VOLSEG_KERNELS_LOCK"  # in the environment of the process that compiles: the open file that it holds
_known = False  # that nobody compiles any more: what this process asks for again and again


@contextmanager
def compiled_beside(wanted: bool = True) -> Iterator[bool]:
    """While the block lasts another process compiles what this machine has not compiled yet; tells whether one does.

    One that is not done by then is ended, and a later run begins again.
    """
    process = _start() if wanted else None
    try:
        yield process is not None
    finally:
        if process is not None:
            process.terminate()
            process.wait()


def are_compiling() -> bool:
    """Whether a process compiles them now. After the first no it stays a no, until `compiled_beside` is called again."""
    global _known
    if not _known:
        held = _lock(wait=False)
        _known = held is not None
        _close(held)
    return not _known


@contextmanager
def compiler() -> Iterator[None]:
    """This process is the one that compiles: the others wait for it, and find the stamp if nothing fails."""
    held = None
    if not is_compiler():
        held = _lock(wait=True, exclusive=True)
        os.environ[LOCK_VARIABLE] = str(held)
    try:
        yield
        cache.store(stamp(), b"")
    finally:
        if held is not None:
            del os.environ[LOCK_VARIABLE]
            _close(held)


def is_compiler() -> bool:
    """Whether this process holds the lock, itself or since it was started."""
    return LOCK_VARIABLE in os.environ


def wait() -> None:
    """Returns once nobody compiles them."""
    global _known
    if not _known and not is_compiler():
        _close(_lock(wait=True))
    _known = True


def stamp() -> Path:
    """The file that says that all was compiled: for these sources, these versions, and such a processor."""
    package = Path(volseg.__file__).parent
    sources = [*package.glob("segmentation/*.py"), package / "io/pyramid.py", package / "inference/device.py"]
    facts = [
        volseg.__version__, platform.python_version(), *(metadata.version(name) for name in ("numba", "llvmlite", "numpy")),
        str(package), max(path.stat().st_mtime_ns for path in sources), os.environ.get("NUMBA_CACHE_DIR", ""),
        sorted(hardware.cpu_flags()),
    ]  # fmt: skip
    return cache.folder() / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.kernels"


def _start() -> subprocess.Popen | None:
    """A process that compiles and has the lock; none where all is compiled, or another one is at it."""
    global _known
    _known = False
    if is_compiler() or stamp().exists():
        return None
    held = _lock(wait=False, exclusive=True)
    if held is None or held < 0:
        return None
    command = [sys.executable, "-m", "volseg", "compile"]
    try:
        os.set_inheritable(held, True)
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[held],
            start_new_session=True, env={**os.environ, LOCK_VARIABLE: str(held)},
        )  # fmt: skip
    except OSError:
        return None
    finally:
        _close(held)  # the process has it now: it is let go of when that ends, whatever ends it


def _lock(*, wait: bool, exclusive: bool = False) -> int | None:
    """An open file that has the lock; None where another process keeps it from us, -1 where there are no locks."""
    if lock.fcntl is None:
        return -1
    path = cache.folder() / "kernels.lock"
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        held = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        kind = lock.fcntl.LOCK_EX if exclusive else lock.fcntl.LOCK_SH
        try:
            lock.fcntl.flock(held, kind if wait else kind | lock.fcntl.LOCK_NB)
            return held
        except BlockingIOError:
            os.close(held)
            return None
        except OSError:
            os.close(held)
    return -1


def _close(held: int | None) -> None:
    if held is not None and held >= 0:
        os.close(held)
