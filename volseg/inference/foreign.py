"""Networks that were made elsewhere: an ONNX file or a bioimage.io package becomes a model file, with a card, in the cache.

What is told of a network is believed; what is not told is found out with a try, and what stays open is refused rather than
guessed: a wrong activation or channel would give labels that look right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg.errors import UserError
from volseg.inference import backends, cache, model, onnx_graph
from volseg.inference.bioimage import description_file, read_package
from volseg.inference.description import Description, of_card
from volseg.inference.model_card import MAX_SECTIONS, ModelCard
from volseg.inference.onnx_graph import Step
from volseg.io.probabilities import CHANNEL_NAMES

if TYPE_CHECKING:
    from onnx import ModelProto

VERSION = 1  # of what is made here: another number makes all anew
TRIED_MULTIPLES = (32, 64, 128, 256)  # of the tile sizes of a network that does not tell which it takes
NEAR = 1e-3  # beyond 0 and 1, where a value still counts as a probability
DEFAULT_OVERLAP = 64
# Words in the names of channels; what has none of them is the mask where it is the only one left.
CONTOUR_WORDS = ("boundar", "contour", "border", "edge", "membrane")
BACKGROUND_WORDS = ("background", "bg")
DISTANCE_WORDS = ("distance",)
COLOR_NAMES = {"red", "green", "blue", "r", "g", "b"}


def as_model_file(path: Path, outputs: Sequence[str] = (), activation: str = "auto") -> Path:
    """The model file, in the cache, that is made of an ONNX file or a bioimage.io package (zip, folder, or its yaml file).

    Parameters
    ----------
    path
        What was given.
    outputs, activation
        As `Predict` has them, for what nothing tells.

    Raises
    ------
    UserError
        It is none, or does not fit: one line says what does not.
    """
    key = hashlib.sha256(repr((VERSION, outputs, activation)).encode())
    try:
        for file in _files(path):
            key.update(file.name.encode())
            key.update(file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read model file {path}: {error.strerror or error}; {model.ADVICE}") from None
    made = cache.folder() / f"{key.hexdigest()[:32]}.imported"
    if not made.is_file():
        cache.store(made, _imported(path, outputs, activation))
    if not made.is_file():
        raise UserError(
            f"cannot keep what is made of {path} in {cache.folder()}; set VOLSEG_CACHE to a folder that can be written"
        )
    return made


def _files(path: Path) -> Iterator[Path]:
    """The files that decide what a model is, in order."""
    if path.is_dir() or path.suffix.lower() in (".yaml", ".yml"):
        folder = description_file(path).parent
        yield from sorted(file for file in folder.rglob("*") if file.is_file())
    elif path.suffix.lower() == ".zip":
        yield path
    else:  # what it keeps beside it, too
        yield from sorted({path, *path.parent.glob(f"{path.name}.*"), *path.parent.glob(f"{path.stem}*data")})


def _imported(path: Path, outputs: Sequence[str], activation: str) -> bytes:
    """The model file that is made of a network from elsewhere."""
    from safetensors.numpy import save

    if path.suffix.lower() == ".onnx":
        proto = onnx_graph.load(path)
        described = _described(path, proto)
    else:
        proto, described = read_package(path)
    graph, card = _fitted(path, proto, described, outputs, activation)
    return save({model.GRAPH: np.frombuffer(graph, np.uint8)}, metadata={model.KEY: card.text})


def _described(path: Path, proto: ModelProto) -> Description:
    """What an ONNX file tells of itself: all, where volseg exported it."""
    text = onnx_graph.metadata(proto).get(onnx_graph.CARD)
    if text is None:
        return Description(path.name, "what an ONNX file without a description was made for")
    card = ModelCard.parse(text, f"{path}: the card in its metadata")
    return of_card(Description(card.name), card)


# ---------------------------------------------------------------- does it fit


def _fitted(
    path: Path, proto: ModelProto, told: Description, names: Sequence[str], activation: str
) -> tuple[bytes, ModelCard]:
    """The graph as volseg runs it, and its card."""
    sections, told = _sections(path, proto, told)
    plain: dict[str, Any] = {"sections": sections, "depth": told.depth, "before": told.before}
    raw, told = _tried(path, proto, told, plain)
    kind, after = _activation(path, proto, raw, told, activation)
    channels = _channels(path, raw.shape[1], tuple(names) or told.outputs, kind)
    heads = tuple(name for name in CHANNEL_NAMES if name in channels or name == "contour")
    picks = [channels.get(name) for name in heads]
    graph = onnx_graph.adapted(proto, **plain, after=after, channels=picks)
    values = _run(graph, sections, (told.multiple, told.multiple))
    if not (np.isfinite(values).all() and values.min() >= -NEAR and values.max() <= 1 + NEAR):
        raise UserError(
            f"{path} gives values from {values.min():.3g} to {values.max():.3g} where probabilities are wanted: set "
            "predict.activation to sigmoid or softmax"
        )
    return graph, _card(path, told, sections, heads, channels, kind)


def _sections(path: Path, proto: ModelProto, told: Description) -> tuple[int, Description]:
    """How many sections a tile has, and what is told with the depth of a network in three dimensions."""
    given = onnx_graph.inputs(proto)
    if len(given) != 1:
        names = ", ".join(one.name for one in given)
        raise UserError(f"{path} takes {len(given)} inputs ({names}); volseg gives one, the image")
    shape, dims = given[0].shape, len(given[0].shape)
    if not given[0].floats or dims not in (4, 5):
        raise UserError(
            f"{path} takes a tensor of {dims} axes{'' if given[0].floats else ' that holds no floats'}; volseg gives floats: "
            "batch, channel, y, x or batch, channel, z, y, x"
        )
    if colors := sorted(COLOR_NAMES & {name.lower() for name in told.inputs}):
        raise UserError(f"{path} takes color images (channels {', '.join(colors)}); volseg gives gray sections")
    if dims == 4:
        sections = len(told.inputs) or shape[1] or 1
        if sections % 2 == 0 or sections > MAX_SECTIONS:
            raise UserError(
                f"{path} takes {sections} channels; volseg gives an odd number of sections as channels, {MAX_SECTIONS} at most"
            )
        return sections, told
    if max(shape[1], len(told.inputs)) > 1:
        raise UserError(
            f"{path} takes {max(shape[1], len(told.inputs))} channels in three dimensions; volseg gives one"
        )
    depth = shape[2] or told.depth
    if not depth:
        raise UserError(f"{path} does not say how many sections it takes; export it with a fixed depth, such as 16")
    sections = depth if depth % 2 else depth + 1
    if sections > MAX_SECTIONS:
        raise UserError(
            f"{path} takes {depth} sections at once; volseg gives {MAX_SECTIONS} at most: predict elsewhere, and give the "
            "probabilities to volseg segment"
        )
    return sections, replace(told, depth=depth)


def _tried(path: Path, proto: ModelProto, told: Description, plain: dict) -> tuple[np.ndarray, Description]:
    """What the network gives for noise, all channels as they are, and what is told with the tile sizes that it takes."""
    rows, columns = onnx_graph.inputs(proto)[0].shape[-2:]
    if rows and columns:
        if rows != columns:
            raise UserError(
                f"{path} takes tiles of {rows} x {columns} alone; volseg gives squares: export it with free sizes"
            )
        told = replace(told, multiple=rows, fixed=True)
    sizes = [(told.multiple, told.multiple if told.fixed else 2 * told.multiple)] if told.multiple else [
        (n, 2 * n) for n in TRIED_MULTIPLES
    ]  # fmt: skip
    graph, reason = onnx_graph.adapted(proto, **plain), ""
    for size in sizes:
        try:
            raw = _run(graph, plain["sections"], size)
        except Exception as error:  # OpenVINO's, and what a network of another size raises inside
            reason = " ".join(str(error).split())[-160:]
            continue
        if raw.ndim == 4 and raw.shape[2:] == size:
            return raw, replace(told, multiple=size[0])
        reason = f"it gives {' x '.join(map(str, raw.shape))} for a tile of {size[0]} x {size[1]}"
    raise UserError(f"{path} does not run as volseg runs networks, an output as large as the tile: {reason}")


def _run(graph: bytes, sections: int, size: tuple[int, int]) -> np.ndarray:
    """What a graph gives for noise."""
    shape = (1, sections, *size)
    return backends.load(graph, "openvino", "fp32", shape)(
        np.random.default_rng(0).normal(size=shape).astype(np.float32)
    )


def _activation(
    path: Path, proto: ModelProto, raw: np.ndarray, told: Description, asked: str
) -> tuple[str, tuple[Step, ...]]:
    """What makes the outputs probabilities (none, sigmoid, softmax), and the steps after the network."""
    named = [step[0] for step in told.after if step[0] in ("sigmoid", "softmax")]
    if asked != "auto":
        steps = tuple(step for step in told.after if step[0] not in ("sigmoid", "softmax"))
        return asked, (*((asked,) for _ in range(asked != "none")), *steps)
    if named:
        return named[-1], told.after
    inside = onnx_graph.last_activation(proto.graph)
    if inside or told.card:
        return inside or "sigmoid", told.after
    if raw.min() >= -NEAR and raw.max() <= 1 + NEAR:
        raise UserError(
            f"{path} ends in no sigmoid or softmax, yet gave values from 0 to 1 for noise: say with predict.activation = "
            "'none', 'sigmoid' or 'softmax' what makes its outputs probabilities"
        )
    if raw.shape[1] > 1:
        raise UserError(
            f"{path} gives {raw.shape[1]} channels that are no probabilities: say with predict.activation = 'sigmoid' or "
            "'softmax' what makes them so"
        )
    return "sigmoid", (("sigmoid",), *told.after)


def _channels(path: Path, count: int, names: tuple[str, ...], activation: str) -> dict[str, int]:
    """The channel of each head.

    >>> _channels(Path("a.onnx"), 3, ("Background", "cells", "cell boundary"), "softmax")
    {'mask': 1, 'contour': 2}
    """
    if names and len(names) != count:
        raise UserError(f"{path} gives {count} channels, and {len(names)} are named: {', '.join(names)}")
    if count == 1 and not (names and _role(names[0])):
        return {"mask": 0}
    if count == 2 and activation == "softmax" and not any(map(_role, names)):
        return {"mask": 1}  # the background comes first
    found: dict[str, int] = {}
    roles = [_role(name) for name in names]
    left = [i for i, role in enumerate(roles) if not role and names[i]]
    for i, role in enumerate(roles):
        role = role or ("mask" if [i] == left else "")
        if role in found:
            found = {}
            break
        if role in CHANNEL_NAMES:
            found[role] = i
    if "mask" not in found:
        said = (
            f"its {count} channels are named {', '.join(map(repr, names))}"
            if names
            else f"it names none of its {count} channels"
        )
        raise UserError(
            f"which channel of {path} is the mask is not clear, {said}: say so with predict.outputs, such as "
            "['', 'mask', 'contour']"
        )
    return {name: found[name] for name in CHANNEL_NAMES if name in found}


def _role(name: str) -> str:
    """What a channel of that name is; "" where only others tell."""
    low = name.lower()
    if low in ("mask", "foreground", "fg"):
        return "mask"
    for role, words in (("background", BACKGROUND_WORDS), ("contour", CONTOUR_WORDS), ("distance", DISTANCE_WORDS)):
        if any(word in low for word in words):
            return role
    return ""


# ---------------------------------------------------------------- its card


def _card(
    path: Path, told: Description, sections: int, heads: tuple[str, ...], channels: dict[str, int], activation: str
) -> ModelCard:
    """The card of a network from elsewhere: what volseg's own card says, else what is told and found."""
    graph = {
        "origin": _origin(path, told, sections, channels, activation), "heads": list(channels), "multiple": told.multiple,
        "fixed": told.fixed,
    }  # fmt: skip
    if told.normalize == "percentiles":
        graph["percentiles"] = list(told.percentiles)
    own = {key: value for key, value in (told.card or {}).items() if key not in ("int8", "decoder", "graph")}
    return ModelCard.from_json({
        "name": told.name[:1000], "use": told.use[:1000], "mean": told.mean, "std": told.std,
        "voxel_size_nm": told.voxel_size_nm, "decode": {"predict": _settings(told)} if _settings(told) else {},
        **own, "encoder": "onnx", "sections": sections, "binning": 1, "heads": list(heads), "graph": graph,
    })  # fmt: skip


