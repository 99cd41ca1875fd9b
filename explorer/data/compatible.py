"""Checks that data and model belong together before anything long is started."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from explorer.data.load import LoadedData
from explorer.data.tensors import Pair
from explorer.errors import DataError

__all__ = ["check_compatible"]

_N_LOOKED_AT = 256


class _Model(Protocol):
    """What is needed of a `LoadedModel`; named here so that the data room needs nothing of the models room."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def example_input(self) -> Tensor: ...


def check_compatible(model: _Model, data: LoadedData) -> None:
    """Refuse data that the model cannot take, or whose labels it cannot predict.

    Looks at every sample of data held as tensors, and at 256 validation and 256 training samples of other datasets; runs the
    model on two.

    Parameters
    ----------
    model : LoadedModel
    data : LoadedData

    Raises
    ------
    DataError
        When the inputs have another shape or type than the model's example input, the model fails on them, its output is not one
        score a class, or a label is out of range.
    """
    example = model.example_input
    for part in ("validation", "train", "test"):
        pair = _look(data, part)
        if pair is None:
            continue
        inputs, labels = pair
        if inputs.shape[1:] != example.shape[1:]:
            raise DataError(
                f"the {part} inputs of {data.name!r} have shape {tuple(inputs.shape[1:])} a sample, and the model's example input has "
                f"{tuple(example.shape[1:])}. Transform the data, or load the model with an example_input of the data's shape."
            )
        if inputs.is_floating_point() != example.is_floating_point():
            raise DataError(
                f"the {part} inputs of {data.name!r} are {inputs.dtype}, and the model's example input is {example.dtype}; both must be "
                "floating point, or both whole numbers."
            )
        n_outputs = _n_outputs(model.module, inputs[:2].to(example.dtype), data.name)
        highest = int(labels.max())
        if highest >= n_outputs:
            raise DataError(
                f"a {part} label of {data.name!r} is {highest}, and the model has {n_outputs} outputs: labels 0 to {n_outputs - 1} are "
                "accepted. Use a model with as many outputs as there are classes, or renumber the labels from 0."
            )


def _look(data: LoadedData, part: str) -> Pair | None:
    source = getattr(data, part)
    if source is None:
        return None
    dataset = source.dataset if isinstance(source, DataLoader) else source
    whole = isinstance(dataset, TensorDataset)
    if part == "validation":
        return data.validation_tensors(None if whole else _N_LOOKED_AT)
    if part == "train":
        return data.train_tensors() if whole else data._tensors("train", _N_LOOKED_AT)  # noqa: SLF001 - one room
    return data.test_tensors(None if whole else _N_LOOKED_AT)


def _n_outputs(module: nn.Module, inputs: Tensor, name: str) -> int:
    flags = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            output = module(inputs)
    except Exception as error:
        raise DataError(
            f"the model fails on inputs of {name!r} of shape {tuple(inputs.shape)}: {type(error).__name__}: {error}. It must take "
            "batches of more than one sample."
        ) from error
    finally:
        for child, training in flags:
            child.training = training
    if (
        not isinstance(output, Tensor)
        or output.ndim != 2
        or len(output) != len(inputs)
        or not output.is_floating_point()
    ):
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise DataError(
            f"the model gives {got} for inputs {tuple(inputs.shape)}; one row of class scores a sample, (batch, classes), is needed. "
            "Wrap the model in a module that returns only these."
        )
    return int(output.shape[1])
