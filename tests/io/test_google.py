"""Volumes in a bucket at Google, on a real server of its protocol on loopback."""

import logging
import os
import re
import threading
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlencode, urlparse
from urllib.request import Request, urlopen

import pytest
import tifffile

from tests.conftest import forget_sessions
from tests.io import formats as written
from tests.io.helpers import assert_reads, make_run, refused, voxels, write_ome
from volseg.errors import UserError
from volseg.io import files, remote, volume


class Server(ThreadingHTTPServer):
    """Takes as many requests at once as come; of readers that went away it says nothing."""

    request_queue_size = 256

    def handle_error(self, request, client_address):
        pass


@pytest.fixture(scope="module")
def google(tmp_path_factory):
    """URL of a bucket, reached through the environment alone (so by workers too)."""
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # as volseg does, before anything imports gcsfs
    pytest.importorskip("gcsfs", reason="needs gcsfs (extra gcs)")
    pytest.importorskip("gcp_storage_emulator", reason="needs gcp-storage-emulator (extra test)")
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers.buckets import create_bucket
    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    class Handler(RequestHandler):
        """Gives the last bytes of an object, and says which generation it is, as Google does too."""

        def stored(self):
            """Bucket and name of the object that is asked for; None for what is none."""
            found = re.fullmatch(r".*/b/(.+)/o/(.+)", urlparse(self.path).path)
            return found and (found[1], unquote(found[2]))

        def do_GET(self):  # noqa: N802
            last = re.fullmatch(r"bytes=-(\d+)", self.headers.get("Range", ""))
            if last:
                size = len(self.storage.get_file(*self.stored()))
                self.headers.replace_header("Range", f"bytes={max(0, size - int(last[1]))}-")
            super().do_GET()

        def end_headers(self):
            with suppress(NotFound):
                if self.command == "GET" and self.stored():
                    self.send_header("x-goog-generation", self.storage.get_file_obj(*self.stored())["generation"])
            super().end_headers()

    storage = Storage(use_memory_fs=True)
    create_bucket("bucket", storage)
    server = Server(("127.0.0.1", 0), partial(Handler, storage))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    with pytest.MonkeyPatch.context() as env:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            env.setenv(name, f"http://127.0.0.1:{server.server_port}")
        env.setenv("NO_GCE_CHECK", "true")
        yield "gs://bucket"
        from gcsfs import GCSFileSystem

        forget_sessions(GCSFileSystem)
    server.shutdown()
    server.server_close()
    thread.join()


def put(folder, url):
    """The files of a local folder are in the bucket, each sent as it is: of parts, the emulator drops line ends."""
    bucket, _, prefix = url.removeprefix("gs://").partition("/")
    for file in filter(Path.is_file, folder.rglob("*")):
        asked = urlencode({"uploadType": "media", "name": f"{prefix}/{file.relative_to(folder).as_posix()}"})
        place = f"{os.environ['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/{bucket}/o?{asked}"
        urlopen(Request(place, file.read_bytes(), {"Content-Type": "application/octet-stream"})).close()


def test_zarr(google, tmp_path):
    data = voxels("uint16")
    write_ome(tmp_path / "em.zarr", data, "0.5")
    put(tmp_path / "em.zarr", f"{google}/em.zarr")
    opened = volume.open(f"{google}/em.zarr")
    assert (opened.kind, opened.voxel_size_nm) == ("zarr", (50, 5, 5))
    assert_reads(opened, data)
    for url in (f"{google}/none.zarr", "gs://no-such-bucket/em.zarr"):
        with refused("no zarr array or group", url):
            volume.open(url)


def test_n5_precomputed_and_tiff(google, tmp_path):
    data = voxels("uint16")
    written.n5(tmp_path, data)
    written.precomputed(tmp_path, data)
    tifffile.imwrite(tmp_path / "em.tif", data, photometric="minisblack")
    put(tmp_path, f"{google}/formats")
    for path, kind in (("em.n5/raw", "n5"), ("em", "precomputed"), ("em.tif", "tiff")):
        opened = volume.open(f"{google}/formats/{path}")
        assert opened.kind == kind
        assert_reads(opened, data)


def test_a_run_and_the_names_beside_it(google, tmp_path):
    labels = voxels("uint32", (20, 30, 40))
    make_run(tmp_path / "run.zarr", labels)  # in shards: their index is at their end
    put(tmp_path, f"{google}/runs")
    opened = volume.open(f"{google}/runs/run.zarr")
    assert (opened.dataset, opened.voxel_size_nm) == ("labels/instances/0", (50, 5, 5))
    assert_reads(opened, labels)
    assert files.names(f"{google}/runs") == ["run.zarr"]
    assert files.fingerprint(google, "runs/run.zarr/run.json")[0] == 2


def test_a_server_that_is_not_there_is_told_in_seconds(google, monkeypatch):
    monkeypatch.setattr(remote, "ANSWER_S", -2.5)  # half a second in all
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"nothing answers at gs://other within 0\.5 s"):
        volume.open("gs://other/em.zarr")


class Refuses(BaseHTTPRequestHandler):
    status = 403

    def do_GET(self):
        body = b'{"error": {"code": %d, "message": "storage.objects.get denied"}}' % self.status
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("status", [401, 403])
def test_a_bucket_that_refuses_is_named_with_the_way_out(google, monkeypatch, status):
    monkeypatch.setattr(Refuses, "status", status)
    server = Server(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    for call in (files.exists, volume.open):
        with pytest.raises(UserError, match=r"refuses gs://private/em\.zarr.* \(.*it was tried without: set GOOGLE_"):
            call("gs://private/em.zarr")
    server.shutdown()
    server.server_close()


def test_credentials_that_are_not_there_are_told(google, monkeypatch):
    remote._is_anonymous_at_google.cache_clear()
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/none.json")
    with pytest.raises(UserError, match=r"^cannot take the credentials in /none\.json: "):
        volume.open(f"{google}/em.zarr")
