"""What this machine offers volseg, and what is amiss: each thing looked at, a line about it, and what to do."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from volseg import system
from volseg.config import Predict
from volseg.engine import cluster, lock
from volseg.errors import UserError, printable
from volseg.inference import autoselect, backends, cache, hardware, model
from volseg.io import codecs, files

OK, ABSENT, WARNING, FAILED = "ok", "absent", "warning", "failed"
BACKEND_SECONDS = 2.0  # in which the network runs on each backend
BACKEND_LIMIT_S = 120  # what a backend takes longer than this to load is not counted on
LITTLE_MEMORY, LITTLE_DISK = 4e9, 10e9
FILES_OPEN = 1024  # that a run with several workers may need
PORT = 8787  # of the dashboard
PACKAGES = ("numpy", "numba", "zarr", "zarrs", "dask", "distributed", "openvino", "tifffile", "imagecodecs", "pyarrow")
EXTRAS = ("torch", "gpu", "onnx", "train", "int8", "s3", "formats", "export", "view")
VARIABLES = ("VOLSEG_CACHE", "NUMBA_CACHE_DIR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TMPDIR", "XDG_CACHE_HOME")
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: its state (ok, absent, warning, failed), what it is, and what to do."""

    name: str
    state: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.state:8} {self.name:12} {self.text}" + f"\n{'':21} -> {self.advice}" * bool(self.advice)


@dataclass(frozen=True)
class Diagnosis:
    """All that `doctor` looked at. ``ok``: nothing stands in the way of a run; there may be warnings."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.state != FAILED for check in self.checks)

    @property
    def warnings(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.state in (WARNING, FAILED))

    def to_json(self) -> dict:
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}

    @property
    def summary(self) -> str:
        """The last line: how many things want a look."""
        count = len(self.warnings)
        return (
            f"{count} thing{'s' * (count > 1)} to look at: see warning and failed above"
            if count
            else "nothing is amiss"
        )

    def __str__(self) -> str:
        return "\n".join([*map(str, self.checks), self.summary])


def doctor(
    folder: str | os.PathLike = ".", *, seconds: float = BACKEND_SECONDS, say: Callable[[str], None] | None = None
) -> Diagnosis:
    """Look at this machine: devices, backends, codecs, versions, disk, memory, ports, caches and permissions.

    Parameters
    ----------
    folder : path
        Where runs are to be written: its disk and permissions are looked at.
    seconds : float
        For how long the shipped network runs on each backend; 0 leaves that out.
    say : callable, optional
        Called with each line as soon as it is known.

    Returns
    -------
    Diagnosis
        With ``checks``, ``warnings`` and ``ok``, which is false where a run cannot work here.

    Examples
    --------
    >>> found = doctor(seconds=0)
    >>> [check.name for check in found.checks][:3]
    ['volseg', 'packages', 'extras']
    """
    done = []
    for check in _checks(Path(folder), seconds):
        done.append(check)
        if say:
            say(str(check))
    return Diagnosis(tuple(done))


def _checks(folder: Path, seconds: float) -> Iterator[Check]:
    yield Check(
        "volseg", OK, f"{metadata.version('volseg')}, Python {platform.python_version()}, {platform.platform()}"
    )
    yield Check("packages", OK, ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES))
    yield from _extras()
    yield _variables()
    yield _processor()
    yield _graphics()
    yield _memory()
    yield from _backends(seconds)
    yield from _codecs()
    yield from _folder(folder)
    yield _temporary()
    yield from _caches()
    yield _loopback()
    yield _dashboard()
    if (limit := _open_files()) is not None:
        yield limit
    yield _browser()


# ---------------------------------------------------------------- packages and devices


def _extras() -> Iterator[Check]:
    """Which extras are installed; packages that overwrite each other."""
    wanted = _requirements()
    missing = {extra: _missing(wanted.get(extra, [])) for extra in EXTRAS}
    here = [extra for extra, names in missing.items() if not names]
    yield Check("extras", OK, ", ".join(here) or "none: inference on a CPU alone")
    lacking = {extra: names for extra, names in missing.items() if names}
    if lacking:
        said = "; ".join(f"{extra} lacks {', '.join(names)}" for extra, names in lacking.items())
        yield Check("extras", ABSENT, said, f"for what you need of these: pip install 'volseg[{','.join(lacking)}]'")
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if not _missing([(name, "")])]
    if len(both) == 2:
        yield Check("extras", WARNING, "onnxruntime and onnxruntime-gpu overwrite each other's files",
                    "pip uninstall both, then install onnxruntime-gpu alone")  # fmt: skip


def _requirements() -> dict[str, list[tuple[str, str]]]:
    """By extra, the packages that it asks for, and the platforms that each is for (or nothing)."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in metadata.requires("volseg") or []:
        package, _, marker = line.partition(";")
        name, extra = re.split(r"[^\w.-]", package.strip())[0], re.search(r"extra == ['\"]([\w-]+)", marker)
        if extra and name != "volseg":
            found.setdefault(extra[1], []).append((name, "platform" if "platform" in marker else ""))
    return found


