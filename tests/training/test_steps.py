"""One step of training, and what a run does to its weights."""

import numpy as np
import pytest
import torch

from tests.helpers import config_of
from volseg.config import Train
from volseg.errors import UserError
from volseg.inference import model
from volseg.training.checkpoint import State
from volseg.training.losses import segmentation_loss
from volseg.training.samples import annotated_batch, prefetch_batches
from volseg.training.sources import load_sources
from volseg.training.steps import (
    BATCHNORM_FIRST_STEP,
    _gradients_within_memory,
    initial_state,
    moving_average,
    one_cycle_rate,
    pseudo_labels,
    train_steps,
    update_batchnorm,
)


def test_self_training_learns_where_the_averaged_network_is_sure(tables, tmp_path):
    class Teacher(torch.nn.Module):
        def forward(self, images):
            return images.repeat(1, 2, 1, 1)

    images = torch.tensor([-3.0, -1.0, 1.0, 3.0]).reshape(1, 1, 1, 4)
    targets, sure = pseudo_labels(Teacher(), images, Train(precision="fp32"))
    assert targets[0, :, 0].tolist() == [[0, 0, 1, 1]] * 2
    assert sure[0, :, 0].tolist() == [[1, 0, 0, 1], [1, 1, 1, 1]]


def test_a_run_may_start_from_the_shipped_model():
    state = initial_state(Train(start="shipped", binning=2), torch.device("cpu"))
    ready = model.load(model.shipped())[0].state_dict()
    assert all(bool((value == ready[name]).all()) for name, value in state.network.state_dict().items())
    with pytest.raises(UserError, match=r"set train\.binning = 2"):
        initial_state(Train(start="shipped"), torch.device("cpu"))


def test_settled_statistics_are_those_of_the_training_batches(tables, tmp_path):
    settings = config_of(tables, tmp_path).train
    sources = load_sources(settings)
    network = model.build(settings.encoder, settings.decoder, settings.sections)
    update_batchnorm(network, sources, settings)
    stem = network.encoder.model
    with torch.no_grad():
        drawn = prefetch_batches(sources, settings, BATCHNORM_FIRST_STEP, BATCHNORM_FIRST_STEP + settings.steps)
        means = [stem.conv_stem(torch.from_numpy(images)).mean((0, 2, 3)) for images, _ in drawn]
    torch.testing.assert_close(stem.bn1.running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)
    assert not network.training


def test_the_learning_rate_is_torchs_one_cycle():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=101, pct_start=11 / 101, div_factor=25, final_div_factor=4000,
        cycle_momentum=False,
    )  # fmt: skip
    rates = []
    for _ in range(101):
        rates.append(cycle.get_last_lr()[0])
        optimizer.step()
        if len(rates) < 101:
            cycle.step()
    np.testing.assert_allclose([one_cycle_rate(share / 100, 1.0) for share in range(101)], rates, atol=1e-5)


def test_the_average_forgets_early_weights_sooner_and_holds_batch_norm_statistics_too():
    network = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.BatchNorm1d(1))
    torch.nn.init.zeros_(network[0].weight)
    averaged, weight, mean = moving_average(network, 0.25), 0.0, 0.0
    for step in range(1, 6):
        torch.nn.init.constant_(network[0].weight, step)
        network[1].running_mean.fill_(-step)
        averaged.update_parameters(network)
        decay = min(0.25, (1 + step) / (10 + step))
        weight, mean = decay * weight + (1 - decay) * step, decay * mean - (1 - decay) * step
    assert averaged.module[0].weight.item() == pytest.approx(weight)
    assert averaged.module[1].running_mean.item() == pytest.approx(mean)
    assert not averaged.training


class Small(torch.nn.Conv2d):
    """A network in a memory that holds two patches."""

    def __init__(self):
        super().__init__(3, 2, 1)

    def forward(self, images):
        if len(images) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
        return super().forward(images)


def test_a_batch_that_does_not_fit_is_cut_and_steps_the_same(tables, tmp_path):
    settings = config_of(tables, tmp_path, batch=7, loss="bce", contour_weight=0, precision="fp32").train
    patches = annotated_batch(load_sources(settings), settings, 0)
    torch.manual_seed(0)
    network, lines = Small(), []
    state = State(
        network, network, torch.optim.SGD(network.parameters(), 1), torch.amp.GradScaler("cpu", enabled=False)
    )
    loss, voxels = _gradients_within_memory(state, patches, settings, lines.append)
    gradient, images, targets = (
        network.weight.grad.clone(),
        torch.from_numpy(patches[0]),
        torch.from_numpy(patches[1][:, :2]),
    )
    assert state.micro_batches == 4
    assert len(lines) == 2
    assert "at most 2 at a time" in lines[-1]
    network.zero_grad()
    pieces = [(i, i + 2) for i in (0, 2, 4, 6)]
    parts = [(torch.nn.Conv2d.forward(network, images[a:b]), targets[a:b].float()) for a, b in pieces]
    whole = sum(segmentation_loss(p, t, torch.ones_like(t), settings) * len(p) for p, t in parts) / 7
    whole.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(gradient, network.weight.grad)
    assert int(voxels.sum()) == patches[1][:, 2].sum()


def test_a_patch_that_does_not_fit_is_refused(tables, tmp_path):
    settings = config_of(tables, tmp_path, batch=1).train
    network = Small()
    network.forward = lambda images: np.empty((1 << 50,))
    state = State(
        network, network, torch.optim.SGD(network.parameters(), 1), torch.amp.GradScaler("cpu", enabled=False)
    )
    with pytest.raises(UserError, match=r"not even one patch fits the memory: set a smaller train\.patch than 64"):
        _gradients_within_memory(state, annotated_batch(load_sources(settings), settings, 0), settings, print)


def test_other_failures_are_not_taken_for_a_full_memory(tables, tmp_path):
    settings = config_of(tables, tmp_path).train
    network = Small()
    network.forward = lambda images: torch.zeros(2, 3) @ torch.zeros(2, 3)
    state = State(
        network, network, torch.optim.SGD(network.parameters(), 1), torch.amp.GradScaler("cpu", enabled=False)
    )
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        _gradients_within_memory(state, annotated_batch(load_sources(settings), settings, 0), settings, print)


def test_float16_scales_its_losses(tables, tmp_path):
    settings = config_of(tables, tmp_path, precision="fp16").train
    state, sources = initial_state(settings, torch.device("cpu")), load_sources(settings)
    before = next(state.network.parameters()).detach().clone()
    rows = list(train_steps(state, sources, settings, print))
    assert state.scaler.state_dict()["scale"] > 1
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert not torch.equal(before, next(state.network.parameters()))
