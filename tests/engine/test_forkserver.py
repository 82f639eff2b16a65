"""Local workers are forked from a process that has imported what they need."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import volseg
from volseg.config import Cluster
from volseg.engine import cluster
from volseg.engine import forkserver as prefork

linux = pytest.mark.skipif(prefork.method() != "forkserver", reason="workers are spawned here")


def _loaded():
    return "volseg.engine.pipeline" in sys.modules, os.environ.get("VOLSEG_TEST"), os.getppid()


@linux
def test_workers_start_with_their_imports_done_and_the_environment_of_now(monkeypatch):
    prefork.start()
    monkeypatch.setenv("VOLSEG_TEST", "set after the process to fork from had started")
    with cluster.connect(Cluster(workers=2, dashboard="")) as client:
        found = list(client.run(_loaded).values())
    assert [row[:2] for row in found] == [(True, os.environ["VOLSEG_TEST"])] * 2
    assert found[0][2] == found[1][2] != os.getpid()


def test_the_environment_here_is_left_alone(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    prefork.start()
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ


def _faults():
    """Pages that the system gives for 60 MB, where as much has just been freed (in pieces for which none is 2 MB long)."""
    import resource

    def hold():
        return [np.ones(1 << 20, np.uint8) for _ in range(60)]

    hold()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    hold()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@linux
def test_workers_keep_the_memory_that_they_free():
    with cluster.connect(Cluster(workers=1, dashboard="")) as client:
        (found,) = client.run(_faults).values()
    assert found < 1000


@pytest.mark.parametrize("words", [("infer", "--workers", "2"), ("plan",)])
def test_files_that_lie_beside_a_user_are_not_imported(image, tmp_path, words):
    """In the folder where a command is given, files may be called as modules are."""
    (tmp_path / "here").mkdir()
    for name in ("queue", "dask", "zarr", "statistics", "volseg"):
        (tmp_path / "here" / f"{name}.py").write_text("raise SystemExit('a file of the user was run')")
    (tmp_path / "launch.py").write_text("from volseg.cli import main\nif __name__ == '__main__': main()")
    root = str(Path(volseg.__file__).parents[1])
    given = [image, "--out", str(tmp_path / "run.zarr"), "--set", "predict.tile=96", "--set", "predict.overlap=32"]
    line = [sys.executable, str(tmp_path / "launch.py"), *words, *given]
    env = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        line, cwd=tmp_path / "here", env=env, capture_output=True, text=True, timeout=250, check=False
    )
    assert "a file of the user" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
