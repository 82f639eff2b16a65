"""Files of every format, each written by its own library, read box by box: equal voxels, axes z y x, lengths in nm."""

import numpy as np
import pytest

from tests.io import formats as written
from tests.io.helpers import SHAPE, assert_reads, refused, voxels
from volseg.io import mapping, volume


@pytest.mark.parametrize("name", written.EVERY)
def test_every_format_reads_as_its_own_library_wrote_it(name, tmp_path):
    write, dtype = written.EVERY[name]
    data = voxels(dtype)
    opened = volume.open(write(tmp_path, data))
    assert opened.dtype == dtype
    assert_reads(opened, data)
    if "npy" not in name:  # which has no place for it
        assert opened.voxel_size_nm == pytest.approx(written.SIZE_NM, rel=1e-6)
    told = {"precomputed": (3.5, 0.5, 7.5), "imaris": (20.5, 200.5, 250.5)}  # places that these tests give it
    assert opened.place == told.get(name if name == "imaris" else opened.kind, (0, 0, 0))
    assert not opened.notes
    assert len(set(opened.chunk)) > 1


@pytest.mark.parametrize("name", written.EVERY)
def test_what_is_read_is_what_the_library_alone_reads(name, tmp_path):
    """Not what this test wrote: so an error that writer and reader of a test share is seen."""
    write, dtype = written.EVERY[name]
    path = write(tmp_path, voxels(dtype, seed=7))
    alone = LIBRARIES[name.partition(",")[0]](path)
    opened = volume.open(path)
    assert opened.shape == alone.shape
    for box in np.random.default_rng(1).integers(0, SHAPE, (8, 2, 3)):
        start, stop = box.min(0), box.max(0) + 1
        cut = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        got = opened.read(volume.Box(tuple(start.tolist()), tuple(stop.tolist())))
        np.testing.assert_array_equal(got, alone[cut])


def _mrc(path):
    import mrcfile

    with mrcfile.open(path) as file:
        return np.array(file.data)


def _nifti(path):
    import nibabel

    return np.asarray(nibabel.load(path.with_suffix(".img") if path.suffix == ".hdr" else path).dataobj).T


def _nrrd(path):
    import nrrd

    return nrrd.read(str(path))[0].T


def _hdf5(path, name="volumes/raw"):
    import h5py

    with h5py.File(path) as file:
        data = file[name][:]
    return data.view(np.uint16) if "cells" in name else data[: SHAPE[0], : SHAPE[1], : SHAPE[2]]


def _czi(path):
    from pylibCZIrw import czi

    with czi.open_czi(str(path)) as file:
        return np.stack([file.read(plane={"C": 0, "Z": z, "T": 0})[..., 0] for z in range(SHAPE[0])])


def _dm(path):
    from ncempy.io import dm

    return dm.dmReader(str(path))["data"]


def _tensorstore(driver, *inside):
    def read(path):
        import tensorstore

        place = {"driver": "file", "path": str(path.joinpath(*inside))}
        found = tensorstore.open({"driver": driver, "kvstore": place}).result().read().result()
        return found[..., 0].T if found.ndim == 4 else found.T

    return read


def _zip(path):
    import zarr

    store = zarr.storage.ZipStore(path)
    data = zarr.open_group(store, mode="r")["s0"][:]
    store.close()
    return data


