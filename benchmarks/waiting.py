"""How long a device waits for data: runs of a volume in small chunks, on disk and in a store that answers late."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import tifffile
import zarr
from zarr.codecs import GzipCodec, ZstdCodec

from benchmarks import report

LATENCY_S = 0.03  # before the far store answers
CODECS = {"gzip": GzipCodec(level=5), "zstd": ZstdCodec(level=3)}
CHUNK = (64, 64, 64)
SECTIONS = 128


def measure(image: str, out: str, workers: tuple[int, ...]) -> None:
    """A row for each codec, store and number of workers: in how much of predict the workers waited for data."""
    rows, folder = [], Path(out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    voxels = tifffile.imread(image)[:SECTIONS]
    for name, codec in CODECS.items():
        path = folder / f"{name}.zarr"
        shutil.rmtree(path, ignore_errors=True)
        array = zarr.create_array(path, shape=voxels.shape, chunks=CHUNK, dtype="uint8", compressors=[codec])
        array[:] = voxels
        with served(folder) as address:
            for where in (str(path), f"{address}/{path.name}"):
                for count in workers:
                    rows.append({"codec": name, "store": "disk" if where == str(path) else "30 ms away", "workers": count,
                                 **_run(where, folder / "run.volseg.zarr", count, voxels.size / 1e6)})  # fmt: skip
                    print(rows[-1], file=sys.stderr)
    report.keep("waiting", rows)


def _run(source: str, out: Path, workers: int, millions: float) -> dict:
    line = [sys.executable, "-m", "volseg", "infer", source, "--out", str(out), "--overwrite", "--voxel-nm=5,5,5",
            f"--workers={workers}", "--set=cluster.dashboard="]  # fmt: skip
    start = time.perf_counter()
    subprocess.run(line, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    facts = json.loads((out / "run.json").read_text())
    spent = facts["worker_seconds"]["predict"]
    return {
        "waited %": round(100 * facts["data_wait_share"], 1),
        "read, Mvoxel/s of a worker": round(millions / spent["read"], 1),
        "inferred, Mvoxel/s of a worker": round(millions / spent["infer"], 1),
        "seconds": round(time.perf_counter() - start, 1),
    }


# ---------------------------------------------------------------- a store that answers late


class _Late(SimpleHTTPRequestHandler):
    """Files of a folder, each after `LATENCY_S`; connections stay open."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        time.sleep(LATENCY_S)
        super().do_GET()

    def do_HEAD(self) -> None:
        time.sleep(LATENCY_S)
        super().do_HEAD()

    def log_message(self, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    request_queue_size = 256  # connections that wait to be taken


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of what lies in the folder, on a server that answers late."""
    server = _Server(("127.0.0.1", 0), partial(_Late, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
