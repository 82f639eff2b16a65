"""Whatever a file says, reading it ends with a value or with one line: documents and bytes changed at random.

Each case has a seed of its own (kind, number, and that of the command), so that one can be repeated alone. A case changes
what volseg or another program wrote, in a few places: values of other types, numbers without end, nesting, control
characters, bytes cut, turned and repeated. Then it is read as a command would read it.
"""

from __future__ import annotations

import copy
import io
import json
import random
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tifffile
import tomli_w
import zarr

from benchmarks.report import keep
from volseg import api
from volseg.box import Box
from volseg.config import Config, load, parse_set
from volseg.engine import folder, integrity
from volseg.engine.finished import open_run
from volseg.engine.layout import Layout
from volseg.engine.layout_marks import marker_text
from volseg.engine.receipts import Markers
from volseg.errors import UserError
from volseg.inference import model
from volseg.io import volume
from volseg.progress import Progress
from volseg.system import resident

HANG_S = 10.0  # after which a case counts as one that hangs
SHAPE = (4, 24, 28)
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 2**64, 10**40, -(10**40), 1e300, -0.0, float("nan"), float("inf"),
    "", "0", "x", "..", "../../etc/passwd", "/", "\x1b[31mred\x07", "\x00", "é" * 300, "nanometer", "9" * 5000,
    [], {}, [[]], [None], {"a": None}, [0, 0, 0], [1, 2], [10**9] * 3, [-1, 1, 1], ["z", "y", "x"], "tu-hf_hub:a/b",
)  # fmt: skip
Paths = list[tuple[Any, Any]]  # of a document: the container and the key or index in it
Case = Callable[[random.Random], None]


class HangError(Exception):
    """A case that does not end."""


# ---------------------------------------------------------------- changes


def changed(plain: Any, rng: random.Random) -> Any:
    """A copy of a document of JSON with one to four places changed."""
    plain = json.loads(json.dumps(plain))
    for left in reversed(range(rng.choice((1, 1, 1, 2, 4)))):
        if not isinstance(plain, dict | list) or not (places := list(_places(plain))):
            return odd(rng)
        inside, key = rng.choice(places)
        action = rng.randrange(6)
        if action == 0:
            del inside[key]
        elif action == 1 and isinstance(inside[key], list):
            inside[key] = inside[key][:20] * rng.choice((0, 2, 50))
        elif action == 2:
            inside[key] = nested(rng.choice((3, 200) if left else (3, 200, 3000)), inside[key], rng)
        elif action == 3 and isinstance(inside, dict):
            inside[str(odd(rng))[:50]] = odd(rng)
        else:
            inside[key] = odd(rng)
    return plain


def odd(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(ODD))


