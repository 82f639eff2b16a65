"""Commands about this machine and this installation; `commands` lists them."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

import volseg
from volseg.cli.output import emit, wants_json
from volseg.errors import UserError
from volseg.progress import Silent, format_table
from volseg.system import shipped_configs

SMALL_SHAPE = (16, 320, 320)


def compile_loops() -> None:
    """Compile for this machine the loops that all runs need, as a first run does: for images of containers, and for nodes."""
    import numpy as np

    start = time.perf_counter()
    wave = np.sin(np.indices(SMALL_SHAPE) / 4).mean(axis=0)  # peaks that touch where it is above 0
    probability = (255 * np.stack([0.5 + wave / 2, 0.5 - wave / 2])).astype(np.uint8)
    with tempfile.TemporaryDirectory(prefix="volseg-") as folder:
        volseg.segment(
            probability, f"{folder}/run.zarr", progress=Silent(),
            settings=["cluster.workers=1", "cluster.dashboard=", "blocks.shape=[8, 320, 160]", "probabilities.mask_channel=0",
                      "probabilities.contour_channel=1", "input.voxel_size_nm=[5, 5, 5]"],
        )  # fmt: skip
    seconds = time.perf_counter() - start
    emit(f"all loops are compiled, after {seconds:.1f} s", {"seconds": seconds})


def doctor(
    folder: Annotated[str, typer.Argument(help="Where runs are to be written: its disk is looked at.")] = ".",
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.0, help="For how long each backend is tried; 0 leaves that out.")
    ] = 2.0,
) -> None:
    """Look at this machine: devices, backends, codecs, versions, disk, memory, ports, caches, permissions.

    Each line is ok, absent (needed by some commands alone), warning or failed, with what to do. Exit code 1 where a run
    cannot work here.
    """
    from volseg.planning.doctor import doctor as look

    found = look(folder, seconds=seconds, say=None if wants_json() else typer.echo)
    emit(found.summary, found.to_json())
    if not found.ok:
        raise typer.Exit(1)


def config(
    name: Annotated[str, typer.Argument(help="A config that ships with volseg; lists them if not given.")] = "",
) -> None:
    """Print a config file that ships with volseg, to copy from: volseg config touching > my.toml. Without a name, list them.

    --config takes these names as well as files.
    """
    known = shipped_configs()
    if not name:
        rows = [(one, _first_line(path)) for one, path in known.items()]
        emit(format_table(("name", "what for"), rows), [{"name": one, "what_for": text} for one, text in rows])
        return
    if name not in known:
        raise UserError(f"no config {name!r} ships with volseg; there are: {', '.join(known)}")
    text = known[name].read_text(encoding="utf-8")
    emit(text.rstrip("\n"), {"name": name, "text": text})


def _first_line(path: Path) -> str:
    """What the first comment of a config file says it is for."""
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
