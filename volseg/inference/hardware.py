"""What this machine computes with: its GPUs as torch can use them, and the vector instructions of its CPU."""

from __future__ import annotations

import os
import platform
import re
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from volseg.system import installed

DRIVER = Path("/proc/driver/nvidia/version")  # of Linux


def gpu_count() -> int:
    """How many CUDA devices torch can use, without loading it: a function of the driver and of CUDA_VISIBLE_DEVICES."""
    names, cuda = _driver()
    return len(names) if 0 < _built_for() <= cuda else 0


def gpu_name(number: int) -> str:
    """A GPU's name as its driver gives it; ``number`` is torch's, where `use_bus_order` was called before CUDA began."""
    return _driver()[0][number]


def unused_gpu_reason() -> str:
    """Why the GPUs that are here are of no use; nothing where they are, or where there are none."""
    names, cuda = _driver()
    built = _built_for()
    if built and DRIVER.exists() and not installed("pynvml"):
        return "the GPU here is not used: nvidia-ml-py is not installed; install it with: pip install 'volseg[gpu]'"
    if not names or gpu_count():
        return ""
    torch = f"is made for CUDA {built} and the driver has {cuda}" if built else "has no CUDA"
    return f"the GPU here is not used: the installed torch {torch}; install one that fits the driver"


def use_bus_order() -> None:
    """CUDA numbers this process's GPUs as their driver does, unless it has begun, or its environment says otherwise.

    By itself it has the fastest first, and on a machine with GPUs of several kinds names would be of others.
    """
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def _driver() -> tuple[tuple[str, ...], int]:
    """Names of the GPUs that CUDA shows this process, and the driver's version of CUDA; nothing without a driver."""
    return _query_driver(os.environ.get("CUDA_VISIBLE_DEVICES"))


@lru_cache
def _query_driver(visible: str | None) -> tuple[tuple[str, ...], int]:
    try:
        import pynvml
    except ImportError:
        return (), 0
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return (), 0
    try:
        count = pynvml.nvmlDeviceGetCount()
        ids = [pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count)]
        handles = [pynvml.nvmlDeviceGetHandleByUUID(one) for one in visible_gpus(ids, visible)]
        return tuple(map(pynvml.nvmlDeviceGetName, handles)), pynvml.nvmlSystemGetCudaDriverVersion_v2() // 1000
    except pynvml.NVMLError:
        return (), 0
    finally:
        pynvml.nvmlShutdown()


def visible_gpus(ids: list[str], setting: str | None) -> list[str]:
    """The ids of the GPUs that CUDA shows, of all ``ids``, where CUDA_VISIBLE_DEVICES is ``setting`` (None: not set).

    As in NVIDIA's CUDA C++ Programming Guide, "CUDA Environment Variables": numbers and beginnings of ids, up to the first
    that names no GPU, or not one alone; none where one is named twice; of parts of GPUs (MIG), one.

    >>> visible_gpus(["GPU-a1", "GPU-b2", "GPU-b3"], "2,GPU-a,-1,1")
    ['GPU-b3', 'GPU-a1']
    >>> visible_gpus(["GPU-a1", "GPU-b2"], None), visible_gpus(["GPU-a1"], ""), visible_gpus(["GPU-a1"], "0,0")
    (['GPU-a1', 'GPU-b2'], [], [])
    """
    if setting is None:
        return ids
    shown: list[str] = []
    for name in map(str.strip, setting.split(",")):
        if name.startswith("MIG-"):
            return shown or [name]
        found = [
            one for k, one in enumerate(ids) if name == str(k) or (name.startswith("GPU-") and one.startswith(name))
        ]
        if len(found) != 1:
            break
        if found[0] in shown:
            return []
        shown += found
    return shown


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
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags())


def peak_gpu_bytes() -> int:
    """The most memory that torch has taken of the GPUs in this process so far; 0 where it took none."""
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_reserved() if torch is not None and torch.cuda.is_initialized() else 0


def instruction_sets() -> str:
    """The vector instructions that a CPU's kernels are chosen by."""
    flags = cpu_flags()
    kinds = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    found = [name for name in kinds if name in flags]
    return " ".join([platform.machine(), *found])


def cpu_flags() -> set[str]:
    """What the CPU can do, in the words of Linux; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return set(next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "").split())
