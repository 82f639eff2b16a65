"""Binning done outside of OpenVINO: the same bits as inside, and graphs that begin otherwise stay as they are."""

import numpy as np
import openvino as ov
import pytest
from openvino import opset13

from volseg.inference import export, model
from volseg.inference.pixel_shuffle import shuffle, unshuffle, without_shuffles

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
