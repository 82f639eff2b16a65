"""The forward pass: backends agree, and its bits depend on nothing but the model, backend and precision."""

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import numpy as np
import pytest

from volseg.inference import backends, cache, export, model

SHAPE = (1, 3, 96, 128)


@pytest.fixture(scope="module")
def batch():
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


@pytest.fixture(scope="module")
def expected(batch):
    """torch in float32, from the model file."""
    network = backends.load(export.export_model(model.shipped(), "torch"), "torch", "fp32", SHAPE)
    return network(batch)


@pytest.mark.parametrize("backend", ["openvino", "onnx"])
def test_backends_agree_with_torch(backend, batch, expected):
    network = backends.load(export.export_model(model.shipped(), backend), backend, "fp32", SHAPE)
    assert np.abs(network(batch) - expected).max() < 2e-3
    assert np.abs(network(batch) - expected).mean() < 0.2 / 255


@pytest.mark.parametrize("backend", ["openvino", "onnx", "torch"])
def test_threads_side_by_side_change_no_bit(backend, batch):
    blob = export.export_model(model.shipped(), backend)
    one, three = (backends.load(blob, backend, "fp32", SHAPE, threads) for threads in (1, 3))
    tiles = [(i, np.roll(batch, i, axis=-1)) for i in range(7)]
    first = [one(tile) for _, tile in tiles]
    for (i, got), want in zip(backends.imap(three, tiles, 3), first, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=f"tile {i}")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_network_kept_compiled_gives_the_same_bits(precision, batch, tmp_path, monkeypatch):
    monkeypatch.setenv("VOLSEG_CACHE", str(tmp_path))
    blob = export.export_model(model.shipped(), "openvino", precision)
    first = backends.load(blob, "openvino", precision, SHAPE)(batch)
    (kept,) = tmp_path.glob("*.openvino")
    whole = kept.read_bytes()
    np.testing.assert_array_equal(backends.load(blob, "openvino", precision, SHAPE)(batch), first)
    kept.write_bytes(whole[: len(whole) // 2])
    np.testing.assert_array_equal(backends.load(blob, "openvino", precision, SHAPE)(batch), first)
    assert kept.stat().st_size > 0.9 * len(whole), "what was cut off is made anew"


def test_the_cache_keeps_the_networks_of_late(tmp_path, monkeypatch):
    monkeypatch.setenv("VOLSEG_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "MAX_FILES_PER_KIND", 2)
    blob = export.export_model(model.shipped(), "openvino")
    found = []
    for width in (64, 96, 128):
        backends.load(blob, "openvino", "fp32", (1, 3, 64, width))
        found.append(set(tmp_path.glob("*.openvino")))
    assert len(found[1]) == len(found[2]) == 2
    assert found[0] <= found[1]
    assert not found[0] & found[2]
    assert list(tmp_path.glob("*.onnx")), "other forms are counted apart"


def test_auto_takes_a_backend_that_runs_here():
    backend, precision = backends.choose()
    assert backends.version(backend)
    network = backends.load(export.export_model(model.shipped(), backend), backend, precision, SHAPE)
    out = network(np.zeros(SHAPE, np.float32))
    assert out.shape == (1, 2, 96, 128)
    assert out.dtype == np.float32
    assert out.min() >= 0
    assert out.max() <= 1


def test_a_cache_that_cannot_be_written_stops_nobody(batch, tmp_path, monkeypatch):
    tmp_path.joinpath("a file").touch()
    monkeypatch.setenv("VOLSEG_CACHE", str(tmp_path / "a file"))
    assert (
        backends.load(export.export_model(model.shipped(), "openvino"), "openvino", "fp32", SHAPE)(batch).shape[1] == 2
    )


def test_inference_is_imported_without_torch_or_dask():
    names = ["autoselect", "backends", "cache", "device", "export", "hardware", "model", "model_card", "normalization",
             "sampling", "tiles"]  # fmt: skip
    code = f"import sys; [__import__('volseg.inference.' + name) for name in {names}]; "
    code += "sys.exit(', '.join({'torch', 'dask', 'distributed', 'openvino', 'onnxruntime'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.stderr.strip()


def test_one_batch_at_a_time_is_done_by_the_caller_when_it_is_asked_for():
    done = []

    def forward(batch):
        done.append((batch, threading.get_ident()))
        return batch

    results = backends.imap(forward, enumerate([3, 4]), threads=1)
    assert next(results) == (0, 3)
    assert done == [(3, threading.get_ident())]
    assert next(results) == (1, 4)


def test_a_batch_of_another_shape_is_refused(batch):
    network = backends.load(export.export_model(model.shipped(), "openvino", "int8"), "openvino", "int8", SHAPE)
    network(batch)
    for other in (batch[..., :64], batch[:, :1], np.concatenate([batch, batch])):
        with pytest.raises(RuntimeError, match="tensor"):
            network(np.ascontiguousarray(other))


ASKS = """
import sys, time
blob = open(sys.argv[1], "rb").read()
if sys.argv[2] == "volseg":
    from volseg.inference import backends
    backends.load(blob, "onnx", "fp32", (1, 3, 96, 128))
else:
    import onnxruntime
    session = onnxruntime.InferenceSession(blob, providers=["CPUExecutionProvider"])
time.sleep(30)
"""


@pytest.fixture
def proxy():
    """Makes a proxy on loopback: its address, and how others were asked for there."""
    servers = []

    def make():
        server, found = socket.create_server(("127.0.0.1", 0)), []
        servers.append(server)

        def serve():
            with suppress(OSError):
                while True:
                    with server.accept()[0] as connection:
                        connection.settimeout(10)
                        found.append(connection.recv(500))

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}", found

    yield make
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def test_onnx_runtime_calls_nobody(tmp_path, proxy):
    """By itself it tells its makers of each session, some seconds after: through the proxy here, which nobody passes."""
    (tmp_path / "model.onnx").write_bytes(export.export_model(model.shipped(), "onnx"))
    asked, processes = {}, []
    bare = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "CI")}
    for who in ("volseg", "nobody"):
        url, asked[who] = proxy()
        names = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        command = [sys.executable, "-c", ASKS, str(tmp_path / "model.onnx"), who]
        processes.append(
            subprocess.Popen(command, env={**bare, **dict.fromkeys(names, url)}, stderr=subprocess.DEVNULL)
        )
    end = time.monotonic() + 25
    while not asked["nobody"] and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(1)
    for process in processes:
        assert process.poll() is None, "it still runs its session"
        process.kill()
        process.wait()
    if not asked["nobody"]:
        pytest.skip("this ONNX Runtime does not call its makers here")
    assert not asked["volseg"]
