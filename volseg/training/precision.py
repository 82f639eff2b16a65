"""The arithmetic in which a network is trained and validated."""

from __future__ import annotations

import torch

from volseg.inference.hardware import has_bf16


def resolve_precision(device: torch.device, precision: str) -> str:
    """Return ``precision`` ("fp32", "bf16" or "fp16"), and for "auto" the smallest that the device computes in hardware.

    That is bf16 where the device has it: GPUs from Ampere on, CPUs with AVX-512 BF16 or AMX. Else it is fp16 on CUDA and
    fp32 on a CPU.

    >>> resolve_precision(torch.device("cpu"), "fp32")
    'fp32'
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if has_bf16() else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which a network computes in ``train.precision`` on a device."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[resolve_precision(device, precision)]
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
