"""Training goes on with corrected sections, and tells what changed."""

import json
import shutil

import numpy as np
import pytest
import tifffile

import volseg
from tests.helpers import config_of
from volseg.box import Box
from volseg.errors import UserError
from volseg.inference.model import load_card, write_card
from volseg.io import suggested
from volseg.io.suggested import Item, Queue
from volseg.training.corrections import extended, read_addition, train_more
from volseg.training.samples import annotated_batch
from volseg.training.sources import load_sources
from volseg.training.targets import UNLABELED


@pytest.fixture
def trained(whole_run, tables, tmp_path):
    """The config of a model of 6 steps, whose folder is a copy of it, with the data of its image in 8 sections."""
    shutil.copytree(whole_run[0], tmp_path / "mine")
    learned = {**tables["data"][0], "train": [0, 2, 4]}
    return config_of(tables, tmp_path / "mine", data=[learned])


@pytest.fixture
def folder(tables, tmp_path):
    """Sections 1, 3, 5 and 6 of the image, whose suggested labels lack an object."""
    return write_folder(tables, tmp_path / "em.suggest", (1, 3, 5, 6))


def write_folder(tables, folder, sections, window="0:96,0:96"):
    image, truth = (tables["data"][0][key] for key in ("image", "label"))
    (folder / "labels").mkdir(parents=True)
    items = []
    for z in sections:
        box = Box.parse(f"{z}:{z + 1},{window}")
        labels = tifffile.imread(truth)[box.slices][0].astype(np.uint16)
        labels[labels == 2] = 0
        name = suggested.item_name(box, (8, 96, 96))
        suggested.write_plane(folder / f"labels/{name}.tif", labels, None)
        items.append(Item(name, box, suggested.labels_checksum(labels)))
    suggested.write_queue(folder, Queue(image, (8, 96, 96), None, "run", "", tuple(items)))
    return folder


def correct(tables, folder, *names, change=lambda labels: labels):
    """These sections have their true labels."""
    truth = tifffile.imread(tables["data"][0]["label"])
    for item in suggested.read_queue(folder).items:
        if item.name in names:
            labels = change(truth[item.box.slices][0].astype(np.uint16))
            tifffile.imwrite(folder / f"labels/{item.name}.tif", labels)


def record(place):
    return json.loads((place / "added.json").read_text())


def stop_at(words, time=1):
    """Tells nothing, and ends a training where it would say this for the n-th time."""
    met = []

    def say(line):
        met.extend([line] * (words in line))
        if len(met) == time:
            raise KeyboardInterrupt

    return say


def test_corrected_sections_are_learned_from_and_the_next_ones_go_on_from_there(trained, tables, tmp_path):
    folder = write_folder(tables, tmp_path / "em.suggest", (1, 2, 5, 6))
    correct(tables, folder, "s0001", "s0002", "s0006")
    (tmp_path / "mine-2").mkdir()
    (tmp_path / "mine-2/added.json").write_text(json.dumps({"digest": "of other corrections", "folders": []}))
    said = []
    made = volseg.train(trained, settings=["train.steps=3"], add=[folder], say=said.append)
    assert made == tmp_path / "mine-2/model.safetensors"
    before, card = load_card(tmp_path / "mine/model.safetensors"), load_card(made)
    assert [(one.learn, one.learned) for one in card.training.data] == [(2, (0, 4)), (2, ("1:3",))]
    assert card.training.steps == 3
    told = record(made.parent)
    assert (told["done"], told["on"], told["sections"]) == (True, "held-out sections", {str(folder): ["1:3"]})
    for when, scored in (("before", before), ("after", card)):
        assert told[when]["iou"] == pytest.approx(scored.scores["calibrated"]["iou"], abs=1e-6)
    assert told["after"]["pq"] == pytest.approx(card.scores["calibrated"]["pq"], abs=1e-6)
    for words in (
        "as they were written: s0005",
        "since the config holds them out: sections 6",
        "begun with other corrections: beginning anew",
        "what changed, on held-out sections: IoU ",
    ):
        assert any(words in line for line in said), words
    with pytest.raises(UserError, match=r"mine-2/model.safetensors has learned from all of .* already"):
        train_more(trained, [folder], said.append)
    other = write_folder(tables, tmp_path / "other.suggest", (5,))
    correct(tables, other, "s0005")
    with pytest.raises(KeyboardInterrupt):
        train_more(trained, [other], stop_at("foreground"))  # the table of what is learned from
    told = record(tmp_path / "mine-3")
    assert (told["start"], told["folders"]) == (str(made), [str(folder), str(other)])
    assert "done" not in told
    shutil.rmtree(folder)
    with pytest.raises(KeyboardInterrupt):
        train_more(trained, [other], stop_at("em.suggest, which was added before, is not there any more"))


