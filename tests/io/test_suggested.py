"""Folders of sections that wait to be corrected: what was corrected is told from what was not."""

import json

import numpy as np
import pytest
import tifffile
from PIL import Image

from volseg.box import Box
from volseg.errors import UserError
from volseg.io import suggested, volume
from volseg.io.annotation import open_annotation
from volseg.io.suggested import Item, Queue


@pytest.fixture
def folder(tmp_path):
    """Sections 2, 5 and 7 of a volume of 9 x 20 x 30, each with one object."""
    return write_folder(tmp_path / "em.suggest", tmp_path / "em.tif", (2, 5, 7))


def write_folder(folder, image, sections, windows=("0:20,0:30",)):
    tifffile.imwrite(image, np.arange(9 * 20 * 30, dtype=np.uint16).reshape(9, 20, 30) % 251)
    (folder / "labels").mkdir(parents=True)
    items = []
    for z in sections:
        for window in windows:
            box = Box.parse(f"{z}:{z + 1},{window}")
            labels = np.zeros(box.shape[1:], np.uint16)
            labels[4:9, 3:8] = 40 + z
            name = suggested.item_name(box, (9, 20, 30))
            suggested.write_plane(folder / f"labels/{name}.tif", labels, (50.0, 5.0, 4.0))
            items.append(Item(name, box, suggested.labels_checksum(labels)))
    suggested.write_queue(folder, Queue(str(image), (9, 20, 30), (50.0, 5.0, 4.0), "run", "", tuple(items)))
    return folder


def correct(folder, name, value=3, save=tifffile.imwrite, ending=".tif"):
    labels = tifffile.imread(folder / f"labels/{name}.tif")
    labels[10:13] = value
    (folder / f"labels/{name}.tif").unlink()
    save(folder / f"labels/{name}{ending}", labels)
    return labels


def test_a_file_saved_anew_without_a_change_is_untouched(folder):
    labels = tifffile.imread(folder / "labels/s0002.tif")
    tifffile.imwrite(folder / "labels/s0002.tif", labels.astype(np.int32), compression="zlib")
    (folder / "labels/s0005.tif").unlink()
    Image.fromarray(labels + np.uint16(3) * (labels > 0)).save(folder / "labels/s0005.png")
    assert suggested.state(folder).untouched == ("s0002", "s0005", "s0007")


def test_changed_sections_and_those_named_as_right_count(folder):
    correct(folder, "s0005", save=lambda path, labels: Image.fromarray(labels).save(path), ending=".png")
    (folder / "labels/s0002.tif").unlink()
    (folder / "checked.txt").write_text("# right\ns0007.tif\n\n")
    (folder / "labels/notes.png").write_bytes((folder / "labels/s0005.png").read_bytes())
    state = suggested.state(folder)
    assert [item.name for item, _ in state.corrected] == ["s0005", "s0007"]
    assert (state.untouched, state.missing, state.others) == ((), ("s0002",), ("notes.png",))
    (folder / "checked.txt").unlink()
    assert "as they were written: s0007; name those" in suggested.state(folder).notes("em.suggest")[0]


def test_labels_of_a_folder_are_those_that_were_corrected(folder):
    labels = correct(folder, "s0005")
    image = volume.open(folder.parent / "em.tif")
    for place in (folder, folder / "labels"):
        found = open_annotation(place, image)
        assert (found.form, found.sections, found.unlabeled) == ("suggested", (5,), 65535)
        assert not found.read(0, 5).any()
        np.testing.assert_array_equal(found.read(4, 6), [np.zeros_like(labels), labels])
    assert any("s0002, s0007" in note for note in found.notes)


def test_windows_are_read_as_the_part_that_they_are(tmp_path):
    windows = ("0:20,0:15", "0:20,15:30")
    folder = write_folder(tmp_path / "em.suggest", tmp_path / "em.tif", (2, 5), windows)
    labels = correct(folder, "s0005_y0_x15")
    image = volume.open(tmp_path / "em.tif")
    found = open_annotation(folder, image, part=(slice(0, 20), slice(15, 30)))
    assert found.sections == (5,)
    np.testing.assert_array_equal(found.read(5, 6)[0], labels)
    with pytest.raises(UserError, match="holds windows alone: volseg train CONFIG --add"):
        open_annotation(folder, image)
    with pytest.raises(UserError, match="no corrected window 0:20,0:15"):
        open_annotation(folder, image, part=(slice(0, 20), slice(0, 15)))


def test_part_of_any_labels_is_what_is_asked_for(tmp_path):
    labels = np.arange(2 * 8 * 9, dtype=np.uint8).reshape(2, 8, 9)
    tifffile.imwrite(tmp_path / "labels.tif", labels)
    found = open_annotation(
        tmp_path / "labels.tif", volume.open(tmp_path / "labels.tif"), part=(slice(2, 5), slice(1, 9))
    )
    np.testing.assert_array_equal(found.read(1, 2), labels[1:, 2:5, 1:9])


def test_a_section_is_written_with_the_size_of_its_voxels(folder, tmp_path):
    with tifffile.TiffFile(folder / "labels/s0002.tif") as file:
        assert (file.imagej_metadata["spacing"], file.imagej_metadata["unit"]) == (pytest.approx(0.05), "um")
        tags = [file.pages[0].tags[f"{axis}Resolution"].value for axis in "YX"]
        assert [1000 * per / pixels for pixels, per in tags] == pytest.approx([5, 4])
    for dtype, stored in (("uint8", "uint8"), ("int32", "float32"), ("float64", "float32")):
        suggested.write_plane(tmp_path / "plane.tif", np.full((4, 5), 7, dtype), None)
        assert tifffile.imread(tmp_path / "plane.tif").dtype == stored


def test_labels_that_16_bits_cannot_hold_are_numbered_anew():
    labels = np.array([[0, 70_000, 9], [70_000, 9, 9]], np.uint64)
    assert suggested.fitting_labels(labels).tolist() == [[0, 2, 1], [2, 1, 1]]
    assert suggested.fitting_labels(labels[:, 2:]).dtype == np.uint16


def _break_queue(folder, **changes):
    plain = json.loads((folder / "suggest.json").read_text())
    (folder / "suggest.json").write_text(json.dumps({**plain, **changes}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "suggest.json").write_text("{"), "suggest.json is damaged"),
        (lambda folder: _break_queue(folder, items=[{"name": "s0002"}]), "suggest.json is damaged"),
        (lambda folder: _break_queue(folder, format=9), "another version of volseg"),
        (lambda folder: (folder / "checked.txt").write_text("s0003\n"), "'s0003', which is none of the suggested"),
        (lambda folder: (folder / "checked.txt").write_bytes(b"\xff\xfe\xff"), "cannot read .*checked.txt"),
        (lambda folder: Image.new("L", (30, 20)).save(folder / "labels/s0002.png"), "two files of s0002"),
        (lambda folder: Image.new("L", (9, 20)).save(folder / "labels/s0002.tif"), "20 x 9 y x, but was written as 20 x 30"),
        (lambda folder: Image.new("RGB", (30, 20), (1, 2, 3)).save(folder / "labels/s0002.tif"), "color image"),
        (lambda folder: _break_queue(folder, shape=[9, 20, 31]), "give the image that they were suggested of"),
        (lambda folder: None, "nothing in .* was corrected"),
    ],
)  # fmt: skip
def test_a_folder_that_says_nothing_is_refused_in_one_line(folder, spoil, said):
    spoil(folder)
    with pytest.raises(UserError, match=said) as error:
        open_annotation(folder, volume.open(folder.parent / "em.tif"))
    assert "\n" not in str(error.value)
