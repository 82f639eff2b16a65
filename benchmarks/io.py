"""Reading and writing a block's shards: with zarr's own codecs and with zarrs, on disk and in a store that answers late."""

from __future__ import annotations

import asyncio
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore, WrapperStore

from benchmarks import report
from benchmarks.repeat import time_in_turn
from volseg.box import Box
from volseg.config import Config
from volseg.evaluation.synthetic import synth
from volseg.io import arrays

LATENCY = 0.03  # seconds before the far store answers
PIPELINES = {"zarr": "zarr.core.codec_pipeline.BatchedCodecPipeline", "zarrs": "zarrs.ZarrsCodecPipeline"}
SHAPE = (64, 512, 512)


class Late(WrapperStore):
    """A store that answers after `LATENCY`, as one across a network does."""

    async def get(self, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(LATENCY)
        return await super().get(*args, **kwargs)

    async def set(self, *args: Any, **kwargs: Any) -> None:
        await asyncio.sleep(LATENCY)
        await super().set(*args, **kwargs)


def measure(repeats: int) -> None:
    """Rows of MB/s for image and labels, read and written, by each pipeline and store."""
    image, labels = synth(Box((0, 0, 0), SHAPE), seed=3)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for what, data in (("image", image), ("labels", labels)):
            for where in ("disk", "30 ms away"):
                pipelines = (
                    PIPELINES if where == "disk" else {"zarr": PIPELINES["zarr"]}
                )  # zarrs opens local files itself
                arrays = {name: _array(Path(folder, f"{what}-{where[0]}-{name}"), data, where) for name in pipelines}
                for verb, act in (("write", _write), ("read", _read)):
                    calls = {n: partial(_with, pipelines[n], act, arrays[n], data) for n in pipelines}
                    for name, seconds in time_in_turn(calls, repeats).items():
                        rows.append({"what": what, "store": where, "codecs": name, "verb": verb,
                                     "MB/s": round(data.nbytes / 1e6 / seconds, 1)})  # fmt: skip
    report.keep("io", rows)


def _array(path: Path, data: np.ndarray, where: str) -> zarr.Array:
    """A sharded array as volseg makes them, opened in the store asked for."""
    arrays.create_group(str(path))
    arrays.create_array(
        str(path),
        "0",
        shape=data.shape,
        dtype=data.dtype,
        chunk=Config().output.chunk,
        shard=(32, *data.shape[1:]),
        axes="zyx",
    )
    store = LocalStore(path)
    return zarr.open_array(Late(store) if where != "disk" else store, path="0", mode="r+")


def _with(pipeline: str, act: Any, array: zarr.Array, data: np.ndarray) -> None:
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        act(zarr.open_array(array.store, path=array.path, mode="r+"), data)


def _write(array: zarr.Array, data: np.ndarray) -> None:
    array[:] = data


def _read(array: zarr.Array, data: np.ndarray) -> None:
    if not np.array_equal(array[:], data):
        raise RuntimeError("what was read is not what was written")
