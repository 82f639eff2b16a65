"""Volumes in every format, each written by the library that its format is known by."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

SIZE_NM = (50.0, 5.0, 4.0)  # z y x, unless a writer below says otherwise


def npy(folder: Path, data: np.ndarray) -> Path:
    np.save(folder / "em.npy", data)
    return folder / "em.npy"


def npy_fortran(folder: Path, data: np.ndarray) -> Path:
    np.save(folder / "em.npy", np.asfortranarray(data))
    return folder / "em.npy"


def mrc(folder: Path, data: np.ndarray, name: str = "em.mrc", compression: str | None = None) -> Path:
    import mrcfile

    with mrcfile.new(folder / name, compression=compression) as file:
        file.set_data(data)
        file.voxel_size = tuple(10 * n for n in SIZE_NM[::-1])
    return folder / name


def mrc_gzip(folder: Path, data: np.ndarray) -> Path:
    return mrc(folder, data, "em.mrc.gz", "gzip")


def nifti(folder: Path, data: np.ndarray, name: str = "em.nii", kind: str = "Nifti1Image") -> Path:
    import nibabel

    image = getattr(nibabel, kind)(data.T, np.diag([n / 1000 for n in SIZE_NM[::-1]] + [1]))
    image.header.set_xyzt_units("micron")
    nibabel.save(image, folder / name)
    return folder / name


def nifti_gzip(folder: Path, data: np.ndarray) -> Path:
    return nifti(folder, data, "em.nii.gz")


def nifti_2(folder: Path, data: np.ndarray) -> Path:
    return nifti(folder, data, kind="Nifti2Image")


def nifti_pair(folder: Path, data: np.ndarray) -> Path:
    nifti(folder, data, "em.img", "Nifti1Pair")
    return folder / "em.hdr"


def nrrd(folder: Path, data: np.ndarray, encoding: str = "raw", name: str = "em.nrrd") -> Path:
    import nrrd

    space = {"space dimension": 3, "space directions": np.diag(SIZE_NM[::-1]), "space units": ["nm"] * 3}
    nrrd.write(str(folder / name), data.T, {"encoding": encoding, **space}, detached_header=name.endswith("nhdr"))
    return folder / name


def nrrd_gzip(folder: Path, data: np.ndarray) -> Path:
    return nrrd(folder, data, "gzip")


def nrrd_detached(folder: Path, data: np.ndarray) -> Path:
    return nrrd(folder, data, "gzip", "em.nhdr")


def hdf5(folder: Path, data: np.ndarray) -> Path:
    import h5py

    with h5py.File(folder / "em.h5", "w") as file:
        raw = file.create_dataset("volumes/raw", data=data, chunks=(2, 16, 16), compression="gzip", shuffle=True)
        raw.attrs["element_size_um"] = [n / 1000 for n in SIZE_NM]
    return folder / "em.h5"


def imaris(folder: Path, data: np.ndarray, channels: int = 1) -> Path:
    """As Imaris' own writer lays it out: chunks padded, attributes as arrays of letters."""
    import h5py

    def letters(text: object) -> np.ndarray:
        return np.array(list(str(text)), "S1")

    padded = np.zeros((8, 64, 64), data.dtype)
    padded[tuple(slice(n) for n in data.shape)] = data
    with h5py.File(folder / "em.ims", "w") as file:
        for channel in range(channels):
            group = file.create_group(f"DataSet/ResolutionLevel 0/TimePoint 0/Channel {channel}")
            group.create_dataset("Data", data=padded + channel, chunks=(8, 32, 32), compression="gzip")
            group.attrs.update({f"ImageSize{a}": letters(n) for a, n in zip("ZYX", data.shape, strict=True)})
        file.create_dataset("DataSet/ResolutionLevel 1/TimePoint 0/Channel 0/Data", data=padded[::2, ::2, ::2])
        file.create_dataset("Thumbnail/Data", data=np.zeros((4, 4), np.uint8))
        info = file.create_group("DataSetInfo/Image").attrs
        info["Unit"] = letters("um")
        for i, (n, size) in enumerate(zip(data.shape[::-1], SIZE_NM[::-1], strict=True)):
            info[f"ExtMin{i}"], info[f"ExtMax{i}"] = letters("1.0"), letters(1 + n * size / 1000)
    return folder / "em.ims"


