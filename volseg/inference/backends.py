"""The network as a function from a batch of tiles to probabilities, on whatever runs it fastest here.

The promise includes the forward pass, so each backend is held to one arithmetic: one thread for each tile on a CPU
(several tiles run side by side), a constant padded batch, deterministic kernels on CUDA. So ONNX Runtime is not given its
TensorRT provider: that chooses kernels by timing them on each machine anew, and two workers could differ in bits.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg.errors import UserError
from volseg.inference import export, hardware, model
from volseg.inference.device import NUMPY, Call, Device, TorchDevice, as_cuda_graph, row_by_row
from volseg.inference.pixel_shuffle import shuffle, shuffle_uint8, unshuffle
from volseg.system import installed

if TYPE_CHECKING:
    import torch

Forward = Callable[
    [np.ndarray], np.ndarray
]  # (B, sections, Y, X) float32, normalized -> (B, heads, Y, X) float32, 0..1
PACKAGES = {"openvino": "openvino", "onnx": "onnxruntime", "torch": "torch"}
PRECISIONS = {"openvino": ("fp32", "bf16", "int8"), "onnx": ("fp32",), "torch": ("fp32", "bf16", "fp16")}


def choose(backend: str = "auto", precision: str = "auto", int8: bool = False, graph: bool = False) -> tuple[str, str]:
    """The backend and precision that ``auto`` stands for on this machine, where nothing is measured.

    torch fp16 on a CUDA device; else OpenVINO: in int8 where the model's form may be taken (``int8``) and the CPU is
    known to gain by it or torch is missing, which makes all other forms; in bf16 where the CPU has it. An ONNX ``graph`` from
    elsewhere: ONNX Runtime on a CUDA device, else OpenVINO, in fp32. Raises `UserError` for a pair that does not exist.
    """
    cuda = hardware.gpu_count() > 0
    if backend == "torch" and graph:
        raise UserError(
            "predict.backend = 'torch' does not run ONNX graphs, and this model is one; take openvino, onnx or auto"
        )
    if backend == "auto":
        on_gpu = ("onnx" if installed("onnxruntime") else "openvino") if graph else "torch"
        backend = on_gpu if cuda and precision != "int8" else "openvino"
    if precision == "auto" and graph:
        precision = "fp32"
    if precision == "auto" and backend == "openvino":
        gains = "avx2" in hardware.cpu_flags() or not installed("torch")
        precision = "int8" if int8 and gains else "bf16" if hardware.has_bf16() else "fp32"
    if precision == "auto":
        precision = "fp16" if cuda and backend == "torch" else "fp32"
    if precision not in PRECISIONS[backend]:
        offered = ", ".join(PRECISIONS[backend])
        raise UserError(f"predict.precision = {precision!r} is not offered by the {backend} backend; it has {offered}")
    if precision == "fp16" and not cuda:
        raise UserError("predict.precision = 'fp16' needs a CUDA device; use bf16 or fp32 on a CPU")
    return backend, precision


def version(backend: str) -> str:
    """The version of the package behind a backend; refuses one that is not installed."""
    for package in (PACKAGES[backend], f"{PACKAGES[backend]}-gpu"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    line = f"pip install 'volseg[{backend}]'"  # each has an extra of its name
    raise UserError(
        f"predict.backend = {backend!r} needs the package {PACKAGES[backend]}; use auto, or install it with: {line}"
    )


@dataclass(frozen=True)
class Engine:
    """What a run computes with: recorded in the run, compared on restart and by every worker.

    All but ``why``, the reason for the choice in a few words, and ``speed``, million voxels/s of the machine where it was
    made (0: not measured), decides the bits of a forward pass, besides the model.

    >>> Engine("torch", "fp32", "cpu", "x86_64 avx2", "2.9", "0.1.0", why="as set").arithmetic == Engine(
    ...     "torch", "fp32", "cpu", "x86_64 avx2", "2.9", "0.1.0").arithmetic
    True
    """

    backend: str
    precision: str
    device: str  # cpu or cuda
    processor: str  # a GPU's name, or the vector instructions of a CPU
    version: str  # of the backend's package
    volseg: str
    batch: int = 1  # tiles in a forward pass
    why: str = ""
    speed: float = 0.0

    @classmethod
    def here(
        cls, backend: str, precision: str, place: int = 0, *, batch: int = 1, why: str = "", speed: float = 0.0
    ) -> Engine:
        """The engine of that backend and precision on this machine; ``place`` as for `load`: GPUs may be of several kinds.

        Raises
        ------
        UserError
            The backend is not installed.
        """
        cuda = backend != "openvino" and hardware.gpu_count() > 0
        device, processor = "cpu", hardware.instruction_sets()
        if cuda:
            device, processor = "cuda", hardware.gpu_name(place % hardware.gpu_count())
        own = metadata.version("volseg")
        return cls(backend, precision, device, processor, version(backend), own, batch, why, speed)

    @classmethod
    def from_json(cls, plain: dict) -> Engine:
        """As a run has it; what another version of volseg adds is left out."""
        return cls(**{name: value for name, value in plain.items() if name in cls.__dataclass_fields__})

    @property
    def arithmetic(self) -> dict:
        """What decides the bits, as JSON has it."""
        return {name: value for name, value in vars(self).items() if name not in ("why", "speed")}

    def __str__(self) -> str:
        return f"{self.backend} {self.precision} on {self.device}"


def load(
    blob: bytes, backend: str, precision: str, shape: tuple[int, int, int, int], threads: int = 1, place: int = 0
) -> Forward:
    """The network as a function from numpy batches of one shape to probabilities.

    Parameters
    ----------
    blob
        What `export.export_model` gave for this backend and precision.
    backend, precision
        A pair of `PRECISIONS`.
    shape
        Of each batch: (B, sections, Y, X), float32, standardized.
    threads
        From how many threads the function may be called at once.
    place
        The number of this worker on its machine: torch takes that GPU.

    Returns
    -------
    callable
        To float32 (B, heads, Y, X), 0 to 1. Its bits do not depend on ``threads``, nor on the row of a tile in a batch.

    Raises
    ------
    UserError
        ONNX Runtime does not find all its CUDA libraries.
    """
    target = device(backend, place)
    call = target.synchronized(network(blob, backend, precision, shape, threads, place))
    return lambda batch: target.get(call(target.put(batch)))


def device(backend: str, place: int = 0) -> Device:
    """Where a backend takes its batches, as a new counter of bytes: torch on that GPU, or on the CPU where there is none."""
    if backend != "torch":
        return NUMPY
    if not hardware.gpu_count():
        return TorchDevice("cpu")
    hardware.use_bus_order()
    return TorchDevice(f"cuda:{place % hardware.gpu_count()}")


def network(
    blob: bytes, backend: str, precision: str, shape: tuple[int, int, int, int], threads: int = 1, place: int = 0
) -> Call:
    """What `load` gives, for batches that lie on its `device`, which may not be done when the function returns."""
    target = device(backend, place)

    def make(shape: tuple[int, int, int, int]) -> Call:
        if backend == "openvino":
            return _openvino(blob, precision, shape, threads)
        return _onnxruntime(blob, place) if backend == "onnx" else _torch(blob, precision, shape, target.name)

    return row_by_row(make, shape, target)


def _openvino(blob: bytes, precision: str, shape: tuple[int, int, int, int], threads: int) -> Forward:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # or its import calls home
    import openvino as ov

    bf16 = precision == "bf16" or (precision == "int8" and hardware.has_bf16())  # of int8: the layers that stay float
    properties = {
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "NUM_STREAMS": threads,  # with as many threads: one thread for each tile, so the bits do not depend on them
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # or every worker process would sit on the first core
    }
    compiled = export.compile_openvino(blob, precision, shape, properties)
    ov.Tensor(
        np.zeros(1, np.float32)
    )  # two threads that make the process's first tensor at once wait for each other forever
    if tuple(compiled.input(0).shape) != tuple(shape):
        return ShuffledNetwork(compiled, shape, bf16)
    requests = Requests(compiled)

    def forward(batch: np.ndarray) -> np.ndarray:
        with requests.one() as one:
            one.request.infer({0: np.ascontiguousarray(batch)}, share_inputs=True)
            return one.request.get_output_tensor(0).data.copy()

    return forward


@dataclass
class Request:
    """A request of a compiled OpenVINO network, which holds what it made last, and the room of its squares, if any."""

    request: Any
    squares: np.ndarray | None = None


class Requests:
    """Requests of a compiled OpenVINO network: as many as were ever under way at once. One that failed is not used again."""

    def __init__(self, compiled: Any) -> None:
        self.compiled, self.idle = compiled, deque[Request]()

    @contextmanager
    def one(self) -> Iterator[Request]:
        """A request that nobody else has inside."""
        try:
            one = self.idle.pop()
        except IndexError:
            one = Request(self.compiled.create_infer_request())
        yield one
        self.idle.append(one)


class ShuffledNetwork:
    """An OpenVINO network whose pixel unshuffle and shuffle are done outside of it, see `pixel_shuffle`.

    It takes float32 (B, sections, Y, X) of one ``shape``, or, where ``takes_squares``, bfloat16 squares.
    """

    def __init__(self, compiled: Any, shape: tuple[int, ...], half: bool) -> None:
        self.requests, self.shape, self.half, self.takes_squares = Requests(compiled), tuple(shape), half, half

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Probabilities float32 (B, heads, Y, X)."""
        return self._made(batch, shuffle)

    def uint8(self, batch: np.ndarray) -> np.ndarray:
        """The same as uint8, 255 for 1, halves round up."""
        return self._made(batch, shuffle_uint8)

    def _made(self, batch: np.ndarray, lay_out: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        import openvino as ov

        with self.requests.one() as one:
            if batch.shape == self.shape:  # else squares, or what OpenVINO refuses
                batch = one.squares = unshuffle(batch, self.half, one.squares)
            kind = ov.Type.bf16 if self.half else ov.Type.f32
            one.request.infer({0: ov.Tensor(batch, batch.shape, kind)}, share_inputs=True)
            return lay_out(one.request.get_output_tensor(0).data)


def _onnxruntime(blob: bytes, place: int) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    wanted: list = ["CPUExecutionProvider"]
    if hardware.gpu_count():
        hardware.use_bus_order()
        exact = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}  # not by timing, and fp32 is fp32
        wanted.insert(0, ("CUDAExecutionProvider", {"device_id": place % hardware.gpu_count(), **exact}))
        options.use_deterministic_compute = True
        onnxruntime.preload_dlls()
    session = onnxruntime.InferenceSession(blob, options, providers=wanted)
    if hardware.gpu_count() and "CUDAExecutionProvider" not in session.get_providers():
        raise UserError("predict.backend = 'onnx' finds a GPU but not all its CUDA libraries; install them (pip install "
                        "'cuda-toolkit[curand]' is mostly what lacks), use torch, or hide the GPU")  # fmt: skip

    def forward(batch: np.ndarray) -> np.ndarray:
        return session.run(None, {"tiles": np.ascontiguousarray(batch)})[0]

    return forward


