"""Sections to annotate next: chosen where a run is unsure, spread, and written to be corrected."""

import json
import shutil

import numpy as np
import pytest
import tifffile

import volseg
from tests.helpers import LIGHT, segment_here, settings, write_volume
from volseg.box import Box
from volseg.errors import UserError
from volseg.evaluation import uncertainty
from volseg.evaluation.stored import open_stored
from volseg.evaluation.uncertainty import Candidate, candidates, pieces
from volseg.inference import model
from volseg.io import suggested, volume
from volseg.io.annotation import open_annotation
from volseg.training.corrections import read_addition
from volseg.training.napari_editor import read_stacks, save_changed
from volseg.training.sources import load_sources
from volseg.training.suggest import choose, suggest

UNSURE = 13  # the section in which the network of `probed` knows nothing


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A run of probabilities with a ball through all sections, of which one is uncertain, and its image."""
    folder = tmp_path_factory.mktemp("probed")
    rng = np.random.default_rng(0)
    z, y, x = np.ogrid[:24, :64, :80]
    ball = (y - 30) ** 2 + (x - 40) ** 2 + 0 * z < 300
    mask = np.where(ball, 250, 3).astype(np.uint8)
    mask[UNSURE, 10:50, 20:60] = 128
    image = rng.normal(100, 10, ball.shape) + 50 * ball
    image[5] += 60
    tifffile.imwrite(folder / "em.tif", image.clip(1, 255).astype(np.uint8))
    write_volume(str(folder / "mask.zarr"), mask)
    run = str(folder / "em.volseg.zarr")
    config = settings(**{**LIGHT, "stitch": {"min_voxels": 10}, "probabilities": {"mask_channel": 0}})
    segment_here(folder / "mask.zarr", run, config)
    return run, folder / "em.tif"


def test_the_uncertain_section_comes_first_and_no_two_are_neighbors(probed, tmp_path):
    run, image = probed
    made = suggest(run, 5, tmp_path / "next", image=image)
    sections = [one.z for one in made.suggestions]
    assert sections[0] == UNSURE
    assert len(set(sections)) == 5
    assert min(np.diff(sorted(sections))) >= 2
    assert made.suggestions[0].uncertain == max(one.uncertain for one in made.suggestions) > 0.2


def test_gray_values_unlike_the_others_are_novel(probed):
    run, image = probed
    stored, opened = open_stored(run), volume.open(image)
    found = candidates(stored, opened, [])
    assert max(found, key=lambda one: one.novelty).box.start[0] == 5
    known = candidates(stored, opened, [5, 10])
    assert next(one.novelty for one in known if one.box.start[0] == 5) == 0


def test_annotated_sections_and_their_neighbors_are_left_out(probed, tmp_path):
    run, image = probed
    made = suggest(run, 24, tmp_path / "next", annotated=["0:11", UNSURE, 20], image=image)
    sections = {one.z for one in made.suggestions}
    assert not sections & {*range(12), 12, 13, 14, 19, 20, 21}
    assert any("all that are neither" in note for note in made.notes)
    with pytest.raises(UserError, match="no section left to suggest"):
        suggest(run, 3, tmp_path / "none", annotated=["0:24"], image=image)
    with pytest.raises(UserError, match="not in 0:24"):
        suggest(run, 3, tmp_path / "none", annotated=[24], image=image)


def test_files_are_the_image_and_the_labels_of_today(reference, image, tmp_path):
    made = volseg.suggest(reference, 3, tmp_path / "next")
    run, source = volseg.open(reference), volume.open(image)
    for one in made.suggestions:
        paths = [tmp_path / f"next/{kind}/{one.name}.tif" for kind in ("image", "labels")]
        whole = Box((one.z, 0, 0), (one.z + 1, *source.shape[1:]))
        np.testing.assert_array_equal(tifffile.imread(paths[0]), source.read(whole)[0])
        np.testing.assert_array_equal(tifffile.imread(paths[1]), run.labels[one.z])
    assert volume.open(suggested.read_queue(tmp_path / "next").image).checksum() == source.checksum()
    assert len(made.to_frame()) == len(json.loads(json.dumps(made.to_json()))["suggestions"]) == 3
    page = (tmp_path / "next/README.txt").read_text()
    assert all(word in page for word in ("napari", "Fiji", made.suggestions[0].name, "checked.txt", "65535"))
    assert len(page.splitlines()) < 70
    config = volseg.config.load(tmp_path / "next/train.toml")
    card = model.load_card(model.shipped())
    assert (config.train.encoder, config.train.binning, config.train.start) == (card.encoder, card.binning, "shipped")


def test_corrected_files_are_labels_to_train_with(reference, image, tmp_path):
    made = suggest(reference, 3, tmp_path / "next")
    opened = volume.open(image)
    with pytest.raises(UserError, match=r"nothing in .* was corrected"):
        open_annotation(tmp_path / "next/labels", opened)
    path = tmp_path / f"next/labels/{made.suggestions[1].name}.tif"
    labels = tifffile.imread(path)
    labels[:9] = 7
    tifffile.imwrite(path, labels)
    assert volseg.init(image, tmp_path / "next/labels").found.sections == (made.suggestions[1].z,)
    with pytest.raises(UserError, match="holds corrected labels"):
        suggest(reference, 3, tmp_path / "next", overwrite=True)


def test_windows_of_wide_planes_are_suggested(tmp_path):
    shape = (6, 24, uncertainty.MAX_EDGE + 52)
    mask = np.full(shape, 3, np.uint8)
    mask[:, 4:20, 100:140] = 250
    mask[3, 2:22, 1500:1600] = 128
    write_volume(str(tmp_path / "mask.zarr"), mask)
    tifffile.imwrite(tmp_path / "em.tif", np.random.default_rng(1).integers(50, 200, shape, np.uint8))
    config = settings(**{**LIGHT, "stitch": {"min_voxels": 10}, "probabilities": {"mask_channel": 0}})
    segment_here(tmp_path / "mask.zarr", tmp_path / "run.volseg.zarr", config)
    made = suggest(tmp_path / "run.volseg.zarr", 3, tmp_path / "next", image=tmp_path / "em.tif")
    first = made.suggestions[0]
    assert (first.name, first.z, first.x0, first.x1) == ("s0003_y0_x1050", 3, 1050, 2100)
    assert tifffile.imread(tmp_path / f"next/labels/{first.name}.tif").shape == (24, 1050)
    assert suggested.read_queue(tmp_path / "next").items[0].box == Box((3, 0, 1050), (4, 24, 2100))


def test_a_huge_volume_is_looked_at_in_few_pieces():
    shape = (10**6, 10**5, 10**5)
    some = list(pieces(Box.from_shape(shape)))
    assert sum(box.voxels for box in some) <= uncertainty.MAX_VOXELS
    assert len({box.start for box in some}) == len(some) > 10
    assert all(box.clip(shape) == box for box in some)
    assert max(box.start[0] for box in some) > 0.8 * shape[0]
    wanted = Box((30, 5, 900), (50, 64, 1000))
    assert [str(box) for box in pieces(wanted)] == ["30:46,5:64,900:1000", "46:50,5:64,900:1000"]


def test_the_choice_is_spread_over_windows_too():
    boxes = [Box((z, 0, x), (z + 1, 8, x + 8)) for z in range(4) for x in (0, 8)]
    found = [Candidate(box, 1.0 - box.start[2] / 80, 0.0, 0.0, 0.0) for box in boxes]
    chosen = choose(found, 3, [], (4, 8, 16))[0]
    assert len({one.box.start for one in chosen}) == 3
    assert {one.box.start[2] for one in chosen} == {0, 8}


def test_what_was_changed_in_an_editor_is_saved_over_its_file(reference, tmp_path):
    suggest(reference, 3, tmp_path / "next")
    items, images, labels = read_stacks(tmp_path / "next")
    assert images.shape == labels.shape == (3, *volseg.open(reference).shape[1:])
    changed = labels.copy()
    changed[2, 5:9, 5:9] = 900
    assert save_changed(tmp_path / "next", items, labels, changed) == [items[2].name]
    state = suggested.state(tmp_path / "next")
    assert [item.name for item, _ in state.corrected] == [items[2].name]
    np.testing.assert_array_equal(read_stacks(tmp_path / "next")[2], changed)


def test_labels_of_a_resampled_run_lie_on_the_grid_of_its_volume(tmp_path):
    rng = np.random.default_rng(2)
    image = rng.integers(60, 200, (8, 48, 64), dtype=np.uint8)
    em = write_volume(str(tmp_path / "em.zarr"), image, nm=(10.0, 10.0, 10.0))
    config = settings(**LIGHT, output={"space": "model"})
    run = volseg.infer(em, tmp_path / "run.volseg.zarr", config=config)
    assert run.shape == (16, 96, 128)
    stored = open_stored(run)
    box = Box((3, 0, 0), (4, 48, 64))
    np.testing.assert_array_equal(uncertainty.labels_at(stored, box), run.labels[7:8, 1::2, 1::2])
    np.testing.assert_array_equal(uncertainty.mask_probability(stored, box), run.probabilities[0, 7:8, 1::2, 1::2])
    made = suggest(run, 2, tmp_path / "next")
    assert all(one.z < 8 and one.x1 == 64 for one in made.suggestions)


def test_the_command_tells_what_it_made_and_what_is_wrong(probed, reference, run, tmp_path):
    path, image = probed
    code, said, _ = run("suggest", path, "--count", 2, "--out", tmp_path / "next", "--image", image)
    assert (code, said.count("s00")) == (0, 2)
    assert str(tmp_path / "next") in said
    assert run("suggest", path, "--image", image, "--out", tmp_path / "next")[0] == 2
    for words, message in (
        ((path,), "does not know their image: give --image"),
        ((path, "--image", image, "--out", tmp_path), "holds no suggestions, so it is left alone"),
        ((path, "--image", reference), "give the volume that it was made of"),
        ((tmp_path,), "not a finished volseg run"),
    ):
        code, _, error = run("suggest", *words)
        assert (code, error.count("\n")) == (2, 1)
        assert message in error
    code, said, error = run("suggest", path, "--image", image, "--out", tmp_path / "next", "--napari")
    assert code == 0
    assert "pip install 'napari[all]'" in error


def test_an_image_that_training_would_read_otherwise_is_refused(image, tmp_path):
    config = settings(**LIGHT, input={"invert": True, "roi": "0:8,0:64,0:96"})
    run = volseg.infer(image, tmp_path / "run.volseg.zarr", config=config)
    with pytest.raises(UserError, match="which volseg train does not do"):
        suggest(run, 2, tmp_path / "next")
    made = suggest(run, 2, tmp_path / "next", image=image)
    assert all((one.z < 8, one.y0, one.y1, one.x0, one.x1) == (True, 0, 64, 0, 96) for one in made.suggestions)
    assert made.suggestions[0].name.endswith("_y0_x0")


def test_what_the_model_of_a_run_learned_from_is_not_suggested_again(image, tmp_path):
    depth = volume.open(image).shape[0]
    data = [{"name": "em.zarr", "learn": 12, "learned": ["0:10", 20], "depth": depth, "held": [14]}]
    card = model.load_card(model.shipped())
    shutil.copy(model.shipped(), tmp_path / "model.safetensors")
    model.write_card(tmp_path / "model.safetensors", card.changed(training={"data": data}))
    config = settings(**LIGHT, predict={"model": str(tmp_path / "model.safetensors")}, input={"roi": "0:22,0:64,0:96"})
    made = suggest(volseg.infer(image, tmp_path / "run.volseg.zarr", config=config), 9, tmp_path / "next")
    assert {one.z for one in made.suggestions} <= {11, 12, 16, 17, 18}
    assert any("12 sections are annotated already" in note for note in made.notes)
    text = (tmp_path / "next/train.toml").read_text()
    assert f'start = "{tmp_path / "model.safetensors"}"' in text
    path = tmp_path / f"next/labels/{made.suggestions[0].name}.tif"
    tifffile.imwrite(path, tifffile.imread(path) + np.uint16(1))
    added = read_addition(str(tmp_path / "next"), volseg.config.load(tmp_path / "next/train.toml").train)
    assert added.sections == (made.suggestions[0].z,)
    assert [table.part for table in added.tables] == ["0:64,0:96"]
    (source,) = load_sources(volseg.Config().train.model_copy(update={"data": added.tables}))
    assert (source.image.shape, source.own.depth) == ((3, 64, 96), depth)


def test_sections_of_one_gray_value_are_not_suggested(tmp_path):
    """There is nothing to annotate in them, however unsure the network is."""
    rng = np.random.default_rng(0)
    image = rng.integers(50, 150, (24, 64, 80), dtype=np.uint8)
    image[6:18] = 0
    image[20, :, 40:] = 255  # half of it was lost
    mask = np.full(image.shape, 3, np.uint8)
    mask[10:14] = mask[20] = 128
    tifffile.imwrite(tmp_path / "em.tif", image)
    write_volume(str(tmp_path / "mask.zarr"), mask)
    run = str(tmp_path / "em.volseg.zarr")
    segment_here(tmp_path / "mask.zarr", run, settings(**{**LIGHT, "probabilities": {"mask_channel": 0}}))
    made = suggest(run, 6, tmp_path / "next", image=tmp_path / "em.tif")
    assert made.suggestions
    assert not {one.z for one in made.suggestions} & {*range(6, 18), 20}
    assert any("the run has no object" in note for note in made.notes)
    tifffile.imwrite(tmp_path / "black.tif", np.zeros_like(image))
    with pytest.raises(UserError, match="of one gray value, or lost"):
        suggest(run, 6, tmp_path / "none", image=tmp_path / "black.tif")
