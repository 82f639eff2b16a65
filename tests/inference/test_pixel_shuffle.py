"""Binning done outside of OpenVINO: the same bits as inside, and graphs that begin otherwise stay as they are."""

import numpy as np
import openvino as ov
import pytest
from openvino import opset13

from volseg.inference import backends, export, model, tiles
from volseg.inference.pixel_shuffle import (
    shuffle,
    shuffle_uint8,
    standardized_squares,
    unshuffle,
    without_shuffles,
)
from volseg.inference.sections import predict_sections_uint8

SHAPE = (1, 3, 128, 192)


def _network(precision):
    blob = export.export_model(model.shipped(), "openvino", precision)
    network = ov.Core().read_model(*export._graph(blob, precision))
    network.reshape(list(SHAPE))
    return network


def _infer(network, hint, tensor):
    properties = {"INFERENCE_PRECISION_HINT": hint, "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": 1}
    request = ov.Core().compile_model(network, "CPU", properties).create_infer_request()
    request.infer({0: tensor})
    return request.get_output_tensor(0).data.copy()


@pytest.mark.parametrize(("precision", "hint"), [("int8", "bf16"), ("int8", "f32"), ("fp32", "f32")])
def test_bits_are_those_of_the_whole_graph(precision, hint):
    if precision == "fp32":
        pytest.importorskip("torch", reason="makes the graph")
    batch, half = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32), hint == "bf16"
    whole = _infer(_network(precision), hint, batch)
    network = _network(precision)
    less = without_shuffles(network, half)
    assert less is not network
    squares = unshuffle(batch, half)
    made = _infer(less, hint, ov.Tensor(squares, squares.shape, ov.Type.bf16 if half else ov.Type.f32))
    assert np.array_equal(shuffle(made), whole)


def test_squares_are_those_of_torch():
    torch = pytest.importorskip("torch")
    batch = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 3, 6, 10)).astype(np.float32))
    squares = torch.nn.PixelUnshuffle(2)(batch)
    last = squares.permute(0, 2, 3, 1).contiguous()
    assert np.array_equal(unshuffle(batch.numpy(), half=False), last.numpy())
    rounded = last.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    again = np.empty_like(rounded)
    assert unshuffle(batch.numpy(), half=True, out=again) is again
    assert np.array_equal(again, rounded)
    assert np.array_equal(shuffle(last.numpy()), torch.nn.PixelShuffle(2)(squares).numpy())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_gray_voxels_become_squares_at_once(dtype):
    sections = [np.random.default_rng(z).integers(0, 120, (20, 30)).astype(dtype) for z in range(3)]
    scale, made = (57.3, 0.0213), np.empty((6, 8, 12), np.uint16)
    standardized_squares(sections, (4, 6), scale, made)
    tile = np.empty((1, 3, 12, 16), np.float32)
    for section, out in zip(sections, tile[0], strict=True):
        tiles.NUMPY.standardize_into(section[4:16, 6:22], out, *scale)
    assert np.array_equal(made, unshuffle(tile, half=True)[0])


def test_stored_values_are_the_same_in_one_go():
    made = np.random.default_rng(2).uniform(-0.1, 1.1, (2, 5, 7, 8)).astype(np.float32)
    made.flat[:256] = np.arange(256, dtype=np.float32) / 255 + np.float32(0.5 / 255)
    want = np.empty((2, 2, 10, 14), np.uint8)
    for whole, out in zip(shuffle(made), want, strict=True):
        tiles.NUMPY.quantize(whole, np.ones(whole.shape[1:], np.float32), out)
    assert np.array_equal(shuffle_uint8(made), want)


@pytest.mark.parametrize("plane", [(128, 192), (200, 150), (128, 128), (120, 70)])
def test_sections_are_the_same_by_squares_and_by_tiles(plane):
    """Planes of several tiles and of one, which may reach past the end."""
    voxels = np.random.default_rng(5).integers(0, 255, (4, *plane), np.uint8)
    grid, slab = tiles.grid(plane, 128, 16, 64), tiles.Slab(voxels, (0, 0, 0), 1, 4)
    blob = export.export_model(model.shipped(), "openvino", "int8")
    forward = backends.load(blob, "openvino", "int8", (1, 3, *grid.size))
    call = backends.network(blob, "openvino", "int8", (1, 3, *grid.size))
    given = {"grid": grid, "heads": 2, "scale": (120.0, 0.02)}
    assert not backends.takes_squares(forward)
    want = predict_sections_uint8(forward, slab, range(4), **given)
    assert np.array_equal(predict_sections_uint8(call, slab, range(4), **given), want)


def _graph(order, mode):
    """Unshuffle, some arithmetic, shuffle; ``order``: of an unshuffle's axes."""
    voxels = opset13.parameter([1, 1, 4, 6], np.float32)
    cells = opset13.reshape(voxels, [1, 1, 2, 2, 3, 2], special_zero=False)
    squares = opset13.reshape(opset13.transpose(cells, np.array(order)), [1, 4, 2, 3], special_zero=False)
    doubled = opset13.multiply(squares, np.float32(2))
    made = opset13.sigmoid(opset13.depth_to_space(doubled, mode, 2))
    return ov.Model([opset13.result(made)], [voxels], "graph")


@pytest.mark.parametrize(
    ("order", "mode", "changed"),
    [
        ((0, 1, 3, 5, 2, 4), "depth_first", True),
        ((0, 1, 5, 3, 2, 4), "depth_first", False),
        ((0, 1, 3, 5, 2, 4), "blocks_first", False),
    ],
)
def test_graphs_that_lay_squares_out_otherwise_stay(order, mode, changed):
    network = _graph(order, mode)
    assert (without_shuffles(network, half=False) is not network) == changed


def test_a_graph_without_squares_stays():
    voxels = opset13.parameter([1, 3, 8, 8], np.float32)
    network = ov.Model([opset13.result(opset13.sigmoid(voxels))], [voxels], "plain")
    assert without_shuffles(network, half=True) is network


def test_graphs_of_other_axes_or_outputs_stay():
    deep = opset13.parameter([1, 1, 4, 8, 8], np.float32)
    network = ov.Model([opset13.result(opset13.sigmoid(deep))], [deep], "deep")
    assert without_shuffles(network, half=False) is network
    voxels = opset13.parameter([-1, 1, -1, -1], np.float32)
    network = ov.Model([opset13.result(opset13.sigmoid(voxels))], [voxels], "free")
    assert without_shuffles(network, half=False) is network
    network = ov.Model([opset13.result(opset13.sigmoid(voxels)), opset13.result(voxels)], [voxels], "two")
    assert without_shuffles(network, half=False) is network
