"""The network as a function from a batch of tiles to probabilities, on whatever runs it fastest here.

The promise includes the forward pass, so each backend is held to one arithmetic: one thread for each tile on a CPU
(several tiles run side by side), a constant padded batch, deterministic kernels on CUDA. So ONNX Runtime is not given its
TensorRT provider: that chooses kernels by timing them on each machine anew, and two workers could differ in bits.
"""

from __future__ import annotations

import ctypes
import hashlib
import lzma
import os
import platform
import re
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numcodecs import Zstd

from volseg.errors import UserError
from volseg.inference import cache, model
from volseg.inference.device import NUMPY, Call, Device, TorchDevice, as_cuda_graph, row_by_row

if TYPE_CHECKING:
    import torch

Forward = Callable[
    [np.ndarray], np.ndarray
]  # (B, sections, Y, X) float32, normalized -> (B, heads, Y, X) float32, 0..1
PACKAGES = {"openvino": "openvino", "onnx": "onnxruntime", "torch": "torch"}
PRECISIONS = {"openvino": ("fp32", "bf16", "int8"), "onnx": ("fp32",), "torch": ("fp32", "bf16", "fp16")}
XZ = b"\xfd7zXZ"  # how a form begins that was packed before 2026-11-23
INT8_LOSS = 0.003  # held-out IoU that a quantized form may lose for auto to take it


# ---------------------------------------------------------------- what runs here


def gpus() -> int:
    """How many CUDA devices torch can use, without loading it."""
    count, version = _driver()
    return count if 0 < _built_for() <= version else 0


def idle_gpus() -> str:
    """Why the GPUs that are here are of no use; nothing where they are, or where there are none."""
    count, version = _driver()
    if not count or gpus():
        return ""
    built = _built_for()
    torch = f"is made for CUDA {built} and the driver has {version}" if built else "has no CUDA"
    return f"the GPU here is not used: the installed torch {torch}; install one that fits the driver"


def _driver() -> tuple[int, int]:
    """How many CUDA devices the driver shows, and the version of CUDA that it has; zeros where there is no driver."""
    count, version = ctypes.c_int(0), ctypes.c_int(0)
    try:
        cuda = _libcuda()
    except OSError:
        return 0, 0
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or cuda.cuDriverGetVersion(ctypes.byref(version)):
        return 0, 0
    return count.value, version.value // 1000


def _libcuda() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


@lru_cache
def _built_for() -> int:
    """The version of CUDA that the installed torch was built for; 0 for none."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return 0
    text = Path(found.origin).with_name("version.py").read_text()
    cuda = re.search(r"^cuda\b[^=]*=\s*['\"](\d+)", text, re.MULTILINE)
    return int(cuda[1]) if cuda else 0


def has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX)."""
    return bool({"avx512_bf16", "amx_bf16"} & _cpu_flags())


def choose(backend: str = "auto", precision: str = "auto", int8: bool = False) -> tuple[str, str]:
    """The backend and precision that ``auto`` stands for on this machine, where nothing is measured.

    torch fp16 on a CUDA device; else OpenVINO: in int8 where the model's form may be taken (``int8``) and the CPU is
    known to gain by it, in bf16 where the CPU has it. Raises `UserError` for a pair that does not exist.
    """
    cuda = gpus() > 0
    if backend == "auto":
        backend = "torch" if cuda and precision != "int8" else "openvino"
    if precision == "auto" and backend == "openvino":
        precision = "int8" if int8 and "avx2" in _cpu_flags() else "bf16" if has_bf16() else "fp32"
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
    raise UserError(f"predict.backend = {backend!r} needs the package {PACKAGES[backend]}; install it or use auto")


# ---------------------------------------------------------------- files


def prepare(path: Path, backend: str, precision: str = "fp32") -> bytes:
    """What workers need to run a model file: the ONNX graph for openvino and onnx, the file itself for torch.

    For int8 it is the quantized graph that the file carries.
    """
    if precision == "int8":
        return unpack(model.quantized(path))
    return path.read_bytes() if backend == "torch" else _onnx(path)


def pack(xml: bytes, weights: bytes) -> bytes:
    """An OpenVINO graph as a model file carries it: the length of its xml (8 bytes, low first), xml, weights; as Zstandard."""
    return Zstd(22, checksum=True).encode(len(xml).to_bytes(8, "little") + xml + weights)


