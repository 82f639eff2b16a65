"""A volume in the voxel size of the model: networks know objects by their size in voxels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import Literal

from volseg.config import Stitch
from volseg.io import volume
from volseg.io.resample import shape_at
from volseg.io.volume import Volume

TOLERANCE = 1.3  # an axis whose voxels are as much longer or shorter than the model's is left as it is
SAME = 1.01  # the same size, but for rounding
MAX_SOURCE_FACTOR = 4.0  # up to which labels come back to finer voxels by themselves

Resample = Literal["auto", "off", "nearest level"]
Size = tuple[float, float, float]


@dataclass(frozen=True)
class Match:
    """A volume as the network sees it, and why; ``given`` is the volume that it was made from, None where it is that."""

    volume: Volume
    given: Volume | None = None
    note: str = ""


def match(source: Volume, model_nm: Size | None, mode: Resample, *, any_level: bool = True) -> Match:
    """The volume in voxels of about the model's size.

    Where every axis is within a factor of `TOLERANCE`, the volume is taken as it is. Else, ``"auto"`` takes the coarsest
    resolution level that is not much coarser than the model's voxels on any axis, and resamples it as it is read where that
    is not within the tolerance yet; ``"nearest level"`` takes the level nearest in size, as it is stored.

    Parameters
    ----------
    source
        The volume as it was given.
    model_nm
        The model's voxel size z y x; None where it is not known.
    mode
        ``input.resample``.
    any_level
        Whether another resolution level of an OME-Zarr image may be taken; not where one was asked for by its name.

    Raises
    ------
    UserError
        A level that is listed is no volume, or the resampled volume would have too many voxels.
    """
    if source.voxel_size_nm is None or model_nm is None:
        return Match(source)
    if _is_close(source.voxel_size_nm, model_nm):
        said = f"the model's voxels are {_text(model_nm)} nm: near enough, nothing is resampled"
        return Match(source, note="" if _is_close(source.voxel_size_nm, model_nm, SAME) else said)
    if mode == "off":
        said = f"the model's voxels are {_text(model_nm)} nm, and nothing is resampled (input.resample = 'off')"
        return Match(source, note=f"{said}: objects look larger or smaller to it than those that it was trained on")
    found = volume.levels(source) if any_level else (source,)
    if mode == "nearest level":
        return _matched(source, min(found, key=lambda level: _distance(level.voxel_size_nm, model_nm)), model_nm)
    fine = (level for level in found if all(a <= TOLERANCE * b for a, b in _pairs(level.voxel_size_nm, model_nm)))
    level = max(fine, key=lambda level: prod(level.voxel_size_nm), default=source)
    if not _is_close(level.voxel_size_nm, model_nm):
        level = volume.resampled(level, _shape(level, model_nm))
    return _matched(source, level, model_nm)


def matches(size: Size | None, model_nm: Size | None) -> bool:
    """Whether voxels are near enough to the model's, as far as anybody knows.

    >>> matches((6.0, 5.0, 4.0), (5.0, 5.0, 5.0)), matches((10.0, 5.0, 5.0), (5.0, 5.0, 5.0)), matches(None, (5.0, 5.0, 5.0))
    (True, False, True)
    """
    return size is None or model_nm is None or _is_close(size, model_nm)


def _shape(level: Volume, model_nm: Size) -> tuple[int, int, int]:
    """Voxels of the model's size that cover the volume; an axis that is within a hundredth stays."""
    covering = shape_at(level.shape, level.voxel_size_nm, model_nm)
    pairs = zip(covering, level.shape, level.voxel_size_nm, model_nm, strict=True)
    z, y, x = (old if _ratio(a, b) < SAME else new for new, old, a, b in pairs)
    return z, y, x


