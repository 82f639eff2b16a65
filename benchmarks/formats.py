"""Reading a whole file of each format box by box: volseg beside the format's own library, and the memory that each holds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.repeat import time_isolated
from volseg.box import Blocks, Triple
from volseg.io import volume

PLANE = (1024, 1024)
BOX = (64, 256, 256)
CHUNK = (64, 128, 128)
Reader = Callable[[tuple[slice, slice, slice]], np.ndarray]


def measure(gigabytes: float, repeats: int, only: tuple[str, ...] = ()) -> None:
    """A row for each format: MB/s of the library alone and of volseg, their ratio, and the memory that each took on top."""
    shape = (max(8, round(gigabytes * 1e9 / (PLANE[0] * PLANE[1]))), *PLANE)
    rows = []
    for name, (write, alone) in FORMATS.items():
        if only and name not in only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = write(Path(folder), shape)
            makers = {"library": partial(_library, alone, path), "volseg": partial(_volseg, path)}
            timed, _ = time_isolated(makers, shape, repeats, {})
        size = shape[0] * shape[1] * shape[2] / 1e6
        seconds = {who: median(one.seconds for one in runs) for who, runs in timed.items()}
        peak = {who: round(max(one.peak_bytes for one in runs) / 1e6) for who, runs in timed.items()}
        row: dict[str, Any] = {"format": name, "GB": round(size / 1e3, 2)}
        row |= {f"{who}, MB/s": round(size / taken) for who, taken in seconds.items()}
        row["time, volseg / library"] = round(seconds["volseg"] / seconds["library"], 2)
        row |= {f"peak of {who}, MB": taken for who, taken in peak.items()}
        rows.append(row)
    report.keep("formats", rows)


def _library(alone: Callable[[Path], Reader], path: Path) -> Callable[[Triple], int]:
    alone(path)  # its imports do not count
    return lambda shape: _sweep(alone(path), shape)


def _volseg(path: Path) -> Callable[[Triple], int]:
    volume.open(path)

    def sweep(shape: Triple) -> int:
        opened = volume.open(path)
        return sum(int(opened.read(box)[0, 0, 0]) for box in Blocks(shape, BOX))

    return sweep


def _sweep(read: Reader, shape: Triple) -> int:
    """Every box of a volume is read; the sum of their first voxels."""
    return sum(int(read(box.slices)[0, 0, 0]) for box in Blocks(shape, BOX))


def _planes(shape: Triple) -> Iterator[np.ndarray]:
    """Sections that compress as EM does: noise over something smooth."""
    rng = np.random.default_rng(0)
    y, x = np.ogrid[: shape[1], : shape[2]]
    noise = rng.integers(0, 24, (shape[1] + 64, shape[2]), np.uint8)
    smooth = np.uint8(90 + 40 * np.sin(y / 37) + 40 * np.cos(x / 53))
    for z in range(shape[0]):
        yield np.roll(smooth, 3 * z, axis=0) + noise[z % 64 : z % 64 + shape[1]]


def _fill(target: Any, shape: Triple, depth: int = CHUNK[0]) -> None:
    """``target[z:stop]`` is written in slabs."""
    slab: list[np.ndarray] = []
    for z, plane in enumerate(_planes(shape), 1):
        slab.append(plane)
        if len(slab) == depth or z == shape[0]:
            target[z - len(slab) : z] = np.stack(slab)
            slab.clear()


def _chunk(shape: Triple) -> Triple:
    z, y, x = (min(c, n) for c, n in zip(CHUNK, shape, strict=True))
    return z, y, x


# ---------------------------------------------------------------- one writer and one reader a format


def write_npy(folder: Path, shape: Triple, fortran: bool = False) -> Path:
    made = np.lib.format.open_memmap(folder / "em.npy", "w+", np.uint8, shape, fortran_order=fortran)
    _fill(made, shape)
    made.flush()
    return folder / "em.npy"


def read_npy(path: Path) -> Reader:
    mapped = np.load(path, mmap_mode="r")
    return lambda box: np.array(mapped[box], order="C")


def write_mrc(folder: Path, shape: Triple) -> Path:
    import mrcfile

    with mrcfile.new_mmap(folder / "em.mrc", shape, mrc_mode=0) as file:
        _fill(file.data.view(np.uint8), shape)
    return folder / "em.mrc"


def read_mrc(path: Path) -> Reader:
    import mrcfile

    mapped = mrcfile.mmap(path)
    return lambda box: np.array(mapped.data[box])


def write_nifti(folder: Path, shape: Triple) -> Path:
    import nibabel

    image = nibabel.Nifti1Image(np.empty((1, 1, 1), np.uint8), np.eye(4))
    image.header.set_data_shape(shape[::-1])
    image.header.set_data_offset(352)
    with (folder / "em.nii").open("wb") as file:
        image.header.write_to(file)
        file.seek(352)
        for plane in _planes(shape):
            file.write(plane.tobytes())
    return folder / "em.nii"


def read_nifti(path: Path) -> Reader:
    import nibabel

    proxy = nibabel.load(path).dataobj
    return lambda box: np.array(proxy[box[::-1]]).T


def write_nrrd(folder: Path, shape: Triple) -> Path:
    head = f"NRRD0004\ntype: uint8\ndimension: 3\nsizes: {' '.join(map(str, shape[::-1]))}\nencoding: raw\n\n"
    with (folder / "em.nrrd").open("wb") as file:
        file.write(head.encode())
        for plane in _planes(shape):
            file.write(plane.tobytes())
    return folder / "em.nrrd"


def read_nrrd(path: Path) -> Reader:
    """pynrrd reads a file whole, so its header leads to numpy's mapping, the fastest that a user would write."""
    import nrrd

    with path.open("rb") as file:
        sizes = nrrd.read_header(file)["sizes"]
        mapped = np.memmap(path, np.uint8, "r", offset=file.tell(), shape=tuple(sizes[::-1]))
    return lambda box: np.array(mapped[box])