def _missing(packages: list[tuple[str, str]]) -> list[str]:
    """The packages that are not installed; of those for some platforms, one is enough."""

    def has(name: str) -> bool:
        try:
            return bool(metadata.version(name))
        except metadata.PackageNotFoundError:
            return False

    any_of = [name for name, where in packages if where]
    missing = [name for name, where in packages if not where and not has(name)]
    return missing + (any_of[:1] if any_of and not any(map(has, any_of)) else [])


def _variables() -> Check:
    given = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return Check("environment", OK, printable(", ".join(given)) or "none of the variables that volseg reads is set")


def _processor() -> Check:
    flags, cores, allowed = hardware.cpu_flags(), os.cpu_count() or 1, cluster.CPU_COUNT
    what = f"{allowed} core(s) to use of {cores}, {hardware.instruction_sets()}"
    if flags and platform.machine() in ("x86_64", "AMD64") and "avx2" not in flags:
        return Check("cpu", WARNING, what, "without AVX2 the network is several times slower: use another machine")
    return Check("cpu", OK, what)


def _graphics() -> Check:
    count = hardware.gpu_count()
    if count:
        return Check("gpu", OK, ", ".join(hardware.gpu_name(i) for i in range(count)))
    reason = hardware.unused_gpu_reason()
    if reason:
        return Check("gpu", WARNING, reason, "the CPU computes until then")
    return Check("gpu", ABSENT, "no NVIDIA driver, or no torch with CUDA: the CPU computes")


def _memory() -> Check:
    free, total = system.free_memory(), system.total_memory()
    what = f"{_gb(free)} free of {_gb(total)}"
    if free < LITTLE_MEMORY:
        return Check(
            "memory", WARNING, what, "end other programs, or use --workers 1: blocks are cut to fit what is free"
        )
    return Check("memory", OK, what)


# ---------------------------------------------------------------- backends


def _backends(seconds: float) -> Iterator[Check]:
    if not seconds:
        return
    path, ran = model.shipped(), 0
    card = model.load_card(path)
    wanted = autoselect.candidates(Predict(), card.int8_allowed)
    for backend in backends.PACKAGES:
        try:
            backends.version(backend)
        except UserError as error:
            yield Check(backend, ABSENT, printable(str(error)).split(";")[0].split(" needs ")[-1] + " is not installed",
                        f"pip install 'volseg[{backend}]'")  # fmt: skip
            continue
        for precision in (p for b, p in wanted if b == backend):
            check = _tried_in_process(backend, precision, seconds)
            ran += check.state == OK
            yield check
    if not ran:
        yield Check(
            "backends", FAILED, "no backend runs here", "pip install --force-reinstall openvino, then look again"
        )


def _tried_in_process(backend: str, precision: str, seconds: float) -> Check:
    """One backend in a process of its own: what it breaks ends with it."""
    name, threads = f"{backend} {precision}", 1 if hardware.gpu_count() and backend != "openvino" else cluster.CPU_COUNT
    command = [sys.executable, "-m", "volseg.inference.trial", backend, precision, str(seconds), str(threads)]
    advice = f"pip install --force-reinstall {backends.PACKAGES[backend]}; until then the other backends are used"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=BACKEND_LIMIT_S + seconds, check=False,
            env={**os.environ, **system.same_imports()},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Check(name, WARNING, f"not ready after {BACKEND_LIMIT_S} s", "try again when the machine is idle")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"its process ended with code {done.returncode}"])[-1]
        return Check(name, WARNING, printable(last)[:300], advice)
    found = json.loads(done.stdout.splitlines()[-1])
    text = f"{found['speed'] / 1e6:.2f} Mvoxel/s on {found['device']}, ready after {found['ready']:.1f} s"
    return Check(name, OK, text) if found["sane"] else Check(name, WARNING, "gives no probabilities", advice)


# ---------------------------------------------------------------- codecs, disk, caches


def _codecs() -> Iterator[Check]:
    tried = codecs.try_codecs()
    broken = {name: why for name, why in tried.items() if why}
    good = ", ".join(name for name in tried if name not in broken)
    if good:
        yield Check("codecs", OK, good)
    for name, why in broken.items():
        state = FAILED if name.startswith("zarr") else WARNING
        what = "zarr zarrs numcodecs" if state == FAILED else "imagecodecs tifffile"
        yield Check("codecs", state, f"{name}: {why}", f"pip install --force-reinstall {what}")


