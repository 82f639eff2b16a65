"""Memory of this machine and of this process."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from volseg import system

HELD = """
import sys
import numpy as np
from volseg.system import glibc, resident, tune_malloc, untuned_malloc

def after_freeing():
    array = np.ones(50_000_000)
    del array
    return resident() / 1e6

if sys.argv[1] == "tuned":
    tune_malloc()
before = resident() / 1e6
with untuned_malloc():
    inside = after_freeing()
outside = after_freeing()
print(inside - before, outside - before)
"""


@pytest.mark.skipif(not system.glibc(), reason="of glibc alone")
@pytest.mark.parametrize("start", ["tuned", "plain"])
def test_a_tuned_process_keeps_what_it_frees_but_for_where_that_is_undone(start):
    done = subprocess.run([sys.executable, "-c", HELD, start], capture_output=True, text=True, check=True)
    inside, outside = map(float, done.stdout.split())
    assert inside < 50
    assert outside > 350 if start == "tuned" else outside < 50


def test_a_container_limits_what_is_free(tmp_path):
    """Both versions of control groups; a limit above this process's own group counts too."""
    inner = tmp_path / "two/a/b"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner.parent / "memory.max").write_text("1000\n")
    (inner.parent / "memory.current").write_text("700\n")
    (inner.parent / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    (tmp_path / "own2").write_text("0::/a/b\n")
    assert system.limits(tmp_path / "two", tmp_path / "own2") == [500]
    one = tmp_path / "one/memory/c"
    one.mkdir(parents=True)
    (one / "memory.limit_in_bytes").write_text("900\n")
    (one / "memory.usage_in_bytes").write_text("300\n")
    (tmp_path / "own1").write_text("3:cpu,cpuacct:/c\n2:memory:/c\n")
    assert system.limits(tmp_path / "one", tmp_path / "own1") == [600]
    assert system.limits(tmp_path / "none", tmp_path / "none") == []
    assert system.free_memory() > 0
    assert system.free_disk(str(tmp_path / "not/there/yet")) > 0


def test_numba_keeps_its_cache_where_neither_package_nor_home_can_be_written(tmp_path):
    """As in a container that runs as any user: a real process without rights, and a package that is read only."""
    drop = [] if os.getuid() else ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    if drop and not shutil.which("setpriv"):
        pytest.skip("needs setpriv to give up root's rights")
    shutil.copytree(Path(system.__file__).parent, tmp_path / "volseg", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (*(place for place in tmp_path.rglob("*") if place.is_dir()), tmp_path):
        folder.chmod(0o555)
    (tmp_path.parent / "tmp").mkdir()
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": str(tmp_path),
        "TMPDIR": f"{tmp_path.parent}/tmp",
    }
    code = "import os; from volseg.segmentation import edges; print(os.environ['NUMBA_CACHE_DIR'])"
    words = [*drop, sys.executable, "-c", code]
    done = subprocess.run(words, cwd=tmp_path.parent, env=env, capture_output=True, text=True, check=False)
    cache = Path(done.stdout.strip())
    assert cache.parent == tmp_path.parent / "tmp", done.stderr
    assert cache.stat().st_mode & 0o777 == 0o700
    tmp_path.chmod(0o755)


def test_numba_keeps_its_cache_where_the_folder_that_is_given_cannot_be_written(tmp_path, monkeypatch):
    """As in containers that share a volume as several users."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "file").touch()
    for given, kept in (("folder", tmp_path / "folder"), ("file", system.private_folder("numba"))):
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / given))
        monkeypatch.setattr("numba.config.CACHE_DIR", "")
        system.keep_numba_cache()
        assert os.environ["NUMBA_CACHE_DIR"] == str(kept)


def test_a_temporary_folder_of_somebody_else_is_not_taken(tmp_path, monkeypatch):
    """What numba keeps is run when it is read."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first = system.private_folder("numba")
    assert system.private_folder("numba") == first
    first.chmod(0o777)
    assert system.private_folder("numba") != first
