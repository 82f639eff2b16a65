"""Object stores that do not answer, refuse, or are open to all: one line within seconds, on real sockets."""

import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from tests.conftest import forget_sessions
from volseg.errors import UserError
from volseg.io import arrays, files, remote, volume

pytestmark = [  # of sessions that s3fs leaves open, where a store has failed
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def endpoint(monkeypatch):
    """Points S3 to another place, with or without credentials."""
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs (extra s3)")

    def point(url, *, credentials=True):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test") if credentials else monkeypatch.delenv(name, raising=False)
        if not credentials:
            monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        forget()

    def forget():
        remote._is_anonymous.cache_clear()
        remote._check_answers.cache_clear()
        forget_sessions(s3fs.S3FileSystem)

    yield point
    monkeypatch.undo()
    forget()


def test_a_dead_endpoint_is_told_in_a_line():
    pytest.importorskip("s3fs", reason="needs s3fs (extra s3)")
    start = time.monotonic()
    env = {
        **os.environ,
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
    }
    words = [sys.executable, "-m", "volseg", "plan", "s3://bucket/em.zarr"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("volseg: nothing answers at s3://bucket: Could not connect to the endpoint")
    assert done.stderr.count("\n") == 1
    assert time.monotonic() - start < 30


def test_an_endpoint_that_says_nothing_is_not_waited_for(endpoint, monkeypatch):
    monkeypatch.setattr(remote, "ANSWER_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(UserError, match="nothing answers at s3://bucket: Read timeout"):
            files.exists("s3://bucket/em.zarr")


class Refuses(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    ("credentials", "way_out"), [(True, "these credentials may not"), (False, "it was tried without: set AWS_PROFILE")]
)
def test_a_store_that_refuses_is_named_with_the_way_out(endpoint, credentials, way_out):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint(f"http://127.0.0.1:{server.server_port}", credentials=credentials)
    for call in (files.exists, volume.open):
        with pytest.raises(UserError, match=rf"refuses s3://bucket/em\.zarr.* \(.*Forbidden.*{way_out}"):
            call("s3://bucket/em.zarr")
    server.shutdown()
    server.server_close()


def test_a_public_bucket_is_read_without_credentials(bucket, endpoint):
    s3fs = pytest.importorskip("s3fs")
    data = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8)
    arrays.create_array(
        f"{bucket}/public.zarr", "0", shape=data.shape, dtype="uint8", chunk=data.shape, shard=data.shape
    )
    arrays.open_array(f"{bucket}/public.zarr", "0")[:] = data
    s3fs.S3FileSystem().chmod("bucket/public.zarr", "public-read", recursive=True)
    endpoint(os.environ["AWS_ENDPOINT_URL"], credentials=False)
    assert remote.options(bucket)["anon"] is True
    opened = volume.open(f"{bucket}/public.zarr/0")
    assert (np.asarray(arrays.open_array(opened.path, "")[:]) == data).all()
