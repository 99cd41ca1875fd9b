from __future__ import annotations

import pytest
import torch
from torch import nn

from explorer.errors import RunError
from explorer.pruning.evaluation import evaluate


def test_accuracy_and_loss_equal_those_of_one_whole_batch_whatever_the_batch_size() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    inputs, labels = torch.randn(37, 5), torch.randint(0, 3, (37,))
    with torch.no_grad():
        scores = network.eval()(inputs)
    expected_loss = float(-scores.double().log_softmax(1)[torch.arange(37), labels].mean())
    expected_accuracy = (
        sum(int(row.argmax()) == label for row, label in zip(scores, labels.tolist(), strict=True)) / 37
    )
    for batch_size in (1, 10, 37, 100):
        found = evaluate(network, inputs, labels, batch_size=batch_size)
        assert found.accuracy == expected_accuracy
        assert found.loss == pytest.approx(expected_loss, rel=1e-5)
        assert found.n_samples == 37


def test_training_modes_and_batch_norm_statistics_are_left_alone() -> None:
    network = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).train()
    network[1].eval()  # someone froze it
    before = {name: value.clone() for name, value in network.state_dict().items()}
    evaluate(network, torch.randn(9, 5), torch.zeros(9, dtype=torch.int64))
    assert network.training
    assert network[0].training
    assert not network[1].training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_what_is_no_classifier_is_refused_with_its_shape() -> None:
    with pytest.raises(RunError, match=r"\(4, 2, 3\) for 4 samples"):
        evaluate(nn.Linear(5, 3), torch.randn(4, 2, 5), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(RunError, match="data set is empty"):
        evaluate(nn.Linear(5, 3), torch.randn(0, 5), torch.zeros(0, dtype=torch.int64))
