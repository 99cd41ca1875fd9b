"""What a scan measures with: the network, the images, and what is asked of it, checked before any work begins.

It can be pickled where the network can, so that a scan can be done by other processes and machines.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from explorer.errors import DataError, ModelError
from explorer.models import PrunableLayer, prunable_layers
from explorer.sensitivity.units import Unit, units_of

__all__ = ["MIN_IMAGES", "Criterion", "LabelledData", "Material", "choose_layers", "take_material"]

MIN_IMAGES = 16
# The divergence that statistics of so few images add by themselves, on the demo, against those of 1,000: 0.0014 nats; 250 images would add 0.0010, and 64 add 0.0060.
N_CALIBRATION = 125

Criterion = Callable[[Tensor, Tensor], Tensor]


class LabelledData(Protocol):
    """What the scan asks of a data set: `explorer.data.LoadedData` answers it."""

    def validation_tensors(self, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Return inputs ``(N, ...) float32`` and labels ``(N,) int64`` that were held out from training."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """A network and the images that it is measured on.

    Attributes
    ----------
    module : nn.Module
        The caller's; never changed.
    layers : tuple of PrunableLayer
        To be measured.
    units : tuple of Unit
        What of them is pruned as one.
    inputs : Tensor, (N, ...)
    labels : Tensor, (N, ...) int64, or None
    calibration : Tensor, (M, ...)
        What BatchNorm statistics are estimated from.
    criterion : callable, optional
        Cross-entropy by default.
    """

    module: nn.Module
    layers: tuple[PrunableLayer, ...]
    units: tuple[Unit, ...]
    inputs: Tensor
    labels: Tensor | None
    calibration: Tensor
    criterion: Criterion | None = None


def take_material(
    module: nn.Module,
    data: LabelledData | tuple[Tensor, Tensor | None],
    n_images: int,
    layers: Iterable[str | PrunableLayer] | None = None,
    criterion: Criterion | None = None,
    *,
    channels: bool = False,
) -> Material:
    """Choose images and layers; see `explorer.sensitivity.measure_loss` for what is accepted.

    Raises
    ------
    DataError
        Too few images, labels that do not fit them, or a criterion without labels.
    ModelError
        Unknown layer names.
    """
    inputs, labels, calibration = _take_images(data, n_images)
    if criterion is not None and labels is None:
        raise DataError(
            "A criterion compares outputs with labels, and the data have none. Pass labels, or leave the criterion out."
        )
    chosen = choose_layers(module, inputs[:1], layers)
    units = units_of(module, inputs[:1], chosen, channels=channels)
    return Material(module, chosen, units, inputs, labels, calibration, criterion)


def choose_layers(
    module: nn.Module, example_input: Tensor, layers: Iterable[str | PrunableLayer] | None
) -> tuple[PrunableLayer, ...]:
    """Return the layers to measure, in execution order.

    Parameters
    ----------
    module : nn.Module
    example_input : Tensor
        One batch that the module accepts.
    layers : iterable of str or PrunableLayer, optional
        Names to keep; all by default. A name that is tied to a layer stands for that layer.

    Raises
    ------
    ModelError
        If a name is no prunable layer; the message suggests near ones.
    """
    present = prunable_layers(module, example_input)
    if layers is None:
        return present
    by_name = {alias: layer for layer in present for alias in (layer.name, *layer.tied)}
    chosen: set[str] = set()
    for wanted in layers:
        name = wanted if isinstance(wanted, str) else wanted.name
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, n=3, cutoff=0.5)
            advice = (
                f"Did you mean {', '.join(map(repr, near))}?" if near else f"Layers are {', '.join(by_name)}."
            )
            raise ModelError(f"{name!r} is no prunable layer of this {type(module).__name__}. {advice}")
        chosen.add(by_name[name].name)
    if not chosen:
        raise ModelError("No layer was named; leave `layers` out to measure all of them.")
    return tuple(layer for layer in present if layer.name in chosen)


def _take_images(
    data: LabelledData | tuple[Tensor, Tensor | None], n_images: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the images to measure on, their labels, and the images to estimate BatchNorm statistics from."""
    if n_images < MIN_IMAGES:
        raise DataError(
            f"n_images={n_images} is too few to tell layers apart; at least {MIN_IMAGES}, and better 500, are needed."
        )
    labels: Tensor | None
    if isinstance(data, tuple):
        if len(data) != 2:
            raise DataError(
                f"Data must be LoadedData or a pair (inputs, labels); got a tuple of {len(data)}."
            )
        inputs, labels = data
    else:
        inputs, labels = data.validation_tensors()
    if not isinstance(inputs, Tensor):
        raise DataError(
            f"Inputs must be one tensor (N, ...), one row an image; got {type(inputs).__name__}. A network that takes several, by position or by name, needs a "
            "module around it: one that takes one tensor, makes of it what the network wants (`self.net(input_ids=x, attention_mask=x != 0)`), and returns logits."
        )
    if inputs.ndim < 2 or inputs.dtype == torch.bool or inputs.is_complex():
        raise DataError(
            f"Inputs must be a tensor of numbers (N, ...), one row an image; got {inputs.dtype} of shape {tuple(inputs.shape)}."
        )
    n = len(inputs)
    if n < MIN_IMAGES:
        raise DataError(
            f"{n} validation images are too few to tell layers apart; at least {MIN_IMAGES}, better 500, are needed."
        )
    if labels is not None:
        if not isinstance(labels, Tensor) or labels.dtype.is_floating_point or len(labels) != n:
            what = (
                f"{labels.dtype} of shape {tuple(labels.shape)}"
                if isinstance(labels, Tensor)
                else type(labels).__name__
            )
            raise DataError(
                f"Labels must be an integer tensor with one row for each of the {n} inputs; got {what}."
            )
        labels = labels.long()
    # A random draw, since validation sets are often sorted by class; a fixed seed, since a scan must be repeatable.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    measured = order[:n_images]
    spare = order[n_images : n_images + N_CALIBRATION]
    if len(spare) < min(N_CALIBRATION, n_images):
        spare = order[:N_CALIBRATION]
    return inputs[measured], None if labels is None else labels[measured], inputs[spare]
