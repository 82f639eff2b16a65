"""Probabilities of another network, as the uint8 channels of a run.

A voxel's byte depends on that voxel and on the type of the volume alone, never on a block or on the range of the data. So
blocks do not change it, and no pass over the whole volume comes first. Of affinities it depends on the voxel's six.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from volseg.box import Box
from volseg.config import Input, Probabilities
from volseg.errors import UserError
from volseg.io import affinities, files, volume
from volseg.io.filling import recording_filled, zeroed
from volseg.segmentation.heights import to_uint8

CHANNEL_NAMES = ("mask", "contour", "distance")  # in the order in which a run stores them


@dataclass(frozen=True)
class Channel:
    """What a channel of a run comes from; without a source it is 0 everywhere.

    ``offset`` is not 0 of the affinities along one axis, from which mask and contour are made: see `affinities`.
    """

    name: str
    source: volume.Volume | None
    inverted: bool = False
    offset: int = 0

    def read(self, box: Box) -> np.ndarray:
        """The probabilities of ``box``, uint8 z y x. Raises `UserError` that names the first voxel that is no probability.

        What the source fills, since it cannot be decoded, is 0 in an inverted channel, too.
        """
        if self.source is None:
            return np.zeros(box.shape, np.uint8)
        with recording_filled() as filled:
            data = self.source.read(box)
        try:
            out = data * np.uint8(255) if self.source.binary else to_uint8(data)
        except ValueError as error:
            raise UserError(
                f"{self.source.path}, channel {self.source.channel} ({self.name}), in box {box}: {error}; "
                "apply the sigmoid or softmax first, or divide by the greatest value"
            ) from None
        return zeroed(255 - out, box, filled) if self.inverted else out

    def __str__(self) -> str:
        if self.source is None:
            return f"no {self.name}"
        joins = f", with {affinities.OFFSETS[self.offset]}" if self.offset else ""
        return (
            f"{self.name} from channel {self.source.channel} of {self.source.path}{', inverted' * self.inverted}{joins}"
        )


def heads(channels: tuple[Channel, ...]) -> tuple[str, ...]:
    """What a run stores of these."""
    return affinities.HEADS if channels[0].offset else tuple(channel.name for channel in channels)


def read(channels: tuple[Channel, ...], box: Box) -> np.ndarray:
    """What a run stores of ``box``, uint8 (heads, z, y, x). Raises as `Channel.read` does."""
    if not channels[0].offset:
        return np.stack([channel.read(box) for channel in channels])
    shape = channels[0].source.shape
    return affinities.mask_and_contour([channel.read for channel in channels], box, shape, channels[0].offset)


# ---------------------------------------------------------------- which channel is what


def named_channels(
    path: str | tuple[volume.Volume, ...], settings: Probabilities, source: Input
) -> tuple[Channel, ...]:
    """The channels that ``settings`` name: mask and contour, then a distance where one is given; or affinities along z, y, x.

    Parameters
    ----------
    path
        The volume that holds the mask, and all channels without a path of their own; or its channels: `stored_channels`.
    settings
        Numbers of channels, paths of those that lie elsewhere, and which are inverted.
    source
        Array, voxel size and gaps of the volume at ``path``, and what to do about chunks that cannot be decoded.

    Raises
    ------
    UserError
        A channel is not there, the voxels of a volume are no probabilities, or shapes differ.
    """
    _refuse_gray_settings(source)
    volumes = path if isinstance(path, tuple) else volume.open_input_channels(path, source)
    if settings.affinity_channels:
        return _affinity_channels(volumes, settings)
    numbers = {
        "mask": settings.mask_channel,
        "contour": settings.contour_channel,
        "distance": settings.distance_channel,
    }
    paths = {"mask": "", "contour": settings.contour, "distance": settings.distance}
    sources = {}
    for name in CHANNEL_NAMES:
        if paths[name]:
            elsewhere = Input(allow_gaps=source.allow_gaps, on_bad_chunk=source.on_bad_chunk)
            sources[name] = _select(volume.open_input_channels(paths[name], elsewhere), numbers[name], name)
        elif name == "mask" or numbers[name] is not None:
            sources[name] = _select(volumes, numbers[name], name)
    for name in settings.inverted:
        if name == "affinities":
            raise UserError("no affinities to invert: give --affinities, or leave out --inverted affinities")
        if name not in sources:
            raise UserError(f"no {name} to invert: give --{name}-channel, or leave out --inverted {name}")
    for name, one in sources.items():
        _check_source(name, one, sources["mask"])
    channels = [Channel(name, sources.get(name), name in settings.inverted) for name in CHANNEL_NAMES]
    return tuple(channel for channel in channels if channel.source or channel.name == "contour")


def _affinity_channels(volumes: tuple[volume.Volume, ...], settings: Probabilities) -> tuple[Channel, ...]:
    """The affinities along z, y, x that ``settings`` name; refuses what else they say of channels."""
    numbers = settings.affinity_channels or ()
    others = (settings.mask_channel, settings.contour_channel, settings.distance_channel)
    if any(other is not None for other in others) or settings.contour or settings.distance:
        raise UserError("mask and contour are made of the affinities: leave out what says where others lie")
    if set(settings.inverted) - {"affinities"}:
        raise UserError("of affinities all three are inverted, or none: --inverted affinities")
    if len(set(numbers)) < 3:
        raise UserError(f"affinities along z, y, x are channels {list(numbers)}; give three that differ")
    if max(numbers) >= len(volumes):
        raise UserError(
            f"{volumes[0].path} has {len(volumes)} channel{'s' * (len(volumes) > 1)}, counted from 0: there is no channel "
            f"{max(numbers)} for --affinities"
        )
    sources = [volumes[number] for number in numbers]
    for source in sources:
        _check_source("affinities", source, sources[0])
    inverted = bool(settings.inverted)
    return tuple(
        Channel(f"affinity along {axis}", source, inverted, settings.affinity_offset)
        for axis, source in zip("zyx", sources, strict=True)
    )


def _refuse_gray_settings(source: Input) -> None:
    """Refuses what is said of gray values, where probabilities are given."""
    if source.invert:
        raise UserError("input.invert turns gray values; probabilities are turned with --inverted mask")
    if source.channel is not None:
        raise UserError(
            "input.channel chooses gray values; of probabilities, say which is the mask with --mask-channel"
        )


def stored_channels(array: Any, settings: Probabilities, source: Input, path: str) -> tuple[volume.Volume, ...]:
    """The channels of an array in Python as volumes that workers can read.

    Those of a zarr array in a folder or store are read there. Of any other array, the channels that ``settings`` name are
    copied to ``path``, and stand in the places of the others, too, which nobody reads.
    """
    channels = volume.open_input_channels(array, source)
    named: tuple[int | None, ...] = (settings.mask_channel or 0, settings.contour_channel, settings.distance_channel)
    named = settings.affinity_channels or named
    stored = {
        number: volume.materialize(channels[number], f"{path}/{number}")
        for number in named
        if number is not None and number < len(channels)
    }
    any_one = next(iter(stored.values()), None) or volume.materialize(channels[0], f"{path}/0")
    return tuple(stored.get(number, any_one) for number in range(len(channels)))


@contextmanager
def readable_by_workers(source: Any, settings: Probabilities, given: Input, out: str) -> Iterator[Any]:
    """Probabilities as `named_channels` takes them: a path, or volumes, see `volume.readable_by_workers`."""
    if isinstance(source, (str, os.PathLike)):
        yield os.fspath(source)
        return
    copy = f"{out}.input.zarr"
    yield stored_channels(source, settings, given, copy)
    files.remove(copy)


def _select(volumes: tuple[volume.Volume, ...], number: int | None, name: str) -> volume.Volume:
    count, path = len(volumes), volumes[0].path
    have = f"{path} has {count} channels, 0 to {count - 1}" if count > 1 else f"{path} has one channel, 0"
    if number is None and count > 1:
        raise UserError(f"{have}: say which is the {name} with --{name}-channel")
    if (number or 0) >= count:
        raise UserError(f"{have}: there is no channel {number} for --{name}-channel")
    return volumes[number or 0]


def _check_source(name: str, source: volume.Volume, mask: volume.Volume) -> None:
    if source.dtype not in ("uint8", "uint16") and np.dtype(source.dtype).kind != "f":
        raise UserError(
            f"{source.path} holds {source.dtype}, as labels do; probabilities are floats of 0..1, uint8, uint16 or bool"
        )
    if source.shape != mask.shape:
        raise UserError(
            f"{name} {source.path} has shape {source.shape} and mask {mask.path} {mask.shape}, z y x; they must be equal"
        )


def checksum(channels: tuple[Channel, ...]) -> str:
    """Fingerprint of all volumes that the channels are read from."""
    checksums = [channel.source.checksum() for channel in channels if channel.source]
    return hashlib.sha256(" ".join(checksums).encode()).hexdigest()


def notes(channels: tuple[Channel, ...]) -> list[str]:
    """What a user may have meant otherwise, from patches of each volume; refuses a patch that holds no probabilities."""
    lines = []
    for channel in channels:
        if channel.source is None:
            continue
        highest = 0
        for box in volume.patches(channel.source.shape):
            replace(channel, inverted=False).read(box)
            highest = max(highest, int(channel.source.read(box).max()))
        full = {"uint8": 255, "uint16": 65535}.get(channel.source.dtype, 1)
        suspicious = 1 if full == 255 else 255
        if not channel.source.binary and full > 1 and 0 < highest <= suspicious:
            lines.append(
                f"note: {channel} holds nothing above {highest} where volseg looked; {full} stands for probability 1"
            )
    return lines
