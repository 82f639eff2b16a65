"""The pixel unshuffle at the beginning and the pixel shuffle at the end of a network that bins, outside of OpenVINO.

Such a network sees squares of voxels as one pixel, whose channels they are, and tells of each voxel at its end. OpenVINO
lays voxels out for that by generic loops and reorders, a fifth of all its time; here they go straight to where the first
convolution wants them, channels last, and come straight from where the last one left them. No bit changes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

SIDE = 2  # of a square, voxels
LAYING_OUT = ("Unsqueeze", "Reshape", "Transpose", "Squeeze", "SpaceToDepth")  # what an unshuffle may consist of


def without_shuffles(network: Any, half: bool) -> Any:
    """An OpenVINO ``network`` of static shape less its unshuffle and shuffle; itself where it does not begin and end so.

    Parameters
    ----------
    network
        From float32 (B, sections, Y, X) to probabilities (B, heads, Y, X). It is not to be used afterwards.
    half
        Whether it computes in bfloat16.

    Returns
    -------
    openvino.Model
        From what `unshuffle` makes to what `shuffle` takes.
    """
    import openvino as ov
    from openvino import opset13

    if len(network.get_parameters()) != 1 or len(network.get_results()) != 1:
        return network
    unshuffled, shuffle, activation = _unshuffled(network), *_shuffle(network)
    if unshuffled is None or shuffle is None:
        return network
    batch, channels, rows, columns = unshuffled.get_shape()
    kind = ov.Type.bf16 if half else ov.Type.f32
    squares = opset13.parameter([batch, rows, columns, channels], kind, name="squares")
    first = opset13.transpose(opset13.convert(squares, "f32") if half else squares, np.array([0, 3, 1, 2]))
    for consumer in list(unshuffled.get_target_inputs()):
        consumer.replace_source_output(first.output(0))
    last = shuffle.input(0).get_source_output()
    made = opset13.transpose(opset13.sigmoid(last) if activation else last, np.array([0, 2, 3, 1]))
    return ov.Model([opset13.result(made)], [squares], network.get_friendly_name())


def _unshuffled(network: Any) -> Any:
    """The output of a network's unshuffle; None where it has none."""
    import openvino as ov

    parameter = network.get_parameters()[0]
    output = parameter.output(0)
    if not output.get_partial_shape().is_static or len(output.get_shape()) != 4:
        return None
    shape = batch, sections, rows, columns = tuple(output.get_shape())
    wanted = (batch, sections * SIDE**2, rows // SIDE, columns // SIDE)
    while not output.get_partial_shape().is_static or tuple(output.get_shape()) != wanted:
        consumers = list(output.get_target_inputs())
        if len(consumers) != 1 or consumers[0].get_node().get_type_name() not in LAYING_OUT:
            return None
        output = consumers[0].get_node().output(0)
    voxels = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)  # not all differ, but neighbors do
    made = ov.Tensor(np.empty(wanted, np.float32))
    ov.Model([output], [parameter]).evaluate([made], [ov.Tensor(voxels)])
    squares = voxels.reshape(batch, sections, rows // SIDE, SIDE, columns // SIDE, SIDE).transpose(0, 1, 3, 5, 2, 4)
    return output if np.array_equal(made.data, squares.reshape(wanted)) else None


def _shuffle(network: Any) -> tuple[Any, bool]:
    """A network's shuffle (None: it has none), and whether a sigmoid follows."""
    node = network.get_results()[0].input(0).get_source_output().get_node()
    activation = node.get_type_name() == "Sigmoid"
    if activation:
        node = node.input(0).get_source_output().get_node()
    is_shuffle = node.get_type_name() == "DepthToSpace"
    if not is_shuffle or node.get_attributes() != {"block_size": SIDE, "mode": "depth_first"}:
        return None, activation
    return node, activation


def unshuffle(batch: np.ndarray, half: bool, out: np.ndarray | None = None) -> np.ndarray:
    """Squares of voxels as pixels, channels last.

    Parameters
    ----------
    batch
        float32 (B, sections, Y, X); even Y and X.
    half
        Whether to round to bfloat16, ties to even.
    out
        Where to, as it was returned before.

    Returns
    -------
    numpy.ndarray
        float32, or bfloat16 as uint16: (B, Y / 2, X / 2, 4 sections). The channels of one section are its upper left,
        upper right, lower left and lower right voxel.

    >>> unshuffle(np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2), half=False).tolist()
    [[[[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]]]]
    """
    count, sections, rows, columns = batch.shape
    kind = np.uint16 if half else np.float32
    if out is None:
        out = np.empty((count, rows // SIDE, columns // SIDE, sections * SIDE**2), kind)
    pair = np.uint32 if half else np.uint64  # two voxels side by side
    line = np.empty((sections * SIDE, columns // SIDE), pair)
    fill = _unshuffle_half if half else _unshuffle
    for one, made in zip(np.ascontiguousarray(batch), out, strict=True):
        fill(one.view(np.uint32 if half else pair), made.view(pair), line)
    return out


def shuffle(made: np.ndarray) -> np.ndarray:
    """The voxels of squares: the reverse of `unshuffle`, float32 (B, Y / 2, X / 2, 4 heads) to (B, heads, Y, X).

    >>> shuffle(np.arange(4, dtype=np.float32).reshape(1, 1, 1, 4)).tolist()
    [[[[0.0, 1.0], [2.0, 3.0]]]]
    """
    count, rows, columns, channels = made.shape
    out = np.empty((count, channels // SIDE**2, rows * SIDE, columns * SIDE), np.float32)
    for one, voxels in zip(np.ascontiguousarray(made), out, strict=True):
        _shuffle_into(one.view(np.uint64), voxels.view(np.uint64))
    return out


@njit(cache=True, nogil=True)
def _unshuffle_half(voxels, out, line):
    """As `_unshuffle`, from bits of float32 (sections, Y, X) to pairs of bfloat16."""
    high, ties, one, half = np.uint32(0xFFFF0000), np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
    for y in range(out.shape[0]):
        for k in range(line.shape[0]):
            of, to = voxels[k // SIDE, SIDE * y + k % SIDE], line[k]
            for x in range(to.size):
                left, right = of[2 * x], of[2 * x + 1]
                left = (left + ties + ((left >> half) & one)) >> half
                to[x] = left | ((right + ties + ((right >> half) & one)) & high)
        for x in range(out.shape[1]):
            for k in range(line.shape[0]):
                out[y, x, k] = line[k, x]


@njit(cache=True, nogil=True)
def _unshuffle(pairs, out, line):
    """Pairs (sections, Y, X / 2) to (Y / 2, X / 2, 2 sections); ``line`` is room for those of one row of squares."""
    for y in range(out.shape[0]):
        for k in range(line.shape[0]):
            line[k] = pairs[k // SIDE, SIDE * y + k % SIDE]
        for x in range(out.shape[1]):
            for k in range(line.shape[0]):
                out[y, x, k] = line[k, x]


@njit(cache=True, nogil=True)
def _shuffle_into(pairs, out):
    for y in range(pairs.shape[0]):
        for k in range(pairs.shape[2]):
            of, to = pairs[y], out[k // SIDE, SIDE * y + k % SIDE]
            for x in range(to.size):
                to[x] = of[x, k]
