"""What this machine computes with: its GPUs as torch can use them, and the vector instructions of its CPU."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path


def gpu_count() -> int:
    """How many CUDA devices torch can use, without loading it."""
    count, version = _driver()
    return count if 0 < _built_for() <= version else 0


def unused_gpu_reason() -> str:
    """Why the GPUs that are here are of no use; nothing where they are, or where there are none."""
    count, version = _driver()
    if not count or gpu_count():
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
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags())


def peak_gpu_bytes() -> int:
    """The most memory that torch has taken of the GPUs in this process so far; 0 where it took none."""
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_reserved() if torch is not None and torch.cuda.is_initialized() else 0


def gpu_name(number: int) -> str:
    """A GPU's name as its driver gives it."""
    cuda, name = _libcuda(), ctypes.create_string_buffer(128)
    cuda.cuInit(0)
    cuda.cuDeviceGetName(name, len(name), number)
    return name.value.decode()


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