def _torch(blob: bytes, precision: str, shape: tuple[int, int, int, int], name: str) -> Call:
    """The network on a device of torch; on a GPU its weights are in ``precision`` and its kernels are replayed."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        path.write_bytes(blob)
        network, _ = model.load(path)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    cuda, last = name != "cpu", torch.channels_last
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32
    network = network.requires_grad_(False).to(device=name, dtype=kind if cuda else torch.float32)
    network = network.to(memory_format=last)

    def forward(batch: torch.Tensor) -> torch.Tensor:
        if cuda:
            return torch.sigmoid(network(batch.to(kind, memory_format=last)).float()).contiguous()
        with torch.autocast("cpu", kind, enabled=kind != torch.float32):
            return torch.sigmoid(network(batch.contiguous(memory_format=last)).float()).contiguous()

    if cuda:
        return as_cuda_graph(forward, shape, name)
    torch.set_num_threads(1)
    return forward


def takes_squares(forward: Call) -> bool:
    """Whether batches may also be squares in bfloat16, see `pixel_shuffle`."""
    return getattr(forward, "takes_squares", False)


def uint8(forward: Call) -> Call | None:
    """What gives a network's probabilities as uint8, 255 for 1; None where they come as float32 only."""
    return getattr(forward, "uint8", None)


