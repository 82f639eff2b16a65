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


def write_synthetic(out: str, shape: Triple, block: Triple, *, seed: int, overwrite: bool, progress: Progress) -> None:
    """A synthetic EM volume with its exact labels is at ``out`` (OME-Zarr: array ``0``, and ``labels/truth/0``).

    Any block shape gives the same voxels. Voxels are 5 nm along each axis.
    """
    if files.exists(out) and not overwrite:
        raise UserError(f"output {out} exists; give another path, or --overwrite to replace it")
    if files.exists(out) and not files.exists(f"{out}/labels/truth/zarr.json"):
        raise UserError(f"output {out} exists and volseg synth did not make it, so it is left alone; give another path")
    partial = folder.partial_path(out)
    files.remove(partial)
    grid = Blocks(shape, fit(block, shape))
    dtype = synth(Box((0, 0, 0), (1, 1, 1)), seed=seed)[1].dtype
    for group in ("", "/labels", "/labels/truth"):
        arrays.create_group(f"{partial}{group}")
    for name, kind in (("0", "uint8"), ("labels/truth/0", dtype)):
        arrays.create_array(partial, name, shape=shape, dtype=kind, chunk=(32, 256, 256), shard=grid.block, axes="zyx")
    arrays.set_group_attributes(partial, "", ome.multiscales("synthetic EM", "zyx", [("0", VOXEL_SIZE_NM)]))
    arrays.set_group_attributes(partial, "labels", {"ome": {"version": "0.5", "labels": ["truth"]}})
    truth = ome.multiscales("truth", "zyx", [("0", VOXEL_SIZE_NM)], source="../../")
    arrays.set_group_attributes(partial, "labels/truth", truth)
    advance = progress.stage("synth", prod(shape), 0)
    for box in grid:
        image, labels = synth(box, seed=seed)
        arrays.write(arrays.open_array(partial, "0"), box, image)
        arrays.write(arrays.open_array(partial, "labels/truth/0"), box, labels)
        advance(box.voxels)
    if partial != out:
        files.remove(out)
        files.move(partial, out)
