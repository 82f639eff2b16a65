"""A first config: what labels are taken for, what is held out, and that training takes it."""

import json

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from skimage.draw import disk

import volseg
from volseg.config import load
from volseg.errors import UserError
from volseg.inference.model import load_card
from volseg.training.sources import load_sources
from volseg.training.survey import MIN_SECTIONS, hold_out

SHAPE = (12, 96, 96)


@pytest.fixture(scope="module")
def em(tmp_path_factory):
    """A stack of bright balls, and its instances."""
    folder = tmp_path_factory.mktemp("em")
    labels = np.zeros(SHAPE, np.uint16)
    for i, center in enumerate([(20, 20), (24, 70), (70, 30), (66, 74)], 1):
        labels[(slice(None), *disk(center, 12))] = i
    gray = np.random.default_rng(0).normal(100, 10, SHAPE) + 60 * (labels > 0)
    size = {"axes": "ZYX", "unit": "nm", "spacing": 50}
    tifffile.imwrite(
        folder / "em.tif", np.clip(gray, 1, 255).astype(np.uint8), imagej=True, metadata=size, resolution=(1 / 5, 1 / 5)
    )
    return folder / "em.tif", labels


def look(em, tmp_path, labels, **settings):
    tifffile.imwrite(tmp_path / "labels.tif", labels, photometric="minisblack")
    return volseg.init(em[0], tmp_path / "labels.tif", **settings)


# ------------------------------------------------------------------------------------------------------------- held out


@pytest.mark.parametrize(
    ("sections", "held", "left_out"),
    [
        ([5, 16, 27, 38, 49, 60, 71, 82, 93, 104, 115, 126], [38, 104], []),
        (range(20), [17, 18, 19], [16]),
        (range(10, 130), [*range(36, 45), *range(96, 105)], [35, 45, 95, 105]),
        ([3, 4], [], []),
        ([5, 16, 27, 28, 29, 60, 71, 82, 93, 104, 115, 126], [60, 104], []),
        (range(4), [3], []),
        ([0, 1, 9, 10, 20, 21, 30, 31, 40, 41], [20, 21], []),
    ],
)
def test_sections_are_held_out_apart_from_those_that_teach(sections, held, left_out):
    train, found = hold_out(sections)
    assert list(found) == held
    assert sorted({*sections} - {*train, *found}) == left_out


@given(st.sets(st.integers(0, 200), min_size=1))
def test_something_is_left_to_learn_from_and_most_is_not_held_out(sections):
    train, held = hold_out(sorted(sections))
    assert not set(train) & set(held)
    assert {*train, *held} <= sections
    assert len(train) > len(held)
    assert bool(held) == (len(sections) >= MIN_SECTIONS)
    beside = {z + step for z in held for step in (-1, 1)} & set(train)
    assert not beside or len(train) < 2 * MIN_SECTIONS


# ----------------------------------------------------------------------------------------------------------------- kind


def test_instances_of_some_sections_are_seen(em, tmp_path):
    labels = em[1].copy()
    labels[[0, 2, 3, 5, 7, 10, 11]] = 0
    made = look(em, tmp_path, labels, out=tmp_path / "my.toml")
    found = made.found
    assert (found.kind, found.sections, found.objects) == ("instances", (1, 4, 6, 8, 9), 4)
    assert "4 values beside 0 (1, 2, 3, 4)" in found.reason
    assert found.foreground == pytest.approx((em[1][0] > 0).mean())
    assert made.voxel_size_nm == (50, 5, 5)
    assert "7 sections hold no label" in made.notes[-1]
    (data,) = made.config.train.data
    assert load(tmp_path / "my.toml") == made.config
    assert (data.train, data.validate_on) == ((1, 4, "8:10"), (6,))
    assert json.loads(json.dumps(made.to_json()))["found"]["objects"] == 4
    assert "validate_on" in made._repr_html_()
    with pytest.raises(UserError, match=r"my\.toml exists; .*--overwrite"):
        volseg.init(em[0], tmp_path / "labels.tif", tmp_path / "my.toml")


def test_a_mask_is_seen_whatever_it_is_written_with(em, tmp_path):
    mask = np.where(em[1] > 0, 255, 0).astype(np.uint8)
    found = look(em, tmp_path, mask).found
    assert (found.kind, found.objects, found.background) == ("mask", 4, 0)
    turned = look(em, tmp_path, 255 - mask)
    assert any("--background 255" in note for note in turned.notes)
    turned = look(em, tmp_path, 255 - mask, background=255)
    assert (turned.found.objects, turned.config.train.data[0].background) == (4, 255)
    dense = look(em, tmp_path, (mask > 0) + np.uint8(1)).found
    assert (dense.background, dense.objects) == (1, 4)
    assert dense.foreground == pytest.approx(found.foreground)