def write_hdf5(folder: Path, shape: Triple, compression: str | None = None) -> Path:
    import h5py

    with h5py.File(folder / "em.h5", "w") as file:
        made = file.create_dataset("raw", shape, np.uint8, chunks=_chunk(shape), compression=compression)
        _fill(made, shape)
    return folder / "em.h5"


def read_hdf5(path: Path) -> Reader:
    import h5py

    data = h5py.File(path)["raw"]
    return lambda box: data[box]


def _tensorstore(spec: dict, shape: Triple, channel: bool) -> None:
    import tensorstore

    made = tensorstore.open(spec, create=True).result()
    _fill((made[..., 0] if channel else made).T, shape)


def write_n5(folder: Path, shape: Triple) -> Path:
    metadata = {
        "dimensions": shape[::-1], "blockSize": _chunk(shape)[::-1], "dataType": "uint8",
        "compression": {"type": "blosc", "cname": "zstd", "clevel": 1, "shuffle": 0},
    }  # fmt: skip
    place = {"driver": "file", "path": str(folder / "em.n5")}
    _tensorstore({"driver": "n5", "kvstore": place, "metadata": metadata}, shape, channel=False)
    return folder / "em.n5"


def write_precomputed(folder: Path, shape: Triple) -> Path:
    scale = {"size": shape[::-1], "encoding": "raw", "chunk_size": _chunk(shape)[::-1], "resolution": [5, 5, 5]}
    spec = {
        "driver": "neuroglancer_precomputed", "kvstore": {"driver": "file", "path": str(folder / "em")},
        "multiscale_metadata": {"type": "image", "data_type": "uint8", "num_channels": 1}, "scale_metadata": scale,
    }  # fmt: skip
    _tensorstore(spec, shape, channel=True)
    return folder / "em"


def read_tensorstore(path: Path, driver: str) -> Reader:
    import tensorstore

    spec = {"driver": driver, "kvstore": {"driver": "file", "path": str(path)}}
    found = tensorstore.open(spec, read=True, open=True).result()
    array = (found[..., 0] if found.ndim == 4 else found).T
    return lambda box: array[box].read().result()


def write_zip(folder: Path, shape: Triple) -> Path:
    import zarr

    store = zarr.storage.ZipStore(folder / "em.zarr.zip", mode="w")
    _fill(zarr.create_array(store, shape=shape, chunks=_chunk(shape), dtype=np.uint8), shape)
    store.close()
    return folder / "em.zarr.zip"


def read_zip(path: Path) -> Reader:
    import zarr

    array = zarr.open_array(zarr.storage.ZipStore(path), mode="r")
    return lambda box: np.asarray(array[box])


def write_tiff(folder: Path, shape: Triple) -> Path:
    import tifffile

    tifffile.imwrite(
        folder / "em.tif", _planes(shape), shape=shape, dtype=np.uint8, bigtiff=True, photometric="minisblack"
    )
    return folder / "em.tif"


def read_tiff(path: Path) -> Reader:
    import tifffile

    mapped = tifffile.memmap(path, mode="r")
    return lambda box: np.array(mapped[box])


def write_czi(folder: Path, shape: Triple) -> Path:
    from pylibCZIrw import czi

    with czi.create_czi(str(folder / "em.czi")) as file:
        for z, plane in enumerate(_planes(shape)):
            file.write(np.ascontiguousarray(plane[..., None]), plane={"Z": z, "C": 0, "T": 0})
    return folder / "em.czi"


def read_czi(path: Path) -> Reader:
    from pylibCZIrw.czi import CziReader

    file = CziReader(str(path))

    def read(box: tuple[slice, slice, slice]) -> np.ndarray:
        z, y, x = box
        roi = (x.start, y.start, x.stop - x.start, y.stop - y.start)
        planes = [file.read(roi=roi, plane={"C": 0, "Z": i, "T": 0})[..., 0] for i in range(z.start, z.stop)]
        return np.stack(planes)

    return read


FORMATS: dict[str, tuple[Callable[[Path, Triple], Path], Callable[[Path], Reader]]] = {
    "npy": (write_npy, read_npy),
    "npy, Fortran order": (partial(write_npy, fortran=True), read_npy),
    "mrc": (write_mrc, read_mrc),
    "nifti": (write_nifti, read_nifti),
    "nrrd": (write_nrrd, read_nrrd),
    "hdf5": (write_hdf5, read_hdf5),
    "hdf5, gzip": (partial(write_hdf5, compression="gzip"), read_hdf5),
    "n5, zstd": (write_n5, partial(read_tensorstore, driver="n5")),
    "precomputed": (write_precomputed, partial(read_tensorstore, driver="neuroglancer_precomputed")),
    "zipped zarr, zstd": (write_zip, read_zip),
    "tiff": (write_tiff, read_tiff),
    "czi": (write_czi, read_czi),
}
