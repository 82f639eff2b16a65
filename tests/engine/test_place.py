"""A volume cut out of a larger one: what is made of it lies where the libraries of the formats place its voxels."""

import json
import shutil
from math import floor
from pathlib import Path

import h5py
import mrcfile
import nibabel
import nrrd
import numpy as np
import pytest
import tensorstore as ts
import tifffile
import trimesh
import xarray
import zarr
from ome_zarr_models import open_ome_zarr

import volseg
from tests.engine.test_export import read_nrrd
from tests.helpers import (
    LIGHT,
    Quiet,
    begin_run,
    do_stages,
    segment_here,
    segment_probabilities,
    settings,
    write_volume,
)
from volseg.box import Box
from volseg.engine import folder
from volseg.engine.layout import Layout
from volseg.evaluation import view
from volseg.io import volume
from volseg.planning import prepare

SIZE = np.array([40.0, 8.0, 4.0])  # z y x
FIRST = np.array([7, -3, 13])  # of the larger volume
SHAPE = (8, 40, 72)
VOXELS = np.array([(0, 0, 0), (3, 17, 50), (7, 39, 71)])


@pytest.fixture(scope="module")
def balls():
    """Probabilities of two objects."""
    z, y, x = np.ogrid[tuple(map(slice, SHAPE))]
    inside = [((z - 4) * 3) ** 2 + (y - 20) ** 2 + (x - at) ** 2 < 100 for at in (20, 48)]
    return np.where(inside[0] | inside[1], 255, 0).astype(np.uint8)


# Each writes a volume with its library, and returns where it is and, as that library says, the centers of voxels in nm.


