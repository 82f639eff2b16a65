"""Options that several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from volseg.config import MOST
from volseg.errors import UserError

if TYPE_CHECKING:
    from volseg.box import Triple

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE.toml|NAME", help="Settings; volseg config lists names."),
]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="One setting; repeatable.")]
Model = Annotated[
    str, typer.Option("--model", help="Model, ONNX file or bioimage.io package; the shipped model if not given.")
]
Out = Annotated[str, typer.Option("--out", help="Output; the volume's name + .volseg.zarr if not given.")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Worker processes.")]
Scheduler = Annotated[str, typer.Option("--scheduler", help="tcp://HOST:PORT of a Dask scheduler.")]
Mask = Annotated[
    str, typer.Option("--mask", metavar="VOLUME", help="Do nothing where this volume is 0; may be coarser.")
]
Roi = Annotated[str, typer.Option("--roi", metavar="z0:z1,y0:y1,x0:x1", help="Do only this part.")]
Channel = Annotated[int | None, typer.Option("--channel", min=0, help="Which of several channels, from 0.")]
Time = Annotated[int | None, typer.Option("--time", min=0, help="Which of several times, from 0.")]
Invert = Annotated[bool, typer.Option("--invert", help="Turn gray values around: the volume's objects are too bright.")]
Padding = Annotated[str, typer.Option("--padding", metavar="VALUE", help="Gray value around the image, or none.")]
VoxelNm = Annotated[
    str, typer.Option("--voxel-nm", metavar="Z,Y,X", help="Size of a voxel in nm, whatever the file says.")
]
Backend = Annotated[str, typer.Option("--backend", help="auto, openvino, onnx or torch.")]
Precision = Annotated[str, typer.Option("--precision", help="auto, fp32, bf16, fp16 or int8.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
RetryFailed = Annotated[
    bool,
    typer.Option("--retry-failed/--skip-failed", help="Blocks that failed before: try them again, or do the rest."),
]


def toml(value: str | float | list[str]) -> str:
    """``value`` as TOML."""
    return json.dumps(value, ensure_ascii=False)


def channels(text: str, option: str) -> list[int]:
    """Numbers of three channels that an option gives; none where it is not given."""
    try:
        found = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        found = [-1]
    if found and (len(found) != 3 or min(found) < 0):
        raise UserError(f"{option} {text!r} is not three channels z,y,x such as 0,1,2")
    return found


def numbers(text: str, option: str, kind: type = int) -> Triple:
    """Three numbers above 0 that an option gives."""
    try:
        z, y, x = (kind(part) for part in text.split(","))
    except ValueError:
        wanted = "whole numbers z,y,x such as 64,512,512" if kind is int else "lengths z,y,x in nm such as 50,4,4"
        raise UserError(f"{option} {text!r} is not three {wanted}") from None
    if not min(z, y, x) > 0:
        raise UserError(f"{option} {text!r} has an axis shorter than 1 voxel, or no length")
    if z * y * x > MOST:
        raise UserError(f"{option} {text!r} has more than {MOST} voxels")
    return z, y, x
