"""Faults of an object store: a real S3 server behind a proxy that answers late, wrongly, in part, or not at all."""

from __future__ import annotations

import http.client
import logging
import shutil
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.chaos.command import CLIENT
from benchmarks.chaos.episode import Episode, skipped
from benchmarks.chaos.stand import EXISTS, Stand

BUCKET = "chaos"
RATES = (0.01, 0.03, 0.1, 0.3)  # share of the requests that are disturbed
DELAY_RATE = 0.02
DELAYS_S = (0.5, 1, 3)
LATE_S = 1.0  # after it was stored, an object is not there yet
DEAD_S = (0.5, 3, 10)
KILL = 9
HIDDEN = ("transfer-encoding", "connection", "content-length")
BUSY = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>told to</Message></Error>"


@dataclass
class Faults:
    """What a proxy does to requests, and how often it did."""

    mode: str = ""
    rate: float = 0.0
    rng: Random = field(default_factory=lambda: Random(0))
    injected: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    stored: dict[str, float] = field(default_factory=dict)

    def hits(self) -> bool:
        with self.lock:
            hit = bool(self.mode) and self.rng.random() < self.rate
            self.injected += hit
            return hit

    def begin(self, mode: str, rate: float, rng: Random) -> None:
        self.mode, self.rate, self.rng, self.injected = mode, rate, rng, 0

    def end(self) -> None:
        self.mode = ""