def in_ome(path, data, begin=(280.0, -24.0, 52.0)):
    steps = [
        {"type": "scale", "scale": (SIZE / 1000).tolist()},
        {"type": "translation", "translation": [n / 1000 for n in begin]},
    ]
    axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "zyx"]
    image = {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": steps}], "name": "em"}
    group = zarr.create_group(path / "em.zarr", attributes={"ome": {"version": "0.5", "multiscales": [image]}})
    group.create_array("0", data=data, chunks=(4, 20, 36), dimension_names=list("zyx"))
    scale, moved = (1000 * np.array(told) for told in ome_steps(path / "em.zarr"))
    return path / "em.zarr", lambda voxel: moved + voxel * scale


def ome_steps(path, level=0):
    """Scale and translation of a level, as ome-zarr-models reads them."""
    read = open_ome_zarr(zarr.open_group(path, mode="r")).ome_attributes.multiscales[0].datasets[level]
    scale, moved = read.coordinateTransformations
    return scale.scale, moved.translation


def in_precomputed(path, data):
    spec = {
        "driver": "neuroglancer_precomputed", "kvstore": {"driver": "file", "path": str(path / "em")},
        "multiscale_metadata": {"type": "image", "data_type": "uint8", "num_channels": 1},
        "scale_metadata": {"size": data.shape[::-1], "encoding": "raw", "chunk_size": [36, 20, 4],
                           "resolution": SIZE[::-1].tolist(), "voxel_offset": FIRST[::-1].tolist()},
    }  # fmt: skip
    ts.open(spec, create=True).result()[...] = data.T[..., None]
    return path / "em", lambda voxel: corners_of(path / "em")(voxel) + SIZE / 2


def corners_of(path, level=0):
    """The outer corners of voxels, as tensorstore reads a precomputed volume."""
    spec = {"driver": "neuroglancer_precomputed", "kvstore": f"file://{path}/", "scale_index": level}
    read = ts.open(spec, read=True).result()
    size = np.array([unit.to_json()[0] for unit in read.dimension_units[2::-1]])
    return lambda voxel: (voxel + np.array(read.origin[2::-1])) * size


def in_n5(path, data, told=None):
    place = {"driver": "file", "path": str(path / "em.n5" / "raw")}
    metadata = {
        "dimensions": data.shape[::-1],
        "blockSize": [36, 20, 4],
        "dataType": "uint8",
        "compression": {"type": "gzip"},
    }
    ts.open({"driver": "n5", "kvstore": place, "metadata": metadata}, create=True).result()[...] = data.T
    document = path / "em.n5" / "raw" / "attributes.json"
    begin, units = (FIRST * SIZE).tolist(), ["nm"] * 3
    told = told or {"transform": {"axes": ["z", "y", "x"], "scale": SIZE.tolist(), "translate": begin, "units": units}}
    document.write_text(json.dumps({**json.loads(document.read_text()), **told}))
    return path / "em.n5", lambda voxel: begin + voxel * SIZE


def in_paintera(path, data):
    """Paintera's: x y z."""
    place = {"resolution": SIZE[::-1].tolist(), "offset": (FIRST * SIZE)[::-1].tolist(), "units": ["nm"] * 3}
    return in_n5(path, data, place)


def in_nrrd(path, data):
    space = {"space dimension": 3, "space directions": np.diag(SIZE[::-1]), "space units": ["nm"] * 3}
    nrrd.write(str(path / "em.nrrd"), data.T, {**space, "space origin": (FIRST * SIZE)[::-1]})
    return path / "em.nrrd", places_of_nrrd(path / "em.nrrd")


def places_of_nrrd(path):
    facts = nrrd.read_header(str(path))
    return lambda voxel: (facts["space origin"] + voxel[::-1] @ facts["space directions"])[::-1]


def in_nifti(path, data):
    affine = np.diag([*SIZE[::-1] / 1000, 1])
    affine[:3, 3] = (FIRST * SIZE)[::-1] / 1000
    image = nibabel.Nifti1Image(data.T, affine)
    image.header.set_xyzt_units("micron")
    nibabel.save(image, path / "em.nii.gz")
    stored = nibabel.load(path / "em.nii.gz").affine
    return path / "em.nii.gz", lambda voxel: 1000 * nibabel.affines.apply_affine(stored, voxel[::-1])[::-1]


def in_mrc(path, data):
    with mrcfile.new(path / "em.mrc") as file:
        file.set_data(data.astype(np.uint16) * 257)
        file.voxel_size = tuple(10 * SIZE[::-1])
        file.header.origin = tuple(10 * (FIRST * SIZE)[::-1])
    with mrcfile.open(path / "em.mrc") as file:
        begin, size = (np.array([told[axis] for axis in "zyx"]) / 10 for told in (file.header.origin, file.voxel_size))
    return path / "em.mrc", lambda voxel: begin + voxel * size


def in_imaris(path, data):
    begin, end = (FIRST * SIZE) / 1000, ((FIRST + SHAPE) * SIZE) / 1000  # corners
    with h5py.File(path / "em.ims", "w") as file:
        group = file.create_group("DataSet/ResolutionLevel 0/TimePoint 0/Channel 0")
        group["Data"] = data
        group.attrs.update({f"ImageSize{axis}": str(n) for axis, n in zip("ZYX", SHAPE, strict=True)})
        info = file.create_group("DataSetInfo/Image").attrs
        for i, a, b in zip("210", begin, end, strict=True):
            info[f"ExtMin{i}"], info[f"ExtMax{i}"] = str(a), str(b)
    return path / "em.ims", lambda voxel: 1000 * (begin + (voxel + 0.5) * (end - begin) / SHAPE)


def in_hdf5(path, data):
    with h5py.File(path / "em.h5", "w") as file:
        file["raw"] = data
        file["raw"].attrs.update({"resolution": SIZE, "offset": FIRST * SIZE, "units": ["nm"] * 3})
        told = file["raw"].attrs
        begin, size = told["offset"], told["resolution"]
    return path / "em.h5", lambda voxel: begin + voxel * size


def labeled(data):
    """An array with coordinates in nm."""
    places = ((first + np.arange(n)) * size for first, n, size in zip(FIRST, SHAPE, SIZE, strict=True))
    return xarray.DataArray(data, dims=list("zyx"), coords=dict(zip("zyx", places, strict=True)), name="raw")


def places_of_xarray(array):
    return lambda voxel: np.array([float(array.coords[axis][n]) for axis, n in zip("zyx", voxel, strict=True)])


def in_xarray(path, data):
    return labeled(data), places_of_xarray(labeled(data))


def in_xarrays_zarr(path, data):
    labeled(data).to_dataset().to_zarr(path / "em.zarr", consolidated=False)
    return path / "em.zarr" / "raw", places_of_xarray(xarray.open_zarr(path / "em.zarr", consolidated=False)["raw"])


def in_netcdf(path, data):
    """As netCDF 4 lays a file out: axes are datasets of their own."""
    array = labeled(data)
    with h5py.File(path / "em.nc", "w") as file:
        file["raw"] = data
        for number, axis in enumerate("zyx"):
            file[axis] = array.coords[axis].to_numpy()
            file[axis].make_scale(axis)
            file["raw"].dims[number].attach_scale(file[axis])
    return f"{path}/em.nc::/raw", places_of_xarray(array)


WRITERS = {name.removeprefix("in_"): write for name, write in list(globals().items()) if name.startswith("in_")}
UNSIZED = ("xarray", "xarrays_zarr", "netcdf")  # the voxel size is told beside


def config_for(name):
    return settings(**LIGHT, **({"input": {"voxel_size_nm": tuple(SIZE)}} if name in UNSIZED else {}))


@pytest.mark.parametrize("name", WRITERS)
def test_labels_lie_where_the_library_of_the_format_places_the_volume(name, balls, tmp_path):
    path, place_of = WRITERS[name](tmp_path, balls)
    if name == "xarray":
        run = volseg.segment(path, str(tmp_path / "run.zarr"), config=config_for(name), progress=Quiet())
    else:
        segment_here(str(path), str(tmp_path / "run.zarr"), config_for(name))
        run = volseg.open(str(tmp_path / "run.zarr"))
    assert run.object_count == 2
    for inside, lead in (("", 1), ("/labels/instances", 0)):
        scale, moved = (np.array(told)[lead:] for told in ome_steps(run.path + inside))
        for voxel in VOXELS:
            np.testing.assert_allclose(moved + voxel * scale, place_of(voxel), atol=1e-4)
        coarser, shifted = (np.array(told)[lead:] for told in ome_steps(run.path + inside, 1))
        factor = np.round(coarser / scale).astype(int)
        np.testing.assert_allclose(shifted + coarser, (place_of(factor) + place_of(2 * factor - 1)) / 2, atol=1e-4)
    np.testing.assert_allclose(run.origin_nm, place_of(VOXELS[0]), atol=1e-4)
    for opened in (volume.open(run.path), volume.open_channels(run.path, dataset="0")[0]):
        np.testing.assert_allclose(opened.origin_nm, run.origin_nm, atol=1e-6)


@pytest.fixture(scope="module")
def cropped(balls, tmp_path_factory):
    """A run of the volume as Neuroglancer has it."""
    path = tmp_path_factory.mktemp("cropped")
    image, _ = in_precomputed(path, balls)
    return segment_probabilities(image, path / "run.zarr")


@pytest.fixture(scope="module")
def uneven(balls, tmp_path_factory):
    """A run of a volume that does not begin with a whole voxel."""
    path = tmp_path_factory.mktemp("uneven")
    image, _ = in_ome(path, balls, (291.0, -24.0, 52.0))
    return segment_probabilities(image, path / "run.zarr")


def exported(run, out, **more):
    quiet = Quiet()
    return Path(volseg.export(run, out, settings=["cluster.workers=1"], progress=quiet, **more)), quiet.said


def test_an_export_lies_over_the_precomputed_volume_that_it_was_made_of(cropped, tmp_path):
    source = corners_of(cropped.run.channels[0].source.path)
    made, said = exported(cropped, tmp_path / "labels.precomputed", meshes=True)
    for voxel in VOXELS:
        np.testing.assert_array_equal(corners_of(made)(voxel), source(voxel))
    labels = ts.open({"driver": "neuroglancer_precomputed", "kvstore": f"file://{made}/"}).result()
    np.testing.assert_array_equal(labels[..., 0].read().result().T, cropped.labels[:])
    assert any("is no whole one of scale 1 and coarser ones" in line for line in said)
    coarse = corners_of(made, 1)(np.zeros(3)) - source(np.zeros(3))
    assert (np.abs(coarse) <= SIZE / 2 * np.round(ome_steps(f"{cropped.path}/labels/instances", 1)[0] / SIZE)).all()
    assert coarse.any()


def test_objects_lie_where_their_voxels_do(cropped, tmp_path):
    row = cropped.objects.iloc[0]
    low, high = (np.array([row[f"{axis}{end}"] for axis in "zyx"]) for end in "01")
    corner = corners_of(cropped.run.channels[0].source.path)
    made, said = exported(cropped, tmp_path / "solid", kind="ply", max_error_nm=0)
    assert not any("begins at" in line for line in said)
    mesh = trimesh.load_mesh(made / "1.ply", process=False)
    np.testing.assert_allclose(mesh.bounds[:, ::-1], [corner(low), corner(high)], rtol=1e-6)
    lines, _ = exported(cropped, tmp_path / "lines", kind="swc")
    x, y, z = 1000 * np.loadtxt(lines / "1.swc")[:, 2:5].T
    places = np.stack([z, y, x], axis=1)
    index = np.round((places - corner(np.zeros(3))) / SIZE - 0.5).astype(int)
    np.testing.assert_allclose(corner(index) + SIZE / 2, places, atol=0.1)
    assert (cropped.labels[:][tuple(index.T)] == 1).all()


@pytest.mark.parametrize("ending", ["nrrd", "n5", "h5", "tif"])
def test_formats_of_centers_hold_any_place(ending, uneven, tmp_path):
    made, said = exported(uneven, tmp_path / f"labels.{ending}")
    assert not any("begins at" in line for line in said)
    if ending != "tif":  # whose places volseg does not read
        assert volume.open(made).origin_nm == (291.0, -24.0, 52.0)
    if ending == "nrrd":
        np.testing.assert_array_equal(places_of_nrrd(made)(np.array([2, 3, 4])), (371, 0, 68))
        np.testing.assert_array_equal(read_nrrd(made)[0], uneven.labels[:])
    if ending == "n5":
        coarse, factor = volume.open(made, dataset="s1"), np.array(uneven.run.levels[1][1])
        np.testing.assert_allclose(coarse.voxel_size_nm, SIZE * factor)
        np.testing.assert_allclose(coarse.origin_nm, uneven.origin_nm + SIZE * (factor - 1) / 2)
    if ending == "tif":
        with tifffile.TiffFile(made) as file:
            told = [file.imagej_metadata[f"{axis}origin"] for axis in "zyx"]
        np.testing.assert_allclose(-np.array(told) * SIZE, (291, -24, 52))


def test_a_large_tiff_file_tells_the_place_of_each_section(uneven, tmp_path, monkeypatch):
    from volseg.io.export import single

    monkeypatch.setattr(single, "IMAGEJ_BYTES", 0)
    made, _ = exported(uneven, tmp_path / "labels.tif")
    with tifffile.TiffFile(made) as file:
        planes = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]["Pixels"]["Plane"]
    assert [planes[k]["PositionZ"] for k in range(3)] == pytest.approx([0.291, 0.331, 0.371])
    assert {(plane["PositionY"], plane["PositionX"]) for plane in planes} == {(-0.024, 0.052)}


