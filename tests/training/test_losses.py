"""What training minimizes."""

import pytest
import torch

from volseg.config import Train
from volseg.training.losses import dice_loss, focal_loss, segmentation_loss


def test_focal_loss_treats_both_classes_alike():
    logits, ones = torch.tensor([[[2.0, -2.0]]]), torch.ones(1, 1, 2)
    right, wrong = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    probability = torch.sigmoid(torch.tensor(2.0))
    assert focal_loss(logits, right, ones) == pytest.approx(
        float(-((1 - probability) ** 2) * probability.log()), rel=1e-5
    )
    assert focal_loss(logits, wrong, ones) == pytest.approx(
        float(-(probability**2) * (1 - probability).log()), rel=1e-5
    )


def test_dice_is_0_where_all_is_right_and_near_1_where_all_is_wrong():
    target = torch.zeros(1, 100, 100)
    target[:, :50] = 1
    sure, ones = 40 * target - 20, torch.ones_like(target)
    assert dice_loss(sure, target, ones) == pytest.approx(0, abs=1e-4)
    assert dice_loss(-sure, target, ones) == pytest.approx(1, abs=1e-3)
    assert dice_loss(torch.full_like(target, -40.0), torch.zeros_like(target), ones) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("loss", ["focal", "bce"])
def test_unlabeled_voxels_do_not_enter_the_loss(loss):
    settings = Train(loss=loss)
    logits = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    targets, weights = (torch.rand(2, 1, 2, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    other = torch.where(weights > 0, logits, 9.0)
    torch.testing.assert_close(
        segmentation_loss(logits, targets, weights, settings), segmentation_loss(other, targets, weights, settings)
    )


def test_a_heavy_voxel_counts_as_so_many():
    """Dice stays between 0 and 1, and equals that of an image where the heavy voxel is there three times."""
    logits, target = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[1.0, 1.0, 0.0]])
    many = [0, 0, 0, 1, 2]
    heavy = dice_loss(logits, target, torch.tensor([[3.0, 1.0, 1.0]]))
    assert heavy == pytest.approx(float(dice_loss(logits[:, many], target[:, many], torch.ones(1, 5))))
    assert 0 <= heavy <= 1


def test_a_distance_that_is_right_costs_least():
    targets = torch.tensor([0.0, 0.3, 0.9]).reshape(1, 1, 1, 3).repeat(1, 3, 1, 1)
    right = torch.logit(targets, eps=1e-6)
    cost = [
        float(
            segmentation_loss(
                torch.cat([right[:, :2], right[:, 2:] + change], 1),
                targets,
                torch.ones_like(targets),
                Train(distance_nm=100),
            )
        )
        for change in (-0.5, -0.1, 0, 0.1, 0.5)
    ]
    assert cost[0] > cost[1] > cost[2] < cost[3] < cost[4]