def test_without_held_out_sections_halves_of_what_was_added_check_each_other(trained, tables, folder, tmp_path):
    correct(tables, folder, "s0001", "s0003", "s0005", "s0006")
    data = trained.train.data[0].model_copy(update={"validate_on": ()})
    settings = trained.train.model_copy(update={"data": (data,), "steps": 4})
    far = write_folder(tables, tmp_path / "far.suggest", (7,), window="0:96,0:64")
    correct(tables, far, "s0007_y0_x0")
    config = trained.model_copy(update={"train": settings})
    with pytest.raises(KeyboardInterrupt):
        train_more(config, [folder, far], stop_at("foreground", time=3))  # the table of the training after both checks
    told = record(tmp_path / "mine-2")
    assert told["on"] == "5 added sections, cross-checked"
    assert set(told["before"]) == set(told["after"]) == {"iou", "pq"}
    assert all(0 <= told[when][name] <= 1 for when in ("before", "after") for name in ("iou", "pq"))
    halves = [load_card(tmp_path / f"mine-2/cross-check-{k}/model.safetensors").training.data for k in (1, 2)]
    assert [[one.learned for one in half[1:]] for half in halves] == [[(7,)], [(1, 3, "5:7")]]
    assert [half[0].learned for half in halves] == [(0, 2, 4)] * 2


def test_labels_in_any_form_are_added_to_the_image_of_the_config(trained, tables, tmp_path):
    truth = tifffile.imread(tables["data"][0]["label"])
    (tmp_path / "more").mkdir()
    tifffile.imwrite(tmp_path / "more/s0.tif", truth[0])
    tifffile.imwrite(tmp_path / "more/s3.tif", truth[3])
    added = read_addition(str(tmp_path / "more"), trained.train)
    config = extended(trained, [added], tmp_path / "mine", tmp_path / "mine-2", [])
    assert [table.train for table in config.train.data] == [(2, 4), (0, 3)]
    assert [table.share for table in config.train.data] == [1.0, 1.0]
    assert config.train.steps == 2
    assert [source.train_sections for source in load_sources(config.train)] == [(1, 3), (0, 3)]


def test_decoding_begins_with_that_of_the_model_before(trained, tables, folder, tmp_path):
    correct(tables, folder, "s0001")
    card = load_card(tmp_path / "mine/model.safetensors")
    decode = {"fragments": {"threshold": 0.35}, "stitch": {"seed": 0.65, "min_voxels": 77}}
    write_card(tmp_path / "mine/model.safetensors", card.changed(decode=decode))
    stitch = trained.stitch.model_copy(update={"min_voxels": 55})
    addition = read_addition(str(folder), trained.train)
    config = extended(
        trained.model_copy(update={"stitch": stitch}), [addition], tmp_path / "mine", tmp_path / "mine-2", ["steps"]
    )
    assert (config.fragments.threshold, config.stitch.seed, config.stitch.min_voxels) == (0.35, 0.65, 55)
    assert config.train.start == str(tmp_path / "mine/model.safetensors")
    assert (config.train.steps, config.train.lr) == (trained.train.steps, trained.train.lr / 2)