def _folder(folder: Path) -> Iterator[Check]:
    """The folder that runs are to be written to: space, permissions, locks, how fast it is safe on the disk."""
    where = folder.expanduser().absolute()
    there = next(place for place in (where, *where.parents) if place.exists())
    free, kind = system.free_disk(str(there)), _file_system(there)
    text = f"{_gb(free)} free at {printable(str(there))}" + f" ({kind})" * bool(kind)
    if free < LITTLE_DISK:
        yield Check(
            "disk", WARNING, text, "volseg plan VOLUME says how much a run writes; free some, or give --out elsewhere"
        )
    else:
        yield Check("disk", OK, text)
    try:
        took = _written(there)
    except OSError as error:
        yield Check("permissions", FAILED, f"cannot write to {printable(str(there))}: {error.strerror or error}",
                    "give --out in a folder that you may write to, or change its permissions")  # fmt: skip
        return
    yield Check(
        "permissions",
        OK,
        f"files can be written to {printable(str(there))}, safe on the disk after {1e3 * took:.0f} ms",
    )
    if not lock.flocks(there):
        yield Check("locks", WARNING, "the file system has no flock", "volseg uses lock files with a heartbeat: run no two "
                    "commands on one output from machines whose clocks differ")  # fmt: skip
    elif kind in NETWORK_FILE_SYSTEMS:
        yield Check("locks", WARNING, f"{kind} may show workers on other machines an old state",
                    "mount it with lookupcache=positive, and see docs/reliability.md")  # fmt: skip
    else:
        yield Check("locks", OK, "one writer for each output: flock works")


def _file_system(folder: Path) -> str:
    """The kind of file system that holds a folder; "" where the system does not tell."""
    try:
        lines = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return ""
    held = [(Path(line[1]), line[2]) for line in lines if folder.is_relative_to(line[1])]
    return max(held, key=lambda item: len(item[0].parts))[1] if held else ""


def _written(folder: Path) -> float:
    """Seconds until a small file in the folder is on the disk; it is gone afterwards."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".volseg-", dir=folder) as inside:
        files.write_bytes(inside, "test", b"volseg", durable=True)
        return time.perf_counter() - start


def _temporary() -> Check:
    folder = tempfile.gettempdir()
    free = system.free_disk(folder)
    if free < 1e9:
        return Check(
            "temporary", WARNING, f"{_gb(free)} free at {folder}", "free some, or set TMPDIR to another folder"
        )
    return Check("temporary", OK, f"{_gb(free)} free at {folder}")


def _caches() -> Iterator[Check]:
    folder = cache.folder()
    size, count = files.stored_bytes(folder), len(files.list_keys(str(folder)))
    text = f"{printable(str(folder))}: {count} files, {size / 1e6:.1f} MB of compiled networks, choices and rates"
    if system.writable(folder):
        yield Check("cache", OK, text)
    else:
        yield Check("cache", WARNING, f"{printable(str(folder))} cannot be written",
                    "each run compiles the network anew: set VOLSEG_CACHE to a folder that you may write to")  # fmt: skip
    yield _numba_cache()


def _numba_cache() -> Check:
    """Where compiled loops are kept: as the environment says, beside the package, or in the user's cache."""
    given = os.environ.get("NUMBA_CACHE_DIR", "")
    if given.startswith(tempfile.gettempdir()) or (given and not system.writable(Path(given))):
        return Check("cache", WARNING, f"numba keeps what it compiles in {printable(given)}, which does not last",
                     "set NUMBA_CACHE_DIR to a folder that you may write to: else some runs wait for it")  # fmt: skip
    beside = Path(system.__file__).parent / "__pycache__"
    where = given or (str(beside) if system.writable(beside) else "the user's cache")
    return Check("cache", OK, f"numba: {printable(where)}")


# ---------------------------------------------------------------- ports and limits


def _loopback() -> Check:
    """Workers of this machine talk to the scheduler over TCP on 127.0.0.1."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(5)
            with socket.create_connection(server.getsockname(), timeout=5) as client:
                client.sendall(b"volseg")
                with server.accept()[0] as other:
                    heard = other.recv(6) == b"volseg"
    except OSError as error:
        heard = False
        reason = error.strerror or str(error)
    else:
        reason = "nothing came through"
    if heard:
        return Check("network", OK, "processes here reach each other on 127.0.0.1")
    return Check("network", FAILED, f"processes here do not reach each other on 127.0.0.1: {reason}",
                 "let the firewall or the sandbox allow TCP on the loopback device")  # fmt: skip


def _dashboard() -> Check:
    try:
        with socket.create_server(("127.0.0.1", PORT)):
            pass
    except OSError:
        return Check("dashboard", OK, f"port {PORT} is taken: a run takes another one and prints it")
    return Check("dashboard", OK, f"port {PORT} is free")


def _open_files() -> Check | None:
    """How many files this process may open; None where the system has no such limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FILES_OPEN:
        return Check(
            "open files", WARNING, f"{soft} at once", f"ulimit -n {min(4 * FILES_OPEN, hard) if hard > 0 else 4096}"
        )
    return Check("open files", OK, "no limit" if soft == resource.RLIM_INFINITY else f"{soft} at once")


def _browser() -> Check:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found:
        return Check("browser", OK, found)
    return Check("browser", ABSENT, "no Chromium or Chrome on the PATH", "only volseg view --screenshot needs one")


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
