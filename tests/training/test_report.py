"""What a training run shows."""

import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.helpers import config_of
from volseg.training.card import model_card
from volseg.training.report import _own, best_validation, draw_panels, format_data
from volseg.training.sources import load_sources
from volseg.training.targets import UNLABELED


def test_the_best_validation_is_the_first_of_the_highest():
    history = [{"step": s, "split": "validation", "iou": iou} for s, iou in ((2, 0.1), (4, 0.8), (6, 0.8), (8, 0.7))]
    assert best_validation([{"step": 1, "split": "training", "iou": 1.0}, *history])["step"] == 4
    assert best_validation([]) is None


def test_differences_are_green_blue_and_red():
    image, labels, found = np.full((40, 60), 100, np.uint8), np.zeros((40, 60), np.uint32), np.zeros((40, 60), bool)
    image[0, 0] = 200
    labels[10:20, 10:20], found[10:20, 10:20] = 1, True
    labels[10:20, 40:50] = 2
    found[25:35, 10:20] = True
    labels[25:35, 40:50], found[25:35, 40:50] = UNLABELED, True
    picture = np.asarray(Image.open(io.BytesIO(draw_panels(image, labels, found))))
    assert picture.shape == (40, 4 * 60 + 3 * 4, 3)
    differences = picture[:, -60:].astype(int)
    assert [int(differences[at].argmax()) for at in ((15, 15), (15, 45), (30, 15))] == [1, 2, 0]
    assert np.ptp(differences[30, 45]) == 0


def test_the_data_table_has_a_row_for_each_volume_and_advice_below(tables, tmp_path):
    few = {**tables["data"][0], "train": [0, 1]}
    text = format_data(load_sources(config_of(tables, tmp_path, data=[tables["data"][0], few]).train))
    head, first, second, *advice = text.splitlines()
    assert head.split()[:3] == ["volume", "sections", "held"]
    assert (first.split()[1], second.split()[1]) == ("6", "2")
    assert any("all 2 sections lie in 0:2 of 8: spread evenly" in line for line in advice)
    assert any("4 annotated objects, fewer than 150" in line for line in advice)
    assert not any("held out" in line for line in advice)


def test_sections_both_to_learn_from_and_held_out_are_told(tables, tmp_path):
    both = {**tables["data"][0], "train": [0, 6, 7]}
    text = format_data(load_sources(config_of(tables, tmp_path, data=[both]).train))
    assert "not learnt from, since held out: section 6 and 1 more of train" in text


@pytest.mark.parametrize(("nm", "seen", "held"), [(50, 20, 10), (2.5, 1, 0), (5, 2, 1)])
def test_sections_are_told_as_their_user_counts_them_whatever_voxels_the_model_has(tables, tmp_path, nm, seen, held):
    data = {**tables["data"][0], "train": [1, 2], "validate_on": [5], "voxel_size_nm": (nm, 5, 5)}
    config = config_of(tables, tmp_path, data=[data], voxel_size_nm=(5, 5, 5))
    (source,) = load_sources(config.train)
    assert (len(source.train_sections), len(source.validation_sections)) == (seen, held)
    head, row, *advice = format_data([source]).splitlines()
    cells = dict(zip(head.replace("held out", "held").split(), row.split(), strict=False))
    assert (cells["sections"], cells["held"]) == ("2", "1")
    assert any("all 2 sections lie in 1:3 of 8: spread evenly" in line for line in advice)
    assert any("no held-out section is left" in line for line in advice) == (held == 0)
    state = SimpleNamespace(step=1, seconds=0.0)
    (volume,) = model_card(config, [source], state, {}).training.data
    assert (volume.learn, volume.learned, volume.held, volume.depth) == (2, ("1:3",), (5,), 8)
    shown = [source.numbers[z] for z in _own(source, source.train_sections)]
    assert shown == ([1, 2] if nm >= 5 else shown)  # no section is pictured twice
    assert set(shown) <= {1, 2}


@pytest.fixture
def page(whole_run):
    return (whole_run[0] / "report.html").read_text()


def test_a_report_holds_all_its_pictures(page, whole_run):
    sources = re.findall(r'src="([^"]+)"', page)
    assert len(sources) == len(list(whole_run[0].glob("*.png"))) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://", page)


def test_a_report_says_what_came_out(page):
    for text in ("best epoch", "mask threshold", "loader wait", "held out", "Card", "annotated objects"):
        assert text in page
