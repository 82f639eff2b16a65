"""Worker processes are forked from one process that imports what they need while the command itself is still importing.

A spawned worker would import Dask, zarr and numba by itself, and all workers of a machine at once. Linux only: elsewhere
forking a process that has loaded libraries is not safe.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver

from volseg.system import same_imports

# The command line is among them: a worker runs the console script's imports again.
PRELOAD = ["volseg.engine.pipeline", "volseg.cli", "volseg.engine.preload"]
# What Dask sets before it spawns a worker (distributed.nanny.pre-spawn-environ): read when the libraries are loaded. But
# not MALLOC_TRIM_THRESHOLD_, so that `warm` may decide.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def method() -> str:
    """How Dask is to start workers here, a name of `multiprocessing.get_context`."""
    return "forkserver" if sys.platform == "linux" else "spawn"


def start() -> None:
    """The process to fork from is there or on its way, deaf to Ctrl-C; it ends with this one. A second call does nothing."""
    if method() != "forkserver":
        return
    wanted = {**{name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}, **same_imports()}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        with deaf_to_interrupts():
            forkserver.set_forkserver_preload(PRELOAD)
            forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C: the client alone hears it, and ends them in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
