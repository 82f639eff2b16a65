"""A run in other programs' formats: each is read by the library that knows the format best, voxel by voxel."""

import json
import shutil
from pathlib import Path

import h5py
import nrrd
import numpy as np
import pytest
import tensorstore as ts
import tifffile

import volseg
from tests.helpers import Quiet
from volseg.engine import export
from volseg.errors import UserError
from volseg.io import arrays
from volseg.io.export import single, skeletons
from volseg.io.export.frame import Frame


def export_of(run, out, **more):
    return Path(volseg.export(run, out, settings=["cluster.workers=2"], progress=Quiet(), **more))


def labels_of(run, level=0):
    return np.asarray(arrays.node(run, f"labels/instances/{level}")[:])


def read_precomputed(path, level=0):
    spec = {"driver": "neuroglancer_precomputed", "kvstore": f"file://{path}/", "scale_index": level}
    array = ts.open(spec).result()
    size = [unit.to_json()[0] for unit in array.dimension_units[:3]][::-1]
    assert array.origin == (0, 0, 0, 0)
    return np.asarray(array[..., 0].read().result()).T, size


def read_n5(path, level=0):
    array = ts.open({"driver": "n5", "kvstore": f"file://{path}/s{level}/"}).result()
    return np.asarray(array.read().result()).T, [unit.to_json()[0] for unit in array.dimension_units][::-1]


def read_tiff(path):
    with tifffile.TiffFile(path) as file:
        assert file.is_imagej
        page, facts = file.pages[0], file.imagej_metadata
        plane = [page.tags[name].value for name in ("YResolution", "XResolution")]
        return file.asarray(), [1000 * facts["spacing"], *(1000 * units / voxels for voxels, units in plane)]


def read_hdf5(path):
    with h5py.File(path) as file:
        data = file[next(iter(file))]
        return data[:], data.attrs["element_size_um"] * 1000


def read_nrrd(path):
    data, facts = nrrd.read(str(path), index_order="C")
    assert list(facts["space units"]) == ["nm"] * 3
    return data, np.diag(facts["space directions"])[::-1]


READERS = {
    "precomputed": read_precomputed, "n5": read_n5, "tif": read_tiff, "h5": read_hdf5, "nrrd": read_nrrd,
}  # fmt: skip


@pytest.fixture
def small_blocks(monkeypatch):
    """Exports are written in several blocks, which end within chunks of the volume's far side."""
    monkeypatch.setattr(export, "BLOCK", (64, 128, 128))


@pytest.mark.parametrize("ending", READERS)
def test_labels_come_back_from_each_format(ending, reference, tmp_path, small_blocks):
    made = export_of(reference, tmp_path / f"labels.{ending}")
    data, size = READERS[ending](made)
    np.testing.assert_array_equal(data, labels_of(reference))
    assert data.max() == volseg.open(reference).object_count
    np.testing.assert_allclose(size, (5, 5, 5))
    again = volseg.open_volume(made)
    assert again.shape == data.shape
    np.testing.assert_allclose(again.voxel_size_nm, (5, 5, 5))
    assert [path.name for path in tmp_path.iterdir()] == [made.name]


def test_pyramids_have_every_level_and_the_table(reference, tmp_path, small_blocks):
    run = volseg.open(reference)
    for kind in ("precomputed", "n5"):
        made = export_of(run, tmp_path / f"labels.{kind}")
        for level in range(len(run.run.levels)):
            data, size = READERS[kind](made, level)
            np.testing.assert_array_equal(data, labels_of(reference, level))
            assert size == [5 * 2**level] * 3
            if kind == "n5":  # n5-viewer multiplies
                told = json.loads((made / f"s{level}/attributes.json").read_text())
                assert told["pixelResolution"]["dimensions"] == [5, 5, 5]
                assert told["downsamplingFactors"] == [2**level] * 3
                assert volseg.open_volume(made / f"s{level}").voxel_size_nm == (5 * 2**level,) * 3
    info = json.loads((tmp_path / "labels.precomputed/info").read_text())
    inline = json.loads((tmp_path / f"labels.precomputed/{info['segment_properties']}/info").read_text())["inline"]
    assert [int(one) for one in inline["ids"]] == run.objects["id"].tolist()
    found = {one["id"]: one for one in inline["properties"]}
    assert found["voxels"]["values"] == run.objects["voxels"].tolist()
    np.testing.assert_allclose(found["length_nm"]["values"], run.objects["length_nm"], rtol=1e-5)
    assert [0 in tags for tags in found["tags"]["values"]] == run.objects["touches_border"].tolist()
    assert found["tags"]["tags"] == ["touches_border"]