def test_a_place_between_voxels_is_rounded_where_a_format_counts_them_and_told(uneven, tmp_path):
    made, said = exported(uneven, tmp_path / "labels.precomputed")
    assert [line for line in said if "begins at" in line] == [
        "the volume begins at 291 x -24 x 52 nm, no whole number of voxels: voxel 7 x -3 x 13 is taken, less than a voxel away"
    ]
    np.testing.assert_array_equal(corners_of(made)(np.zeros(3)), FIRST * SIZE)


def test_what_is_said_of_a_volume_tells_where_it_begins(uneven, cropped, balls, tmp_path):
    assert "voxels of 40 x 8 x 4 nm, the first one at 291 x -24 x 52 nm" in prepare.headline(uneven.run)
    assert "300 x -20 x 54 nm" in cropped._repr_html_()
    np.save(tmp_path / "em.npy", balls)
    run = begin_run(tmp_path / "em.npy", tmp_path / "run.zarr", settings(**LIGHT))
    assert "the first one" not in prepare.headline(run)


def test_nothing_moves_where_a_volume_says_nothing_of_its_place(balls, tmp_path):
    np.save(tmp_path / "em.npy", balls)
    segment_here(str(tmp_path / "em.npy"), str(tmp_path / "run.zarr"), config_for("xarray"))
    run = volseg.open(str(tmp_path / "run.zarr"))
    assert run.origin_nm == (0, 0, 0)
    assert list(ome_steps(f"{run.path}/labels/instances")[1]) == [0, 0, 0]
    made, said = exported(run, tmp_path / "labels.precomputed")
    np.testing.assert_array_equal(corners_of(made)(np.zeros(3)), [0, 0, 0])
    assert not any("scale 1" in line or "begins" in line for line in said)


