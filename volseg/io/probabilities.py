"""Probabilities that another network made, as the uint8 channels of a run.

What becomes of a voxel depends on that voxel and on the type of the volume alone, never on a block or on the range of the
data. So cutting does not change it, and nothing has to be known of the whole volume first.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
from numba import njit

from volseg.box import Box
from volseg.config import Probabilities
from volseg.errors import UserError
from volseg.io import volume

NAMES = ("mask", "contour", "distance")  # in the order in which a run stores them


@dataclass(frozen=True)
class Channel:
    """One channel of a run and where it comes from; without a source it is 0 everywhere."""

    name: str
    source: volume.Volume | None
    inverted: bool = False

    def read(self, box: Box) -> np.ndarray:
        """The probabilities of ``box``, uint8 z y x; `UserError` that names the voxel where one is none."""
        if self.source is None:
            return np.zeros(box.shape, np.uint8)
        data = self.source.read(box)
        try:
            out = data * np.uint8(255) if self.source.binary else as_bytes(data)
        except ValueError as error:
            raise UserError(
                f"{self.source.path}, channel {self.source.channel} ({self.name}), in box {box}: {error}; "
                "apply the sigmoid or softmax first, or divide by the greatest value"
            ) from None
        return 255 - out if self.inverted else out

    def __str__(self) -> str:
        if self.source is None:
            return f"no {self.name}"
        return f"{self.name} from channel {self.source.channel} of {self.source.path}{', inverted' * self.inverted}"


# ---------------------------------------------------------------- values


def as_bytes(data: np.ndarray) -> np.ndarray:
    """Probabilities (uint8 0..255, uint16 0..65535, floats 0..1) as uint8, to the nearest, halves up; uint8 stays.

    A float counts as out of range when it would not round to 0..255: blended tiles may overshoot 1 by their rounding.
    Raises ValueError that names the first such voxel (z y x in ``data``).

    >>> as_bytes(np.array([[[0, 128, 129, 65535]]], np.uint16)).tolist()
    [[[0, 0, 1, 255]]]
    >>> as_bytes(np.array([[[0, 0.5, 1.001]]], np.float32)).tolist()
    [[[0, 128, 255]]]
    """
    if data.dtype == np.uint8:
        return data
    if data.dtype == np.uint16:
        return ((data.astype(np.uint32) + 128) // 257).astype(np.uint8)
    out = np.empty(data.shape, np.uint8)
    wide = np.ascontiguousarray(data, np.float32 if data.dtype == np.float16 else data.dtype)
    bad = _scale(wide.ravel(), out.ravel())
    if bad >= 0:
        at = np.unravel_index(bad, data.shape)
        raise ValueError(f"voxel {', '.join(map(str, at))} of it is {data[at]:g}, and float probabilities lie in 0..1")
    return out


@njit(cache=True, nogil=True)
def _scale(values, out):
    """Fills ``out``; returns where the first value stands that is no probability, or -1. In double: 255 * float32 is exact."""
    for i in range(values.size):
        scaled = np.floor(np.float64(values[i]) * 255 + 0.5)
        if not 0 <= scaled <= 255:
            return i
        out[i] = np.uint8(scaled)
    return -1


# ---------------------------------------------------------------- which channel is what


def channels(path: str, knobs: Probabilities, *, dataset: str, voxel_size_nm: tuple | None) -> tuple[Channel, ...]:
    """The channels that ``knobs`` name, as a run stores them: mask and contour, then a distance where one is given.

    Raises `UserError` for a channel that is not there, a volume whose voxels are no probabilities, and unequal shapes.
    """
    here = volume.open_channels(path, dataset=dataset, voxel_size_nm=voxel_size_nm)
    numbers = {"mask": knobs.mask_channel, "contour": knobs.contour_channel, "distance": knobs.distance_channel}
    elsewhere = {"mask": "", "contour": knobs.contour, "distance": knobs.distance}
    found = {}
    for name in NAMES:
        if elsewhere[name]:
            found[name] = _pick(volume.open_channels(elsewhere[name]), numbers[name], name)
        elif name == "mask" or numbers[name] is not None:
            found[name] = _pick(here, numbers[name], name)
    for name in knobs.inverted:
        if name not in found:
            raise UserError(f"no {name} to invert: give --{name}-channel, or leave out --inverted {name}")
    for name, one in found.items():
        _refuse_others(name, one, found["mask"])
    out = [Channel(name, found.get(name), name in knobs.inverted) for name in NAMES]
    return tuple(channel for channel in out if channel.source or channel.name == "contour")


def _pick(volumes: tuple[volume.Volume, ...], number: int | None, name: str) -> volume.Volume:
    count, path = len(volumes), volumes[0].path
    have = f"{path} has {count} channels, 0 to {count - 1}" if count > 1 else f"{path} has one channel, 0"
    if number is None and count > 1:
        raise UserError(f"{have}: say which is the {name} with --{name}-channel")
    if (number or 0) >= count:
        raise UserError(f"{have}: there is no channel {number} for --{name}-channel")
    return volumes[number or 0]


def _refuse_others(name: str, one: volume.Volume, mask: volume.Volume) -> None:
    if one.dtype not in ("uint8", "uint16") and np.dtype(one.dtype).kind != "f":
        raise UserError(
            f"{one.path} holds {one.dtype}, as labels do; probabilities are floats of 0..1, uint8, uint16 or bool"
        )
    if one.shape != mask.shape:
        raise UserError(
            f"{name} {one.path} has shape {one.shape} and mask {mask.path} {mask.shape}, z y x; they must be equal"
        )


def checksum(channels: tuple[Channel, ...]) -> str:
    """Fingerprint of all that the channels are read from."""
    each = [channel.source.checksum() for channel in channels if channel.source]
    return hashlib.sha256(" ".join(each).encode()).hexdigest()


def look(channels: tuple[Channel, ...]) -> list[str]:
    """What a user may have meant otherwise, from patches spread over each volume; refuses what is no probability there."""
    said = []
    for channel in channels:
        if channel.source is None:
            continue
        top = 0
        for box in volume.patches(channel.source.shape):
            replace(channel, inverted=False).read(box)
            top = max(top, int(channel.source.read(box).max()))
        full = {"uint8": 255, "uint16": 65535}.get(channel.source.dtype, 1)
        small = 1 if full == 255 else 255
        if not channel.source.binary and full > 1 and 0 < top <= small:
            said.append(
                f"note: {channel} holds nothing above {top} where volseg looked; {full} stands for probability 1"
            )
    return said
