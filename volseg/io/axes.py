"""Which axes of an array are z y x, and which ones hold channels and times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from volseg.errors import UserError
from volseg.io.header import shape_text

MAX_UNNAMED_CHANNELS = 4  # entries of an axis without a name that is taken for channels
MANY_UNNAMED_CHANNELS = 32  # the same where no axis has so few: affinities to voxels further away
TIME_NAMES = ("t", "time")
CHANNEL_NAMES = ("c", "ch", "channel", "channels")


def axis_names(names: Sequence[str | None], ndim: int) -> list[str]:
    """A name for each axis, lower case, "c" for channels and "t" for times.

    Where ``names`` do not fit the array, its axes are t c z y x; of four, the first is "?".

    >>> axis_names(["Channel", "Z", "Y", "X"], 4), axis_names([], 3), axis_names([], 4)
    (['c', 'z', 'y', 'x'], ['z', 'y', 'x'], ['?', 'z', 'y', 'x'])
    """
    if len(names) != ndim or not all(names):
        names = ["?", *"zyx"] if ndim == 4 else [*("?" * (ndim - 5)), *"tczyx"[max(0, 5 - ndim) :]]
    lower = [name.lower() for name in names]
    return ["c" if name in CHANNEL_NAMES else "t" if name in TIME_NAMES else name for name in lower]


def channel_axis(shape: Sequence[int], names: Sequence[str], where: str) -> int | None:
    """The axis that holds the channels; None where there is none. `UserError` where the first or the last may be it.

    >>> [channel_axis(shape, "?zyx", "a.zarr") for shape in [(3, 9, 64, 64), (20, 64, 64, 3), (12, 50, 64, 64)]]
    [0, 3, 0]
    """
    if len(shape) == 4 and "c" not in names:
        ends = {axis: shape[axis] for axis in (0, 3)}
        most = MAX_UNNAMED_CHANNELS if min(ends.values()) <= MAX_UNNAMED_CHANNELS else MANY_UNNAMED_CHANNELS
        short = [axis for axis, n in ends.items() if n <= most]
        if len(short) != 1:
            raise UserError(
                f"{where} is 4-D ({shape_text(shape)}) and no axis is named c: volseg cannot tell which one holds the "
                f"channels; name its axes, or save it as c z y x with fewer channels"
            )
        return short[0]
    return names.index("c") if "c" in names and len(shape) > 3 else None


def time_axis(names: Sequence[str], channel_axis: int | None) -> int | None:
    """The axis that holds times; None where there is none beside z y x.

    >>> time_axis(["t", "z", "y", "x"], None), time_axis(["t", "y", "x"], None)
    (0, None)
    """
    spatial = len(names) - (channel_axis is not None)
    return names.index("t") if "t" in names and spatial > 3 else None


def check(
    shape: Sequence[int], names: Sequence[str], channel_axis: int | None, where: str, time_axis: int | None = None
) -> None:
    """Refuses an array that is not z y x in this order, channels, times and axes of one entry apart."""
    ndim = len(shape)
    if ndim < 3:
        raise UserError(f"{where} is {ndim}-D ({shape_text(shape)}); volseg needs a volume with axes z y x")
    spatial = space(ndim, channel_axis, time_axis)
    order = [names[axis] for axis in spatial]
    if set(order) == set("zyx") and order != ["z", "y", "x"]:
        raise UserError(f"{where} has axes {' '.join(names)}; volseg needs z y x last: transpose it")
    for axis, (name, n) in enumerate(zip(names, shape, strict=True)):
        if n != 1 and axis not in (*spatial, channel_axis, time_axis):
            choose = "choose one with --channel (input.channel), or " if name in "c?" else ""
            raise UserError(
                f"{where} is {ndim}-D ({shape_text(shape)}): axis {name.replace('?', 'c')} has {n} entries and must have 1; "
                f"{choose}save the wanted one as a z y x array"
            )
    if 0 in shape:
        raise UserError(f"{where} has no voxels: its shape is {shape_text(shape)}")


def space(ndim: int, *others: int | None) -> list[int]:
    """Which axes are z y x: the last three, those of channels and times apart.

    >>> space(5, 4)
    [1, 2, 3]
    """
    return [axis for axis in range(ndim) if axis not in others][-3:]


def index(ndim: int, zyx: Sequence, chosen: Mapping[int, int]) -> tuple:
    """An index into an array of so many axes: ``zyx`` of the ``chosen`` entries of some axes; any other axis has one.

    >>> index(4, (slice(2), slice(3), slice(4)), {3: 1})
    (slice(None, 2, None), slice(None, 3, None), slice(None, 4, None), 1)
    """
    out: list = [chosen.get(axis, 0) for axis in range(ndim)]
    for axis, place in zip(space(ndim, *chosen), zyx, strict=True):
        out[axis] = place
    return tuple(out)
