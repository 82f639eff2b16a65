"""What reading voxels has in common, whatever holds them: checks, patches, and a fingerprint."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from volseg.box import Box, Triple
from volseg.errors import UserError
from volseg.io.header import shape_text


class Readable(Protocol):
    """A z y x array of voxels that reads boxes."""

    shape: Triple
    dtype: str

    def read(self, box: Box) -> np.ndarray: ...


def patches(shape: Triple) -> list[Box]:
    """16 boxes of up to 1 x 128 x 128 voxels, spread over a volume of that shape."""
    size = (1, *(min(128, n) for n in shape[1:]))
    places = [
        tuple(k % 16 * (n - s) // 15 for k, n, s in zip((i, 5 * i, 11 * i), shape, size, strict=True))
        for i in range(16)
    ]
    return [Box(at, tuple(a + s for a, s in zip(at, size, strict=True))) for at in places]


def check_inside(volume: Readable, box: Box, where: str) -> None:
    """Refuses a box that is empty or leaves the volume."""
    if box.clip(volume.shape) != box or not box.voxels:
        raise UserError(f"box {box} is empty or leaves {where}, which is {shape_text(volume.shape)} (z y x)")


def finite(data: np.ndarray, box: Box, where: str) -> np.ndarray:
    """``data``, the voxels of ``box``; refuses NaN and infinity."""
    if data.dtype.kind == "f" and not np.isfinite(data).all():
        places = np.argwhere(~np.isfinite(data))
        start, stop = places.min(0) + box.start, places.max(0) + 1 + box.start
        bad = Box(tuple(start.tolist()), tuple(stop.tolist()))
        raise UserError(f"{where} holds NaN or infinity in box {bad}; replace these voxels, for instance by 0")
    return data


def inverted(data: np.ndarray, binary: bool = False) -> np.ndarray:
    """Gray values turned around: the highest value of an integer type becomes its lowest, floats are negated.

    >>> inverted(np.array([0, 55], np.uint8)), inverted(np.array([-128, 5], np.int8))
    (array([255, 200], dtype=uint8), array([127,  -6], dtype=int8))
    """
    if binary:
        return 1 - data
    return np.negative(data) if data.dtype.kind == "f" else np.invert(data)


def choose(where: str, kind: str, count: int, wanted: int | None) -> tuple[int, tuple[str, ...]]:
    """The one of ``count`` channels or times that is read, and a note where there are several; refuses to guess."""
    if wanted is None and count > 1:
        raise UserError(
            f"{where} holds {count} {kind}s: choose one with --{kind} (input.{kind}, counted from 0), or "
            "save the wanted one alone"
        )
    if not 0 <= (wanted or 0) < count:
        raise UserError(f"{where} has {count} {kind}s, counted from 0; there is no {kind} {wanted}")
    return wanted or 0, (f"{where}: {kind} {wanted} of {count} is read (0 is the first)",) * (count > 1)


def chosen_entries(volume: Any) -> dict[int, int]:
    """Which entry of a volume's array is read along each axis that holds channels or times."""
    pairs = ((volume.channel_axis, volume.channel), (volume.time_axis, volume.time))
    return {axis: place for axis, place in pairs if axis is not None}


def fingerprint(volume: Readable) -> str:
    """SHA-256 of shape, type and 16 patches, the same for all that hold the same voxels."""
    digest = hashlib.sha256(f"{volume.shape} {volume.dtype}".encode())
    with ThreadPoolExecutor(4) as pool:
        for patch in pool.map(volume.read, patches(volume.shape)):
            digest.update(patch.tobytes())
    return digest.hexdigest()
