"""Meshes of objects: closed surfaces in nm that bound what the object table says."""

import json
from functools import partial

import numpy as np
import pytest
import trimesh
import zmesh

import volseg
from tests.helpers import Quiet, write_volume
from volseg.box import Box
from volseg.engine import meshing
from volseg.errors import UserError
from volseg.io import volume
from volseg.io.export import meshes

NM = (50.0, 5.0, 4.0)


def ball(radius, shape):
    center = [(n - 1) / 2 for n in shape]
    return sum((axis - c) ** 2 for axis, c in zip(np.ogrid[tuple(map(slice, shape))], center, strict=True)) <= radius**2


def solid(mesh):
    made = trimesh.Trimesh(mesh.vertices, mesh.triangles, process=False)
    assert made.is_watertight
    return made


def bounds_of(columns, row, size):
    """Two corners x y z in nm, as the table has them."""
    return np.array(
        [[columns[f"{axis}{end}"][row] * nm for axis, nm in zip("xyz", size[::-1], strict=True)] for end in "01"]
    )


def test_a_box_has_its_edges_in_nm_and_no_triangle_too_many():
    plain = solid(meshes.surface(np.ones((4, 5, 6), bool), (10, 20, 30), NM, 0))
    np.testing.assert_allclose(plain.bounds, [[120, 100, 500], [144, 125, 700]])
    reduced = solid(meshes.surface(np.ones((4, 5, 6), bool), (10, 20, 30), NM, 2))
    np.testing.assert_allclose(reduced.bounds, plain.bounds, atol=2)
    assert len(reduced.faces) < len(plain.faces) / 2
    assert plain.volume == pytest.approx(120 * np.prod(NM), rel=0.1)  # its edges are cut off


def test_a_ball_has_its_volume():
    mesh = solid(meshes.surface(ball(20, (41, 41, 41)), (0, 0, 0), (5, 5, 5), 2.5))
    np.testing.assert_allclose(mesh.bounds, [[0, 0, 0], [205, 205, 205]], atol=2.5)
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * 100**3, rel=0.02)


@pytest.mark.parametrize("ending", ["obj", "ply", "glb"])
def test_every_object_of_a_run_is_bounded_as_in_the_table(ending, reference, tmp_path):
    made = volseg.export(reference, tmp_path / "meshes", kind=ending, max_error_nm=0, progress=Quiet())
    table = volseg.open(reference).objects
    for row, label in enumerate(table["id"]):
        mesh = trimesh.load_mesh(f"{made}/{label}.{ending}", process=False)
        np.testing.assert_allclose(mesh.bounds, bounds_of(table, row, (5, 5, 5)), rtol=1e-6)
        assert trimesh.Trimesh(mesh.vertices, mesh.faces).is_watertight
        assert mesh.volume == pytest.approx(1e9 * table["volume_um3"][row], rel=0.1)
    assert len(list((tmp_path / "meshes").iterdir())) == len(table) + 1  # and export.json


def test_precomputed_meshes_lie_beside_the_labels(reference, tmp_path):
    volseg.export(reference, tmp_path / "em.precomputed", meshes=True, objects=[2], progress=Quiet())
    folder = tmp_path / "em.precomputed" / json.loads((tmp_path / "em.precomputed/info").read_text())["mesh"]
    assert json.loads((folder / "info").read_text()) == {"@type": "neuroglancer_legacy_mesh"}
    fragments = json.loads((folder / "2:0").read_text())["fragments"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["info", "2:0", *fragments])
    mesh = zmesh.Mesh.from_precomputed((folder / fragments[0]).read_bytes())
    found = np.array([mesh.vertices.min(0), mesh.vertices.max(0)])
    np.testing.assert_allclose(found, bounds_of(volseg.open(reference).objects, 1, (5, 5, 5)), atol=2.5)


def test_large_objects_are_meshed_from_coarser_voxels(tmp_path, monkeypatch):
    labels = np.zeros((72, 80, 88), np.uint32)
    labels[4:68, 10:74, 20:84] = 7 * ball(31.5, (64, 64, 64))
    found = volume.open(write_volume(str(tmp_path / "em.zarr"), labels, nm=(5.0, 5.0, 5.0)))
    each = meshing.Object(7, Box((4, 10, 20), (68, 74, 84)))
    mesh_of = partial(meshing.mesh_of, (found,), each, 0)
    fine, coarse = solid(mesh_of()), solid(mesh_of(most=64**3 // 8))
    assert len(coarse.faces) < len(fine.faces) / 3
    np.testing.assert_allclose(coarse.bounds, fine.bounds, atol=10)
    assert coarse.volume == pytest.approx(fine.volume, rel=0.1)
    monkeypatch.setattr(meshes, "SLAB_VOXELS", 1)  # slabs of one section, or of one cell's
    again = mesh_of(most=64**3 // 8)
    np.testing.assert_array_equal(again.vertices, coarse.vertices)


def test_neighbors_are_read_together_and_give_the_same(reference, tmp_path, monkeypatch):
    together = volseg.export(reference, tmp_path / "together", kind="mesh", progress=Quiet())
    monkeypatch.setattr(meshing, "SMALL_VOXELS", 0)
    alone = volseg.export(reference, tmp_path / "alone", kind="mesh", progress=Quiet())
    table = volseg.open(reference).objects
    for label in table["id"]:
        assert (tmp_path / f"together/{label}:0:0").read_bytes() == (tmp_path / f"alone/{label}:0:0").read_bytes()
    assert together != alone


def test_an_object_that_is_not_there_is_named(reference, tmp_path):
    with pytest.raises(UserError, match="the run has no object 999; its object table lists them"):
        volseg.export(reference, tmp_path / "meshes", kind="obj", objects=[1, 999], progress=Quiet())
    with pytest.raises(UserError, match="tiff holds the whole volume; leave out --object, or give one of mesh"):
        volseg.export(reference, tmp_path / "em.tif", objects=[1], progress=Quiet())