@pytest.mark.parametrize("flags", [None, 0, 4])
@pytest.mark.parametrize("version", [0, 20141])
def test_imod_writes_the_origin_the_other_way_round_unless_it_says_so(tmp_path, balls, flags, version):
    path, _ = in_mrc(tmp_path, balls)
    with path.open("r+b") as file:
        file.seek(108)
        file.write(np.array([version], "<i4").tobytes())
        if flags is not None:
            file.seek(152)
            file.write(np.array([1146047817, flags], "<i4").tobytes())
    turned = flags == 0 and version == 0
    np.testing.assert_allclose(volume.open(path).origin_nm, FIRST * SIZE * (-1 if turned else 1))


def test_an_mrc_file_without_an_origin_begins_at_its_start(tmp_path, balls):
    path, _ = in_mrc(tmp_path, balls)
    with mrcfile.open(path, mode="r+") as file:
        file.header.origin = (0, 0, 0)
        file.nstart = tuple(FIRST[::-1].tolist())
    np.testing.assert_allclose(volume.open(path).origin_nm, FIRST * SIZE)


def test_a_turned_volume_keeps_its_place_along_its_own_axes(tmp_path, balls):
    """As ITK writes NIfTI: x and y point the other way."""
    affine = np.diag([-0.004, -0.008, 0.04, 1])
    affine[:3, 3] = -0.052, 0.024, 0.28
    image = nibabel.Nifti1Image(balls.T, affine)
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "em.nii")
    opened = volume.open(tmp_path / "em.nii")
    np.testing.assert_allclose(opened.origin_nm, FIRST * SIZE)
    assert any("axes that are turned against its world" in note for note in opened.notes)