class TimedCall:
    """``forward`` that counts the ``seconds`` in which it was under way in at least one thread."""

    def __init__(self, forward: Call) -> None:
        self.forward, self.takes_squares = forward, takes_squares(forward)
        as_uint8 = uint8(forward)
        self.uint8 = None if as_uint8 is None else partial(self._timed, as_uint8)
        self.seconds, self.running, self.since = 0.0, 0, 0.0
        self.lock = threading.Lock()

    def __call__(self, batch: Any) -> Any:
        return self._timed(self.forward, batch)

    def _timed(self, call: Call, batch: Any) -> Any:
        self._step(1)
        try:
            return call(batch)
        finally:
            self._step(-1)

    def _step(self, change: int) -> None:
        with self.lock:
            now = time.perf_counter()
            self.seconds += (now - self.since) * (self.running > 0)
            self.since, self.running = now, self.running + change


def imap(forward: Call, batches: Iterable[tuple[Any, Any]], threads: int) -> Iterator[tuple[Any, Any]]:
    """``(key, forward(batch))`` for each ``(key, batch)``, in order, ``threads`` of them under way at once.

    One at a time is done by the caller's thread: what it makes of one batch before and after is in the processor's cache.

    >>> list(imap(lambda n: n * n, enumerate([3, 4, 5]), threads=2))
    [(0, 9), (1, 16), (2, 25)]
    """
    if threads == 1:
        yield from ((key, forward(batch)) for key, batch in batches)
        return
    with ThreadPoolExecutor(threads) as pool:
        running: deque = deque()
        for key, batch in batches:
            running.append((key, pool.submit(forward, batch)))
            if len(running) > threads:
                done, future = running.popleft()
                yield done, future.result()
        while running:
            done, future = running.popleft()
            yield done, future.result()
