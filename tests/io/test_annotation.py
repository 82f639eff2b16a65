"""Labels as people make them: which sections they belong to, and what drawn regions enclose."""

import zipfile

import numpy as np
import pytest
import roifile
import tifffile
import zarr
from PIL import Image

from volseg.box import Box
from volseg.errors import UserError
from volseg.io import numbering, regions, volume
from volseg.io.annotation import open_annotation
from volseg.io.export import rois

SHAPE = (12, 40, 48)


@pytest.fixture(scope="module")
def em(tmp_path_factory):
    """A stack of 12 sections as one file, as a folder of slices numbered from 101, and the labels of all."""
    folder = tmp_path_factory.mktemp("em")
    gray = np.random.default_rng(0).integers(1, 255, SHAPE, np.uint8)
    labels = np.zeros(SHAPE, np.uint16)
    labels[:, 4:18, 4:20], labels[:, 22:36, 10:40] = 1, 2
    labels[5] = labels[5] * 300
    tifffile.imwrite(folder / "em.tif", gray, photometric="minisblack")
    (folder / "slices").mkdir()
    for z, plane in enumerate(gray, 101):
        Image.fromarray(plane).save(folder / "slices" / f"em_{z}.png")
    return folder, labels


def write_sections(folder, labels, sections, name="s{:03}.png", first=0):
    """A folder that holds some sections of the labels alone."""
    folder.mkdir()
    for z in sections:
        Image.fromarray(labels[z]).save(folder / name.format(z + first))
    return folder


def opened(em, path, image="em.tif", **settings):
    return open_annotation(path, volume.open(em[0] / image), **settings)


def expect_sections(found, labels, sections):
    assert found.sections == tuple(sections)
    truth = np.zeros_like(labels)
    truth[list(sections)] = labels[list(sections)]
    np.testing.assert_array_equal(found.read(0, len(labels)), truth)
    np.testing.assert_array_equal(found.read(3, 9), truth[3:9])


@pytest.mark.parametrize(("first", "sections"), [(0, (0, 5, 8)), (1, (2, 5, 11))])
def test_sections_that_fit_one_way_alone_need_no_setting(em, tmp_path, first, sections):
    found = opened(em, write_sections(tmp_path / "labels", em[1], sections, first=first))
    expect_sections(found, em[1], sections)
    assert f"count from {first}" in found.notes[0]


def test_numbers_that_fit_from_0_and_from_1_are_told_with_what_to_set(em, tmp_path):
    folder = write_sections(tmp_path / "labels", em[1], (3, 7), first=1)
    with pytest.raises(UserError, match=r"numbers from 4 to 8, .*set first_number = 0 or 1"):
        opened(em, folder)
    expect_sections(opened(em, folder, first_number=1), em[1], (3, 7))


def test_numbers_of_slices_say_where_sections_belong(em, tmp_path):
    folder = write_sections(tmp_path / "labels", em[1], (3, 7), name="mask-{}.png", first=101)
    found = opened(em, folder, image="slices")
    expect_sections(found, em[1], (3, 7))
    with pytest.raises(UserError, match="number 108, but the image has 12 sections"):
        opened(em, folder)
    expect_sections(opened(em, folder, first_number=101), em[1], (3, 7))
    with pytest.raises(UserError, match=r"number 5, but no slice .* go from 101 to 112.*first_number"):
        opened(em, write_sections(tmp_path / "others", em[1], (4,), first=1), image="slices")


def test_names_of_slices_say_where_sections_belong(em, tmp_path):
    folder = tmp_path / "labels"
    folder.mkdir()
    for name in ("a", "b9 v2", "c"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / f"{name}.tif")
    assert numbering.sections(["b9 v2.png"], "labels", 3, image_names=["a.tif", "b9 v2.tif", "c.tif"])[0] == [1]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["s1.png", "s001.png"], "two files of number 1, s1.png and s001.png"),
        (["s1.png", "mean.png"], "mean.png has no number"),
        (["s1_r2.png", "s2_r3.png"], "s1_r2.png has several numbers"),
        (["s1_r2.png"], "s1_r2.png has several numbers"),
        (["s0.png", "s12.png"], "one more than the image has sections"),
        (["s13.png"], "number 13, but the image has 12 sections"),
        (["s99999999999999999999.png"], "no number"),
    ],
)
def test_names_that_tell_no_section_are_refused(names, said):
    with pytest.raises(UserError, match=said):
        numbering.sections(names, "labels", 12)


