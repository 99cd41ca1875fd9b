"""How far two answers are apart, also where they hold what is no number, or nothing but zeros."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from explorer.errors import EngineError
from explorer.inference.deviation import deviation

_NAN, _INF = math.nan, math.inf


def test_errors_are_over_all_outputs_together() -> None:
    mine, theirs = [[1.0, 2.0], [4.0, 3.0]], [[1.0, 0.0], [0.0, 3.0]]
    found = deviation(
        {"a": torch.tensor(mine), "n": 7, "b": torch.tensor([5.0])},
        {"a": torch.tensor(theirs), "n": 7, "b": torch.tensor([2.0])},
        "fp32",
    )
    assert found.relative_l2 == pytest.approx(math.sqrt((4 + 16 + 9) / (1 + 9 + 4)))
    assert found.largest == 4.0
    assert found.agreement == 0.0


@pytest.mark.parametrize(
    ("mine", "theirs", "relative", "largest"),
    [
        ([[0.0], [_NAN]], [[0.0], [1.0]], _NAN, _NAN),
        ([[_NAN], [0.0]], [[1.0], [0.0]], _NAN, _NAN),
        ([[_INF, 1.0]], [[5.0, 1.0]], _INF, _INF),
        ([[_INF, 4.0]], [[-_INF, 4.0]], _INF, _INF),
        ([[_INF, -_INF, 4.0]], [[_INF, -_INF, 5.0]], 0.2, 1.0),
        ([[_NAN, 3.0], [2.0]], [[_NAN, 3.0], [2.0]], 0.0, 0.0),
        ([[0.0, 0.0]], [[0.0, 0.0]], 0.0, 0.0),
        ([[0.0, 0.5]], [[0.0, 0.0]], 1.0, 0.5),
    ],
)
def test_what_is_no_number_counts_only_where_the_other_is_another(
    mine: list[list[float]], theirs: list[list[float]], relative: float, largest: float
) -> None:
    def tensors(values: list[list[float]]) -> list[Tensor]:
        return [torch.tensor(value) for value in values]

    found = deviation(tensors(mine), tensors(theirs), "fp32")
    assert found.relative_l2 == pytest.approx(relative, nan_ok=True)
    assert found.largest == pytest.approx(largest, nan_ok=True)


def test_without_numbers_there_is_nothing_to_compare() -> None:
    with pytest.raises(EngineError, match="nothing to compare"):
        deviation([torch.tensor([1]), torch.zeros(0)], [torch.tensor([1]), torch.zeros(0)], "fp32")
