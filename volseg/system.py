"""What this machine has: memory within any container's limit, disk, and packages that only some commands need."""

from __future__ import annotations

import ctypes
import gc
import platform
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from volseg.errors import UserError

CGROUPS = Path("/sys/fs/cgroup")


def installed(package: str) -> bool:
    """Whether a package can be imported; it is not imported by this.

    >>> installed("numpy"), installed("no_such_package")
    (True, False)
    """
    return package in sys.modules or find_spec(package) is not None


def require(*packages: str, extra: str) -> None:
    """Goes on only where these packages are installed, which come with an extra of volseg.

    Call it before the imports that need them. Raises `UserError` with the line that installs what is missing.

    >>> require("numpy", extra="train")
    >>> require("no_such_package", extra="train")
    Traceback (most recent call last):
        ...
    volseg.errors.UserError: no_such_package is not installed; install it with: pip install 'volseg[train]'
    """
    missing = [package for package in packages if not installed(package)]
    if missing:
        them = "it" if len(missing) == 1 else "them"
        state = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"{', '.join(missing)} {state} not installed; install {them} with: pip install 'volseg[{extra}]'"
        )


def free_memory() -> int:
    """Bytes that processes started now may take before the machine, or the container, is out of memory."""
    import psutil

    return min([psutil.virtual_memory().available, *limits()])


def limits(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What each limit on this process's control group, or on one above it, leaves in bytes; cached files count as free."""
    found = []
    for line in _text(own).splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top = root / "memory" if kinds else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (limit := _text(folder / names[0]).strip()).isdigit():
                found.append(max(0, int(limit) - int(_text(folder / names[1]) or 0) + _cached(folder)))
    return found


def _cached(folder: Path) -> int:
    """Bytes of files that a control group keeps in memory and would give up."""
    rows = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
    return int(rows.get("total_inactive_file", rows.get("inactive_file", 0)))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def free_disk(path: str) -> int:
    """Bytes free where ``path`` is, or is to be made."""
    where = Path(path).absolute()
    return shutil.disk_usage(next(p for p in (where, *where.parents) if p.exists())).free


def resident(kind: str = "RSS") -> int:
    """Bytes this process holds now ("RSS"), or the most it has held ("HWM")."""
    status = _text(Path("/proc/self/status"))
    found = next((line.split()[1] for line in status.splitlines() if line.startswith(f"Vm{kind}:")), None)
    if found:
        return int(found) * 1024
    import psutil

    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss) if kind == "HWM" else memory.rss


def tune_malloc() -> None:
    """What this process frees, it keeps for what it needs next.

    glibc gives large pieces back to the system and gets them anew, page by page, each time. A step of training had 50 000
    page faults by that and almost none without; basins of a block took twice as long.
    """
    if glibc():
        libc = ctypes.CDLL(None)
        libc.mallopt(-8, 1)  # M_ARENA_MAX: what one thread has freed, another may take
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no piece comes from mmap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back


def trim_memory() -> None:
    """What nothing refers to any more is the system's again, and free on the GPUs that torch uses in this process."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if glibc():
        ctypes.CDLL(None).malloc_trim(0)


def glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
