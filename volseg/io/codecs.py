"""Whether the codecs here give back what they were given: those that runs are stored with, and those of TIFF."""

from __future__ import annotations

import tempfile
from io import BytesIO
from pathlib import Path

import numpy as np

from volseg.box import Box
from volseg.io import arrays

TIFF_CODECS = ("deflate", "lzw", "zstd", "packbits", "jpeg2000")  # without loss; tifffile's names


def try_codecs() -> dict[str, str]:
    """By name, what is wrong with a codec; ``""`` where an array went through it and came back the same."""
    data = np.random.default_rng(0).integers(0, 50, (4, 32, 64)).astype(np.uint8)
    tried = {"zarr shards with zstd": _tried(_through_zarr, data)}
    return tried | {f"TIFF {name}": _tried(_through_tiff, data, name) for name in TIFF_CODECS}


def _tried(through, data: np.ndarray, *how: str) -> str:  # type: ignore[no-untyped-def]
    try:
        same = np.array_equal(through(data, *how), data)
    except Exception as error:  # of any codec, each with errors of its own
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "" if same else "gives back other voxels"


def _through_zarr(data: np.ndarray) -> np.ndarray:
    with tempfile.TemporaryDirectory(prefix="volseg-") as folder:
        path = str(Path(folder, "test.zarr"))
        arrays.create_group(path)
        form = {"shape": data.shape, "dtype": data.dtype, "chunk": (2, 16, 16), "shard": data.shape, "axes": "zyx"}
        arrays.create_array(path, "0", **form)
        arrays.write(arrays.open_array(path, "0"), Box.from_shape(data.shape), data)
        arrays.clear_array_cache()
        found = np.asarray(arrays.open_array(path, "0")[:])
        arrays.clear_array_cache()
        return found


def _through_tiff(data: np.ndarray, codec: str) -> np.ndarray:
    import tifffile

    file = BytesIO()
    tifffile.imwrite(file, data, compression=codec, photometric="minisblack")
    file.seek(0)
    return tifffile.imread(file)
