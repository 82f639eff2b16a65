"""What this machine computes with, as far as a machine without a GPU can tell."""

import os

import pytest

from volseg.inference import hardware

IDS = ["GPU-aa1", "GPU-aa2", "GPU-b"]


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        (None, IDS),
        ("", []),
        ("-1", []),
        ("1", ["GPU-aa2"]),
        ("2, 0", ["GPU-b", "GPU-aa1"]),
        ("0,7,1", ["GPU-aa1"]),
        ("GPU-b,0", ["GPU-b", "GPU-aa1"]),
        ("GPU-aa", []),  # of two
        ("1,1", []),
        ("MIG-c,0", ["MIG-c"]),
        ("no", []),
    ],
)
def test_the_gpus_that_cuda_shows_are_those_that_the_environment_names(setting, shown):
    assert hardware.visible_gpus(IDS, setting) == shown


def test_gpus_are_numbered_as_the_driver_does_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    hardware.use_bus_order()
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    hardware.use_bus_order()
    assert os.environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"


def test_a_gpu_that_nothing_here_can_ask_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "DRIVER", tmp_path)
    monkeypatch.setattr(hardware, "_built_for", lambda: 13)
    monkeypatch.setattr(hardware, "installed", lambda package: False)
    assert hardware.unused_gpu_reason().endswith("pip install 'volseg[gpu]'")


def test_bfloat16_is_told_by_the_instructions():
    sets = hardware.instruction_sets().split()
    assert hardware.has_bf16() == bool({"avx512_bf16", "amx_bf16"} & set(sets))


def test_a_gpu_that_torch_cannot_use_is_told_and_not_counted(monkeypatch):
    for count, driver, built, used, said in (
        (0, 0, 13, 0, ""),
        (2, 13, 13, 2, ""),
        (2, 14, 13, 2, ""),
        (1, 12, 13, 0, "is made for CUDA 13 and the driver has 12"),
        (1, 13, 0, 0, "has no CUDA"),
    ):
        monkeypatch.setattr(hardware, "_driver", lambda found=(("a GPU",) * count, driver): found)
        monkeypatch.setattr(hardware, "_built_for", lambda found=built: found)
        assert hardware.gpu_count() == used
        told = f"the GPU here is not used: the installed torch {said}; install one that fits the driver"
        assert hardware.unused_gpu_reason() == (told if said else "")
