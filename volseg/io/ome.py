"""OME metadata in and out: multiscales of OME-Zarr, the XML in OME-TIFF files, and lengths in nanometers.

Files are written by many programs. What they say is parsed here, once, into typed values: a field that is odd reads as
absent, and a note says so.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from itertools import cycle
from math import isfinite
from typing import Annotated, Any
from xml.etree import ElementTree

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, ValidationInfo, WrapValidator

from volseg.errors import printable
from volseg.io import axes as array_axes
from volseg.io.header import TripleNm
from volseg.io.place import ORIGIN, Place, from_lengths

NM_PER_UNIT = {
    "pm": 1e-3,
    "picometer": 1e-3,
    "picometre": 1e-3,
    "å": 0.1,
    "angstrom": 0.1,
    "angstroms": 0.1,
    "\\u00c5": 0.1,
    "nm": 1.0,
    "nanometer": 1.0,
    "nanometre": 1.0,
    "um": 1e3,
    "µm": 1e3,
    "μm": 1e3,
    "\\u00b5m": 1e3,
    "micron": 1e3,
    "microns": 1e3,
    "micrometer": 1e3,
    "micrometre": 1e3,
    "mm": 1e6,
    "millimeter": 1e6,
    "millimetre": 1e6,
    "cm": 1e7,
    "centimeter": 1e7,
    "centimetre": 1e7,
    "inch": 2.54e7,
    "m": 1e9,
    "meter": 1e9,
    "metre": 1e9,
}
NO_UNIT = ("pixel", "pixels", "px", "voxel")  # what programs write where they know no unit
MAX_LISTED_LABELS = 1000  # whose colors and sizes stand in the metadata of a label image
CHANNEL_COLORS = ("FFFFFF", "FF0000", "00FFFF")  # of the mask, the contour, and what follows
SMALLEST_NM, LARGEST_NM = 1e-3, 1e9  # no voxel is shorter or longer


def voxel_size_nm(
    lengths: Sequence[float | None], units: Sequence[str], where: str
) -> tuple[TripleNm | None, tuple[str, ...]]:
    """Voxel size z y x in nanometers, and notes on what was decided; None where a length or its unit is not known.

    A negative length counts as its absolute value.

    >>> voxel_size_nm((-0.05, 0.005, 0.005), ("um", "um", "um"), "em.tif")
    ((50.0, 5.0, 5.0), ('em.tif says voxel size -0.05 x 0.005 x 0.005 um: taken without its sign',))
    >>> voxel_size_nm((8, 4, 4), ("", "", ""), "em.zarr")[0] is None
    True
    """
    if all(length is None for length in lengths):
        return None, ()
    names = [unit.strip().lower() for unit in units]
    unknown = sorted({unit for unit in names if unit not in NM_PER_UNIT})
    said = f"{where} says voxel size {_shown(lengths, units)}"
    if unknown:
        if set(unknown) <= {"", *NO_UNIT} and all(length in (None, 1) for length in lengths):
            return None, ()
        why = "without a unit" if unknown == [""] else f"in {', '.join(unit or 'no unit' for unit in unknown)}"
        numbers = ",".join(f"{abs(length):g}" if length else "?" for length in lengths)
        note = f"{said}, {why}: not used; if these are nanometers, give input.voxel_size_nm=[{numbers}]"
        return None, (printable(note),)
    known = [float(length) for length in lengths if length is not None]
    if len(known) < 3:
        return None, (printable(f"{said}, which is not complete: not used; give input.voxel_size_nm"),)
    z, y, x = (round(abs(length) * NM_PER_UNIT[name], 6) for length, name in zip(known, names, strict=True))
    size = z, y, x
    if not all(isfinite(n) and SMALLEST_NM <= n <= LARGEST_NM for n in size):
        return None, (printable(f"{said}, which no voxel has: not used; give input.voxel_size_nm"),)
    if min(known) < 0:
        return size, (printable(f"{said}: taken without its sign"),)
    return size, ()


def _shown(lengths: Sequence[float | None], units: Sequence[str]) -> str:
    numbers = ["?" if length is None else f"{length:g}" for length in lengths]
    if len(set(units)) == 1:
        return f"{' x '.join(numbers)} {units[0]}".rstrip()
    return " x ".join(f"{number} {unit}".rstrip() for number, unit in zip(numbers, units, strict=True))


# ----------------------------------------------------------------------------------------------------- OME-Zarr, read


def _odd(value: Any, parse: Callable, info: ValidationInfo) -> Any:
    """The field, or nothing where it cannot be parsed; ``info.context`` collects why."""
    try:
        return parse(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, (info.field_name, *first["loc"])))
        if info.context is not None:
            info.context.append(f"{place}: {first['msg']}")
        return parse(None)


def _text(value: Any) -> Any:
    return "" if value is None else str(value) if type(value) is int else value


def _many(value: Any) -> Any:
    return () if value is None else (value,) if isinstance(value, dict) else value


Text = Annotated[str, BeforeValidator(_text), WrapValidator(_odd)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_many), WrapValidator(_odd)]


class _Parsed(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


def _axis(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value  # as OME-Zarr 0.3 has it


class Axis(_Parsed):
    """An axis of an image."""

    name: Text = ""
    type: Text = ""
    unit: Text = ""


class Transformation(_Parsed):
    """A step from an array's indices to lengths."""

    type: Text = ""
    scale: Numbers = ()
    translation: Numbers = ()


