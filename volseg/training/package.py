"""A model for others: as an ONNX file, or as a package of bioimage.io with a test that its libraries pass."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from volseg.box import Box
from volseg.config import Predict, local_path
from volseg.errors import UserError
from volseg.evaluation.synthetic import synth
from volseg.inference import backends, export, model, onnx_graph
from volseg.inference.bioimage import quiet
from volseg.inference.model_card import ModelCard
from volseg.inference.model_file import model_file
from volseg.inference.normalization import standardized
from volseg.io import files, volume
from volseg.system import require

EDGE = 128  # voxels a side of the section that a package is tested with, about


def export_model(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    image: str | os.PathLike | None = None,
    authors: tuple[str, ...] = (),
    license: str = "",
    overwrite: bool = False,
) -> Path:
    """Write a model as an ONNX file (``.onnx``) or as a bioimage.io package (``.zip``, or a folder), and try it.

    Both take gray values of ``card.sections`` neighboring sections as channels (batch, channel, y, x) and give the
    probabilities of the one in the middle. The package says how gray values are standardized, the ONNX file wants them
    standardized. Each holds the model's card, so that volseg reads it back with all that it knows.

    Parameters
    ----------
    path : path
        The model: a model file, ``"shipped"``, an ONNX file or a bioimage.io package.
    out : path
        What is written; its ending chooses the form.
    image : path, optional
        A volume, whose middle section the package is tested with; a synthetic one if not given.
    authors : tuple of str, optional
        Names, for the package.
    license : str, optional
        SPDX identifier such as ``"CC-BY-4.0"``, for the package.
    overwrite : bool
        Whether what is at ``out`` is replaced.

    Returns
    -------
    Path
        What was written.

    Raises
    ------
    UserError
        There is something at ``out``, or bioimageio.core finds something wrong with the package.

    Examples
    --------
    >>> export_model("shipped", "mitochondria.zip", authors=("Ada Lovelace",), license="BSD-3-Clause")  # doctest: +SKIP
    """
    name, out = os.fspath(path), Path(local_path(os.fspath(out)))
    source = model.shipped() if name == model.SHIPPED else model_file(Predict(model=name))
    card, graph = model.load_card(source), _graph(source)
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; give another name, or --overwrite")
    if out.suffix.lower() == ".onnx":
        files.write_atomic(out, graph)
        return out
    require("bioimageio", "onnxruntime", extra="bioimageio")
    with tempfile.TemporaryDirectory() as folder:
        described = _described(Path(folder), card, graph, _sample(card, image), authors, license)
        _save(described, out, Path(folder, "package.zip"))
    return out


def _graph(path: Path) -> bytes:
    """The network as ONNX, with its card."""
    require("onnx", extra="bioimageio")
    import onnx

    proto = onnx.load_from_string(export.export_model(path, "onnx"))
    card = {key: value for key, value in model.load_card(path).to_json().items() if key != "int8"}
    onnx.helper.set_model_props(proto, {onnx_graph.CARD: ModelCard.from_json(card).text})
    return proto.SerializeToString(deterministic=True)


def _sample(card: ModelCard, image: str | os.PathLike | None) -> np.ndarray:
    """Gray values to test with, float32 (sections, y, x)."""
    edge = card.multiple if card.graph and card.graph.fixed else -(-EDGE // card.multiple) * card.multiple
    shape = (card.sections, edge, edge)
    if image is None:
        return synth(Box.from_shape(shape), seed=0)[0].astype(np.float32)
    source = volume.open(os.fspath(image))
    if any(n < wanted for n, wanted in zip(source.shape, shape, strict=True)):
        raise UserError(f"{source.path} is smaller than the {' x '.join(map(str, shape))} voxels that the test takes")
    start = tuple((n - wanted) // 2 for n, wanted in zip(source.shape, shape, strict=True))
    return source.read(Box.from_shape(shape).shift(start)).astype(np.float32)


def _described(
    folder: Path, card: ModelCard, graph: bytes, sample: np.ndarray, authors: tuple[str, ...], license: str
) -> Any:
    """The package's description; the files that it names are written to ``folder``."""
    with quiet():
        from bioimageio.spec import model as spec
        from bioimageio.spec.common import FileDescr

        v5 = spec.v0_5
        kind, mean, std = _preprocessing(card, sample)
        (folder / "model.onnx").write_bytes(graph)
        (folder / "README.md").write_text(_readme(card), encoding="utf-8")
        np.save(folder / "image.npy", sample[None])
        forward = backends.load(graph, "openvino", "fp32", (1, *sample.shape))
        np.save(folder / "probability.npy", forward(standardized(sample, mean, std)[None]))
        size = _size(card)
        length = {"unit": "nanometer"} if card.voxel_size_nm else {}
        scales = dict(zip("yx", (card.voxel_size_nm or (1.0, 1.0, 1.0))[1:], strict=True))
        around = card.sections // 2
        given = [
            v5.BatchAxis(), v5.ChannelAxis(channel_names=[f"section {n:+d}" for n in range(-around, around + 1)]),
            *(v5.SpaceInputAxis(id=v5.AxisId(a), size=size, scale=scales[a], **length) for a in "yx"),
        ]  # fmt: skip
        made = [
            v5.BatchAxis(), v5.ChannelAxis(channel_names=list(card.heads)),
            *(
                v5.SpaceOutputAxis(
                    id=v5.AxisId(a), size=v5.SizeReference(tensor_id=v5.TensorId("image"), axis_id=v5.AxisId(a)),
                    scale=scales[a], **length,
                ) for a in "yx"
            ),
        ]  # fmt: skip
        return v5.ModelDescr(
            name=_plain(card.name),
            description=card.use[:1000] or "Probabilities of objects in sections of electron microscopy",
            authors=[v5.Author(name=name) for name in authors],
            license=license or None,
            cite=[],
            tags=["electron-microscopy", "instance-segmentation", "volseg"],
            documentation=FileDescr(source=folder / "README.md"),
            inputs=[v5.InputTensorDescr(
                id=v5.TensorId("image"), axes=given, test_tensor=FileDescr(source=folder / "image.npy"), preprocessing=[kind],
            )],
            outputs=[v5.OutputTensorDescr(
                id=v5.TensorId("probability"), axes=made, test_tensor=FileDescr(source=folder / "probability.npy"),
            )],
            weights=v5.WeightsDescr(
                onnx=v5.OnnxWeightsDescr(source=folder / "model.onnx", opset_version=_opset(graph))
            ),
            config=v5.Config.model_validate({"volseg": {"card": card.changed(int8=None).text}}),
        )  # fmt: skip