def _matched(source: Volume, taken: Volume, model_nm: Size) -> Match:
    said = f"the volume's voxels are {_text(source.voxel_size_nm)} nm, the model's {_text(model_nm)} nm"
    if taken == source:
        return Match(source, note=f"{said}: no stored level is nearer")
    shape = " x ".join(map(str, taken.shape))
    level = f"level {taken.dataset}" if taken.dataset != source.dataset else "it"
    done = f"resampled to {_text(taken.voxel_size_nm)} nm as it is read" if taken.stored_shape else "as it is stored"
    return Match(taken, source, f"{said}: {level} is taken, {done} ({shape})")


def _pairs(size: Size, model_nm: Size) -> Iterator[tuple[float, float]]:
    return zip(size, model_nm, strict=True)


def _is_close(size: Size, model_nm: Size, tolerance: float = TOLERANCE) -> bool:
    return all(_ratio(a, b) <= tolerance for a, b in _pairs(size, model_nm))


def _distance(size: Size, model_nm: Size) -> float:
    """How far apart two sizes are: 1 for the same."""
    return prod(_ratio(a, b) for a, b in _pairs(size, model_nm))


def _ratio(a: float, b: float) -> float:
    """How many times as long the longer of two lengths is."""
    return max(a / b, b / a)


def _text(size: Size) -> str:
    """
    >>> _text((50, 4.6, 5.0123))
    '50 x 4.6 x 5.012'
    """
    return " x ".join(f"{n:.4g}" for n in size)


def in_source(space: Literal["auto", "source", "model"], given: Volume, taken: Volume) -> bool:
    """Whether labels come back to the grid of the volume as it was given (``output.space``).

    ``"auto"`` brings them back where no axis of the taken one is more than `MAX_SOURCE_FACTOR` times as coarse: else they
    would be far more voxels than were looked at.
    """
    factor = max(a / b for a, b in zip(taken.voxel_size_nm, given.voxel_size_nm, strict=True))
    return space == "source" or (space == "auto" and factor <= SAME * MAX_SOURCE_FACTOR)


def rule_size(model_nm: Size | None, voxel_size_nm: Size) -> Size | None:
    """The voxel size in which rules count voxels, the model's; None where that is, or counts as, a run's own.

    >>> rule_size((5.0, 5.0, 5.0), (6.0, 6.0, 6.0)), rule_size((5.0, 5.0, 5.0), (5.0, 5.0, 5.01))
    ((5.0, 5.0, 5.0), None)
    """
    return model_nm if model_nm and not 0.99 < prod(voxel_size_nm) / prod(model_nm) < 1.01 else None


def scaled_rules(rules: Stitch, rule_nm: Size | None, voxel_size_nm: Size) -> Stitch:
    """The rules, which count voxels of ``rule_nm``, in voxels of a run; None leaves them as they are.

    >>> scaled_rules(Stitch(min_voxels=500), (5.0, 5.0, 5.0), (10.0, 10.0, 10.0)).min_voxels
    63
    """
    return rules.model_copy(update=_scaled_counts(rules, rule_nm, voxel_size_nm))


def rules_note(rules: Stitch, rule_nm: Size | None, voxel_size_nm: Size) -> str:
    """What `scaled_rules` changes, in words; "" for nothing."""
    scaled = _scaled_counts(rules, rule_nm, voxel_size_nm)
    said = ", ".join(f"stitch.{name} = {getattr(rules, name)} are {count}" for name, count in scaled.items())
    return f"voxels of rules are the model's, {_text(rule_nm)} nm: here {said}" if scaled else ""


def _scaled_counts(rules: Stitch, rule_nm: Size | None, voxel_size_nm: Size) -> dict[str, int]:
    if rule_nm is None:
        return {}
    ratio = prod(b / a for a, b in zip(voxel_size_nm, rule_nm, strict=True))
    values = {name: int(getattr(rules, name)) for name in ("min_voxels", "max_voxels", "fill_holes_voxels")}
    return {name: ceil(count * ratio) for name, count in values.items() if count}
