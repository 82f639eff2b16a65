"""Whether the loops that runs need are compiled for this machine, which numba does once and keeps.

Workers that come to a loop at the same time compile it each for itself: 10 s of a core. So in the first run on a machine the
first block of a stage goes by itself, while other workers infer.
"""

from __future__ import annotations

import hashlib
import platform
import sys
from pathlib import Path

import numba

import volseg
from volseg.inference import cache, hardware


def known() -> bool:
    """Whether a run of this code has ended on this machine."""
    return _stamp().exists()


def remember() -> None:
    """A run has ended: its loops are compiled."""
    if not known():
        cache.store(_stamp(), b"")


def _stamp() -> Path:
    """A file in the cache, named by what numba looks at: when sources were written, its version, and the processor."""
    package = Path(volseg.__file__).parent
    written = [(str(path), path.stat().st_mtime_ns) for path in sorted(package.rglob("*.py"))]
    here = [written, numba.__version__, sys.version, platform.machine(), sorted(hardware.cpu_flags())]
    return cache.folder() / f"{hashlib.sha256(repr(here).encode()).hexdigest()[:32]}.loops"