def unpack(form: bytes) -> bytes:
    """A packed graph as workers read it: undone once for each run, not in each worker."""
    return lzma.decompress(form) if form.startswith(XZ) else bytes(Zstd().decode(form))


def int8_allowed(card: dict) -> bool:
    """Whether a model file carries a quantized form that was measured to lose at most `INT8_LOSS` of held-out IoU."""
    held = card.get(model.INT8, {}).get("held_out")
    return held is not None and held["iou_fp32"] - held["iou_int8"] <= INT8_LOSS


def _onnx(path: Path) -> bytes:
    """The model as ONNX with the sigmoid inside; made once for each network and kept in the user's cache."""
    key = hashlib.sha256((model.network_digest(path) + version("torch")).encode()).hexdigest()[:32]
    cached = cache.folder() / f"{key}.onnx"
    with suppress(OSError):  # there is none, or it is not for us
        return cached.read_bytes()
    graph = _export(path)
    cache.keep(cached, graph)
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
            (torch.zeros(1, card["sections"], 64, 96),),
            file,
            dynamo=False,
            input_names=["tiles"],
            output_names=["probability"],
            dynamic_axes={"tiles": free, "probability": free},
        )
    return file.getvalue()


# ---------------------------------------------------------------- load


def load(
    blob: bytes, backend: str, precision: str, shape: tuple[int, int, int, int], threads: int = 1, place: int = 0
) -> Forward:
    """A function for batches of one ``shape`` (B, sections, Y, X), to be called from up to ``threads`` threads at once.

    ``place`` is the number of this worker on its machine: torch takes that GPU.
    """
    there = device(backend, place)
    call = there.synchronized(network(blob, backend, precision, shape, threads, place))
    return lambda batch: there.get(call(there.put(batch)))


def device(backend: str, place: int = 0) -> Device:
    """Where a backend takes its batches, as a new counter of bytes: torch on that GPU, or on the CPU where there is none."""
    if backend != "torch":
        return NUMPY
    return TorchDevice(f"cuda:{place % gpus()}" if gpus() else "cpu")


def network(
    blob: bytes, backend: str, precision: str, shape: tuple[int, int, int, int], threads: int = 1, place: int = 0
) -> Call:
    """What `load` gives, for batches that lie on its `device`, which may not be done when the function returns."""
    there = device(backend, place)

    def make(shape: tuple[int, int, int, int]) -> Call:
        if backend == "openvino":
            return _openvino(blob, precision, shape, threads)
        return _onnxruntime(blob, place) if backend == "onnx" else _torch(blob, precision, shape, there.name)

    return row_by_row(make, shape, there)


def _openvino(blob: bytes, precision: str, shape: tuple[int, int, int, int], threads: int) -> Forward:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # or its import calls home
    import openvino as ov

    rest = "bf16" if precision == "bf16" or (precision == "int8" and has_bf16()) else "f32"  # of int8: what stays float
    knobs = {
        "INFERENCE_PRECISION_HINT": rest,
        "NUM_STREAMS": threads,  # with as many threads: one thread for each tile, so the bits do not depend on them
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # or every worker process would sit on the first core
    }
    compiled = _compiled(blob, precision, shape, knobs)
    ov.Tensor(
        np.zeros(1, np.float32)
    )  # two threads that make the process's first tensor at once wait for each other forever
    mine = threading.local()

    def forward(batch: np.ndarray) -> np.ndarray:
        if not hasattr(mine, "request"):
            mine.request = compiled.create_infer_request()
        mine.request.infer({0: np.ascontiguousarray(batch)}, share_inputs=True)
        return mine.request.get_output_tensor(0).data.copy()

    return forward