LIBRARIES = {
    "npy": np.load, "mrc": _mrc, "nifti": _nifti, "nifti 2": _nifti, "nifti pair": _nifti, "nrrd": _nrrd, "hdf5": _hdf5,
    "imaris": lambda path: _hdf5(path, "DataSet/ResolutionLevel 0/TimePoint 0/Channel 0/Data"),
    "big data viewer": lambda path: _hdf5(path, "t00000/s00/0/cells"), "czi": _czi, "dm3": _dm, "dm4": _dm, "zipped zarr": _zip,
    "n5": _tensorstore("n5", "raw"), "precomputed": _tensorstore("neuroglancer_precomputed"),
    "compressed segmentation": _tensorstore("neuroglancer_precomputed"),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- what headers say


def test_a_file_is_known_by_its_content_whatever_its_name(tmp_path):
    for name in ("npy", "mrc", "nifti, gzip", "nrrd", "hdf5", "czi"):
        write, dtype = written.FILES[name]
        data = voxels(dtype)
        path = write(tmp_path, data)
        renamed = path.rename(tmp_path / "em.data")
        assert_reads(volume.open(renamed), data)


def test_a_nifti_file_with_a_slope_gives_real_values(tmp_path):
    import nibabel

    image = nibabel.Nifti1Image(voxels("int16").T, np.eye(4))
    image.header.set_slope_inter(0.5, -3)
    nibabel.save(image, tmp_path / "em.nii")
    opened = volume.open(tmp_path / "em.nii")
    assert_reads(opened, np.asarray(nibabel.load(tmp_path / "em.nii").dataobj).T.astype("float32"))
    assert "scales its voxels by 0.5 and adds -3" in opened.notes[0]


@pytest.mark.parametrize(
    ("depth", "size", "said"), [(0, None, "0 x 5 x 4 nm, which no"), (-50, (50, 5, 4), "its sign")]
)
def test_a_depth_of_nifti_voxels_that_is_not_above_0_is_told(tmp_path, depth, size, said):
    import nibabel

    image = nibabel.Nifti1Image(voxels("int16").T, None)
    image.header.set_xyzt_units("micron")
    image.header["pixdim"][1:4] = 0.004, 0.005, depth / 1000
    (tmp_path / "em.nii").write_bytes(image.to_bytes())
    opened = volume.open(tmp_path / "em.nii")
    assert opened.voxel_size_nm == size
    assert [said.replace("nm", "micron").replace("5 x 4", "0.005 x 0.004") in note for note in opened.notes] == [True]


def test_volumes_that_follow_each_other_in_an_mrc_file_are_times(tmp_path):
    import mrcfile

    data = np.stack([voxels("int16", seed=i) for i in range(3)])
    with mrcfile.new(tmp_path / "em.mrc") as file:
        file.set_data(data)
        file.voxel_size = 40.0
        assert file.is_volume_stack()
    opened = volume.open(tmp_path / "em.mrc", time=2)
    assert_reads(opened, data[2])
    assert opened.voxel_size_nm == (4, 4, 4)
    with refused("em.mrc", "3 times"):
        volume.open(tmp_path / "em.mrc")


def test_bytes_of_imod_are_unsigned(tmp_path):
    data = voxels("uint8")
    path = written.mrc(tmp_path, data.view("int8"))
    with path.open("r+b") as file:
        file.seek(152)
        file.write(np.array([1146047817, 0], "<i4").tobytes())
    opened = volume.open(path)
    assert_reads(opened, data)
    assert "unsigned" in opened.notes[0]


def test_a_voxel_size_of_one_angstrom_is_none(tmp_path):
    import mrcfile

    with mrcfile.new(tmp_path / "em.mrc") as file:
        file.set_data(voxels("int16"))
        file.voxel_size = 1.0
    opened = volume.open(tmp_path / "em.mrc")
    assert opened.voxel_size_nm is None
    assert "1 angstrom" in opened.notes[0]


def test_spacings_without_a_unit_are_told_and_not_used(tmp_path):
    import nrrd

    nrrd.write(str(tmp_path / "em.nrrd"), voxels().T, {"spacings": [4.0, 5.0, 50.0]})
    opened = volume.open(tmp_path / "em.nrrd")
    assert opened.voxel_size_nm is None
    assert "50 x 5 x 4, without a unit" in opened.notes[0]
    nrrd.write(
        str(tmp_path / "no.nrrd"), voxels().T, {"spacings": [4.0, 5.0, float("nan")], "units": ["nm", "nm", "nm"]}
    )
    opened = volume.open(tmp_path / "no.nrrd")
    assert opened.voxel_size_nm is None
    assert "? x 5 x 4 nm, which is not complete" in opened.notes[0]


def test_a_file_with_several_datasets_lists_them(tmp_path):
    import h5py

    data = voxels("uint64")
    with h5py.File(tmp_path / "em.h5", "w") as file:
        file["volumes/raw"] = voxels()
        file["volumes/labels/ids"] = data
        file["volumes/labels/ids"].attrs["resolution"] = [40, 4, 4]
        file["table"] = np.zeros(9)
    with refused("holds 2 volumes", "/volumes/labels/ids (5 x 40 x 33)", "/volumes/raw", f"{tmp_path}/em.h5::/"):
        volume.open(tmp_path / "em.h5")
    with refused("has no dataset volumes/none", "/volumes/raw"):
        volume.open(f"{tmp_path}/em.h5::/volumes/none")
    for opened in (
        volume.open(f"{tmp_path}/em.h5::/volumes/labels"),
        volume.open(tmp_path / "em.h5", dataset="volumes/labels/ids"),
    ):
        assert_reads(opened, data)
        assert opened.voxel_size_nm == (40, 4, 4)
        assert "without a unit: taken as nm" in opened.notes[0]


def test_channels_of_imaris_are_volumes_of_their_own(tmp_path):
    path = written.imaris(tmp_path, voxels(), channels=2)
    with refused("holds 2 channels", "--channel"):
        volume.open(path)
    for channel, opened in enumerate(volume.open_channels(path)):
        assert_reads(opened, voxels() + np.uint8(channel))


def test_channels_of_ilastik_are_found_by_their_tags(tmp_path):
    import json

    import h5py

    data = voxels("float32", (*SHAPE, 2))
    with h5py.File(tmp_path / "em.h5", "w") as file:
        file["exported_data"] = data
        file["exported_data"].attrs["axistags"] = json.dumps({"axes": [{"key": key} for key in "zyxc"]})
    for channel, opened in enumerate(volume.open_channels(tmp_path / "em.h5")):
        assert_reads(opened, data[..., channel])


def test_an_n5_array_is_found_in_its_container(tmp_path):
    data = voxels("uint16")
    path = written.n5(tmp_path, data)
    for opened in (volume.open(path), volume.open(path, dataset="raw"), volume.open(f"{path}/raw")):
        assert_reads(opened, data)
    with refused("no single N5 array", "none"):
        volume.open(f"{path}/none")


@pytest.mark.parametrize(
    "attributes",
    [
        {"pixelResolution": {"dimensions": [4, 5, 50], "unit": "nm"}},
        {"resolution": [0.004, 0.005, 0.05], "units": ["um", "um", "um"]},
        {"transform": {"axes": ["z", "y", "x"], "scale": [50, 5, 4], "units": ["nm", "nm", "nm"]}},
    ],
)
def test_the_voxel_size_of_an_n5_array_is_found_where_programs_write_it(tmp_path, attributes):
    import json

    path = written.n5(tmp_path, voxels("uint16"))
    document = path / "raw" / "attributes.json"
    told = {key: value for key, value in json.loads(document.read_text()).items() if key not in ("resolution", "units")}
    document.write_text(json.dumps({**told, **attributes}))
    assert volume.open(path).voxel_size_nm == (50, 5, 4)


@pytest.mark.parametrize(
    ("place", "attributes"),
    [
        ("raw", {"pixelResolution": {"dimensions": [4, 5, 25], "unit": "nm"}, "downsamplingFactors": [1, 1, 2]}),
        ("raw", {"resolution": [4, 5, 50], "units": ["nm", "nm", "nm"], "downsamplingFactors": [1, 1, 2]}),
        ("raw", {"pixelResolution": {"dimensions": [4, 5, 50], "unit": "nm"}, "downsamplingFactors": "?"}),
        ("", {"pixelResolution": {"dimensions": [4, 5, 25], "unit": "nm"}}),
    ],
)
def test_the_voxel_size_of_a_coarser_n5_level_counts_what_it_was_made_by(tmp_path, place, attributes):
    import json

    path = written.n5(tmp_path, voxels("uint16"))
    document = path / "raw" / "attributes.json"
    told = {key: value for key, value in json.loads(document.read_text()).items() if key not in ("resolution", "units")}
    document.write_text(json.dumps({**told, "downsamplingFactors": [1, 1, 2]}))
    above = path / place / "attributes.json"
    above.write_text(json.dumps({**json.loads(above.read_text() if above.exists() else "{}"), **attributes}))
    assert volume.open(path).voxel_size_nm == (50, 5, 4)
    assert volume.open(path / "raw").voxel_size_nm == (50, 5, 4)


def test_a_scale_of_a_precomputed_volume_is_chosen_by_its_key(tmp_path):
    data = voxels()
    path = written.precomputed(tmp_path, data)
    for opened in (volume.open(f"precomputed://{path}"), volume.open(path, dataset="4_5_50")):
        assert_reads(opened, data)
        assert opened.origin_nm == (175, 2.5, 30)
    with refused("no precomputed array", "4_5_50"):
        volume.open(path, dataset="8_8_8")


def test_colors_of_czi_are_channels(tmp_path):
    from pylibCZIrw import czi

    data = voxels("uint8", (*SHAPE, 3))
    with czi.create_czi(str(tmp_path / "em.czi")) as file:
        for z, plane in enumerate(data):
            file.write(np.ascontiguousarray(plane), plane={"Z": z, "C": 0, "T": 0})
    with refused("holds 3 channels", "--channel"):
        volume.open(tmp_path / "em.czi")
    for channel, opened in enumerate(volume.open_channels(tmp_path / "em.czi")):
        assert_reads(opened, data[..., 2 - channel])  # the library gives blue, green, red


def test_what_no_library_reads_is_told_with_the_command_that_converts_it(tmp_path):
    for name, words in (
        ("em.lif", "bfconvert em.lif"),
        ("em.mha", "Fiji: open em.mha"),
        ("em.npz", "OUT.npy"),
        ("em.mp4", "ffmpeg"),
    ):
        (tmp_path / name).write_bytes(b"what")
        with refused(name, words):
            volume.open(tmp_path / name)


def test_a_nrrd_encoding_that_must_be_read_whole_is_refused_with_a_command(tmp_path):
    path = written.nrrd(tmp_path, voxels(), "bzip2")
    with refused("encoded as bzip2", "unu save -f nrrd -e raw"):
        volume.open(path)


@pytest.mark.parametrize(
    ("name", "package"),
    [("mrc", "mrcfile"), ("hdf5", "h5py"), ("nifti", "nibabel"), ("n5", "tensorstore"), ("czi", "pylibCZIrw")],
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(tmp_path, monkeypatch, name, package):
    from volseg import system

    path = written.EVERY[name][0](tmp_path, voxels(written.EVERY[name][1]))
    installed = system.installed
    monkeypatch.setattr(system, "installed", lambda one: one != package and installed(one))
    with refused(f"{package} is not installed", "pip install 'volseg[formats]'"):
        volume.open(path)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_box_larger_than_what_is_kept_of_a_file_is_copied_in_parts(order, tmp_path, monkeypatch):
    data = voxels("uint16", (30, 70, 80))
    np.save(tmp_path / "em.npy", np.asarray(data, order=order))
    monkeypatch.setattr(mapping, "KEPT_BYTES", 10_000)
    assert_reads(volume.open(tmp_path / "em.npy"), data)