def test_scribbles_are_seen_by_their_strokes(em, tmp_path):
    strokes = np.zeros(SHAPE, np.uint8)
    for y, x in ((20, 20), (24, 70), (70, 30)):
        strokes[3, y - 1 : y + 2, x - 9 : x + 9] = 2
    strokes[3, 46:49, 5:90] = strokes[3, 5:90, 47:50] = 1
    made = look(em, tmp_path, strokes)
    assert (made.found.kind, made.found.objects, made.found.sections) == ("scribbles", 3, (3,))
    assert "long strokes" in made.found.reason
    (data,) = made.config.train.data
    assert (data.unlabeled, data.background, data.validate_on) == (0, 1, ())
    strokes[9] = strokes[3]
    folder = tmp_path / "labels"
    folder.mkdir()
    for z in (0, 3, 9):
        Image.fromarray(strokes[z]).save(folder / f"s{z}.png")
    made_of_files = volseg.init(em[0], folder)
    assert made_of_files.found.sections == (3, 9)
    assert any("1 section holds no stroke and is left out (0)" in note for note in made_of_files.notes)
    strokes[9] = 0
    assert look(em, tmp_path, strokes, background=2).config.train.data[0].background == 2
    assert look(em, tmp_path, strokes, scribbles=False).found.kind == "instances"
    assert look(em, tmp_path, np.where(em[1] == 2, 1, em[1] // 3 * 2), scribbles=True).found.kind == "scribbles"


def test_sections_that_were_numbered_by_themselves_are_told(em, tmp_path):
    labels = em[1].copy()
    for z, section in enumerate(labels):
        section[section > 0] = (section[section > 0] + z) % 4 + 1
    found = look(em, tmp_path, labels).found
    assert found.objects == 4
    assert "each section was numbered by itself" in found.reason
    assert "by itself" not in look(em, tmp_path, em[1]).found.reason


def test_labels_in_a_corner_are_told(em, tmp_path):
    labels = np.where(em[1] == 1, em[1], 0)
    labels[:, 40:44, 50] = 7
    made = look(em, tmp_path, labels)
    assert any("all labels lie in y 9:44, x 9:51" in note for note in made.notes)
    assert not any("all labels lie" in note for note in look(em, tmp_path, em[1]).notes)


def test_classes_that_may_be_no_objects_are_told(em, tmp_path):
    classes = np.where(em[1] > 0, 1, 0)
    classes[:, 40:52, 5:8] = classes[:, 40:52, 85:88] = classes[:, 85:90, 50:53] = 2
    made = look(em, tmp_path, classes.astype(np.uint8), scribbles=False)
    assert any("if they are classes and no objects" in note for note in made.notes)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (np.zeros_like, "holds no label: all of its voxels are 0"),
        (np.ones_like, r"every annotated voxel is in an object; .*--background"),
        (lambda labels: np.random.default_rng(0).integers(0, 255, SHAPE, np.uint8), "those of an image do"),
        (lambda labels: labels * np.float32(0.5), r"labels\.tif: labels are float32 with fractions"),
        (lambda labels: -labels.astype(np.int16), "negative number"),
        (lambda labels: labels[:5], "give labels of the image's shape, or a folder"),
    ],
)
def test_labels_that_teach_nothing_are_refused(em, tmp_path, make, said):
    with pytest.raises(UserError, match=said):
        look(em, tmp_path, make(em[1]))
    if make is np.ones_like:
        with pytest.raises(UserError, match="background = 7 is none of them"):
            look(em, tmp_path, em[1], background=7)


# ------------------------------------------------------------------------------------------------------------- training


def test_a_config_of_a_folder_of_sections_trains(run, em, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels").mkdir()
    for z in (1, 4, 7, 9):
        Image.fromarray(em[1][z]).save(f"labels/mito_{z}.tif")
    code, _, err = run("init", em[0], "labels")
    assert (code, err.strip().count("\n")) == (2, 0)
    assert "set first_number = 0 or 1" in err
    code, out, _ = run("init", em[0], "labels", "--first-number", 0)
    assert code == 0
    assert "4 of 12 sections annotated (1, 4, 7, 9)" in out
    assert "hold out  1 section (7)" in out
    sets = ("steps=2", "every=2", "batch=2", "patch=64", "pretrained=false", "decoder=[16,16,8,8,8]", "device=cpu")
    code, out, err = run("train", "em.toml", *(f"--set=train.{each}" for each in sets))
    assert code == 0, err
    card = load_card("runs/em/model.safetensors")
    assert card.training.steps == 2
    assert card.voxel_size_nm == (50, 5, 5)
    assert card.to_json()["training"]["data"][0]["held"] == [7]


def test_a_config_of_points_trains_on_balls_of_their_radius(em, tmp_path, run):
    (tmp_path / "points.csv").write_text("index,axis-0,axis-1,axis-2\n0,4,20,20\n1,8,70,30\n")
    code, out, _ = run(
        "init", em[0], tmp_path / "points.csv", "--radius-nm", "55", "--out", tmp_path / "my.toml", "--json"
    )
    made = json.loads(out)
    assert code == 0
    assert (made["found"]["kind"], made["found"]["reason"]) == ("instances", "a ball around each point")
    assert made["found"]["objects"] == 2
    table = load(tmp_path / "my.toml").train.data[0]
    assert (table.radius_nm, table.label) == (55.0, str(tmp_path / "points.csv"))
    (source,) = load_sources(load(tmp_path / "my.toml").train)
    assert source.labels.max() == 2
    code, _, err = run("init", em[0], em[0], "--radius-nm", "55", "--out", tmp_path / "your.toml")
    assert code == 2
    assert "radius_nm = 55 is for a table of points" in err


@pytest.mark.parametrize("radius", [0.0, -3.0, float("inf"), float("nan")])
def test_a_radius_is_above_zero(em, tmp_path, radius):
    (tmp_path / "points.csv").write_text("z,y,x\n1,2,3\n")
    with pytest.raises(UserError, match="makes no ball"):
        volseg.init(em[0], tmp_path / "points.csv", radius_nm=radius)
