"""What training minimizes."""

import pytest
import torch

from volseg.config import Train
from volseg.training.losses import dice, focal, loss_of


def test_focal_loss_treats_both_classes_alike():
    logits, ones = torch.tensor([[[2.0, -2.0]]]), torch.ones(1, 1, 2)
    right, wrong = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    chance = torch.sigmoid(torch.tensor(2.0))
    assert focal(logits, right, ones) == pytest.approx(float(-((1 - chance) ** 2) * chance.log()), rel=1e-5)
    assert focal(logits, wrong, ones) == pytest.approx(float(-(chance**2) * (1 - chance).log()), rel=1e-5)


def test_dice_is_0_where_all_is_right_and_near_1_where_all_is_wrong():
    target = torch.zeros(1, 100, 100)
    target[:, :50] = 1
    sure, ones = 40 * target - 20, torch.ones_like(target)
    assert dice(sure, target, ones) == pytest.approx(0, abs=1e-4)
    assert dice(-sure, target, ones) == pytest.approx(1, abs=1e-3)
    assert dice(torch.full_like(target, -40.0), torch.zeros_like(target), ones) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("loss", ["focal", "bce"])
def test_unlabeled_voxels_do_not_enter_the_loss(loss):
    knobs = Train(loss=loss)
    logits = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    aims, weights = (torch.rand(2, 1, 2, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    other = torch.where(weights > 0, logits, 9.0)
    torch.testing.assert_close(loss_of(logits, aims, weights, knobs), loss_of(other, aims, weights, knobs))


def test_a_heavy_voxel_counts_as_so_many():
    """Dice stays between 0 and 1, and equals that of an image where the heavy voxel is there three times."""
    logits, target = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[1.0, 1.0, 0.0]])
    many = [0, 0, 0, 1, 2]
    heavy = dice(logits, target, torch.tensor([[3.0, 1.0, 1.0]]))
    assert heavy == pytest.approx(float(dice(logits[:, many], target[:, many], torch.ones(1, 5))))
    assert 0 <= heavy <= 1


def test_a_distance_that_is_right_costs_least():
    aims = torch.tensor([0.0, 0.3, 0.9]).reshape(1, 1, 1, 3).repeat(1, 3, 1, 1)
    right = torch.logit(aims, eps=1e-6)
    cost = [
        float(
            loss_of(
                torch.cat([right[:, :2], right[:, 2:] + change], 1), aims, torch.ones_like(aims), Train(distance_nm=100)
            )
        )
        for change in (-0.5, -0.1, 0, 0.1, 0.5)
    ]
    assert cost[0] > cost[1] > cost[2] < cost[3] < cost[4]