Transformations = Annotated[tuple[Transformation, ...], BeforeValidator(_many), WrapValidator(_odd)]


class Dataset(_Parsed):
    """A resolution level of an image."""

    path: Text = ""
    coordinateTransformations: Transformations = ()  # noqa: N815


class Image(_Parsed):
    """An entry of multiscales."""

    axes: Annotated[
        tuple[Annotated[Axis, BeforeValidator(_axis)], ...], BeforeValidator(_many), WrapValidator(_odd)
    ] = ()
    datasets: Annotated[tuple[Dataset, ...], BeforeValidator(_many), WrapValidator(_odd)] = ()
    coordinateTransformations: Transformations = ()  # noqa: N815

    @property
    def axis_names(self) -> list[str]:
        return ["c" if axis.type == "channel" else axis.name for axis in self.axes]

    def voxel_size_nm(
        self, dataset: Dataset, where: str, ndim: int, channel_axis: int | None = None, time_axis: int | None = None
    ) -> tuple[TripleNm | None, tuple[str, ...]]:
        """Voxel size z y x of a level, and notes on it; None where scale or unit is absent."""
        space = array_axes.space(ndim, channel_axis, time_axis)
        steps = (*dataset.coordinateTransformations, *self.coordinateTransformations)
        scales = [step.scale for step in steps if step.type == "scale" and len(step.scale) == ndim]
        if len(space) != 3:
            return None, ()
        if not scales:
            odd = [step.scale for step in steps if step.type == "scale" and step.scale]
            if not odd:
                return None, ()
            said = f"{where} says scale {' x '.join(f'{n:g}' for n in odd[0])}"[:250]
            return None, (printable(f"{said}, which does not fit its {ndim} axes: not used; give input.voxel_size_nm"),)
        lengths = [1.0, 1.0, 1.0]
        for scale in scales:
            lengths = [length * scale[axis] for length, axis in zip(lengths, space, strict=True)]
        units = [self.axes[axis].unit for axis in space] if len(self.axes) == ndim else ["", "", ""]
        return voxel_size_nm(lengths, units, where)

    def place(self, dataset: Dataset, ndim: int, space: Sequence[int]) -> Place:
        """Where the center of a level's first voxel lies: its translations, in voxels z y x."""
        length, voxel = [0.0] * 3, [1.0] * 3
        for step in (*dataset.coordinateTransformations, *self.coordinateTransformations):
            if step.type == "translation" and len(step.translation) == ndim:
                length = [a + step.translation[axis] for a, axis in zip(length, space, strict=True)]
            if step.type == "scale" and len(step.scale) == ndim:
                scale = [step.scale[axis] for axis in space]
                length, voxel = ([a * n for a, n in zip(one, scale, strict=True)] for one in (length, voxel))
        return from_lengths(length, voxel)


class _Multiscales(_Parsed):
    multiscales: Annotated[tuple[Image, ...], BeforeValidator(_many), WrapValidator(_odd)] = ()


def images(attributes: Any, where: str) -> tuple[tuple[Image, ...], tuple[str, ...]]:
    """The multiscales images that a group's attributes list, and notes on what was odd in them.

    OME-Zarr 0.5 keeps them under ``ome``, 0.4 at the top.

    >>> found, notes = images({"multiscales": {"datasets": [{"path": 0}], "axes": None}}, "em.zarr")
    >>> found[0].datasets[0].path, found[0].axes, notes
    ('0', (), ())
    """
    inner = attributes.get("ome") if isinstance(attributes, dict) else None
    listed = inner if isinstance(inner, dict) else attributes
    odd: list[str] = []
    try:
        found = _Multiscales.model_validate(listed if isinstance(listed, dict) else {}, context=odd).multiscales
    except (ValidationError, RecursionError) as error:
        found, odd = (), [str(error)]
    return found, tuple(printable(f"{where}: odd OME metadata are left out: {text}"[:300]) for text in odd[:3])


