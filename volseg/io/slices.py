"""Volumes in folders of TIFF or PNG slices, one section each."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg.box import Box
from volseg.errors import UserError
from volseg.io import files, tiff
from volseg.io.header import CACHE_BYTES, READS, Header, decoding, reason, shape_text

if TYPE_CHECKING:
    from volseg.io.volume import Volume


SUFFIXES = (".tif", ".tiff", ".png")


@dataclass(frozen=True)
class _Slice:
    """What the header of one slice says."""

    shape: tuple[int, int]
    dtype: str


class _Folder:
    """A folder of slices in natural order; keeps decoded PNG slices for boxes that do not span the plane."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.files = _slice_names(path)
        self._png = _png
        if self.files and self.files[0].lower().endswith(".png"):
            with decoding(os.path.join(path, self.files[0])):
                first = _slice(os.path.join(path, self.files[0]))
            nbytes = first.shape[0] * first.shape[1] * np.dtype(first.dtype).itemsize
            self._png = lru_cache(maxsize=max(1, CACHE_BYTES // nbytes))(_png)

    def fill(self, plane: np.ndarray, z: int, window: tuple[slice, slice]) -> None:
        """``plane`` holds the voxels of slice ``z`` in ``window`` (y x)."""
        file = os.path.join(self.path, self.files[z])
        if not file.lower().endswith(".png"):
            tiff.pages(file).fill(plane, 0, window)
            return
        data = self._png(file)
        plane[...] = data[window]


@lru_cache(maxsize=8)
def _folder(path: str, stamp: Any) -> _Folder:
    return _Folder(path)


def _natural(name: str) -> tuple:
    """Sort key by which s2.tif comes before s10.tif."""
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", name)], name


def _slice_names(path: str) -> list[str]:
    names = [n for n in os.listdir(path) if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
    return sorted((n for n in names if os.path.isfile(os.path.join(path, n))), key=_natural)


def header(path: str) -> Header:
    """What the headers of all slices in the folder at ``path`` say."""
    names = _slice_names(path)
    if not names:
        raise UserError(f"folder {path} is neither a zarr nor holds .tif or .png slices; {READS}")
    kinds = sorted({os.path.splitext(name)[1].lower().replace("tiff", "tif") for name in names})
    if len(kinds) > 1:
        raise UserError(f"folder {path} mixes {' and '.join(kinds)} files; keep the slices of one volume alone")
    slices = [_slice(os.path.join(path, name)) for name in names]
    for name, one in zip(names, slices, strict=True):
        if one != slices[0]:
            raise UserError(
                f"slice {os.path.join(path, name)} is {shape_text(one.shape)} {one.dtype}, but {names[0]} is "
                f"{shape_text(slices[0].shape)} {slices[0].dtype}; all slices of a folder must agree"
            )
    shape = (len(names), *slices[0].shape)
    return Header("slices", shape, slices[0].dtype, None, (1, *slices[0].shape))


def _slice(file: str) -> _Slice:
    """The header of one slice; refuses color and several pages."""
    if os.path.getsize(file) == 0:
        raise UserError(f"slice {file} is empty (0 bytes); copy it again")
    if not file.lower().endswith(".png"):
        pages = tiff.pages(file)
        if pages.shape[0] != 1:
            raise UserError(f"slice {file} holds {pages.shape[0]} pages; a folder's files hold one section each")
        return _Slice(pages.shape[1:], pages.dtype)
    with decoding(file), files.open_binary(file) as opened:
        image = _png_image(opened)
        types = {"1": "uint8", "L": "uint8", "P": "uint8", "I;16": "uint16", "I": "int32"}
        if image.mode not in types:
            raise UserError(f"slice {file} is a color image ({image.mode}); convert it to gray values")
        return _Slice((image.height, image.width), types[image.mode])


def _png_image(opened: Any) -> Any:
    """A PNG by its own reader: no limit on the number of voxels. Palette images give their indices."""
    from PIL.PngImagePlugin import PngImageFile

    try:
        return PngImageFile(opened)
    except SyntaxError as error:
        raise OSError(reason(error)) from None


def _png(file: str) -> np.ndarray:
    with files.open_binary(file) as opened:
        return np.asarray(_png_image(opened))


def read(volume: Volume, box: Box) -> np.ndarray:
    """The voxels of ``box``; refuses a folder that holds another number of slices than it did."""
    out = np.empty(box.shape, volume.dtype)
    folder = _folder(volume.path, files.stamp(volume.path))
    if len(folder.files) != volume.shape[0]:
        raise UserError(f"{volume.path} held {volume.shape[0]} slices and now holds {len(folder.files)}; start again")
    for z, plane in zip(range(box.start[0], box.stop[0]), out, strict=True):
        with decoding(f"slice {os.path.join(volume.path, folder.files[z])}", box):
            folder.fill(plane, z, box.slices[1:])
    return out
