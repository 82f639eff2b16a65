"""The forms of a model file that backends read: an ONNX graph, an OpenVINO graph in int8, and one compiled for this CPU."""

from __future__ import annotations

import hashlib
import lzma
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from numcodecs import Zstd

from volseg.inference import cache, hardware, model
from volseg.inference.pixel_shuffle import without_shuffles
from volseg.system import require

XZ = b"\xfd7zXZ"  # how a form begins that was packed before 2026-11-23


def export_model(path: Path, backend: str, precision: str = "fp32") -> bytes:
    """What workers need to run a model file.

    Parameters
    ----------
    path
        The model file.
    backend, precision
        What runs it.

    Returns
    -------
    bytes
        For torch the file itself; for int8 the quantized graph that it carries, unpacked; else an ONNX graph with the
        sigmoid inside: the one that it holds, or one made once for each network and kept in the user's cache.

    Raises
    ------
    UserError
        The file is no model, carries no quantized form, or torch is not there to make the graph.
    """
    if precision == "int8":
        return unpack_int8(model.quantized(path))
    if model.load_card(path).graph:
        return model.graph(path)
    return path.read_bytes() if backend == "torch" else _onnx(path)


def pack_int8(xml: bytes, weights: bytes) -> bytes:
    """An OpenVINO graph as a model file carries it: the length of its xml (8 bytes, low first), xml, weights; as Zstandard."""
    return Zstd(22, checksum=True).encode(len(xml).to_bytes(8, "little") + xml + weights)


def unpack_int8(form: bytes) -> bytes:
    """A packed graph as workers read it: undone once for each run, not in each worker."""
    return lzma.decompress(form) if form.startswith(XZ) else bytes(Zstd().decode(form))


def _onnx(path: Path) -> bytes:
    """The model as ONNX with the sigmoid inside; made once for each network and kept in the user's cache."""
    require("torch", extra="torch")
    key = hashlib.sha256((model.network_digest(path) + metadata.version("torch")).encode()).hexdigest()[:32]
    cached = cache.folder() / f"{key}.onnx"
    with suppress(OSError):  # there is none, or it is not for us
        return cached.read_bytes()
    graph = _export(path)
    cache.store(cached, graph)
    return graph


def _export(path: Path) -> bytes:
    import io
    import warnings

    import torch

    network, card = model.load(path)
    network = torch.nn.Sequential(network, torch.nn.Sigmoid()).eval().requires_grad_(False)
    free = {0: "batch", 2: "y", 3: "x"}
    file = io.BytesIO()
    with warnings.catch_warnings():  # the newer exporter needs minutes for free axes, this one seconds
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.zeros(1, card.sections, 64, 96),),
            file,
            dynamo=False,
            input_names=["tiles"],
            output_names=["probability"],
            dynamic_axes={"tiles": free, "probability": free},
        )
    return file.getvalue()


def compile_openvino(blob: bytes, precision: str, shape: tuple[int, int, int, int], properties: dict) -> Any:
    """The network as OpenVINO compiles it for this CPU: once, for what it made is kept in the user's cache, after its hash.

    One that bins takes what `pixel_shuffle.unshuffle` makes and gives what `pixel_shuffle.shuffle` takes. All take what was
    exported, also who made it, so that no bit depends on who did.
    """
    import openvino as ov

    core = ov.Core()
    here = [
        ov.get_version(),
        core.get_property("CPU", "FULL_DEVICE_NAME"),
        sorted(hardware.cpu_flags()),
        precision,
        shape,
        properties,
        "without shuffles",
    ]
    cached = cache.folder() / f"{hashlib.sha256(blob + repr(here).encode()).hexdigest()[:32]}.openvino"
    with suppress(OSError):
        digest, made = (kept := cached.read_bytes())[:32], kept[32:]
        if hashlib.sha256(made).digest() == digest:
            return core.import_model(made, "CPU", properties)
    network = core.read_model(*_graph(blob, precision))
    network.reshape(list(shape))
    network = without_shuffles(network, half=properties["INFERENCE_PRECISION_HINT"] == "bf16")
    made = core.compile_model(network, "CPU", properties).export_model()
    made = made if isinstance(made, bytes) else made.getvalue()
    cache.store(cached, hashlib.sha256(made).digest() + made)
    return core.import_model(made, "CPU", properties)


def _graph(blob: bytes, precision: str) -> tuple[bytes, bytes]:
    """What OpenVINO reads: an ONNX graph, or the xml and weights of a quantized one."""
    if precision != "int8":
        return blob, b""
    end = 8 + int.from_bytes(blob[:8], "little")
    return blob[8:end], blob[end:]
