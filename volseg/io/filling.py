"""What of a volume could not be decoded and was filled with 0, where ``input.on_bad_chunk`` asks for that.

Filled are whole chunks, strips or slices as they are stored, never the box that was read: so how a volume is read does not
change its voxels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import numpy as np

from volseg.box import Box
from volseg.errors import UserError, printable

if TYPE_CHECKING:
    from volseg.io.volume import Volume

SKIP = "skip"  # of ``input.on_bad_chunk``
LOST = "lost sections"  # stands for their place among what was filled: what was lost of them is not 0, but made up
MOST_TOLD = 5
ADVICE = ", or go on with 0 in its place: --set input.on_bad_chunk=skip"

Filled = set[tuple[str, Box]]  # where, and which voxels of the volume
_FILLED: ContextVar[Filled | None] = ContextVar("filled", default=None)


@contextmanager
def recording_filled() -> Iterator[Filled]:
    """What is filled inside, in this thread; a recording around this one learns of it, too."""
    filled: Filled = set()
    token = _FILLED.set(filled)
    try:
        yield filled
    finally:
        _FILLED.reset(token)
        if (outer := _FILLED.get()) is not None:
            outer.update(filled)


def record_filled(where: str, box: Box) -> None:
    """The voxels of ``box`` of a volume are 0, since what is stored of them cannot be decoded."""
    filled = _FILLED.get()
    if filled is not None:
        filled.add((where, box))


def record_lost(z: int) -> None:
    """Of section ``z`` something shows nothing between two that do, and was seen as the section before."""
    record_filled(LOST, Box((z, 0, 0), (z + 1, 1, 1)))


def lost_line(sections: list[int]) -> str:
    """What a user is told of lost sections.

    >>> lost_line([7, 12])
    'lost     all or some of 2 sections, seen as the ones before them: 7, 12'
    >>> lost_line(list(range(20)))[-45:]
    '0, 1, 2, 3, 4 ... (lost_sections in run.json)'
    """
    more = " ... (lost_sections in run.json)" if len(sections) > MOST_TOLD else ""
    told = ", ".join(map(str, sections[:MOST_TOLD]))
    one, several = "a section, seen as the one before it", f"{len(sections)} sections, seen as the ones before them"
    return f"lost     all or some of {several if len(sections) > 1 else one}: {told}{more}"


def zeroed(data: np.ndarray, box: Box, filled: Filled) -> np.ndarray:
    """``data``, the voxels of ``box``, of which those that were filled are 0, whatever was made of them since."""
    for _, part in filled:
        data[part.intersect(box).slices_within(box)] = 0
    return data


def filled_line(where: str, boxes: list[str], listed: str) -> str:
    """What a user is told of the boxes of ``where`` that were filled; ``listed`` is where all of them stand."""
    voxels = sum(Box.parse(box).voxels for box in boxes)
    more = f" and {len(boxes) - 1} more ({listed})" if len(boxes) > 1 else ""
    return printable(f"filled   {voxels} voxels of {where} with 0, which cannot be decoded: box {boxes[0]}{more}")


@contextmanager
def filling(volume: Volume, z: int) -> Iterator[list[Box] | None]:
    """A list of the parts of section ``z`` that inside turn out to be undecodable, y x; None where that is an error."""
    bad: list[Box] | None = [] if volume.on_bad_chunk == SKIP else None
    yield bad
    for box in bad or ():
        record_filled(volume.path, Box((z, *box.start[1:]), (z + 1, *box.stop[1:])))


def undecodable(error: BaseException) -> bool:
    """Whether an error says that bytes are no voxels; not that they could not be fetched, or that memory is out."""
    unreachable = getattr(error, "errno", None) is not None or isinstance(error, TimeoutError | ConnectionError)
    return not (unreachable or isinstance(error, (UserError, MemoryError)) or "os error" in str(error))