def _preprocessing(card: ModelCard, sample: np.ndarray) -> tuple[Any, float, float]:
    """How the package standardizes gray values, and what that comes to for the ``sample``: what is taken, and divided by."""
    from bioimageio.spec.model import v0_5

    if card.graph and card.graph.percentiles:
        low, high = (float(value) for value in np.percentile(sample, card.graph.percentiles))
        kwargs = dict(zip(("min_percentile", "max_percentile"), card.graph.percentiles, strict=True))
        return v0_5.ScaleRangeDescr(kwargs=v0_5.ScaleRangeKwargs(**kwargs)), low, high - low
    if card.decode.get("predict", {}).get("normalize") == "model":
        fixed = v0_5.FixedZeroMeanUnitVarianceKwargs(mean=card.mean, std=card.std)
        return v0_5.FixedZeroMeanUnitVarianceDescr(kwargs=fixed), card.mean, card.std
    return v0_5.ZeroMeanUnitVarianceDescr(), float(sample.mean()), float(sample.std())


def _size(card: ModelCard) -> Any:
    from bioimageio.spec.model import v0_5

    if card.graph and card.graph.fixed:
        return card.multiple
    return v0_5.ParameterizedSize(min=card.multiple, step=card.multiple)


def _opset(graph: bytes) -> int:
    import onnx

    return next(one.version for one in onnx.load_from_string(graph).opset_import if one.domain in ("", "ai.onnx"))


def _plain(name: str) -> str:
    """A name of the letters that bioimage.io allows."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "_+- ()") else "-" for c in name)[:128]
    return kept if len(kept) >= 5 else f"volseg {kept}"


def _readme(card: ModelCard) -> str:
    tested = "\n".join(f"- {name}: {values}" for name, values in card.scores.get("test", {}).items())
    return (
        f"# {card.name}\n\n{card.use}\n\nThe input is {card.sections} neighboring section(s) of gray values as channels, the "
        f"output the probability of {', '.join(card.told_heads)} in the one in the middle. Made with volseg, which turns such "
        "probabilities of a whole volume into instance labels: `volseg infer VOLUME --model PACKAGE`.\n\n"
        f"## Validation\n\n{tested or 'Nothing was measured.'}\n"
    )


def _save(described: Any, out: Path, packed: Path) -> None:
    """The package is at ``out``, once bioimageio.core has read it and found that its network gives what the test says."""
    with quiet():
        from bioimageio.core import test_description
        from bioimageio.spec import save_bioimageio_package

        save_bioimageio_package(described, output_path=packed)
        summary = test_description(packed, weight_format="onnx", devices=["CPUExecutionProvider"])
    if summary.status != "passed":
        reasons = [f"{'.'.join(map(str, one.loc))}: {one.msg}" for detail in summary.details for one in detail.errors]
        raise UserError(f"bioimageio.core does not pass the package: {' '.join('; '.join(reasons).split())[:400]}")
    if out.suffix.lower() == ".zip":
        files.write_atomic(out, packed.read_bytes())
        return
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.unpack_archive(packed, partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
