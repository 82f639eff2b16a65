"""Files and objects by their path, in folders and in object stores."""

import threading
from concurrent.futures import ThreadPoolExecutor

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
