"""What is made of held-out sections: predictions and scores."""

from dataclasses import replace

import pytest
import torch

from tests.training.conftest import Known
from volseg.errors import UserError
from volseg.training import validate as validation
from volseg.training.validate import plane_logits, validate


def test_a_network_that_is_right_scores_1(known):
    config, source, _ = known
    sure = Known(source)
    sure.forward = lambda images: (Known.forward(sure, images) + 3) * 5
    scores = validate(sure, [source], config.train)["all"]
    assert scores["accuracy"] > 0.98
    assert scores["iou"] > 0.9


def test_a_long_plane_is_predicted_in_parts_that_agree_with_the_whole(known, monkeypatch):
    config, source, network = known
    whole = plane_logits(network, source, 3, config.train)
    monkeypatch.setattr(validation, "TILE", 64)
    monkeypatch.setattr(validation, "MARGIN", 8)
    torch.testing.assert_close(plane_logits(network, source, 3, config.train), whole)


def test_what_needs_held_out_sections_says_how_to_name_them(known):
    with pytest.raises(UserError, match=r"volseg tune needs held-out sections: set validate_on"):
        validation.require_validation_sections([replace(known[1], validation_sections=())], "volseg tune")
