"""What this machine has: memory within any container's limit, disk, packages that only some commands need, shipped configs."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


def _configs_folder() -> Path:
    """Where they lie: inside an installed package, beside it in the repository."""
    package = Path(__file__).parent
    return next((found for found in (package / "configs", package.parent / "configs") if found.is_dir()), package)


def shipped_configs() -> dict[str, Path]:
    """The config files that ship with volseg, by name: ``touching``, ``cluster/slurm``.

    >>> shipped_configs()["touching"].name
    'touching.toml'
    """
    folder = _configs_folder()
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted([*folder.glob("*.toml"), *folder.glob("*/*.toml")])
    }


def shipped_config(name: str | Path) -> Path | None:
    """The config file of that name that ships; None where there is none, and where the name leads to a file of the user's own.

    >>> shipped_config("no-such-name") is None
    True
    """
    return None if Path(name).exists() else shipped_configs().get(str(name))


def free_memory() -> int:
    """Bytes that processes started now may take before the machine, or the container, is out of memory."""
    import psutil

    return min([psutil.virtual_memory().available, *limits()])


def total_memory() -> int:
    """Bytes of memory of the machine."""
    import psutil

    return psutil.virtual_memory().total


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


def send_nothing() -> None:
    """ONNX Runtime tells its makers nothing of what it runs, unless the environment says that it may: since 1.29 it does."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def same_imports() -> dict[str, str]:
    """The environment in which another Python imports what this one does: a file ``queue.py`` in the folder where a user
    happens to be is none of it.
    """
    paths = [os.path.abspath(path) for path in sys.path]
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(path for path in paths if os.pathsep not in path)}


def keep_numba_cache() -> None:
    """numba can store what it compiles, if only in a temporary folder: that is, where neither the package nor the user's cache
    may be written, or not the folder that ``NUMBA_CACHE_DIR`` gives.

    numba, which gives up otherwise, looks at that variable when it is imported.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    given = os.environ.get("NUMBA_CACHE_DIR")
    if any(map(writable, [Path(given)] if given else [Path(__file__).parent / "__pycache__", home])):
        return
    os.environ["NUMBA_CACHE_DIR"] = str(private_folder("numba"))
    if "numba" in sys.modules:
        sys.modules["numba"].config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]


def private_folder(name: str) -> Path:
    """A folder of that name among the temporary ones that is this user's alone: what lies there may be run."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir(), f"volseg-{name}-{user}")
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and (os.name == "nt" or (status.st_uid == user and not status.st_mode & 0o077)):
            return folder
    return Path(tempfile.mkdtemp(prefix=f"volseg-{name}-"))


def writable(folder: Path) -> bool:
    """Whether files can be written to ``folder``, which need not be there yet."""
    there = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


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


_malloc_is_tuned = False  # of this process; glibc does not tell


def tune_malloc() -> None:
    """What this process frees, it keeps for what it needs next.

    glibc gives large pieces back to the system and gets them anew, page by page, each time. A step of training had 50 000
    page faults by that and almost none without; basins of a block took twice as long.
    """
    global _malloc_is_tuned
    _malloc_is_tuned = True
    _set_malloc(
        arenas=1, mapped=0, trim=-1
    )  # one thread may take what another freed; no piece of its own; nothing back


@contextmanager
def untuned_malloc() -> Iterator[None]:
    """Inside, `tune_malloc` is undone: a large array can grow without a copy, and is the system's when it is freed.

    For work on few arrays as large as all memory. Stitching 10 million edges held 2.2 GB tuned and 1.6 GB so.
    """
    tuned = _malloc_is_tuned
    if tuned:
        _set_malloc(arenas=1, mapped=65536, trim=1 << 20)
        trim_memory()
    try:
        yield
    finally:
        if tuned:
            tune_malloc()


def _set_malloc(*, arenas: int, mapped: int, trim: int) -> None:
    """glibc's limits: on arenas, on pieces of a mapping of their own (from 1 MB), on free bytes kept (-1: none)."""
    if glibc():
        libc = ctypes.CDLL(None)
        libc.mallopt(-8, arenas)  # M_ARENA_MAX
        libc.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-4, mapped)  # M_MMAP_MAX
        libc.mallopt(-1, trim)  # M_TRIM_THRESHOLD


def trim_memory() -> None:
    """What nothing refers to any more is the system's again, and free on the GPUs that torch uses in this process."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if glibc():
        ctypes.CDLL(None).malloc_trim(0)


def glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
