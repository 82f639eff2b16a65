"""An ONNX graph as volseg runs it: from ``tiles`` (batch, sections, y, x) to ``probability`` (batch, heads, y, x), float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg.errors import UserError
from volseg.system import require

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

PREFIX = "network/"  # of all names in the graph from elsewhere
CARD = "volseg"  # metadata entry that holds a model's card in a graph that volseg exported
PASSING = {"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Clip"}  # leave a probability one
Step = tuple  # ("linear", gain, offset), ("clip", lowest or None, highest or None), ("sigmoid",) or ("softmax",) over channels


@dataclass(frozen=True)
class Tensor:
    """What goes into a graph or comes out: its name, its sizes (0 where free), whether it holds floats."""

    name: str
    shape: tuple[int, ...]
    floats: bool


def load(path: Path) -> ModelProto:
    """The graph in a file, with what it keeps in files beside it; refuses what is none."""
    require("onnx", extra="bioimageio")
    import onnx

    try:
        proto = onnx.load(path)
        onnx.checker.check_model(proto)
    except Exception as error:  # of protobuf, or of the checker
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is not an ONNX file, or a damaged one ({reason}); export it again") from None
    return proto


def metadata(proto: ModelProto) -> dict[str, str]:
    """The entries that whoever exported a graph put in it."""
    return {entry.key: entry.value for entry in proto.metadata_props}


def inputs(proto: ModelProto) -> list[Tensor]:
    """What goes into a graph; constants do not."""
    constants = {one.name for one in proto.graph.initializer}
    return [_tensor(value) for value in proto.graph.input if value.name not in constants]


def outputs(proto: ModelProto) -> list[Tensor]:
    """What comes out of a graph."""
    return [_tensor(value) for value in proto.graph.output]


def _tensor(value: Any) -> Tensor:
    import onnx

    kind = value.type.tensor_type
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    return Tensor(value.name, tuple(dim.dim_value for dim in kind.shape.dim), kind.elem_type in floats)


def last_activation(graph: GraphProto) -> str:
    """ "sigmoid" or "softmax" where every output of a graph is made by that, and "" where none or not each is."""
    makers = {name: node for node in graph.node for name in node.output}
    found = set()
    for output in graph.output:
        node = makers.get(output.name)
        while node is not None and node.op_type in PASSING:
            node = makers.get(node.input[0])
        found.add(
            {"Sigmoid": "sigmoid", "HardSigmoid": "sigmoid", "Softmax": "softmax"}.get(node.op_type if node else "", "")
        )
    return found.pop() if len(found) == 1 else ""


def adapted(
    proto: ModelProto, *, sections: int, depth: int = 0, before: Sequence[Step] = (), after: Sequence[Step] = (),
    channels: Sequence[int | None] | None = None,
) -> bytes:  # fmt: skip
    """The graph from standardized tiles to probabilities.

    Parameters
    ----------
    proto
        A graph of one input, (batch, sections, y, x) or, of a network in three dimensions, (batch, 1, z, y, x).
    sections
        How many the tiles hold, one more than an even ``depth``: the middle one is then where volseg wants it.
    depth
        Sections that a network in three dimensions takes; of its output the one in the middle of the tile is kept.
    before, after
        What is done to the tiles, and to all channels of all outputs together.
    channels
        Which of these channels each head is, None for one that is 0; all as they are if not given.

    Returns
    -------
    bytes
        Its input is called ``tiles``, its output ``probability``; batch, y and x are free.
    """
    from onnx import TensorProto, compose, helper

    graph = _Graph(compose.add_prefix(proto, PREFIX))
    (given,) = inputs(graph.proto)
    kind = next(v.type.tensor_type.elem_type for v in graph.proto.graph.input if v.name == given.name)
    name = graph.steps("tiles", before)
    if depth:
        if depth != sections:
            name = graph.add("Gather", name, graph.constant(np.arange(depth)), axis=1)
        name = graph.unsqueeze(name, 1)
    nodes = [*graph.take(), helper.make_node("Cast", [name], [given.name], to=kind)]
    made = [graph.add("Cast", output.name, to=TensorProto.FLOAT) for output in outputs(graph.proto)]
    name = made[0] if len(made) == 1 else graph.add("Concat", *made, axis=1)
    if depth:
        name = graph.add("Gather", name, graph.constant(np.int64(sections // 2)), axis=2)
    name = graph.steps(name, after)
    if channels is not None:
        name = graph.add("Gather", name, graph.constant(np.array([channel or 0 for channel in channels])), axis=1)
        if None in channels:
            told = np.array([channel is not None for channel in channels], np.float32)
            name = graph.add("Mul", name, graph.constant(told[:, None, None]))
    graph.add("Identity", name, to_name="probability")
    model = graph.proto
    kept = [value for value in model.graph.input if value.name != given.name]
    tiles = helper.make_tensor_value_info("tiles", TensorProto.FLOAT, ["batch", sections, "y", "x"])
    heads = len(channels) if channels is not None else "channels"
    probability = helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["batch", heads, "y", "x"])
    nodes += [*model.graph.node, *graph.take()]
    for field, values in (
        ("node", nodes), ("input", [tiles, *kept]), ("output", [probability]), ("value_info", []),
        ("initializer", [*model.graph.initializer, *graph.constants]),
    ):  # fmt: skip
        values = list(values)
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(values)
    return model.SerializeToString(deterministic=True)


class _Graph:
    """A graph to which nodes are added, by names that count up."""

    def __init__(self, proto: ModelProto) -> None:
        self.proto, self.count = proto, 0
        self.nodes: list = []
        self.constants: list = []
        self.opset = next((one.version for one in proto.opset_import if one.domain in ("", "ai.onnx")), 17)

    def take(self) -> list:
        """The nodes that were added since the last time."""
        nodes, self.nodes = self.nodes, []
        return nodes

    def constant(self, value: np.ndarray) -> str:
        from onnx import numpy_helper

        self.count += 1
        self.constants.append(numpy_helper.from_array(np.asarray(value), f"volseg/{self.count}"))
        return f"volseg/{self.count}"

    def add(self, kind: str, *names: str, to_name: str = "", **attributes: Any) -> str:
        from onnx import helper

        self.count += 1
        made = to_name or f"volseg/{self.count}"
        self.nodes.append(helper.make_node(kind, list(names), [made], **attributes))
        return made

    def unsqueeze(self, name: str, axis: int) -> str:
        if self.opset < 13:
            return self.add("Unsqueeze", name, axes=[axis])
        return self.add("Unsqueeze", name, self.constant(np.array([axis])))

    def steps(self, name: str, steps: Sequence[Step]) -> str:
        """The tensor's name after these steps, all of which are the same in each version of ONNX since 2018."""
        for kind, *values in steps:
            if kind == "sigmoid":
                name = self.add("Sigmoid", name)
            elif kind == "softmax":  # along the last axis it has always been the same
                name = self.add("Transpose", name, perm=[0, 2, 3, 1])
                name = self.add("Transpose", self.add("Softmax", name, axis=3), perm=[0, 3, 1, 2])
            elif kind == "linear":
                gain, offset = (self.constant(np.float32(value)) for value in values)
                name = self.add("Add", self.add("Mul", name, gain), offset)
            else:
                for bound, value in zip(("Max", "Min"), values, strict=True):
                    name = name if value is None else self.add(bound, name, self.constant(np.float32(value)))
        return name
