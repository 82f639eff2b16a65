"""A synthetic volume as a file, with its exact labels."""

from __future__ import annotations

from math import prod

from volseg.box import Blocks, Box, Triple
from volseg.engine import folder
from volseg.engine.blocks import fit
from volseg.errors import UserError
from volseg.evaluation.synthetic import VOXEL_SIZE_NM, synth
from volseg.io import arrays, files, ome
from volseg.progress import Progress

PARTS = {"zarr.json", "0", "labels"}  # what lies in a synthetic volume


def write_synthetic(out: str, shape: Triple, block: Triple, *, seed: int, overwrite: bool, progress: Progress) -> None:
    """A synthetic EM volume with its exact labels is at ``out`` (OME-Zarr: array ``0``, and ``labels/truth/0``).

    Any block shape gives the same voxels. Voxels are 5 nm along each axis. What a killed call left is gone.
    """
    if files.exists(out) and not overwrite:
        raise UserError(f"output {out} exists; give another path, or --overwrite to replace it")
    if files.exists(out) and not files.exists(f"{out}/labels/truth/zarr.json"):
        raise UserError(f"output {out} exists and volseg synth did not make it, so it is left alone; give another path")
    partial = folder.partial_path(out)
    if files.exists(partial) and set(files.names(partial)) - PARTS:
        raise UserError(f"{partial} exists and volseg synth did not make it, so it is left alone; give another path")
    files.remove(partial)
    try:
        _write(partial, shape, block, seed, progress)
    except BaseException:
        files.remove(partial)
        raise
    if partial != out:
        files.remove(out)
        files.move(partial, out)


def _write(path: str, shape: Triple, block: Triple, seed: int, progress: Progress) -> None:
    """The group at ``path`` holds image and labels."""
    grid = Blocks(shape, fit(block, shape))
    dtype = synth(Box((0, 0, 0), (1, 1, 1)), seed=seed)[1].dtype
    for group in ("", "/labels", "/labels/truth"):
        arrays.create_group(f"{path}{group}")
    for name, kind in (("0", "uint8"), ("labels/truth/0", dtype)):
        arrays.create_array(path, name, shape=shape, dtype=kind, chunk=(32, 256, 256), shard=grid.block, axes="zyx")
    arrays.set_group_attributes(path, "", ome.multiscales("synthetic EM", "zyx", [("0", VOXEL_SIZE_NM)]))
    arrays.set_group_attributes(path, "labels", {"ome": {"version": "0.5", "labels": ["truth"]}})
    truth = ome.multiscales("truth", "zyx", [("0", VOXEL_SIZE_NM)], source="../../")
    arrays.set_group_attributes(path, "labels/truth", truth)
    advance = progress.stage("synth", prod(shape), 0)
    for box in grid:
        image, labels = synth(box, seed=seed)
        arrays.write(arrays.open_array(path, "0"), box, image)
        arrays.write(arrays.open_array(path, "labels/truth/0"), box, labels)
        advance(box.voxels)
