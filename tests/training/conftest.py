"""What tests of training share: one thread, and a network that knows what is in its volume."""

import csv

import pytest
import torch

from tests.helpers import config_of
from volseg.training.sources import load_sources


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """One thread for torch: sums come in the same order every time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def read_curves(out):
    """The rows of a run's curves."""
    with (out / "curves.csv").open() as file:
        return list(csv.DictReader(file))


class Known(torch.nn.Module):
    """Half as sure of the right answer as it could be: 0.3 inside, almost 0 outside. The contour is nowhere."""

    def __init__(self, source):
        super().__init__()
        self.source, self.scale = source, torch.nn.Parameter(torch.ones(1))

    def forward(self, images):
        inside = images[:, 1:2] * self.source.std + self.source.mean > 130
        mask = torch.where(inside, -0.85, -9.0)
        return torch.cat([mask, torch.full_like(mask, -9.0)], 1) * self.scale


@pytest.fixture
def known(tables, tmp_path):
    """Settings, a volume, and a network that knows what is in it."""
    config = config_of(tables, tmp_path)
    (source,) = load_sources(config.train)
    return config, source, Known(source)
