"""The small network and data set that every test of a run starts from."""

from __future__ import annotations

import pytest
import torch

from explorer.data import LoadedData, load_data
from explorer.models import LoadedModel, load_model
from tests.pruning.tiny import TinyNet, quadrants


@pytest.fixture
def tiny_data() -> LoadedData:
    return load_data(quadrants(256, 0), quadrants(128, 1))


@pytest.fixture
def tiny_model() -> LoadedModel:
    torch.manual_seed(0)
    return load_model(TinyNet(), torch.zeros(1, 1, 8, 8), name="tiny")
