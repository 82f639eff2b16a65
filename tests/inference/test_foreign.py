"""Networks that were made elsewhere: what fits runs as its makers' library runs it, and what does not is refused in a line."""

import json
import shutil

import numpy as np
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

from tests.helpers import SMALL, Quiet, onnx_network, run_stages, settings, write_volume
from volseg import api
from volseg.config import Predict
from volseg.errors import UserError
from volseg.inference import backends, export, model, onnx_graph
from volseg.inference.description import common_multiple
from volseg.inference.model_card import ModelCard
from volseg.inference.model_file import model_file
from volseg.io import arrays
from volseg.planning import prepare

SHAPE = (3, 70, 90)
RNG = np.random.default_rng(5)
IMAGE = RNG.integers(60, 200, SHAPE).astype(np.uint8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VOLSEG_CACHE", str(tmp_path / "cache"))


def convolved(image, weights):
    """The convolution that `onnx_network` makes, of (channels, ...) with zeros around it."""
    from scipy.ndimage import correlate

    return np.stack([
        sum(correlate(plane, kernel, mode="constant") for plane, kernel in zip(image, one, strict=True)) for one in weights
    ])  # fmt: skip


def weights_of(path):
    (one,) = onnx_graph.load(path).graph.initializer
    return numpy_helper.to_array(one).astype(np.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def card_of(path, **predict):
    return model.load_card(model_file(Predict(model=str(path), **predict)))


def forward(path, tiles, **predict):
    """What the engine gets for tiles (batch, sections, y, x), by both backends."""
    file = model_file(Predict(model=str(path), **predict))
    by = [backends.load(export.export_model(file, b), b, "fp32", tiles.shape)(tiles) for b in ("openvino", "onnx")]
    np.testing.assert_allclose(*by, atol=1e-5)
    return by[0]


def tile(sections, edge=64):
    return np.random.default_rng(2).normal(size=(1, sections, edge, edge)).astype(np.float32)


# ---------------------------------------------------------------- ONNX files


@pytest.mark.parametrize(("last", "opset"), [(("Sigmoid",), 17), ((), 17), (("Sigmoid",), 11)])
def test_a_network_of_one_channel_is_the_mask_and_logits_become_probabilities(tmp_path, last, opset):
    path, tiles = onnx_network(tmp_path / "a.onnx", last=last, opset=opset), tile(1)
    made = forward(path, tiles)
    np.testing.assert_allclose(made[0, 0], sigmoid(convolved(tiles[0], weights_of(path)))[0], atol=1e-5)
    assert not made[0, 1].any(), "it tells of no contour"
    card = card_of(path)
    assert (card.heads, card.told_heads, card.sections, card.multiple) == (("mask", "contour"), ("mask",), 1, 32)
    assert card.graph.origin.endswith("mask from channel 0; sigmoid")


def test_channels_are_what_the_settings_say(tmp_path):
    path, tiles = onnx_network(tmp_path / "a.onnx", channels=3, inputs=3, last=("Softmax",)), tile(3)
    with pytest.raises(
        UserError, match=r"which channel of .* is the mask is not clear, it names none of its 3 channels"
    ):
        card_of(path)
    made = forward(path, tiles, outputs=("", "contour", "mask"))
    raw = np.exp(convolved(tiles[0], weights_of(path)))
    np.testing.assert_allclose(made[0], (raw / raw.sum(0))[[2, 1]], atol=1e-5)
    assert card_of(path, outputs=("", "contour", "mask")).sections == 3


def test_of_two_channels_of_a_softmax_the_background_comes_first(tmp_path):
    path, tiles = onnx_network(tmp_path / "a.onnx", channels=2, last=()), tile(1)
    with pytest.raises(UserError, match=r"gives 2 channels that are no probabilities: say with predict.activation"):
        card_of(path)
    raw = np.exp(convolved(tiles[0], weights_of(path)))
    made = forward(path, tiles, activation="softmax")
    np.testing.assert_allclose(made[0, 0], (raw / raw.sum(0))[1], atol=1e-5)


@pytest.mark.parametrize("depth", [4, 5])
def test_of_three_dimensions_the_section_in_the_middle_is_kept(tmp_path, depth):
    path, tiles = onnx_network(tmp_path / "a.onnx", dims=5, depth=depth), tile(5)
    assert card_of(path).sections == 5
    whole = sigmoid(convolved(tiles[0][None, :depth], weights_of(path)))
    np.testing.assert_allclose(forward(path, tiles)[0, 0], whole[0, 2], atol=1e-5)


def test_half_precision_and_one_size_fit(tmp_path):
    card = card_of(onnx_network(tmp_path / "a.onnx", size=(96, 96), dtype=np.float16))
    assert card.graph.fixed
    assert card.decode["predict"] == {"tile": 96, "overlap": 48}
    image = write_volume(str(tmp_path / "em.zarr"), IMAGE)
    with pytest.raises(UserError, match=r"predict.tile = 1280: this network takes tiles of 96 alone; set 96"):
        api.infer(
            image,
            str(tmp_path / "out.zarr"),
            model=tmp_path / "a.onnx",
            settings=["predict.tile=1280"],
            progress=Quiet(),
        )


REFUSED = {
    "takes 2 channels; volseg gives an odd number": {"inputs": 2},
    "takes a tensor of 3 axes; volseg gives floats": {"dims": 3, "size": ("x",)},
    "takes 2 channels in three dimensions": {"dims": 5, "inputs": 2},
    "does not say how many sections it takes": {"dims": 5, "depth": "z"},
    "takes 40 sections at once; volseg gives 31 at most": {"dims": 5, "depth": 40},
    "takes tiles of 64 x 96 alone; volseg gives squares": {"size": (64, 96)},
    "does not run as volseg runs networks, an output as large as the tile": {"last": ("Sigmoid", "GlobalAveragePool")},
    "yet gave values from 0 to 1 for noise: say with predict.activation": {"last": ("Sigmoid", "Sqrt")},
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_does_not_fit_is_refused_in_a_line(tmp_path, reason):
    path = onnx_network(tmp_path / "a.onnx", **REFUSED[reason])
    with pytest.raises(UserError, match=reason) as caught:
        card_of(path)
    assert "\n" not in str(caught.value)


def test_values_that_are_no_probabilities_are_refused(tmp_path):
    path = onnx_network(tmp_path / "a.onnx", last=())
    with pytest.raises(UserError, match=r"gives values from -.* where probabilities are wanted"):
        card_of(path, activation="none")


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "a.onnx").write_text("no graph")
    with pytest.raises(UserError, match=r"is not an ONNX file, or a damaged one"):
        card_of(tmp_path / "a.onnx")
    with pytest.raises(UserError, match=r"No such file"):
        card_of(tmp_path / "absent.onnx")
    with pytest.raises(UserError, match=r"predict.outputs and predict.activation describe ONNX files"):
        card_of(model.shipped(), outputs=("mask",))
    with pytest.raises(UserError, match=r"holds an ONNX graph, which runs but cannot be trained"):
        model.load(model_file(Predict(model=str(onnx_network(tmp_path / "b.onnx")))))


def test_torch_does_not_run_a_graph_and_int8_is_not_there(tmp_path):
    image = write_volume(str(tmp_path / "em.zarr"), IMAGE)
    path = onnx_network(tmp_path / "a.onnx")
    for setting, reason in (("backend='torch'", "does not run ONNX graphs"), ("precision='int8'", "no quantized form")):
        with pytest.raises(UserError, match=reason):
            api.infer(image, str(tmp_path / "out.zarr"), model=path, settings=[f"predict.{setting}"], progress=Quiet())


def test_a_mask_alone_has_no_contour_to_follow(tmp_path):
    image = write_volume(str(tmp_path / "em.zarr"), IMAGE)
    with pytest.raises(
        UserError, match=r"fragments.height = 'contour' follows a channel of contour, which this run lacks"
    ):
        api.infer(
            image, str(tmp_path / "out.zarr"), model=onnx_network(tmp_path / "a.onnx"), settings=["fragments.height='contour'"],
            progress=Quiet(),
        )  # fmt: skip


# ---------------------------------------------------------------- packages

AXES = [
    {"type": "batch"}, {"type": "channel", "channel_names": ["gray"]},
    *({"type": "space", "id": a, "size": {"min": 96, "step": 16}} for a in "yx"),
]  # fmt: skip
OUTPUT_AXES = [
    {"type": "batch"}, {"type": "channel", "channel_names": ["cells"]},
    *({"type": "space", "id": a, "size": {"tensor_id": "image", "axis_id": a}, "halo": 40} for a in "yx"),
]  # fmt: skip


def package(folder, *, before=(), after=(), axes=AXES, output_axes=OUTPUT_AXES, weights="onnx", **made):
    """A bioimage.io package in a folder, of the network that `onnx_network` makes."""
    folder.mkdir(exist_ok=True)
    onnx_network(folder / "model.onnx", **made)
    np.save(folder / "image.npy", np.zeros((1, 1, 96, 96), np.float32))
    described = {
        "format_version": "0.5.4", "type": "model", "name": "cells of others", "description": "Cells in sections",
        "authors": [], "license": "MIT", "tags": [], "cite": [{"text": "they", "doi": "10.1000/xyz123"}],
        "inputs": [{"id": "image", "axes": axes, "test_tensor": {"source": "image.npy"}, "preprocessing": list(before)}],
        "outputs": [{"id": "mask", "axes": output_axes, "test_tensor": {"source": "image.npy"}, "postprocessing": list(after)}],
        "weights": {weights: {"source": "model.onnx", **(
            {"opset_version": 17} if weights == "onnx" else {"pytorch_version": "2.0"})}},
    }  # fmt: skip
    (folder / "rdf.yaml").write_text(yaml.safe_dump(described))
    return folder


def step(kind, **kwargs):
    return {"id": kind, **({"kwargs": kwargs} if kwargs else {})}


CASES = {
    "percentiles": (
        [
            step("ensure_dtype", dtype="float32"),
            step("scale_range", min_percentile=1, max_percentile=99),
            step("clip", min=0, max=1),
        ],
        lambda x: np.clip((x - np.percentile(x, 1)) / (np.percentile(x, 99) - np.percentile(x, 1)), 0, 1),
    ),
    "fixed": ([step("fixed_zero_mean_unit_variance", mean=120, std=30)], lambda x: (x - 120) / 30),
    "linear": ([step("scale_linear", gain=1 / 255, offset=-0.5)], lambda x: x / 255 - 0.5),
    "volume": ([step("zero_mean_unit_variance")], lambda x: (x - x.mean()) / x.std()),
    "none": ([], lambda x: x),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_package_says_how_gray_values_are_prepared(tmp_path, case):
    pytest.importorskip("bioimageio.core")
    before, prepared = CASES[case]
    folder = package(tmp_path / "net", before=before, after=[step("sigmoid")], last=())
    image = np.repeat(np.repeat(IMAGE[:, :64, :64], 2, 1), 2, 2)[:1]  # every other row and column holds all values
    config = settings(predict={"model": str(folder), "tile": 192, **card_of(folder).decode.get("predict", {})})
    source = write_volume(str(tmp_path / "em.zarr"), image)
    run = prepare.from_image(prepare.volume.open(source), config, str(tmp_path / "run.zarr"))
    tiles = prepare.sampling.standardized(image, run.mean, run.std)[None]
    expected = sigmoid(convolved(prepared(image.astype(np.float64)), weights_of(folder / "model.onnx")))[0]
    np.testing.assert_allclose(forward(folder, tiles)[0, 0], expected, atol=2e-4)


def test_a_package_is_inferred_like_any_model(tmp_path):
    pytest.importorskip("bioimageio.core")
    folder = package(tmp_path / "net", before=[step("zero_mean_unit_variance")], after=[step("sigmoid")], last=())
    archive = shutil.make_archive(str(tmp_path / "net"), "zip", folder)
    card, other = card_of(folder), card_of(archive)
    assert (card.name, card.use, card.multiple) == ("cells of others", "Cells in sections", 96)
    assert card.decode == {"predict": {"overlap": 80}}
    assert other.changed(graph=None, decoder=list(SMALL)) == card.changed(graph=None, decoder=list(SMALL))
    image = write_volume(str(tmp_path / "em.zarr"), IMAGE)
    run, _ = run_stages(image, tmp_path / "out.zarr", predict={"model": archive, "tile": 192, "precision": "auto"})
    assert any("ONNX graph of net.zip: 1 section(s) as channels" in note for note in prepare.notes(run))
    assert str(run.engine) == "openvino fp32 on cpu"
    whole = (IMAGE - IMAGE.astype(np.float64).mean()) / IMAGE.astype(np.float64).std()
    expected = sigmoid(convolved(whole[:1], weights_of(folder / "model.onnx")))[0]
    got = arrays.node(run.out, "0")[0, 0][1:-7, 1:-7] / 255
    assert np.abs(got - expected[1:-7, 1:-7]).max() <= 1 / 255


def test_channels_go_by_their_names(tmp_path):
    pytest.importorskip("bioimageio.core")
    axes = [
        OUTPUT_AXES[0],
        {"type": "channel", "channel_names": ["background", "cells", "cell boundaries"]},
        *OUTPUT_AXES[2:],
    ]
    folder = package(tmp_path / "net", output_axes=axes, after=[step("softmax", axis="channel")], last=(), channels=3)
    assert card_of(folder).graph.origin.endswith("mask from channel 1, contour from channel 2; softmax")


def test_a_package_of_the_format_before_is_read_too(tmp_path):
    pytest.importorskip("bioimageio.core")
    onnx_network(tmp_path / "weights.onnx", channels=2)
    for name, channels in (("input.npy", 1), ("output.npy", 2)):
        np.save(tmp_path / name, np.zeros((1, channels, 128, 128), np.float32))
    (tmp_path / "README.md").write_text("# cells")
    tensor = {"axes": "bcyx", "data_type": "float32"}
    scaled = {"axes": "cyx", "mode": "per_sample", "min_percentile": 1, "max_percentile": 99.8}
    described = {
        "format_version": "0.4.10", "type": "model", "name": "cells before", "description": "cells", "license": "MIT",
        "authors": [{"name": "they"}], "cite": [{"text": "they", "doi": "10.1000/xyz123"}], "tags": [],
        "documentation": "README.md",
        "timestamp": "2022-01-01T00:00:00", "test_inputs": ["input.npy"], "test_outputs": ["output.npy"],
        "inputs": [{**tensor, "name": "raw", "shape": {"min": [1, 1, 128, 128], "step": [0, 0, 16, 16]},
                    "preprocessing": [{"name": "scale_range", "kwargs": scaled}]}],
        "outputs": [{**tensor, "name": "made", "halo": [0, 0, 48, 48],
                     "shape": {"reference_tensor": "raw", "offset": [0, 0.5, 0, 0], "scale": [1, 1, 1, 1]}}],
        "weights": {"onnx": {"source": "weights.onnx", "opset_version": 17}},
    }  # fmt: skip
    (tmp_path / "rdf.yaml").write_text(yaml.safe_dump(described))
    card = card_of(tmp_path, outputs=("contour", "mask"))
    assert (card.graph.percentiles, card.multiple, card.decode) == ((1.0, 99.8), 128, {"predict": {"overlap": 96}})
    assert "mask from channel 1, contour from channel 0; sigmoid" in card.graph.origin


def _changed(axes, at, **values):
    return [{**axis, **values} if i == at else axis for i, axis in enumerate(axes)]


UNFIT = {
    "holds weights as torchscript, and volseg runs ONNX": {"weights": "torchscript"},
    "takes color images": {"axes": _changed(AXES, 1, channel_names=["red", "green", "blue"]), "inputs": 3},
    "prepares images by binarize": {"before": [step("binarize", threshold=3)]},
    "clips at percentiles": {"before": [step("scale_range"), step("clip", min_percentile=2)]},
    "treats its outputs by zero_mean_unit_variance": {"after": [step("zero_mean_unit_variance")]},
    "an output of another size along y": {"output_axes": _changed(
        OUTPUT_AXES, 2, size={"tensor_id": "image", "axis_id": "y", "offset": -4}, halo=1)},
    "has a description that bioimageio.spec refuses": {"axes": AXES[:2]},
    "with sides of other sizes along y and x": {"axes": _changed(AXES, 2, size=112)},
}  # fmt: skip


@pytest.mark.parametrize("reason", UNFIT)
def test_a_package_that_does_not_fit_is_refused_in_a_line(tmp_path, reason):
    pytest.importorskip("bioimageio.core")
    folder = package(tmp_path / "net", **UNFIT[reason])
    with pytest.raises(UserError, match=reason) as caught:
        card_of(folder)
    assert "\n" not in str(caught.value)


def test_damaged_packages_are_refused(tmp_path):
    pytest.importorskip("bioimageio.core")
    folder = package(tmp_path / "net")
    text = (folder / "rdf.yaml").read_text()
    (folder / "rdf.yaml").write_text(
        text.replace("source: model.onnx", f"sha256: '{'0' * 64}'\n    source: model.onnx")
    )
    with pytest.raises(UserError, match=r"model.onnx in .* is not the file that its description names"):
        card_of(folder)
    (folder / "model.onnx").unlink()
    with pytest.raises(UserError, match=r"holds no model.onnx: download the whole package"):
        card_of(folder)
    (folder / "rdf.yaml").unlink()
    with pytest.raises(UserError, match=r"is a folder without bioimageio.yaml or rdf.yaml"):
        card_of(folder)
    archive = shutil.make_archive(str(tmp_path / "net"), "zip", folder)
    with pytest.raises(UserError, match=r"is a zip file without bioimageio.yaml or rdf.yaml"):
        card_of(archive)
    (tmp_path / "cut.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"cannot read model file .*cut.zip"):
        card_of(tmp_path / "cut.zip")


def test_sizes_without_a_common_multiple_become_one_size():
    assert common_multiple(32, 8) == (32, False)
    size, fixed = common_multiple(20, 16)
    assert fixed
    assert (size - 20) % 16 == 0


def test_a_card_of_an_older_model_still_wants_its_decoder():
    plain = {"name": "a", "encoder": "resnet18", "sections": 3, "heads": ["mask"], "mean": 0, "std": 1, "decode": {}}
    with pytest.raises(UserError, match=r"nothing about 'decoder'"):
        ModelCard.parse(json.dumps(plain))


def test_types_of_onnx_are_told_apart(tmp_path):
    (given,) = onnx_graph.inputs(onnx_graph.load(onnx_network(tmp_path / "a.onnx", size=(64, "x"))))
    assert given == onnx_graph.Tensor("image", (0, 1, 64, 0), True)
    assert helper.np_dtype_to_tensor_dtype(np.dtype(np.float16)) == TensorProto.FLOAT16
