"""Fixtures shared by the tests."""

import gc
import shutil
import sys
import tempfile
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile

from volseg import api, cli
from volseg.evaluation.synthetic_volume import write_synthetic

ROOM = 2 << 30  # bytes; tests store up to 0.8 GB at once


def pytest_sessionstart() -> None:
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < ROOM:
        pytest.exit(
            f"{free / 1e9:.1f} GB are free in {tempfile.gettempdir()}, and tests want {ROOM / 1e9:.1f}; set TMPDIR", 3
        )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    gc.disable()  # modules are no garbage: looking for it took 3 s of 12
    try:
        return (yield)
    finally:
        freeze()
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, None]:
    yield
    if nextitem and nextitem.path != item.path:
        freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # extensions complain at the end of what was not collected


def freeze() -> None:
    """Who looks for garbage skips what is here now, mostly modules: a run does twice, and half its time went there."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real EM (EPFL, VNC) beside the repository; skips where it is absent."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real data: ../shared/data is absent")
    return folder


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    """A synthetic volume with objects on every kind of block border. Tests must not change it."""
    from tests.helpers import SHAPE, Quiet

    path = str(tmp_path_factory.mktemp("image") / "em.zarr")
    write_synthetic(path, SHAPE, (22, 75, 170), seed=12, overwrite=False, progress=Quiet())
    return path


@pytest.fixture(scope="session")
def reference(image, tmp_path_factory):
    """A run of it in one block on one worker. Tests must not change it."""
    from tests.helpers import Quiet, settings

    out = str(tmp_path_factory.mktemp("reference") / "run.volseg.zarr")
    api.infer(image, out, config=settings(cluster={"workers": 1}), progress=Quiet())
    return out


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """URL of a bucket on a real S3 server on loopback, reached through the environment alone (so by workers too)."""
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs (extra s3)")
    server = pytest.importorskip("moto.server", reason="needs moto (extra test)")
    server = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as env:
        env.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        env.setenv("AWS_ACCESS_KEY_ID", "test")
        env.setenv("AWS_SECRET_ACCESS_KEY", "test")
        env.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket"
        forget_sessions(s3fs.S3FileSystem)
    server.stop()


def forget_sessions(filesystem: type) -> None:
    """The sessions that s3fs leaves open are collected here, and not in a later test."""
    from volseg.io import arrays

    arrays.clear_array_cache()
    filesystem.clear_instance_cache()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.unfreeze()
        gc.collect()


@pytest.fixture(scope="session")
def tables(tmp_path_factory):
    """A run's settings as tables: bright balls on noise, 8 sections of 96 x 96, a network as small as it gets."""
    folder = tmp_path_factory.mktemp("data")
    z, y, x = np.ogrid[:8, :96, :96]
    label = np.zeros((8, 96, 96), np.uint8)
    for i, (cy, cx) in enumerate([(20, 20), (24, 70), (70, 30), (66, 74)], 1):
        label[(y - cy) ** 2 + (x - cx) ** 2 + 0 * z < 150] = i
    noise = np.random.default_rng(0).normal(100, 10, label.shape)
    tifffile.imwrite(folder / "image.tif", np.clip(noise + 60 * (label > 0), 1, 255).astype(np.uint8))
    tifffile.imwrite(folder / "label.tif", label, photometric="minisblack")
    data = {"image": str(folder / "image.tif"), "label": str(folder / "label.tif"), "validate_on": ["6:8"]}
    return {
        "data": [data], "decoder": [16, 16, 8, 8, 8], "pretrained": False, "patch": 64, "batch": 2, "every": 2,
        "steps": 6, "ema": 0.5, "device": "cpu",
    }  # fmt: skip


@pytest.fixture(scope="session")
def whole_run(tables, tmp_path_factory):
    """Folder and report of a training run that nothing stopped, with one thread. Tests must not change it."""
    import torch

    from tests.helpers import config_of
    from volseg.training.train import train

    out, lines = tmp_path_factory.mktemp("whole"), []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    train(config_of(tables, out), lines.append)
    torch.set_num_threads(before)
    return out, lines


@pytest.fixture
def run(monkeypatch, capsys):
    """Calls the command line in this process: exit code, standard output, standard error."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["volseg", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        return end.value.code or 0, said.out, said.err

    return call
