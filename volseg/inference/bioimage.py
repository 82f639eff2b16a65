"""Packages of bioimage.io: a network as ONNX, and a YAML file that tells what goes in and comes out."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volseg.errors import UserError
from volseg.inference import onnx_graph
from volseg.inference.description import Description, common_multiple, of_card
from volseg.inference.model_card import ModelCard
from volseg.inference.onnx_graph import Step
from volseg.system import require

if TYPE_CHECKING:
    from onnx import ModelProto

NAMES = ("bioimageio.yaml", "rdf.yaml", "model.yaml")  # of the YAML file
MAX_PACKAGE_BYTES = 8 << 30  # of all files of a zip, unpacked
DEPTH = 16
NM = {
    "angstrom": 0.1, "picometer": 1e-3, "nanometer": 1.0, "micrometer": 1e3, "millimeter": 1e6,
}  # fmt: skip
AXES = (["batch", "channel", "y", "x"], ["batch", "channel", "z", "y", "x"])


def description_file(path: Path) -> Path:
    """The YAML file of a package in a folder, or that file itself."""
    if path.is_dir():
        found = [path / name for name in NAMES if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} is a folder without {NAMES[0]} or {NAMES[1]}: no bioimage.io package")
        return found[0]
    return path


def read_package(path: Path) -> tuple[ModelProto, Description]:
    """The graph of a package, and what it tells of it; nothing is fetched.

    Raises
    ------
    UserError
        It is no package of a model, its weights are not ONNX, or it wants what volseg does not do.
    """
    require("bioimageio", "onnx", extra="bioimageio")
    with _unpacked(path) as file:
        described = _load(file, path)
        if described.weights.onnx is None:
            kinds = ", ".join(name for name, entry in described.weights if entry is not None)
            raise UserError(
                f"{path} holds weights as {kinds}, and volseg runs ONNX: add that with bioimageio add-weights, or look for a "
                "version of the model that has it"
            )
        weights, told = file.parent / str(described.weights.onnx.source), described.weights.onnx.sha256
        if not weights.is_file():
            raise UserError(f"{path} holds no {weights.name}: download the whole package")
        if told and hashlib.sha256(weights.read_bytes()).hexdigest() != str(told):
            raise UserError(f"{weights.name} in {path} is not the file that its description names; download it again")
        return onnx_graph.load(weights), _description(path, described)


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """The YAML file of a package, for as long as it is looked at."""
    if path.suffix.lower() != ".zip":
        yield description_file(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                size = sum(one.file_size for one in archive.infolist())
                if size > MAX_PACKAGE_BYTES:
                    raise UserError(f"{path} unpacks to {size / 1e9:.1f} GB, more than any model is read from")
                archive.extractall(folder)
        except (OSError, zipfile.BadZipFile) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot read model file {path}: {reason}; download it again") from None
        try:
            yield description_file(Path(folder))
        except UserError:
            raise UserError(f"{path} is a zip file without {NAMES[0]} or {NAMES[1]}: no bioimage.io package") from None


def _load(file: Path, path: Path) -> Any:
    """The description, in the format of today."""
    with quiet():
        from bioimageio.spec import InvalidDescr, load_description
        from bioimageio.spec.model.v0_5 import ModelDescr

        found = load_description(file, format_version="latest", perform_io_checks=False)
    if isinstance(found, ModelDescr):
        return found
    if isinstance(found, InvalidDescr):
        first = next((error for detail in found.validation_summary.details for error in detail.errors), None)
        reason = (
            f"{'.'.join(map(str, first.loc))}: {' '.join(first.msg.split())[:160]}" if first else "it does not say why"
        )
        raise UserError(f"{path} has a description that bioimageio.spec refuses ({reason}); download it again")
    raise UserError(f"{path} describes a {found.type}, not a model")


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, bioimageio's libraries tell nothing."""
    from loguru import logger

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.disable("bioimageio")
        try:
            yield
        finally:
            logger.enable("bioimageio")


# ---------------------------------------------------------------- what is told


def _description(path: Path, described: Any) -> Description:
    given = [one for one in described.inputs if not one.optional]
    if len(given) != 1:
        raise UserError(
            f"{path} takes {len(given)} inputs ({', '.join(str(one.id) for one in given)}); volseg gives one, the image"
        )
    (tensor,) = given
    names = [str(axis.id) for axis in tensor.axes]
    if names not in AXES:
        raise UserError(
            f"{path} takes the axes {', '.join(names)}; volseg gives {', '.join(AXES[0])} or {', '.join(AXES[1])}"
        )
    axes = {str(axis.id): axis for axis in tensor.axes}
    (multiple, fixed), halo = _size(path, axes), max(_output(path, one, axes) for one in described.outputs)
    card = _own_card(described)
    told = Description(
        str(described.name), str(described.description or ""), after=_after(path, described.outputs),
        inputs=tuple(map(str, axes["channel"].channel_names)), outputs=_channel_names(described.outputs),
        depth=_depth(axes["z"]) if "z" in axes else 0, multiple=multiple, fixed=fixed, halo=halo,
        voxel_size_nm=_voxel_size_nm(axes), **_before(path, tensor.preprocessing),
    )  # fmt: skip
    return of_card(told, card) if card else told


def _own_card(described: Any) -> ModelCard | None:
    """The card of a package that volseg exported."""
    text = (getattr(described.config, "volseg", None) or {}).get("card")
    return ModelCard.parse(text, "the card in the package") if text else None


