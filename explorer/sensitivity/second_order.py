"""What removing weights costs by a second-order estimate: one pass over some images serves every layer and level.

LeCun, Denker and Solla, "Optimal Brain Damage" (1990), eq. 4: near a minimum, removing the weights w_k changes the loss by about the sum of h_kk w_k**2 / 2, with h_kk
the diagonal of the Hessian. The diagonal of the empirical Fisher information stands in for it, as in Theis, Korshunova, Tejani and Huszar, "Faster gaze prediction with
dense networks and Fisher pruning" (2018), eq. 6: the mean over images of the squared gradient of each image's loss. Its weights are chosen by magnitude, as those of
every other kind, so that all kinds judge the same network.

Where there are no labels, they are drawn from the network's own answers, which makes it an estimate of the true Fisher information.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from explorer.errors import ModelError
from explorer.masks import magnitude_mask
from explorer.models import PrunableLayer
from explorer.models.memory_format import training_memory_format
from explorer.sensitivity.points import SensitivityPoint

__all__ = ["measure_fisher"]

N_IMAGES = 128
"""Gradients of single images cannot share a batch: a few seconds for a network the size of the demo's."""


def measure_fisher(
    module: nn.Module,
    inputs: Tensor,
    labels: Tensor | None,
    layers: Sequence[PrunableLayer],
    levels: Sequence[float],
    *,
    stop: threading.Event | None = None,
) -> Iterator[SensitivityPoint]:
    """Estimate the increase of the loss for every layer and level, in nats; points come when all images have been seen.

    Parameters
    ----------
    module : nn.Module
        A classifier, in evaluation mode; a copy is differentiated.
    inputs : Tensor, (N, ...) float32
    labels : Tensor, (N, ...) int64, optional
    layers : sequence of PrunableLayer
    levels : sequence of float
        In [0, 1).
    stop : threading.Event, optional
        When set, the pass ends before the next image, and no point is given.

    Yields
    ------
    SensitivityPoint
        Of kind "fisher", with the standard error over images.

    Raises
    ------
    ModelError
        If a layer's weight has no gradient.
    """
    network = copy.deepcopy(module).eval().requires_grad_(False)
    # Whatever the format of the caller's: gradients are not right in every one.
    form = training_memory_format(network, inputs)
    network.to(memory_format=form)  # type: ignore[call-overload]  # missing in torch's stubs
    weights = [network.get_submodule(layer.name).get_parameter("weight") for layer in layers]
    ordered = sorted(set(levels))
    # For each weight the first level that removes it; those that no level removes have the number of levels.
    removed_at = [_first_level(weight, ordered) for weight in weights]
    squares = [weight.detach().double().square().flatten() for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    drawn = torch.Generator().manual_seed(0)
    costs: list[list[Tensor]] = [[] for _ in layers]  # of each layer: (levels,) for each image
    for number, image in enumerate(inputs[:N_IMAGES]):
        if stop is not None and stop.is_set():
            return
        output = network(image[None].contiguous(memory_format=form))
        if labels is None:
            share = functional.softmax(output.detach(), 1).movedim(1, -1)
            label = torch.multinomial(share.flatten(0, -2), 1, generator=drawn).reshape(share.shape[:-1])
        else:
            label = labels[number][None]
        gradients = torch.autograd.grad(functional.cross_entropy(output, label), weights, allow_unused=True)
        for i, gradient in enumerate(gradients):
            if gradient is None:
                raise ModelError(
                    f"The loss does not depend on the weight of layer {layers[i].name!r}, so it has no gradient. Leave the layer out of `layers`."
                )
            cost = gradient.double().square().flatten() * squares[i] / 2
            by_level = torch.bincount(removed_at[i], weights=cost, minlength=len(ordered) + 1)
            costs[i].append(by_level[:-1].cumsum(0))
    for i, layer in enumerate(layers):
        every = torch.stack(costs[i])
        mean, error = every.mean(0), every.std(0) / len(every) ** 0.5
        n_removed = torch.bincount(removed_at[i][squares[i] > 0], minlength=len(ordered) + 1).cumsum(0)
        for k, level in enumerate(ordered):
            yield SensitivityPoint(
                layer.name,
                level,
                "fisher",
                float(mean[k]),
                std_error=float(error[k]),
                n_removed=int(n_removed[k]),
            )


def _first_level(weight: Tensor, levels: Sequence[float]) -> Tensor:
    """The number of the first level at which each weight is removed: (weights,) int64."""
    first = torch.full((weight.numel(),), len(levels))
    for k in range(len(levels) - 1, -1, -1):
        first[~magnitude_mask(weight.detach(), levels[k]).flatten()] = k
    return first
