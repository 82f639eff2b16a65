"""OME metadata in and out: multiscales of OME-Zarr, and the XML in OME-TIFF files."""

from __future__ import annotations

from typing import Any

import numpy as np

from volseg.io import axes
from volseg.io.header import TripleNm

NM_PER_UNIT = {
    "angstrom": 0.1,
    "nanometer": 1.0,
    "nanometre": 1.0,
    "nm": 1.0,
    "micrometer": 1e3,
    "micrometre": 1e3,
    "micron": 1e3,
    "microns": 1e3,
    "um": 1e3,
    "µm": 1e3,
    "μm": 1e3,
    "\\u00b5m": 1e3,
    "millimeter": 1e6,
    "millimetre": 1e6,
    "mm": 1e6,
    "meter": 1e9,
    "metre": 1e9,
    "å": 0.1,
}  # how many nanometers one unit is


def metadata(attributes: dict) -> dict:
    """OME-Zarr metadata of a group: 0.5 keeps it under ``ome``, 0.4 at the top."""
    return attributes.get("ome", attributes)


def voxel_size_nm(image: dict, entry: dict, channel_axis: int | None) -> TripleNm | None:
    """Voxel size z y x in nm from coordinate transformations and axis units; None where either is absent."""
    listed = image.get("axes", [])
    space = axes.space(len(listed), channel_axis)
    units = [NM_PER_UNIT.get(str(listed[i].get("unit", "")).lower()) for i in space if isinstance(listed[i], dict)]
    size = np.ones(3)
    found = False
    for step in (*entry.get("coordinateTransformations", []), *image.get("coordinateTransformations", [])):
        if step.get("type") == "scale" and len(step.get("scale", [])) == len(listed):
            size *= [step["scale"][i] for i in space]
            found = True
    known = [unit for unit in units if unit is not None]
    if not found or len(units) != 3 or len(known) != 3 or not (size > 0).all():
        return None
    return tuple(round(float(s * u), 6) for s, u in zip(size, known, strict=True))


def axis_name(axis: dict) -> str:
    return "c" if axis.get("type") == "channel" else axis.get("name", "")


def tiff_voxel_size_nm(pixels: Any) -> TripleNm | None:
    sizes = [None if pixels is None else pixels.get(f"PhysicalSize{axis}") for axis in "ZYX"]
    if None in sizes:
        return None
    units = [NM_PER_UNIT.get(pixels.get(f"PhysicalSize{axis}Unit", "µm").lower()) for axis in "ZYX"]
    known = [unit for unit in units if unit is not None]
    return tuple(round(float(s) * u, 6) for s, u in zip(sizes, known, strict=True)) if len(known) == 3 else None


def multiscales(
    name: str,
    axes: str | tuple[str, ...],
    levels: list[tuple[str, tuple[float, ...]]],
    *,
    unit: str = "nanometer",
    source: str = "",
) -> dict:
    """OME-Zarr 0.5 attributes of a multiscales group.

    ``levels`` lists (dataset, voxel size z y x), finest first; unit "" leaves lengths in voxels. Coarser levels are
    shifted so that all cover the same space. ``source`` (such as ``"../../"``) makes it a label image of that image.
    """
    first = levels[0][1]
    lead = [1.0] * (len(axes) - 3)
    image = {
        "name": name,
        "axes": [_ome_axis(axis, unit) for axis in axes],
        "datasets": [
            {
                "path": dataset,
                "coordinateTransformations": [
                    {"type": "scale", "scale": [*lead, *map(float, size)]},
                    {
                        "type": "translation",
                        "translation": [*(0.0 for _ in lead), *((b - a) / 2 for a, b in zip(first, size, strict=True))],
                    },
                ],
            }
            for dataset, size in levels
        ],
    }
    label = {"image-label": {"source": {"image": source}}} if source else {}
    return {"ome": {"version": "0.5", "multiscales": [image], **label}}


def _ome_axis(name: str, unit: str) -> dict:
    if name in "zyx":
        return {"name": name, "type": "space", **({"unit": unit} if unit else {})}
    return {"name": name, "type": {"c": "channel", "t": "time"}.get(name, "")}
