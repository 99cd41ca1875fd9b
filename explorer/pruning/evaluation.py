"""How good a classifier is on labelled tensors: the one place where a run's accuracies come from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from explorer.errors import RunError


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracy (a fraction) and mean cross-entropy (nats) over `n_samples` samples."""

    accuracy: float
    loss: float
    n_samples: int


def evaluate(module: nn.Module, inputs: Tensor, labels: Tensor, *, batch_size: int = 500) -> Evaluation:
    """Evaluate `module` without changing it; its training mode is restored.

    Parameters
    ----------
    module : nn.Module
        Classifier whose output is `(n, classes) float32`.
    inputs : Tensor
        `(n, ...) float32`.
    labels : Tensor
        `(n,) int64`.
    batch_size : int
        Samples at a time, at least 1.

    Raises
    ------
    RunError
        If there are no samples, or the output is not one row of class scores a sample.
    """
    if len(inputs) == 0:
        raise RunError(
            "There is nothing to evaluate on: the data set is empty. Pass at least one labelled sample."
        )
    modes = {part: part.training for part in module.modules()}
    module.eval()
    correct = 0
    loss = 0.0
    try:
        with torch.no_grad():
            for start in range(0, len(inputs), batch_size):
                expected = labels[start : start + batch_size]
                scores = module(inputs[start : start + batch_size])
                if scores.ndim != 2 or len(scores) != len(expected):
                    raise RunError(
                        f"The model's output has shape {tuple(scores.shape)} for {len(expected)} samples; "
                        "pruning runs need a classifier with one row of class scores a sample."
                    )
                correct += int((scores.argmax(dim=1) == expected).sum())
                loss += float(functional.cross_entropy(scores, expected, reduction="sum"))
    finally:
        for part, training in modes.items():
            part.training = training
    return Evaluation(correct / len(inputs), loss / len(inputs), len(inputs))
