"""The watershed of a volume in memory: what a run computes of it in blocks, in one block."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from volseg.box import Box, VoxelSize
from volseg.config import Config, load
from volseg.errors import UserError
from volseg.segmentation import holes, stitch
from volseg.segmentation.basins import watershed_block
from volseg.segmentation.heights import block_heights, to_uint8
from volseg.segmentation.objects import paint
from volseg.segmentation.rules import Rules, label_basins, label_dtype

CHANNELS = {"contour": 1, "head": 2}  # the channel that such a height follows
MAX_VOXELS = 1 << 31  # of the volume grown by 1, so that int32 numbers regions


def watershed(
    probability: np.ndarray,
    contour: np.ndarray | None = None,
    *,
    voxel_size_nm: VoxelSize | None = None,
    config: Config | None = None,
    settings: Iterable[str] = (),
) -> np.ndarray:
    """Instance labels of probabilities in memory: the same bytes as a run of them, in any blocks.

    What comes out is the minimum spanning forest of the volume, rooted at its seeds (Cousty et al., "Watershed cuts", PAMI
    2009), and then the other rules of ``[stitch]``. For a volume that does not fit memory there is `volseg.segment`.

    Parameters
    ----------
    probability : array
        Mask probability (z, y, x), or channels (channel, z, y, x): mask, contour, and for ``fragments.height="head"`` a
        distance. float 0..1, uint8 0..255, uint16 0..65535 or bool.
    contour : array, optional
        Contour probability (z, y, x), where ``probability`` is the mask's alone; 0 everywhere if not given.
    voxel_size_nm : three floats, optional
        Size of a voxel along z y x. Only settings in nm need it.
    config : Config, optional
        Settings; the defaults if not given. Only ``[fragments]`` and ``[stitch]`` are looked at.
    settings : iterable of str
        Single settings, such as ``"stitch.seed=0.7"``.

    Returns
    -------
    uint32 or uint64 (z, y, x)
        1..n in the raster order of each object's first voxel, 0 for background.

    Raises
    ------
    UserError
        For arrays of another kind, values that are no probabilities, settings that do not exist, a setting in nm without a
        voxel size, or a volume of 2**31 voxels or more.

    Examples
    --------
    Two objects in a row. The voxel between them is in the mask, below the seed level, and goes to the stronger side:

    >>> probability = np.array([[[0.9, 0.9, 0.55, 0.8, 0.9, 0.2]]])
    >>> watershed(probability, settings=["fragments.smooth=[0, 0, 0]", "stitch.seed=0.7", "stitch.min_voxels=1"])
    array([[[1, 1, 1, 2, 2, 0]]], dtype=uint32)
    """
    config = load(sets=list(settings), base=config.model_dump(mode="json", exclude={"train"}) if config else None)
    channels = _channels(probability, contour, config)
    voxel_size_nm = _voxel_size(voxel_size_nm, config)
    shape, rules = channels.shape[1:], Rules.from_config(config, voxel_size_nm)
    box = Box.from_shape(shape)
    height = block_heights(channels, box, shape, config.fragments, voxel_size_nm)
    piece, table = watershed_block(height, channels[0], box, shape, config.fragments.connectivity)
    no_links = stitch.Links(np.empty((0, 2), np.int64), table.crossing_edges)
    basins, (basin_of,) = stitch.gather([table], [no_links])
    if rules.fill_voxels:
        block_holes, no_contacts = holes.block_holes(piece, box, shape), np.empty((0, 2), np.int64)
        volume_holes, (hole_of,) = holes.gather([block_holes], [no_contacts], [basin_of])
        label = label_basins(basins, rules, volume_holes)[np.r_[basin_of, basins.minimum.size + hole_of]]
        piece = holes.number_holes(piece)
    else:
        label = label_basins(basins, rules)[basin_of]
    return paint(piece, np.r_[0, label].astype(label_dtype(int(label.max(initial=0)))))


def _channels(probability: np.ndarray, contour: np.ndarray | None, config: Config) -> np.ndarray:
    """Mask, contour and perhaps distance as uint8 (channel, z, y, x); refuses what is no probabilities."""
    given = np.asarray(probability)
    if given.ndim not in (3, 4) or 0 in given.shape:
        raise UserError(f"probability has shape {given.shape}; give (z, y, x) or (channel, z, y, x), none of them 0")
    channels = [*given] if given.ndim == 4 else [given]
    if contour is not None:
        if given.ndim == 4:
            raise UserError("give the contour as a channel of probability or as an array of its own, not both")
        channels.append(np.asarray(contour))
    for channel in channels:
        if channel.dtype not in (np.uint8, np.uint16, np.bool_) and channel.dtype.kind != "f":
            raise UserError(f"probabilities are {channel.dtype}; give floats of 0..1, uint8, uint16 or bool")
        if channel.shape != channels[0].shape:
            raise UserError(
                f"contour has shape {channel.shape}, and probability {channels[0].shape}; they must be equal"
            )
    height = config.fragments.height
    if len(channels) <= CHANNELS.get(height, 0):
        raise UserError(f"fragments.height = {height!r} follows channel {CHANNELS[height]}, counted from 0, and there are "
                        f"{len(channels)} channels; give it, or take another height")  # fmt: skip
    z, y, x = channels[0].shape
    if (z + 2) * (y + 2) * (x + 2) >= MAX_VOXELS:
        raise UserError(f"{z} x {y} x {x} voxels are too many for one block; store them as zarr and use volseg.segment")
    out = np.zeros((max(2, len(channels)), z, y, x), np.uint8)  # without a contour, it is 0
    for i, channel in enumerate(channels):
        try:
            out[i] = to_uint8(channel)
        except ValueError as error:
            raise UserError(f"channel {i}: {error}; apply the sigmoid or softmax first") from None
    return out


def _voxel_size(voxel_size_nm: VoxelSize | None, config: Config) -> VoxelSize:
    """A voxel's size; any where no setting is in nm. Refuses what is no size."""
    in_nm = {
        "fragments.distance_nm": config.fragments.distance_nm,
        "stitch.min_volume_nm3": config.stitch.min_volume_nm3,
    }
    if voxel_size_nm is None:
        if used := [name for name, value in in_nm.items() if value]:
            raise UserError(f"{used[0]} is set, so a voxel's size is needed: give voxel_size_nm=(z, y, x)")
        return 1.0, 1.0, 1.0
    size = tuple(float(n) for n in voxel_size_nm)
    if len(size) != 3 or not all(np.isfinite(size)) or min(size) <= 0:
        raise UserError(f"voxel_size_nm is {voxel_size_nm}; give three lengths above 0, z y x")
    return size[0], size[1], size[2]
