"""Loops are compiled by one process for all, and what needs them waits for it."""

import subprocess
import sys

import pytest

from volseg.engine import kernels

COMPILER_S = 60  # in which a process starts, or ends


@pytest.fixture(autouse=True)
def _new_machine(tmp_path, monkeypatch):
    """A cache of volseg's without a stamp; numba's own stays, so that nothing takes long."""
    monkeypatch.setenv("VOLSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "_known", False)


def test_the_first_run_compiles_beside_its_work_and_the_next_finds_it_done():
    with kernels.compiled_beside() as compiling:
        assert compiling
        assert kernels.are_compiling()
        with kernels.compiled_beside() as again:
            assert not again  # one is at it
        kernels.wait()
        assert not kernels.are_compiling()
        assert kernels.stamp().exists()
    with kernels.compiled_beside() as compiling:
        assert not compiling


def test_a_run_that_ends_early_takes_its_compiler_with_it():
    with kernels.compiled_beside() as compiling:
        assert compiling
    assert not kernels.stamp().exists()
    kernels.wait()  # nobody has the lock


def test_a_run_elsewhere_compiles_nothing():
    with kernels.compiled_beside(False) as compiling:
        assert not compiling
        assert not kernels.are_compiling()


def test_the_command_says_what_it_did():
    command = [sys.executable, "-m", "volseg", "compile", "--json"]
    told = [subprocess.run(command, capture_output=True, text=True, timeout=COMPILER_S, check=True) for _ in range(2)]
    assert ["true" in result.stdout for result in told] == [True, False]


def test_another_version_is_another_stamp(monkeypatch):
    before = kernels.stamp()
    monkeypatch.setattr("volseg.__version__", "0.0.0")
    assert kernels.stamp() != before