def test_gray_saved_as_color_is_read_and_colors_are_refused(em, tmp_path):
    folder = tmp_path / "labels"
    folder.mkdir()
    mask = ((em[1][8] > 0) * 255).astype(np.uint8)
    Image.fromarray(np.stack([mask] * 3 + [np.full_like(mask, 255)], -1)).save(folder / "0.png")
    tifffile.imwrite(folder / "7.tif", np.stack([mask] * 3, -1), photometric="rgb")
    found = opened(em, folder)
    assert found.sections == (0, 7)
    np.testing.assert_array_equal(found.read(7, 8)[0], mask)
    np.testing.assert_array_equal(found.read(0, 1)[0], mask)
    Image.fromarray(np.stack([mask, mask, 0 * mask], -1)).save(folder / "0.png")
    with pytest.raises(UserError, match=r"0\.png is a color image"):
        opened(em, folder).read(0, 1)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_labels_as_napari_saves_them(em, tmp_path, dtype):
    labels = em[1].astype(dtype)
    tifffile.imwrite(tmp_path / "layer.tif", labels, compression="zlib")
    np.save(tmp_path / "layer.npy", labels)
    zarr.create_array(str(tmp_path / "layer.zarr"), data=labels, chunks=(4, 20, 48))
    for name in ("layer.tif", "layer.npy", "layer.zarr"):
        found = opened(em, tmp_path / name)
        assert found.sections is None
        np.testing.assert_array_equal(found.read(0, 12), labels)


# -------------------------------------------------------------------------------------------------------------- regions


def traced(labels, sections):
    """Each object in each section as ImageJ's bytes."""
    for z in sections:
        for number in np.unique(labels[z])[1:]:
            yield rois.encode(f"{z}-{number}", z, list(rois.outlines(labels[z] == number)))


def write_zip(path, stored):
    with zipfile.ZipFile(path, "w") as file:
        for i, data in enumerate(stored):
            file.writestr(f"{i}.roi", data)
    return path


def test_regions_of_a_zip_and_of_an_overlay_are_the_objects_that_they_were_traced_from(em, tmp_path):
    folder, labels = em
    sections = (2, 3, 9)
    stored = list(traced(labels, sections))
    gray = volume.open(folder / "em.tif")
    facts = {"axes": "ZYX", "Overlays": stored}
    tifffile.imwrite(tmp_path / "em.tif", tifffile.imread(folder / "em.tif"), imagej=True, metadata=facts)
    of_file = open_annotation(tmp_path / "em.tif", volume.open(tmp_path / "em.tif"))
    for found in (
        open_annotation(write_zip(tmp_path / "RoiSet.zip", stored), gray),
        open_annotation(f"{tmp_path}/em.tif::/overlay", gray),
        of_file,
    ):
        assert found.sections == sections
        read = found.read(0, 12)
        np.testing.assert_array_equal(read > 0, np.isin(np.arange(12), sections)[:, None, None] & (labels > 0))
        assert [np.unique(read[z]).tolist() for z in sections] == [[0, 1, 2], [0, 1, 2], [0, 3, 4]]  # 2 and 3 touch
    with pytest.raises(UserError, match=r"voxels and 6 regions .*::/voxels or .*::/overlay"):
        open_annotation(tmp_path / "em.tif", gray)
    np.testing.assert_array_equal(
        open_annotation(f"{tmp_path}/em.tif::/voxels", gray).read(0, 12), gray.read(Box.from_shape(SHAPE))
    )


def test_an_exported_zip_comes_back_with_its_objects(em, tmp_path):
    ring = np.zeros((40, 48), np.uint16)
    ring[5:20, 5:20], ring[9:12, 9:12] = 7, 9
    names = [rois.encode(f"{n}-z04", 4, list(rois.outlines(ring == n))) for n in (7, 9)]
    found = opened(em, write_zip(tmp_path / "objects.zip", names))
    np.testing.assert_array_equal(found.read(4, 5)[0], ring)


def test_a_later_region_lies_on_an_earlier_one_and_each_is_an_object(em, tmp_path):
    rectangle = roifile.ImagejRoi(
        roitype=roifile.ROI_TYPE.RECT, left=2, top=3, right=12, bottom=9, name="a", position=2
    )
    oval = roifile.ImagejRoi(roitype=roifile.ROI_TYPE.OVAL, left=8, top=2, right=20, bottom=12, name="0002-0007-0014")
    line = roifile.ImagejRoi(roitype=roifile.ROI_TYPE.LINE, x1=1, y1=1, x2=9, y2=9, name="line", position=2)
    shape = roifile.ImagejRoi.frompoints(np.array([[-3, 36], [4, 36], [4, 99], [-3, 99]], float), name="b", z=1)
    found = opened(em, write_zip(tmp_path / "r.zip", [roi.tobytes() for roi in (rectangle, oval, line, shape)]))
    (plane,) = found.read(1, 2)
    y, x = np.mgrid[:40, :48] + 0.5
    inside = ((x - 14) / 6) ** 2 + ((y - 7) / 5) ** 2 < 1
    np.testing.assert_array_equal(plane == 2, inside)
    assert (plane[3:9, 2:12][~inside[3:9, 2:12]] == 1).all()
    assert (plane[36:, :4] == 3).all()
    assert (plane > 0).sum() == (inside | (plane == 1) | (plane == 3)).sum()
    assert any("1 regions that enclose no pixels" in note for note in found.notes)