def big_data_viewer(folder: Path, data: np.ndarray) -> Path:
    """One view of two levels, with the XML file beside it; 16-bit gray values lie there as signed integers."""
    import h5py

    with h5py.File(folder / "em.h5", "w") as file:
        for level, step in enumerate((1, 2)):
            stored = data[::step, ::step, ::step].astype(np.uint16).view(np.int16)
            file.create_dataset(f"t00000/s00/{level}/cells", data=stored, chunks=(2, 16, 16))
        file.create_dataset("s00/resolutions", data=np.array([[1, 1, 1], [2, 2, 2]], float))
    size = " ".join(f"{n / 1000:g}" for n in SIZE_NM[::-1])
    (folder / "em.xml").write_text(
        "<SpimData><SequenceDescription><ViewSetups><ViewSetup><id>0</id><voxelSize><unit>µm</unit>"
        f"<size>{size}</size></voxelSize></ViewSetup></ViewSetups></SequenceDescription></SpimData>",
        encoding="utf-8",
    )
    return folder / "em.h5"


def n5(folder: Path, data: np.ndarray, kvstore: object = None) -> Path:
    import tensorstore

    place = kvstore or {"driver": "file", "path": str(folder / "em.n5" / "raw")}
    metadata = {
        "dimensions": data.shape[::-1], "blockSize": [16, 16, 2], "dataType": data.dtype.name,
        "compression": {"type": "gzip"}, "resolution": SIZE_NM[::-1], "units": ["nm"] * 3,
    }  # fmt: skip
    made = tensorstore.open({"driver": "n5", "kvstore": place, "metadata": metadata}, create=True).result()
    made[...] = data.T
    return folder / "em.n5"


def precomputed(folder: Path, data: np.ndarray, encoding: str = "raw", kvstore: object = None) -> Path:
    import tensorstore

    labels = {"compressed_segmentation_block_size": [8, 8, 8]} if encoding == "compressed_segmentation" else {}
    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": kvstore or {"driver": "file", "path": str(folder / "em")},
        "multiscale_metadata": {
            "type": "segmentation" if labels else "image", "data_type": data.dtype.name, "num_channels": 1
        },
        "scale_metadata": {
            "size": data.shape[::-1], "encoding": encoding, "chunk_size": [16, 16, 2], "resolution": SIZE_NM[::-1],
            "voxel_offset": [7, 0, 3], **labels,
        },
    }  # fmt: skip
    made = tensorstore.open(spec, create=True).result()
    made[...] = data.T[..., None]
    return folder / "em"


def compressed_segmentation(folder: Path, data: np.ndarray) -> Path:
    return precomputed(folder, data, "compressed_segmentation")


def czi(folder: Path, data: np.ndarray) -> Path:
    from pylibCZIrw import czi

    with czi.create_czi(str(folder / "em.czi")) as file:
        for z, plane in enumerate(data):
            file.write(np.ascontiguousarray(plane[..., None]), plane={"Z": z, "C": 0, "T": 0})
        scale = dict(zip(("scale_z", "scale_y", "scale_x"), (n * 1e-9 for n in SIZE_NM), strict=True))
        file.write_metadata(document_name="em", **scale)
    return folder / "em.czi"


def zipped_zarr(folder: Path, data: np.ndarray) -> Path:
    import zarr

    path = folder / "em.zarr.zip"
    store = zarr.storage.ZipStore(path, mode="w")
    axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    levels = [{"path": "s0", "coordinateTransformations": [{"type": "scale", "scale": SIZE_NM}]}]
    attributes = {"ome": {"version": "0.5", "multiscales": [{"axes": axes, "datasets": levels}]}}
    group = zarr.create_group(store, attributes=attributes)
    group.create_array("s0", data=data, chunks=(2, 16, 16))
    store.close()
    return path