def _settings(told: Description) -> dict[str, Any]:
    """Settings of ``[predict]`` that the network wants."""
    found: dict[str, Any] = {}
    if told.normalize == "fixed":
        found["normalize"] = "model"
    if told.fixed:
        found |= {"tile": told.multiple, "overlap": min(max(DEFAULT_OVERLAP, 2 * told.halo), told.multiple // 2)}
    elif 2 * told.halo > DEFAULT_OVERLAP:
        found["overlap"] = 2 * told.halo
    return found


def _origin(path: Path, told: Description, sections: int, channels: dict[str, int], activation: str) -> str:
    """How the network's inputs and outputs are understood, in a line."""
    sees = (
        f"{told.depth} sections at once, of which it keeps one" if told.depth else f"{sections} section(s) as channels"
    )
    gray = {
        "volume": "mean and deviation of the volume", "fixed": f"({told.mean:g} off, over {told.std:g})",
        "percentiles": "percentiles {:g} and {:g} of the volume".format(*told.percentiles),
    }[told.normalize]  # fmt: skip
    tells = ", ".join(f"{name} from channel {i}" for name, i in channels.items())
    size = f"{told.multiple}" if told.fixed else f"multiples of {told.multiple}"
    name = path.resolve().name[:200]
    return f"ONNX graph of {name}: {sees}, gray values by {gray}, tiles of {size}; {tells}; {activation}"
