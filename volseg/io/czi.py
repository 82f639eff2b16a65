"""Volumes in Zeiss' files (.czi): one section at a time, one channel at a time."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg import system
from volseg.box import Box
from volseg.errors import UserError, printable
from volseg.io import files, ome
from volseg.io.header import Header, check_shape, decoding, decoding_room, reason

if TYPE_CHECKING:
    from volseg.io.volume import Volume

SUFFIXES = (".czi",)
MAGIC = b"ZISRAWFILE"
TYPES = {"Gray8": "uint8", "Gray16": "uint16", "Gray32Float": "float32"}
COLORS = {"Bgr24": "uint8", "Bgr48": "uint16", "Bgr96Float": "float32"}


def header(path: str, dataset: str = "", *, several: bool = False) -> Header:
    """What the directory of the file at ``path`` says."""
    image = _image(path, files.stamp(path))
    if image.shape[0] == 1:
        raise UserError(f"{path} is 2-D ({image.shape[1]} x {image.shape[2]}); volseg needs a volume with axes z y x")
    return Header(
        "czi",
        image.shape,
        image.dtype,
        image.voxel_size_nm,
        (1, *image.shape[1:]),
        channels=image.channels,
        times=image.times,
        notes=image.notes,
        size_notes=image.size_notes,
    )


class _Image:
    """A file open to be read, by one thread at a time; it closes when it is let go of."""

    def __init__(self, path: str) -> None:
        from pylibCZIrw.czi import CziReader

        self.path, self.lock = path, threading.Lock()
        try:
            self.reader = CziReader(path)
            bounds = self.reader.total_bounding_box_no_pyramid
            kinds = set(self.reader.pixel_types.values())
        except Exception as error:  # libCZI raises RuntimeError for all that is wrong
            raise UserError(
                f"cannot open {path} as CZI: {reason(error)}; damaged or cut short: copy it again"
            ) from None
        self.start = bounds["Y"][0], bounds["X"][0]
        self.shape = tuple(bounds[axis][1] - bounds[axis][0] for axis in "ZYX")
        check_shape(self.shape, path)
        if len(kinds) != 1 or not kinds <= {*TYPES, *COLORS}:
            raise UserError(f"{path} holds voxels of type {', '.join(sorted(kinds))}; save one channel of gray values")
        odd = [f"{axis} has {b - a}" for axis, (a, b) in bounds.items() if axis not in "ZYXCTS" and b - a > 1]
        if odd:
            raise UserError(
                f"{path} has more axes than channels and z y x: {', '.join(odd)} entries; save one of each alone"
            )
        kind = kinds.pop()
        self.samples = 3 if kind in COLORS else 1
        self.dtype = COLORS.get(kind) or TYPES[kind]
        self.times = bounds["T"][1] - bounds["T"][0]
        self.channels = self.samples if self.samples > 1 else bounds["C"][1] - bounds["C"][0]
        self.notes: tuple[str, ...] = ()
        if (scenes := bounds.get("S", (0, 1))[1]) > 1:
            self.notes = (printable(f"{path} has {scenes} scenes: they are read as they lie beside each other"),)
        self.voxel_size_nm, self.size_notes = self._voxel_size_nm()

    def _voxel_size_nm(self) -> tuple[Any, tuple[str, ...]]:
        """Voxel size z y x from the distances in the metadata, which are meters."""
        try:
            items = self.reader.metadata["ImageDocument"]["Metadata"]["Scaling"]["Items"]["Distance"]
            lengths = {
                item["@Id"]: ome.number(item["Value"]) for item in (items if isinstance(items, list) else [items])
            }
        except (KeyError, TypeError):
            return None, ()
        return ome.voxel_size_nm([lengths.get(axis) or None for axis in "ZYX"], ["m"] * 3, self.path)

    def fill(self, plane: np.ndarray, z: int, window: tuple[slice, slice], channel: int, time: int) -> None:
        """``plane`` holds the voxels of section ``z`` in ``window`` (y x)."""
        rows, columns = window
        roi = (columns.start + self.start[1], rows.start + self.start[0], plane.shape[1], plane.shape[0])
        place = {"C": 0 if self.samples > 1 else channel, "Z": z, "T": time}
        with self.lock:
            data = self.reader.read(roi=roi, plane=place)
            plane[...] = data[..., self.samples - 1 - channel if self.samples > 1 else 0]  # stored blue, green, red

    def __del__(self) -> None:
        if hasattr(self, "reader"):
            self.reader.close()


@lru_cache(maxsize=16)
def _image(path: str, stamp: Any) -> _Image:
    system.require("pylibCZIrw", extra="formats")
    return _Image(path)


def read(volume: Volume, box: Box) -> np.ndarray:
    """The voxels of ``box``; sections, or the tiles of them that hold the box, are decoded one by one."""
    image = _image(volume.path, files.stamp(volume.path))
    out = np.empty(box.shape, volume.dtype)
    for z, plane in zip(range(box.start[0], box.stop[0]), out, strict=True):
        with decoding(f"section {z} of {volume.path}", box), decoding_room(plane.nbytes, volume.path):
            image.fill(plane, z, box.slices[1:], volume.channel, volume.time)
    return out