# Nothing writes Gatan's format but Gatan's own program: this follows its description at
# https://personal.ntu.edu.sg/cbb/info/dmformat, and tests hold what volseg reads to ncempy.


def dm3(folder: Path, data: np.ndarray) -> Path:
    return _dm(folder / "em.dm3", data, 3)


def dm4(folder: Path, data: np.ndarray) -> Path:
    return _dm(folder / "em.dm4", data, 4)


def _dm(path: Path, data: np.ndarray, version: int) -> Path:
    kinds = {"uint8": (6, 8), "uint16": (10, 4), "int16": (1, 2), "float32": (2, 6)}  # of an image, of its array
    word = ">I" if version == 3 else ">Q"

    def tag(kind: int, name: str, body: bytes) -> bytes:
        length = struct.pack(word, len(body)) if version == 4 else b""
        return struct.pack(">BH", kind, len(name)) + name.encode() + length + body

    def group(name: str, *tags: bytes) -> bytes:
        return tag(20, name, b"\0\0" + struct.pack(word, len(tags)) + b"".join(tags))

    def value(name: str, kind: int, form: str, number: float) -> bytes:
        return tag(21, name, b"%%%%" + struct.pack(word, 1) + struct.pack(word, kind) + struct.pack("<" + form, number))

    def array(name: str, kind: int, count: int, stored: bytes) -> bytes:
        return tag(
            21,
            name,
            b"%%%%" + struct.pack(word, 3) + b"".join(struct.pack(word, n) for n in (20, kind, count)) + stored,
        )

    def image(voxels: np.ndarray, kind: tuple[int, int], sizes: tuple[float, ...]) -> bytes:
        unit = "nm".encode("utf-16-le")
        dimensions = [
            group("", value("Origin", 6, "f", 0), value("Scale", 6, "f", size), array("Units", 4, 2, unit))
            for size in sizes[::-1]
        ]
        return group("", group("ImageData",
            group("Calibrations", group("Dimension", *dimensions)),
            array("Data", kind[1], voxels.size, voxels.astype(voxels.dtype.newbyteorder("<")).tobytes()),
            value("DataType", 5, "I", kind[0]),
            group("Dimensions", *(value("", 5, "I", n) for n in voxels.shape[::-1])),
        ), group("ImageTags"))  # fmt: skip

    thumbnail = image(np.zeros((4, 4), np.int32), (23, 3), (1.0, 1.0))
    root = [group("ImageList", thumbnail, image(data, kinds[data.dtype.name], SIZE_NM))]
    body = b"\0\0" + struct.pack(word, len(root)) + b"".join(root)
    path.write_bytes(struct.pack(">I", version) + struct.pack(word, len(body)) + struct.pack(">I", 1) + body)
    return path


FILES = {
    "npy": (npy, "uint16"), "npy, Fortran order": (npy_fortran, "float32"), "mrc": (mrc, "int16"),
    "mrc, int8": (mrc, "int8"), "mrc, gzip": (mrc_gzip, "float32"), "nifti": (nifti, "uint8"),
    "nifti, gzip": (nifti_gzip, "int16"), "nifti 2": (nifti_2, "uint32"), "nifti pair": (nifti_pair, "float64"),
    "nrrd": (nrrd, "uint64"), "nrrd, gzip": (nrrd_gzip, "uint8"), "nrrd, detached": (nrrd_detached, "uint16"),
    "hdf5": (hdf5, "uint16"), "imaris": (imaris, "uint8"), "big data viewer": (big_data_viewer, "uint16"),
    "czi": (czi, "uint8"), "czi, 16 bits": (czi, "uint16"), "dm3": (dm3, "int16"), "dm4": (dm4, "float32"),
    "zipped zarr": (zipped_zarr, "uint8"),
}  # fmt: skip
FOLDERS = {
    "n5": (n5, "uint16"), "precomputed": (precomputed, "uint8"),
    "compressed segmentation": (compressed_segmentation, "uint64"),
}  # fmt: skip
EVERY = {**FILES, **FOLDERS}
