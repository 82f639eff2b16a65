"""The pixel unshuffle at the beginning and the pixel shuffle at the end of a network that bins, outside of OpenVINO.

Such a network sees squares of voxels as one pixel, whose channels they are, and tells of each voxel at its end. OpenVINO
lays voxels out for that by generic loops and reorders, a fifth of all its time; here they go straight to where the first
convolution wants them, channels last, and come straight from where the last one left them. No bit changes.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    line = np.empty(columns // SIDE, np.uint32)  # two voxels side by side are one number
    for one, made in zip(np.ascontiguousarray(batch), out, strict=True):
        if half:
            _unshuffle_half(one.view(np.uint32), made.view(np.uint32), line)
        else:
            _unshuffle(one.view(np.uint64), made.view(np.uint64))
    return out


def standardized_squares(
    sections: Sequence[np.ndarray], corner: tuple[int, int], scale: tuple[float, float], out: np.ndarray
) -> None:
    """``out`` holds a tile of gray voxels, less a mean and times an inverse deviation, as `unshuffle` makes it of one.

    Parameters
    ----------
    sections
        Of one shape and type, rows one after the other in memory; the tile lies inside.
    corner
        Row and column of its first voxel.
    scale
        See `normalization.scale`. Each step is rounded to float32, then to bfloat16.
    out
        bfloat16 as uint16, (Y / 2, X / 2, 4 sections).
    """
    mean, inverse = map(np.float32, scale)
    width = out.shape[1]
    voxels, pairs, line = (
        np.empty(SIDE * width, np.float32),
        np.empty((SIDE, width), np.uint32),
        np.empty(width, np.uint64),
    )
    bits, squares = voxels.view(np.uint32), out.view(np.uint64)  # a section's square is one number
    _standardize_half(tuple(sections), *corner, mean, inverse, voxels, bits, pairs, line, squares)


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


def shuffle_uint8(made: np.ndarray) -> np.ndarray:
    """What `shuffle` gives, as uint8: 255 for 1, halves round up. In one go, it takes a third of the time.

    >>> shuffle_uint8(np.float32([0, 0.5, 1, 2]).reshape(1, 1, 1, 4)).tolist()
    [[[[0, 128], [255, 255]]]]
    """
    count, rows, columns, channels = made.shape
    out = np.empty((count, channels // SIDE**2, rows * SIDE, columns * SIDE), np.uint8)
    line = np.empty(columns * channels, np.uint8)
    for one, voxels in zip(np.ascontiguousarray(made), out, strict=True):
        flat = one.reshape(rows, columns * channels)
        _shuffle_uint8_into(flat, line, line.view(np.uint16).reshape(columns, -1), voxels.view(np.uint16))
    return out


@njit(cache=True, nogil=True)
def _round_pairs(bits, out):
    """Bits of float32, two by two, as pairs of bfloat16; ties to even."""
    high, ties, one, half = np.uint32(0xFFFF0000), np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
    for x in range(out.size):
        left, right = bits[2 * x], bits[2 * x + 1]
        left = (left + ties + ((left >> half) & one)) >> half
        out[x] = left | ((right + ties + ((right >> half) & one)) & high)


@njit(cache=True, nogil=True)
def _lay(line, out, k):
    """Pairs of a row of squares become their pairs ``k``: a loop by itself, as its neighbors are, which is much faster."""
    for x in range(line.size):
        out[x, k] = line[x]


@njit(cache=True, nogil=True)
def _standardize_row(gray, mean, inverse, out):
    for x in range(out.size):
        out[x] = (np.float32(gray[x]) - mean) * inverse


@njit(cache=True, nogil=True)
def _join(top, bottom, out):
    for x in range(out.size):
        out[x] = np.uint64(top[x]) | (np.uint64(bottom[x]) << np.uint64(32))


@njit(cache=True, nogil=True)
def _standardize_half(sections, y0, x0, mean, inverse, voxels, bits, pairs, line, out):
    """``voxels`` and ``bits`` are the same memory, room for a row; ``pairs`` for those of two, ``line`` for their squares."""
    for y in range(out.shape[0]):
        for k in range(out.shape[2]):
            for i in range(SIDE):
                gray = sections[k][y0 + SIDE * y + i]
                _standardize_row(gray[x0 : x0 + voxels.size], mean, inverse, voxels)
                _round_pairs(bits, pairs[i])
            _join(pairs[0], pairs[1], line)
            _lay(line, out[y], k)


@njit(cache=True, nogil=True)
def _unshuffle_half(voxels, out, line):
    """As `_unshuffle`, from bits of float32 (sections, Y, X) to pairs of bfloat16."""
    for y in range(out.shape[0]):
        for k in range(out.shape[2]):
            _round_pairs(voxels[k // SIDE, SIDE * y + k % SIDE], line)
            _lay(line, out[y], k)


@njit(cache=True, nogil=True)
def _unshuffle(pairs, out):
    """Pairs (sections, Y, X / 2) to (Y / 2, X / 2, 2 sections)."""
    for y in range(out.shape[0]):
        for k in range(out.shape[2]):
            _lay(pairs[k // SIDE, SIDE * y + k % SIDE], out[y], k)


@njit(cache=True, nogil=True)
def _shuffle_into(pairs, out):
    for y in range(pairs.shape[0]):
        for k in range(pairs.shape[2]):
            of, to = pairs[y], out[k // SIDE, SIDE * y + k % SIDE]
            for x in range(to.size):
                to[x] = of[x, k]


@njit(cache=True, nogil=True)
def _quantize_row(probability, out):
    for x in range(out.size):
        share = min(max(probability[x], np.float32(0)), np.float32(1))
        out[x] = np.uint8(share * np.float32(255) + np.float32(0.5))


@njit(cache=True, nogil=True)
def _shuffle_uint8_into(made, line, pairs, out):
    """``line`` and ``pairs`` are the same memory, room for a row of squares."""
    for y in range(made.shape[0]):
        _quantize_row(made[y], line)
        for k in range(pairs.shape[1]):
            to = out[k // SIDE, SIDE * y + k % SIDE]
            for x in range(to.size):
                to[x] = pairs[x, k]