def test_worker_processes_write_the_same(reference, tmp_path, small_blocks, monkeypatch):
    light = export_of(reference, tmp_path / "threads.precomputed", meshes=True)
    monkeypatch.setattr(export, "LIGHT_VOXELS", 0)
    heavy = export_of(reference, tmp_path / "processes.precomputed", meshes=True)
    written = {path.relative_to(light) for path in light.rglob("*") if path.is_file() and path.name != "export.json"}
    assert written == {path.relative_to(heavy) for path in heavy.rglob("*") if path.is_file()} - {Path("export.json")}
    assert all((light / path).read_bytes() == (heavy / path).read_bytes() for path in written)


@pytest.mark.parametrize("ending", ["tif", "precomputed"])
def test_probabilities_go_out_by_their_name(ending, reference, tmp_path):
    probabilities = np.asarray(volseg.open(reference).probabilities[:])
    for channel, what in enumerate(("probabilities", "contour")):
        data, _ = READERS[ending](export_of(reference, tmp_path / f"{what}.{ending}", what=what))
        np.testing.assert_array_equal(data, probabilities[channel])


def test_labels_of_anisotropic_voxels_keep_their_size_in_a_large_tiff(tmp_path, monkeypatch):
    monkeypatch.setattr(single, "IMAGEJ_BYTES", 1 << 20)
    data = np.arange(24, dtype=np.uint32).reshape(2, 3, 4)
    place = single.create("tiff", str(tmp_path / "em.tif"), Frame(data.shape, (50, 5, 4)), data.dtype, "labels")
    single.write(place, volseg.Box.from_shape(data.shape), data)
    with tifffile.TiffFile(tmp_path / "em.tif") as file:
        assert file.is_ome
        assert file.is_bigtiff
        np.testing.assert_array_equal(file.asarray(), data)
    assert volseg.open_volume(tmp_path / "em.tif").voxel_size_nm == (50, 5, 4)


def test_an_output_is_replaced_only_when_told(reference, tmp_path, run):
    made = export_of(reference, tmp_path / "labels.tif")
    with pytest.raises(UserError, match=r"labels\.tif exists; give another path, or --overwrite"):
        export_of(reference, made)
    made.write_bytes(b"")
    assert run("export", reference, made, "--overwrite")[0] == 0
    np.testing.assert_array_equal(tifffile.imread(made), labels_of(reference))
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="volseg export did not make it"):
        export_of(reference, tmp_path / "mine", kind="n5", overwrite=True)