# ------------------------------------------------------------------------------------------------------ OME-TIFF, read


def tiff_voxel_size_nm(xml: str, where: str) -> tuple[TripleNm | None, tuple[str, ...]]:
    """Voxel size z y x that the XML of an OME-TIFF file states, and notes on it."""
    try:
        pixels = ElementTree.fromstring(xml).find(".//{*}Pixels")
    except (ElementTree.ParseError, ValueError) as error:
        return None, (printable(f"{where}: its OME metadata are left out: {error}"[:300]),)
    if pixels is None:
        return None, ()
    lengths = [number(pixels.get(f"PhysicalSize{axis}")) for axis in "ZYX"]
    return voxel_size_nm(lengths, [pixels.get(f"PhysicalSize{axis}Unit", "µm") for axis in "ZYX"], where)


def number(value: Any) -> float | None:
    """A finite number, or None for all else.

    >>> number("4.0"), number(None), number("many"), number("nan"), number("9" * 9999)
    (4.0, None, None, None, None)
    """
    try:
        parsed = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return parsed if isfinite(parsed) else None


# ---------------------------------------------------------------------------------------------------- OME-Zarr, written


def multiscales(
    name: str,
    axes: str | tuple[str, ...],
    levels: list[tuple[str, tuple[float, ...]]],
    *,
    unit: str = "nanometer",
    source: str = "",
    begin: Place = ORIGIN,
) -> dict:
    """OME-Zarr 0.5 attributes of a multiscales group.

    ``levels`` lists (dataset, voxel size z y x), finest first; unit "" leaves lengths in voxels. ``begin`` is the center of the
    first voxel of the finest; coarser levels are shifted so that all cover the same space. ``source`` (such as ``"../../"``)
    makes it a label image of that image.
    """
    first = levels[0][1]
    lead = [1.0] * (len(axes) - 3)
    image = {
        "name": name,
        "axes": [_written_axis(axis, unit) for axis in axes],
        "datasets": [
            {
                "path": dataset,
                "coordinateTransformations": [
                    {"type": "scale", "scale": [*lead, *map(float, size)]},
                    {
                        "type": "translation",
                        "translation": [
                            *(0.0 for _ in lead),
                            *(float(n) + (b - a) / 2 for n, a, b in zip(begin, first, size, strict=True)),
                        ],
                    },
                ],
            }
            for dataset, size in levels
        ],
    }
    label = {"image-label": {"source": {"image": source}}} if source else {}
    return {"ome": {"version": "0.5", "multiscales": [image], **label}}


def channels(names: tuple[str, ...]) -> dict:
    """The ``omero`` block of channels that hold probabilities as uint8: names and colors for viewers."""
    look = {"coefficient": 1.0, "family": "linear", "inverted": False}
    window = {"min": 0.0, "max": 255.0, "start": 0.0, "end": 255.0}
    listed = [
        {"label": name, "color": color, "active": color == CHANNEL_COLORS[0], "window": window, **look}
        for name, color in zip(names, cycle(CHANNEL_COLORS))
    ]
    return {"channels": listed, "rdefs": {"model": "color"}}


def label_properties(ids: np.ndarray, columns: dict[str, np.ndarray]) -> dict:
    """Colors and properties of ``image-label`` for each label; a label has the color that it has in pictures."""
    numbers, rows = ids.tolist(), zip(*(column.tolist() for column in columns.values()), strict=True)
    known = [{name: value for name, value in zip(columns, row, strict=True) if value == value} for row in rows]
    colors = np.round(255 * label_colors(ids)).astype(int).tolist()
    return {
        "version": "0.5",
        "colors": [{"label-value": i, "rgba": [*color, 255]} for i, color in zip(numbers, colors, strict=True)],
        "properties": [{"label-value": i, **row} for i, row in zip(numbers, known, strict=True)],
    }


def label_colors(ids: np.ndarray) -> np.ndarray:
    """RGB from 0 to 1 of each label, float64 (n, 3): its number alone decides."""
    hue = (ids.astype(np.uint64) * np.uint64(0x9E3779B1) % np.uint64(1 << 32)).astype(np.float64) / (1 << 32)
    return np.array([colorsys.hsv_to_rgb(h, 0.75, 1.0) for h in hue]).reshape(-1, 3)


def _written_axis(name: str, unit: str) -> dict:
    if name in "zyx":
        return {"name": name, "type": "space", **({"unit": unit} if unit else {})}
    return {"name": name, "type": {"c": "channel", "t": "time"}.get(name, "")}