def test_a_size_that_is_told_keeps_the_number_of_voxels(tmp_path, balls):
    path, _ = in_precomputed(tmp_path, balls)
    np.testing.assert_allclose(volume.open(path, voxel_size_nm=(30, 6, 6)).origin_nm, (FIRST + 0.5) * (30, 6, 6))


def test_a_conversion_keeps_the_place(tmp_path, balls):
    path, place_of = in_precomputed(tmp_path, balls)
    made = volseg.convert(str(path), str(tmp_path / "out.zarr"), settings=["cluster.workers=1"], progress=Quiet())
    np.testing.assert_allclose(made.origin_nm, place_of(VOXELS[0]))
    np.testing.assert_allclose(ome_steps(tmp_path / "out.zarr")[1], place_of(VOXELS[0]))


@pytest.mark.parametrize("told", [{"offset": "far"}, {"offset": [1, 2]}, {"offset": [1e300] * 3}, {"offset": None}])
def test_an_odd_offset_is_none(tmp_path, balls, told):
    with h5py.File(tmp_path / "em.h5", "w") as file:
        file["raw"] = balls
        file["raw"].attrs.update({"resolution": SIZE, **{key: value for key, value in told.items() if value}})
    assert volume.open(tmp_path / "em.h5").origin_nm == (0, 0, 0)
    in_n5(tmp_path, balls, {"resolution": SIZE.tolist(), "units": ["nm"] * 3, **told})
    assert volume.open(tmp_path / "em.n5").origin_nm == (0, 0, 0)


