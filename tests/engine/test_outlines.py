"""Outlines and tables of a run's objects: what is read back is what the run holds."""

import io

import h5py
import numpy as np
import pandas
import pytest
import roifile
from hypothesis import given
from hypothesis.extra.numpy import arrays as drawn_arrays
from skimage.measure import points_in_poly

import volseg
from tests.helpers import Quiet
from volseg.io.export import rois


def filled(paths, shape):
    """The pixels whose centers lie within an odd number of the paths."""
    centers = np.stack(np.meshgrid(np.arange(shape[1]), np.arange(shape[0])), axis=-1).reshape(-1, 2) + 0.5
    inside = [points_in_poly(centers, np.asarray(path, float)) for path in paths]
    return np.logical_xor.reduce(inside).reshape(shape) if inside else np.zeros(shape, bool)


@given(drawn_arrays(bool, (6, 7)))
def test_outlines_enclose_their_pixels_and_no_others(mask):
    found = list(rois.outlines(mask))
    np.testing.assert_array_equal(filled(found, mask.shape), mask)
    steps = [np.abs(np.diff(path, axis=0, append=path[:1])) for path in found]
    assert all(
        np.all((step == 0).sum(axis=1) == 1) for step in steps
    )  # along the edges of pixels, without idle corners
    assert all(np.all((a > 0)[:, 0] != np.roll((a > 0)[:, 0], 1)) for a in steps)


def test_a_ring_is_one_region_of_two_paths():
    ring = np.ones((5, 6), bool)
    ring[2, 2:4] = False
    roi = roifile.ImagejRoi.frombytes(rois.encode("ring", 3, list(rois.outlines(ring))))
    assert (roi.name, roi.position) == ("ring", 4)
    assert (roi.left, roi.top, roi.right, roi.bottom) == (0, 0, 6, 5)
    np.testing.assert_array_equal(filled(roi.coordinates(multi=True), ring.shape), ring)


def test_every_section_of_every_object_comes_back_from_fijis_zip(reference, tmp_path):
    made = volseg.export(reference, tmp_path / "objects.zip", progress=Quiet())
    labels = volseg.open(reference).labels[:]
    found = np.zeros_like(labels)
    for roi in roifile.roiread(made):
        number, z = (int(part) for part in roi.name.split("-z"))
        assert roi.position == z + 1
        paths = roi.coordinates(multi=True)
        region = filled(paths if isinstance(paths, list) else [paths], labels.shape[1:])
        assert not found[z][region].any()
        found[z][region] = number
    np.testing.assert_array_equal(found, labels)
    two = volseg.export(reference, tmp_path / "two.zip", objects=[2], progress=Quiet())
    assert {roi.name[0] for roi in roifile.roiread(two)} == {"2"}


def test_the_table_goes_out_as_it_is(reference, tmp_path):
    table = volseg.open(reference).objects
    for ending, read in (("csv", pandas.read_csv), ("parquet", pandas.read_parquet)):
        found = read(volseg.export(reference, tmp_path / f"objects.{ending}", progress=Quiet()))
        pandas.testing.assert_frame_equal(found, table, check_dtype=False)


def test_anndata_holds_measures_places_and_centroids(reference, tmp_path):
    table = volseg.open(reference).objects
    made = volseg.export(reference, tmp_path / "objects.h5ad", progress=Quiet())
    with h5py.File(made) as file:
        names = [name.decode() for name in file["var/_index"][:]]
        assert {"voxels", "length_nm", "confidence"} <= set(names)
        np.testing.assert_array_equal(file["X"][:], table[names])
        assert [name.decode() for name in file["obs/_index"][:]] == [str(label) for label in table["id"]]
        np.testing.assert_array_equal(file["obs/touches_border"][:], table["touches_border"])
        np.testing.assert_array_equal(file["obsm/spatial"][:], table[[f"centroid_{axis}_nm" for axis in "xyz"]])
        assert dict(file.attrs) == {"encoding-type": "anndata", "encoding-version": "0.1.0"}


def test_anndata_reads_it_where_it_is_installed(reference, tmp_path):
    anndata = pytest.importorskip("anndata", reason="anndata holds pandas below 3, so that no extra brings it")
    made = volseg.export(reference, tmp_path / "objects.h5ad", progress=Quiet())
    assert anndata.read_h5ad(io.FileIO(made)).obs_names.tolist() == [
        str(n) for n in volseg.open(reference).objects["id"]
    ]