@pytest.mark.parametrize("ending", ["tif", "n5"])
def test_what_lies_beside_an_output_is_replaced_only_if_an_export_left_it(reference, tmp_path, ending):
    out, beside = tmp_path / f"labels.{ending}", tmp_path / f"labels.{ending}.partial"
    beside.write_text("mine")
    with pytest.raises(UserError, match=r"\.partial exists and volseg export did not make it"):
        export_of(reference, out, overwrite=True)
    assert beside.read_text() == "mine"
    beside.unlink()
    beside.mkdir()
    export_of(reference, out)  # of one that was killed as it began
    beside.mkdir()
    (beside / "export.json").write_text("{}")
    (beside / "half").write_text("of an export that was killed")
    export_of(reference, out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize(
    ("out", "more", "says"),
    [
        ("labels.xyz", {}, "tells no format; give --to KIND"),
        ("labels", {"kind": "mov"}, "no export 'mov'; give one of precomputed"),
        ("labels.tif", {"what": "truth"}, "holds no 'truth'; give labels or one of its probabilities: mask"),
        ("s3://bucket/labels.n5", {}, "local path"),
    ],
)
def test_what_cannot_be_exported_is_said_in_a_line(out, more, says, reference, tmp_path):
    with pytest.raises(UserError, match=says):
        export_of(reference, out if "://" in out else tmp_path / out, **more)
    with pytest.raises(UserError, match="would lie in the run"):
        export_of(reference, f"{reference}/labels.tif")
    assert not list(tmp_path.iterdir())


def test_a_run_that_changes_meanwhile_gives_nothing(reference, tmp_path):
    shutil.copytree(reference, tmp_path / "run.zarr")
    opened = volseg.open(tmp_path / "run.zarr")
    facts = tmp_path / "run.zarr/run.json"
    facts.write_text(json.dumps({**opened.summary, "objects": 0}))
    with pytest.raises(UserError, match="was decided anew while it was exported"):
        export_of(opened, tmp_path / "labels.tif")
    assert [path.name for path in tmp_path.iterdir()] == ["run.zarr"]


# ---------------------------------------------------------------- skeletons


def test_skeletons_lie_in_their_objects_and_are_read_by_their_library(reference, tmp_path):
    osteoid = pytest.importorskip("osteoid", reason="comes with kimimaro (extra skeletons)")
    lines, trees = (export_of(reference, tmp_path / kind, kind=kind) for kind in ("skeletons", "swc"))
    labels, size = labels_of(reference), np.array(volseg.open(reference).voxel_size_nm)
    info = json.loads((lines / "info").read_text())
    assert info["@type"] == "neuroglancer_skeletons"
    table = np.genfromtxt(lines / "skeletons.csv", delimiter=",", names=True)
    assert table["id"].tolist() == volseg.open(reference).objects["id"].tolist()
    assert (lines / "skeletons.csv").read_bytes() == (trees / "skeletons.csv").read_bytes()
    for row in table:
        label = int(row["id"])
        attributes = info["vertex_attributes"]
        found = osteoid.Skeleton.from_precomputed((lines / str(label)).read_bytes(), vertex_attributes=attributes)
        zyx = tuple((found.vertices[:, ::-1] / size).astype(int).T)
        assert (labels[zyx] == label).all()
        assert found.cable_length() == pytest.approx(row["length_nm"], rel=1e-4)
        assert len(found.terminals()) == row["ends"]
        tree = osteoid.Skeleton.from_swc((trees / f"{label}.swc").read_text())
        assert tree.cable_length() * 1000 == pytest.approx(row["length_nm"], rel=1e-3)
        assert len(tree.vertices) == len(found.vertices)


def test_a_straight_rod_has_its_length_and_radius():
    pytest.importorskip("kimimaro", reason="needs kimimaro (extra skeletons)")
    y, x = np.ogrid[:41, :41]
    rod = np.broadcast_to((y - 20) ** 2 + (x - 20) ** 2 <= 81, (80, 41, 41))
    found = skeletons.center_lines(rod, (5, 0, 0), (5.0, 5.0, 5.0))
    length, ends, branch_points, radius = found.measures
    assert (ends, branch_points) == (2, 0)
    assert length == pytest.approx(79 * 5, abs=50)
    assert 0.8 * 9 * 5 <= radius <= 9.5 * 5  # near the ends the surface is nearer
    assert found.vertices[:, 2].min() == (5 + 0.5) * 5
    assert skeletons.center_lines(np.zeros((2, 2, 2), bool), (0, 0, 0), (1.0, 1.0, 1.0)) is None


def test_skeletons_lie_beside_precomputed_labels(reference, tmp_path):
    pytest.importorskip("kimimaro", reason="needs kimimaro (extra skeletons)")
    label = int(volseg.open(reference).objects["id"][0])
    made = export_of(reference, tmp_path / "em.precomputed", skeletons=True, objects=[label])
    assert json.loads((made / "info").read_text())["skeletons"] == "skeletons"
    assert sorted(path.name for path in (made / "skeletons").iterdir()) == sorted([str(label), "info", "skeletons.csv"])
    with pytest.raises(UserError, match=r"skeletons lie beside labels in precomputed volumes alone.*--to skeletons"):
        export_of(reference, tmp_path / "em.n5", skeletons=True)
