"""Files and objects by their path, in folders and in object stores."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.io.helpers import check_objects
from volseg.io import files


def test_objects_live_in_local_folders(tmp_path):
    check_objects(str(tmp_path / "run.zarr"))
    check_objects(f"file://{tmp_path}/run.zarr")


def test_objects_live_in_memory():
    check_objects("memory://objects/run.zarr")


def test_readers_never_see_a_part_of_an_object(tmp_path):
    path, seen, stop = str(tmp_path), set(), threading.Event()
    contents = [bytes([i]) * 200_000 for i in range(2)]
    files.write_bytes(path, "key", contents[0])

    def watch():
        while not stop.is_set():
            seen.add(files.read_bytes(path, "key"))
            assert set(files.list_keys(path)) == {"key"}

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        for i in range(100):
            files.write_bytes(path, "key", contents[i % 2])
        stop.set()
        watching.result()
    assert seen <= set(contents)


def test_local_and_remote_paths_are_told_apart():
    assert [files.is_remote(path) for path in ("s3://b/k", "memory://k", "/a/b", "a", "file:///a")] == [True] * 2 + [
        False
    ] * 3


def test_what_killed_writers_left_is_swept_up(tmp_path):
    for name in (".a.json.12.ab.tmp", f"zarr.{'0f' * 16}.partial", "kept.partial", "kept.tmp"):
        (tmp_path / name).touch()
    files.remove_temporary(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.partial", "kept.tmp"]


def test_what_a_store_raises_names_the_object():
    with pytest.raises(OSError, match="no answer") as caught, files.answering("s3://bucket/key"):
        raise RuntimeError("no answer")
    assert caught.value.filename == "s3://bucket/key"
    with pytest.raises(RuntimeError), files.answering("/tmp/key"):
        raise RuntimeError("local")