class Store:
    """An S3 server on this machine, and the proxy through which commands see it."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.server = ThreadedMotoServer(ip_address=address, port=0, verbose=False)
        self.server.start()
        self.host, self.port = self.server.get_host_and_port()
        self.faults = Faults()
        handler = type("Handler", (_Handler,), {"faults": self.faults, "target": (self.host, self.port)})
        self.proxy = ThreadingHTTPServer((address, 0), handler)
        self.proxy.daemon_threads = True
        threading.Thread(target=self.proxy.serve_forever, daemon=True).start()
        self.client.create_bucket(Bucket=BUCKET)

    @property
    def env(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://{self.host}:{self.proxy.server_port}", "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1", "no_proxy": self.host,
        }  # fmt: skip

    @cached_property
    def client(self) -> Any:
        import boto3

        keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=f"http://{self.host}:{self.port}", **keys)

    def copy(self, prefix: str, to: Path) -> None:
        """All objects under a prefix are files in the folder ``to``."""
        shutil.rmtree(to, ignore_errors=True)
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/"):
            for entry in page.get("Contents", ()):
                file = to / entry["Key"][len(prefix) + 1 :]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(self.client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read())

    def keys(self, prefix: str) -> list[str]:
        """Keys of the objects under a prefix, a thousand at most."""
        answer = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for entry in answer.get("Contents", ())]

    def close(self) -> None:
        self.proxy.shutdown()
        self.server.stop()

    def clear(self) -> None:
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
            for entry in page.get("Contents", ()):
                self.client.delete_object(Bucket=BUCKET, Key=entry["Key"])


class _Handler(BaseHTTPRequestHandler):
    """Passes each request on, or does to it what `Faults` says."""

    protocol_version = "HTTP/1.1"
    faults: Faults
    target: tuple[str, int]

    def log_message(self, *_: Any) -> None:
        """Nothing is told."""

    def _answer(self) -> None:
        with suppress(OSError, http.client.HTTPException):
            self._pass_on(self._body(), self.faults.mode if self.faults.hits() else "")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _answer  # noqa: N815

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def _pass_on(self, body: bytes, mode: str) -> None:
        if mode in ("500", "503"):
            self._send(int(mode), {}, BUSY % (b"SlowDown" if mode == "503" else b"InternalError"))
            return
        if mode == "reset":
            self._reset()
            return
        if mode == "delay":
            time.sleep(self.faults.rng.choice(DELAYS_S))
        if mode == "late" and self.command in ("GET", "HEAD") and self._is_new():
            self._send(404, {}, BUSY % b"NoSuchKey")
            return
        status, headers, data = self._forward(body)
        if self.command == "PUT" and status == 200:
            self.faults.stored[self.path.split("?")[0]] = time.monotonic()
        if mode == "lost":  # the store did it, but nobody hears of it
            self._reset()
            return
        if mode == "flip" and self.command == "GET" and data and status in (200, 206):
            at = self.faults.rng.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ 1 << self.faults.rng.randrange(8)]) + data[at + 1 :]
        if mode == "truncate" and len(data) > 1:
            self._send(status, headers, data, data[: len(data) // 2])
            self.close_connection = True
            return
        self._send(status, headers, data)

    def _is_new(self) -> bool:
        return time.monotonic() - self.faults.stored.get(self.path.split("?")[0], -LATE_S) < LATE_S

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self.target, timeout=60)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for key, value in self.headers.items():
            if key.lower() not in ("transfer-encoding", "content-length", "expect"):
                connection.putheader(key, value)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        data = answer.read()
        headers = {
            key: value for key, value in answer.getheaders() if key.lower() not in HIDDEN or self.command == "HEAD"
        }
        connection.close()
        return answer.status, headers, data

    def _send(self, status: int, headers: dict[str, str], data: bytes, part: bytes | None = None) -> None:
        """An answer whose headers promise ``data``, and that ends after ``part`` of it."""
        self.send_response_only(status)
        for key, value in headers.items():
            if key.lower() not in ("transfer-encoding", "connection"):
                self.send_header(key, value)
        if not any(key.lower() == "content-length" for key in headers):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if part is None else part)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


# ---------------------------------------------------------------- episodes

_STORES: list[Store] = []


def _store() -> Store:
    if not _STORES:
        _STORES.append(Store())
    return _STORES[0]


def disturbed(stand: Stand, rng: Random, episode: Episode, *, mode: str) -> Episode:
    """The output is on a store of which a share of the requests goes wrong in one way; after that the store is well."""
    rate = DELAY_RATE if mode == "delay" else rng.choice(RATES)
    return _play(stand, rng, episode, mode, rate)


def dead(stand: Stand, rng: Random, episode: Episode) -> Episode:
    """The store goes away in the middle of a run, and is back after seconds."""
    return _play(stand, rng, episode, "reset", 1.0, begin=rng.uniform(0.3, 1.0), seconds=rng.choice(DEAD_S))


def killed(stand: Stand, rng: Random, episode: Episode) -> Episode:
    """The client is killed, and its command given again at once."""
    return _play(stand, rng, episode, "", 0, begin=rng.uniform(0.4, 1.2), kill=True)


def _play(
    stand: Stand, rng: Random, episode: Episode, mode: str, rate: float, *, begin: float = 0, seconds: float = 0,
    kill: bool = False,
) -> Episode:  # fmt: skip
    try:
        store = _store()
    except ImportError as error:
        return skipped(episode, f"needs moto (volseg[test]): {error}")
    reference, copy = stand.reference(episode.job), stand.prepare("infer")
    store.clear()
    prefix = f"run-{episode.number}.volseg.zarr"
    line = stand.line(episode.job, f"s3://{BUCKET}/{prefix}")
    if not begin:
        store.faults.begin(mode, rate, rng)
    command = stand.start(line, store.env)
    if begin:
        _wait(command, begin * reference.seconds)
        if kill:
            episode.faults += command.send(KILL, command.pids(CLIENT))
        elif command.alive:
            store.faults.begin(mode, rate, rng)
            _wait(command, seconds)
            store.faults.end()
    episode.ended(command)
    episode.faults += store.faults.injected
    store.faults.end()
    store.faults.injected = 0
    episode.notes.append(f"{mode or 'kill'} {rate or ''}")
    for _ in range(4):
        if episode.codes[-1] in (0, None):
            break
        if episode.ended(stand.start(line, store.env)) == 2 and EXISTS in episode.notes[-1]:
            episode.codes.append(0)
    if episode.codes[-1] == 0:
        store.copy(prefix, copy)
    return episode.judge(copy, reference.hashes)


def _wait(command: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while command.alive and time.monotonic() < deadline:
        time.sleep(0.01)


MODES = {"store-503": "503", "store-500": "500", "store-reset": "reset", "store-lost": "lost", "store-truncate": "truncate",
         "store-delay": "delay", "store-flip": "flip", "store-late": "late"}  # fmt: skip
JOBS = ("segment", "infer")
KINDS = {
    **{kind: (disturbed, JOBS, {"mode": mode}) for kind, mode in MODES.items()},
    "store-dead": (dead, JOBS, {}),
    "store-kill": (killed, JOBS, {}),
}
