"""Commands about this machine and this installation; `commands` lists them."""

from __future__ import annotations

from typing import Annotated

import typer

from volseg.cli.output import emit, wants_json


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