def test_a_composite_of_curves_encloses_a_ring(em, tmp_path):
    def circle(radius):
        k, r, c = radius * 0.5522847, radius, 20.0
        return [0, c + r, c, *(3, c + r, c + k, c + k, c + r, c, c + r), *(3, c - k, c + r, c - r, c + k, c - r, c),
                *(3, c - r, c - k, c - k, c - r, c, c - r), *(3, c + k, c - r, c + r, c - k, c + r, c), 4]  # fmt: skip

    path = np.array(circle(15) + circle(6), np.float32)
    roi = roifile.ImagejRoi(
        roitype=roifile.ROI_TYPE.RECT,
        left=5,
        top=5,
        right=35,
        bottom=35,
        name="ring",
        z_position=3,
        shape_roi_size=path.size,
    )
    roi.multi_coordinates = path
    found = opened(em, write_zip(tmp_path / "r.zip", [roi.tobytes()]))
    y, x = np.mgrid[:40, :48] + 0.5
    distance = np.hypot(y - 20, x - 20)
    np.testing.assert_array_equal(found.read(2, 3)[0] == 1, (distance < 15) & (distance > 6))
    roi.multi_coordinates = np.array([0, 1, 1, 7, 2, 2, 4], np.float32)
    roi.shape_roi_size = 7
    with pytest.raises(UserError, match="its path has the command 7"):
        opened(em, write_zip(tmp_path / "r.zip", [roi.tobytes()]))


def test_a_region_must_say_its_section(em, tmp_path):
    roi = roifile.ImagejRoi(roitype=roifile.ROI_TYPE.RECT, left=2, top=3, right=12, bottom=9, name="cell")
    with pytest.raises(UserError, match=r"region cell of .* does not say in which section"):
        opened(em, write_zip(tmp_path / "r.zip", [roi.tobytes()]))
    roi.position = 13
    roi.tofile(tmp_path / "cell.roi")
    with pytest.raises(UserError, match=r"section 13 .* has 12"):
        opened(em, tmp_path / "cell.roi")


def test_a_zip_cut_short_is_refused(em, tmp_path):
    path = write_zip(tmp_path / "r.zip", traced(em[1], (1,)))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"cannot read .*r\.zip"):
        opened(em, path)


def test_shapes_of_napari_have_integers_at_the_centers_of_voxels(em, tmp_path):
    rows = ["index,shape-type,vertex-index,axis-0,axis-1,axis-2"]
    corners = [(1.6, 1.6), (1.6, 4.4), (3.4, 4.4), (3.4, 1.6)]
    rows += [f"0,rectangle,{i},3.0,{y},{x}" for i, (y, x) in enumerate(corners)]
    rows += [
        f"1,ellipse,{i},7.0,{y},{x}" for i, (y, x) in enumerate([(9.8, 9.8), (9.8, 20.2), (20.2, 20.2), (20.2, 9.8)])
    ]
    rows += [f"2,path,{i},7.0,{y},{x}" for i, (y, x) in enumerate([(10, 10), (30, 20)])]
    (tmp_path / "shapes.csv").write_text("\n".join(rows))
    found = opened(em, tmp_path / "shapes.csv")
    assert found.sections == (3, 7)
    assert np.argwhere(found.read(3, 4)[0]).tolist() == [[y, x] for y in (2, 3) for x in (2, 3, 4)]
    y, x = np.mgrid[:40, :48]
    np.testing.assert_array_equal(found.read(7, 8)[0] == 2, (y - 15) ** 2 + (x - 15) ** 2 < 5.2**2)


def test_objects_of_neighboring_sections_are_one_where_they_overlap_most():
    def square(z, left, right, name="r"):
        return regions.Region(name, z, (np.array([[left, 0], [right, 0], [right, 4], [left, 4]], float),))

    drawn = [square(0, 0, 10), square(1, 1, 9), square(1, 9, 12), square(2, 8, 12), square(5, 0, 10)]
    assert regions.objects(drawn, (4, 20)) == [1, 1, 2, 2, 3]
