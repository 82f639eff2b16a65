"""What reading voxels has in common, whatever holds them: checks, patches, and a fingerprint."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

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


def fingerprint(volume: Readable) -> str:
    """SHA-256 of shape, type and 16 patches, the same for all that hold the same voxels."""
    digest = hashlib.sha256(f"{volume.shape} {volume.dtype}".encode())
    with ThreadPoolExecutor(4) as pool:
        for patch in pool.map(volume.read, patches(volume.shape)):
            digest.update(patch.tobytes())
    return digest.hexdigest()