def _places(plain: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a document; of deep ones those above."""
    stack = [plain]
    while stack and len(stack) < 5000:
        inside = stack.pop()
        for key in list(inside) if isinstance(inside, dict) else range(len(inside)):
            yield inside, key
            if isinstance(inside[key], dict | list):
                stack.append(inside[key])


def nested(depth: int, value: Any, rng: random.Random) -> Any:
    """``value`` inside so many lists, or dicts."""
    as_dict = rng.random() < 0.5
    for _ in range(depth):
        value = {"a": value} if as_dict else [value]
    return value


def text_of(plain: Any, rng: random.Random) -> bytes:
    """A document as text, which may be damaged as well."""
    try:
        data = json.dumps(plain).encode()
    except RecursionError:
        data = b"[" * 20_000
    return damaged(data, rng) if rng.random() < 0.2 else data


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes with a few places cut, turned, repeated or put in."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        action = rng.randrange(6)
        if action == 0:
            del out[at:]
        elif action == 1 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif action == 2:
            out[at : at + rng.randint(1, 16)] = b""
        elif action == 3:
            out[at:at] = rng.choice(
                (b"[" * 9000, b"9" * 5000, b"\x00", b"\x1b[2J", b"\xff\xfe", b"{", b'"', b"<!ENTITY")
            )
        elif action == 4:
            out[at : at + 4] = rng.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"))
        else:
            piece = out[at : at + rng.randint(1, 64)]
            out[at:at] = piece * rng.choice((1, 2, 100))
    return bytes(out)


# ---------------------------------------------------------------- kinds


def _open(path: Path) -> None:
    """The volume at ``path`` is opened, and a little of it is read."""
    opened = volume.open(path)
    box = Box((0, 0, 0), (1, 8, 8)).clip(opened.shape)
    opened.read(box)


MULTISCALES = {
    "version": "0.5",
    "multiscales": [
        {
            "name": "em",
            "axes": [{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"],
            "datasets": [
                {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [8.0, 4.0, 4.0]}]},
                {"path": "1", "coordinateTransformations": [{"type": "translation", "translation": [0, 2.0, 2.0]}]},
            ],
            "coordinateTransformations": [{"type": "identity"}],
        }
    ],
}


class Fuzzer:
    """Cases of all kinds in a folder of their own; ``run`` is a finished run that may be damaged."""

    def __init__(self, place: Path, run: Path | None = None) -> None:
        self.place = place
        voxels = np.random.default_rng(0).integers(1, 255, SHAPE, np.uint8)
        group = zarr.open_group(str(place / "ome.zarr"), mode="w")
        group.create_array("0", data=voxels, chunks=(2, 12, 14))
        group.attrs["ome"] = MULTISCALES
        zarr.create_array(str(place / "v2.zarr"), data=voxels, chunks=(2, 12, 14), zarr_format=2)
        zarr.create_array(str(place / "v3.zarr"), data=voxels, chunks=(2, 12, 14), shards=(4, 24, 28))
        self.tiffs = tuple(_tiff(voxels, **options) for options in TIFFS)
        self.model = model.shipped().read_bytes()
        self.card = model.load_card(model.shipped()).to_json()
        self.toml: dict[str, Any] = Config().model_dump(mode="json", exclude_none=True)
        self.run = run or _tiny_run(place)

    @property
    def kinds(self) -> dict[str, Case]:
        return {
            "OME metadata": self.ome,
            "zarr metadata": self.zarr,
            "TIFF": self.tiff,
            "model files": self.models,
            "TOML": self.config,
            "runs": self.runs,
        }

    # ---- each reads one file that is not as it was

    def ome(self, rng: random.Random) -> None:
        path = self.place / "ome.zarr" / "zarr.json"
        plain = json.loads(path.read_text())
        plain["attributes"] = changed({"ome": MULTISCALES} if rng.random() < 0.5 else MULTISCALES, rng)
        with _replaced(path, text_of(plain, rng)):
            _open(self.place / "ome.zarr")

    def zarr(self, rng: random.Random) -> None:
        path = self.place / rng.choice(("v2.zarr/.zarray", "v3.zarr/zarr.json", "ome.zarr/0/zarr.json"))
        with _replaced(path, text_of(changed(json.loads(path.read_text()), rng), rng)):
            _open(path.parent)

    def tiff(self, rng: random.Random) -> None:
        data = rng.choice(self.tiffs)
        head = damaged(data[:2048], rng) + data[2048:] if rng.random() < 0.5 else damaged(data, rng)
        path = self.place / f"v{rng.randrange(1 << 60)}.tif"
        try:
            path.write_bytes(head)
            _open(path)
        finally:
            path.unlink()

    def models(self, rng: random.Random) -> None:
        path = self.place / "m.safetensors"
        length = int.from_bytes(self.model[:8], "little")
        header = json.loads(self.model[8 : 8 + length])
        header["__metadata__"][model.KEY] = text_of(changed(self.card, rng), rng).decode(errors="replace")
        text = text_of(changed(header, rng) if rng.random() < 0.3 else header, rng)
        data = len(text).to_bytes(8, "little") + text + self.model[8 + length :]
        path.write_bytes(damaged(data[:4096], rng) + data[4096:] if rng.random() < 0.2 else data)
        card = model.load_card(path)
        if not (card.encoder.isascii() and len(card.decoder) == 5 and max(card.decoder) <= 4096):
            raise AssertionError(f"a card of {card.encoder!r} and {card.decoder!r} was taken")

    def config(self, rng: random.Random) -> None:
        path = self.place / "my.toml"
        with suppress(TypeError, ValueError, RecursionError):  # of what TOML cannot hold
            path.write_bytes(tomli_w.dumps(changed(self.toml, rng)).encode())
        data = path.read_bytes() if path.exists() else b"[input]\n"
        path.write_bytes(damaged(data, rng) if rng.random() < 0.5 else data)
        with suppress(UserError):
            parse_set(f"{rng.choice(list(self.toml))}.{str(rng.choice(ODD))[:99]}={rng.choice(ODD)!s}")
        load(path)

    def runs(self, rng: random.Random) -> None:
        keys = [key for key in _keys(self.run) if not key.startswith(("0/", "labels/", "work/fragments/"))]
        path = self.run / rng.choice(keys)
        data = path.read_bytes()
        if "markers" in path.parts and rng.random() < 0.7:
            data = signed(path, changed(json.loads(data), rng))
        elif path.suffix == ".json" or "stamps" in path.parts:
            data = text_of(changed(json.loads(data), rng), rng)
        else:
            data = damaged(data, rng)
        with _replaced(path, data):
            _read_run(str(self.run))


def signed(path: Path, plain: Any) -> bytes:
    """A marker that counts as whole: it was odd when it was written."""
    if not isinstance(plain, dict):
        return json.dumps(plain).encode()
    plain.pop("checksum", None)
    try:
        return marker_text(path.parent.name, path.stem, plain)
    except RecursionError:  # too deep to be written
        return b"[" * 20_000


def _keys(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


def _read_run(path: str) -> None:
    """All of a run is read as commands read it; each part by itself, so that one that is refused hides no other."""
    layout = Layout(path)
    for read in (
        lambda: open_run(path).run,
        lambda: open_run(path).report(),
        lambda: open_run(path).objects,
        lambda: layout.read_columns("merges"),
        lambda: folder.load_run(path),
        lambda: folder.peek_run(path),
        lambda: integrity.damaged_files(path),
        lambda: _damaged_blocks(path),
        lambda: layout.read_stamp("relabel", 0),
        lambda: layout.block_basins.load(0),
        lambda: layout.links.load(0),
        lambda: layout.block_labels.load(0),
        lambda: layout.load_basins(),
        lambda: layout.labels_dtype(),
    ):
        with suppress(UserError):
            read()


def _damaged_blocks(path: str) -> list[str]:
    from volseg.engine.stages import keys

    run = folder.peek_run(path)
    markers = Markers(path, keys(run)) if run else None
    return markers.damaged() if markers else []


TIFFS: tuple[dict[str, Any], ...] = (
    {},
    {"imagej": True, "metadata": {"axes": "ZYX", "unit": "nm", "spacing": 8.0}, "resolution": (0.25, 0.25)},
    {"ome": True, "metadata": {"axes": "ZYX", "PhysicalSizeX": 4.0, "PhysicalSizeXUnit": "nm"}},
    {"compression": "zlib", "rowsperstrip": 7},
    {"compression": "lzw", "tile": (16, 16), "metadata": None},
    {"bigtiff": True, "byteorder": ">"},
)


def _tiff(voxels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, voxels, photometric="minisblack", **options)
    return file.getvalue()


class _Quiet(Progress):
    def message(self, text: str) -> None: ...

    def stage(self, name: str, voxels: int, done: int) -> Callable[[int], None]:
        return lambda voxels: None

    def stop(self) -> None: ...


def _tiny_run(place: Path) -> Path:
    """A finished run of two objects."""
    labels = np.zeros((4, 40, 48), np.float32)
    labels[:, 4:18, 4:20] = labels[:, 22:36, 4:40] = 0.9
    zarr.create_array(str(place / "p.zarr"), data=labels, chunks=(4, 20, 48))
    sets = ["cluster.workers=1", "cluster.dashboard=''", "stitch.min_voxels=5", "blocks.shape=[4, 20, 24]"]
    api.segment(place / "p.zarr", place / "run.zarr", settings=sets, progress=_Quiet())
    return place / "run.zarr"


@contextmanager
def _replaced(path: Path, data: bytes) -> Iterator[None]:
    """Inside, the file holds these bytes."""
    before = path.read_bytes()
    try:
        path.write_bytes(data)
        yield
    finally:
        path.write_bytes(before)


# ---------------------------------------------------------------- one after the other


@dataclass
class Outcome:
    """What came of the cases of one kind; ``failures`` are seeds and tracebacks."""

    counts: Counter = field(default_factory=Counter)
    worst_seconds: float = 0.0
    worst_bytes: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)


def run_case(case: Case, seed: str, outcome: Outcome) -> None:
    """One case: read, refused in one line, or counted as a traceback or as one that hangs."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = resident("RSS"), time.monotonic()
    try:
        with _time_limit(HANG_S):
            case(random.Random(seed))
        result = "read"
    except UserError as error:
        result = "refused" if str(error).isprintable() and len(str(error)) < 2000 else "tracebacks"
        if result == "tracebacks":
            outcome.failures.append((seed, f"no printable line: {str(error)[:300]!r}"))
    except HangError:
        result = "hangs"
        outcome.failures.append((seed, "hangs"))
    except OSError as error:
        result = "refused" if error.errno else "tracebacks"
        if result == "tracebacks":
            outcome.failures.append((seed, traceback.format_exc()))
    except Exception:
        result = "tracebacks"
        outcome.failures.append((seed, traceback.format_exc()))
    outcome.counts[result] += 1
    outcome.worst_seconds = max(outcome.worst_seconds, time.monotonic() - start)
    outcome.worst_bytes = max(outcome.worst_bytes, resident("HWM") - before)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def end(*_: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_cases(fuzzer: Fuzzer, cases: int, seed: int, minutes: float = 0.0) -> dict[str, Outcome]:
    """So many cases, spread over all kinds, or as many as there is time for."""
    outcomes = {kind: Outcome() for kind in fuzzer.kinds}
    end, number = time.monotonic() + 60 * minutes, 0
    while number < cases or (minutes and time.monotonic() < end):
        kind = list(outcomes)[number % len(outcomes)]
        run_case(fuzzer.kinds[kind], f"{seed}-{kind}-{number}", outcomes[kind])
        number += 1
    return outcomes


def measure(cases: int, seed: int, minutes: float) -> None:
    """A row for each kind; exits with 1 where a case ended in a traceback or did not end."""
    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        outcomes = run_cases(Fuzzer(Path(place)), 0 if minutes else cases, seed, minutes)
        shutil.rmtree(place, ignore_errors=True)
        Path(place).mkdir()
    rows = [
        {
            "kind": kind,
            "cases": sum(outcome.counts.values()),
            "read": outcome.counts["read"],
            "refused in one line": outcome.counts["refused"],
            "tracebacks": outcome.counts["tracebacks"],
            "hangs": outcome.counts["hangs"],
            "worst seconds": f"{outcome.worst_seconds:.2f}",
            "worst memory, MB": f"{outcome.worst_bytes / 1e6:.0f}",
        }
        for kind, outcome in outcomes.items()
    ]
    keep("fuzz", rows)
    failures = [failure for outcome in outcomes.values() for failure in outcome.failures]
    for case, text in failures[:50]:
        print(f"\n{case}\n{text}")
    if failures:
        raise SystemExit(1)
