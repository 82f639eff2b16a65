"""Points that people set: what tables say, and the balls around them."""

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from volseg.box import Box
from volseg.errors import UserError
from volseg.io import points, volume
from volseg.io.annotation import open_annotation

SHAPE, SIZE = (6, 30, 40), (50.0, 8.0, 10.0)


def table(path, *lines):
    path.write_text("\n".join([*lines, ""]))
    return str(path)


def nearest(found, shape):
    """The balls by their definition: all distances to all points, of those that reach the nearest and first."""
    centers = np.stack(np.indices(shape), axis=-1)
    own = np.floor(found.zyx + 0.5).astype(int)
    offsets = (centers[..., None, :] - found.zyx) * found.voxel_size_nm
    squared = offsets[..., 0] ** 2 + offsets[..., 1] ** 2 + offsets[..., 2] ** 2
    reached = (squared <= found.radius_nm**2) | (centers[..., None, :] == own).all(axis=-1)
    squared[~reached] = np.inf
    return np.where(reached.any(axis=-1), squared.argmin(axis=-1) + 1, 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_balls_are_their_definition_for_every_cutting(seed, depth):
    rng = np.random.default_rng(seed)
    shape = (7, 12, 14)
    places = np.unique(rng.integers(0, shape, (9, 3)), axis=0)
    places = rng.permutation(places + rng.choice([0.0, 0.25, 0.49], places.shape) * (rng.random(places.shape) < 0.5))
    size = tuple(float(n) for n in rng.choice([4, 5, 20], 3))
    found = points.Points("", places, rng.choice([1.0, 10.0, 25.0], len(places)), size)
    truth = nearest(found, shape)
    made = np.zeros(shape, np.uint32)
    for z in range(0, shape[0], depth):
        for y in (0, 5):
            box = Box((z, y, 0), (min(shape[0], z + depth), 5 if y == 0 else shape[1], shape[2]))
            made[box.slices] = points.balls(found, box)
    np.testing.assert_array_equal(made, truth)
    np.testing.assert_array_equal(points.balls(found, Box.from_shape(shape)), truth)


@pytest.mark.parametrize(
    ("heading", "row"),
    [
        ("z,y,x", "2,10.5,20"),
        ("X, Y ,Z", "20,10.5,2"),
        ("\ufeffz,y,x,comment", "2,10.5,20,a synapse"),
        ("index,axis-0,axis-1,axis-2", "7.0,2.0,10.5,20.0"),
        ("axis-0,axis-1,axis-2,z_nm,y_nm,x_nm", "2,10.5,20,0,0,0"),
        ("z_nm,y_nm,x_nm", "100,84,200"),
    ],
)
def test_a_table_of_any_program_says_where_its_points_are(tmp_path, heading, row):
    found = points.read(table(tmp_path / "p.csv", heading, row), SHAPE, SIZE)
    np.testing.assert_allclose(found.zyx, [[2, 10.5, 20]])
    np.testing.assert_array_equal(found.radius_nm, [50])  # five voxels of the plane
    assert "1 points" in found.notes[0]


def test_a_radius_of_a_row_counts_before_that_of_all(tmp_path):
    path = table(tmp_path / "p.csv", "z,y,x,radius_nm", "1,2,3,40", "1,9,3,", "1,20,3")
    np.testing.assert_array_equal(points.read(path, SHAPE, SIZE, 30.0).radius_nm, [40, 30, 30])


BAD = {
    "other columns": (["a,b", "1,2"], r"has the columns a, b: .*axis-0, axis-1, axis-2"),
    "two axes": (["axis-0,axis-1", "1,2"], "has the columns axis-0, axis-1"),
    "four axes": (["axis-0,axis-1,axis-2,axis-3", "0,1,2,3"], "alone, as napari saves them"),
    "semicolons": (["z;y;x", "1;2;3"], "has the columns z;y;x"),
    "no row": (["z,y,x"], "holds no point"),
    "a word": (["z,y,x", "1,2,3", "1,two,3"], r"row 2 of .*has the y 'two'"),
    "nothing": (["z,y,x", "1,2"], r"row 1 of .*has the x ''"),
    "nan": (["z,y,x", "1,nan,3"], r"row 1 of .*has the y 'nan'"),
    "infinite": (["z,y,x", "1,2,-inf"], r"row 1 of .*has the x '-inf'"),
    "outside": (["z,y,x", "1,2,3", "1,2,39.5"], r"row 2 of .*lies at 1, 2, 39.5 .*of 6 x 30 x 40 voxels"),
    "below": (["z,y,x", "-0.6,2,3"], r"row 1 of .*outside"),
    "twice": (["z,y,x", "1,2,3", "2,2,3", "1.2,2,3"], "row 3 of .*in the voxel of row 1"),
    "a radius of 0": (["z,y,x,radius_nm", "1,2,3,0"], "row 1 of .*radius_nm of 0"),
    "a radius of a word": (["z,y,x,radius_nm", "1,2,3,wide"], r"row 1 of .*the radius_nm 'wide'"),
    "binary": (["z,y,x\x00", "1,2"], "p.csv"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_table_is_refused_with_its_row(tmp_path, case):
    lines, said = BAD[case]
    with pytest.raises(UserError, match=said) as error:
        points.read(table(tmp_path / "p.csv", *lines), SHAPE, SIZE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lines", [["z_nm,y_nm,x_nm", "1,2,3"], ["z,y,x,radius_nm", "1,2,3,9"]])
def test_nm_without_a_voxel_size_are_refused(tmp_path, lines):
    path = table(tmp_path / "p.csv", *lines)
    with pytest.raises(UserError, match="nobody says how large a voxel is"):
        points.read(path, SHAPE, None)
    with pytest.raises(UserError, match="nobody says how large a voxel is"):
        points.read(table(tmp_path / "q.csv", "z,y,x", "1,2,3"), SHAPE, None, 30.0)


def test_points_are_annotation_of_all_sections(tmp_path):
    tifffile.imwrite(tmp_path / "em.tif", np.full(SHAPE, 99, np.uint8), photometric="minisblack")
    em = volume.open(tmp_path / "em.tif", voxel_size_nm=SIZE)
    path = table(tmp_path / "p.csv", "z,y,x", "2,10,20", "4,12,30")
    found = open_annotation(path, em, radius_nm=60.0)
    assert (found.form, found.sections) == ("points", tuple(range(6)))
    whole = found.read(0, 6)
    np.testing.assert_array_equal(whole, nearest(points.read(path, SHAPE, SIZE, 60.0), SHAPE))
    assert np.unique(whole[1]).tolist() == [0, 1]  # 60 nm are a section of 50 nm on each side
    np.testing.assert_array_equal(found.read(1, 4), whole[1:4])
    window = slice(8, 20), slice(15, 40)
    np.testing.assert_array_equal(open_annotation(path, em, part=window, radius_nm=60.0).read(0, 6), whole[:, *window])
    tifffile.imwrite(tmp_path / "labels.tif", np.zeros(SHAPE, np.uint8), photometric="minisblack")
    with pytest.raises(UserError, match="radius_nm = 60 is for a table of points"):
        open_annotation(tmp_path / "labels.tif", em, radius_nm=60.0)
    with pytest.raises(UserError, match="first_number = 1 is for a folder"):
        open_annotation(path, em, first_number=1)


def test_absurd_radii_fill_the_volume():
    one = points.Points("", np.array([[1.0, 2.0, 3.0]]), np.array([1e21]), (50.0, 5.0, 5.0))
    assert (points.balls(one, Box((0, 0, 0), (3, 4, 5))) == 1).all()
