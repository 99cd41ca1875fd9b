"""The check of the predictions must itself be right: it compares with what is measured, and reports what is off."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from explorer.bench.prediction import PredictionCheck, check_predictions, distributions, table
from explorer.study import LatencyBesideDense, Study


@pytest.fixture(scope="module")
def study() -> Study:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 36, 3),
    )
    inputs, labels = torch.randn(120, 1, 8, 8), torch.arange(120) % 3
    data = torch.utils.data.TensorDataset(inputs, labels)
    return Study(net, (data, data))


def test_drawn_distributions_are_the_same_for_a_seed_and_differ_otherwise(study: Study) -> None:
    def drawn(seed: int) -> list[dict[str, float]]:
        return [dict(d) for d in distributions(study, n_random=3, seed=seed, uniform=(), solved=()).values()]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert all(0.0 <= s <= 0.98 for one in drawn(1) for s in one.values())


def test_each_distribution_is_predicted_and_measured(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is measured is known here: ten times faster.
    monkeypatch.setattr(Study, "pruned_latency", lambda *_: LatencyBesideDense(1.0, 0.0, 10.0))
    checks = list(check_predictions(study, n_random=2, uniform=(0.5, 0.9), solved=(1000.0,), n_images=60))
    # A speed-up of 1000 is out of reach, and left out.
    assert [check.name for check in checks] == ["random 1", "random 2", "uniform 0.50", "uniform 0.90"]
    assert checks[3].sparsity > checks[2].sparsity
    for check in checks:
        assert check.measured == 10.0
        assert check.predicted > 0.0
        assert check.error == pytest.approx(check.predicted / 10.0 - 1.0)


def test_the_pruned_network_is_timed_beside_the_dense_one(study: Study) -> None:
    before = {name: value.clone() for name, value in study.model.module.state_dict().items()}
    found = study.pruned_latency({"0": 0.5, "2": 0.9, "5": 0.5})
    assert found.latency_ms > 0.0
    assert found.dense_ms > 0.0
    assert all(torch.equal(value, before[name]) for name, value in study.model.module.state_dict().items())


def test_the_table_tells_the_median_and_the_largest_error() -> None:
    text = table(
        [
            PredictionCheck("a", 0.5, 1.1, 1.0),
            PredictionCheck("b", 0.9, 3.0, 4.0),
            PredictionCheck("c", 0.1, 1.0, 1.0),
        ]
    )
    assert text.splitlines()[-1] == "error: median 10.0%, largest 25.0%; 2 of 3 within 15%"
    assert "-25.0%" in text