def _size(path: Path, axes: dict[str, Any]) -> tuple[int, bool]:
    """What tiles are multiples of, and whether just one size will do."""
    sizes = {name: axes[name].size for name in ("y", "x")}
    found = []
    for size in sizes.values():
        if isinstance(size, int):
            found.append((size, 0))
        elif hasattr(size, "step"):
            found.append((size.min, size.step))
        elif size.offset:
            raise UserError(f"{path} takes tiles whose sides differ by {size.offset}; volseg gives squares")
    if len(set(found)) != 1:
        raise UserError(f"{path} takes tiles with sides of other sizes along y and x; volseg gives squares")
    return common_multiple(*found[0])


def _depth(axis: Any) -> int:
    """How many sections a network in three dimensions is given: of those that it takes, the most up to `DEPTH`."""
    size = axis.size
    if isinstance(size, int):
        return size
    return size.min + size.step * max(0, (DEPTH - size.min) // size.step) if hasattr(size, "step") else 0


def _output(path: Path, tensor: Any, given: dict[str, Any]) -> int:
    """The halo of an output, which must be as large as the input."""
    names, halo = [str(axis.id) for axis in tensor.axes], 0
    if names != list(given):
        raise UserError(f"{path} gives the axes {', '.join(names)} for {', '.join(given)}; volseg wants the same ones")
    for axis in tensor.axes[2:]:
        other, size = given[str(axis.id)], axis.size
        same = size == other.size if isinstance(size, int) else not size.offset
        if not same or axis.scale != other.scale:
            raise UserError(
                f"{path} gives an output of another size along {axis.id} than its input; volseg wants the same"
            )
        halo = max(halo, getattr(axis, "halo", 0) if str(axis.id) != "z" else 0)
    return halo


def _channel_names(outputs: Any) -> tuple[str, ...]:
    """Of all outputs together; a lone channel of several outputs goes by the output's name."""
    names = []
    for tensor in outputs:
        own = [str(name) for name in tensor.axes[1].channel_names]
        names += [str(tensor.id)] if len(own) == 1 and len(outputs) > 1 else own
    return tuple(names)


def _voxel_size_nm(axes: dict[str, Any]) -> tuple[float, float, float] | None:
    """Of a network in three dimensions whose axes all have a unit."""
    if "z" not in axes or not all(axes[name].unit in NM for name in "zyx"):
        return None
    z, y, x = (axes[name].scale * NM[axes[name].unit] for name in "zyx")
    return z, y, x


def _before(path: Path, steps: Any) -> dict[str, Any]:
    """How gray values are standardized, and what is done to them then."""
    found: dict[str, Any] = {}
    rest: list[Step] = []
    for step in steps:
        kind, kwargs = step.id, step.kwargs
        if kind == "ensure_dtype":
            continue
        if kind == "zero_mean_unit_variance" and not rest:
            found = {"normalize": "volume"}
        elif kind == "scale_range" and not rest and not kwargs.reference_tensor:
            low, high = _percentiles(kwargs)
            found = {"normalize": "percentiles", "percentiles": (low, high)}
        elif kind == "fixed_zero_mean_unit_variance" and not found:
            found = {"normalize": "fixed", "mean": _one(path, kwargs.mean), "std": _one(path, kwargs.std)}
        elif kind == "scale_linear" and not found:
            gain, offset = _one(path, kwargs.gain), _one(path, kwargs.offset)
            found = {"normalize": "fixed", "mean": -offset / gain, "std": 1 / gain}
        elif kind in ("clip", "scale_linear") and found:
            rest.append(_step(path, kind, kwargs))
        else:
            raise UserError(f"{path} prepares images by {kind}, which volseg does not; export it without that step")
    return {**(found or {"normalize": "fixed"}), "before": tuple(rest)}


def _percentiles(kwargs: Any) -> tuple[float, float]:
    names = ("min_percentile", "max_percentile")
    low, high = (float(getattr(kwargs, name)) for name in names)
    return low, high


def _after(path: Path, outputs: Any) -> tuple[Step, ...]:
    """What is done to the outputs; a threshold is left out, since the watershed wants probabilities."""
    found = {tuple(_after_one(path, tensor.postprocessing)) for tensor in outputs}
    if len(found) != 1:
        raise UserError(f"{path} treats its outputs each in another way; volseg treats all alike")
    return found.pop()


def _after_one(path: Path, steps: Any) -> Iterator[Step]:
    for step in steps:
        kind = step.id
        if kind in ("sigmoid", "clip", "scale_linear"):
            yield _step(path, kind, getattr(step, "kwargs", None))
        elif kind == "softmax" and str(step.kwargs.axis) == "channel":
            yield ("softmax",)
        elif kind not in ("ensure_dtype", "binarize"):
            raise UserError(f"{path} treats its outputs by {kind}, which volseg does not; export it without that step")


def _step(path: Path, kind: str, kwargs: Any) -> Step:
    if kind == "sigmoid":
        return ("sigmoid",)
    if kind == "scale_linear":
        return ("linear", _one(path, kwargs.gain), _one(path, kwargs.offset))
    if kwargs.min_percentile is not None or kwargs.max_percentile is not None:
        raise UserError(f"{path} clips at percentiles, which volseg does not; export it without that step")
    return ("clip", kwargs.min, kwargs.max)


def _one(path: Path, value: Any) -> float:
    """A number, or all of several that are alike."""
    values = {float(one) for one in (value if isinstance(value, (list, tuple)) else [value])}
    if len(values) != 1:
        raise UserError(f"{path} treats channels each in another way ({sorted(values)}); volseg treats all alike")
    return values.pop()