def test_a_run_begun_before_places_were_kept_goes_on_to_the_same_labels(tmp_path, balls, cropped):
    """Its description knows no place, and says what is not said any more."""
    path, place_of = in_precomputed(tmp_path, balls)
    begun = begin_run(path, tmp_path / "run.zarr.partial", settings(**LIGHT))
    do_stages(begun, "import")
    plain = folder._without("place", Layout(begun.out).load_description())
    plain["source"]["notes"] = [f"{path} begins at voxel [7, -3, 13]: what is made of it begins at 0"]
    Layout(begun.out).save_description(plain)
    quiet = Quiet()
    run = segment_probabilities(path, tmp_path / "run.zarr", show=quiet)
    assert not any("beginning anew" in line for line in quiet.said)
    np.testing.assert_array_equal(run.labels[:], cropped.labels[:])
    np.testing.assert_allclose(run.origin_nm, place_of(VOXELS[0]))


def test_a_finished_run_of_before_begins_at_0(cropped, tmp_path):
    path = shutil.copytree(cropped.path, tmp_path / "run.zarr")
    facts = folder._without("place", json.loads((path / "run.json").read_text()))
    (path / "run.json").write_text(json.dumps(facts))
    assert volseg.open(str(path)).origin_nm == (0, 0, 0)
    made, _ = exported(volseg.open(str(path)), tmp_path / "labels.nrrd")
    np.testing.assert_array_equal(places_of_nrrd(made)(np.zeros(3)), [0, 0, 0])


def test_the_viewer_shows_the_crop_within_the_volume_that_it_was_cut_out_of(cropped, tmp_path):
    larger = np.zeros((20, 60, 100), np.uint8)
    write_volume(str(tmp_path / "larger.zarr"), larger, tuple(SIZE), tuple((FIRST - (2, 2, 2) + 0.5) * SIZE))
    with volseg.view(cropped, object=1, image=tmp_path / "larger.zarr") as shown:
        state = shown.viewer.state.to_json()
    moved = {}
    for layer in state["layers"]:
        matrix = np.array(layer["source"][0]["transform"]["matrix"])
        np.testing.assert_array_equal(matrix[:, :3], np.eye(3))
        moved[layer["name"]] = matrix[::-1, 3]
    np.testing.assert_allclose(moved["labels"], FIRST)
    np.testing.assert_allclose(moved["mask"], FIRST)
    np.testing.assert_allclose(moved[view.IMAGE], FIRST - (2, 2, 2))
    z, y, x = (floor(n) - a for n, a in zip(state["position"][::-1], FIRST, strict=True))
    assert cropped.labels[z, y, x] == 1
    assert volume.open(cropped.path).read(Box((z, y, x), (z + 1, y + 1, x + 1))).item() == 1


@pytest.mark.parametrize(
    "told",
    [
        {"transform": {"axes": ["z", "y", "x"], "translate": [1, 2], "scale": [1, 2, 3]}},
        {"transform": {"translate": "ab", "scale": [1, 2, 3]}},
        {"offset": [[1], [2, 3]], "resolution": [4, 4, 4]},
    ],
)
def test_places_of_no_shape_are_none(tmp_path, told):
    path, _ = in_n5(tmp_path, np.zeros((8, 40, 72), np.uint8), told)
    assert volume.open(str(path), voxel_size_nm=(40.0, 4.0, 4.0)).origin_nm == (0.0, 0.0, 0.0)


def test_a_scale_of_one_number_tells_no_place(tmp_path):
    with h5py.File(tmp_path / "em.h5", "w") as file:
        file["raw"], file["step"] = np.zeros((4, 8, 8), np.uint8), 4.0
        file["step"].make_scale("z")
        file["raw"].dims[0].attach_scale(file["step"])
    assert volume.open(f"{tmp_path}/em.h5::/raw").origin_nm in (None, (0.0, 0.0, 0.0))
