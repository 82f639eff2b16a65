"""What is made of held-out sections: predictions and scores."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.training.conftest import Known
from volseg.config import Predict
from volseg.errors import UserError
from volseg.inference.sections import predict_sections
from volseg.training.losses import segmentation_loss
from volseg.training.validate import (
    numpy_forward,
    require_validation_sections,
    section_targets,
    source_tiles,
    validate,
)


def test_a_network_that_is_right_scores_1(known):
    config, source, _ = known
    sure = Known(source)
    sure.forward = lambda images: (Known.forward(sure, images) + 3) * 5
    scores = validate(sure, [source], config)["all"]
    assert scores["accuracy"] > 0.98
    assert scores["iou"] > 0.9


def test_a_long_plane_is_predicted_in_tiles_that_agree_with_the_whole(known):
    config, source, network = known
    tiled = config.model_copy(update={"predict": Predict(tile=64, overlap=32)})
    with numpy_forward(network, config.train.precision) as forward:
        whole, parts = (predict_sections(forward, sections=[3, 5], **source_tiles(source, c)) for c in (config, tiled))
    assert whole.shape == (2, 2, 96, 96)
    np.testing.assert_allclose(whole, parts, atol=1e-6)


def test_what_shows_nothing_is_background(known):
    """As in a run: a constant tile is not predicted."""
    config, source, network = known
    dark = replace(source, image=np.zeros_like(source.image))
    with numpy_forward(network, config.train.precision) as forward:
        assert not predict_sections(forward, sections=[6], **source_tiles(dark, config)).any()


def test_a_loss_is_that_of_the_logits(known):
    """It is taken of probabilities, which are what tiles blend."""
    config, source, network = known
    scores = validate(network, [replace(source, validation_sections=(6,))], config)["all"]
    planes = torch.from_numpy((source.image[5:8].astype(np.float32) - source.mean) / source.std)
    targets, weights = section_targets(source, 6, config.train)
    with torch.no_grad():
        loss = segmentation_loss(network(planes[None].float()), targets[None], weights[None], config.train)
    assert scores["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_a_network_goes_on_as_it_was(known):
    config, source, network = known
    network.train()
    validate(network, [source], config)
    assert network.training


def test_what_needs_held_out_sections_says_how_to_name_them(known):
    with pytest.raises(UserError, match=r"volseg tune needs held-out sections: set validate_on"):
        require_validation_sections([replace(known[1], validation_sections=())], "volseg tune")
