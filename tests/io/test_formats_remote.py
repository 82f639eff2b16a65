"""Volumes behind URLs: zarr, TIFF, N5 and precomputed over HTTP and S3; only what is needed is fetched."""

import functools
import http.server
import os
import threading

import numpy as np
import pytest
import tifffile

from tests.conftest import forget_sessions
from tests.io import formats as written
from tests.io.helpers import SHAPE, assert_reads, refused, voxels, write_ome
from volseg.box import Box
from volseg.io import files, volume


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files with ranges, as object stores and web servers give them; counts the bytes."""

    sent = 0

    def send_head(self):
        path = self.translate_path(self.path)
        asked = self.headers.get("Range")
        if not asked or os.path.isdir(path) or not os.path.exists(path):
            if os.path.isfile(path) and self.command == "GET":
                type(self).sent += os.path.getsize(path)
            return super().send_head()
        size = os.path.getsize(path)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, size - int(last))
        stop = min(size, int(last) + 1) if first and last else size
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "GET":
            type(self).sent += stop - start
            with open(path, "rb") as file:
                file.seek(start)
                self.wfile.write(file.read(stop - start))
        return None

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Takes as many requests at once as tensorstore sends: one that it does not take comes again after seconds."""

    request_queue_size = 256


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """A folder, and the URL under which a web server on loopback gives it."""
    folder = tmp_path_factory.mktemp("web")
    server = Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    from fsspec.implementations.http import HTTPFileSystem

    forget_sessions(HTTPFileSystem)
    server.shutdown()
    server.server_close()
    thread.join()


def test_zarr_over_http(web):
    folder, url = web
    data = voxels("uint16")
    write_ome(folder / "em.zarr", data, "0.5")
    opened = volume.open(f"{url}/em.zarr")
    assert opened.voxel_size_nm == (50, 5, 5)
    assert_reads(opened, data)
    with refused("no zarr array or group", f"{url}/none.zarr"):
        volume.open(f"{url}/none.zarr")


@pytest.mark.parametrize(
    "options",
    [{}, {"compression": "zlib", "rowsperstrip": 7}, {"tile": (16, 16)}, {"imagej": True, "metadata": {"axes": "ZYX"}}],
)
def test_tiff_over_http(web, options):
    folder, url = web
    data = voxels("uint16")
    tifffile.imwrite(folder / "em.tif", data, photometric="minisblack", **options)
    name = f"em-{len(options)}-{next(iter(options), '')}.tif"
    (folder / "em.tif").rename(folder / name)
    assert_reads(volume.open(f"{url}/{name}"), data)


def test_only_the_bytes_of_a_box_are_fetched(web):
    folder, url = web
    data = voxels("uint8", (40, 500, 500))
    tifffile.imwrite(folder / "large.tif", data, photometric="minisblack", compression="zlib", rowsperstrip=50)
    tifffile.imwrite(folder / "plain.tif", data, photometric="minisblack")
    box = Box((20, 100, 0), (21, 150, 500))
    for name, most in (("large.tif", 60 * files.HEADER_BLOCK), ("plain.tif", 8 * files.HEADER_BLOCK)):
        Handler.sent = 0
        np.testing.assert_array_equal(volume.open(f"{url}/{name}").read(box), data[box.slices])
        assert 0 < Handler.sent < most


def test_n5_and_precomputed_over_http(web, tmp_path):
    folder, url = web
    data = voxels("uint16")
    written.n5(folder, data)
    written.precomputed(folder, voxels())
    assert_reads(volume.open(f"{url}/em.n5/raw"), data)
    for path in (f"precomputed://{url}/em", f"{url}/em"):
        opened = volume.open(path)
        assert (opened.kind, opened.voxel_size_nm) == ("precomputed", (50, 5, 4))
        assert_reads(opened, voxels())
    with refused("no single N5 array"):
        volume.open(f"{url}/em.n5/none")


def test_n5_precomputed_and_tiff_on_s3(bucket, tmp_path):
    import s3fs

    data = voxels("uint16")
    written.n5(tmp_path, data)
    written.precomputed(tmp_path, data)
    tifffile.imwrite(tmp_path / "em.tif", data, photometric="minisblack")
    store = s3fs.S3FileSystem()
    for name in ("em.n5", "em", "em.tif"):
        store.put(str(tmp_path / name), f"{bucket}/formats/{name}", recursive=(tmp_path / name).is_dir())
    for path, kind in (("em.n5/raw", "n5"), ("em", "precomputed"), ("em.tif", "tiff")):
        opened = volume.open(f"{bucket}/formats/{path}")
        assert opened.kind == kind
        assert_reads(opened, data)


def test_what_is_not_there_and_what_needs_a_disk_are_refused(web):
    _, url = web
    with refused("none.tif"):
        volume.open(f"{url}/none.tif")
    with refused("em.h5", "read from a disk alone", "copy it here"):
        volume.open(f"{url}/em.h5")


def test_a_folder_of_jpeg_slices(tmp_path):
    from PIL import Image

    (tmp_path / "v").mkdir()
    data = np.empty(SHAPE, np.uint8)
    for z, plane in enumerate(voxels()):
        file = tmp_path / "v" / f"s{z}.{'jpg' if z else 'JPEG'}"
        Image.fromarray(plane).save(file, quality=90)
        data[z] = np.asarray(Image.open(file))
    assert_reads(volume.open(tmp_path / "v"), data)
    file.write_bytes(file.read_bytes()[:-200])
    with refused(file, "truncated"):
        volume.open(tmp_path / "v").read(Box.from_shape(SHAPE))