def test_scribbles_count_where_they_are(trained, tables, tmp_path):
    truth = tifffile.imread(tables["data"][0]["label"])
    strokes = np.where(truth[3] > 0, 2, 1).astype(np.uint8) * (np.arange(96)[:, None] % 24 < 2)
    (tmp_path / "more").mkdir()
    tifffile.imwrite(tmp_path / "more/s0.tif", strokes * 0)
    tifffile.imwrite(tmp_path / "more/s3.tif", strokes)
    added = read_addition(str(tmp_path / "more"), trained.train, True)
    assert added.sections == (3,)
    (source,) = load_sources(trained.train.model_copy(update={"data": added.tables}))
    np.testing.assert_array_equal(source.labels[source.train_sections[0]] == UNLABELED, strokes == 0)


def test_points_are_refused_since_they_do_not_say_their_sections(trained, tmp_path):
    (tmp_path / "more.csv").write_text("z,y,x\n3,20,20\n")
    with pytest.raises(UserError, match="do not say what sections they annotate"):
        read_addition(str(tmp_path / "more.csv"), trained.train)


def test_unknown_voxels_and_empty_sections_are_taken_as_they_are(tables, tmp_path):
    folder = write_folder(tables, tmp_path / "em.suggest", (1, 3))
    correct(tables, folder, "s0001", change=lambda labels: labels * 0)
    correct(tables, folder, "s0003", change=lambda labels: np.where(np.arange(96) < 48, 65535, labels))
    data = [{"image": tables["data"][0]["image"], "label": str(folder), "train": [z]} for z in (1, 3)]
    settings = config_of(tables, tmp_path, data=data).train
    empty, half = load_sources(settings)
    assert not empty.labels[empty.train_sections[0]].any()
    labels = half.labels[half.train_sections[0]]
    assert (labels[:, :48] == UNLABELED).all()
    assert (labels[:, 48:] < 5).all()
    images, targets = annotated_batch([empty], settings, 0)
    assert np.isfinite(images).all()
    assert not targets[:, :2].any()


def test_a_window_teaches_what_it_shows(tables, tmp_path):
    folder = write_folder(tables, tmp_path / "em.suggest", (4,), window="32:96,0:80")
    correct(tables, folder, "s0004_y32_x0")
    data = {"image": tables["data"][0]["image"], "label": str(folder), "part": "32:96,0:80"}
    (source,) = load_sources(config_of(tables, tmp_path, data=[data]).train)
    image, truth = (tifffile.imread(tables["data"][0][key])[3:6, 32:, :80] for key in ("image", "label"))
    np.testing.assert_array_equal(source.image, image)
    np.testing.assert_array_equal(source.labels[1] > 0, truth[1] > 0)
    for part, said in (("32:97,0:80", "is not in 0:96,0:96"), ("0:64,0:64", "no corrected window")):
        with pytest.raises(UserError, match=said):
            load_sources(config_of(tables, tmp_path, data=[{**data, "part": part}]).train)


def test_what_cannot_be_added_is_one_line(trained, tables, folder, run, tmp_path):
    config = tmp_path / "my.toml"
    data = tables["data"][0]
    config.write_text(
        f'[train]\nout = "{tmp_path}/mine"\npretrained = false\ndecoder = [16, 16, 8, 8, 8]\npatch = 64\n'
        f'[[train.data]]\nimage = "{data["image"]}"\nlabel = "{data["label"]}"\nvalidate_on = ["6:8"]\n'
    )
    held = write_folder(tables, tmp_path / "held.suggest", (6, 7))
    correct(tables, held, "s0006", "s0007")
    empty = tmp_path / "empty.toml"
    empty.write_text('[train]\nout = "nowhere"\n')
    for words, message in (
        ((config, "--add", folder), "nothing in"),
        ((config, "--add", held), "is held out by the config"),
        ((config, "--add", tmp_path / "absent"), "no such file or folder"),
        ((empty, "--add", data["label"]), "does not say which image it belongs to"),
        ((config, "--scribbles"), "how to read what --add gives"),
    ):
        code, _, error = run("train", *words)
        assert (code, error.count("\n")) == (2, 1), error
        assert message in error