def _compiled(blob: bytes, precision: str, shape: tuple[int, int, int, int], knobs: dict) -> Any:
    """The network as OpenVINO compiles it for this CPU: once, for what it made is kept in the user's cache, after its hash.

    All take what was exported, also who made it, so that no bit depends on who did.
    """
    import openvino as ov

    core = ov.Core()
    here = [
        ov.get_version(),
        core.get_property("CPU", "FULL_DEVICE_NAME"),
        sorted(_cpu_flags()),
        precision,
        shape,
        knobs,
    ]
    cached = cache.folder() / f"{hashlib.sha256(blob + repr(here).encode()).hexdigest()[:32]}.openvino"
    with suppress(OSError):
        digest, made = (kept := cached.read_bytes())[:32], kept[32:]
        if hashlib.sha256(made).digest() == digest:
            return core.import_model(made, "CPU", knobs)
    network = core.read_model(*_graph(blob, precision))
    network.reshape(list(shape))
    made = core.compile_model(network, "CPU", knobs).export_model()
    made = made if isinstance(made, bytes) else made.getvalue()
    cache.keep(cached, hashlib.sha256(made).digest() + made)
    return core.import_model(made, "CPU", knobs)


def _graph(blob: bytes, precision: str) -> tuple[bytes, bytes]:
    """What OpenVINO reads: an ONNX graph, or the xml and weights of a quantized one."""
    if precision != "int8":
        return blob, b""
    end = 8 + int.from_bytes(blob[:8], "little")
    return blob[8:end], blob[end:]


def _onnxruntime(blob: bytes, place: int) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    wanted: list = ["CPUExecutionProvider"]
    if gpus():
        exact = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}  # not by timing, and fp32 is fp32
        wanted.insert(0, ("CUDAExecutionProvider", {"device_id": place % gpus(), **exact}))
        options.use_deterministic_compute = True
        onnxruntime.preload_dlls()
    session = onnxruntime.InferenceSession(blob, options, providers=wanted)
    if gpus() and "CUDAExecutionProvider" not in session.get_providers():
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
    network = network.requires_grad_(False).to(name, kind if cuda else torch.float32, memory_format=last)

    def forward(batch: torch.Tensor) -> torch.Tensor:
        if cuda:
            return torch.sigmoid(network(batch.to(kind, memory_format=last)).float()).contiguous()
        with torch.autocast("cpu", kind, enabled=kind != torch.float32):
            return torch.sigmoid(network(batch.contiguous(memory_format=last)).float()).contiguous()

    if cuda:
        return as_cuda_graph(forward, shape, name)
    torch.set_num_threads(1)
    return forward


# ---------------------------------------------------------------- stream


class TimedCall:
    """``forward`` that counts the ``seconds`` in which it was under way in at least one thread."""

    def __init__(self, forward: Call) -> None:
        self.forward = forward
        self.seconds, self.running, self.since = 0.0, 0, 0.0
        self.lock = threading.Lock()

    def __call__(self, batch: Any) -> Any:
        self._step(1)
        try:
            return self.forward(batch)
        finally:
            self._step(-1)

    def _step(self, change: int) -> None:
        with self.lock:
            now = time.perf_counter()
            self.seconds += (now - self.since) * (self.running > 0)
            self.since, self.running = now, self.running + change


def stream(forward: Call, batches: Iterable[tuple[Any, Any]], threads: int) -> Iterator[tuple[Any, Any]]:
    """``(key, forward(batch))`` for each ``(key, batch)``, in order, ``threads`` of them under way at once."""
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


def describe(backend: str, precision: str, place: int = 0) -> dict:
    """What decides the bits of a forward pass besides the model: recorded in the run, compared on restart and workers.

    ``place`` as for `load`: a machine may have GPUs of several kinds.
    """
    cuda = backend != "openvino" and gpus() > 0
    return {
        "backend": backend,
        "precision": precision,
        "device": "cuda" if cuda else "cpu",
        "processor": _gpu_name(place % gpus()) if cuda else _instructions(),
        "version": version(backend),
        "volseg": metadata.version("volseg"),
    }


def device_bytes() -> int:
    """The most memory that torch has taken of the GPUs in this process so far; 0 where it took none."""
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_reserved() if torch is not None and torch.cuda.is_initialized() else 0


def _gpu_name(number: int) -> str:
    """A GPU's name as its driver gives it."""
    cuda, name = _libcuda(), ctypes.create_string_buffer(128)
    cuda.cuInit(0)
    cuda.cuDeviceGetName(name, len(name), number)
    return name.value.decode()


def _instructions() -> str:
    """The vector instructions that a CPU's kernels are chosen by."""
    flags = _cpu_flags()
    kinds = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    found = [name for name in kinds if name in flags]
    return " ".join([platform.machine(), *found])


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return set(next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "").split())
