"""Every setting of an inference, from the model's own values to single ones, and the name of its output."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

from volseg.config import Config, Setting, load
from volseg.inference import model
from volseg.inference.model_file import model_file

Settings = Iterable[Setting]
BINNED_TILE = (
    2560  # longest tile edge of a network that bins voxels, which takes no more memory than others in tiles of half
)
ENDINGS = (
    ".zip", ".ozx", ".gz", ".ome.zarr", ".ome.tiff", ".ome.tif", ".zarr", ".tiff", ".tif", ".n5", ".h5", ".hdf5", ".ims",
    ".mrc", ".rec", ".st", ".map", ".nii", ".nrrd", ".nhdr", ".npy", ".czi", ".dm3", ".dm4",
)  # fmt: skip


def settings_of(
    config: str | os.PathLike | Config | dict | None = None,
    settings: Settings = (),
    *,
    model_path: str | os.PathLike | None = None,
    base: dict | None = None,
) -> Config:
    """Every setting of an inference: the model's own values, then ``config``, then ``settings``.

    Parameters
    ----------
    config : path, Config or dict, optional
        A TOML file, its tables as a dict, or settings that are complete already: then the model's own are not asked.
    settings : iterable of str
        Each ``"section.key=value"``, as after ``--set``.
    model_path : path, optional
        The model whose own values are the base; that of the settings, or the shipped one, if not given.
    base : dict, optional
        Tables to start from instead of the model's.

    Raises
    ------
    UserError
        For an unknown key or a wrong value, with the place that it comes from.
    """
    chosen = [*settings, *([("model", f"predict.model={json.dumps(os.fspath(model_path))}")] if model_path else [])]
    if isinstance(config, Config):
        return load(sets=chosen, base=config.model_dump(mode="json", exclude_unset=True)) if chosen else config
    if base is None:
        base = model_values(load(config, chosen))
    return load(config, chosen, base)


def model_values(config: Config) -> dict:
    """The tables of settings that come with the model of ``config``."""
    card = model.load_card(model_file(config.predict))
    if card.binning == 1:
        return card.decode
    return {**card.decode, "predict": {"tile": BINNED_TILE, **card.decode.get("predict", {})}}


def default_out(path: str | os.PathLike) -> str:
    """Where a volume's run goes unless told otherwise.

    >>> default_out("a/cells.tif"), default_out("cells.ome.zarr/"), default_out("slices")
    ('a/cells.volseg.zarr', 'cells.volseg.zarr', 'slices.volseg.zarr')
    >>> default_out("em.h5::/volumes/raw"), default_out("em.nii.gz")
    ('em.volseg.zarr', 'em.volseg.zarr')
    """
    head, slash, name = os.fspath(path).partition("::/")[0].rstrip("/").rpartition("/")
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    return f"{head}{slash}{name}.volseg.zarr"
