"""Damaged files of every format: one line that names the file, nothing written, memory bounded."""

import json

import numpy as np
import pytest

from tests.io import formats as written
from tests.io.helpers import WHOLE, cut_short, read_or_refused, refused, voxels
from volseg.io import header, volume


def data_file(path):
    """The file that holds the voxels of a format with two."""
    return next((path.with_suffix(other) for other in (".img", ".raw.gz") if path.with_suffix(other).exists()), path)


def make(name, folder):
    write, dtype = written.EVERY[name]
    return write(folder, voxels(dtype))


def read_whole(path):
    return volume.open(path).read(WHOLE)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("name", written.FILES)
def test_a_file_cut_short_is_refused(name, share, tmp_path):
    path = make(name, tmp_path)
    cut_short(data_file(path), share)
    with refused(path.stem):
        read_whole(path)


@pytest.mark.parametrize(
    "name", sorted(written.FILES.keys() - {"hdf5", "imaris", "big data viewer"})
)  # have it in memory
def test_a_file_that_shrinks_after_it_was_opened_is_refused(name, tmp_path):
    path = make(name, tmp_path)
    opened = volume.open(path)
    opened.read(WHOLE)
    cut_short(data_file(path), 0.4)
    with refused(path.stem):
        opened.read(WHOLE)


@pytest.mark.parametrize("name", written.FILES)
def test_an_empty_file_and_one_of_other_content_are_refused(name, tmp_path):
    path = make(name, tmp_path)
    for content in (b"", b"\0" * 4096, b"what is this?\n" * 300):
        path.write_bytes(content)
        with refused(path):
            read_whole(path)


@pytest.mark.parametrize("name", written.FILES)
def test_damage_anywhere_in_a_header_is_refused_or_read(name, tmp_path):
    """What comes out may be wrong where no checksum tells, but nothing else than a refusal is raised."""
    path = make(name, tmp_path)
    whole = path.read_bytes()
    rng = np.random.default_rng(5)
    for _ in range(12):
        damaged = bytearray(whole)
        for at in rng.integers(0, min(len(whole), 600), 3):
            damaged[at] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        with read_or_refused():
            read_whole(path)


def test_a_chunk_cut_short_or_not_of_its_codec_is_refused(tmp_path):
    for name, chunk in (
        ("n5", "raw/0/0/0"),
        ("precomputed", "4_5_50/7-23_0-16_3-5"),
        ("compressed segmentation", "4_5_50/7-23_0-16_3-5"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        path = make(name, folder)
        whole = (path / chunk).read_bytes()
        for content in (whole[: len(whole) // 2], b"", b"what"):
            (path / chunk).write_bytes(content)
            with refused(path, "cannot read", f"box {WHOLE}"):
                read_whole(path)


def _npy(folder):
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (10000000, 10000000, 10000000), }".ljust(117) + b"\n"
    (folder / "em.npy").write_bytes(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header)
    return folder / "em.npy"


def _mrc(folder):
    path = written.mrc(folder, voxels("int16"))
    with path.open("r+b") as file:
        file.write(np.array([2**31 - 1] * 3, "<i4").tobytes())
    return path


def _nifti(folder):
    path = written.nifti(folder, voxels())
    with path.open("r+b") as file:
        file.seek(42)
        file.write(np.array([32767] * 3, "<i2").tobytes())
    return path


def _nrrd(folder):
    path = written.nrrd(folder, voxels())
    path.write_bytes(path.read_bytes().replace(b"sizes: 33 40 5", b"sizes: 9999999 9999999 99999999"))
    return path


def _hdf5(folder):
    import h5py

    with h5py.File(folder / "em.h5", "w") as file:
        file.create_dataset("raw", shape=(10**7,) * 3, dtype="u1", chunks=(64, 64, 64))
    return folder / "em.h5"


def _dm(folder):
    path = written.dm3(folder, voxels("int16"))
    size = b"%%%%" + (1).to_bytes(4, "big") + (5).to_bytes(4, "big")
    path.write_bytes(path.read_bytes().replace(size + (33).to_bytes(4, "little"), size + b"\xff\xff\xff\x7f"))
    return path


def _document(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def _n5(folder):
    path = written.n5(folder, voxels("uint16"))
    _document(path / "raw" / "attributes.json", lambda told: {**told, "dimensions": [10**7] * 3})
    return path


def _large_n5_chunk(folder):
    path = written.n5(folder, voxels("uint16"))
    _document(
        path / "raw" / "attributes.json", lambda told: {**told, "dimensions": [10**5] * 3, "blockSize": [10**5] * 3}
    )
    return path


def _precomputed(folder):
    path = written.precomputed(folder, voxels())
    _document(path / "info", lambda told: {**told, "scales": [{**told["scales"][0], "size": [10**7] * 3}]})
    return path


@pytest.mark.parametrize(
    "write",
    [_npy, _mrc, _nifti, _nrrd, _hdf5, _dm, _n5, _large_n5_chunk, _precomputed],
    ids=lambda write: write.__name__[1:],
)
def test_absurd_sizes_are_refused_before_anything_is_made_of_them(write, tmp_path):
    path = write(tmp_path)
    with refused(path):
        volume.open(path).read(volume.Box((0, 0, 0), (1, 1, 1)))


def test_a_zip_file_that_holds_more_than_the_memory_is_refused(tmp_path, monkeypatch):
    path = make("zipped zarr", tmp_path)
    opened = volume.open(path)
    monkeypatch.setattr(header, "CACHE_BYTES", 100)
    monkeypatch.setattr(header, "free_memory", lambda: 200)
    with refused("em.zarr.zip", "decodes to", "2e-07 GB of memory are free"):
        opened.read(WHOLE)


def test_a_damaged_file_ends_a_command_with_one_line_and_leaves_nothing(run, tmp_path):
    for name in ("hdf5", "mrc", "n5"):
        folder = tmp_path / name
        folder.mkdir()
        path = make(name, folder)
        broken = path / "raw" / "attributes.json" if path.is_dir() else path
        cut_short(broken)
        before = sorted(file.name for file in folder.iterdir())
        code, _, said = run("infer", path, "--out", folder / "out.zarr", "--workers", 1)
        assert code == 2
        assert said.startswith("volseg: ")
        assert said.count("\n") == 1
        assert sorted(file.name for file in folder.iterdir()) == before
